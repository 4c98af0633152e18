"""Checkpoint families: what the published single files hold and do not say of themselves; how a file is recognised."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from ldm.checkpoints.safe import Header
from ldm.checkpoints.spelling import (
    Part,
    Spelling,
    clip_rules,
    flat_clip_rules,
    old_vae_rules,
    openclip_rules,
    own_vae_rules,
    plain_openclip_rules,
    taesd_rules,
    unet_rules,
    vae_rules,
)
from ldm.models.presets import TEXT_ENCODERS, UNETS, VAES
from ldm.models.unet import UNetConfig
from ldm.text.tokenizer import EOS

Json = dict[str, Any]


@dataclass(frozen=True)
class Family:
    """What the single files of a published model hold beyond their numbers.

    parts: by the names of Components. signs: keys that it alone has, all of one of these sets. channels: how many the
    U-Net may take -> what it then predicts where the file does not say. scheduler: the scheduler_config.json, and
    solvers: its class by what the U-Net predicts. sides: sample_size by what it predicts, where that differs. flags,
    low_res: as in Components. architectures: its name in the metadata of the model specification
    (modelspec.architecture), by what the U-Net predicts.
    """

    title: str
    architectures: Mapping[str, str]
    signs: tuple[frozenset[str], ...]
    parts: Mapping[str, Part]
    channels: Mapping[int, str]
    scheduler: Mapping[str, object]
    solvers: Mapping[str, str]
    sides: Mapping[str, int] = field(default_factory=dict)
    flags: Mapping[str, bool] = field(default_factory=dict)
    low_res: Mapping[str, object] = field(default_factory=dict)

    def unet(self, in_channels: int, prediction: str) -> UNetConfig:
        """The U-Net of a variant."""
        config: UNetConfig = self.parts["unet"].config
        return replace(config, in_channels=in_channels, sample_size=self.sides.get(prediction, config.sample_size))

    def scheduler_config(self, in_channels: int, prediction: str, zero_snr: bool = False) -> Json:
        """The scheduler_config.json of a variant, as diffusers' loader of single files takes it from the model's own
        repository. zero_snr: betas rescaled to end in pure noise, where sampling then begins (Lin et al. 2024).
        """
        solver = "EulerAncestralDiscreteScheduler" if in_channels == EDITING else self.solvers[prediction]
        config = {"_class_name": solver, **self.scheduler, "prediction_type": prediction}
        return config | ({"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"} if zero_snr else {})


EPSILON, V = "epsilon", "v_prediction"
VAE_PREFIXES = ("first_stage_model.", "vae.")
EDITING = 8  # input channels of instruct-pix2pix
BETAS = {"num_train_timesteps": 1000, "beta_schedule": "scaled_linear", "trained_betas": None}
SD = {"beta_start": 0.00085, "beta_end": 0.012, **BETAS, "clip_sample": False, "set_alpha_to_one": False,
      "skip_prk_steps": True, "steps_offset": 1}  # fmt: skip
XL = SD | {"interpolation_type": "linear", "sample_max_value": 1.0, "timestep_spacing": "leading",
           "use_karras_sigmas": False}  # fmt: skip
LOW_RES = {"_class_name": "DDPMScheduler", "beta_start": 0.0001, "beta_end": 0.02, **BETAS, "clip_sample": True,
           "prediction_type": EPSILON, "variance_type": "fixed_small"}  # fmt: skip
VAE_ALONE = tuple(  # the spellings of an AutoencoderKL in a file of its own
    Spelling(prefix, rules) for rules in (vae_rules, own_vae_rules, old_vae_rules) for prefix in ("", *VAE_PREFIXES)
)
TAESD = (  # those of an AutoencoderTiny, its halves in one file
    Spelling("", own_vae_rules),
    Spelling("", lambda c: taesd_rules(c, "encoder.", "decoder.")),
    Spelling("", lambda c: taesd_rules(c, "taesd_encoder.", "taesd_decoder.")),
)


def _unet(name: str) -> Part:
    return Part(UNETS[name], (Spelling("model.diffusion_model.", unet_rules),))


def _vae(name: str) -> Part:
    return Part(VAES[name], tuple(Spelling(prefix, vae_rules) for prefix in VAE_PREFIXES))


def _clip(prefix: str) -> Part:
    return Part(TEXT_ENCODERS["clip-l"], (Spelling(prefix, clip_rules), Spelling(prefix, flat_clip_rules)), EOS)


def _openclip(name: str, *prefixes: str) -> Part:
    forms = (openclip_rules, plain_openclip_rules)
    return Part(TEXT_ENCODERS[name], tuple(Spelling(prefix, form) for form in forms for prefix in prefixes), "!")


def _bigg(prefix: str) -> Part:
    return _openclip("openclip-bigg", prefix)


def _named(epsilon: str, v: str = "") -> dict[str, str]:
    """A word for each prediction; v: where it is another."""
    return {EPSILON: epsilon, V: v or epsilon}


_OPENCLIP_H = _openclip("openclip-h", "cond_stage_model.model.", "conditioner.embedders.0.model.")  # CompVis', sgm's
FAMILIES: dict[str, Family] = {
    "sd1": Family(
        title="Stable Diffusion 1",
        architectures=_named("stable-diffusion-v1"),
        signs=(
            frozenset({"cond_stage_model.transformer.text_model.final_layer_norm.weight"}),
            frozenset({"cond_stage_model.transformer.final_layer_norm.weight"}),
        ),
        parts={"unet": _unet("sd15"), "vae": _vae("sd"), "text_encoder": _clip("cond_stage_model.transformer.")},
        channels={4: EPSILON, EDITING: EPSILON, 9: EPSILON},
        scheduler=SD,
        solvers=_named("PNDMScheduler", "DDIMScheduler"),
    ),
    "x4-upscaler": Family(
        title="Stable Diffusion x4 upscaler",
        architectures=_named("stable-diffusion-x4-upscaler"),
        signs=(frozenset({"model.diffusion_model.label_emb.weight", "cond_stage_model.model.ln_final.weight"}),),
        parts={"unet": _unet("x4-upscaler"), "vae": _vae("x4-upscaler"), "text_encoder": _OPENCLIP_H},
        channels={7: V},
        scheduler=SD | {"beta_start": 0.0001, "beta_end": 0.02},
        solvers=_named("DDIMScheduler"),
        low_res=LOW_RES,
    ),
    "sdxl": Family(
        title="SDXL",
        architectures=_named("stable-diffusion-xl-v1-base"),
        signs=(frozenset({"conditioner.embedders.1.model.ln_final.weight"}),),
        parts={
            "unet": _unet("sdxl"),
            "vae": _vae("sdxl"),
            "text_encoder": _clip("conditioner.embedders.0.transformer."),
            "text_encoder_2": _bigg("conditioner.embedders.1.model."),
        },
        channels={4: EPSILON, EDITING: EPSILON, 9: EPSILON},
        scheduler=XL,
        solvers=_named("EulerDiscreteScheduler"),
        flags={"force_zeros_for_empty_prompt": True},
    ),
    "sdxl-refiner": Family(
        title="SDXL refiner",
        architectures=_named("stable-diffusion-xl-v1-refiner"),
        signs=(
            frozenset({"conditioner.embedders.0.model.ln_final.weight", "model.diffusion_model.label_emb.0.0.weight"}),
        ),
        parts={
            "unet": _unet("sdxl-refiner"),
            "vae": _vae("sdxl"),
            "text_encoder_2": _bigg("conditioner.embedders.0.model."),
        },
        channels={4: EPSILON},
        scheduler=XL,
        solvers=_named("EulerDiscreteScheduler"),
        flags={"requires_aesthetics_score": True},
    ),
    "sd2": Family(
        title="Stable Diffusion 2",
        architectures=_named("stable-diffusion-v2-512", "stable-diffusion-v2-768-v"),
        signs=(
            frozenset({"cond_stage_model.model.ln_final.weight"}),
            frozenset({"conditioner.embedders.0.model.ln_final.weight"}),
        ),
        parts={"unet": _unet("sd21"), "vae": _vae("sd"), "text_encoder": _OPENCLIP_H},
        channels={4: V, 9: EPSILON},
        scheduler=SD,
        solvers=_named("PNDMScheduler", "DDIMScheduler"),
        sides={EPSILON: 64},
    ),
}
"""In the order in which they are recognised."""

HARMLESS = re.compile(
    r"alphas_cumprod(_prev)?|betas|log_one_minus_alphas_cumprod|posterior_\w+|sqrt_\w+|logvar|lvlb_weights"
    r"|scale_factor|global_step|v_pred|ztsnr|denoiser\.\w+|low_scale_model\..+|(first_stage_model\.|vae\.)?loss\..+"
    r"|(first_stage_model\.)?model_ema\..+|.+\.position_ids|.+\.(logit_scale|attn_mask)"
    r"|(cond_stage_model|conditioner\.embedders\.0)\.transformer\.text_projection\.weight"
    r"|(cond_stage_model|conditioner\.embedders\.0)\.model\.(text_projection(\.weight)?|transformer\.resblocks\.23\..+)"
)
"""Names of tensors that real files hold and drawing does not need: what training kept, constants, EMA weights, and the
last layer and projection of Stable Diffusion 2's text encoder.
"""


class Facts(NamedTuple):
    """What a weights file is, by its header alone.

    what: "a Stable Diffusion 1 model", "a LoRA". family: of FAMILIES; None for what is no model of ours, and then
    advice says what to do with it. in_channels: of the U-Net. prediction: what the file says that it predicts, None
    where it does not. zero_snr: trained to begin in pure noise. ema: averaged U-Net weights are there, too.
    """

    what: str
    family: str | None = None
    in_channels: int = 0
    prediction: str | None = None
    zero_snr: bool = False
    ema: bool = False
    advice: str = ""


PREDICTIONS = {"epsilon": EPSILON, "eps": EPSILON, "v": V, "v_prediction": V, "v-prediction": V, "vprediction": V}
U_NET = "model.diffusion_model.input_blocks.0.0.weight"
KNOWN = "known are " + ", ".join(family.title for family in FAMILIES.values())
OTHER = f"it is of another kind than the models here; {KNOWN}"
ADD = "open the model it was made for, and add it to that"
WHOLE = "open a file that holds the U-Net, the VAE and the text encoder together, or a model folder"
TINY, KL = "a TAESD", "a VAE"
STRANGERS: tuple[tuple[str, str, str], ...] = (  # what it is, a word between dots in its names (^: at the beginning)
    (
        "a LoRA",
        r"lora|\w+_lora|lora_(unet|te\d?)_\w+|lora_(up|down|mid|A|B|linear_layer)|hada_w\w+|lokr_w\w+|oft_\w+",
        ADD,
    ),
    ("a ControlNet", r"\^(control_model|controlnet\w*|input_hint_block|zero_convs)", ADD),
    ("a motion module (AnimateDiff)", r"motion_modules", ADD),
    ("an IP-Adapter", r"\^(ip_adapter|image_proj)", ADD),
    ("a Stable Diffusion 3 model", r"joint_blocks", OTHER),
    ("a Flux model", r"double_blocks", OTHER),
    ("a Stable Cascade model", r"clip_txt_mapper|channelwise", OTHER),
    ("a Stable Video Diffusion model", r"time_(stack|mixer)", OTHER),
    ("a Playground v2.5 model (EDM)", r"\^edm_(mean|std)", OTHER),
    ("a CosXL model (EDM)", r"\^edm_vpred", OTHER),
    ("a Stable unCLIP model", r"\^(embedder|noise_augmentor)", OTHER),
    ("a Stable Diffusion 2 depth model", r"\^depth_model", OTHER),
    ("a Stable Zero123 model", r"\^cc_projection", OTHER),
)
PIECES: tuple[tuple[str, str, str], ...] = (  # the same, of what is no whole model
    ("a U-Net without its text encoder", r"^(\w+\.)*input_blocks\.0\.0\.weight$", WHOLE),
    (TINY, r"^((taesd_)?(en|de)coder\.)?(layers\.)?3\.conv\.0\.weight$", "give it as the VAE of a model (vae=)"),
    (KL, r"^(first_stage_model\.|vae\.)?(en|de)coder\.conv_in\.weight$", "give it as the VAE of a model (vae=)"),
    ("the U-Net of a model folder", r"^(unet\.)?down_blocks\.0\.resnets\.0\.", "open the folder it belongs to"),
    ("a text encoder", r"\b(encoder\.layers|resblocks|block\.\d+\.layer)\.0\.", WHOLE),
    ("an enlarger of pictures (ESRGAN)", r"\b(RDB|rdb)\d\.|^params", OTHER),
)
WIDTHS = (768, 1024, 1280)  # of the text encoders


def recognise(header: Header) -> Facts:
    """What a safetensors file holds, from its names, shapes and metadata, without a look at its numbers."""
    names = header.tensors
    words = {word for name in names for word in name.split(".")} | {"^" + name.partition(".")[0] for name in names}
    text = "\n".join(words)  # a few hundred, where there are thousands of names
    for what, pattern, advice in STRANGERS:
        if re.search(f"^({pattern})$", text, re.MULTILINE):
            return Facts(what, advice=advice)
    if U_NET in names and len(names[U_NET].shape) == 4:
        in_channels = names[U_NET].shape[1]
        ema = any(name.startswith("model_ema.diffusion_model") for name in names)
        said = header.metadata.get("modelspec.prediction_type", "").lower()
        prediction = V if "v_pred" in names else PREDICTIONS.get(said) or _by_architecture(header.metadata)
        for key, family in FAMILIES.items():
            if not any(names.keys() >= sign for sign in family.signs):
                continue
            what = f"{'an' if family.title.startswith('SDXL') else 'a'} {family.title} model"
            if in_channels not in family.channels:
                takes = " or ".join(map(str, family.channels))
                return Facts(f"{what} whose U-Net takes {in_channels} channels", advice=f"{takes} are supported")
            return Facts(what, key, in_channels, prediction, "ztsnr" in names, ema)
    text = "\n".join(names)
    for what, pattern, advice in PIECES:
        if re.search(pattern, text, re.MULTILINE):
            return Facts(what, advice=advice)
    rows = [entry.shape for name, entry in names.items() if name not in ("step", "sd_checkpoint")]
    if rows and len(rows) <= 4 and all(0 < len(shape) < 3 and shape[-1] in WIDTHS for shape in rows):
        return Facts("an embedding (textual inversion)", advice=ADD)
    return Facts("of no known family", advice=KNOWN)


def _by_architecture(metadata: Mapping[str, str]) -> str | None:
    """What Stable Diffusion 2's names in modelspec.architecture say of the prediction."""
    name = metadata.get("modelspec.architecture", "")
    return next((kind for end, kind in (("v2-768-v", V), ("v2-512", EPSILON)) if end in name), None)
