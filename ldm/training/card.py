"""README.md of a trained adapter: what it is, how it is used, how it came about; as the hub reads it (a model card)."""

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from huggingface_hub import ModelCardData

from ldm.checkpoints.safe import atomic_text
from ldm.checkpoints.single_file import known_family
from ldm.sources import THE_BOX
from ldm.training.plan import Run
from ldm.training.record import rows_of

TAGS = ("text-to-image", "diffusers", "lora", "diffusers-training")  # as diffusers' scripts write
FEW = 4  # sample pictures that are shown
LONGEST = 200  # characters of a caption
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+", re.ASCII)
READ_BY_DIFFUSERS = ("diffusers", "kohya")  # of output_format


class Names(NamedTuple):
    """What the card calls things. base: the model as a command takes it, "" for the one in the box. shown: sample
    pictures, from the card's folder.
    """

    base: str
    adapter: str
    embedding: str
    word: str
    prompt: str
    shown: list[str]


def write_card(run: Run, folder: Path) -> None:
    """Writes README.md into the folder of a run that has ended, whole or not at all. It tells no path of this machine.

    The licence is left open: it depends on the pictures. LdmError: the file cannot be written.
    """
    names = names_of(run, folder)
    head = header(run, names).to_yaml()
    body = "\n\n".join(section for section in (*use(run, names), *training(run, folder)) if section)
    atomic_text(folder / "README.md", f"---\n{head}\n---\n\n# {plain(run.config.output_name)}\n\n{body}\n")


def names_of(run: Run, folder: Path) -> Names:
    """What the card calls things."""
    c, made = run.config, run.result
    name = sound(run.components.name)
    base = "" if name == THE_BOX else name if HUB_ID.fullmatch(name) else f"path/to/{name}"
    pictures = sorted((folder / "samples").glob("*.png"))[-FEW:]
    prompt = (*c.validation_prompt, c.instance_prompt, run.material.pictures[0].caption)
    said = next(filter(None, (sound(text)[:LONGEST] for text in prompt)), "")
    word = sound(c.placeholder_token)
    return Names(
        base,
        made.adapter.name if made.adapter else "",
        made.embedding.relative_to(folder).as_posix() if made.embedding else "",
        word,
        said if word in said else f"{word}, {said}",
        [f"samples/{path.name}" for path in pictures],
    )


def header(run: Run, names: Names) -> ModelCardData:
    """The fields by which the hub finds and shows it."""
    trigger = run.config.placeholder_token or run.config.instance_prompt
    tags = [tag for tag in TAGS if tag != "lora" or names.adapter]
    return ModelCardData(
        base_model=names.base if HUB_ID.fullmatch(names.base) else None,
        library_name="diffusers",
        pipeline_tag="text-to-image",
        tags=[*tags, *(["textual_inversion"] if names.embedding else [])],
        widget=[{"text": names.prompt, "output": {"url": path}} for path in names.shown[-1:]],
        instance_prompt=sound(trigger) or None,
    )


def use(run: Run, names: Names) -> Iterator[str]:
    """How it is used: with ldm, with diffusers, in web UIs."""
    made = " and ".join(["a LoRA adapter"] * bool(names.adapter) + ["a learned word"] * bool(names.embedding))
    yield f"This is {made} for {plain(run.components.name)}, trained with `ldm train-lora`."
    yield from (f"![{plain(names.prompt)}]({path})" for path in names.shown[-1:])
    words = ["ldm", "generate", *(["--model", names.base] if names.base else [])]
    words += ["--lora", names.adapter] if names.adapter else []
    words += ["--embedding", names.embedding] if names.embedding else []
    yield "## How to use it"
    yield fenced("sh", shlex.join([*words, names.prompt]))
    if run.config.output_format in READ_BY_DIFFUSERS:
        yield "With diffusers, from the folder that the files are in:"
        yield fenced("python", "\n".join(diffusers_lines(run, names)))
    if known_family(run.components) is not None:
        yield web(names)


def diffusers_lines(run: Run, names: Names) -> Iterator[str]:
    """The same picture with diffusers."""
    yield "from diffusers import DiffusionPipeline"
    two = names.embedding and run.components.is_xl
    if two:
        yield "from safetensors.torch import load_file"
    yield ""
    yield f"pipeline = DiffusionPipeline.from_pretrained({names.base or 'path/to/the-model'!r})"
    if names.adapter:
        yield f'pipeline.load_lora_weights(".", weight_name={names.adapter!r})'
    if two:
        yield f"word = load_file({names.embedding!r})"
        for key, end in (("clip_l", ""), ("clip_g", "_2")):
            parts = f"text_encoder=pipeline.text_encoder{end}, tokenizer=pipeline.tokenizer{end}"
            yield f'pipeline.load_textual_inversion(word["{key}"], token={names.word!r}, {parts})'
    elif names.embedding:
        yield f"pipeline.load_textual_inversion({f'./{names.embedding}'!r}, token={names.word!r})"
    yield f'pipeline({names.prompt!r}).images[0].save("picture.png")'


def web(names: Names) -> str:
    """Where web UIs look for the files."""
    said = []
    if names.adapter:
        tag = f"<lora:{Path(names.adapter).stem}:1>"
        said.append(
            f"A1111, Forge and SD.Next: put {code(names.adapter)} into `models/Lora` and write {code(tag)} into the "
            "prompt. ComfyUI: put it into `models/loras` and load it with *LoraLoader*."
        )
    if names.embedding:
        stem = Path(names.embedding).stem
        said.append(
            f"The word: put {code(names.embedding)} into `embeddings` (ComfyUI: `models/embeddings`) and write "
            f"{code(stem)} (ComfyUI: {code(f'embedding:{stem}')}) into the prompt."
        )
    return "\n\n".join(said)


def training(run: Run, folder: Path) -> Iterator[str]:
    """How it came about."""
    yield "## How it was trained"
    rows = [f"| {name} | {plain(str(value))} |" for name, value in facts(run, folder)]
    yield "\n".join(["| | |", "|---|---|", *rows])
    if (folder / "curve.png").is_file():
        yield "![loss](curve.png)"


def facts(run: Run, folder: Path) -> Iterator[tuple[str, object]]:
    """Names and values of a table."""
    c, found = run.config, run.material
    yield "pictures", f"{len(found.pictures)}, {len(found.held_out)} held out; {found.buckets}"
    if c.has_class:
        yield "class pictures", f"{len(found.class_pictures)}, weight {c.prior_loss_weight:g}"
    if c.rank:
        kind = " (DoRA)" * c.use_dora + " (rsLoRA)" * c.use_rslora
        yield "rank, alpha", f"{c.rank}, {c.lora_alpha:g}{kind}"
        yield "adapted", ", ".join(["unet"] * (not c.no_unet) + ["text encoders"] * c.train_text_encoder)
        yield "modules", ", ".join(c.targets)
    if c.placeholder_token:
        yield "word", f"{c.placeholder_token}, vectors: {c.num_vectors}, learning rate {c.token_lr:g}"
    batch = f"{c.train_batch_size} pictures" + f" x {c.gradient_accumulation_steps}" * (
        c.gradient_accumulation_steps > 1
    )
    yield "steps", f"{c.max_train_steps} of {batch}"
    yield "resolution", c.resolution
    yield "optimizer", f"{c.optimizer}, learning rate {c.learning_rate:g}, {c.lr_scheduler}"
    yield "loss", f"{c.loss_type}, {c.prediction_type}" + (f", min-SNR {c.snr_gamma:g}" if c.snr_gamma else "")
    yield "precision", f"{c.dtype}, mixed: {c.mixed_precision}"
    yield "seed", c.seed
    log = folder / "log.jsonl"
    last = rows_of(log)[-1:] if log.is_file() else []
    names = {"loss": "loss at the end", "held_out_loss": "held-out loss at the end"}
    yield from ((names[key], f"{row[key]:.4g}") for row in last for key in names if key in row)


# -- text that others wrote -------------------------------------------------------------------------------------------


def sound(text: str) -> str:
    """Text that is valid in UTF-8, in one line, without codes that are not shown but obeyed."""
    return " ".join("".join(letter if letter.isprintable() else " " for letter in text).split())


def plain(text: str) -> str:
    """Text that Markdown shows as it is within a line: what could mean something is escaped (CommonMark 2.4, and
    GitHub's links and tables).
    """
    return re.sub(r"([\\`*_{}\[\]<>#|&~$@:]|(?<=www)\.)", r"\\\1", sound(text))


def code(text: str) -> str:
    """A span of code, whatever it holds (CommonMark, 6.1)."""
    ticks = "`" * (1 + max(map(len, re.findall("`+", text)), default=0))
    return f"{ticks} {text} {ticks}" if "`" in text else f"{ticks}{text}{ticks}"


def fenced(language: str, text: str) -> str:
    """A block of code, whatever it holds (CommonMark, 4.5)."""
    ticks = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
    return f"{ticks}{language}\n{text}\n{ticks}"
