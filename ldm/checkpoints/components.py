"""The parts of a latent diffusion model in memory, what classes of diffusers' and transformers' they are, and what of
them fits together.
"""

import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch import nn

from ldm.adapters.weights import Weights
from ldm.errors import ModelError
from ldm.models.clip import CLIPTextConfig, CLIPTextModel
from ldm.models.safety import SafetyChecker, SafetyConfig
from ldm.models.tiny_vae import AutoencoderTiny, TinyVAEConfig
from ldm.models.unet import UNet, UNetConfig
from ldm.models.vae import AutoencoderKL, VAEConfig
from ldm.text.tokenizer import CLIPTokenizer
from ldm.text.transformers_text import KINDS, TransformersText

Json = dict[str, Any]


class Part(NamedTuple):
    """A class of network: the library it is of in model_index.json, its weights file's stem, how it is built (None:
    with its tokenizer, by TransformersText).
    """

    library: str
    stem: str
    build: Callable[[Mapping[str, object]], nn.Module] | None = None


DIFFUSION, MODEL = "diffusion_pytorch_model", "model"
CLASSES: dict[str, Part] = {  # name in model_index.json -> our network of that class
    "UNet2DConditionModel": Part("diffusers", DIFFUSION, lambda c: UNet(UNetConfig.from_dict(c))),
    "AutoencoderKL": Part("diffusers", DIFFUSION, lambda c: AutoencoderKL(VAEConfig.from_dict(c))),
    "AutoencoderTiny": Part("diffusers", DIFFUSION, lambda c: AutoencoderTiny(TinyVAEConfig.from_dict(c))),
    "CLIPTextModel": Part("transformers", MODEL, lambda c: CLIPTextModel(CLIPTextConfig.from_dict(c))),
    "CLIPTextModelWithProjection": Part("transformers", MODEL, lambda c: CLIPTextModel(CLIPTextConfig.from_dict(c))),
    "StableDiffusionSafetyChecker": Part("stable_diffusion", MODEL, lambda c: SafetyChecker(SafetyConfig.from_dict(c))),
}
CLASSES |= dict.fromkeys(KINDS, Part("transformers", MODEL))
NETWORKS: dict[str, tuple[str, ...]] = {  # folder of a component -> the classes it may be of, the usual one first
    "unet": ("UNet2DConditionModel",),
    "vae": ("AutoencoderKL", "AutoencoderTiny"),
    "text_encoder": ("CLIPTextModel", *KINDS),
    "text_encoder_2": ("CLIPTextModelWithProjection",),
    "safety_checker": ("StableDiffusionSafetyChecker",),
}
TOKENIZER_CLASSES = {  # class of a text encoder -> classes of its tokenizer, the one that is written first
    "CLIPTextModel": ("CLIPTokenizer", "CLIPTokenizerFast"),
    "CLIPTextModelWithProjection": ("CLIPTokenizer", "CLIPTokenizerFast"),
} | {name: (kind.tokenizer, f"{kind.tokenizer}Fast") for name, kind in KINDS.items()}
TOKENIZERS = {"tokenizer": "text_encoder", "tokenizer_2": "text_encoder_2"}  # folder -> whose words they are
FLAGS = ("force_zeros_for_empty_prompt", "requires_aesthetics_score")
"""What model_index.json may switch: SDXL's negative prompt of zeros, and its refiner's aesthetic score."""
TASKS = {0: "text-to-image", 3: "upscaling", 4: "instruct-pix2pix", 5: "inpainting"}
"""What a U-Net is for, by how many channels it takes beside those of the latents."""
PIPELINES = {  # (is it SDXL, task) -> diffusers' pipeline, the one that is written first
    (False, "text-to-image"): ("StableDiffusionPipeline", "StableDiffusionImg2ImgPipeline"),
    (False, "inpainting"): ("StableDiffusionInpaintPipeline",),
    (False, "instruct-pix2pix"): ("StableDiffusionInstructPix2PixPipeline",),
    (False, "upscaling"): ("StableDiffusionUpscalePipeline",),
    (True, "text-to-image"): ("StableDiffusionXLPipeline", "StableDiffusionXLImg2ImgPipeline"),
    (True, "inpainting"): ("StableDiffusionXLInpaintPipeline",),
    (True, "instruct-pix2pix"): ("StableDiffusionXLInstructPix2PixPipeline",),
}


@dataclass
class Components:
    """The parts of a latent diffusion model, under diffusers' names; those that a family has not are None.

    text_encoder: None only in SDXL's refiner; one of transformers' has its tokenizer with it. text_encoder_2,
    tokenizer_2: SDXL's. scheduler_config: scheduler_config.json as it stands; low_res_scheduler_config: the
    x4-upscaler's other one. generation: the request fields (those of folder.DEFAULTS) that suit the model. flags: those
    of FLAGS that are set. notes: what the user should hear about how the model was opened, each said once. name: what
    to call it; no path. fast: the name of the adapter that is its fast mode, if it is in that (ldm.fast). weights: the
    one owner of the numbers in the networks, once adapters are loaded.
    """

    unet: UNet
    vae: AutoencoderKL | AutoencoderTiny
    text_encoder: CLIPTextModel | TransformersText | None
    tokenizer: CLIPTokenizer | None
    scheduler_config: Json
    generation: Json = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    name: str = "unnamed"
    text_encoder_2: CLIPTextModel | None = None
    tokenizer_2: CLIPTokenizer | None = None
    safety_checker: SafetyChecker | None = None
    flags: dict[str, bool] = field(default_factory=dict)
    low_res_scheduler_config: Json = field(default_factory=dict)
    fast: str = ""
    weights: Weights = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        self.weights = Weights(self)

    @property
    def networks(self) -> dict[str, nn.Module]:
        """The networks that are there, by the names of their folders."""
        return {name: getattr(self, name) for name in NETWORKS if getattr(self, name) is not None}

    @property
    def tokenizers(self) -> dict[str, CLIPTokenizer]:
        """The tokenizers that are there, by the names of their folders."""
        return {name: getattr(self, name) for name in TOKENIZERS if getattr(self, name) is not None}

    @property
    def configs(self) -> dict[str, Json]:
        """The `config.json` of every network, by the name of its folder."""
        return {name: network.config.to_dict() for name, network in self.networks.items()}  # type: ignore[union-attr,operator]

    @property
    def task(self) -> str:
        """What the U-Net is for: a value of TASKS."""
        return TASKS[self.unet.config.in_channels - self.vae.config.latent_channels]

    @property
    def is_xl(self) -> bool:
        """Whether it is of SDXL's kind: conditioned on a pooled text and on sizes."""
        return self.text_encoder_2 is not None

    @property
    def pipeline(self) -> str:
        """diffusers' name of the pipeline that these parts make."""
        names = PIPELINES[self.is_xl, self.task]
        return names[-1] if self.text_encoder is None else names[0]


def class_of(network: nn.Module) -> str:
    """diffusers' or transformers' name of a network's class."""
    config: Json = network.config.to_dict()  # type: ignore[union-attr,operator]
    return str(config["_class_name"] if "_class_name" in config else config["architectures"][0])


def build(class_name: str, config: Mapping[str, object]) -> nn.Module:
    """A network of CLASSES, but for those of transformers, from its config.json. ModelError: a configuration that is
    not ours to compute.
    """
    maker = CLASSES[class_name].build
    assert maker, class_name
    return maker(config)


def check_fit(c: Components, where: str) -> None:
    """ModelError when the parts cannot work together."""
    if not isinstance(c.scheduler_config.get("_class_name"), str):
        raise ModelError(f"{where}: the scheduler_config.json has no _class_name; it names a scheduler of diffusers")
    unet, vae = c.unet.config, c.vae.config
    encoders = [encoder.config for encoder in (c.text_encoder, c.text_encoder_2) if encoder is not None]
    if not encoders:
        raise ModelError(f"{where} has no text encoder; a model has at least one")
    rows: list[tuple[str, Any, str, Any, Callable[[Any, Any], bool]]] = [
        ("unet in_channels", unet.in_channels, "vae latent_channels", vae.latent_channels, _takes),
        ("unet out_channels", unet.out_channels, "vae latent_channels", vae.latent_channels, operator.eq),
        ("unet cross_attention_dim", unet.cross_attention_dim, "text width", sum(e.hidden_size for e in encoders),
         operator.eq),
    ]  # fmt: skip
    for name, tokenizer in c.tokenizers.items():
        encoder = getattr(c, TOKENIZERS[name])
        size = encoder.config.vocab_size if encoder is not None else 0
        rows.append((f"{name} size", len(tokenizer), f"{TOKENIZERS[name]} vocab_size", size, operator.le))
    if unet.projection_class_embeddings_input_dim:
        sizes = 5 if c.flags.get("requires_aesthetics_score") else 6
        known = getattr(encoders[-1], "projection_dim", 0) + sizes * unet.addition_time_embed_dim
        rows.append(("unet projection_class_embeddings_input_dim", unet.projection_class_embeddings_input_dim,
                     "pooled text and sizes", known, operator.eq))  # fmt: skip
    wrong = [f"{left} {a} and {right} {b}" for left, a, right, b, fits in rows if not fits(a, b)]
    if wrong:
        raise ModelError(f"{where} holds parts of different models: {'; '.join(wrong)}; take all of one model")


def _takes(in_channels: int, latent_channels: int) -> bool:
    return in_channels - latent_channels in TASKS
