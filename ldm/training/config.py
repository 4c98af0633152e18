"""Run configurations: dataclasses that say what may stand in a YAML file, read strictly."""

import dataclasses
import math
from pathlib import Path
from typing import Any, TypeVar, get_args, get_type_hints

import yaml
from pydantic import TypeAdapter, ValidationError

from ldm.data.emoji import CorpusConfig
from ldm.errors import UsageError, choose
from ldm.models.clip import CLIPTextConfig, CLIPVisionConfig
from ldm.models.unet import UNetConfig
from ldm.models.vae import VAEConfig
from ldm.training.ema import gamma_of
from ldm.training.lora_config import NAMED as OF_LORA

T = TypeVar("T")
ALSO = {"optimizer": ("muon",), "lr_scheduler": ("cosine_to_share",), "mixed_precision": (), "report_to": ()}
# Fields of LoopConfig that take one of a few names: those of LoRA runs, and some of their own.
NAMED = {name: (*OF_LORA[name], *own) for name, own in ALSO.items()}
LEAST = {  # ... and whole numbers and others that may not be less; those of the optimisers are looked at there
    **dict.fromkeys(("steps", "batch_size", "ema_every", "log_every", "save_every", "sample_every"), 1),
    **dict.fromkeys(("keep_states", "gradient_accumulation_steps", "lr_num_cycles"), 1),
    **dict.fromkeys(("warmup_steps", "workers", "threads", "seed", "max_skipped_steps", "max_grad_norm"), 0),
    **dict.fromkeys(("ema_decay", "final_share"), 0),
}


@dataclasses.dataclass(frozen=True)
class LoopConfig:
    """What every training run has; steps are optimiser steps, of gradient_accumulation_steps batches each."""

    out: str  # folder of the run: states, samples, curve, result
    steps: int = 1000
    batch_size: int = 16
    optimizer: str = "adamw"  # a name of NAMED, as lr_scheduler is
    learning_rate: float = 1e-3  # peak
    lr_scheduler: str = "cosine_to_share"  # this: warm-up, then a cosine down to final_share
    warmup_steps: int = 100
    final_share: float = 0.05
    lr_num_cycles: int = 1
    lr_power: float = 1.0
    weight_decay: float = 0.01
    beta1: float = 0.9
    beta2: float = 0.99
    epsilon: float = 1e-8
    max_grad_norm: float = 1.0  # 0: gradients stay as long as they are
    max_skipped_steps: int = 0  # steps without a finite loss that are left out before the run stops
    ema_decay: float = 0.999  # of the averaged weights, which are the result; warmed up as (1 + n) / (10 + n)
    ema_every: int = 1  # steps between two updates of the average
    # sigma_rel of averages that are kept as snapshots (0.05 and 0.1), of which `ldm train ema` makes one of any length
    ema_profiles: tuple[float, ...] = ()
    ema_snapshots_every: int = 0  # steps between two snapshots; some 30 in all are enough
    seed: int = 0
    device: str = "auto"  # "cpu", "cuda", or "auto": cuda if there is one
    mixed_precision: str = "no"  # "no", "bf16" or "fp16", accelerate's names
    gradient_accumulation_steps: int = 1
    workers: int = 1  # processes that render ahead; 0 renders in the training process
    threads: int = 0  # CPU threads; 0 leaves torch's choice
    log_every: int = 20
    save_every: int = 500
    sample_every: int = 1000
    sample_first: bool = False  # also before the first step
    keep_states: int = 2  # training states kept in `out`
    report_to: str = "none"  # "tensorboard": its event files, too

    def __post_init__(self) -> None:
        for name, known in NAMED.items():
            choose(name, getattr(self, name), known)
        for name, low in LEAST.items():
            if not low <= getattr(self, name) < math.inf:
                raise UsageError(f"{name} is {getattr(self, name)}; it must be at least {low}, and finite")
        if not self.ema_decay < 1:
            raise UsageError(f"ema_decay is {self.ema_decay}; it must be below 1")
        for sigma_rel in self.ema_profiles:
            gamma_of(sigma_rel)  # refuses what is no length
        every = self.ema_snapshots_every
        if self.ema_profiles and (every < 1 or every % self.ema_every):
            raise UsageError(
                f"ema_snapshots_every is {every}; with ema_profiles it must be a multiple of ema_every {self.ema_every}"
            )


@dataclasses.dataclass(frozen=True)
class SmallVAEConfig(VAEConfig):
    """An AutoencoderKL that is trained here; what is not said of it is small."""

    block_out_channels: tuple[int, ...] = (16, 32, 64)
    layers_per_block: int = 1
    norm_num_groups: int = 8
    sample_size: int = 64
    scaling_factor: float = 1.0


@dataclasses.dataclass(frozen=True)
class FirstStageConfig:
    """`ldm train first-stage`: the autoencoder. Loss weights are relative to the mean absolute error of a pixel in
    [-1, 1].
    """

    loop: LoopConfig
    corpus: CorpusConfig = dataclasses.field(default_factory=CorpusConfig)
    vae: SmallVAEConfig = dataclasses.field(default_factory=SmallVAEConfig)
    kl_weight: float = 1e-3  # of the KL divergence per latent value
    square_weight: float = 0.0  # of the squared error, which is what PSNR measures
    edge_weight: float = 1.0  # of the error of horizontal and vertical differences
    scales: int = 3  # the pixel error is taken at full size, halved, quartered ...
    crop: int = 40  # side of the squares cut around objects that the first `crops` steps see instead of whole scenes
    crops: int = 0
    disc_start: int = 4000  # step at which the discriminator's opinion begins to count
    disc_weight: float = 0.1  # of the adversarial term, beside the adaptive weight
    disc_width: int = 16


@dataclasses.dataclass(frozen=True)
class ClipConfig:
    """`ldm train clip`: text and image towers, trained contrastively on the corpus."""

    loop: LoopConfig
    first_stage: str  # folder with the trained autoencoder (`ldm train first-stage`'s result)
    corpus: CorpusConfig = dataclasses.field(default_factory=CorpusConfig)
    vocab_size: int = 1024
    foretold_weight: float = 0.0  # of the error of the latents that the text foretells, beside the contrast
    text: CLIPTextConfig = dataclasses.field(default_factory=CLIPTextConfig)
    vision: CLIPVisionConfig = dataclasses.field(default_factory=CLIPVisionConfig)


@dataclasses.dataclass(frozen=True)
class DenoiserConfig:
    """`ldm train denoiser`: the U-Net, on latents of the corpus."""

    loop: LoopConfig
    first_stage: str  # folder with the trained autoencoder (`ldm train first-stage`'s result)
    clip: str  # folder with the trained text encoder and tokenizer (`ldm train clip`'s result)
    start: str = ""  # model folder whose U-Net the run begins with; "" = random numbers
    weights: str = ""  # where the assembled pipeline folder goes when the run ends; "" = only into `out`
    corpus: CorpusConfig = dataclasses.field(default_factory=CorpusConfig)
    unet: UNetConfig = dataclasses.field(default_factory=UNetConfig)
    latents: int = 40000  # scenes encoded once and drawn from in every epoch
    prediction_type: str = "v_prediction"
    beta_schedule: str = "scaled_linear"
    beta_start: float = 0.00085
    beta_end: float = 0.012
    rescale_betas_zero_snr: bool = True
    snr_gamma: float = 5.0  # min-SNR weighting; 0 weighs all levels alike
    # Timesteps: evenly where timestep_std is 0, else T * sigmoid(mean + std * normal), Esser et al. 2024, eq. 19.
    timestep_std: float = 0.0
    timestep_mean: float = 0.0
    caption_dropout: float = 0.1
    guidance_scale: float = 3.0  # of sample pictures, and the default of the assembled pipeline
    num_inference_steps: int = 20
    scheduler: str = "ddim"


def read_config(path: str | Path, kind: type[T], overrides: dict[str, Any] | None = None) -> T:
    """Read a run's YAML file as a `kind`. Raises UsageError for a missing file, an unknown field (the nearest is
    named) or a wrong type.

    `overrides` are dotted keys that replace what the file says: {"loop.steps": 10}.
    """
    path = Path(path)
    try:
        data = yaml.safe_load(path.read_text("utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UsageError(
            f"{path} cannot be read as a YAML file ({str(error).splitlines()[0]}); give one like those in configs/"
        ) from None
    if not isinstance(data, dict):
        raise UsageError(f"{path} holds {type(data).__name__}, not fields; give one like those in configs/")
    for key, value in (overrides or {}).items():
        *parents, last = key.split(".")
        target = data
        for parent in parents:
            target[parent] = {} if target.get(parent) is None else target[parent]
            target = target[parent]
            if not isinstance(target, dict):
                raise UsageError(
                    f"{path}: {parent} is {target!r}, which has no field {last!r} to replace with {value!r}"
                )
        target[last] = value
    return checked(data, kind, str(path))


def checked(data: dict[str, Any], kind: type[T], where: str) -> T:
    """Fields as a `kind`. UsageError, with `where` they stand before it, for an unknown one, a wrong type or value."""
    known_fields(data, kind, where)
    try:
        return TypeAdapter(kind).validate_python(data)
    except ValidationError as error:
        first = error.errors()[0]
        refused = first.get("ctx", {}).get("error")  # by the kind itself, in a sentence of ours
        said = str(refused) if isinstance(refused, UsageError) else f"{first['msg'].lower()}; correct it there"
        place = ".".join(str(part) for part in first["loc"])
        given = "" if refused or isinstance(first["input"], dict) else f" = {first['input']!r}"
        raise UsageError(": ".join(filter(None, (where, place + given, said)))) from None


def known_fields(data: dict[str, Any], kind: type, where: str) -> None:
    """UsageError for the first key of `data`, at any depth, that `kind` has no field for."""
    hints = get_type_hints(kind)
    names = [field.name for field in dataclasses.fields(kind)]
    for key, value in data.items():
        choose(f"field of {where}", str(key), names)
        inner = next((t for t in (hints[key], *get_args(hints[key])) if dataclasses.is_dataclass(t)), None)
        if isinstance(value, dict) and isinstance(inner, type):
            known_fields(value, inner, f"{where}, {key}")
