"""Families of single files: every key of real files at its true shape, and what a file is by its header alone."""

import warnings

import pytest
import torch
from singles import LISTS, model_of, single_state, write_hollow

from ldm.checkpoints.families import FAMILIES, HARMLESS, recognise
from ldm.checkpoints.load import Bare
from ldm.checkpoints.safe import Entry, Header
from ldm.checkpoints.single_file import open_single_file
from ldm.checkpoints.spelling import spelled
from ldm.models.clip import CLIPTextModel
from ldm.models.unet import UNet
from ldm.models.vae import AutoencoderKL
from ldm.schedulers.config import from_config, network_of

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import diffusers

VARIANTS = [(name, channels) for name, family in FAMILIES.items() for channels in family.channels]
PARAMETERS = {  # of U-Net, VAE and text encoders together, from the sizes of the published files
    "sd1": 859_520_964 + 83_653_863 + 123_060_480,
    "sd2": 865_910_724 + 83_653_863 + 340_387_840,
    "sdxl": 2_567_463_684 + 83_653_863 + 123_060_480 + 694_659_840,
    "sdxl-refiner": 2_259_526_660 + 83_653_863 + 694_659_840,
}


@pytest.mark.parametrize("name", LISTS)
def test_every_key_of_a_real_file_is_read_at_its_true_shape(tmp_path, name):
    """A file of exactly the published names and shapes opens whole; its numbers are never read."""
    lists = LISTS[name]
    state = single_state(name, model_of(FAMILIES[name], 4, "meta"))
    assert state.keys() - {"conditioner.embedders.0.model.text_projection"} == {
        *lists["keymap"], *lists["fused"], *lists["unmatched"]
    }  # fmt: skip
    opened = open_single_file(write_hollow(tmp_path / "model.safetensors", state))
    assert sum(p.numel() for net in opened.networks.values() for p in net.parameters()) == PARAMETERS[name]
    assert {p.dtype for net in opened.networks.values() for p in net.parameters()} == {torch.float16}
    projections = [key for key in lists["unmatched"] if key.endswith("text_projection") and name != "sd2"]
    passed = len(lists["unmatched"]) - len(projections)
    assert [note for note in opened.notes if "passed over" in note] == (
        [note for note in opened.notes if note.startswith(f"passed over {passed} keys")] if passed else []
    )


@pytest.mark.parametrize("name", LISTS)
def test_what_is_written_has_the_names_of_real_files(name):
    family, written = FAMILIES[name], set()
    networks = {"unet": UNet, "vae": AutoencoderKL}
    for part, (config, spellings, _) in family.parts.items():
        with Bare():
            model = networks.get(part, CLIPTextModel)(config)
        written |= {rule.theirs for rule in spelled(model.state_dict().keys(), spellings[0], config).values()}
    real = {*LISTS[name]["keymap"], *LISTS[name]["fused"]}
    assert {key for key in written if not key.endswith(".text_projection")} == real
    last = ".transformer.resblocks.23."  # which only Stable Diffusion 2 leaves out
    assert not [key for key in real if HARMLESS.fullmatch(key) and last not in key]  # nothing wanted is passed over
    assert all(HARMLESS.fullmatch(key) for key in LISTS[name]["unmatched"] if key not in written)


def header(shapes, metadata=None) -> Header:
    rows = shapes if isinstance(shapes, dict) else dict.fromkeys(shapes, (4, 4))
    return Header({name: Entry(torch.float16, tuple(shape), 0, 0) for name, shape in rows.items()}, metadata or {})


STRANGERS = {
    "a LoRA": [
        ["lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q.lora_down.weight"],
        ["lora_te_text_model_encoder_layers_0_self_attn_q_proj.alpha"],
        ["lora_te1_text_model_encoder_layers_0_mlp_fc1.hada_w1_a"],
        ["lora_unet_input_blocks_4_1_proj_in.lokr_w1"],
        ["unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q.lora.down.weight"],
        ["unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.processor.to_q_lora.up.weight"],
        ["base_model.model.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q.lora_A.weight"],
        ["text_encoder.text_model.encoder.layers.0.self_attn.q_proj.lora_linear_layer.down.weight"],
        ["lora_unet_double_blocks_0_img_attn_proj.lora_down.weight"],  # of Flux, but a LoRA first
    ],
    "a ControlNet": [
        ["control_model.input_blocks.0.0.weight", "control_model.zero_convs.0.0.weight"],
        ["controlnet_cond_embedding.conv_in.weight", "down_blocks.0.resnets.0.conv1.weight"],
    ],
    "a motion module": [["down_blocks.0.motion_modules.0.temporal_transformer.norm.weight"]],
    "an IP-Adapter": [["image_proj.proj.weight", "ip_adapter.1.to_k_ip.weight"]],
    "a Stable Diffusion 3 model": [["model.diffusion_model.joint_blocks.0.x_block.attn.proj.weight"]],
    "a Flux model": [["double_blocks.0.img_attn.proj.weight"], ["model.diffusion_model.double_blocks.1.img_mod.bias"]],
    "a Stable Cascade model": [["clip_txt_mapper.weight"]],
    "a Stable Video Diffusion model": [["model.diffusion_model.input_blocks.1.0.time_stack.in_layers.0.weight"]],
    "a Playground v2.5 model": [["edm_mean", "edm_std", "model.diffusion_model.input_blocks.0.0.weight"]],
    "a CosXL model": [["edm_vpred.sigma_max", "model.diffusion_model.input_blocks.0.0.weight"]],
    "a Stable unCLIP model": [["embedder.model.visual.conv1.weight", "model.diffusion_model.label_emb.0.0.weight"]],
    "a Stable Diffusion 2 depth model": [["depth_model.model.scratch.output_conv.0.weight"]],
    "a Stable Zero123 model": [["cc_projection.weight", "model.diffusion_model.input_blocks.0.0.weight"]],
    "a VAE": [
        ["first_stage_model.decoder.conv_in.weight", "first_stage_model.quant_conv.weight"],
        ["encoder.conv_in.weight", "decoder.mid_block.attentions.0.to_q.weight"],
        ["vae.decoder.conv_in.weight"],
    ],
    "a TAESD": [
        ["decoder.layers.0.weight", "decoder.layers.3.conv.0.weight"],
        ["1.weight", "3.conv.0.weight"],
        ["taesd_decoder.3.conv.0.weight"],
    ],
    "a U-Net without its text encoder": [
        ["model.diffusion_model.input_blocks.0.0.weight", "first_stage_model.decoder.conv_in.weight"],
        ["input_blocks.0.0.weight"],
    ],
    "the U-Net of a model folder": [["conv_in.weight", "down_blocks.0.resnets.0.conv1.weight"]],
    "a text encoder": [
        ["text_model.encoder.layers.0.mlp.fc1.weight"],
        ["transformer.resblocks.0.mlp.c_fc.weight"],
        ["encoder.block.0.layer.0.SelfAttention.q.weight"],
    ],
    "an enlarger of pictures": [["body.0.rdb1.conv1.weight"], ["model.1.sub.0.RDB1.conv1.0.weight"]],
    "an embedding": [{"emb_params": (4, 768)}, {"clip_l": (2, 768), "clip_g": (2, 1280)}, {"my-cat": (1024,)}],
    "of no known family": [["weight", "bias"], []],
}  # fmt: skip


@pytest.mark.parametrize("what", STRANGERS)
def test_what_is_no_model_is_named(what):
    for shapes in STRANGERS[what]:
        facts = recognise(header(shapes))
        assert facts.what.startswith(what) and facts.family is None and facts.advice, (shapes, facts)


def model(name: str, channels: int, **more) -> dict[str, tuple[int, ...]]:
    family = FAMILIES[name]
    names = {"model.diffusion_model.input_blocks.0.0.weight": (320, channels, 3, 3)}
    names |= dict.fromkeys(family.signs[-1], (8,))
    return names | {"first_stage_model.decoder.conv_in.weight": (8, 4, 3, 3)} | more


@pytest.mark.parametrize(("name", "channels"), VARIANTS)
def test_models_are_recognised_in_all_their_variants(name, channels):
    facts = recognise(header(model(name, channels)))
    assert (facts.family, facts.in_channels, facts.prediction, facts.zero_snr, facts.ema) == (
        name, channels, None, False, False
    )  # fmt: skip
    assert FAMILIES[name].title in facts.what
    others = recognise(header(model(name, 5)))
    assert others.family is None and "takes 5 channels" in others.what and str(channels) in others.advice


def test_what_a_file_says_of_itself():
    """Metadata of the model specification, the empty tensors of other tools, the averaged weights."""
    said = {
        "modelspec.prediction_type": {"v": "v_prediction", "epsilon": "epsilon", "V": "v_prediction", "<b>": None},
        "modelspec.architecture": {
            "stable-diffusion-v2-768-v": "v_prediction", "stable-diffusion-v2-512": "epsilon", "x": None
        },
    }  # fmt: skip
    for key, cases in said.items():
        for value, prediction in cases.items():
            assert recognise(header(model("sd2", 4), {key: value})).prediction == prediction
    marked = recognise(header(model("sdxl", 4, v_pred=(0,), ztsnr=(0,)), {"modelspec.prediction_type": "epsilon"}))
    assert marked.prediction == "v_prediction" and marked.zero_snr
    averages = {
        "model_ema.decay": (),
        "model_ema.num_updates": (),
    }  # which the published 768-v file has, and no weights
    assert not recognise(header(model("sd2", 4, **averages))).ema
    assert recognise(header(model("sd2", 4, **{"model_ema.diffusion_modelout2bias": (4,)}))).ema


@pytest.mark.parametrize(("name", "channels"), VARIANTS)
@pytest.mark.parametrize(
    ("prediction", "zero_snr"), [("epsilon", False), ("v_prediction", False), ("v_prediction", True)]
)
def test_schedulers_are_those_of_diffusers(name, channels, prediction, zero_snr):
    config = FAMILIES[name].scheduler_config(channels, prediction, zero_snr)
    schedule, told = network_of(config)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = getattr(diffusers, config["_class_name"]).from_config(config)
    assert told == prediction == theirs.config.prediction_type and schedule.zero_terminal_snr == zero_snr
    expected = torch.tensor(schedule.alphas_cumprod)
    assert (theirs.alphas_cumprod.double() - expected)[:-1].abs().max() < 1e-5
    assert from_config(config).prediction == prediction
    if FAMILIES[name].low_res:
        low = diffusers.DDPMScheduler.from_config(dict(FAMILIES[name].low_res))
        assert low.betas[0] == pytest.approx(1e-4) and low.betas[-1] == pytest.approx(0.02)


def test_names_of_other_things_are_not_harmless():
    for name in (
        "model.diffusion_model.out.0.weight", "cond_stage_model.model.transformer.resblocks.22.ln_1.bias",
        "conditioner.embedders.1.model.text_projection", "first_stage_model.encoder.conv_in.weight", "sqrt.weight",
        "cond_stage_model.transformer.vision_model.x", "extra",
    ):  # fmt: skip
        assert not HARMLESS.fullmatch(name)
    for name in (
        "first_stage_model.loss.discriminator.main.0.weight", "model_ema.diffusion_modelout2bias", "betas",
        "cond_stage_model.transformer.text_model.embeddings.position_ids", "low_scale_model.betas", "denoiser.sigmas",
    ):  # fmt: skip
        assert HARMLESS.fullmatch(name)
