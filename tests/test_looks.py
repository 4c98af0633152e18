"""Looking at pictures and at what is installed: strips, animations, the preview, variations, grids, galleries, info,
doctor; and the help pages, whose examples are run.
"""

import json
import os
import pty
import re
import shlex
import shutil
import subprocess
import sys
import threading
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import Done, files, pixels, refused, small_model, told, write_adapters
from PIL import Image
from safetensors.torch import load_file, save_file
from singles import model_of, single_state, small_family, write
from typer.main import get_command

from ldm.checkpoints.families import FAMILIES
from ldm.checkpoints.folder import open_folder
from ldm.cli import app
from ldm.errors import UsageError
from ldm.noise import slerp
from ldm.pipeline import Pipeline
from ldm.request import Request

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.usefixtures("quick")

# -- the way from noise to picture ------------------------------------------------------------------------------------


def test_strip_and_animation(draw, tmp_path):
    """One picture a step, side by side with white gaps, the picture itself the last; the same as an animation."""
    done = draw("an owl", "--seed", "7", "--steps", "5", "--strip", "--gif", "-o", "new/a.png")
    assert done.out == "new/a.png\n" and files(tmp_path / "new") == ["a.gif", "a.png", "a.strip.png"]
    picture, strip = pixels("new/a.png"), pixels("new/a.strip.png")
    assert strip.shape == (16 + 2 * 2, 5 * (16 + 2) + 2, 3)
    cells = [strip[2:18, 2 + 18 * i : 18 + 18 * i] for i in range(5)]
    assert np.array_equal(cells[-1], picture) and not np.array_equal(cells[0], picture)
    assert (strip[:2] == 255).all() and (strip[:, 18:20] == 255).all()
    with Image.open("new/a.gif") as gif:
        assert gif.size == (16, 16) and 1 < gif.n_frames <= 5
        lengths = []
        for i in range(gif.n_frames):
            gif.seek(i)
            lengths.append(gif.info["duration"])
        last = np.asarray(gif.convert("RGB"), float)
        assert sum(lengths) == 4 * 100 + 2000 and gif.info["loop"] == 0
    assert np.abs(last - picture).mean() < 8  # 256 colours
    draw("an owl", "--seed", "7", "--steps", "40", "--scheduler", "euler", "--strip", "-o", "b.png")
    assert pixels("b.strip.png").shape == (20, 24 * 18 + 2, 3)
    assert np.array_equal(pixels("b.strip.png")[2:18, -18:-2], pixels("b.png"))


def test_all_on_one_sheet(draw, run, model, tmp_path):
    """As many columns as rows, each picture there to the pixel, enlarged by a whole factor; nothing is drawn where the
    sheet cannot be written.
    """
    done = draw("an owl", "a taco", "-n", "2", "--seed", "7", "--steps", "2", "-o", "new/", "--sheet", "sheets/all.png")
    paths = done.out.split()
    assert len(paths) == 4 and files(tmp_path / "sheets") == ["all.png"]
    sheet = pixels("sheets/all.png")
    for i, path in enumerate(paths):
        left = 8 + 136 * (i % 2)
        rows = [r for r in range(len(sheet) - 127) if np.array_equal(sheet[r, left : left + 128 : 8], pixels(path)[0])]
        assert any(np.array_equal(sheet[r : r + 128 : 8, left : left + 128 : 8], pixels(path)) for r in rows)
    for sheet_name, said in (("b.txt", "suffix"), ("a.png", "the sheet of all"), ("sheets/all.png", "--overwrite")):
        refused(run("generate", "--model", model, "an owl", "-o", "a.png", "--sheet", sheet_name), 2, said)
    for taken in (tmp_path / "a.png", "a.strip.png"):  # the same file by another path, and what lies beside the picture
        command = run("generate", "--model", model, "an owl", "-o", "a.png", "--strip", "--sheet", taken)
        refused(command, 2, "the sheet of all")
    assert not (tmp_path / "a.png").exists()


def watched(run: Any, patch: pytest.MonkeyPatch, *words: object, **environment: str) -> tuple[Done, str]:
    """A command whose stderr is a terminal, and all that was written to it."""
    screen, terminal = pty.openpty()
    parts = []

    def read() -> None:
        with suppress(OSError):  # so Linux ends what comes from a terminal when its other end is closed
            while part := os.read(screen, 65536):
                parts.append(part)

    reader = threading.Thread(target=read)
    reader.start()
    for name in ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE"):
        patch.delenv(name, raising=False)
    for name, value in ({"TERM": "xterm-256color", "COLORTERM": "truecolor", "COLUMNS": "80"} | environment).items():
        patch.setenv(name, value)
    with patch.context() as inner, os.fdopen(terminal, "w", encoding="utf-8") as stderr:
        inner.setattr(sys, "stderr", stderr)
        done = run(*words)
    reader.join()
    os.close(screen)
    return done, b"".join(parts).decode()


def shown_at_the_end(written: str) -> list[str]:
    """The lines a terminal shows after all of it: as much of ECMA-48 as a bar and a preview need."""
    lines, row, column = [""], 0, 0
    for code, plain in re.findall(r"\x1b\[([?\d;]*[A-Za-z])|([^\x1b])", written):
        if plain == "\r":
            column = 0
        elif plain == "\n":
            row += 1
            lines += [""] * (row == len(lines))
        elif plain:
            lines[row] = lines[row].ljust(column)[:column] + plain + lines[row][column + 1 :]
            column += 1
        elif code.endswith("A"):
            row -= int(code[:-1] or 1)
        elif code.endswith("K"):
            assert code == "2K", code
            lines[row] = ""
        else:
            assert code.endswith("m") or code in ("?25l", "?25h"), code
    return [line.rstrip() for line in lines if line.strip()]


def test_the_emulator_shows_what_was_written():
    assert shown_at_the_end("one\r\ntwo\r\n\x1b[1A\x1b[2K\x1b[1mthr\x1b[0mee\r\n") == ["one", "three"]


def test_preview(run, draw, model, monkeypatch):
    """Half blocks in 24-bit colours while the picture comes, and nothing of them when it is there."""
    words = ["generate", "an owl", "--seed", "7", "--model", model, "--steps", "6", "--preview", "--overwrite", "-o"]
    done, written = watched(run, monkeypatch, *words, "a.png")
    assert done == Done(0, "a.png\n", "")
    colours = set(re.findall(r"\x1b\[[\d;]*38;2;(\d+;\d+;\d+)", written))
    assert "\u2580" in written and len(colours) > 3
    assert shown_at_the_end(written) == ["seed 7"]
    assert written.rindex("\x1b[?25h") > written.rindex("\x1b[?25l")  # the cursor is there again
    done, written = watched(run, monkeypatch, *words, "b.png", NO_COLOR="1")
    coloured = re.search(r"\x1b\[[\d;]*\b(3\d|4\d|9\d)\b[\d;]*m", written)
    assert re.search("[\u2584\u2588]", written) and not coloured  # black and white
    assert shown_at_the_end(written) == ["seed 7"]
    assert watched(run, monkeypatch, *words, "c.png", "-q") == (Done(0, "c.png\n", ""), "")
    assert run(*words, "d.png") == Done(0, "d.png\n", "seed 7\n")
    for name in "bcd":
        assert np.array_equal(pixels("a.png"), pixels(f"{name}.png"))


# -- variations -------------------------------------------------------------------------------------------------------


def test_slerp_is_the_arc_between_two_noises():
    """Against the closed form in float64; noises of one length keep it; image by image the same as in a batch."""
    a, b = torch.randn(2, 3, 4, 96, 96)
    b *= (a.flatten(1).norm(dim=1) / b.flatten(1).norm(dim=1))[:, None, None, None]
    for share in (0.0, 0.1, 0.5, 0.9, 1.0):
        mixed = slerp(a, b, share)
        for x, y, z in zip(a, b, mixed, strict=True):
            p, q = x.double().numpy().ravel(), y.double().numpy().ravel()
            angle = np.arccos(p @ q / np.sqrt((p @ p) * (q @ q)))
            wanted = (np.sin((1 - share) * angle) * p + np.sin(share * angle) * q) / np.sin(angle)
            assert np.abs(z.numpy().ravel() - wanted).max() < 2e-6
            assert abs(np.linalg.norm(z.double()) / np.linalg.norm(p) - 1) < 1e-6
            assert torch.equal(slerp(x[None], y[None], share)[0], z)
    assert torch.equal(slerp(a, b, 0.0), a) and torch.equal(slerp(a, b, 1.0), b)
    assert torch.equal(slerp(a, a, 0.5), a) and torch.isfinite(slerp(a, -a, 0.5)).all()


def test_the_ends_of_a_variation(model):
    """Strength 0 is the plain picture, strength 1 begins with the other seed's noise, bit for bit."""
    pipeline = Pipeline.from_pretrained(model)

    def latents(**fields: Any) -> torch.Tensor:
        return pipeline("an owl", output_type="latent", **fields).latents

    assert torch.equal(latents(seed=7, variation_strength=0.0), latents(seed=7))
    assert torch.equal(latents(seed=7, variation_strength=1.0, variation_seed=9), latents(seed=9))
    between = latents(seed=7, variation_strength=0.2, variation_seed=9)
    near, far = ((between - latents(seed=seed)).norm() for seed in (7, 9))
    assert 0 < near < far
    row = latents(seed=7, variation_strength=0.2, variation_seed=8, num_images_per_prompt=3)
    assert torch.equal(row[1:2], between) and not torch.equal(row[0], row[2])


def test_variations_keep_the_seed(draw, planned, run, model):
    """Their own seeds count up; a recipe draws one of them again, and what is said beside it changes it."""
    words = ["--seed", "7", "--variation-strength", "0.3", "--variation-seed", "9"]
    done = draw("an owl", *words, "-n", "3", "-o", "{seed}-{variation}.png")
    assert done.out.splitlines() == ["7-9.png", "7-10.png", "7-11.png"]
    assert done.err.splitlines() == [f"seed 7, variation {i}" for i in (9, 10, 11)]
    assert len({pixels(name).tobytes() for name in done.out.splitlines()}) == 3
    draw("--from", "7-10.png", "-o", "again.png")
    assert np.array_equal(pixels("7-10.png"), pixels("again.png"))
    rows = planned("--from", "7-10.png", "-n", "2")
    assert told(rows, "seed", "variation_seed", "variation_strength") == [(7, 10, 0.3), (7, 11, 0.3)]
    assert told(planned("--from", "7-10.png", "--variation-strength", "0"), "variation_seed") == [None]
    draw("--from", "7-10.png", "--variation-strength", "0", "-o", "plain.png")
    draw("an owl", "--seed", "7", "-o", "owl.png")
    assert np.array_equal(pixels("plain.png"), pixels("owl.png"))
    drawn = planned("an owl", "--seed", "7", "--variation-strength", "0.3")  # one is chosen and told
    assert isinstance(drawn[0]["variation_seed"], int)
    for bad, said in (
        (["--variation-seed", "3"], ("variation_seed", "variation_strength")),
        (["--variation-strength", "1.5"], ("variation_strength is 1.5", "from 0 to 1")),
        (["--variation-strength", "0.5", "--variation-seed", "-1"], ("variation_seed is -1",)),
        (["--variation-strength", "0.5", "--variation-seed", "1", "--variation-seed", "2"], ("2 variation_seeds",)),
    ):
        refused(run("generate", "an owl", "--model", model, *bad), 2, *said)
    with pytest.raises(UsageError, match="variation_strength is True"):
        Request("an owl", variation_strength=True)


# -- grids ------------------------------------------------------------------------------------------------------------


def places(sheet: np.ndarray, picture: np.ndarray) -> list[tuple[int, int]]:
    """Where a picture of 16 x 16 stands on a sheet, each of its pixels as a square of 8 x 8."""
    cell = picture.repeat(8, 0).repeat(8, 1)
    first = (sheet[:-127, :-127] == cell[0, 0]).all(2) & (sheet[127:, 127:] == cell[-1, -1]).all(2)
    found = ((int(y), int(x)) for y, x in np.argwhere(first))
    return [(y, x) for y, x in found if np.array_equal(sheet[y : y + 128, x : x + 128], cell)]


def test_a_grid_is_of_the_pictures_drawn_alone(run, draw, model):
    """Columns and rows in order, with their labels beside them."""
    words = ["an owl", "--guidance", "2", "--model", model]
    done = run("grid", *words, "--x", "steps=1,2,3", "--y", "seed=4..5", "-o", "new/g.png")
    assert (done.code, done.out) == (0, "new/g.png\n")
    sheet, found = pixels("new/g.png"), {}
    for x, steps in enumerate((1, 2, 3)):
        for y, seed in enumerate((4, 5)):
            draw(*words, "--steps", steps, "--seed", seed, "-o", f"{x}{y}.png")
            (found[x, y],) = places(sheet, pixels(f"{x}{y}.png"))
    tops, lefts = ([found[0, y][0] for y in (0, 1)], [found[x, 0][1] for x in (0, 1, 2)])
    assert found == {(x, y): (tops[y], lefts[x]) for x in range(3) for y in range(2)}
    assert tops == sorted(tops) and lefts == sorted(lefts)
    for x in lefts:
        assert sheet[tops[0] - 20 : tops[0], x : x + 128].min() < 100  # its label
    for y in tops:
        assert sheet[y : y + 18, : lefts[0] - 4].min() < 100
    with Image.open("new/g.png") as image:
        assert "Steps: 1, " in image.info["parameters"] and "ldm" not in image.info
    free = run("grid", *words, "--x", "seed=1,2")
    assert free.out == "out/grid-an-owl.png\n"
    assert run("grid", *words, "--x", "seed=1,2").out == "out/grid-an-owl-2.png\n"


def test_wildcards_of_a_grid(run, draw, model):
    """Chosen as when drawn alone; the picture's text says what was; --literal chooses nothing."""
    Path("lists").mkdir()
    Path("lists/place.txt").write_text("at home\nin a tree\n")
    words = ["a {red|green} owl __place__", "--model", model, "--wildcards", "lists"]
    assert run("grid", *words, "--x", "seed=1..4", "-o", "g.png").code == 0
    for seed in (1, 2, 3, 4):
        draw(*words, "--seed", seed, "-o", f"{seed}.png")
        assert places(pixels("g.png"), pixels(f"{seed}.png"))
    with Image.open("g.png") as sheet, Image.open("1.png") as alone:
        assert sheet.info["parameters"].splitlines()[0] == alone.info["parameters"].splitlines()[0]
    assert run("grid", *words, "--literal", "--x", "seed=1,2", "-o", "h.png").code == 0
    with Image.open("h.png") as sheet:
        assert sheet.info["parameters"].splitlines()[0] == words[0]


def test_sheets_and_variations_of_a_grid(run, draw, model):
    """A third axis is a sheet for each of its values; all pictures of one strength have the same other noise."""
    words = ["--seed", "7", "--model", model]
    done = run("grid", *words, "--x", "prompt=an owl|a pizza", "--z", "guidance=1,3", "-o", "g.png")
    names = done.out.splitlines()
    assert len(names) == 2 and all(Path(name).is_file() for name in names), done.err
    for name, guidance in zip(names, (1, 3), strict=True):
        for prompt in ("an owl", "a pizza"):
            draw(prompt, *words, "--guidance", guidance, "-o", "a.png", "--overwrite")
            assert len(places(pixels(name), pixels("a.png"))) == 1
    same = run("grid", *words, "an owl", "--x", "steps=1", "--z", "negative=a b|a.b", "-o", "n.png")
    assert len({*same.out.splitlines()}) == 2
    for i, axis in enumerate(("0,0.5", "0.5,0")):
        done = run("grid", *words, "an owl", "--x", f"variation_strength={axis}", "--y", "variation_seed=3,3",
                   "-o", f"v{i}.png")  # fmt: skip
        assert done.code == 0, done.err
        draw("an owl", *words, "-o", "a.png", "--overwrite")
        assert len(places(pixels(f"v{i}.png"), pixels("a.png"))) == 2
        draw("an owl", *words, "--variation-strength", ".5", "--variation-seed", "3", "-o", "b.png", "--overwrite")
        assert len(places(pixels(f"v{i}.png"), pixels("b.png"))) == 2
    assert run("grid", *words, "an owl", "--x", "variation_strength=0.5", "--y", "steps=2,2", "-o", "w.png").code == 0
    column = pixels("w.png")[:, -16 - 128 : -16]
    assert np.array_equal(column[-144:-16], column[-280:-152])  # a variation seed was drawn, one for both rows


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--x", "steps=1,2", "--y", "num_inference_steps=3"], ("two axes go through num_inference_steps",)),
        (["--x", "stepz=1,2"], ("'stepz'", "'steps'")),
        (["--x", "steps=1,2", "-n", "2"], ("one picture", "no -n")),
        (["a pizza", "--x", "steps=1,2"], ("one picture",)),
        (["--x", "steps"], ("no values",)),
        (["--x", "steps=0"], ("num_inference_steps is 0",)),
        (["--x", "seed=1..400", "--y", "steps=1..400", "--z", "clip_skip=1..100"], ("16000000 pictures", "2500")),
        (["--x", "scheduler=euler,eulr"], ("'eulr'", "'euler'")),
        (["--x", "steps=1", "-o", "g.gif"], ("'.gif'",)),
        (["--x", "steps=1", "-o", "there.png"], ("there.png exists", "--overwrite")),
        ([], ("--x",)),
    ],
)
def test_grids_that_are_refused(run, model, monkeypatch, tmp_path, words, said):
    Path("there.png").write_text("mine")
    monkeypatch.setattr(Pipeline, "sample", None)  # drawing would fail
    refused(run("grid", "an owl", "--model", model, *words), 2, *said)
    assert files(tmp_path) == ["there.png"] and Path("there.png").read_text() == "mine"


# -- what is there ----------------------------------------------------------------------------------------------------


def test_gallery_of_drawn_pictures(run, draw, model, tmp_path):
    draw("an owl", "a <b>pizza</b>", "--seed", "7", "-o", "out/")
    draw("a taco", "--seed", "9", "-o", "out/deep/taco.webp")
    assert run("gallery", "out") == Done(0, "out/index.html\n", "")
    page = Path("out/index.html").read_text("utf-8")
    assert page.count('<img src="data:image/webp') == 3 and "&lt;b&gt;pizza" in page and "<b>pizza" not in page
    assert not re.search(r"(src|href)=\"(https?:|//|/)", page) and str(tmp_path) not in page
    assert "deep/taco.webp" in page and "ldm generate" in page
    refused(run("gallery", "out"), 2, "out/index.html exists", "--overwrite")
    refused(run("gallery", "nowhere"), 1, "nowhere")
    Path("empty").mkdir()
    refused(run("gallery", "empty"), 1, "no PNG, JPEG, WebP or AVIF picture")


def test_info(run, draw, model, tmp_path):
    """A picture, a model folder, weights, and what is none of them."""
    draw('an owl, so: "small"', "--seed", "7", "--negative", "red", "-o", "a.webp")
    done = run("info", "a.webp")
    assert done.code == 0 and done.err == ""
    rows = dict(re.findall(r"^(\w[\w ]*?)  +(.*)$", done.out, re.MULTILINE))
    assert rows["kind"] == "WEBP picture, 16x16" and rows["recipe of"] == "ldm"
    assert (rows["prompt"], rows["negative"], rows["seed"]) == ('an owl, so: "small"', "red", "7")
    typed = shlex.split(json.loads(run("info", "a.webp", "--json").out)["command"])
    assert typed[:3] == ["ldm", "generate", 'an owl, so: "small"']
    assert run(*typed[1:], "--model", model, "-o", "b.webp").code == 0  # the command it tells draws it
    assert Path("a.webp").read_bytes() == Path("b.webp").read_bytes()
    found = json.loads(run("info", model, "--json").out)
    for name in ("unet", "vae", "text_encoder"):
        (path,) = (model / name).glob("*.safetensors")
        count = sum(tensor.numel() for tensor in load_file(path).values())
        assert (
            found[name].startswith(f"{count:,} parameters in F32") or f"{count:,} parameters in float32" in found[name]
        )
    assert found["kind"] == "model folder" and found["scheduler"]["_class_name"] == "DDIMScheduler"
    assert found["defaults"] == {"num_inference_steps": 2}
    assert "U-Net of a model folder" in run("info", next((model / "unet").glob("*.safetensors"))).out
    lora(tmp_path / "lora.safetensors")
    found = json.loads(run("info", "lora.safetensors", "--json").out)
    assert "kohya" in found["kind"] and (found["tensors"], found["metadata"]["ss_network_dim"]) == (2, "4")
    Image.new("RGB", (9, 5)).save("bare.png")
    assert "9x5" in run("info", "bare.png").out and "no recipe" in run("info", "bare.png").out
    Path("text.txt").write_text("words")
    Path("bad.safetensors").write_bytes(b"x")
    for name, said in (("none.png", "no none.png"), ("text.txt", "text.txt"), (".", "no model_index.json"),
                       ("bad.safetensors", "bad.safetensors")):  # fmt: skip
        refused(run("info", name), 1, said)


def lora(path: Path) -> None:
    """A file with the names of kohya's LoRA."""
    down, up = torch.zeros(4, 8), torch.zeros(8, 4)
    save_file({"lora_unet_x.lora_down.weight": down, "lora_unet_x.lora_up.weight": up}, path, {"ss_network_dim": "4"})


def test_doctor(run, model, monkeypatch, tmp_path):
    """All is well here; of weights with one byte changed the file is named, and the exit code is 1."""
    monkeypatch.setattr("ldm.memory.available_bytes", lambda device: 4 << 30)
    done = run("doctor")
    assert done.code == 0 and "FAULT" not in done.out and "whole" in done.out, done.out
    assert torch.__version__.split("+")[0] in done.out
    shutil.copytree(model, "net")
    (path,) = Path("net/vae").glob("*.safetensors")
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    monkeypatch.setattr("ldm.sources.model_in_the_box", lambda: tmp_path / "net")
    done = run("doctor")
    (fault,) = [line for line in done.out.splitlines() if line.startswith("FAULT")]
    assert done.code == 1 and f"vae/{path.name} is changed" in fault
    found = json.loads(run("doctor", "--json").out)
    assert [row["name"] for row in found if row["fault"]] == ["weights"]
    assert str(tmp_path) not in done.out and str(Path.home()) not in done.out


def test_plot_of_the_schedulers(run, model):
    assert run("schedulers", "--plot", "new/levels.png", "--steps", "5", "--model", model).out == "new/levels.png\n"
    with Image.open("new/levels.png") as image:
        image.load()
        assert image.format == "PNG" and min(image.size) > 300
        assert len(image.convert("RGB").getcolors(1 << 20)) > 10  # lines, and not one
    refused(run("schedulers", "--plot", "a.gif"), 2, "'.gif'", ".png")
    refused(run("schedulers", "--plot", "a.png", "--steps", "0"), 2, "--steps")


# -- the help ---------------------------------------------------------------------------------------------------------


def pages(command: Any, path: tuple[str, ...] = ()) -> dict[tuple[str, ...], Any]:
    """Every command by the words that lead to it."""
    inner = getattr(command, "commands", {})
    return {path: command} | {page: c for name, sub in inner.items() for page, c in pages(sub, (*path, name)).items()}


PAGES = pages(get_command(app))
LIGHT = """import sys
try:
    {what}
finally:
    assert not {{"torch", "numpy", "PIL", "matplotlib"}} & set(sys.modules)"""
COUNTED = """import sys
calls, before = 0, set(sys.modules)
def count(frame, event, argument):
    global calls
    calls += event == "call"
sys.setprofile(count)
try:
    {what}
finally:
    sys.setprofile(None)
    assert not {{"torch", "numpy", "PIL", "matplotlib"}} & set(sys.modules)
    print(calls, len(set(sys.modules) - before), file=sys.stderr)"""


def cpu_seconds(script: str) -> float:
    """CPU time of a Python process. Bytecode may be kept, as it is wherever nobody forbids it."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    child = subprocess.Popen([sys.executable, "-c", script], cwd=ROOT, stdout=subprocess.DEVNULL, env=environment)
    _, status, used = os.wait4(child.pid, 0)
    child.returncode = os.waitstatus_to_exitcode(status)
    assert child.returncode == 0, script
    return used.ru_utime + used.ru_stime


def counted(what: str) -> tuple[int, int]:
    """Calls of Python functions that a process makes, and modules it loads: the same in every hour of a machine."""
    done = subprocess.run([sys.executable, "-c", COUNTED.format(what=what)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    calls, modules = map(int, done.stderr.split()[-2:])
    return calls, modules


def shown(page: tuple[str, ...]) -> str:
    return f"main({[*page, '--help']})"


def test_every_help_shows_without_torch():
    """All pages, in one process."""
    pages = "\n    ".join(f"try: {shown(page)}\n    except SystemExit as end: assert not end.code" for page in PAGES)
    cpu_seconds(LIGHT.format(what=f"from ldm.cli import main\n    {pages}"))


@pytest.mark.parametrize("page", [(), ("generate",), ("train-lora",)], ids=str)
def test_help_costs_little(page):
    """No more work than fits into 0.4 s (the test below): the largest page, train-lora's, makes 354,000 calls of
    Python functions, with 314 modules.
    """
    calls, modules = counted(f"from ldm.cli import main; {shown(page)}")
    assert calls <= 400_000 and modules <= 340


@pytest.mark.slow  # its figure is wrong while other tests run beside it
@pytest.mark.parametrize("page", PAGES, ids=str)
def test_help_is_quick(page):
    """At most 0.4 s of CPU time, of the best of five runs."""
    assert any(cpu_seconds(LIGHT.format(what=f"from ldm.cli import main; {shown(page)}")) <= 0.4 for _ in range(5))


def test_import_ldm_costs_nothing():
    """Beyond Python's own start, little but the standard library's importlib and typing."""
    calls, modules = counted("import ldm")
    assert calls <= 6000 and modules <= 35


HOURS = ("train", "train-lora", "eval")  # shorter runs of these have tests of their own


@pytest.fixture(scope="session")
def published_scale(tmp_path_factory) -> Path:
    """A small model whose latents have an eighth of a picture's side, as published ones: 512 x 512 is soon drawn."""
    return small_model(tmp_path_factory.mktemp("models") / "eighth", widths=(8, 8, 8, 8))


@pytest.mark.usefixtures("pickles_here")
@pytest.mark.parametrize("page", [page for page in PAGES if page[:1] not in [(name,) for name in HOURS]], ids=" ".join)
def test_the_examples_of_the_help_are_run(run, published_scale, monkeypatch, request, page):
    """Line by line as they stand, in a folder with the files they name, with a small model for the one in the box."""
    monkeypatch.setattr("ldm.sources.model_in_the_box", lambda: published_scale)
    for place in ("memory", "runtime"):
        monkeypatch.setattr(f"ldm.{place}.available_bytes", lambda device: 4 << 30)
    if page[:1] == ("data",):
        request.getfixturevalue("noto_font")
    Path("path/to").mkdir(parents=True)
    for link in ("weights", "path/to/model-folder", "sd15", "a", "b", "c"):
        Path(link).symlink_to(published_scale)
    Path("prompts.txt").write_text("an owl\na pizza\n")
    lora(Path("lora.safetensors"))
    if page[:1] == ("lora",):
        write_adapters(open_folder(published_scale), Path())
        run("lora", "merge", "ink.safetensors", "-o", "tuned")
    if {*page[:1]} & {"convert", "info", "merge"}:  # one file, narrow, with the names of real ones
        family = small_family("sd1")
        monkeypatch.setitem(FAMILIES, "sd1", family)
        write(Path("model.safetensors"), single_state("sd1", model_of(family, 4)))
        torch.save({"state_dict": load_file("model.safetensors")}, "model.ckpt")
        for copied in ("a.safetensors", "b.safetensors"):
            shutil.copy("model.safetensors", copied)
    assert run("generate", "an owl", "--seed", "7").out == "out/an-owl-7.png\n"
    for name in ("owl.png", "photo.png"):
        shutil.copy("out/an-owl-7.png", name)
    lines = [line.removeprefix("$ ").replace(r"\[", "[") for line in PAGES[page].epilog.split("\n\n")[1:]]
    for line in lines:
        words = shlex.split(line)[1:]
        for place in (Path(words[2]),) if words[0] == "convert" else ():  # each line by itself
            shutil.rmtree(place, ignore_errors=True) if place.is_dir() else place.unlink(missing_ok=True)
        before = set(Path().rglob("*"))
        done = run(*words)
        if "cuda" in words and not torch.cuda.is_available():
            refused(done, 2, "cuda was asked for")
            continue
        assert done.code == 0, (line, done)
        if words[0] in ("generate", "grid") and "--help" not in words:
            written = [row["path"] if row else text for text in done.out.splitlines() for row in [parsed(text)]]
            assert written and {Path(name) for name in written} <= set(Path().rglob("*")) - before, line


def parsed(line: str) -> dict[str, Any]:
    """The object of a line of JSON; {} of any other."""
    found: dict[str, Any] = json.loads(line) if line.startswith("{") else {}
    return found
