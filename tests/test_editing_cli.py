"""Editing at the door: options, files that people give, redrawing from recipes, `ldm edit`, `ldm invert`, bad input."""

import json
import math
import shutil
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import Done, files, pixels, refused, texts_in
from PIL import Image
from rich.progress import Progress
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from typer.main import get_command

from ldm.canvas import FILLS, FITS
from ldm.cli import app, drawing
from ldm.cli.options import NAMED, completing
from ldm.pipeline import Pipeline
from ldm.request import SEAMLESS, Request

SIDE = 16  # of the small model's pictures
EQUAL = Done(0, "equal: every pixel is as it was drawn\n", "")
BOX = "box:4,4,12,12"

pytestmark = pytest.mark.usefixtures("one_thread")
COMMAND = get_command(app)


@pytest.fixture(scope="module")
def pipeline(model: Path) -> Pipeline:
    return Pipeline.from_pretrained(model, device="cpu")


@pytest.fixture(autouse=True)
def opened_once(monkeypatch, pipeline: Pipeline) -> None:
    """The parser and the model are made once for all commands here; none of them changes the model."""
    monkeypatch.setattr("ldm.cli.get_command", lambda _: COMMAND)
    monkeypatch.setattr(Pipeline, "from_pretrained", lambda *_, **__: pipeline)


def photo(path: Path, size: tuple[int, int] = (SIDE, SIDE), seed: int = 0, mode: str = "RGB") -> Path:
    """A picture in which every pixel is another."""
    numbers = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], len(mode)), np.uint8)
    Image.fromarray(numbers.squeeze()).save(path)
    return path


@pytest.fixture
def given(run, tmp_path: Path) -> Path:
    """photo.png, and mask.png, which is white in the box."""
    mask = np.zeros((SIDE, SIDE), np.uint8)
    mask[4:12, 4:12] = 255
    Image.fromarray(mask).save(tmp_path / "mask.png")
    return photo(tmp_path / "photo.png")


# -- options ----------------------------------------------------------------------------------------------------------


def test_what_is_typed_is_the_request(run, asked, monkeypatch, tmp_path: Path) -> None:
    """Every option of editing reaches its field; a ~ that no shell wrote out is written out."""
    monkeypatch.setenv("HOME", str(tmp_path))
    words = [
        "a", "--image=~/photo.png", "--mask", "box:1,2,3,4+alpha", "--mask-invert", "--mask-grow", "-3",
        "--mask-feather", "2", "--strength", "0.5", "--only-masked", "8", "--extend", "left=8", "--fill", "mirror",
        "--resample", "3", "--resample-jump", "2", "--image-guidance", "1.5", "--source", "an owl",
        "--convert-image",
    ]  # fmt: skip
    refused(run("generate", *words), 1, "enough")
    assert asked.pop() == Request(
        "a", image=f"{tmp_path}/photo.png", mask_image="box:1,2,3,4+alpha", mask_invert=True, mask_grow=-3,
        mask_feather=2, strength=0.5, padding_mask_crop=8, extend="left=8", fill="mirror", resample=3,
        resample_jump=2, image_guidance_scale=1.5, source_prompt="an owl", convert_image=True,
    )  # fmt: skip
    refused(run("generate", "a", "--image", "a.png", "--fit", "crop", "--seamless", "xy"), 1, "enough")
    assert asked.pop() == Request("a", image="a.png", fit="crop", seamless="xy")
    refused(run("generate", "a", "--noise=~/n.safetensors"), 1, "enough")
    assert asked.pop() == Request("a", noise=f"{tmp_path}/n.safetensors")
    (tmp_path / "a.yaml").write_text("{prompt: a, image: ~/photo.png, mask: ~/mask.png, only-masked: 4}")
    refused(run("generate", "--config", "a.yaml", "--set", "strength=0.25"), 1, "enough")
    home = {"image": f"{tmp_path}/photo.png", "mask_image": f"{tmp_path}/mask.png"}
    assert asked.pop() == Request("a", **home, padding_mask_crop=4, strength=0.25)
    refused(run("edit", "~/photo.png", "a", "--source", "b", "--steps", "3"), 1, "enough")
    assert asked.pop() == Request("a", image=f"{tmp_path}/photo.png", source_prompt="b", num_inference_steps=3)


def test_the_shell_is_told_what_may_follow() -> None:
    assert (set(NAMED["fill"]), set(NAMED["fit"]), set(NAMED["seamless"])) == (set(FILLS), set(FITS), set(SEAMLESS))
    assert completing(NAMED["fill"])("s") == ["smooth"]
    assert not {"image", "mask_image", "noise"} & NAMED.keys()  # where nothing is known, shells complete files


def test_lines_of_a_file_name_their_own_pictures(draw, given: Path, tmp_path: Path) -> None:
    """Relative to the current folder; each picture is that of a command of its own."""
    photo(tmp_path / "other.png", seed=1)
    rows = [{"prompt": "an owl", "image": "photo.png", "mask": BOX}, {"prompt": "a taco", "image": "other.png"}]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    draw("--prompts-file", "a.jsonl", "--seed", "5", "--strength", "0.5", "-o", "{index}.png")
    draw("an owl", "--image", "photo.png", "--mask", BOX, "--seed", "5", "--strength", "0.5", "-o", "a.png")
    draw("a taco", "--image", "other.png", "--seed", "6", "--strength", "0.5", "-o", "b.png")
    assert [texts_in(f"{i}.png")["ldm"] for i in (0, 1)] == [texts_in(name)["ldm"] for name in ("a.png", "b.png")]
    assert np.array_equal(pixels("0.png"), pixels("a.png")) and np.array_equal(pixels("1.png"), pixels("b.png"))


def test_pictures_are_read_once(draw, given: Path) -> None:
    """A run that writes over what it edits edits, in all its pictures, what was there at first."""
    words = ("an owl", "--strength", "0.5", "-n", "3", "--seed", "5")
    shutil.copy(given, "0.png")
    shutil.copy("mask.png", "1.png")
    draw(*words, "--image", given, "--mask", "mask.png", "-o", "new-{index}.png")
    draw(*words, "--image", "0.png", "--mask", "1.png", "-o", "{index}.png", "--overwrite")
    for i in range(3):
        assert np.array_equal(pixels(f"{i}.png"), pixels(f"new-{i}.png"))
    assert not np.array_equal(pixels("0.png"), pixels(given))


def test_neighbours_of_one_picture_stay_together(given: Path) -> None:
    """On a GPU eight at a time: those that edit the same picture, in whatever file it is, with the same mask."""
    from ldm.inputs import source_of

    def one(image: Path, mask: str | Path, seed: int) -> Request:
        opened = mask if isinstance(mask, str) else source_of(mask)
        return Request("a", image=source_of(image), mask_image=opened, seed=seed, num_inference_steps=1)

    here, mask = given.parent, given.parent / "mask.png"
    other = photo(here / "other.png", seed=1)
    pictures = [one(given, mask, 1), one(given, mask, 2), one(other, mask, 3), one(other, BOX, 4), one(other, BOX, 5)]
    assert [call.seed for call in drawing.calls(pictures, 8)] == [(1, 2), (3,), (4, 5)]


RUNS: dict[str, tuple[str, ...]] = {
    "img2img": ("--strength", "0.5"),
    "mask": ("--mask", "mask.png", "--resample", "2"),
    "inversion": ("--source", "an owl", "--steps", "3", "--variation-strength", "0.2"),
}


@pytest.mark.parametrize("name", RUNS)
def test_the_bar_ends_when_the_run_does(draw, given: Path, monkeypatch, name: str) -> None:
    """As many steps are counted as were announced, whatever a run goes back over."""
    bars: list[Progress] = []

    def bar(*columns: Any, quiet: bool = False) -> Progress:
        bars.append(Progress(disable=True))
        return bars[-1]

    monkeypatch.setattr(drawing, "progress_bar", bar)
    draw("an owl", "--image", given, *RUNS[name], "-n", "2", "-o", "{index}.png")
    (task,) = bars[0].tasks
    assert task.completed == task.total > 2


def test_the_way_is_shown_in_the_picture(draw, given: Path) -> None:
    """The strip and the animation of an edit have frames of the size that the picture has."""
    photo(Path("wide.png"), (40, 24))
    draw("an owl", "--image", "wide.png", "--mask", BOX, "--only-masked", "2", "--strip", "--gif", "-o", "a.png")
    with Image.open("a.gif") as animation:
        assert animation.size == (40, 24)
    with Image.open("a.strip.png") as strip:
        assert strip.height >= 24 and strip.width > 2 * 40


def test_only_png_keeps_the_bytes(draw, run, given: Path) -> None:
    """Said once, and only where something is to be kept."""
    words = ("an owl", "--image", given, "--strength", "0.5")
    masked = draw(*words, "--mask", BOX, "-n", "2", "-o", "{index}.jpg").err
    assert masked.count("kept to the byte only in a .png") == 1
    for more in (["--mask", BOX, "-o", "a.png"], ["-o", "a.jpg"], ["--mask", BOX, "-o", "b.webp", "-q"]):
        assert ".png" not in draw(*words, *more).err


def test_what_would_be_drawn_is_told(draw, given: Path) -> None:
    photo(Path("wide.png"), (40, 24))
    words = ("an owl", "--image", "wide.png", "--mask", BOX, "--only-masked", "2", "--strength", "0.5", "--dry-run")
    assert "edits wide.png: 40x24 pixels, drawn at 16x16, strength 0.5" in draw(*words).out
    (told,) = json.loads(draw(*words, "--json").out)["pictures"]
    assert (told["canvas"], told["width"], told["height"], told["strength"]) == ([40, 24], 16, 16, 0.5)
    assert (told["image"], told["mask_image"], list(told["inputs"])) == ("wide.png", BOX, ["image"])
    assert "edits" not in draw("an owl", "--dry-run").out


def test_strength_is_an_axis(run, model, given: Path) -> None:
    done = run("grid", "an owl", "--model", model, "--image", given, "--x", "strength=0.2,0.8", "--steps", "2")
    assert done.code == 0, done.err
    with Image.open(done.out.strip()) as sheet:
        assert sheet.width > 2 * 128


# -- drawn again from the recipe --------------------------------------------------------------------------------------

EDITS: dict[str, list[str]] = {
    "img2img": ["--image", "photo.png", "--strength", "0.5"],
    "mask file": ["--image", "photo.png", "--mask", "mask.png", "--mask-feather", "2"],
    "shape": ["--image", "photo.png", "--mask", BOX, "--fill", "noise", "--strength", "0.7"],
    "only masked": ["--image", "wide.png", "--mask", "box:8,8,20,16", "--only-masked", "2", "--size", "16x32"],
    "extended": ["--image", "photo.png", "--extend", "left=8,top=50%"],
    "fitted": ["--image", "wide.png", "--size", "16", "--fit", "crop"],
    "transparent": ["--image", "glass.png", "--mask", "alpha"],
    "inverted": ["--image", "photo.png", "--source", "a taco", "--steps", "3"],
    "variation": ["--image", "photo.png", "--variation-strength", "0.3", "--variation-seed", "4", "--steps", "3"],
    "resampled": ["--image", "photo.png", "--mask", BOX, "--resample", "2", "--steps", "3", "--scheduler", "euler_a"],
    "as diffusers": ["--image", "photo.png", "--mask", BOX, "--strength", "0.7", "--profile", "diffusers", "--steps",
                     "4"],
    "seamless": ["--image", "photo.png", "--seamless", "x"],
}  # fmt: skip


@pytest.mark.parametrize("name", EDITS)
def test_an_edited_picture_is_drawn_again(draw, run, model, given: Path, name: str) -> None:
    """Byte for byte, by `ldm verify` and from its recipe; the recipe of what is drawn again is the same."""
    photo(Path("wide.png"), (40, 24))
    photo(Path("glass.png"), mode="RGBA")
    draw("an owl", *EDITS[name], "--seed", "5", "-o", "a.png")
    assert run("verify", "a.png", "--model", model) == EQUAL
    draw("--from", "a.png", "-o", "b.png")
    assert np.array_equal(pixels("a.png"), pixels("b.png")) and texts_in("a.png") == texts_in("b.png")


@pytest.mark.parametrize("suffix", [".jpg", ".webp"])
def test_other_formats_are_compared_as_they_are_written(draw, run, model, suffix: str) -> None:
    photo(Path("glass.png"), mode="RGBA")
    draw("an owl", "--image", "glass.png", "--mask", BOX, "--seed", "5", "-o", f"a{suffix}")
    assert run("verify", f"a{suffix}", "--model", model) == EQUAL


def test_what_was_edited_is_looked_for(draw, run, model, given: Path, tmp_path: Path) -> None:
    """Beside the picture, then here, and only the same pixels; else it is to be given, and anything is taken."""
    draw("an owl", "--image", given, "--mask", "mask.png", "--seed", "5", "--strength", "0.5", "-o", "out/a.png")
    assert run("verify", "out/a.png", "--model", model) == EQUAL  # here
    for name in ("photo.png", "mask.png"):
        (tmp_path / name).rename(tmp_path / "out" / name)
    assert run("verify", "out/a.png", "--model", model) == EQUAL  # beside it
    digest = json.loads(texts_in("out/a.png")["ldm"])["inputs"]["image"]
    photo(tmp_path / "out/photo.png", seed=1)
    before = files(tmp_path)
    for words in (["verify", "out/a.png"], ["generate", "--from", "out/a.png", "-o", "b.png"]):
        refused(run(*words, "--model", model), 1, "the image 'photo.png'", digest[:10], "--image")
    assert files(tmp_path) == before
    photo(tmp_path / "moved.png")
    done = run("verify", "out/a.png", "--model", model, "--image", "moved.png")
    assert (done.code, done.out) == (0, f"{EQUAL.out}- image 'moved.png', was 'photo.png'\n")
    done = run("verify", "out/a.png", "--model", model, "--image", "out/photo.png")
    assert done.code == 1 and f", was {digest[:10]})" in done.out and "the image is another (" in done.out
    draw("--from", "out/a.png", "--image", "moved.png", "-o", "b.png")
    assert np.array_equal(pixels("out/a.png"), pixels("b.png"))
    draw("--from", "out/a.png", "--image", "out/photo.png", "-o", "c.png")
    kept = pixels("out/mask.png") == 0
    assert np.array_equal(pixels("c.png")[kept], pixels("out/photo.png")[kept])
    photo(tmp_path / "wide.png", (40, 24))  # another picture has its own size
    draw("--from", "out/a.png", "--image", "wide.png", "--mask", BOX, "-o", "d.png")
    assert pixels("d.png").shape == (24, 40, 3)
    draw("--from", "out/a.png", "--image", "moved.png", "--mask", "box:0,0,4,4", "-o", "e.png")
    assert np.array_equal(pixels("e.png")[4:], pixels("moved.png")[4:])


def test_folders_are_not_compared_with_pictures(run, tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    refused(run("verify", "folder", "--image", "a.png"), 2, "what was edited is for a picture")


# -- ldm invert, ldm edit ---------------------------------------------------------------------------------------------


def test_invert_writes_the_noise_of_a_picture(draw, run, model, given: Path, tmp_path: Path) -> None:
    """What it says of the picture drawn back is so of the picture that the file draws; the noise is unit noise."""
    done = run("invert", given, "an owl", "--model", model, "--steps", "4", "-o", "n.safetensors", "--json")
    assert done.code == 0, done.err
    told = json.loads(done.out)
    assert (told["path"], told["prompt"], told["steps"], told["scheduler"]) == ("n.safetensors", "an owl", 4, "ddim")
    with safe_open("n.safetensors", framework="pt") as file:
        said = json.loads(file.metadata()["ldm"])
    assert said == {name: told[name] for name in ("prompt", "steps", "scheduler", "model", "inputs")}
    noise = load_file("n.safetensors")["latents"]
    assert noise.shape == (1, 4, 8, 8) and torch.isfinite(noise).all()
    words = ("an owl", "--noise", "n.safetensors", "--scheduler", "ddim", "--guidance", "1", "--steps", "4")
    draw(*words, "-o", "back.png", "--seed", "1")
    draw(*words, "-o", "again.png", "--seed", "2")
    back = pixels("back.png")
    assert np.array_equal(back, pixels("again.png"))
    apart = ((back.astype(float) - pixels(given)) / 255) ** 2
    assert told["psnr"] == pytest.approx(-10 * math.log10(apart.mean()), abs=0.05)
    assert told["psnr_round_trip"] > told["psnr"]
    assert run("verify", "back.png", "--model", model) == EQUAL
    command = done.err.splitlines()[-1].split()
    assert command[:2] == ["ldm", "generate"] and "--size" in command
    plain = run("invert", given, "an owl", "--model", model, "--steps", "2")
    assert plain.out == "out/photo.safetensors\n" and "PSNR" in plain.err
    assert (tmp_path / "out/photo.safetensors").is_file()


def test_edit_is_generate_with_a_source(draw, run, model, given: Path) -> None:
    """The same picture as by the options; what it shows comes from its recipe where nobody says it."""
    words = ("--steps", "3", "--seed", "5", "--guidance", "2")
    draw("a taco", "--image", given, "--source", "an owl", *words, "-o", "a.png")
    done = run("edit", given, "a taco", "--source", "an owl", *words, "--model", model, "-o", "b.png")
    assert (done.code, done.out) == (0, "b.png\n")
    assert np.array_equal(pixels("a.png"), pixels("b.png")) and texts_in("a.png") == texts_in("b.png")
    draw("an owl", "--seed", "1", "-o", "drawn.png")
    done = run("edit", "drawn.png", "a taco", *words, "--model", model, "-o", "c.png")
    assert done.code == 0 and "recipe's prompt, 'an owl'" in done.err
    request = json.loads(texts_in("c.png")["ldm"])["request"]
    assert (request["source_prompt"], request["image"], request["scheduler"]) == ("an owl", "drawn.png", "ddim")
    assert run("edit", given, "a taco", *words, "--model", model, "-o", "d.png", "-q") == Done(0, "d.png\n", "")
    assert json.loads(texts_in("d.png")["ldm"])["request"]["source_prompt"] == ""


# -- bad input --------------------------------------------------------------------------------------------------------


def bad_files(folder: Path) -> None:
    """Pictures that are not taken as they are, or at all."""
    plain = Image.open(photo(folder / "photo.png"))
    photo(folder / "small.png", (8, 8))
    photo(folder / "colours.png", seed=2)
    plain.save(folder / "animated.gif", save_all=True, append_images=[plain.rotate(90)])
    plain.convert("CMYK").save(folder / "cmyk.jpg")
    plain.convert("YCbCr").save(folder / "plain.jpg")
    Image.fromarray(np.arange(256, dtype=np.uint16).reshape(16, 16) * 257).save(folder / "deep.png")
    turned = Image.Exif()
    turned[0x0112] = 6
    plain.save(folder / "turned.jpg", exif=turned)
    (folder / "cut.png").write_bytes((folder / "photo.png").read_bytes()[:200])
    (folder / "empty.png").write_bytes(b"")
    (folder / "text.png").write_text("<html>")
    (folder / "folder").mkdir()
    (folder / "vector.eps").write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n")
    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)  # 10 GB of pixels in a file of 100 bytes
    data = bytearray((folder / "photo.png").read_bytes())
    data[16:29] = header
    data[29:33] = struct.pack(">I", zlib.crc32(b"IHDR" + header))
    (folder / "bomb.png").write_bytes(data)
    save_file({"latents": torch.zeros(1, 4, 4, 4)}, folder / "small.safetensors")
    save_file({"latents": torch.full((1, 4, 8, 8), torch.inf)}, folder / "infinite.safetensors")


P, M = ["--image", "photo.png"], ["--image", "photo.png", "--mask"]
BAD: dict[str, tuple[list[str], tuple[str, ...]]] = {
    "mask without image": (["--mask", BOX], ("mask_image was given without image",)),
    "strength without image": (["--strength", "0.5"], ("strength was given without image",)),
    "feather without mask": ([*P, "--mask-feather", "2"], ("mask_feather", "without mask_image or extend")),
    "sizes that disagree": ([*M, "small.png"], ("8 x 8", "16 x 16")),
    "another size": ([*P, "--size", "24"], ("16 x 16", "24 x 24", "fit")),
    "coloured mask": ([*M, "colours.png"], ("colours", "gray")),
    "CMYK mask": ([*M, "cmyk.jpg"], ("CMYK", "--convert-image")),
    "mask of 16 bits": ([*M, "deep.png"], ("8 bits", "--convert-image")),
    "shape outside": ([*M, "box:20,20,30,30"], ("holds no pixel", "16 x 16")),
    "unknown shape": ([*M, "elipse:1,1,2,2"], ("'elipse'", "did you mean 'ellipse'?")),
    "box the wrong way": ([*M, "box:9,9,2,2"], ("left,top,right,bottom",)),
    "box of three": ([*M, "box:1,2,3"], ("left,top,right,bottom",)),
    "box of nan": ([*M, "box:1,2,nan,4"], ("'nan' is no length",)),
    "no such mask": ([*M, "none.png"], ("none.png",)),
    "strength above 1": ([*P, "--strength", "1.5"], ("strength is 1.5", "from 0 to 1")),
    "strength below 0": ([*P, "--strength", "-0.1"], ("strength is -0.1", "from 0 to 1")),
    "strength nan": ([*P, "--strength", "nan"], ("strength is nan",)),
    "animated": (["--image", "animated.gif"], ("several frames", "--convert-image")),
    "CMYK": (["--image", "cmyk.jpg"], ("CMYK", "--convert-image")),
    "16 bits": (["--image", "deep.png"], ("more than 8 bits", "--convert-image")),
    "turned": (["--image", "turned.jpg"], ("turned", "EXIF", "--convert-image")),
    "huge": (["--image", "bomb.png"], ("too large", "60000")),
    "huge, to convert": (["--image", "bomb.png", "--convert-image"], ("too large",)),
    "another format": (["--image", "vector.eps"], ("vector.eps", "no picture")),
    "cut short": (["--image", "cut.png"], ("cut.png", "cut short")),
    "empty": (["--image", "empty.png"], ("empty.png", "no bytes")),
    "a web page": (["--image", "text.png"], ("text.png", "text")),
    "no such file": (["--image", "none.png"], ("none.png",)),
    "a folder": (["--image", "folder"], ("folder",)),
    "unknown fill": ([*M, BOX, "--fill", "smoth"], ("'smoth'", "did you mean 'smooth'?")),
    "unknown fit": ([*P, "--size", "24", "--fit", "crp"], ("'crp'", "did you mean 'crop'?")),
    "unknown side": ([*P, "--extend", "lefft=8"], ("'lefft'", "left")),
    "no side": ([*P, "--extend", "8"], ("unknown side '8'", "left")),
    "beyond all sizes": ([*P, "--extend", "left=99999"], ("99999",)),
    "seamless": (["--seamless", "z"], ("unknown seamless 'z'",)),
    "resample": ([*M, BOX, "--resample", "0"], ("resample is 0",)),
    "no model for it": ([*P, "--image-guidance", "2"], ("image_guidance_scale", "instruct-pix2pix")),
    "another scheduler": ([*P, "--source", "b", "--scheduler", "dpm++2m"], ("dpm++2m", "ddim or euler")),
    "noise of another size": (["--noise", "small.safetensors", "--size", "16"], ("4, 4",)),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(run, model, tmp_path: Path, name: str) -> None:
    """Exit code 2, one sentence that says what came and what is allowed, and nothing is written."""
    bad_files(tmp_path)
    before = files(tmp_path)
    words, said = BAD[name]
    refused(run("generate", "a", "--model", model, *words, "--steps", "2", "-o", "out/a.png"), 2, *said)
    assert files(tmp_path) == before


@pytest.mark.parametrize(
    ("words", "said"),
    [(["--noise", "infinite.safetensors"], "not finite"), (["--noise", "none.safetensors"], "none.safetensors"),
     (["--noise", "photo.png"], "photo.png"), (["--from", "photo.png"], "carries no recipe")],
)  # fmt: skip
def test_bad_files(run, model, tmp_path: Path, words: list[str], said: str) -> None:
    """A failure, not a misuse: exit code 1."""
    bad_files(tmp_path)
    before = files(tmp_path)
    refused(run("generate", "a", "--model", model, *words, "-o", "out/a.png"), 1, said)
    assert files(tmp_path) == before


def test_bad_input_of_edit_and_invert(run, model, tmp_path: Path) -> None:
    bad_files(tmp_path)
    before = files(tmp_path)
    refused(run("edit"), 2, "PICTURE", "ldm edit --help")
    refused(run("edit", "photo.png", "--model", model), 2, "there is no prompt")
    refused(run("edit", "none.png", "a", "--model", model), 2, "none.png")
    refused(run("edit", "animated.gif", "a", "--model", model), 2, "several frames")
    refused(run("invert"), 2, "PICTURE", "ldm invert --help")
    refused(run("invert", "none.png", "a", "--model", model), 2, "none.png")
    refused(run("invert", "deep.png", "a", "--model", model), 2, "more than 8 bits", "--convert-image")
    refused(run("invert", "photo.png", "a", "--model", model, "-o", "a.png"), 2, "'.png'", ".safetensors")
    refused(run("invert", "photo.png", "a", "--model", model, "--scheduler", "heun"), 2, "heun", "ddim or euler")
    refused(run("invert", "photo.png", "a", "--model", model, "-o", "small.safetensors"), 2, "exists", "--overwrite")
    refused(run("invert", "photo.png", "a", "--model", model, "--steps", "0"), 2, "num_inference_steps is 0")
    assert files(tmp_path) == before


def test_empty_and_full_masks_are_said(draw, given: Path) -> None:
    """An empty one gives the picture's bytes back, a full one keeps nothing: both are drawn, and said."""
    for name, level in (("black.png", 0), ("white.png", 255)):
        Image.new("L", (SIDE, SIDE), level).save(name)
    words = ("an owl", "--image", given, "--seed", "5", "--steps", "2")
    assert "empty" in draw(*words, "--mask", "black.png", "-o", "a.png").err
    assert np.array_equal(pixels("a.png"), pixels(given))
    assert "full" in draw(*words, "--mask", "white.png", "-o", "b.png").err
    draw("an owl", "--seed", "5", "--steps", "2", "-o", "c.png")
    assert np.array_equal(pixels("b.png"), pixels("c.png"))


@pytest.mark.parametrize("name", ["animated.gif", "cmyk.jpg", "deep.png", "turned.jpg"])
def test_what_is_refused_can_be_converted(draw, run, model, tmp_path: Path, name: str) -> None:
    bad_files(tmp_path)
    draw("an owl", "--image", name, "--convert-image", "--strength", "0.5", "--steps", "2", "-o", "a.png")
    assert pixels("a.png").shape == (SIDE, SIDE, 3) and run("verify", "a.png", "--model", model) == EQUAL
