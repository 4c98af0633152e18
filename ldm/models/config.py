"""Reading a diffusers / transformers `config.json` dict without ever dropping a field that changes the computation."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import fields
from typing import TYPE_CHECKING, Any, TypeVar, cast

from ldm.errors import ModelError

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

LARGEST, MOST_LAYERS, MOST_LEVELS = 1 << 18, 100, 8
"""Of any network that can be opened: a width or vocabulary, repetitions of a block, and entries of a list."""
LAYERS = ("layers_per_block", "num_hidden_layers", "num_layers", "transformer_layers_per_block", "num_encoder_blocks",
          "num_decoder_blocks")  # fmt: skip

T = TypeVar("T", bound="int | float | str | tuple[int, ...] | tuple[str, ...]")


def take(kind: str, config: Mapping[str, object], name: str, default: T) -> T:
    """`config[name]` in the type of `default` (absent or None: `default`).

    Lists become tuples; an int may stand for a float. ModelError when the value is of another type.
    kind: the noun for the message ("VAE config").
    """
    value = config.get(name)
    value = default if value is None else tuple(value) if isinstance(value, list) else value
    if isinstance(default, float) and type(value) is int:
        value = float(value)
    fits = type(value) is type(default)
    if fits and isinstance(value, tuple) and isinstance(default, tuple):
        fits = {type(item) for item in value} == {type(item) for item in default}
    if not fits or (isinstance(value, float) and not math.isfinite(value)):
        raise ModelError(f"{kind}: {name} = {_brief(value)}; expected a value like {default!r}; correct config.json")
    numbers = [item for item in (value if isinstance(value, tuple) else (value,)) if type(item) is int]
    most = MOST_LAYERS if name in LAYERS else LARGEST
    if any(not 0 <= number <= most for number in numbers) or len(numbers) > MOST_LEVELS:
        raise ModelError(
            f"{kind}: {name} = {_brief(value)}; it must be from 0 to {most:,}, for at most {MOST_LEVELS} levels; "
            "correct config.json"
        )
    return cast("T", value)


def _brief(value: object) -> str:
    """A foreign value as an error may show it."""
    try:
        text = ascii(value)
    except (RecursionError, ValueError):  # the latter of numbers with thousands of digits
        text = f"a {type(value).__name__}"
    return text if len(text) <= 80 else f"{text[:80]} ..."


def take_all(
    kind: str, config: Mapping[str, object], defaults: DataclassInstance, absent: Mapping[str, object]
) -> dict[str, Any]:
    """`take` for every field of the config dataclass `defaults`.

    absent: what the other library takes for fields that `config` lacks, where that differs from `defaults`.
    """
    given = {**absent, **{name: value for name, value in config.items() if value is not None}}
    return {field.name: take(kind, given, field.name, getattr(defaults, field.name)) for field in fields(defaults)}


def spread(config: Mapping[str, object], name: str, default: int, levels: int) -> object:
    """A field that diffusers lets be one number for all levels: that number once a level; anything else as it is."""
    value = config.get(name)
    value = default if value is None else value
    return (value,) * levels if isinstance(value, int) else value


def refuse_unmodelled(
    kind: str, config: Mapping[str, object], fixed: Mapping[str, tuple[object, ...]], known: frozenset[str]
) -> None:
    """ModelError for the first field that would change the computation in a way we do not compute.

    fixed: field -> the values under which our computation is the right one. known: fields that the caller reads, or
    that change nothing. Any other field is accepted only while it is switched off (None or False).
    """
    for name, value in config.items():
        plain = tuple(value) if isinstance(value, list) else value
        ignored = name not in fixed and (name in known or name.startswith("_"))
        allowed = fixed.get(name, (None, False))
        if ignored or plain in allowed:
            continue
        options = " or ".join(repr(option) for option in allowed)
        shown = (name if name.isprintable() else ascii(name))[:80]
        raise ModelError(f"{kind}: {shown} = {_brief(value)} is not supported, only {options}; take another model")


def as_json(config: DataclassInstance) -> dict[str, object]:
    """The fields of a config dataclass as json holds them."""
    return {name: list(value) if isinstance(value, tuple) else value for name, value in vars(config).items()}


def same_length(kind: str, config: DataclassInstance, *names: str) -> None:
    """ModelError unless the fields `names` all have one entry a level."""
    counts = {name: len(getattr(config, name)) for name in names}
    if len(set(counts.values())) > 1:
        said = ", ".join(f"{name} has {count}" for name, count in counts.items())
        raise ModelError(f"{kind}: {said}; give each one entry a level")


def divisible(kind: str, widths: tuple[int, ...], by: tuple[int, ...], what: str) -> None:
    """ModelError unless every channel width is a multiple of its entry of `by` (`what` names it)."""
    for width, part in zip(widths, by, strict=True):
        if width < 1 or part < 1 or width % part:
            raise ModelError(f"{kind}: {width} channels do not divide into {part} {what}; choose a multiple")
