"""A user points at the model that they have: every kind of name, part and adapter, through Pipeline and the command."""

import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import pixels, refused, small_model, texts_in
from safetensors.torch import load_file, save_file
from singles import model_of, narrow_families, single_state, small_family, write
from test_families_folders import NEGATIVE, SIDE, near, noise, theirs
from torch import Tensor

from ldm.checkpoints.components import PIPELINES
from ldm.checkpoints.families import FAMILIES
from ldm.checkpoints.folder import open_folder
from ldm.errors import UsageError
from ldm.pipeline import Pipeline

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # the other libraries' own deprecations while they import
    import diffusers
    import transformers

pytestmark = [
    pytest.mark.usefixtures("quick"),
    pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy keyword"),
]


@pytest.fixture(scope="module")
def sd1(tmp_path_factory) -> Path:
    """A narrow SD1 in one file, in the names of real ones."""
    return write(
        tmp_path_factory.mktemp("single") / "sd1.safetensors", single_state("sd1", model_of(small_family("sd1"), 4))
    )


@pytest.fixture
def narrow(monkeypatch) -> None:
    """Narrow networks in place of the published ones."""
    narrow_families(monkeypatch)


DRAW = ["an owl", "--seed", "7", "--steps", "2", "--size", "16", "--scheduler", "ddim"]


def test_a_single_file_is_a_model(run, narrow, sd1, pickles_here):
    """--model takes it; converted to a folder it draws the same picture; a pickle of it only when that is allowed."""
    assert run("generate", *DRAW, "--model", sd1, "-o", "a.png").code == 0
    assert run("convert", sd1, "folder").code == 0
    assert run("generate", *DRAW, "--model", "folder", "-o", "b.png").code == 0
    assert np.array_equal(pixels("a.png"), pixels("b.png"))
    torch.save({"state_dict": load_file(sd1), "epoch": 3}, "sd1.ckpt")
    done = run("generate", *DRAW, "--model", "sd1.ckpt", "-o", "c.png")
    refused(done, 1, "pickled PyTorch checkpoint", "--allow-pickle")
    assert run("generate", *DRAW, "--model", "sd1.ckpt", "--allow-pickle", "-o", "c.png").code == 0
    assert np.array_equal(pixels("a.png"), pixels("c.png"))
    recipes = [json.loads(texts_in(name)["ldm"])["components"] for name in ("a.png", "b.png", "c.png")]
    assert recipes[0] == recipes[1] == recipes[2]
    assert run("verify", "a.png", "--model", "folder").code == 0


@pytest.mark.slow
def test_another_autoencoder(run, narrow, sd1, tmp_path):
    """By --vae: a file in the original names; its scaling factor is the model's; the recipe says that it is another."""
    state = {name: value for name, value in load_file(sd1).items() if name.startswith("first_stage_model.")}
    state["first_stage_model.decoder.conv_out.bias"] += 0.25
    save_file(state, "vae.safetensors")
    assert run("generate", *DRAW, "--model", sd1, "-o", "a.png").code == 0
    assert run("generate", *DRAW, "--model", sd1, "--vae", "vae.safetensors", "-o", "b.png").code == 0
    one, other = (json.loads(texts_in(name)["ldm"])["components"] for name in ("a.png", "b.png"))
    assert {name for name in one if one[name] != other[name]} == {"vae"}
    assert not np.array_equal(pixels("a.png"), pixels("b.png"))
    assert run("convert", sd1, "folder").code == 0
    assert run("generate", *DRAW, "--model", "folder", "--vae", "vae.safetensors", "-o", "c.png").code == 0
    assert np.array_equal(pixels("b.png"), pixels("c.png"))
    done = run("verify", "b.png", "--model", sd1)
    assert done.code == 1 and "- the vae is another (" in done.out
    assert run("verify", "b.png", "--model", sd1, "--vae", "vae.safetensors").code == 0


def test_a_learned_word(run, model):
    """--embedding teaches it, the picture changes only where it is said, and the recipe names the file."""
    torch.manual_seed(0)
    save_file({"<owlish>": torch.randn(2, 32)}, "owlish.safetensors")
    words = ["--seed", "7", "--model", model]
    taught = [*words, "--embedding", "owlish.safetensors"]
    assert run("generate", "an <owlish> owl", *words, "-o", "a.png").code == 0
    assert run("generate", "an <owlish> owl", *taught, "-o", "b.png").code == 0
    assert run("generate", "an owl", *words, "-o", "c.png").code == 0
    assert run("generate", "an owl", *taught, "-o", "d.png").code == 0
    assert not np.array_equal(pixels("a.png"), pixels("b.png")) and np.array_equal(pixels("c.png"), pixels("d.png"))
    (adapter,) = json.loads(texts_in("b.png")["ldm"])["adapters"]
    assert (adapter["type"], adapter["name"], len(adapter["sha256"])) == ("textual_inversion", "<owlish>", 64)
    assert run("verify", "b.png", "--model", model, "--embedding", "owlish.safetensors").code == 0
    save_file({"<wide>": torch.randn(2, 99)}, "wide.safetensors")
    refused(run("generate", "an owl", *words, "--embedding", "wide.safetensors", "-o", "e.png"), 2, "99")


def test_base_and_refiner_at_the_command(run, tmp_path):
    """--refiner draws what the two give in Python; the recipe names both, and verify wants both."""
    for family in ("sdxl", "refiner"):
        theirs(family, tmp_path / f"made-{family}").save_pretrained(tmp_path / family)
    asked = ["a red owl", "--negative", NEGATIVE, "--seed", "7", "--steps", "5", "--size", SIDE, "--model", "sdxl"]
    done = run("generate", *asked, "--refiner", "refiner", "--refiner-start", "0.6", "-o", "a.png", "--verbose")
    assert done.code == 0, done.err
    both = Pipeline.from_pretrained("sdxl", refiner="refiner", device="cpu")
    options: dict[str, Any] = {"num_inference_steps": 5, "height": SIDE, "width": SIDE, "seed": 7}
    drawn = both("a red owl", negative_prompt=NEGATIVE, refiner_start=0.6, **options).images[0]
    assert np.array_equal(pixels("a.png"), np.asarray(drawn))
    known = json.loads(texts_in("a.png")["ldm"])["components"]
    assert {"refiner_unet", "refiner_text_encoder_2", "text_encoder", "text_encoder_2", "tokenizer_2"} <= known.keys()
    assert run("verify", "a.png", "--model", "sdxl", "--refiner", "refiner").code == 0
    assert run("verify", "a.png", "--model", "sdxl").code == 1
    assert "the model's latents" not in done.err


@pytest.mark.parametrize(("channels", "wants"), [(9, "an image and a mask"), (8, "an image"), (7, "a small image")])
def test_models_that_want_more_than_words_say_so(narrow, tmp_path, channels, wants):
    """They open, and are saved under their own pipeline's name; drawing from words alone is refused."""
    family = "x4-upscaler" if channels == 7 else "sd1"
    path = write(tmp_path / "x.safetensors", single_state(family, model_of(FAMILIES[family], channels)))
    pipeline = Pipeline.from_single_file(path, device="cpu")
    with pytest.raises(UsageError, match=rf"{channels} channels\): it wants {wants} beside the words"):
        pipeline("an owl")
    pipeline.save_pretrained(tmp_path / "folder")
    name = json.loads((tmp_path / "folder/model_index.json").read_text())["_class_name"]
    assert name == pipeline.components.pipeline == PIPELINES[False, pipeline.components.task][0]
    assert open_folder(tmp_path / "folder").task == pipeline.components.task


def with_bert(folder: Path) -> tuple[diffusers.StableDiffusionPipeline, Path]:
    """diffusers' pipeline of SD1's kind with BERT for a text encoder, and the folder it writes."""
    pipe = theirs("sd1", folder / "base")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "red", "owl", "two", "taco", "##s", "on", "blue"]
    (folder / "vocab.txt").write_text("\n".join(words))
    config = transformers.BertConfig(
        vocab_size=len(words), hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64,
        max_position_embeddings=32,
    )  # fmt: skip
    parts = {**pipe.components, "text_encoder": transformers.BertModel(config).eval()}
    parts["tokenizer"] = transformers.BertTokenizer(str(folder / "vocab.txt"), model_max_length=32)
    made = diffusers.StableDiffusionPipeline(**parts, requires_safety_checker=False)
    made.set_progress_bar_config(disable=True)
    made.save_pretrained(folder / "model")
    return made, folder / "model"


def test_bert_in_the_place_of_clip(tmp_path):
    pipe, folder = with_bert(tmp_path)
    ours = Pipeline.from_pretrained(folder, device="cpu")
    options = {"num_inference_steps": 3, "guidance_scale": 4.0, "height": SIDE, "width": SIDE}
    expected: Tensor = pipe("a red owl", **options, generator=noise(7), output_type="latent").images
    assert near(ours("a red owl", **options, seed=7, output_type="latent").latents, expected)
    ours.save_pretrained(tmp_path / "ours", dtype="fp32")
    again = diffusers.StableDiffusionPipeline.from_pretrained(tmp_path / "ours", use_safetensors=True)
    again.set_progress_bar_config(disable=True)
    assert near(again("a red owl", **options, generator=noise(7), output_type="latent").images, expected)
    assert near(
        Pipeline.from_pretrained(tmp_path / "ours", device="cpu")("a red owl", **options, seed=7).latents, expected
    )


def test_local_models_open_without_a_network(narrow, no_sockets, sd1, tmp_path):
    small_model(tmp_path / "folder")
    Pipeline.from_pretrained(tmp_path / "folder", device="cpu")
    Pipeline.from_single_file(sd1, device="cpu")
    Pipeline.from_pretrained(with_bert(tmp_path)[1], device="cpu")
    Pipeline.from_pretrained(device="cpu")
