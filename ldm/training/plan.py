"""What a LoRA run will do, before it does it: the choices that were left to the model, and about how much memory and
time they take.
"""

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ldm.adapters.adapter import Adapter
from ldm.checkpoints.components import Components
from ldm.data.buckets import Buckets, Size
from ldm.errors import UsageError
from ldm.memory import available_bytes
from ldm.schedulers import network_of
from ldm.staging import FALLBACKS
from ldm.training.counting import (
    adapted,
    clip_encoders,
    encoding_work,
    fresh,
    measured_rate,
    on_meta,
    shadow,
    step_work,
)
from ldm.training.lora_config import LoRAConfig
from ldm.training.lora_data import Material

UNNAMED = r"[^\w. -]"  # what names of files had better not have


class Trained(NamedTuple):
    """The files that a run leaves. None: it was not asked for."""

    adapter: Path | None
    embedding: Path | None


@dataclass(frozen=True)
class Run:
    """A run that is about to begin: everything is opened and checked, nothing is trained yet."""

    config: LoRAConfig  # settled: nothing is left to the model
    components: Components
    material: Material
    start: Adapter | None = None  # what it goes on from, `init_adapter`

    @property
    def result(self) -> Trained:
        """Where the adapter and the learned word will lie."""
        config, folder = self.config, Path(self.config.output_dir)
        adapter = folder / (config.output_name + ".safetensors" * (config.output_format != "peft"))
        # of SDXL, a file of a learned word does not hold its name: the file's own is it
        embedding = folder / "embeddings" / f"{re.sub(UNNAMED, '_', config.placeholder_token)}.safetensors"
        return Trained(
            adapter if config.rank or config.init_adapter else None, embedding if config.placeholder_token else None
        )


# -- what is left to the model ----------------------------------------------------------------------------------------


class Defaults(NamedTuple):
    """What suits models of a size. batch_size: pictures; steps: of the optimiser; learning_rate: not prodigy's."""

    batch_size: int
    steps: int
    learning_rate: float
    lr_scheduler: str
    targets: tuple[str, ...]


FEW = 100_000_000  # parameters of a U-Net below which a model is a small one
SMALL = Defaults(8, 300, 2e-3, "cosine", ("attention", "feed-forward", "projections"))
LARGE = Defaults(1, 1000, 1e-4, "constant", ("attention",))
STEP = 64  # pixels: of the buckets of models for this many and more, as kohya has it
WIDE = 512
DTYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}


def settled(config: LoRAConfig, c: Components, pictures: int | None = None, processes: int = 1) -> LoRAConfig:
    """The configuration with everything filled in that was left to the model, of components as they will be used.

    pictures: how many there are to train on, which the steps of a number of epochs depend on; None while they are not
    known: then max_train_steps stays open where epochs are asked for. processes: of the run, which share each step's
    batches. num_held_out stays as it is, for how many there are is for `material` to say. With prodigy, which has one
    learning rate, the learned word's becomes that. UsageError for what the model does not allow.
    """
    weight, small = c.unet.conv_in.weight, sum(p.numel() for p in c.unet.parameters()) < FEW
    defaults, factor = SMALL if small else LARGE, c.vae.config.factor
    config = replace(config, targets=config.targets or defaults.targets)
    _refuse(config, c)
    schedule, prediction = network_of(c.scheduler_config)
    kind = config.prediction_type or prediction
    if kind == "epsilon" and schedule.zero_terminal_snr:
        raise UsageError(
            f"prediction_type is epsilon, and the noise schedule of {c.name} ends in nothing but noise (zero terminal "
            "SNR), where that says nothing of the picture; give v_prediction or sample, or leave it to the model"
        )
    resolution = config.resolution or c.unet.config.sample_size * factor
    least = factor * 2 ** (len(c.unet.config.block_out_channels) - 1)
    rate = config.learning_rate
    if rate is None:
        rate = 1.0 if config.optimizer == "prodigy" else defaults.learning_rate
    folder = Path(config.output_dir)
    mixed = "fp16" if weight.dtype == torch.float16 else "bf16"
    batch = config.train_batch_size or defaults.batch_size
    filled: dict[str, Any] = {
        "resolution": resolution,
        "bucket_step": STEP if resolution >= WIDE and STEP % factor == 0 else min(least, resolution),
        "min_side": max(1, resolution // 2),
        "train_batch_size": batch,
        "max_train_steps": defaults.steps
        if config.num_train_epochs is None
        else _steps(config, batch * processes, pictures),
        "learning_rate": rate,
        "text_encoder_lr": rate,
        "lr_scheduler": defaults.lr_scheduler,
        "lora_alpha": float(config.rank),
        "dtype": DTYPES[weight.dtype],
        "mixed_precision": "no" if weight.device.type == "cpu" else mixed,
        "prediction_type": prediction,
        "max_timestep": schedule.num_train_timesteps,
        "cache_dir": str(folder / "cache"),
        "class_data_dir": str(folder / "class") if config.class_prompt else None,
    }
    filled = {name: value for name, value in filled.items() if getattr(config, name) is None}
    if config.optimizer == "prodigy":
        filled["token_lr"] = rate
    if filled.get("max_train_steps"):
        filled["num_train_epochs"] = None  # they are steps now
    filled["output_name"] = config.output_name or folder.resolve().name or "lora"
    return replace(config, **filled)


def _steps(config: LoRAConfig, batch_size: int, pictures: int | None) -> int | None:
    """The steps in which all pictures come so many times; class pictures take every other batch."""
    if pictures is None:
        return None
    assert config.num_train_epochs
    come = config.num_train_epochs * pictures * config.repeats * (1 + config.has_class)
    return max(1, math.ceil(come / (batch_size * config.gradient_accumulation_steps)))


def _refuse(config: LoRAConfig, c: Components) -> None:
    """UsageError, in one sentence, for what cannot be trained of this model, or not so."""
    device = c.unet.conv_in.weight.device
    foreign = c.text_encoder is not None and "text_encoder" not in clip_encoders(c)
    rates = {config.learning_rate, config.text_encoder_lr} - {None}
    faults = {
        f"the text encoder of {c.name} is not CLIP's, and no other is trained here; leave out --train-text-encoder and "
        "--placeholder-token": config.trains_text and foreign,
        f"{c.name} is SDXL's refiner, which is told how beautiful a picture is, and captions do not say that; train "
        "the model that it refines": bool(c.flags.get("requires_aesthetics_score")),
        "max_train_steps and num_train_epochs were both given; give one of them":
            config.max_train_steps is not None and config.num_train_epochs is not None,
        "prodigy has one learning rate, and text_encoder_lr differs from learning_rate; give one of them":
            config.optimizer == "prodigy" and len(rates) > 1,
        "mixed_precision is fp16, which needs a CUDA device; give bf16 or no":
            config.mixed_precision == "fp16" and device.type == "cpu",
        f"output_name is {config.output_name!r}; it is the name of a file in the output folder, without folders":
            config.output_name in (".", "..") or bool({"/", "\\"} & {*config.output_name}),
    }  # fmt: skip
    for sentence, holds in faults.items():
        if holds:
            raise UsageError(sentence)
    sides = [] if config.init_adapter else _sides(config, c)
    if sides and config.rank > sides[-1]:
        raise UsageError(
            f"a rank of {config.rank} is more than any of the weights to be adapted can have; the most is {sides[-1]}, "
            "and 4 to 64 are usual"
        )


def _sides(config: LoRAConfig, c: Components) -> list[int]:
    """The ranks that the adapted weights can have, rising: of each its smaller side."""
    bare = {name: shadow(network, on_meta) for name, network in adapted(config, c).items()}
    layers = dict(fresh(replace(config, rank=min(1, config.rank)), bare).items()).values()
    return sorted(min(len(layer.up), layer.down[0].numel()) for layer in layers)


# -- the plan ---------------------------------------------------------------------------------------------------------

STATES = {"adamw": 8, "adamw8bit": 2, "prodigy": 16, "sgd": 4}  # bytes that optimisers keep of a parameter
SHARE = 0.5  # of a matrix product's rate is what networks reach: 0.54, of the model in the box on a CPU, was measured
PROMPTS = 4  # sample pictures in a row, where no prompts are given


@dataclass(frozen=True)
class Plan:
    """What a run is going to do. config: settled. data, notes: sentences. modules, parameters: that are trained, in
    networks. epochs: how often each picture comes. state: bytes of a state on disk.

    bytes: "weights" of the frozen networks, "trained" (with gradients, moments and average), "step", "encoding",
    "free". seconds: "steps", "latents", "pictures". Both are empty where they were not estimated.
    """

    config: LoRAConfig
    model: str
    device: str
    threads: int
    data: tuple[str, ...]
    networks: tuple[str, ...]
    modules: int
    parameters: int
    epochs: float
    state: int
    notes: tuple[str, ...]
    bytes: dict[str, int]
    seconds: dict[str, float]

    @property
    def memory(self) -> int:
        """About how many bytes the run takes in all."""
        held = self.bytes
        return held["weights"] + held["trained"] + max(held["step"], held["encoding"])

    def rows(self) -> Iterator[tuple[str, str]]:
        """What a line is about, and the sentence."""
        c = self.config
        where = f"{self.device}, {self.threads} threads" if self.device == "cpu" else self.device
        yield "model", f"{self.model}; {c.dtype} on {where}; mixed precision: {c.mixed_precision}"
        yield from (("data", sentence) for sentence in self.data)
        yield "trains", f"{self.parameters:,} parameters: {', and '.join(self._trained())}"
        several = f" x {c.gradient_accumulation_steps}" if c.gradient_accumulation_steps > 1 else ""
        shown = f"{c.max_train_steps} of {c.train_batch_size}{several} pictures: each comes {self.epochs:.1f} times"
        yield "steps", f"{shown}; {c.optimizer}, learning rate {c.learning_rate:g}, {c.lr_scheduler}"
        yield from (("memory", sentence) for sentence in self._memory())
        yield from (("time", sentence) for sentence in self._time())
        states = f"a state of {_mib(self.state)} every {c.checkpointing_steps} steps, {c.checkpoints_total_limit} kept"
        yield "files", f"in {c.output_dir}: {c.output_name}, README.md, samples/, curve.png, log.jsonl; {states}"
        yield from (("note", sentence) for sentence in self.notes)

    def _trained(self) -> Iterator[str]:
        c = self.config
        if self.modules:
            kind = " DoRA" * c.use_dora + " rsLoRA" * c.use_rslora
            places = f"{self.modules} modules of {' and '.join(self.networks)} ({', '.join(c.targets)})"
            yield f"rank {c.rank}{kind}, alpha {c.lora_alpha:g}, in {places}"
        if c.placeholder_token:
            yield f"the word {c.placeholder_token}"

    def _memory(self) -> Iterator[str]:
        if self.bytes:
            held = {name: _mib(size) for name, size in self.bytes.items()}
            parts = f"{held['weights']} frozen weights (already taken), {held['trained']} what is trained"
            work = f"{held['step']} a step, or {held['encoding']} encoding a picture"
            yield f"about {_mib(self.memory)}: {parts}, {work}; {held['free']} are free"

    def _time(self) -> Iterator[str]:
        if self.seconds:
            spent = {name: timedelta(seconds=math.ceil(value)) for name, value in self.seconds.items()}
            parts = f"{spent['steps']} steps, {spent['pictures']} sample pictures, {spent['latents']} latents"
            total = sum(spent.values(), timedelta())
            yield f"about {total}, estimated from how fast this machine multiplies matrices: {parts}"

    def __str__(self) -> str:
        return "\n".join(f"{name:<8} {sentence}" for name, sentence in self.rows())

    def told(self) -> dict[str, Any]:
        """All of it, as JSON has it."""
        return asdict(self)


def _mib(size: int) -> str:
    return f"{size / 2**20:,.1f} MiB" if size < 100 * 2**20 else f"{size / 2**20:,.0f} MiB"


def planned(config: LoRAConfig, c: Components, material: Material) -> Plan:
    """The plan of a settled run, without memory and time; it takes no time itself."""
    sides = _sides(config, c)
    lora = fresh(config, {name: shadow(network, on_meta) for name, network in adapted(config, c).items()})
    words = clip_encoders(c).values() if config.placeholder_token else ()
    trained = sum(p.numel() for p in lora.parameters())
    trained += sum(config.num_vectors * encoder.config.hidden_size for encoder in words)
    own = len(material.pictures) * config.repeats * (1 + config.has_class)
    return Plan(
        config=config,
        model=c.name,
        device=str(c.unet.conv_in.weight.device),
        threads=torch.get_num_threads(),
        data=material.summary,
        networks=tuple(adapted(config, c)) if sides else (),
        modules=len(sides),
        parameters=trained,
        epochs=_seen(config) / own,
        state=trained * (4 + STATES[config.optimizer] + 4),
        notes=tuple(_notes(config, sides)),
        bytes={},
        seconds={},
    )


def _seen(config: LoRAConfig) -> int:
    """How many pictures go through the networks in all."""
    return (config.max_train_steps or 1) * config.gradient_accumulation_steps * (config.train_batch_size or 1)


def _notes(config: LoRAConfig, sides: Sequence[int]) -> Iterator[str]:
    """What a person should hear before the first step."""
    if config.init_adapter:
        yield f"it goes on from {config.init_adapter}, whose own rank, alpha and targets count in place of those above"
    elif sides and config.rank > sides[0]:
        few = sum(side < config.rank for side in sides)
        yield (
            f"{few} of the {len(sides)} weights cannot have a rank of {config.rank}, the smallest not more than "
            f"{sides[0]}: what is beyond does nothing there"
        )


def estimate(config: LoRAConfig, c: Components, material: Material) -> Plan:
    """The plan of a settled run with about how much memory and time it takes; nothing is computed for it.

    Memory: tensors of a step at the largest bucket are counted; what kernels take for themselves is not. Time:
    floating-point operations, at SHARE of the rate at which this machine multiplies matrices just now. Reading
    pictures, encoding texts and the held-out loss are left out of it.
    """
    device, kind = c.unet.conv_in.weight.device, c.unet.conv_in.weight.dtype
    buckets = [each for each in (material.buckets, material.class_buckets) if each is not None]
    largest = max((size for each in buckets for size in each.sizes), key=math.prod)
    step, encoding, plan = step_work(config, c, largest), encoding_work(c, largest), planned(config, c, material)
    pictures = len(material.pictures) + len(material.held_out) + len(material.class_pictures) + material.missing
    anew = config.no_cache or config.random_crop
    known, batch = FALLBACKS | c.generation, config.train_batch_size or 1
    calls = known["num_inference_steps"] * (1 + (known["guidance_scale"] > 1))
    rows = (config.max_train_steps or 1) // config.validation_steps
    flops = {
        "steps": _seen(config) * step.flops / batch * _mean_area(buckets, largest),
        "latents": encoding.flops * (_seen(config) if anew else pictures * (1 + config.random_flip)),
        "pictures": rows * (len(config.validation_prompt) or PROMPTS) * calls * step.forward / batch,
    }
    rate = SHARE * measured_rate(device, kind)
    held = {
        "weights": sum(p.numel() * p.element_size() for network in c.networks.values() for p in network.parameters()),
        "trained": plan.state + 4 * plan.parameters,
        "step": step.peak,
        "encoding": encoding.peak,
        "free": available_bytes(device),
    }
    plan = replace(plan, bytes=held, seconds={name: many / rate for name, many in flops.items()})
    return replace(plan, notes=(*plan.notes, *_short(plan)))


def _mean_area(buckets: Sequence[Buckets], largest: Size) -> float:
    """The mean area of the pictures, as a part of the largest bucket's."""
    pairs = [
        (math.prod(size), len(own)) for each in buckets for size, own in zip(each.sizes, each.members, strict=True)
    ]
    return sum(area * many for area, many in pairs) / sum(many for _, many in pairs) / math.prod(largest)


def _short(plan: Plan) -> Iterator[str]:
    """What to lower where memory will not suffice."""
    c = plan.config
    ways = {
        "--gradient-checkpointing": not c.gradient_checkpointing,
        "a lower --train-batch-size (and as many more --gradient-accumulation-steps)": (c.train_batch_size or 1) > 1,
        "a lower --resolution": True,
    }
    if plan.memory - plan.bytes["weights"] > plan.bytes["free"]:
        helping = " or ".join(way for way, helps in ways.items() if helps)
        yield f"memory will hardly suffice; less is taken with {helping}"
