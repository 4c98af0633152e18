"""Takes the screens of these pages: the command in a real terminal, and the gallery in a real browser.

    python docs/screens.py            # all of them, about a minute
    python docs/screens.py help       # one

The command runs in a pseudo-terminal; what it sends is replayed in an emulated one up to the moment wanted, which is
drawn with 256 colours. Needs the extras `docs` and `train` (for a font), and for the gallery playwright with a chromium
that is installed.
"""

import argparse
import fcntl
import io
import os
import pty
import re
import shutil
import struct
import subprocess
import sys
import tempfile
import termios
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import matplotlib
import pyte
from PIL import Image, ImageDraw, ImageFont

from ldm.checkpoints.safe import atomic_bytes

HERE = Path(__file__).with_name("pictures")
LDM = Path(sys.executable).with_name("ldm")
FONTS = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
COLUMNS, SIZE, MARGIN = 92, 18, 16  # of the terminal; of its letters and around them, in pixels
GROUND, INK, FAINT = "#16181d", "#d8dbe2", "#8b909c"
COLOURS = {  # pyte's names of the sixteen colours, brown for yellow
    "black": "#3a3f4b", "red": "#f07178", "green": "#a5d17a", "brown": "#e6c07b", "blue": "#7cb0f5",
    "magenta": "#d29bf0", "cyan": "#6fd0d8", "white": INK, "brightblack": FAINT, "brightred": "#ff8b92",
    "brightgreen": "#bfe699", "brightbrown": "#ffd98f", "brightblue": "#9cc6ff", "brightmagenta": "#e4b5ff",
    "brightcyan": "#8fe6ec", "brightwhite": "#ffffff",
}  # fmt: skip
HALVES = {"\u2580": (0.0, 0.5), "\u2584": (0.5, 1.0), "\u2588": (0.0, 1.0)}  # what a block covers, from above
PICTURES = ["a penguin on a blue background", "a taco on a red background", "a banana on a green background"]


class Screen(NamedTuple):
    """Lines typed one after the other, and when to look at the last: at its end, or when its screen says so."""

    lines: tuple[tuple[str, ...], ...]
    rows: int
    now: Callable[[str], bool] | None = None


def under_way(screen: str) -> bool:
    """Whether a bar is in its middle, and a second thing can be seen."""
    share = re.search(r" (\d+)%", screen)
    return bool(share and 55 <= int(share[1]) <= 80 and (".png" in screen or "\u2580" in screen))


SCREENS: dict[str, Screen] = {
    "help": Screen((("--help",),), 40),
    "run": Screen((("generate", *PICTURES[:2], "-n", "2", "--seed", "7"),), 9, under_way),
    "error": Screen(
        (
            ("generate", PICTURES[0], "--scheduler", "eulr"),
            ("generate", PICTURES[0], "--steps", "0"),
            ("verfy", "owl.png"),
        ),
        9,
    ),
    "preview": Screen((("generate", PICTURES[0], "--seed", "7", "--steps", "40", "--preview"),), 27, under_way),
}


def sent(words: Sequence[str], rows: int, folder: Path) -> Iterator[bytes]:
    """What `ldm` with these words sends to a terminal, as it comes."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", rows, COLUMNS, 0, 0))
    given = {name: value for name, value in os.environ.items() if name not in ("NO_COLOR", "COLUMNS", "LINES")}
    given |= {"TERM": "xterm-256color", "COLORTERM": "truecolor"}
    with subprocess.Popen([LDM, *words], stdin=theirs, stdout=theirs, stderr=theirs, cwd=folder, env=given):
        os.close(theirs)
        while True:
            try:
                yield os.read(ours, 65536)
            except OSError:  # the other side is closed
                break
    os.close(ours)


def shown(wanted: Screen, folder: Path) -> pyte.Screen:
    """A terminal at the moment wanted."""
    screen = pyte.Screen(COLUMNS, wanted.rows)
    stream, found = pyte.ByteStream(screen), wanted.now is None
    for words in wanted.lines:
        typed = " ".join(f'"{word}"' if " " in word else word for word in words)
        stream.feed(f"\x1b[90m$\x1b[0m \x1b[1mldm {typed}\x1b[0m\r\n".encode())
        for part in sent(words, wanted.rows, folder):
            if wanted.now and found:
                continue  # the moment is over, but let it end
            # A frame begins where the cursor goes back to the first line of the last one.
            for frame in re.split(rb"(?=\r\x1b\[2K)", part):
                if not found and wanted.now and wanted.now("\n".join(screen.display)):
                    found = True
                    break
                stream.feed(frame)
    if not found:
        raise SystemExit("the moment wanted did not come; run it again on a machine that is less busy")
    return screen


def drawn(screen: pyte.Screen) -> Image.Image:
    """A terminal as a picture; blocks fill their cells to the edge, so that there are no gaps between lines."""
    plain, bold = (ImageFont.truetype(FONTS / f"DejaVuSansMono{kind}.ttf", SIZE) for kind in ("", "-Bold"))
    wide, (ascent, descent) = round(plain.getlength("m")), plain.getmetrics()
    high = ascent + descent
    used = max((y for y, line in enumerate(screen.display) if line.strip()), default=0) + 1
    image = Image.new("RGB", (COLUMNS * wide + 2 * MARGIN, used * high + 2 * MARGIN), GROUND)
    pen = ImageDraw.Draw(image)
    for y in range(used):
        for x in range(COLUMNS):
            cell = screen.buffer[y][x]
            ink, ground = colour(cell.fg, INK), colour(cell.bg, GROUND)
            left, top = MARGIN + x * wide, MARGIN + y * high
            if ground != GROUND:
                pen.rectangle((left, top, left + wide - 1, top + high - 1), ground)
            if cell.data in HALVES:
                begin, end = (round(share * high) for share in HALVES[cell.data])
                pen.rectangle((left, top + begin, left + wide - 1, top + end - 1), ink)
            elif cell.data.strip():
                pen.text((left, top), cell.data, ink, bold if cell.bold else plain)
    return image


def colour(name: str, default: str) -> str:
    """A colour of pyte's: default, a name, or six digits."""
    return default if name == "default" else COLOURS.get(name, f"#{name}")


def gallery(folder: Path) -> Image.Image:
    """A gallery page in a browser."""
    from playwright.sync_api import sync_playwright

    for words in (["generate", *PICTURES, "-n", "3", "--seed", "7", "-o", "out/"], ["gallery", "out"]):
        subprocess.run([LDM, *words], cwd=folder, check=True, capture_output=True)
    options = ["--no-sandbox"] if os.geteuid() == 0 else []  # chromium refuses root with its sandbox
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=options)
        page = browser.new_page(viewport={"width": 1080, "height": 640}, color_scheme="light")
        page.goto(next(folder.rglob("*.html")).as_uri())
        page.wait_for_load_state("networkidle")
        taken = page.screenshot()
        browser.close()
    return Image.open(io.BytesIO(taken))


def main(arguments: Sequence[str] | None = None) -> None:
    """Take the screens named, or all."""
    parser = argparse.ArgumentParser(description="Take the screens of the documentation.")
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join([*SCREENS, "gallery"]))
    HERE.mkdir(exist_ok=True)
    for name in parser.parse_args(arguments).names or [*SCREENS, "gallery"]:
        with tempfile.TemporaryDirectory() as folder:
            place = Path(folder)
            image = gallery(place) if name == "gallery" else drawn(shown(SCREENS[name], place))
        data, path = io.BytesIO(), HERE / f"screen-{name}.png"
        image.convert("RGB").quantize(256, Image.Quantize.MAXCOVERAGE, 3, dither=Image.Dither.NONE).save(
            data, "PNG", optimize=True
        )
        atomic_bytes(path, data.getvalue())
        print(path, path.stat().st_size)


if __name__ == "__main__":
    main()
