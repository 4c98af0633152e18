"""The data of a LoRA run: pictures found, checked, captioned, held out and sorted into buckets; class pictures drawn.

What a step makes of them is `ldm.training.lora_batches`.
"""

import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from itertools import count
from pathlib import Path

from PIL import Image

from ldm.checkpoints.components import Components
from ldm.checkpoints.safe import atomic_text
from ldm.conditioning import AnyEncoder, encoder_of, layers_left_out
from ldm.data.buckets import Bucketing, Buckets, Size, assign
from ldm.data.captions import spoken
from ldm.data.check import Report, accepted
from ldm.data.order import dice, shuffled
from ldm.data.pictures import Digest, Picture, manifest
from ldm.data.sources import Found, find, is_image, walked
from ldm.errors import LdmError, UsageError
from ldm.images import save
from ldm.inputs import turned
from ldm.pipeline import Pipeline
from ldm.request import Request
from ldm.training.lora_config import LoRAConfig

SHOWN = 10  # defects and unread words that the summary names
FEW = 20  # pictures below which none is held out, unless a number is given
MOST_HELD_OUT = 16
CLASS_KEYS = "class//"  # before the keys of class pictures, where they stand beside others; no path has it
CLASS_TOLD = "class pictures: "  # so their part of the summary begins
MOST_DARK = 100  # class pictures that a safety checker may black out before the run stops


@dataclass(frozen=True)
class Material:
    """The data of a run, found and sorted; nothing of it is in memory.

    held_out: never trained on; it may be empty. manifest, sizes: of all pictures, by their keys (class pictures:
    CLASS_KEYS before them); a run whose manifest changed must not go on (`ldm.data.pictures.difference` says why).
    summary: sentences that the user is to read. buckets, class_buckets: of `pictures` and `class_pictures`, by index.
    missing: class pictures that are still to be drawn.
    """

    pictures: tuple[Picture, ...]
    held_out: tuple[Picture, ...]
    class_pictures: tuple[Picture, ...]
    buckets: Buckets
    manifest: dict[str, Digest]
    summary: tuple[str, ...]
    sizes: dict[str, Size] = field(default_factory=dict)
    class_buckets: Buckets | None = None
    missing: int = 0


def material(config: LoRAConfig, components: Components) -> Material:
    """Find the pictures of a settled configuration, look at each of them, and sort them. Nothing is written or drawn.

    UsageError: no pictures, none with a caption and no instance_prompt, or an option that the model or the data cannot
    have. LdmError: defects in the data, under the policy "error"; or no picture without one.
    """
    encoder = encoder_of(components)
    _refuse(config, components, encoder)
    found, usable, report = _usable(config, config.data, config.instance_prompt)
    if not all(picture.caption for picture in usable):
        raise UsageError(
            f"{_counted(len(usable), 'picture')} and no caption; put what each shows into a .txt file of its name, or "
            "say what all of them show with --instance-prompt, for example 'a photo of sks dog'"
        )
    held = _held_out(config, len(usable))
    pictures = tuple(picture for i, picture in enumerate(usable) if i not in held)
    sizes = dict(zip((picture.key for picture in usable), _measured(usable), strict=True))
    buckets = assign((sizes[picture.key] for picture in pictures), bucketing(config))
    own = Material(
        pictures,
        tuple(usable[i] for i in sorted(held)),
        (),
        buckets,
        manifest(usable),
        (f"{found.summary}, {buckets}", *_told(config, found, usable, report, len(held), encoder)),
        sizes,
    )
    return with_class(config, own)


def with_class(config: LoRAConfig, material: Material) -> Material:
    """The material with the class pictures that lie in their folder now, with what `missing` of them; unchanged without
    a class. Theirs is the class_prompt where no caption lies beside them. Errors as of `material`.
    """
    if not config.class_data_dir:
        return material
    folder, pictures, lines = Path(config.class_data_dir), tuple[Picture, ...](), [f"none in {config.class_data_dir}"]
    if folder.is_dir() and any(map(is_image, walked(folder).parts)):
        found, pictures, report = _usable(config, folder, config.class_prompt)
        lines = [found.summary, *_left_out(report)]
    missing = max(0, config.num_class_images - len(pictures)) if config.class_prompt else 0
    if not pictures and not missing:
        raise UsageError(
            f"there are no class pictures in {folder}, and none are to be drawn; put some there, give a --class-prompt "
            "and at least 1 as --num-class-images, or leave --class-data-dir out"
        )
    keys, sizes = [CLASS_KEYS + picture.key for picture in pictures], _measured(pictures)
    buckets = assign(sizes, bucketing(config)) if pictures else None
    lines += [str(buckets)] * bool(buckets) + [f"{missing} still to be drawn"] * bool(missing)
    known = dict(zip(keys, manifest(pictures).values(), strict=True))
    return replace(
        material,
        class_pictures=pictures,
        class_buckets=buckets,
        manifest={k: v for k, v in material.manifest.items() if not k.startswith(CLASS_KEYS)} | known,
        sizes=material.sizes | dict(zip(keys, sizes, strict=True)),
        summary=(*(line for line in material.summary if not line.startswith(CLASS_TOLD)),
                 CLASS_TOLD + "; ".join(lines)),
        missing=missing,
    )  # fmt: skip


def draw_class(config: LoRAConfig, pipeline: Pipeline, material: Material) -> Iterator[tuple[int, int]]:
    """Draw the class pictures that are missing now (Ruiz et al. 2022, sec. 3.2), and yield how many are done, of how
    many. `with_class` then has them.

    Picture n is class-0000n.png, its prompt beside it, in the square of the resolution, from the seed n above the
    run's; so a run that was stopped goes on with what is missing. One that the model's safety checker flags is left
    out. LdmError: they cannot be written, or all are flagged.
    """
    assert config.resolution and config.bucket_step
    missing, done, dark = with_class(config, material).missing, 0, 0
    if not missing:
        return
    folder, side = Path(config.class_data_dir or ""), config.resolution // config.bucket_step * config.bucket_step
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise LdmError(f"cannot write to {folder}: {error.strerror or error}; give another --class-data-dir") from error
    for number in count(1):
        path = folder / f"class-{number:05}.png"
        if path.exists():
            continue
        order = Request(
            config.class_prompt, seed=config.seed + number, height=side, width=side, literal=True,
            clip_skip=config.clip_skip + 1,
        )  # fmt: skip
        drawn = pipeline(order)
        if any(drawn.flagged):
            dark += 1
            if dark > MOST_DARK:
                raise LdmError(
                    f"the model's safety checker flagged {dark} pictures of {config.class_prompt!r}; put pictures of "
                    f"the class into {folder}, or change --class-prompt"
                )
            continue
        assert isinstance(drawn.images, list)
        atomic_text(path.with_suffix(".txt"), config.class_prompt + "\n")  # first, for without a picture it is nothing
        save(drawn.images[0], path)
        done += 1
        yield done, missing
        if done == missing:
            return


def bucketing(config: LoRAConfig) -> Bucketing:
    """The buckets that a settled configuration asks for."""
    assert config.resolution and config.bucket_step
    side = config.resolution if config.square else None
    return Bucketing(config.resolution, config.bucket_step, side, side, config.upscale)


def whole(config: LoRAConfig, caption: str) -> str:
    """A caption as it is said where nothing of it is left to chance: prefix, caption, suffix."""
    still = replace(config.captions, shuffle_caption=False, caption_dropout_rate=0.0, caption_tag_dropout_rate=0.0)
    return spoken(caption, still, dice(0, 0, 0, "caption"))


def _refuse(config: LoRAConfig, c: Components, encoder: AnyEncoder) -> None:
    """UsageError for what the model or the folders do not allow."""
    layers_left_out(encoder, config.clip_skip, "diffusers")
    total, factor = c.scheduler_config.get("num_train_timesteps", 1000), c.vae.config.factor
    assert config.max_timestep is not None and config.bucket_step
    if not config.min_timestep < config.max_timestep <= total:
        raise UsageError(
            f"levels from {config.min_timestep} up to {config.max_timestep} are to be trained; the first must be below "
            f"the second, and that at most {total}"
        )
    if config.bucket_step % factor:
        raise UsageError(
            f"bucket_step is {config.bucket_step}; it must be a multiple of {factor}, the pixels of a latent's side"
        )
    for source in [config.data] if isinstance(config.data, str) else config.data:
        place = Path(source).expanduser().resolve()
        for name in ("output_dir", "class_data_dir"):
            inner = getattr(config, name)
            if inner and place.is_dir() and Path(inner).resolve().is_relative_to(place):
                raise UsageError(
                    f"{name} is {inner}, within the pictures' folder {source}: what is drawn there would be trained "
                    "on; give a folder outside"
                )


def _usable(
    config: LoRAConfig, source: str | Path | Sequence[str], prompt: str
) -> tuple[Found, tuple[Picture, ...], Report]:
    """What is found, and the pictures that may be used; `prompt`, if there is one, is the caption of those without."""
    found = find(
        source,
        image_column=config.image_column,
        caption_column=config.caption_column,
        alpha_masks=config.alpha_mask,
    )
    if prompt:
        missing = [finding for finding in found.findings if finding.kind == "caption-missing"]
        found = replace(found, findings=tuple(finding for finding in found.findings if finding not in missing))
    # a side below the step has no bucket, unless pictures are enlarged
    least = max(config.min_side or 1, 1 if config.upscale else config.bucket_step or 1)
    usable, report = accepted(found, config.policy, least)
    return found, tuple(replace(picture, caption=picture.caption or prompt) for picture in usable), report


def _held_out(config: LoRAConfig, total: int) -> set[int]:
    """Which of the pictures are held out: the seed decides, and at least one is left."""
    default = min(MOST_HELD_OUT, total // 10) if total >= FEW else 0
    number = min(default if config.num_held_out is None else config.num_held_out, total - 1)
    return set(map(int, shuffled(total, config.seed, 0, 1, "turns")[:number]))  # index 0 are the epochs' turns


def _measured(pictures: Sequence[Picture]) -> list[Size]:
    """The size of each picture as it is trained on."""
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        return [Size(*size) for size in pool.map(_size, pictures)]


def _size(picture: Picture) -> tuple[int, int]:
    image: Image.Image = turned(picture.frame())
    return image.size


# -- what is told -----------------------------------------------------------------------------------------------------


def _told(
    config: LoRAConfig, found: Found, usable: Sequence[Picture], report: Report, held: int, encoder: AnyEncoder
) -> Iterator[str]:
    """The summary behind its first sentence."""
    yield from _left_out(report)
    silent = {picture.key for picture in found.pictures if not picture.caption}
    if said := sum(picture.key in silent for picture in usable):
        yield f"{_counted(said, 'picture')} without a caption: said to show {config.instance_prompt!r}"
    if len(usable) == 1:
        yield "there is one picture: what comes out may be little else than that picture; several show what is meant"
    if held:
        yield f"{_counted(held, 'picture')} held out: never trained on, the held-out loss is of them"
    else:
        yield "no picture is held out: the held-out loss is of pictures that are trained on, at fixed noise"
    if held < (config.num_held_out or 0):
        yield f"{config.num_held_out} were to be held out, and one at least must be left to train on"
    yield from _unread(config, usable, encoder)
    if config.random_crop and not config.no_cache:
        yield "pictures are encoded anew in every step, for their cuts are random"
    if config.captions.by_tags and not (config.no_cache or config.trains_text):
        yield "captions are encoded anew in every step, for their parts move or go"
    notes = Counter(finding.kind for finding in report.findings) - Counter(finding.kind for finding in report.defects)
    if notes:
        listed = ", ".join(f"{kind} ({number})" for kind, number in sorted(notes.items()))
        yield f"noticed besides: {listed}; see: ldm data check"


def _left_out(report: Report) -> Iterator[str]:
    """What the policy "skip" left out."""
    yield from _shortened(f"left out: {finding.path}: {finding.reason}" for finding in report.defects)


def _unread(config: LoRAConfig, pictures: Iterable[Picture], encoder: AnyEncoder) -> Iterator[str]:
    """What of captions is beyond the text encoder's window."""
    named = {whole(config, picture.caption): picture.where for picture in reversed([*pictures])}
    lost = zip(named.values(), encoder.dropped(list(named)), strict=True)
    yield from _shortened(
        f"the caption of {where} is longer than the text encoder's {encoder.room} tokens; not read: "
        f"{' '.join(words)[:300]!r}"
        for where, words in sorted(lost)
        if words
    )


def _shortened(lines: Iterable[str]) -> Iterator[str]:
    several = list(lines)
    yield from several[:SHOWN]
    if len(several) > SHOWN:
        yield f"and {len(several) - SHOWN} more of this kind; see: ldm data check"


def _counted(number: int, what: str) -> str:
    return f"{number} {what}{'s' * (number != 1)}"
