"""Training a LoRA: the loop's Stage made of a model, captioned pictures and a LoRAConfig. `ldm train-lora` and
`ldm.train_lora` are this.
"""

import json
import shutil
import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from ldm.adapters.adapter import Adapter
from ldm.adapters.matching import fit
from ldm.adapters.names import book_of
from ldm.adapters.reading import read_adapter
from ldm.adapters.writing import write_adapter
from ldm.checkpoints.components import Components
from ldm.conditioning import encoder_of
from ldm.data.cache import of_networks, posterior
from ldm.diffusion.losses import DiffusionLoss
from ldm.diffusion.noising import perturbed
from ldm.errors import UsageError, choose
from ldm.images import contact_sheet
from ldm.lora import LoRA
from ldm.loras import architecture, title
from ldm.pipeline import Pipeline
from ldm.schedulers import network_of
from ldm.text.encoder import Conditioning
from ldm.text.transformers_text import TransformersText
from ldm.training.card import write_card
from ldm.training.checkpointing import checkpoint_blocks
from ldm.training.config import LoopConfig
from ldm.training.counting import adapted, fresh
from ldm.training.frozen import sparing
from ldm.training.loop import Progress, Stage, device_of, explained, moved, recorded
from ldm.training.lora_batches import LoRABatch, LoRABatches
from ldm.training.lora_config import LoRAConfig
from ldm.training.lora_data import draw_class, material, with_class
from ldm.training.optimizers import RATES, Group, make_optimizer
from ldm.training.plan import Run, Trained, settled
from ldm.training.record import LOG, SAMPLES
from ldm.training.state import forget
from ldm.training.words import Words, write_embedding
from ldm.training.world import joined, shard_frozen

SHOWN = 4  # captions that are drawn where no validation prompt is given
SAMPLE_SIDE = 256  # pixels at which sample pictures are shown
FREE = {  # fields that may differ when a run goes on: they do not change what is trained
    "output_dir", "output_name", "output_format", "checkpointing_steps", "checkpoints_total_limit", "validation_prompt",
    "validation_steps", "logging_steps", "report_to", "resume_from_checkpoint", "cache_dir",
    "dataloader_num_workers", "threads", "device", "no_cache", "data", "class_data_dir", "model", "revision", "variant",
    "policy", "max_skipped_steps", "gradient_accumulation_steps", "num_train_epochs", "gradient_checkpointing", "fsdp",
}  # fmt: skip
TRAINED_ON = ("unet", "vae", "text_encoder", "text_encoder_2")  # networks that a run may not find changed
UNBOUND = ("constant", "constant_with_warmup")  # schedules that do not look at the end: more steps may be asked for


def opened(config: LoRAConfig) -> Run:
    """Open the model, look at the data and fill in what was left open. UsageError, ModelError or LdmError, in one
    sentence, for whatever would stop the run later.
    """
    where = device_of(config.device, config.threads)
    state = joined(where)
    device = where if where.type == "cpu" else state.device  # each process has a GPU of its own
    pipeline = Pipeline.from_pretrained(
        config.model or None, dtype=config.dtype, device=device, revision=config.revision, variant=config.variant
    )
    c = pipeline.components
    if c.task != "text-to-image":
        raise UsageError(f"{c.name} is a model for {c.task}; a LoRA is trained on models that draw from text alone")
    start = read_for(c, Path(config.init_adapter)) if config.init_adapter else None
    if start and not config.train_text_encoder and any(name.startswith("text_encoder") for name in start.layers):
        raise UsageError(
            f"{config.init_adapter} adapts the text encoder, too; add --train-text-encoder to go on from it"
        )
    found = material(config := settled(config, c), c)
    if config.max_train_steps is None:  # a number of epochs was asked for
        config = settled(config, c, len(found.pictures), state.num_processes)
    told, probe = loop_config(config), torch.zeros(1, device=device, requires_grad=True)
    make_optimizer(told.optimizer, [Group([probe], told.learning_rate)], told)  # refuses before anything is encoded
    RATES[told.lr_scheduler](0, told)
    return Run(config, c, found, start)


class Trainee(nn.Module):
    """What is trained: the adapter, the learned words, or both."""

    def __init__(self, lora: LoRA | None, words: Words | None) -> None:
        super().__init__()
        self.lora, self.words = lora, words

    @contextmanager
    def attached(self, networks: dict[str, nn.Module]) -> Iterator[None]:
        """While it lasts, the networks draw with what is trained."""
        with ExitStack() as stack:
            if self.lora is not None:
                stack.enter_context(self.lora.attached(networks))
            if self.words is not None:
                stack.enter_context(self.words.attached())
            yield

    @contextmanager
    def as_in(self, averaged: nn.Module) -> Iterator[None]:
        """While it lasts, its parameters have the values of another of its kind."""
        own = [parameter.detach().clone() for parameter in self.parameters()]
        try:
            self._put(list(averaged.parameters()))
            yield
        finally:
            self._put(own)

    @torch.no_grad()
    def _put(self, values: Sequence[Tensor]) -> None:
        for parameter, value in zip(self.parameters(), values, strict=True):
            parameter.copy_(value)


class LoRADiffusion(nn.Module):
    """The diffusion loss of a batch. The frozen networks are no part of this module: states hold what is trained."""

    def __init__(self, config: LoRAConfig, components: Components, trainee: Trainee) -> None:
        super().__init__()
        self.trainee = trainee
        self.config, self.components = config, components
        schedule, _ = network_of(components.scheduler_config)
        self.loss = DiffusionLoss(
            schedule, config.prediction_type or "epsilon", config.snr_gamma, config.loss_type, config.huber_c,
            config.huber_schedule,
        )  # fmt: skip

    def forward(self, batch: LoRABatch, number: int) -> tuple[Tensor, dict[str, Tensor]]:
        """The mean loss; of batch `number` of the stream, which plays no part, for all dice lie in the batch."""
        return (self.losses(batch) * batch.weight).mean(), {}

    def losses(self, batch: LoRABatch) -> Tensor:
        """The loss of each sample [B]."""
        unet, config = self.components.unet, self.config
        kind = next(unet.parameters()).dtype
        said = self.said(batch)
        sizes = batch.sizes if self.components.is_xl else None
        prepared = unet.prepare(said.context.to(kind), None if said.pooled is None else said.pooled.to(kind), sizes)
        x0, noise = self.latents(batch), batch.noise
        seen = perturbed(noise, batch.extra, config.input_perturbation) if config.input_perturbation else None
        mask = batch.mask if len(batch.mask) else None
        return self.loss(lambda x, t: unet(x.to(kind), t, prepared), x0, batch.t, noise, mask, seen)

    @torch.no_grad()
    def latents(self, batch: LoRABatch) -> Tensor:
        """A draw from the posterior of each picture, float32 [B, C, h, w], scaled as the U-Net has it."""
        vae, mean, std = self.components.vae, batch.mean, batch.std
        if not len(std):  # pictures: one by one, as the cache encodes them
            parts = [posterior(vae, picture) for picture in mean]
            mean, std = (torch.stack([part[name] for part in parts]) for name in ("mean", "std"))
        return (mean.float() + std.float() * batch.sample) * vae.config.scaling_factor

    def said(self, batch: LoRABatch) -> Conditioning:
        """The captions' states: kept ones, or encoded now."""
        if len(batch.context):
            return Conditioning(batch.context, batch.pooled if len(batch.pooled) else None)
        encoder, skip = encoder_of(self.components), self.config.clip_skip or None
        if (self.config.trains_text or self.config.fsdp) and not isinstance(encoder, TransformersText):
            # one call of the network, so that processes that share it make as many
            return encoder.states(list(batch.captions), skip)
        return encoder(list(batch.captions), skip)


LOOPS_NAMES = {  # fields of LoopConfig that LoRAConfig calls as diffusers does; the others are called alike
    "out": "output_dir", "steps": "max_train_steps", "batch_size": "train_batch_size",
    "warmup_steps": "lr_warmup_steps",
    "weight_decay": "adam_weight_decay", "beta1": "adam_beta1", "beta2": "adam_beta2", "epsilon": "adam_epsilon",
    "workers": "dataloader_num_workers", "log_every": "logging_steps", "save_every": "checkpointing_steps",
    "sample_every": "validation_steps", "keep_states": "checkpoints_total_limit",
}  # fmt: skip


def loop_config(config: LoRAConfig) -> LoopConfig:
    """What of a settled configuration the loop is told; for what is open still, and its own, it has defaults."""
    named = {field.name: LOOPS_NAMES.get(field.name, field.name) for field in fields(LoopConfig)}
    told = {ours: getattr(config, theirs, None) for ours, theirs in named.items()}
    return LoopConfig(**{name: value for name, value in told.items() if value is not None} | {"sample_first": True})


def trainee_of(config: LoRAConfig, c: Components, start: Adapter | None = None) -> tuple[Trainee, list[Group]]:
    """What a run trains, fresh or from an adapter, and its learning rates."""
    torch.manual_seed(config.seed)
    words = None
    if config.placeholder_token:
        words = Words.for_model(c, config.placeholder_token, config.initializer_token, config.num_vectors)
    lora = fresh(config, adapted(config, c)) if config.rank else None
    if start is not None:
        lora = LoRA.from_adapter(start, c.networks)
    groups = []
    rate = config.learning_rate or 0.0
    text_rate = rate if config.text_encoder_lr is None else config.text_encoder_lr
    for begins, own in (("unet.", rate), ("text_encoder", text_rate)):
        found = [p for address, layer in (lora.items() if lora else ()) if address.startswith(begins)
                 for p in layer.parameters()]  # fmt: skip
        groups += [Group(found, own)] if found else []
    groups += [Group(list(words.parameters()), config.token_lr, decays=False)] if words is not None else []
    return Trainee(lora, words), groups


def read_for(c: Components, path: Path) -> Adapter:
    """An adapter's file for this model. ModelError: it is none, is damaged, or is for another model."""
    book = book_of(c.networks)
    return fit(read_adapter(path, book), book.modules, title(c)).adapter


def stage_of(run: Run, batches: LoRABatches, trainee: Trainee, groups: Sequence[Group]) -> Stage:
    """The loop's view of a run."""
    config, c = run.config, run.components
    objective = LoRADiffusion(config, c, trainee)
    fixed = batches.held_out()
    prompts = config.validation_prompt or tuple(dict.fromkeys(p.caption for p in run.material.pictures))[:SHOWN]
    device = next(c.unet.parameters()).device

    @torch.no_grad()
    def held_out(averaged: nn.Module) -> dict[str, float]:
        with trainee.as_in(averaged):
            losses = [objective.losses(moved(batch, device)) for batch in fixed]  # type: ignore[arg-type]
        return {"loss": float(torch.cat(losses).mean())}

    def picture(averaged: nn.Module) -> Image.Image:
        with trainee.as_in(averaged):
            drawn = Pipeline(c)(prompts, seed=config.seed, clip_skip=config.clip_skip + 1).images
        assert isinstance(drawn, list)
        return contact_sheet(drawn, list(prompts), len(prompts), SAMPLE_SIDE)

    def export(averaged: nn.Module, folder: Path) -> None:
        assert isinstance(averaged, Trainee)
        adapter, embedding = run.result
        if averaged.lora is not None and adapter is not None:
            write_adapter(
                averaged.lora.adapter(), adapter, book_of(c.networks), config.output_format,
                architecture=architecture(c), metadata=facts(run),
            )  # fmt: skip
        if averaged.words is not None and embedding is not None:
            embedding.parent.mkdir(exist_ok=True)
            write_embedding(averaged.words.embedding(), embedding)
        write_card(run, folder)

    texts = trainee.lora is not None and any(address.startswith("text_encoder") for address, _ in trainee.lora.items())
    spare = texts and (config.clip_skip > 0 or c.is_xl or not config.train_text_encoder)
    return Stage(objective, trainee, batches, held_out, picture, export, groups, spare, config.fsdp)


def facts(run: Run) -> dict[str, str]:
    """kohya's metadata of a training run, which UIs show."""
    config, found = run.config, run.material
    tags: dict[str, int] = {}
    for picture in found.pictures:
        for tag in filter(None, (part.strip() for part in picture.caption.split(","))):
            tags[tag] = tags.get(tag, 0) + 1
    told = {
        "ss_output_name": config.output_name, "ss_sd_model_name": run.components.name,
        "ss_resolution": f"({config.resolution}, {config.resolution})", "ss_num_train_images": len(found.pictures),
        "ss_num_reg_images": len(found.class_pictures), "ss_steps": config.max_train_steps,
        "ss_learning_rate": config.learning_rate, "ss_unet_lr": config.learning_rate,
        "ss_text_encoder_lr": config.text_encoder_lr, "ss_lr_scheduler": config.lr_scheduler,
        "ss_lr_warmup_steps": config.lr_warmup_steps, "ss_optimizer": config.optimizer, "ss_seed": config.seed,
        "ss_clip_skip": config.clip_skip, "ss_min_snr_gamma": config.snr_gamma,
        "ss_noise_offset": config.noise_offset, "ss_mixed_precision": config.mixed_precision,
        "ss_batch_size_per_device": config.train_batch_size,
        "ss_gradient_accumulation_steps": config.gradient_accumulation_steps,
        "ss_training_finished_at": f"{time.time():.0f}", "ss_tag_frequency": json.dumps({config.output_name: tags}),
    }  # fmt: skip
    return {name: str(value) for name, value in told.items()}


def known_by(run: Run, base: str) -> dict[str, Any]:
    """What must be equal for a run to go on: what it trains on what, and how; the paths may differ."""
    told = {name: value for name, value in asdict(run.config).items() if name not in FREE}
    if run.config.lr_scheduler in UNBOUND:
        del told["max_train_steps"]
    lists = {name: list(value) if isinstance(value, tuple) else value for name, value in told.items()}
    return lists | {"base": base, "manifest": {key: list(entry) for key, entry in run.material.manifest.items()}}


def steps(run: Run) -> Iterator[Progress]:
    """Train, from the newest state in the output folder or from nothing: class pictures that are missing are drawn,
    latents and texts encoded, and then a Progress comes after every step. The adapter, the learned word, pictures, the
    log and README.md lie in the output folder when it ends.
    """
    config, c = run.config, run.components
    folder = Path(config.output_dir)
    state = joined(device_of(config.device, config.threads))
    if state.is_main_process:
        folder.mkdir(parents=True, exist_ok=True)
    if config.resume_from_checkpoint == "no" and state.is_main_process:
        forget(folder)
        (folder / LOG).unlink(missing_ok=True)
        shutil.rmtree(folder / SAMPLES, ignore_errors=True)
    networks = {name: network.requires_grad_(False) for name, network in c.networks.items()}
    with explained(), state.main_process_first():
        for done, of in draw_class(config, Pipeline(c), run.material):
            yield Progress(done, {}, None, preparing="class pictures", of=of)
        run = replace(run, material=with_class(config, run.material))
        batches = LoRABatches(config, c, run.material)
        for done, of in batches.fill():
            yield Progress(done, {}, None, preparing="latents and texts", of=of)
    base = of_networks({name: networks[name] for name in TRAINED_ON if name in networks})
    trainee, groups = trainee_of(config, c, run.start)
    trainee.to(next(c.unet.parameters()).device)
    if config.gradient_checkpointing:
        checkpoint_blocks(networks.values())
    spared = () if config.fsdp else networks.values()  # of shared weights a process has not all
    with explained(), trainee.attached(networks), sparing(spared):
        if config.fsdp:
            shard_frozen((n for name, n in networks.items() if name.startswith(("unet", "text_encoder"))), state.device)
        yield from recorded(stage_of(run, batches, trainee, groups), loop_config(config), known_by(run, base))


def train_lora(data: str | Path | Sequence[str | Path], **options: Any) -> Trained:
    """Teach a model a subject or a style from captioned pictures; `ldm train-lora` in Python.

    data: a folder with captions beside the pictures (.txt, .caption) or in metadata.jsonl or .csv, tar shards, parquet
    files, or a data set of the hub. options: other fields of LoRAConfig. A run that was stopped goes on where it was.
    UsageError, ModelError, LdmError: something that it cannot be done with, in one sentence.

    >>> ldm.train_lora("my-pictures", output_dir="out/mine", max_train_steps=200).adapter
    PosixPath('out/mine/mine.safetensors')
    """
    names = {field.name for field in fields(LoRAConfig)}
    for name in options:
        choose("option of train_lora", name, names)
    given = (data,) if isinstance(data, str | Path) else tuple(data)
    run = opened(LoRAConfig(tuple(map(str, given)), **options))
    stopped = 0
    for progress in steps(run):
        stopped = progress.stopped
    if stopped:  # the state is saved: now the signal does what it is for
        signal.raise_signal(stopped)
    return run.result
