"""Single files of every family, at reduced width and true topology, in the names of real files and with the numbers of
diffusers' and transformers' networks (singles.py); saved files read back by other programs.
"""

import gzip
import hashlib
import json
import random
import subprocess
import sys
import warnings
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import load_file
from singles import CASES, Model, model_of, narrow_families, single_state, write, write_hollow
from torch import Tensor

from ldm.checkpoints.components import Components
from ldm.checkpoints.families import FAMILIES
from ldm.checkpoints.folder import open_folder, save_folder
from ldm.checkpoints.safe import read_header
from ldm.checkpoints.single_file import open_single_file, open_vae, save_single_file
from ldm.errors import ModelError, NumericalError, UsageError
from ldm.models.presets import TEXT_ENCODERS, UNETS, VAES
from ldm.models.tiny_vae import AutoencoderTiny
from ldm.models.vae import AutoencoderKL
from ldm.text.tokenizer import MERGES, CLIPTokenizer

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # the other libraries' own deprecations while they import
    import diffusers
    import transformers

NEAR = 1e-5  # of the largest value
UNET = "model.diffusion_model."
MERGES_SHA256 = "f61f2adf497e6f5357c347aeb4646fabe82f341e946de5bdec5d2858e41bef4a"


USUAL = [(name, next(iter(family.channels))) for name, family in FAMILIES.items()]
XL_EDITS = [("sdxl", 8), ("sdxl", 9)]


def slow(*row: object) -> Any:
    """What differs from a faster case in the first convolution alone."""
    return pytest.param(*row, marks=pytest.mark.slow)


class Case(NamedTuple):
    """A single file and what was put into it."""

    path: Path
    model: Model
    state: dict[str, Tensor]


@pytest.fixture(scope="module", autouse=True)
def small():
    """Narrow networks in place of the published ones, tokenizers built once, and one thread, for more only wait for
    each other.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        narrow_families(patch)
        patch.setattr(CLIPTokenizer, "standard", cache(CLIPTokenizer.standard))
        yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    """The single file of a family and a number of input channels, written once."""
    made: dict[Any, Case] = {}
    folder = tmp_path_factory.mktemp("singles")

    def make(name: str, channels: int = 4) -> Case:
        if (name, channels) not in made:
            model = model_of(FAMILIES[name], channels)
            state = single_state(name, model)
            made[name, channels] = Case(write(folder / f"{name}-{channels}.safetensors", state), model, state)
        return made[name, channels]

    return make


@pytest.fixture(scope="module")
def opened(case):
    """The same, opened; not to be changed."""
    made: dict[Any, Components] = {}

    def make(name: str, channels: int = 4) -> Components:
        if (name, channels) not in made:
            made[name, channels] = open_single_file(case(name, channels).path)
        return made[name, channels]

    return make


def near(a: Tensor, b: Tensor) -> None:
    assert a.shape == b.shape and (a - b).abs().max() <= NEAR * b.abs().max()


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    """The same keys, types and bits."""
    assert a.keys() == b.keys()
    assert not [key for key in a if a[key].dtype != b[key].dtype or not torch.equal(a[key], b[key])]


def holds(components: Components, model: Model) -> None:
    """The other libraries' networks, key by key and bit by bit."""
    assert {name for name, network in components.networks.items()} == model.networks.keys()
    for name, state in model.state.items():
        same(dict(components.networks[name].state_dict()), state)


# -- opening ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "channels"), [slow(*row) if row in XL_EDITS else row for row in CASES])
@torch.no_grad()
def test_networks_are_those_of_diffusers(case, opened, name, channels):
    """Every tensor equal, and what the networks make of the same input."""
    model, components = case(name, channels).model, opened(name, channels)
    holds(components, model)
    assert not any(network.training for network in components.networks.values())
    config, batch = components.unet.config, 2
    x, context = torch.randn(batch, channels, 8, 8), torch.randn(batch, 7, config.cross_attention_dim)
    t, more, conditions = torch.tensor([999, 3]), {}, {}
    if config.projection_class_embeddings_input_dim:
        count = 5 if name == "sdxl-refiner" else 6
        conditions = {"pooled": torch.randn(batch, 20), "sizes": torch.randint(0, 1024, (batch, count)).float()}
        more = {"added_cond_kwargs": {"text_embeds": conditions["pooled"], "time_ids": conditions["sizes"]}}
    if config.num_class_embeds:
        conditions = {"labels": torch.tensor([20, 350])}
        more = {"class_labels": conditions["labels"]}
    theirs = model.networks["unet"](x, t, context, **more).sample
    near(components.unet(x, t, components.unet.prepare(context, **conditions)), theirs)
    side = 4 * components.vae.config.factor
    images = torch.rand(1, 3, side, side) * 2 - 1
    mean, _ = components.vae.posterior(images)
    near(mean, model.networks["vae"].encode(images).latent_dist.mean)
    near(components.vae.decode(mean), model.networks["vae"].decode(mean / components.vae.config.scaling_factor).sample)
    for encoder, tokenizer in (("text_encoder", "tokenizer"), ("text_encoder_2", "tokenizer_2")):
        if (ours := getattr(components, encoder)) is not None:
            ids = getattr(components, tokenizer)(["a photo of a cat", ""]).ids
            said = model.networks[encoder](ids, output_hidden_states=True)
            near(ours(ids)[0], said.last_hidden_state)
            near(ours(ids, skip=1)[0], said.hidden_states[-2])
            near(ours(ids)[1], said.text_embeds if ours.config.projection_dim else said.pooler_output)


END = "<|endoftext|>"
FACTS = {  # pipeline, prediction, scheduler, sample size, pads, flags
    ("sd1", 4): ("StableDiffusionPipeline", "epsilon", "PNDMScheduler", 64, [END], {}),
    ("sd1", 9): ("StableDiffusionInpaintPipeline", "epsilon", "PNDMScheduler", 64, [END], {}),
    ("sd1", 8): ("StableDiffusionInstructPix2PixPipeline", "epsilon", "EulerAncestralDiscreteScheduler", 64, [END], {}),
    ("sd2", 4): ("StableDiffusionPipeline", "v_prediction", "DDIMScheduler", 96, ["!"], {}),
    ("sd2", 9): ("StableDiffusionInpaintPipeline", "epsilon", "PNDMScheduler", 64, ["!"], {}),
    ("x4-upscaler", 7): ("StableDiffusionUpscalePipeline", "v_prediction", "DDIMScheduler", 128, ["!"], {}),
    ("sdxl", 4): (
        "StableDiffusionXLPipeline", "epsilon", "EulerDiscreteScheduler", 128, [END, "!"],
        {"force_zeros_for_empty_prompt": True},
    ),
    ("sdxl-refiner", 4): (
        "StableDiffusionXLImg2ImgPipeline", "epsilon", "EulerDiscreteScheduler", 128, ["!"],
        {"requires_aesthetics_score": True},
    ),
}  # fmt: skip


@pytest.mark.parametrize(("name", "channels"), FACTS)
def test_what_a_file_does_not_say_comes_from_its_family(opened, name, channels):
    components = opened(name, channels)
    assert (
        components.pipeline,
        components.scheduler_config["prediction_type"],
        components.scheduler_config["_class_name"],
        components.unet.config.sample_size,
        [tokenizer.pad for tokenizer in components.tokenizers.values()],
        components.flags,
    ) == FACTS[name, channels]
    assert components.name == f"{name}-{channels}"
    assert bool(components.low_res_scheduler_config) == (name == "x4-upscaler")


def test_types_are_kept_or_cast(case, tmp_path):
    halves = {key: value.half() for key, value in case("sd1").state.items()}
    path = write(tmp_path / "half.safetensors", halves)
    for dtype, expected in ((None, torch.float16), (torch.float32, torch.float32), (torch.bfloat16, torch.bfloat16)):
        unet = open_single_file(path, dtype).unet.state_dict()
        assert {value.dtype for value in unet.values()} == {expected}
        assert torch.equal(unet["conv_in.weight"], halves[UNET + "input_blocks.0.0.weight"].to(expected))


def test_other_spellings_of_the_same_keys(case, tmp_path):
    """CLIP without `text_model.`, the VAE as `vae.`, matrices as convolutions and the other way round; the projection
    as transformers has it; Stable Diffusion 2 as sgm has it; strays that some tools add.
    """
    clip, vae = "cond_stage_model.transformer.text_model.", "first_stage_model."
    sd1 = {key.replace(clip, clip[:-11]).replace(vae, "vae."): value for key, value in case("sd1").state.items()}
    sd1["cond_stage_model.transformer.embeddings.position_ids"] = torch.arange(77)[None]
    sd1["cond_stage_model.logit_scale"] = torch.tensor(1.0)
    for key, value in sd1.items():
        if key.endswith(("proj_in.weight", "proj_out.weight")) and value.ndim == 4:
            sd1[key] = value[:, :, 0, 0]
    assert len([value for value in sd1.values() if value.ndim == 4]) < len(
        [value for value in case("sd1").state.values() if value.ndim == 4]
    )
    components = open_single_file(write(tmp_path / "sd1.safetensors", sd1))
    holds(components, case("sd1").model)
    assert "passed over 2 keys" in components.notes[0]
    sdxl = dict(case("sdxl").state)
    projection = "conditioner.embedders.1.model.text_projection"
    sdxl[projection + ".weight"] = sdxl.pop(projection).T
    for key in [key for key in sdxl if key.endswith("proj_in.weight") and key.startswith(UNET)]:
        sdxl[key] = sdxl[key][..., None, None]
    holds(open_single_file(write(tmp_path / "sdxl.safetensors", sdxl)), case("sdxl").model)
    old, new = "cond_stage_model.", "conditioner.embedders.0."
    sd2 = {key.replace(old, new): value for key, value in case("sd2").state.items()}
    holds(open_single_file(write(tmp_path / "sd2.safetensors", sd2)), case("sd2").model)


def test_averaged_weights_are_taken_when_asked(case, tmp_path):
    path, model, state = case("sd1")
    averages = {
        "model_ema." + key.removeprefix("model.").replace(".", ""): value + 1
        for key, value in state.items()
        if key.startswith(UNET)
    }
    averages |= {"model_ema.decay": torch.tensor(0.9999), "model_ema.num_updates": torch.tensor(7)}
    both = write(tmp_path / "ema.safetensors", state | averages)
    plain, averaged = open_single_file(both), open_single_file(both, ema=True)
    holds(plain, model)
    assert "passed over 688 keys" in plain.notes[0] and "passed over 688 keys" in averaged.notes[0]
    same(dict(averaged.unet.state_dict()), {key: value + 1 for key, value in model.state["unet"].items()})
    same(dict(averaged.vae.state_dict()), model.state["vae"])
    with pytest.raises(ModelError, match="Stable Diffusion 1 model without EMA weights; open it without ema"):
        open_single_file(path, ema=True)
    del averages["model_ema.diffusion_modelout2bias"]
    with pytest.raises(ModelError, match=r"1 missing \(model_ema\.diffusion_modelout2bias\)"):
        open_single_file(write(both, state | averages), ema=True)


def test_what_the_unet_predicts(case, tmp_path):
    """Asked comes before said, said before usual; a guess is told."""
    path, _, state = case("sd2")

    def predicted(said: dict[str, str], asked: str | None = None, **more: Tensor) -> tuple[str, int, str]:
        file = write(tmp_path / "sd2.safetensors", {**state, **more}, said)
        components = open_single_file(file, prediction_type=asked)
        config = components.scheduler_config
        zero = "zero" if config.get("rescale_betas_zero_snr") else ""
        told = [note for note in components.notes if "does not say" in note]
        assert all("prediction_type epsilon" in note for note in told)
        return config["prediction_type"], components.unet.config.sample_size, "guessed" if told else zero

    kind = "modelspec.prediction_type"
    assert predicted({}) == ("v_prediction", 96, "guessed")
    assert predicted({}, "v_prediction") == ("v_prediction", 96, "")
    assert predicted({}, "epsilon") == ("epsilon", 64, "")
    assert predicted({kind: "epsilon"}) == ("epsilon", 64, "")
    assert predicted({kind: "v"}) == ("v_prediction", 96, "")
    assert predicted({kind: "v"}, "epsilon") == ("epsilon", 64, "")
    assert predicted({}, v_pred=torch.empty(0), ztsnr=torch.empty(0)) == ("v_prediction", 96, "zero")
    with pytest.raises(UsageError, match="epsilon or v_prediction"):
        open_single_file(path, prediction_type="v")


# -- what is refused --------------------------------------------------------------------------------------------------


def test_keys_that_do_not_fit_are_counted_and_named(case, tmp_path):
    """The first five of each kind, how many there are, and the family they were to belong to."""
    state = dict(case("sd1").state)
    for i in range(7):
        del state[f"{UNET}output_blocks.{i}.0.in_layers.0.weight"]
        state[f"first_stage_model.extra.{i}"] = torch.zeros(1)
    state[UNET + "out.0.weight"] = torch.zeros(9)
    state[UNET + "out.0.bias"] = torch.zeros(8, dtype=torch.int32)
    with pytest.raises(ModelError) as caught:
        open_single_file(write(tmp_path / "broken.safetensors", state))
    said = str(caught.value)
    assert f"{tmp_path / 'broken.safetensors'} is a Stable Diffusion 1 model with other keys than those have: " in said
    assert "7 missing (" in said and "7 unexpected (" in said and said.count(", ...)") == 2
    assert [said.count(f"{UNET}output_blocks.{i}.0.in_layers.0.weight") for i in range(7)].count(1) == 5
    assert [said.count(f"first_stage_model.extra.{i}") for i in range(7)] == [1] * 5 + [0] * 2
    assert f"1 of another shape ({UNET}out.0.weight (9,) for (8,))" in said
    assert f"1 without floating-point numbers ({UNET}out.0.bias is I32)" in said
    assert "\n" not in said
    state, fused = dict(case("sd2").state), "cond_stage_model.model.transformer.resblocks.3.attn.in_proj_weight"
    state[fused] = torch.cat([state[fused], torch.zeros(1, 24)])  # a row more than three times 24
    with pytest.raises(ModelError, match=r"3 of another shape .*in_proj_weight \(73, 24\) for \(24, 24\)"):
        open_single_file(write(tmp_path / "broken.safetensors", state))
    del state[fused]
    with pytest.raises(ModelError, match=r": 1 missing \(cond_stage_model\..*3\.attn\.in_proj_weight\); "):
        open_single_file(write(tmp_path / "broken.safetensors", state))


def test_parts_that_are_not_there(case, tmp_path):
    state = case("sd1").state
    bare = {key: value for key, value in state.items() if not key.startswith("first_stage_model.")}
    path = write(tmp_path / "bare.safetensors", bare)
    with pytest.raises(ModelError, match=r"Stable Diffusion 1 model without weights of the vae; give one \(vae=\)"):
        open_single_file(path)
    holds(open_single_file(path, vae=case("sd1").path), case("sd1").model)
    unets = {key: value for key, value in state.items() if key.startswith(UNET)}
    with pytest.raises(ModelError, match="is a U-Net without its text encoder, not a whole model; open a file"):
        open_single_file(write(path, unets))


def test_files_of_another_kind(tmp_path):
    down = "lora_unet_down_blocks_0_attentions_0_proj_in.lora_down.weight"
    lora = write(
        tmp_path / "lora.safetensors", {down: torch.zeros(4, 8), down.replace("down.w", "up.w"): torch.ones(8)}
    )
    for read in (open_single_file, open_vae):
        with pytest.raises(ModelError, match=r"lora\.safetensors is a LoRA, not .*; open the model it was made for"):
            read(lora)
    other = write(tmp_path / "other.safetensors", {"weight": torch.zeros(4)})
    with pytest.raises(ModelError, match="is of no known family, not a whole model; known are Stable Diffusion 1, "):
        open_single_file(other)
    with pytest.raises(ModelError, match=r"cannot read .*none"):
        open_single_file(tmp_path / "none.safetensors")


def test_pickles_are_opened_only_when_allowed(case, tmp_path):
    path, model, state = case("sd1")
    pickled = tmp_path / "model.ckpt"
    torch.save({"state_dict": state, "global_step": 7, "epoch": 1}, pickled)
    with pytest.raises(ModelError, match=r"model\.ckpt.* --allow-pickle"):
        open_single_file(pickled)
    components = open_single_file(pickled, allow_pickle=True)
    holds(components, model)
    assert components.name == "model"
    assert open_single_file(path, allow_pickle=True).name == "sd1-4"  # what is no pickle is opened as it is


# -- separate autoencoders --------------------------------------------------------------------------------------------


@torch.no_grad()
def test_vae_files_in_all_their_spellings(case, tmp_path):
    """Original and diffusers' names, old ones too, under every prefix; a folder; a whole model's."""
    path, model, state = case("sd1")
    config = FAMILIES["sd1"].parts["vae"].config
    begin = "first_stage_model."
    original = {key.removeprefix(begin): value for key, value in state.items() if key.startswith(begin)}
    original["loss.discriminator.main.0.weight"] = torch.zeros(2)
    theirs = model.state["vae"]
    names = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    old = dict(theirs)
    for ours, theirs_old in names.items():
        for key in [key for key in old if f"attentions.0.{ours}." in key]:
            old[key.replace(ours, theirs_old)] = old.pop(key)
    assert old.keys() != theirs.keys()
    for form in (original, theirs, old):
        for prefix in ("", "first_stage_model.", "vae."):
            file = write(tmp_path / "vae.safetensors", {prefix + key: value for key, value in form.items()})
            vae = open_vae(file, config=config)
            same(dict(vae.state_dict()), theirs)
            assert vae.config == config and not vae.training
    model.networks["vae"].save_pretrained(tmp_path / "folder" / "vae")
    for place in (path, tmp_path / "folder", tmp_path / "folder" / "vae"):
        same(dict(open_vae(place).state_dict()), theirs)
    with pytest.raises(ModelError, match=r"is a VAE with other keys than those have: 1 unexpected \(extra\)"):
        open_vae(write(tmp_path / "vae.safetensors", original | {"extra": torch.zeros(1)}), config=config)
    with pytest.raises(ModelError, match="of another shape"):  # it is narrower than the published ones
        open_vae(write(tmp_path / "vae.safetensors", original))


def test_a_vae_takes_the_place_of_the_files(case, tmp_path):
    path, model, state = case("sdxl")
    begin = "first_stage_model."
    fixed = {key.removeprefix(begin): value + 1 for key, value in state.items() if key.startswith(begin)}
    components = open_single_file(path, torch.float64, vae=write(tmp_path / "fixed.safetensors", fixed))
    assert components.vae.config.scaling_factor == 0.13025
    wanted = {key: value.double() + 1 for key, value in model.state["vae"].items()}
    got = dict(components.vae.state_dict())
    assert got.keys() == wanted.keys() and all(torch.allclose(got[key], wanted[key]) for key in got)
    assert any("passed over" in note for note in components.notes)


@torch.no_grad()
def test_taesd_in_all_its_files(case, tmp_path):
    """diffusers' form, and that of its authors, whose decoder counts a layer that has no weights."""
    torch.manual_seed(1)
    tiny = diffusers.AutoencoderTiny().eval()
    state = tiny.state_dict()
    halves: dict[str, dict[str, Tensor]] = {"encoder": {}, "decoder": {}}
    for key, value in state.items():
        half, _, number, rest = key.split(".", 3)
        halves[half][f"{int(number) + (half == 'decoder')}.{rest}"] = value
    assert "0.weight" in halves["encoder"] and "0.weight" not in halves["decoder"]
    pair = [write(tmp_path / f"taesd_{half}.safetensors", halves[half]) for half in halves]
    joined = {f"{half}.{key}": value for half in halves for key, value in halves[half].items()}
    marked = {f"taesd_{key}": value for key, value in joined.items()}
    files = [write(tmp_path / f"{i}.safetensors", form) for i, form in enumerate((state, joined, marked))]
    for file in (*pair, *files):
        vae = open_vae(file)
        assert isinstance(vae, AutoencoderTiny)
        same(dict(vae.state_dict()), dict(state))
    z = torch.randn(1, 4, 4, 4)
    near(vae.decode(z), tiny.decode(z).sample)
    assert isinstance(open_single_file(case("sd1").path, vae=pair[1]).vae, AutoencoderTiny)
    pair[0].unlink()
    with pytest.raises(ModelError, match="is the decoder of a TAESD; put its encoder beside it"):
        open_vae(pair[1])


# -- saving -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "channels"), [row if row in USUAL else slow(*row) for row in CASES])
def test_files_come_back_bit_by_bit(case, opened, tmp_path, name, channels):
    """Single file -> folder -> single file: the names and numbers of the first but for what is passed over, then the
    same bytes; what was passed over is what diffusers drops, too.
    """
    first, _, state = case(name, channels)
    components = opened(name, channels)
    save_single_file(components, tmp_path / "second.safetensors")
    save_folder(components, tmp_path / "folder", None)
    save_single_file(open_folder(tmp_path / "folder"), tmp_path / "third.safetensors", metadata=renamed(first.stem))
    second = load_file(tmp_path / "second.safetensors")
    kept = {key: value.contiguous() for key, value in state.items() if key in second}
    same(second, kept)
    lost = state.keys() - second.keys()
    assert len(lost) == {"sd2": 28, "sdxl": 2}.get(name, 0)
    assert (tmp_path / "second.safetensors").read_bytes() == (tmp_path / "third.safetensors").read_bytes()
    for part, network in open_single_file(tmp_path / "third.safetensors").networks.items():
        (file,) = (tmp_path / "folder" / part).glob("*.safetensors")
        same(dict(network.state_dict()), load_file(file))


def renamed(title: str) -> dict[str, str]:
    return {"modelspec.title": title}


@pytest.mark.parametrize("name", ["sd1", "sdxl"])
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::UserWarning")
def test_diffusers_opens_what_we_save(opened, case, tmp_path, name):
    """With the configurations of a folder, for without them it asks the network."""
    components = opened(name)
    save_single_file(components, tmp_path / "model.safetensors")
    save_folder(components, tmp_path / "configs", None)
    pipeline = {"sd1": diffusers.StableDiffusionPipeline, "sdxl": diffusers.StableDiffusionXLPipeline}[name]
    theirs = pipeline.from_single_file(
        tmp_path / "model.safetensors", config=str(tmp_path / "configs"), local_files_only=True
    )
    model = Model(FAMILIES[name], {part: getattr(theirs, part) for part in components.networks})
    for part, state in case(name).model.state.items():
        same(model.state[part], state)


def test_metadata_and_marks(case, opened, tmp_path):
    """Those of the model specification; what other tools look for where the prediction is not the usual one."""
    path = tmp_path / "model.safetensors"
    expected = {
        "sd1": ("stable-diffusion-v1", "512x512", "epsilon"),
        "sd2": ("stable-diffusion-v2-768-v", "768x768", "v"),
    }
    for name, told in expected.items():
        save_single_file(opened(name), path, metadata={"modelspec.license": "none"})
        metadata = read_header(path).metadata
        fields = ("architecture", "resolution", "prediction_type", "title", "license", "sai_model_spec")
        assert [metadata[f"modelspec.{field}"] for field in fields] == [*told, f"{name}-4", "none", "1.0.0"]
        assert metadata["format"] == "pt"
        assert not {"v_pred", "ztsnr"} & read_header(path).tensors.keys()
    marked = {**case("sdxl").state, "v_pred": torch.empty(0), "ztsnr": torch.empty(0)}
    components = open_single_file(write(tmp_path / "marked.safetensors", marked))
    assert components.scheduler_config["prediction_type"] == "v_prediction"
    save_single_file(components, path)
    assert {"v_pred", "ztsnr"} <= load_file(path).keys()
    assert open_single_file(path).scheduler_config == components.scheduler_config


def test_types_of_saved_files(opened, tmp_path):
    path = tmp_path / "half.safetensors"
    save_single_file(opened("sd1"), path, torch.float16)
    halves = load_file(path)
    assert {value.dtype for value in halves.values()} == {torch.float16}
    weight = opened("sd1").unet.conv_in.weight
    assert torch.equal(halves[UNET + "input_blocks.0.0.weight"], weight.half())
    broken = open_single_file(path, torch.float32)
    with torch.no_grad():
        broken.unet.conv_in.weight[0, 0, 0, 0] = 70_000.0  # float16 ends at 65,504
    before = path.read_bytes()
    with pytest.raises(NumericalError, match=r"unet conv_in\.weight is not finite in torch\.float16"):
        save_single_file(broken, path, torch.float16)
    assert path.read_bytes() == before


def test_models_that_such_a_file_cannot_hold(opened, tmp_path):
    path, sd1 = tmp_path / "model.safetensors", opened("sd1")
    other = replace(sd1, vae=AutoencoderKL(replace(sd1.vae.config, scaling_factor=1.0)))
    with pytest.raises(ModelError, match=r"has another vae than Stable Diffusion 1 .* save a folder instead"):
        save_single_file(other, path)
    linear = replace(sd1, scheduler_config=sd1.scheduler_config | {"beta_schedule": "linear"})
    with pytest.raises(ModelError, match=r"another noise schedule or prediction .* save a folder instead"):
        save_single_file(linear, path)
    sample = replace(sd1, scheduler_config=sd1.scheduler_config | {"prediction_type": "sample"})
    with pytest.raises(ModelError, match=r"prediction \(sample\)"):
        save_single_file(sample, path)
    assert not path.exists()


# -- memory -----------------------------------------------------------------------------------------------------------

WIDE = {  # of Stable Diffusion 1, a hundred million numbers
    "unet": {"block_out_channels": (96, 192, 384, 384)},
    "vae": {"block_out_channels": (64, 128, 256, 256)},
    "text_encoder": {"hidden_size": 256, "intermediate_size": 1024, "num_attention_heads": 4},
}
WIDE["unet"]["cross_attention_dim"] = 256
CHILD = """
import json, sys
from dataclasses import replace
from pathlib import Path
import torch
from ldm.checkpoints.families import FAMILIES
from ldm.checkpoints.single_file import open_single_file
from ldm.text.tokenizer import CLIPTokenizer

def memory(field):
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field)]
    return int(line.split()[1]) * 1024

path, wide, dtype = sys.argv[1], eval(sys.argv[2]), getattr(torch, sys.argv[3], None)
sd1 = FAMILIES["sd1"]
parts = {name: part._replace(config=replace(part.config, **wide[name])) for name, part in sd1.parts.items()}
FAMILIES["sd1"] = replace(sd1, parts=parts)
torch.set_num_threads(1)
torch.randn(1000, 1000).half().float().sum()
CLIPTokenizer.standard()
Path("/proc/self/clear_refs").write_text("5")
before = memory("VmRSS")
components = open_single_file(path, dtype)
peak = memory("VmHWM") - before
tensors = [value for network in components.networks.values() for value in network.state_dict().values()]
print(json.dumps([peak, sum(t.nbytes for t in tensors), max(t.nbytes for t in tensors)]))
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="reads the peak of memory from Linux' /proc")
def test_memory_holds_the_weights_and_one_tensor(tmp_path):
    """A file of 200 MB of float16, measured by the system; what is not cast is not even read."""
    family = FAMILIES["sd1"]
    presets = {"unet": UNETS["sd15"], "vae": VAES["sd"], "text_encoder": TEXT_ENCODERS["clip-l"]}
    configs = {name: replace(config, **WIDE[name]) for name, config in presets.items()}
    parts = {name: part._replace(config=configs[name]) for name, part in family.parts.items()}
    state = single_state("sd1", model_of(replace(family, parts=parts), 4, "meta"))
    path = write_hollow(tmp_path / "wide.safetensors", state)
    assert path.stat().st_size > 190e6
    rest = 40e6  # networks without numbers, the header, what the allocator keeps
    for dtype, times in (("none", 0), ("float32", 2)):
        words = [sys.executable, "-c", CHILD, str(path), repr(WIDE), dtype]
        done = subprocess.run(words, capture_output=True, text=True, timeout=120, check=False)
        assert done.returncode == 0, done.stderr
        peak, weights, largest = json.loads(done.stdout)
        assert weights > 190e6 * max(times, 1)
        assert peak < (weights + largest if times else 0) + rest, (dtype, peak, weights, largest)


# -- tokenizer --------------------------------------------------------------------------------------------------------


def test_the_standard_tokenizer_is_openais(tmp_path):
    """The table's own checksum, the golden ids, and transformers' tokenizer of the same table on strange strings."""
    packed = MERGES.read_bytes()
    lines = gzip.decompress(packed).decode().splitlines()
    assert len(packed) < 600_000 and len(lines) == 48_894
    # of lines 2 to 48,895 of bpe_simple_vocab_16e6.txt, which stands in the packages of CLIP and open_clip
    assert hashlib.sha256("\n".join(lines).encode()).hexdigest() == MERGES_SHA256
    tokenizer = CLIPTokenizer.standard()
    assert tokenizer(["a photo of a cat"]).ids[0, :7].tolist() == [49406, 320, 1125, 539, 320, 2368, 49407]
    assert len(tokenizer) == 49_408
    letters = [chr(code) for code in (*range(33, 127), *range(161, 173), *range(174, 256), *range(256, 324))]
    tokens = [*letters, *(f"{letter}</w>" for letter in letters), *(line.replace(" ", "") for line in lines)]
    vocab = {token: i for i, token in enumerate([*tokens, "<|startoftext|>", "<|endoftext|>"])}
    merges = [tuple(line.split()) for line in lines]
    for pad in ("<|endoftext|>", "!"):
        theirs = transformers.CLIPTokenizer(vocab=vocab, merges=merges, pad_token=pad, model_max_length=77)
        texts = strange(1000 if pad == "!" else 50)
        expected = theirs(texts, padding="max_length", truncation=True).input_ids
        assert CLIPTokenizer.standard(pad)(texts).ids.tolist() == expected


def strange(count: int) -> list[str]:
    """Strings of words and of all of Unicode but surrogates, mostly of the parts where something happens."""
    rng = random.Random(0)
    ranges = [
        (32, 126),
        (0, 0x17F),
        (0x300, 0x36F),
        (0x2000, 0x206F),
        (0x1F300, 0x1FAFF),
        (0, 0xD7FF),
        (0xE000, 0x10FFFF),
    ]
    words = ["photograph", "DON'T", "masterpiece,", "of", "the", "2077", "café", "日本", "<|endoftext|>", "trending_on"]

    def word() -> str:
        letters = (chr(rng.randint(*rng.choice(ranges))) for _ in range(rng.randint(1, 6)))
        return rng.choice(words) if rng.random() < 0.5 else "".join(letters)

    return [rng.choice(["", " "]).join(word() for _ in range(rng.randint(0, 40))) for _ in range(count)]
