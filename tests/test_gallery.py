"""The gallery page: every picture in it, nothing from outside, and foreign text stays text."""

import base64
import hashlib
import io
import json
import re
import shutil
import subprocess
import unicodedata
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import unquote, urljoin

import numpy as np
import pytest
import typer
from PIL import Image, PngImagePlugin
from typer.main import get_command

from ldm.cli.gallery import gallery as command
from ldm.errors import LdmError, ModelError, UsageError
from ldm.gallery import Picture, command_of, describe, find_pictures, gallery, rows_of
from ldm.images import save
from ldm.recipe import Recipe, texts

PARAMETERS = "an owl, at night\nNegative prompt: rain\nSteps: 20, Sampler: Euler, CFG scale: 7, Seed: 42, Size: 64x64"
HOSTILE = [
    "</script><script>alert(1)</script>",
    "<!--<script>",
    "--> <img src=x onerror=alert(1)>",
    '"\'><svg onload=alert(1)> onmouseover="alert(1)" \'',
    "&lt;b&gt; &amp; &#60; &",
    "{{cards}} {{data}} {title} ${title} \\u003c \\",
    "🦉 👩‍🚀 鸟",
    "\u202egnp.elgae\u2066 שלום",
    "two\nlines\tand a tab\u2028and more",
    "javascript:alert(1)",
    "a?b#c%20d;e=f&g",
]


class Page(HTMLParser):
    """What a browser would see: elements with their attributes, in order, and the text of each kind of element."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.open = [""]
        self.texts: dict[str, list[str]] = {}
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        self.texts.setdefault(tag, []).append("")
        if tag not in ("meta", "link", "img", "input"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag  # nothing is left open or closed twice

    def handle_data(self, data: str) -> None:
        if self.open[-1]:
            self.texts[self.open[-1]][-1] += data

    def all(self, tag: str) -> list[dict[str, Any]]:
        return [attributes for name, attributes in self.elements if name == tag]

    @property
    def pictures(self) -> list[dict[str, Any]]:
        return [attributes for attributes in self.all("img") if attributes.get("id") != "full"]

    @property
    def data(self) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = json.loads(self.texts["script"][0])
        return found


def picture(name: str = "a.png", prompt: str = "an owl", **replaced: Any) -> Picture:
    """A made-up one with a red thumbnail."""
    data = io.BytesIO()
    Image.new("RGB", (8, 8), "red").save(data, "WEBP", lossless=True)
    request = {"prompt": prompt, "seed": 7}
    made = Picture(name, data.getvalue(), (64, 48), 1_700_000_000, rows_of(request), PARAMETERS, command_of(request))
    return made._replace(**replaced)


def test_every_picture_is_there():
    several = [picture(f"folder/{i}.png", f"owl {i}") for i in range(30)]
    page = Page(gallery(several, "Owls"))
    assert [image["alt"] for image in page.pictures] == [f"owl {i}" for i in range(30)]
    assert [link["href"] for link in page.all("a")[:30]] == [f"./folder/{i}.png" for i in range(30)]
    assert page.texts["span"][:30] == [f"owl {i}" for i in range(30)]
    assert page.texts["title"] == page.texts["h1"] == ["Owls"]
    assert "30 pictures" in page.texts["p"]
    for image in page.pictures:
        kind, _, encoded = image["src"].partition(",")
        with Image.open(io.BytesIO(base64.b64decode(encoded, validate=True))) as thumbnail:
            assert (kind, thumbnail.format) == ("data:image/webp;base64", "WEBP")
            assert np.asarray(thumbnail.convert("RGB")).reshape(-1, 3).tolist() == [[255, 0, 0]] * 64
    for given, found in zip(several, page.data, strict=True):
        assert found["name"] == given.name and found["size"] == [64, 48] and found["date"] == 1_700_000_000
        assert found["recipe"] == [["Prompt", given.recipe[0][1]], ["Seed", "7"]]
        assert found["parameters"] == PARAMETERS and found["command"] == given.command


def test_nothing_comes_from_outside():
    text = gallery([picture(), picture("b.png", size=(512, 512))], "Owls")
    page = Page(text)
    for _, attributes in page.elements:
        assert not [name for name in attributes if name.startswith("on") or name == "style"]
        for name in {"src", "href", "srcset", "action", "poster", "data", "ping"} & attributes.keys():
            assert re.match(r"data:|\./", attributes[name] or ""), attributes
    without_pictures = re.sub(r"data:image/webp;base64,[\w+/=]+", "", text)
    assert len(without_pictures) < len(text)
    assert not re.search(r"https?:|//|@import|url\(|\bimport\b|\beval\b|innerHTML|fetch\(", without_pictures)
    assert len(page.all("script")) == 2 and len(page.all("style")) == 1


def test_only_the_pages_own_script_may_run():
    """The Content-Security-Policy names script and style by their SHA-256 (CSP level 3, sec. 6.7), no other."""
    page = Page(gallery([picture()], "Owls"))
    policy = next(meta["content"] for meta in page.all("meta") if meta.get("http-equiv") == "Content-Security-Policy")
    rules = dict(rule.strip().split(" ", 1) for rule in policy.split(";"))
    for rule, element in (("script-src", page.texts["script"][1]), ("style-src", page.texts["style"][0])):
        digest = base64.b64encode(hashlib.sha256(element.encode()).digest()).decode()
        assert rules[rule] == f"'sha256-{digest}'"
    assert rules["default-src"] == "'none'" and rules["img-src"] == "data: 'self'"
    assert page.all("script")[0] == {"type": "application/json", "id": "data"}


@pytest.mark.parametrize("text", HOSTILE)
def test_foreign_text_stays_text(text: str):
    """Hostile names, prompts, recipes and titles change no element and no attribute's name, and come back exactly."""
    tame = Page(gallery([picture()], "Owls"))
    recipe = (("Prompt", text), (text, text))
    name = f"{text}/x.png"
    page = Page(gallery([picture(name, recipe=recipe, parameters=text, command=text)], text))
    shapes = [[(tag, sorted(attributes)) for tag, attributes in each.elements] for each in (tame, page)]
    assert shapes[0] == shapes[1]
    assert page.pictures[0]["alt"] == page.texts["span"][0] == text
    assert page.texts["title"] == page.texts["h1"] == [text]
    assert page.data[0]["recipe"] == [["Prompt", text], [text, text]]
    assert page.data[0]["parameters"] == page.data[0]["command"] == text and page.data[0]["name"] == name
    assert page.texts["script"][1] == tame.texts["script"][1]
    link = page.all("a")[0]["href"]
    where = urljoin("file:///folder/index.html", link)
    assert unquote(where).startswith("file:///folder/") and "?" not in where and "#" not in where
    assert unquote(link) == f"./{name}"


def test_what_no_file_can_hold_is_replaced():
    text = gallery([picture("a\udcff.png", "nul \0 and half \ud83e")], "\ud800")
    page = Page(text.encode().decode())  # it can be written as UTF-8
    assert page.pictures[0]["alt"] == "nul \ufffd and half \ufffd" and page.texts["h1"] == ["\ufffd"]
    assert page.all("a")[0]["href"] == "./a%FF.png"  # the byte of the file's name


def test_a_picture_without_recipe_is_shown_by_its_name():
    page = Page(gallery([picture("x/ö.png", recipe=(), parameters="", command="")], "Owls"))
    assert page.pictures[0]["alt"] == "x/ö.png" and page.data[0]["recipe"] == []


REQUESTS: list[dict[str, Any]] = [
    {"prompt": "an owl", "seed": 7, "num_inference_steps": 20, "guidance_scale": 7.5, "scheduler": "euler"},
    {"prompt": ("an owl",), "negative_prompt": "-rain; rm -rf ~", "seed": (3,), "width": 64, "height": 32},
    {"prompt": '-it\'s "$HOME" `id` $(id) !! \\ \n --seed 3'},
    {"prompt": "tab\t, escape \x1b[201~\x03\nrm -rf ~\n it's \\ \x9b \u202e 0"},
    {"prompt": "🦉 鸟 👩‍🚀", "eta": 0.5, "clip_skip": 1, "variation_strength": 0.25, "variation_seed": 4},
    {"prompt": "an (owl)", "literal": True, "sigmas": [9.0, 2.0], "timesteps": []},
]


@pytest.mark.skipif(shutil.which("bash") is None, reason="no bash on this machine")
@pytest.mark.parametrize("request_", REQUESTS)
def test_the_command_is_what_a_shell_reads(request_: dict[str, Any]):
    line = command_of(request_)
    assert not {"Cc", "Cf", "Zl", "Zp"} & {unicodedata.category(c) for c in line.replace("\u200d", "")}
    shell = subprocess.run(
        ["bash", "-c", f"ldm() {{ printf '%s\\0' \"$@\"; }}; {line}"], capture_output=True, check=True
    )
    words = shell.stdout.decode().split("\0")[:-1]
    flags = {
        "negative_prompt": "--negative", "num_inference_steps": "--steps", "guidance_scale": "--guidance",
        "seed": "--seed", "scheduler": "--scheduler", "eta": "--eta", "clip_skip": "--clip-skip", "width": "--width",
        "height": "--height", "variation_strength": "--variation-strength", "variation_seed": "--variation-seed",
        "literal": "--literal", "sigmas": "--sigmas",
    }  # fmt: skip
    if request_.get("literal"):
        assert words == ["generate", "an (owl)", "--sigmas", "9.0", "--sigmas", "2.0", "--literal"]
        return
    plain = {name: value[0] if isinstance(value, tuple) else value for name, value in request_.items()}
    assert words[0] == "generate" and plain.pop("prompt") in words
    for name, value in plain.items():
        joined, apart = f"{flags[name]}={value}", flags[name] in words and words[words.index(flags[name]) + 1]
        assert joined in words or apart == str(value)
    assert (words[-2] == "--") == (words[-1].startswith("-"))
    assert len(words) == 2 + ("--" in words) + sum(1 if f"{flags[n]}={v}" in words else 2 for n, v in plain.items())


def test_a_command_needs_a_prompt():
    assert command_of({"seed": 7}) == "" and command_of({}) == ""


def test_the_recipe_leaves_out_what_says_nothing():
    request = {"seed": (0,), "prompt": "an owl", "negative_prompt": "", "eta": None, "output_type": "pil", "height": 64}
    assert rows_of(request, notes=["so"]) == (("Prompt", "an owl"), ("Seed", "0"), ("Height", "64"), ("Note", "so"))


def saved(path: Path, image: Image.Image, parameters: str = "") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    text = PngImagePlugin.PngInfo()
    if parameters:
        text.add_text("parameters", parameters)
    image.save(path, **({"pnginfo": text} if path.suffix == ".png" else {}))
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three pictures that can be read, one that cannot, and what is no picture of the gallery's."""
    red = Image.new("RGB", (64, 64), "red")
    saved(tmp_path / "pics" / "b.png", red, PARAMETERS)
    saved(tmp_path / "pics" / "a" / "c.JPG", Image.new("RGB", (600, 300), "blue"))
    saved(tmp_path / "pics" / "z.webp", red)
    saved(tmp_path / "pics" / ".hidden" / "x.png", red)
    saved(tmp_path / "pics" / ".x.png", red)
    (tmp_path / "pics" / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    (tmp_path / "pics" / "notes.txt").write_text("x")
    return tmp_path / "pics"


def test_pictures_are_found_in_order_and_hidden_ones_are_not(folder: Path, tmp_path: Path):
    found = [path.relative_to(folder).as_posix() for path in find_pictures(folder)]
    assert found == ["a/c.JPG", "b.png", "broken.png", "z.webp"]
    with pytest.raises(LdmError, match=r"cannot read the folder .*nowhere"):
        list(find_pictures(tmp_path / "nowhere"))


def test_a_picture_is_described_with_its_recipe(folder: Path):
    small = describe(folder / "b.png", folder)
    assert small.name == "b.png" and small.size == (64, 64) and small.parameters == PARAMETERS
    assert {("Prompt", "an owl, at night"), ("Negative", "rain"), ("Seed", "42"), ("Steps", "20")} <= set(small.recipe)
    assert small.command.startswith("ldm generate 'an owl, at night' --negative rain --seed 42 ")
    large = describe(folder / "a" / "c.JPG", folder.parent)
    assert large.name == "pics/a/c.JPG" and large.size == (600, 300) and large.recipe == () and large.command == ""
    with Image.open(io.BytesIO(large.thumbnail)) as thumbnail:
        assert thumbnail.size == (256, 128) and thumbnail.format == "WEBP"
    with pytest.raises(ModelError, match=r"cannot read the image .*broken\.png"):
        describe(folder / "broken.png", folder)


def test_our_own_recipe_is_told_whole_and_a_damaged_one_is_said_to_be_so(tmp_path: Path):
    request = {
        "prompt": "a taco", "negative_prompt": "", "seed": 2**62, "num_inference_steps": 9, "guidance_scale": 2.5,
        "height": 8, "width": 8, "scheduler": "ddim",
    }  # fmt: skip
    digests = {"unet": "0123456789abcdef" * 4, "vae": "f" * 64}
    recipe = Recipe(request, "/home/someone/box", digests, {}, "cpu", "fp32", 2, {"ldm": "0.1", "torch": "2.13"})
    for name in ("a.png", "a.webp"):
        save(Image.new("RGB", (8, 8), "red"), tmp_path / name, texts(recipe))
        rows = describe(tmp_path / name, tmp_path).recipe
        assert rows[:2] == (("Prompt", "a taco"), ("Seed", "4611686018427387904"))
        assert {("Model", "box"), ("Drawn on", "cpu, fp32"), ("Versions", "ldm 0.1\ntorch 2.13")} <= set(rows)
        assert ("Weights", "unet 0123456789\nvae ffffffffff") in rows
    save(Image.new("RGB", (8, 8), "red"), tmp_path / "b.png", texts(recipe) | {"ldm": "{"})
    [(label, note)] = describe(tmp_path / "b.png", tmp_path).recipe
    assert label == "Note" and note.startswith("b.png: ") and str(tmp_path) not in note


def kinds() -> Iterator[tuple[str, Image.Image]]:
    pixels = np.random.default_rng(0).integers(0, 255, (48, 64, 4), dtype=np.uint8)
    yield "RGB", Image.fromarray(pixels[..., :3])
    yield "RGBA", Image.fromarray(np.dstack([pixels[..., :3], np.full((48, 64), 128, np.uint8)]))
    yield "L", Image.fromarray(pixels[..., 0])
    yield "P", Image.fromarray(pixels[..., :3]).quantize(16)
    yield "1", Image.fromarray(pixels[..., 0]).convert("1")


@pytest.mark.parametrize(("mode", "image"), [*kinds()])
def test_thumbnails_of_small_pictures_are_exact(tmp_path: Path, mode: str, image: Image.Image):
    assert image.mode == mode
    with Image.open(io.BytesIO(describe(saved(tmp_path / "a.png", image), tmp_path).thumbnail)) as thumbnail:
        assert thumbnail.convert("RGBA").tobytes() == image.convert("RGBA").tobytes()


def test_pictures_are_shown_upright(tmp_path: Path):
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees (Exif 2.32, sec. 4.6.4)
    Image.new("RGB", (400, 200), "red").save(tmp_path / "a.jpg", exif=exif)
    found = describe(tmp_path / "a.jpg", tmp_path)
    with Image.open(io.BytesIO(found.thumbnail)) as thumbnail:
        assert thumbnail.size == (128, 256) and found.size == (200, 400)
        assert "exif" not in thumbnail.info


class Done(NamedTuple):
    """What a command wrote."""

    out: str
    err: str


@pytest.fixture
def run(capsys):
    """Runs the command as typer does."""
    app = typer.Typer()
    app.command()(command)

    def call(*words: object) -> Done:
        capsys.readouterr()
        get_command(app).main([str(word) for word in words], standalone_mode=False)
        return Done(*capsys.readouterr())

    return call


def test_the_command_writes_one_page(run, folder: Path, tmp_path: Path):
    done = run(folder)
    assert done.out == f"{folder / 'index.html'}\n"
    assert len(done.err.splitlines()) == 1
    assert "note: " in done.err and "broken.png" in done.err and "left out" in done.err
    page = Page((folder / "index.html").read_text("utf-8"))
    assert [each["name"] for each in page.data] == ["a/c.JPG", "b.png", "z.webp"] and page.texts["h1"] == ["pics"]
    assert str(tmp_path) not in (folder / "index.html").read_text("utf-8")
    elsewhere = tmp_path / "pages" / "owls.html"
    assert run(folder, "-o", elsewhere, "--title", "<Owls>").out == f"{elsewhere}\n"
    page = Page(elsewhere.read_text("utf-8"))
    assert page.texts["h1"] == ["<Owls>"]
    assert [(elsewhere.parent / link["href"]).resolve() for link in page.all("a")[:3]] == [
        folder / "a" / "c.JPG", folder / "b.png", folder / "z.webp"
    ]  # fmt: skip


def test_a_page_is_replaced_only_when_told(run, folder: Path):
    (folder / "index.html").write_text("mine")
    with pytest.raises(UsageError, match=r"index\.html exists; add --overwrite"):
        run(folder)
    assert (folder / "index.html").read_text() == "mine"
    run(folder, "--overwrite")
    assert len(Page((folder / "index.html").read_text("utf-8")).pictures) == 3


def test_a_folder_without_pictures_is_said_to_be_so(run, folder: Path, tmp_path: Path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(LdmError, match=r"no PNG, JPEG, WebP or AVIF picture lies in .*empty"):
        run(tmp_path / "empty")
    saved(tmp_path / "damaged" / "a.png", Image.new("RGB", (2, 2))).write_bytes(b"no")
    with pytest.raises(LdmError, match=r"none of the 1 pictures in .*damaged can be read"):
        run(tmp_path / "damaged")
    assert not list(tmp_path.glob("*/index.html"))
