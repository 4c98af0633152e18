"""What a LoRA run may be told. `ldm train-lora`'s options and `ldm.train_lora`'s keywords are the fields of LoRAConfig.

Needs no torch, for help pages are made of it.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ldm.errors import UsageError, choose

if TYPE_CHECKING:
    from ldm.data.captions import CaptionOptions

DATA, ADAPTER, WORDS, LOSS, STEPS, MACHINE, TOLD = (
    "Data", "The adapter", "Learned words", "The loss", "Steps", "The machine", "What is told and kept"
)  # fmt: skip
NAMED: dict[str, Sequence[str]] = {  # fields that take one of a few names
    "policy": ("error", "skip"),
    "loss_type": ("l2", "huber", "smooth_l1"),
    "huber_schedule": ("snr", "exponential", "constant"),
    "prediction_type": ("epsilon", "v_prediction", "sample"),
    "optimizer": ("adamw", "adamw8bit", "prodigy", "sgd"),
    "lr_scheduler": ("constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "polynomial"),
    "mixed_precision": ("no", "bf16", "fp16"),
    "output_format": ("diffusers", "kohya", "peft", "comfy"),
    "report_to": ("none", "tensorboard"),
}
LEAST: dict[str, float] = {  # whole numbers and others that may not be less
    "bucket_step": 1, "resolution": 8, "min_side": 1, "repeats": 1, "num_class_images": 0, "rank": 0, "num_vectors": 1,
    "prior_loss_weight": 0, "noise_offset": 0, "input_perturbation": 0, "learning_rate": 0, "text_encoder_lr": 0,
    "token_lr": 0, "max_train_steps": 1, "num_train_epochs": 1, "train_batch_size": 1, "lr_warmup_steps": 0,
    "gradient_accumulation_steps": 1, "lr_num_cycles": 1, "max_grad_norm": 0, "checkpointing_steps": 1, "seed": 0,
    "checkpoints_total_limit": 1, "validation_steps": 1, "num_held_out": 0, "logging_steps": 1, "min_timestep": 0,
    "dataloader_num_workers": 0, "threads": 0, "max_skipped_steps": 0, "adam_weight_decay": 0, "clip_skip": 0,
    "logit_std": 0,
}  # fmt: skip


def _option(default: Any, panel: str, help: str, *flags: str) -> Any:
    """A field with its one-line description, where help pages show it, and other names of its command-line flag."""
    return field(default=default, metadata={"help": help, "panel": panel, "flags": flags})


@dataclass(frozen=True)
class LoRAConfig:
    """A LoRA run. Names are those of diffusers' training scripts, of captions and buckets kohya's; None leaves a choice
    to the model (see `ldm.training.plan`). UsageError, in one sentence, for a value out of range.
    """

    data: str | tuple[str, ...] = _option(
        (),
        DATA,
        "pictures: a folder, tar shards, parquet files, or owner/name on the hub",
        "train-data-dir",
        "instance-data-dir",
        "dataset-name",
    )
    model: str = _option(
        "", DATA, "folder, file or hub name; absent = the model in the box", "pretrained-model-name-or-path"
    )
    revision: str | None = _option(None, DATA, "of the hub's model: branch, tag or commit")
    variant: str | None = _option(None, DATA, "of the weights files, for example fp16")
    image_column: str = _option("image", DATA, "of metadata or a table: the picture")
    caption_column: str = _option("text", DATA, "of metadata or a table: its caption")
    policy: str = _option(
        "error", DATA, "error = a defect in the data stops the run; skip = such pictures are left out"
    )
    min_side: int | None = _option(None, DATA, "pixels that a side must have; absent = half the resolution")
    resolution: int | None = _option(None, DATA, "a bucket has at most its square of pixels; absent = the model's")
    bucket_step: int | None = _option(
        None, DATA, "sides of buckets are multiples of it; absent = 64, of small models less"
    )
    square: bool = _option(False, DATA, "one bucket, the square, in place of one for each aspect ratio")
    upscale: bool = _option(False, DATA, "enlarge pictures that are smaller than their bucket")
    random_crop: bool = _option(False, DATA, "cut at random, not in the middle")
    random_flip: bool = _option(False, DATA, "mirror half of them")
    repeats: int = _option(1, DATA, "how often each picture comes in an epoch")
    alpha_mask: bool = _option(
        False, DATA, "the loss counts where a picture's own alpha says; masks in files always do"
    )
    cache_dir: str | None = _option(None, DATA, "where latents and text states are kept; absent = OUTPUT_DIR/cache")
    no_cache: bool = _option(False, DATA, "encode pictures and texts anew in every step")
    instance_prompt: str = _option("", DATA, "caption of pictures that have none (DreamBooth: 'a photo of sks dog')")
    shuffle_caption: bool = _option(False, DATA, "the parts between commas in random order")
    keep_tokens: int = _option(0, DATA, "how many parts stay in front where they are shuffled or dropped")
    caption_dropout_rate: float = _option(0.0, DATA, "probability of saying nothing")
    caption_tag_dropout_rate: float = _option(0.0, DATA, "probability of leaving out a part")
    caption_prefix: str = _option("", DATA, "put before every caption")
    caption_suffix: str = _option("", DATA, "put behind every caption")
    class_prompt: str = _option(
        "", DATA, "what the class is called (DreamBooth: 'a photo of a dog'): prior preservation"
    )
    class_data_dir: str | None = _option(
        None, DATA, "pictures of the class; with a prompt, what is missing is drawn; absent = OUTPUT_DIR/class"
    )
    num_class_images: int = _option(100, DATA, "how many there are to be")
    prior_loss_weight: float = _option(1.0, DATA, "how much the class counts beside the subject")

    rank: int = _option(16, ADAPTER, "of the factors; 0 = none: a learned word alone (textual inversion)")
    lora_alpha: float | None = _option(None, ADAPTER, "alpha / rank multiplies the change; absent = the rank")
    targets: tuple[str, ...] = _option(
        (),
        ADAPTER,
        "attention, feed-forward, projections, convolutions, or endings of modules' names; absent = the model's",
    )
    no_unet: bool = _option(False, ADAPTER, "leave the U-Net as it is")
    train_text_encoder: bool = _option(False, ADAPTER, "adapt the text encoders too")
    use_dora: bool = _option(False, ADAPTER, "train magnitudes and directions apart (DoRA)")
    use_rslora: bool = _option(False, ADAPTER, "divide alpha by the root of the rank (rsLoRA)")
    init_adapter: str | None = _option(None, ADAPTER, "a LoRA file to go on from; rank, alpha and targets are its own")

    placeholder_token: str = _option(
        "", WORDS, "a new word that is learned as well (textual inversion, pivotal tuning)", "token"
    )
    initializer_token: str = _option("", WORDS, "the words it begins as; absent = the mean of all words")
    num_vectors: int = _option(1, WORDS, "how many tokens it stands for")
    token_lr: float = _option(5e-3, WORDS, "its learning rate")

    prediction_type: str | None = _option(None, LOSS, "what the network predicts; absent = as the model says")
    snr_gamma: float | None = _option(None, LOSS, "weigh noise levels by min-SNR with this gamma; the paper's is 5")
    noise_offset: float = _option(0.0, LOSS, "how far a channel's noise is shifted as a whole; 0.05 to 0.1 are usual")
    input_perturbation: float = _option(
        0.0, LOSS, "extra noise in what the network sees, not in its target; 0.1 is usual"
    )
    loss_type: str = _option("l2", LOSS, "l2, huber or smooth_l1")
    huber_c: float = _option(0.1, LOSS, "where these two turn from square to straight")
    huber_schedule: str = _option("snr", LOSS, "how that depends on the noise: snr, exponential or constant")
    logit_std: float = _option(
        0.0, LOSS, "noise levels by a normal of this deviation through the sigmoid (logit-normal); 0 = evenly"
    )
    logit_mean: float = _option(0.0, LOSS, "and of this mean: above 0 more of the high levels")
    min_timestep: int = _option(0, LOSS, "levels below it are not trained")
    max_timestep: int | None = _option(None, LOSS, "nor those from it on; absent = all")

    max_train_steps: int | None = _option(
        None, STEPS, "optimiser steps; absent = the model's, or those of the epochs", "steps"
    )
    num_train_epochs: int | None = _option(None, STEPS, "in place of steps: how often all pictures come")
    train_batch_size: int | None = _option(None, STEPS, "pictures at once; absent = the model's", "batch-size")
    gradient_accumulation_steps: int = _option(1, STEPS, "batches a step")
    optimizer: str = _option("adamw", STEPS, "adamw, adamw8bit, prodigy or sgd")
    learning_rate: float | None = _option(None, STEPS, "absent = the model's, or 1 for prodigy", "lr")
    text_encoder_lr: float | None = _option(None, STEPS, "of the text encoders' part; absent = the learning rate")
    lr_scheduler: str | None = _option(
        None,
        STEPS,
        "constant, constant_with_warmup, linear, cosine, cosine_with_restarts, polynomial; absent = the model's",
    )
    lr_warmup_steps: int = _option(0, STEPS, "steps in which the learning rate rises")
    lr_num_cycles: int = _option(1, STEPS, "of cosine_with_restarts")
    lr_power: float = _option(1.0, STEPS, "of polynomial")
    adam_beta1: float = _option(0.9, STEPS, "of AdamW and Prodigy; momentum of SGD")
    adam_beta2: float = _option(0.999, STEPS, "of AdamW and Prodigy")
    adam_weight_decay: float = _option(1e-2, STEPS, "of all optimisers")
    adam_epsilon: float = _option(1e-8, STEPS, "of AdamW and Prodigy")
    max_grad_norm: float = _option(1.0, STEPS, "gradients longer than that are shortened to it; 0 = never")
    ema_decay: float = _option(
        0.0, STEPS, "the result is a running average that forgets so slowly; 0 = the last step itself"
    )
    max_skipped_steps: int = _option(10, STEPS, "steps without a finite loss that are left out before the run stops")
    seed: int = _option(0, STEPS, "all that is random comes from it")

    device: str = _option("auto", MACHINE, "cpu, cuda or auto")
    dtype: str | None = _option(
        None, MACHINE, "of the frozen networks: fp32, bf16 or fp16; absent = fp32 on the CPU, bf16 on CUDA"
    )
    mixed_precision: str | None = _option(None, MACHINE, "no, bf16 or fp16; absent = no on the CPU, bf16 on CUDA")
    gradient_checkpointing: bool = _option(False, MACHINE, "less memory for a quarter more time")
    fsdp: bool = _option(False, MACHINE, "shard the frozen networks over the processes (FSDP2)")
    dataloader_num_workers: int = _option(0, MACHINE, "processes that prepare batches ahead")
    threads: int = _option(0, MACHINE, "CPU threads; 0 = torch's choice")

    output_dir: str = _option("lora", TOLD, "folder of the run: states, pictures, curve, the adapter", "output", "o")
    output_name: str = _option("", TOLD, "of the adapter's file; absent = the folder's name")
    output_format: str = _option("diffusers", TOLD, "diffusers (which all tools read), kohya, peft or comfy")
    checkpointing_steps: int = _option(100, TOLD, "steps between two states that a stopped run goes on from")
    checkpoints_total_limit: int = _option(2, TOLD, "how many of them are kept")
    resume_from_checkpoint: str = _option("latest", TOLD, "latest = go on from the newest; no = begin anew")
    validation_prompt: tuple[str, ...] = _option(
        (), TOLD, "drawn as the run goes on; may be repeated; absent = captions of the data"
    )
    validation_steps: int = _option(100, TOLD, "steps between two rows of pictures, and two held-out losses")
    num_held_out: int | None = _option(
        None, TOLD, "pictures kept for the held-out loss; absent = a tenth of 20 or more, 16 at most"
    )
    logging_steps: int = _option(10, TOLD, "steps between two lines of log.jsonl")
    report_to: str = _option("none", TOLD, "tensorboard = also write its event files")
    clip_skip: int = _option(0, TOLD, "layers of the text encoder left out (diffusers' numbering)")

    def __post_init__(self) -> None:
        for name, known in NAMED.items():
            if (value := getattr(self, name)) is not None:
                choose(name, value, known)
        for name, least in LEAST.items():
            if (value := getattr(self, name)) is not None and not least <= value < math.inf:
                raise UsageError(f"{name} is {value}; it must be at least {least}, and finite")
        if not self.data:
            raise UsageError("no pictures to train on; name their folder with --data")
        if self.rank == 0 and not self.placeholder_token:
            raise UsageError("a rank of 0 trains no adapter; give at least 1, or a --placeholder-token to learn alone")
        if self.no_unet and self.rank and not self.train_text_encoder:
            raise UsageError("--no-unet leaves nothing to adapt; add --train-text-encoder, or take it away")
        if not 0 <= self.ema_decay < 1:
            raise UsageError(f"ema_decay is {self.ema_decay}; it must be at least 0 and below 1")
        if self.resume_from_checkpoint not in ("latest", "no"):
            raise UsageError(f"resume_from_checkpoint is {self.resume_from_checkpoint!r}; it is latest or no")
        _ = self.captions  # refuses what it cannot be

    @property
    def captions(self) -> "CaptionOptions":
        """How captions vary."""
        from ldm.data.captions import CaptionOptions  # which needs numpy

        return CaptionOptions(
            self.shuffle_caption, self.keep_tokens, self.caption_dropout_rate, self.caption_tag_dropout_rate,
            self.caption_prefix, self.caption_suffix,
        )  # fmt: skip

    @property
    def has_class(self) -> bool:
        """Whether class pictures take every other batch."""
        return bool(self.class_prompt or self.class_data_dir)

    @property
    def trains_text(self) -> bool:
        """Whether text states change as the run goes on, so that they cannot be kept."""
        return self.train_text_encoder or bool(self.placeholder_token)
