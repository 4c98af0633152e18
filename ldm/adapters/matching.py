"""An adapter against a model: whether it fits, for which family it is, and what it does to every layer."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import nn

from ldm.adapters import kinds
from ldm.adapters.adapter import Adapter, Layer
from ldm.adapters.names import Book, Modules, book_of_family, dialect_of
from ldm.adapters.reading import Loose, Read
from ldm.checkpoints.families import FAMILIES
from ldm.errors import ModelError

FAMILY_ORDER = ("sd1", "sd2", "sdxl", "sdxl-refiner", "x4-upscaler")
"""Of FAMILIES, the likeliest first: adapters of text encoders alone fit more than one."""
CROSS_ATTENTION = "attn2.to_k"  # its input is the width of the text, which tells the families apart
SIDES = ("out", "in")  # what the first two axes of a weight count
NEED_BASE = ("ia3", "glora", "oft")  # kinds whose change is one of the weights themselves
NAMED = 3  # how many layers an error names


class Fit(NamedTuple):
    """What of an adapter is for a model. left: the rest, tensors or addresses -> why not."""

    adapter: Adapter
    left: Mapping[str, str]


class Row(NamedTuple):
    """One layer of an adapter.

    name: its address; where it has none in the model (not matched), the module's name in the file. rank, alpha: None
    where it has none. norm: Frobenius norm of the change at strength 1, relative: that by the norm of the model's
    weight; None where that weight is needed and not there.
    """

    name: str
    kind: str
    rank: int | None
    alpha: float | None
    matched: bool
    norm: float | None
    relative: float | None


def fit(read: Read, modules: Modules, title: str, partial: bool = False) -> Fit:
    """The part of an adapter that is for a model: all of it, unless `partial` allows less.

    title: what an error calls the model. ModelError: the adapter is of another family, nothing of it is for the model,
    or, without `partial`, not all of it.
    """
    adapter, name = read.adapter, read.adapter.name
    fitting = {
        address: layer
        for address, layer in adapter.layers.items()
        if address in modules and kinds.fits(layer, modules[address])
    }
    wrong = {address: layer for address, layer in adapter.layers.items() if address not in fitting}
    shapes = {address: f"of shape {_shape(layer)}, not {modules.get(address)}" for address, layer in wrong.items()}
    left = {**read.unmatched, **shapes}
    if 2 * len(fitting) < len(read.loose.layers) or any(address.endswith(CROSS_ATTENTION) for address in wrong):
        family, count = _best(read.loose, {})
        if count > len(fitting):
            raise ModelError(_other_family(name, family, title, wrong, modules, left))
    if not fitting:
        raise ModelError(f"{name} is for another model than {title}, nothing in it fits: {_some(left)}; take its model")
    if left and not partial:
        counts = f"{len(left)} of its tensors and layers do not"
        raise ModelError(
            f"{name} fits {title} only in part, {counts}: {_some(left)}; allow a partial adapter for the rest"
        )
    return Fit(replace(adapter, layers=fitting), left)


def _shape(layer: Layer) -> tuple[int | str, ...]:
    return tuple("?" if side is None else side for side in kinds.shape(layer))


def _some(left: Mapping[str, str]) -> str:
    rows = [f"{name} ({why})" for name, why in list(left.items())[:NAMED]]
    return ", ".join(rows) + (f" and {len(left) - NAMED} more" if len(left) > NAMED else "")


def _other_family(
    name: str, family: str, title: str, wrong: Mapping[str, Layer], modules: Modules, left: Mapping[str, str]
) -> str:
    """Says by one layer that an adapter is for other models: the keys of a cross-attention where there are any."""
    proofs = sorted(_proofs(wrong, modules), key=lambda proof: CROSS_ATTENTION not in proof[0])
    if not proofs:
        return f"{name} is for {family}, the model is {title}, which lacks {_some(left)}; take an adapter for {title}"
    address, side, theirs, ours = proofs[0]
    leaf = address.rpartition(".")[2]
    said = f"{name} is for {family} ({leaf} {side} = {theirs}), the model is {title} ({ours})"
    return f"{said}; take an adapter for {title}"


def _proofs(wrong: Mapping[str, Layer], modules: Modules) -> Iterator[tuple[str, str, int, int]]:
    """Address, side, its length in the adapter and in the model, of the layers that have another."""
    for address, layer in wrong.items():
        told, weight = kinds.shape(layer), modules.get(address, ())
        if len(told) == 2 < len(weight):
            weight = (weight[0], math.prod(weight[1:]))
        for side, theirs, ours in list(zip(SIDES, told, weight, strict=False))[::-1]:
            if theirs is not None and theirs != ours:
                yield address, side, theirs, ours
                break


def family_of(loose: Loose, others: Mapping[str, Book] | None = None) -> str | None:
    """What models an adapter is for: the title of one of FAMILIES, or a name of `others`, whichever most of its layers
    fit by name and shape; None: none fits any.
    """
    title, count = _best(loose, others or {})
    return title if count else None


def _best(loose: Loose, others: Mapping[str, Book]) -> tuple[str, int]:
    """That family, and how many layers fit it. Of equals, the one in whose dialect of kohya's the names are."""
    books = {FAMILIES[key].title: book_of_family(key) for key in FAMILY_ORDER} | dict(others)
    scores = {title: _score(loose, book) for title, book in books.items()}
    title = max(scores, key=lambda title: scores[title])
    return title, scores[title][0]


def _score(loose: Loose, book: Book) -> tuple[int, bool]:
    known = [
        (name.module, address)
        for name, layer in loose.layers.items()
        if (address := book.address(name.module, name.network)) and kinds.fits(layer, book.modules[address])
    ]
    return len(known), dialect_of(known, book) == book.kohya


def report(read: Read, networks: Mapping[str, nn.Module] | None = None) -> list[Row]:
    """What an adapter does to every layer, those that match nothing last. networks: the model, as in Components."""
    rows = []
    for address, layer in read.adapter.layers.items():
        network, _, path = address.partition(".")
        weight = networks[network].get_submodule(path).weight if networks else None
        assert weight is None or isinstance(weight, torch.Tensor)
        known = weight is not None and kinds.fits(layer, weight.shape)
        norm = _norm(layer, weight if known else None)
        size = float(torch.linalg.vector_norm(weight.detach().float())) if weight is not None and known else 0.0
        relative = norm / size if norm is not None and size else None
        rows.append(Row(address, layer.kind, kinds.rank(layer), layer.alpha, networks is None or known, norm, relative))
    for name, layer in read.loose.layers.items():
        if any(tensor in read.unmatched for tensor in read.loose.tensors[name]):
            norm = _norm(layer, None)
            rows.append(Row(name.module, layer.kind, kinds.rank(layer), layer.alpha, False, norm, None))
    return rows


def _norm(layer: Layer, weight: torch.Tensor | None) -> float | None:
    """Frobenius norm of the change at strength 1. Of a product, |U D|^2 = <U^T U, D D^T>: [r, r] in place of [O, I]."""
    if pair := kinds.factors(layer):
        up, down = (factor.double() for factor in pair)
        return math.sqrt(max(0.0, float(((up.mT @ up) * (down @ down.mT)).sum())))
    if weight is None:
        shape = kinds.shape(layer)
        if layer.kind in NEED_BASE or "dora_scale" in layer.tensors or None in shape:
            return None
        weight = torch.zeros([side for side in shape if side is not None])
    return float(torch.linalg.vector_norm(kinds.delta(layer, weight)))
