"""The fast mode of a model: the pictures of stock diffusers, few network calls, recipes that say so, and files that are
written whole.
"""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from helpers import Done, of_velocity, pixels, refused, write_adapters
from safetensors.torch import load_file, save_file
from torch import nn

from ldm.adapters.names import book_of
from ldm.adapters.writing import write_adapter
from ldm.checkpoints.folder import FAST, open_folder, save_folder
from ldm.checkpoints.hub import files_of
from ldm.checkpoints.safe import check_manifest
from ldm.errors import ModelError, UsageError
from ldm.fast import LORA, NAME, write_fast
from ldm.interop import to_diffusers
from ldm.lora import TARGETS, LoRA
from ldm.models.tiny_vae import AutoencoderTiny, TinyVAEConfig
from ldm.pipeline import Pipeline
from ldm.recipe import digests, read
from ldm.training.distill import fast_defaults
from ldm.training.first_stage import save_model

pytestmark = pytest.mark.usefixtures("one_thread", "quick")


def random_lora(model: Path, path: Path, seed: int = 0) -> None:
    """Random numbers as `ldm train distill` writes what it learns."""
    torch.manual_seed(seed)
    parts = open_folder(model)
    lora = LoRA.for_model({"unet": parts.unet}, 2, None, tuple(TARGETS))
    for parameter in lora.parameters():
        nn.init.normal_(parameter, std=0.1)
    path.mkdir(parents=True, exist_ok=True)
    write_adapter(lora.adapter(), path / LORA, book_of(parts.networks), dtype=torch.float16)
    (path / "generation_config.json").write_text(json.dumps(fast_defaults(4)))


def random_tiny(path: Path, levels: int = 2) -> None:
    torch.manual_seed(1)
    widths, blocks = (4,) * levels, (1,) * levels
    tiny = AutoencoderTiny(TinyVAEConfig(3, 3, 4, widths, widths, blocks, blocks))
    save_model(tiny.half(), tiny.config.to_dict(), path, "diffusion_pytorch_model.safetensors")


@pytest.fixture(scope="module")
def slow(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small model that predicts v with zero terminal SNR, and has no fast mode."""
    folder = tmp_path_factory.mktemp("models") / "small"
    return of_velocity(model, folder)


@pytest.fixture(scope="module")
def parts(slow: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two training runs give: distilled/ and tiny/."""
    folder = tmp_path_factory.mktemp("parts")
    random_lora(slow, folder / "distilled")
    random_tiny(folder / "tiny")
    return folder


@pytest.fixture(scope="module")
def fast(slow: Path, parts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model with a fast mode."""
    folder = tmp_path_factory.mktemp("models") / "small"
    shutil.copytree(slow, folder)
    assert write_fast(folder, parts / "distilled", parts / "tiny") == folder / FAST
    return folder


def calls_of(pipeline: Pipeline, **options: Any) -> tuple[list[int], Any]:
    """The batch of every network call of a picture, and what was drawn."""
    seen: list[int] = []
    hook = pipeline.components.unet.register_forward_hook(lambda _, args, y: seen.append(len(args[0])))
    drawn = pipeline("an owl", seed=3, **options)
    hook.remove()
    return seen, drawn


# -- drawing -----------------------------------------------------------------------------------------------------------


def test_stock_diffusers_draws_the_same_picture(fast: Path) -> None:
    """It reads the same files: the LoRA with LCMScheduler, the tiny autoencoder, as many steps, no guidance."""
    stock = to_diffusers(Pipeline.from_pretrained(fast, device="cpu"))
    stock.set_progress_bar_config(disable=True)
    stock.scheduler = diffusers.LCMScheduler.from_config(stock.scheduler.config)
    stock.vae = diffusers.AutoencoderTiny.from_pretrained(fast / FAST / "vae", torch_dtype=torch.float32)
    options = {"num_inference_steps": 4, "guidance_scale": 1.0, "height": 16, "width": 16, "output_type": "np"}

    def theirs() -> torch.Tensor:
        return torch.from_numpy(stock("an owl", generator=torch.Generator().manual_seed(3), **options).images)

    base = theirs()
    stock.load_lora_weights(fast / FAST)  # which finds the file by its name
    ours = Pipeline.from_pretrained(fast, device="cpu", fast=True)("an owl", seed=3, output_type="np").images
    assert (theirs() - base).abs().max() > 0.01
    assert (torch.from_numpy(ours) - theirs()).abs().max() <= 1e-4  # type: ignore[arg-type]


def test_a_picture_takes_four_network_calls(slow: Path, fast: Path) -> None:
    """Of one row each; without the mode guidance makes them two. What is said explicitly wins over its defaults."""
    seen, drawn = calls_of(Pipeline.from_pretrained(fast, device="cpu", fast=True))
    assert seen == [1] * 4
    assert (drawn.request.scheduler, drawn.request.guidance_scale) == ("lcm", 1)
    assert calls_of(Pipeline.from_pretrained(fast, device="cpu"))[0] == [2] * 3
    chosen = {"num_inference_steps": 5, "guidance_scale": 2.0, "scheduler": "ddim"}
    seen, drawn = calls_of(Pipeline.from_pretrained(fast, device="cpu", fast=True), **chosen)
    assert seen == [2] * 5 and drawn.request.scheduler == "ddim"
    kept = Pipeline.from_pretrained(fast, device="cpu", fast=True, vae=slow / "vae")
    assert type(kept.vae).__name__ == "AutoencoderKL" and set(kept.components.weights.loaded) == {NAME}


def test_the_model_beside_its_fast_mode_is_as_it_was(slow: Path, fast: Path) -> None:
    """Bit for bit, and its own weights are told of a picture that is drawn fast."""
    with_mode, without = (Pipeline.from_pretrained(folder, device="cpu") for folder in (fast, slow))
    assert torch.equal(with_mode("an owl", seed=3).latents, without("an owl", seed=3).latents)
    quick = Pipeline.from_pretrained(fast, device="cpu", fast=True)
    quick("an owl", seed=3)
    told, own = digests(quick), digests(without)
    assert told.pop("vae") != own.pop("vae") and told == own


def test_a_mode_without_a_decoder_keeps_the_models(slow: Path, parts: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(slow, folder)
    write_fast(folder, distilled=parts / "distilled")
    quick = Pipeline.from_pretrained(folder, device="cpu", fast=True)
    assert type(quick.vae).__name__ == "AutoencoderKL" and quick("an owl", seed=3).request.num_inference_steps == 4


# -- the command -------------------------------------------------------------------------------------------------------


@pytest.fixture
def draw(run, fast):
    """`ldm generate` with the model that has a fast mode, which must succeed."""

    def command(*words: object, model: Path = fast) -> Done:
        done: Done = run("generate", "--model", model, "--device", "cpu", *words)
        assert done.code == 0, done.err
        return done

    return command


def test_the_command_draws_fast_and_its_recipe_says_so(run, draw, fast) -> None:
    """--from and `ldm verify` open the model in the same mode, and draw the same pixels."""
    draw("an owl", "--seed", "3", "--fast", "-o", "a.png")
    wanted = Pipeline.from_pretrained(fast, device="cpu", fast=True)("an owl", seed=3).images[0]
    assert (pixels("a.png") == np.asarray(wanted)).all()
    recipe = read("a.png").recipe
    assert [(row["name"], row["fast"]) for row in recipe.adapters] == [(NAME, True)]
    assert (recipe.request["scheduler"], recipe.request["num_inference_steps"]) == ("lcm", 4)
    draw("--from", "a.png", "-o", "b.png")
    assert Path("a.png").read_bytes() == Path("b.png").read_bytes()
    done = run("verify", "a.png", "--model", fast)
    assert (done.code, done.out) == (0, "equal: every pixel is as it was drawn\n")
    draw("--from", "a.png", "--seed", "4", "--fast", "-o", "c.png")
    draw("an owl", "--seed", "4", "--fast", "-o", "d.png")
    assert (pixels("c.png") == pixels("d.png")).all()


def test_other_adapters_go_with_it(draw, fast) -> None:
    """They are added up in one order, also when they are found again by their names."""
    write_adapters(open_folder(fast), Path())
    draw("an owl", "--seed", "3", "--fast", "--lora", "ink.safetensors:0.5", "-o", "a.png")
    assert [row["name"] for row in read("a.png").recipe.adapters] == [NAME, "ink"]
    draw("an owl", "--seed", "3", "--fast", "-o", "b.png")
    assert (pixels("a.png") != pixels("b.png")).any()
    draw("--from", "a.png", "--lora-dir", ".", "-o", "c.png")
    assert Path("a.png").read_bytes() == Path("c.png").read_bytes()


def test_a_slow_picture_is_drawn_again_fast(draw) -> None:
    """What its recipe says of the run gives way to the mode, what is typed does not; the words and the seed stay."""
    draw(
        "an owl", "--seed", "3", "--steps", "6", "--guidance", "7", "--eta", "0.5", "--scheduler", "ddim", "-o", "s.png"
    )
    draw("--from", "s.png", "--fast", "-o", "f.png")
    draw("an owl", "--seed", "3", "--fast", "-o", "g.png")
    assert (pixels("f.png") == pixels("g.png")).all()
    draw("--from", "s.png", "--fast", "--steps", "2", "-o", "h.png")
    assert read("h.png").request["num_inference_steps"] == 2 and read("h.png").request["scheduler"] == "lcm"


def test_another_models_fast_mode_does_not_draw_its_pictures(run, draw, fast, slow, tmp_path, monkeypatch) -> None:
    """Whose picture it is says the U-Net; the VAE, which the mode may replace, may be another one."""
    other = tmp_path / "box"
    shutil.copytree(fast, other)
    weights = other / "unet" / "diffusion_pytorch_model.safetensors"
    save_file({name: tensor * 1.01 for name, tensor in load_file(weights).items()}, weights)
    draw("an owl", "--seed", "3", "-o", "a.png", model=slow)
    for at_hand, code in ((fast, 0), (other, 1)):
        monkeypatch.setattr("ldm.sources.model_in_the_box", lambda at_hand=at_hand: at_hand)
        done = run("generate", "--from", "a.png", "--fast", "--device", "cpu", "-o", f"{code}.png")
        assert done.code == code, done.err
    assert "drawn by another model" in done.err and "its unet is" in done.err and not Path("1.png").exists()


def test_a_mode_that_was_made_anew_is_told(run, draw, fast, slow, tmp_path) -> None:
    draw("an owl", "--seed", "3", "--fast", "-o", "a.png")
    other = tmp_path / "small"
    shutil.copytree(fast, other)
    random_lora(slow, tmp_path / "again", seed=5)
    write_fast(other, distilled=tmp_path / "again")
    done = run("verify", "a.png", "--model", other)
    assert done.code == 1 and "the adapters are others ('fast-mode'; were 'fast-mode')" in done.out


def test_a_model_without_the_mode_says_so(run, slow, monkeypatch) -> None:
    said = ("small has no fast mode", "draw without --fast", "ldm train distill")
    refused(run("generate", "an owl", "--fast", "--model", slow), 2, *said)
    Path("one.safetensors").write_bytes(b"nothing")
    refused(run("generate", "an owl", "--fast", "--model", "one.safetensors"), 2, "a fast mode lies in a model folder")
    monkeypatch.setattr("ldm.sources.model_in_the_box", lambda: slow)
    with pytest.raises(UsageError, match=r"^the model in the box has no fast mode"):
        Pipeline.from_pretrained(fast=True)


# -- the files ---------------------------------------------------------------------------------------------------------


def test_the_mode_is_written_whole_and_listed(slow: Path, parts: Path, tmp_path: Path) -> None:
    """Part by part, each leaving the other; a part that is not there changes nothing."""
    folder = tmp_path / "model"
    shutil.copytree(slow, folder)
    write_fast(folder, decoder=parts / "tiny")
    with pytest.raises(UsageError, match="has no fast mode"):
        Pipeline.from_pretrained(folder, device="cpu", fast=True)
    write_fast(folder, distilled=parts / "distilled")
    there = sorted(file.relative_to(folder).as_posix() for file in (folder / FAST).rglob("*") if file.is_file())
    assert there == [
        "fast/generation_config.json", f"fast/{LORA}", "fast/vae/config.json",
        "fast/vae/diffusion_pytorch_model.safetensors",
    ]  # fmt: skip
    assert check_manifest(folder) == {}
    assert (folder / FAST / LORA).read_bytes() == (parts / "distilled" / LORA).read_bytes()
    (tmp_path / "half").mkdir()
    shutil.copy(parts / "distilled" / LORA, tmp_path / "half")
    for given, missing in ((tmp_path / "half", "generation_config.json"), (tmp_path / "none", LORA)):
        with pytest.raises(ModelError, match=rf"there is no .*{missing}; name the `result` folder"):
            write_fast(folder, distilled=given)
    with pytest.raises(ModelError, match="is no model folder"):
        write_fast(tmp_path / "half", distilled=parts / "distilled")
    assert check_manifest(folder) == {} and not [item for item in folder.iterdir() if item.name.startswith(".")]


def test_a_new_model_does_not_keep_the_mode_of_the_old_one(fast: Path, tmp_path: Path) -> None:
    """It was distilled for other weights. One that is saved in its fast mode has all that in it."""
    folder = tmp_path / "model"
    shutil.copytree(fast, folder)
    (folder / "card.md").write_text("kept")
    wanted = Pipeline.from_pretrained(folder, device="cpu", fast=True)
    wanted.save_pretrained(folder)
    assert not (folder / FAST).exists() and (folder / "card.md").exists()
    again = Pipeline.from_pretrained(folder, device="cpu")
    torch.testing.assert_close(again("an owl", seed=3).latents, wanted("an owl", seed=3).latents)
    parts = open_folder(fast)
    save_folder(replace(parts, generation={}), folder)
    assert not (folder / FAST).exists()


def test_a_decoder_of_another_size_is_refused(fast: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(fast, folder)
    random_tiny(tmp_path / "large", levels=3)
    write_fast(folder, decoder=tmp_path / "large")
    with pytest.raises(ModelError, match="makes 4 pixels of one, and model 2"):
        Pipeline.from_pretrained(folder, device="cpu", fast=True)


def test_the_hub_is_asked_for_the_mode_too(fast: Path) -> None:
    names = [file.relative_to(fast).as_posix() for file in fast.rglob("*") if file.is_file()]
    index = json.loads((fast / "model_index.json").read_text())
    wanted = files_of("some/model", index, iter(names), None, False)
    assert {name for name in names if name.startswith("fast/")} <= set(wanted)
