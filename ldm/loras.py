"""Adapters into a model: from their files, and as prompts ask for them."""

from pathlib import Path
from typing import Any

from ldm.adapters.matching import fit
from ldm.adapters.names import book_of
from ldm.adapters.reading import read_adapter
from ldm.adapters.strength import Strength
from ldm.adapters.weights import Cast
from ldm.checkpoints.components import Components
from ldm.checkpoints.load import listed
from ldm.checkpoints.single_file import known_family
from ldm.errors import UsageError, choose
from ldm.prompts import asked
from ldm.request import Request

OFF = Strength.of(0)


def load(
    c: Components, path: Path, strength: Strength, name: str | None = None, partial: bool = False, pickles: bool = False
) -> str:
    """Load an adapter from a file or a folder into a model; returns its name, by default the file's without its ending.

    partial: take what fits of one that does not fit as a whole. pickles: also read .pt and .bin, in a guarded process.
    ModelError, and nothing is changed: it is no adapter, is damaged, or is for another model.
    """
    book = book_of(c.networks)
    read = read_adapter(path, book, allow_pickle=pickles)
    found = fit(read, book.modules, title(c), partial)
    called = name or found.adapter.name
    if found.left:
        lost = f"{len(found.left)} tensors or layers were left out: {listed([*found.left])}"
        c.notes += (f"of the adapter {called}, {lost}",)
    c.weights.load(called, found.adapter, strength)
    return called


def title(c: Components) -> str:
    """What to call a model: its family's title, or its own name if it is of none."""
    family = known_family(c)
    return family.title if family else c.name


def architecture(c: Components) -> str:
    """What files of adapters call a model (modelspec.architecture); "" where it is of no family."""
    family, prediction = known_family(c), c.scheduler_config.get("prediction_type", "epsilon")
    return family.architectures.get(prediction, family.architectures["epsilon"]) if family else ""


def fetch(c: Components, order: Request, folder: Path | None) -> None:
    """Load what prompts name and is not there yet from NAME.safetensors in a folder or one below it. UsageError: there
    is none of that name.
    """
    names = [tag.name for said in asked(order) for tag in said if tag.name not in c.weights.loaded]
    files = {path.stem: path for path in sorted(folder.rglob("*.safetensors"))} if names and folder else {}
    for name in dict.fromkeys(names):
        if not files:
            c.weights.known(name)
        load(c, files[choose("adapter", name, [*c.weights.loaded, *files])], OFF, name)


def cast_of(c: Components, order: Request) -> Cast:
    """The adapters of a run: those that are loaded, as strong as its prompts say. UsageError: prompts that differ in
    it, for one network has one set of weights at a time.
    """
    return c.weights.cast(_said(order))


def _said(order: Request) -> dict[str, Strength]:
    """The strengths that the prompts of a run say, by name."""
    said = set(asked(order))
    if len(said) > 1:
        raise UsageError("the prompts of one request name different adapters or strengths; draw them one after another")
    return {tag.name: tag.strength for tags in said for tag in tags}


def rows(c: Components, order: Request) -> tuple[dict[str, Any], ...]:
    """What a recipe says of the adapters of a run: those with any strength. That of a fast mode is marked: the model is
    opened in it again.
    """
    said = _said(order)
    strengths = {name: (one.adapter, said.get(name, one.strength)) for name, one in c.weights.loaded.items()}
    return tuple(
        {"type": "lora", "name": name, "sha256": adapter.sha256, "strength": str(strength)}
        | ({"fast": True} if name == c.fast else {})
        for name, (adapter, strength) in strengths.items()
        if strength != OFF
    )
