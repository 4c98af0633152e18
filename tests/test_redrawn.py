"""Every picture carries its recipe, for other tools and for us, and comes out again from it, pixel by pixel;
`ldm verify` says whether it does. Foreign and hostile recipes do no harm.
"""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import Done, files, pixels, refused, small_model, texts_in, told
from PIL import Image, PngImagePlugin
from safetensors.torch import load_file, save_file

from ldm.pipeline import Pipeline
from ldm.recipe import from_json, recipe_of, texts
from ldm.request import Request
from ldm.schedulers import SCHEDULERS

pytestmark = pytest.mark.usefixtures("quick")
FORMATS = (".png", ".jpg", ".webp", ".avif")
ODD = [
    "--negative", 'red, or: "blue"', "--guidance", "2.5", "--guidance-rescale", "0.7", "--clip-skip", "2",
    "--size", "24x16", "--steps", "3", "--seed", "5", "--variation-strength", "0.3", "--variation-seed", "11",
]  # fmt: skip


@pytest.mark.parametrize("suffix", FORMATS)
def test_every_picture_carries_its_recipe_and_no_place(draw, tmp_path, monkeypatch, model, suffix):
    """A1111's own expression finds the settings in the last line; our JSON has all; neither tells of this machine."""
    home = tmp_path / "home" / "alice"
    shutil.copytree(model, home / "nets" / "tiny")
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("USER", "alice")
    words = ['an owl, small: "so"', *ODD, "--scheduler", "DPM++ 2M Karras", "--profile", "a1111"]
    words += ["--eta-noise-seed-delta", "31337", "--model", home / "nets" / "tiny"]
    draw(*words, "-o", tmp_path / f"a{suffix}")
    found = texts_in(f"a{suffix}")
    *prompt, negative, last = found["parameters"].split("\n")
    assert (prompt, negative) == (['an owl, small: "so"'], 'Negative prompt: red, or: "blue"')
    pairs = re.findall(r'\s*(\w[\w \-/]+):\s*("(?:\\.|[^\\"])+"|[^,]*)(?:,|$)', last)
    said = dict(pairs)
    recipe = json.loads(found["ldm"])
    assert said["Model hash"] == recipe["components"]["unet"][:10] and said["Model"] == recipe["model"] == "tiny"
    assert said | {"Model hash": "", "Model": "", "Version": ""} == {
        "Steps": "3", "Sampler": "DPM++ 2M", "Schedule type": "Karras", "CFG scale": "2.5", "Seed": "5",
        "Size": "24x16", "Model hash": "", "Model": "", "Variation seed": "11", "Variation seed strength": "0.3",
        "Clip skip": "2", "ENSD": "31337", "RNG": "NV", "Profile": "a1111", "Version": "",
    }  # fmt: skip
    assert recipe["version"] == 3
    assert (recipe["request"]["scheduler"], recipe["request"]["schedule_type"]) == ("dpm++2m", "karras")
    assert recipe["components"].keys() == {"unet", "vae", "text_encoder", "tokenizer"}
    assert {"scheduler", "device", "dtype", "threads", "versions"} <= recipe.keys()
    raw = (tmp_path / f"a{suffix}").read_bytes()
    for private in (str(tmp_path), str(home), "alice", "nets"):
        assert not any(private in text for text in found.values())
        assert private.encode() not in raw and private.encode("utf-16-be") not in raw


@pytest.mark.parametrize("suffix", FORMATS)
def test_no_metadata_writes_none(draw, suffix):
    draw("an owl", "--no-metadata", "--strip", "-o", f"a{suffix}")
    for path in (f"a{suffix}", "a.strip.png"):
        with Image.open(path) as image:
            image.load()
            assert not image.getexif() and not {"parameters", "ldm", "exif"} & image.info.keys()


@pytest.fixture(scope="module")
def opened_once(model) -> Pipeline:
    return Pipeline.from_pretrained(model, device="cpu")


FIRST = {(row.family, row.noise, "eta" in row.options): name for name, row in reversed(SCHEDULERS.items())}.values()


@pytest.mark.parametrize(
    "scheduler", [name if name in FIRST else pytest.param(name, marks=pytest.mark.slow) for name in SCHEDULERS]
)
@pytest.mark.usefixtures("one_thread")
def test_the_recipe_of_every_scheduler_is_whole(opened_once, scheduler):
    """What the JSON form holds gives the same numbers, bit by bit; so it does for grids, lists and both profiles."""
    eta = {"eta": 0.4} if "eta" in SCHEDULERS[scheduler].options else {}
    listed = SCHEDULERS[scheduler].family != "distilled"
    for fields in (
        {"clip_skip": 2},
        {"profile": "a1111", "eta_noise_seed_delta": 5, "nfe": 4} | ({"schedule_type": "Simple"} if listed else {}),
        {"profile": "diffusers", "noise_source": "gpu", "timesteps": (900, 500.0, 40)},
    ):
        chosen = {"scheduler": scheduler, "seed": 5, "width": 24, "height": 16, "num_inference_steps": 3} | eta | fields
        chosen = {name: value for name, value in chosen.items() if name != "num_inference_steps" or "nfe" not in fields}
        drawn = opened_once("an (owl:1.2)", **chosen, output_type="latent")
        (single,) = drawn.request.singles()
        recipe = from_json(texts(recipe_of(opened_once, single, {"unet": "0" * 64}))["ldm"])
        again = opened_once(Request(**recipe.request), output_type="latent")
        assert torch.equal(drawn.latents, again.latents)
        assert recipe_of(opened_once, next(again.request.singles()), {"unet": "0" * 64}).request == recipe.request


@pytest.mark.parametrize(
    "words",
    [
        ("an owl", *ODD, "--scheduler", "dpm2", "--schedule-type", "beta"),
        ("an (owl:1.3) by [day|night] AND a pizza :0.5", "--scheduler", "euler_a", "--profile", "a1111", "--eta", "0.4",
         "--eta-noise-seed-delta", "31337", "--clip-skip", "2", "--steps", "4"),
        ("an (owl)", "--scheduler", "ddim", "--profile", "diffusers", "--clip-skip", "0", "--nfe", "3"),
        ("an (owl)", "--literal", "--scheduler", "dpm++2m_sde", "--sigmas", "12", "--sigmas", "1",
         "--noise-source", "gpu"),
        ("an owl", "--scheduler", "heun", "--timestep-respacing", "2,1"),
        ("an owl", "--scheduler", "DPM++ SDE Karras", "--profile", "a1111", "--steps", "3"),
    ],
    ids=["odd", "a1111", "diffusers", "sigmas", "respacing", "sde"],
)  # fmt: skip
def test_a_picture_is_drawn_again(draw, run, model, words):
    """Identical pixels from the recipe alone, and `ldm verify` says so; what is given beside it replaces its part."""
    draw(*words, "-o", "a.png")
    draw("--from", "a.png", "-o", "b.png")
    assert np.array_equal(pixels("a.png"), pixels("b.png"))
    assert texts_in("a.png") == texts_in("b.png")
    draw("--from", "a.png", "--seed", "6", "-o", "c.png")
    assert not np.array_equal(pixels("a.png"), pixels("c.png"))
    assert run("verify", "a.png", "--model", model) == Done(0, "equal: every pixel is as it was drawn\n", "")


def test_a_picture_of_version_1_is_drawn_again(draw, run, model):
    """Its recipe said nothing of what came later: brackets were text, clip_skip counted from 0 for the prompt alone."""
    words = ("an (owl)", "--negative", "red", "--scheduler", "dpm++2m", "--schedule-type", "karras", "--seed", "7")
    draw(*words, "--profile", "diffusers", "--clip-skip", "1", "-o", "a.png")
    draw(*words, "--clip-skip", "2", "-o", "other.png")
    assert not np.array_equal(pixels("a.png"), pixels("other.png"))
    form = json.loads(texts_in("a.png")["ldm"])
    later = ("nfe", "schedule_type", "timesteps", "timestep_respacing", "sigmas", "literal", "profile", "noise_source",
             "eta_noise_seed_delta")  # fmt: skip
    then = {name: value for name, value in form["request"].items() if name not in later}
    del form["inputs"]
    form |= {"version": 1, "request": then | {"scheduler": "dpm++2m_karras"}}
    info = PngImagePlugin.PngInfo()
    info.add_text("ldm", json.dumps(form))
    with Image.open("a.png") as image:
        image.save("old.png", pnginfo=info)
    assert run("verify", "old.png", "--model", model) == Done(0, "equal: every pixel is as it was drawn\n", "")


def test_a_recipe_is_that_of_the_one_picture(draw, planned):
    """Of a batch with several prompts each picture is drawn again alone; -n goes on from its seed."""
    draw("an owl", "a pizza", "--negative", "a", "--negative", "b", "-n", "2", "--seed", "7", "-o", "{index}.png")
    for i in range(4):
        draw("--from", f"{i}.png", "-o", "again.png", "--overwrite")
        assert np.array_equal(pixels(f"{i}.png"), pixels("again.png"))
    rows = planned("--from", "3.png", "-n", "2", "--steps", "9")
    assert told(rows, "prompt", "negative_prompt", "seed", "num_inference_steps") == [
        ("a pizza", "b", 10, 9), ("a pizza", "b", 11, 9)
    ]  # fmt: skip


@pytest.mark.parametrize("suffix", FORMATS[1:])
def test_lossy_pictures_are_drawn_again(draw, run, model, suffix):
    draw("an owl", "--seed", "7", "-o", "a.png")
    draw("an owl", "--seed", "7", "-o", f"a{suffix}")
    draw("--from", f"a{suffix}", "-o", "b.png")
    assert np.array_equal(pixels("a.png"), pixels("b.png"))
    assert run("verify", f"a{suffix}", "--model", model).code == 0


def changed(folder: Path, name: str) -> None:
    """One number of a component another: a weight of a network, or one merge of the tokenizer fewer."""
    if name == "tokenizer":
        form = json.loads((folder / "tokenizer/tokenizer.json").read_text())
        form["model"]["merges"].pop()
        (folder / "tokenizer/tokenizer.json").write_text(json.dumps(form))
        return
    (path,) = (folder / name).glob("*.safetensors")
    weights = load_file(path)
    key = {"unet": "conv_out.bias", "vae": "decoder.conv_out.bias"}.get(name, "text_model.final_layer_norm.bias")
    weights[key][0] += 50 if name == "text_encoder" else 0.5
    save_file(weights, path, {"format": "pt"})


@pytest.fixture(scope="module")
def worded(tmp_path_factory) -> Path:
    """The small model with a tokenizer that has merges."""
    return small_model(tmp_path_factory.mktemp("worded") / "net", 517)


@pytest.mark.parametrize("name", ["unet", "vae", "text_encoder", "tokenizer"])
def test_verify_names_the_component_that_changed(run, worded, name):
    """And no other; and so does drawing again, unless a model is named on purpose."""
    shutil.copytree(worded, "net")
    assert run("generate", "an owl", "--seed", "7", "--model", "net", "-o", "a.png").code == 0
    assert run("verify", "a.png", "--model", "net").code == 0
    changed(Path("net"), name)
    done = run("verify", "a.png", "--model", "net")
    first, *rest = done.out.splitlines()
    assert (done.code, done.err) == (1, "") and first.startswith("different: ")
    assert len(rest) == 1 and rest[0].startswith(f"- the {name} is another (")
    verdict = json.loads(run("verify", "a.png", "--model", "net", "--json").out)
    assert (verdict["equal"], verdict["pixels"] > 0, len(verdict["differences"])) == (False, True, 1)


@pytest.mark.parametrize(
    ("file", "key", "value", "said"),
    [
        ("unet/config.json", "attention_head_dim", 1, "the unet is another ("),
        ("vae/config.json", "scaling_factor", 0.5, "the vae is another ("),
        ("text_encoder/config.json", "eos_token_id", 3, "the text_encoder is another ("),
        ("scheduler/scheduler_config.json", "beta_end", 0.5, "beta_end of the scheduler 0.5, was 0.012"),
    ],
)
def test_a_configuration_decides_as_weights_do(run, worded, monkeypatch, file, key, value, said):
    """One value of a config.json another: verify names the component, and drawing again without --model refuses."""
    shutil.copytree(worded, "net")
    monkeypatch.setattr("ldm.sources.model_in_the_box", lambda: Path("net"))
    assert run("generate", "an owl", "--seed", "7", "-o", "a.png").code == 0
    config = json.loads((Path("net") / file).read_text())
    (Path("net") / file).write_text(json.dumps(config | {key: value}))
    differences = json.loads(run("verify", "a.png", "--json").out)["differences"]
    assert [line.startswith(said) for line in differences] == [True]
    refused(run("generate", "--from", "a.png", "-o", "b.png"), 1, "drawn", "another", "--model")


def test_verify_in_another_type_names_the_type_alone(run, draw, model):
    draw("an owl", "--seed", "7", "-o", "a.png")
    done = run("verify", "a.png", "--model", model, "--dtype", "bf16")
    assert done.code == 1 and done.out.splitlines()[1:] == ["- dtype bfloat16, was float32"]


def test_verify_goes_by_what_a_file_is(run, draw, model):
    draw("an owl", "--seed", "7", "-o", "a.png")
    Path("a.png").rename("a.jpg")
    done = run("verify", "a.jpg", "--model", model)
    assert (done.code, done.out) == (0, "equal: every pixel is as it was drawn\n")


def test_a_recipe_of_another_model(run, worded, model, monkeypatch, tmp_path):
    """Refused with the hashes where none is named; with --model it draws with that, and in another type too."""
    monkeypatch.setattr("ldm.sources.model_in_the_box", lambda: worded)
    assert run("generate", "an owl", "--seed", "7", "-o", "a.png").code == 0
    then = json.loads(texts_in("a.png")["ldm"])["components"]["text_encoder"][:10]  # first to differ
    assert run("generate", "--from", "a.png", "--dtype", "bf16", "-o", "half.png").code == 0
    monkeypatch.setattr("ldm.sources.model_in_the_box", lambda: model)
    refused(run("generate", "--from", "a.png", "-o", "b.png"), 1, "another model", "in the box", then, "--model")
    assert files(tmp_path) == ["a.png", "half.png"]
    assert run("generate", "--from", "a.png", "--model", model, "-o", "b.png").code == 0


def test_a_recipe_brings_its_type_and_threads(draw, model, monkeypatch):
    """A picture is drawn again in its own type of numbers, and by as many threads, within reason."""
    draw("an owl", "--seed", "7", "--dtype", "bf16", "-o", "a.png")
    draw("--from", "a.png", "-o", "b.png")
    assert texts_in("a.png") == texts_in("b.png") and np.array_equal(pixels("a.png"), pixels("b.png"))
    recipe, asked = json.loads(texts_in("a.png")["ldm"]), list[int]()
    assert (recipe["dtype"], recipe["threads"]) == ("bfloat16", torch.get_num_threads())
    with monkeypatch.context() as patch:
        patch.setattr(torch, "set_num_threads", asked.append)
        for threads in (3, 65536):
            info = PngImagePlugin.PngInfo()
            info.add_text("ldm", json.dumps(recipe | {"threads": threads}))
            Image.new("RGB", (8, 8)).save("c.png", pnginfo=info)
            draw("--from", "c.png", "-o", "d.png", "--overwrite")
    assert asked == [3, 256]


def test_verify_says_how_far_the_pixels_are(draw, run, model):
    draw("an owl", "--seed", "7", "-o", "a.png")
    with Image.open("a.png") as image:
        info = PngImagePlugin.PngInfo()
        for key in ("parameters", "ldm"):
            info.add_text(key, image.info[key])
        for x, by in ((0, 100), (1, 100), (2, 1)):
            old = image.getpixel((x, 3))
            image.putpixel((x, 3), (old[0], old[1], old[2] + by if old[2] < 128 else old[2] - by))
        image.save("b.png", pnginfo=info)
        image.resize((8, 8)).save("c.png", pnginfo=info)
    done = run("verify", "b.png", "--model", model)
    assert (done.code, done.err) == (1, "")
    assert done.out == "different: 1.2 % of the pixels (2 of them visibly), the largest by 100 of 255\n"
    verdict = json.loads(run("verify", "b.png", "--model", model, "--json").out)
    assert (verdict["pixels"], verdict["visible"], verdict["of"], verdict["largest"]) == (3, 2, 256, 100)
    done = run("verify", "c.png", "--model", model)
    assert done.code == 1 and "8x8" in done.out and "16x16" in done.out
    Path("d.png").write_bytes(Path("a.png").read_bytes()[:-300])
    refused(run("verify", "d.png", "--model", model), 1, "d.png", "damaged")


def test_pictures_without_our_recipe(run, draw, planned, model):
    Image.new("RGB", (8, 8)).save("a.png")
    refused(run("generate", "--from", "a.png", "--model", model), 1, "a.png carries no recipe")
    refused(run("verify", "a.png", "--model", model), 1, "a.png carries no recipe")
    refused(run("verify", "none.png"), 1, "none.png")
    Path("b.png").write_text("no picture")
    refused(run("generate", "--from", "b.png"), 1, "b.png")
    info = PngImagePlugin.PngInfo()
    info.add_text(
        "parameters",
        "an {owl}\nNegative prompt: red\nSteps: 3, Sampler: Euler a, CFG scale: 2, Seed: 7, Size: 16x16, "
        "Model hash: 0123456789, Model: sd15, Denoising strength: 0.4, Version: v1.10.1",
    )
    Image.new("RGB", (8, 8)).save("c.png", pnginfo=info)
    done = draw("--from", "c.png", "-o", "d.png")
    assert "note: " in done.err and "sd15" in done.err and "--strength 0.4" in done.err
    (row,) = planned("--from", "c.png")
    assert (row["prompt"], row["negative_prompt"], row["scheduler"], row["seed"]) == ("an {owl}", "red", "euler_a", 7)
    draw("an {owl}", "--literal", "--negative", "red", "--steps", "3", "--scheduler", "Euler a", "--guidance", "2",
         "--seed", "7", "--profile", "a1111", "--schedule-type", "uniform", "-o", "e.png")  # fmt: skip
    assert np.array_equal(pixels("d.png"), pixels("e.png"))
    refused(run("verify", "c.png", "--model", model), 1, "not drawn by ldm", "--from")


ESCAPE = "\x1b]0;owned\x07\x1b[31m\x9b2J\u202e"


def test_hostile_recipes_reach_no_terminal(draw, run, model, tmp_path):
    """Escapes in a prompt or a name are shown, never obeyed, by every command that reads pictures."""
    draw("an owl", "--seed", "7", "-o", "a.png")
    ours = json.loads(texts_in("a.png")["ldm"])
    settings = f"Steps: 2, Sampler: {ESCAPE}, Seed: 1, Model: {ESCAPE}, {ESCAPE}a: 1"
    foreign = f"{ESCAPE}\nNegative prompt: {ESCAPE}\n{settings}"
    for name, key, value in (
        ("p.png", "ldm", json.dumps(ours | {"request": ours["request"] | {"prompt": f"owl {ESCAPE}"}})),
        ("m.png", "ldm", json.dumps(ours | {"model": ESCAPE})),
        ("d.png", "ldm", json.dumps(ours | {"device": "no\u00e9 device"})),
        ("k.png", "ldm", json.dumps(ours | {ESCAPE: ESCAPE})),
        ("f.png", "parameters", foreign),
    ):
        info = PngImagePlugin.PngInfo()
        info.add_text(key, value)
        Image.new("RGB", (8, 8)).save(name, pnginfo=info)
        for words in (
            ["generate", "--from", name, "--model", model, "--overwrite"], ["generate", "--from", name, "--dry-run"],
            ["generate", "--from", name, "--model", model, "--json"], ["verify", name, "--model", model],
            ["generate", "--from", name, "--model", model, "--dry-run"], ["verify", name, "--json"], ["info", name],
            ["info", name, "--json"], ["gallery", ".", "--overwrite"],
        ):  # fmt: skip
            done = run(*words)
            assert done.code in (0, 1, 2) and "Traceback" not in done.err and "fault of ldm" not in done.err
            assert not {*"\x1b\x07\x9b\u202e"} & {*(done.out + done.err)}, (words, done)
    assert run("generate", "--from", "p.png", "--model", model).code == 0
    assert run("generate", "--from", "f.png", "--model", model).code == 0
    refused(run("generate", "--from", "m.png", "--model", model), 1, "model of the recipe")
    assert all(name.isascii() for name in files(tmp_path))
