"""`ldm lora`: what adapters hold, from one dialect to another, into a model, out of two, together, smaller."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer

from ldm.adapters.strength import file_option
from ldm.cli.common import examples, number, printable, say, whole
from ldm.cli.convert import Out, Rows, refuse, save, show, type_of, working, written
from ldm.errors import ModelError, UsageError, choose

if TYPE_CHECKING:
    from torch import nn

    from ldm.adapters.adapter import Adapter
    from ldm.adapters.names import Book
    from ldm.adapters.reading import Read
    from ldm.adapters.tools import Fitted, Keep

app = typer.Typer(
    help="Adapters (LoRA and its kin): look, convert, merge, combine, extract, resize.",
    epilog=examples("ldm lora info ink.safetensors", "ldm lora convert --help"),
)

DIALECTS = {"diffusers": ".safetensors", "kohya": ".safetensors", "peft": "", "comfy": ".safetensors"}
File = Annotated[Path, typer.Argument(metavar="FILE", help="adapter: a file, or a folder of PEFT's")]
Weighted = Annotated[list[str], typer.Argument(metavar="FILE[:STRENGTH]", help="adapters; a strength left out is 1")]
Output = Annotated[Path, typer.Option("--output", "-o", metavar="OUT", help="where it goes")]
Model = Annotated[
    str | None, typer.Option("--model", metavar="MODEL", help="that it is for; absent = known by names and shapes")
]
To = Annotated[str, typer.Option("--to", metavar="DIALECT", help="diffusers, kohya, peft (a folder) or comfy")]
Dtype = Annotated[str | None, typer.Option("--dtype", metavar="NAME", help="fp32, bf16 or fp16; absent = as it is")]
Rank = Annotated[int | None, typer.Option("--rank", parser=whole(1), metavar="R", help="at most this rank in a layer")]
KEEP = "MEASURE=VALUE, what to keep of a layer: sv_ratio=10, sv_fro=0.9 or sv_cumulative=0.9 (kohya's)"
Measure = Annotated[str | None, typer.Option("--keep", metavar="MEASURE=VALUE", help=KEEP)]
Pickles = Annotated[bool, typer.Option("--allow-pickle", help="read pickled weights, in a guarded process")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="replace what is there")]
AsJson = Annotated[bool, typer.Option("--json", help="the report as a JSON object on stdout")]


class Target(NamedTuple):
    """What an adapter is for: the names of a model's modules, its title, the architecture in metadata, and its networks
    where a model was named.
    """

    book: "Book"
    title: str
    architecture: str
    networks: "Mapping[str, nn.Module] | None" = None


class Opened(NamedTuple):
    """An adapter from its file, and what it is for."""

    read: "Read"
    target: Target
    adapter: "Adapter"
    notes: list[str]


@app.command(epilog=examples("ldm lora info ink.safetensors", "ldm lora info ink.safetensors --layers --model sd15/"))
def info(
    file: File,
    model: Model = None,
    layers: Annotated[bool, typer.Option("--layers", help="a line for every layer")] = False,
    allow_pickle: Pickles = False,
    as_json: AsJson = False,
) -> None:
    """Say what an adapter is, for which model, and how much each layer changes.

    With --model the changes are measured against its weights, and what does not fit it is named.
    """
    from ldm.adapters.matching import report

    opened = open_for(file, model, allow_pickle, partial=True)
    rows = report(opened.read, opened.target.networks)
    ranks = sorted({row.rank for row in rows if row.rank})
    matched = sum(row.matched for row in rows)
    told: Rows = {"file": str(file), "for": opened.target.title, "dialect": opened.read.adapter.dialect or "unknown"}
    told |= {"types": ", ".join(dict.fromkeys(row.kind for row in rows)), "layers": f"{matched} of {len(rows)} matched"}
    told |= {"rank": " to ".join(dict.fromkeys(map(str, (ranks[0], ranks[-1])))) if ranks else "none"}
    told |= {"alpha": ", ".join(sorted({f"{row.alpha:g}" for row in rows if row.alpha is not None})) or "not said"}
    told |= {"sha256": opened.read.adapter.sha256}
    if as_json:
        told |= {"layers": [row._asdict() for row in rows], "metadata": dict(opened.read.adapter.metadata)}
    elif layers:
        told["each"] = [layer_line(row) for row in rows]
    else:
        largest = sorted(rows, key=lambda row: -(row.relative or row.norm or 0.0))[:5]
        told["largest"] = [layer_line(row) for row in largest]
        told["metadata"] = [f"{k}: {v[:100]}" for k, v in sorted(opened.read.adapter.metadata.items())][:40]
    tell(told | {"notes": opened.notes}, as_json)


def layer_line(row: Any) -> str:
    """One layer in words."""
    alpha = "" if row.alpha is None else f" alpha {row.alpha:g}"
    size = f"{row.relative:.3%} of the weight" if row.relative is not None else ""
    size = size or (f"norm {row.norm:.4g}" if row.norm is not None else "its size needs --model")
    return f"{row.name}  {row.kind} rank {row.rank or '-'}{alpha}  {size}{'' if row.matched else '  NOT MATCHED'}"


@app.command(
    epilog=examples(
        "ldm lora convert ink.safetensors ink-kohya.safetensors --to kohya",
        "ldm lora convert loha.safetensors plain.safetensors --as-lora 16",
    )
)
def convert(
    file: File,
    output: Annotated[Path, typer.Argument(metavar="OUT", help="file that ends in .safetensors; for peft a folder")],
    to: To = "diffusers",
    dtype: Dtype = None,
    as_lora: Annotated[
        int | None, typer.Option("--as-lora", parser=whole(1), metavar="R", help="any type as plain LoRA of this rank")
    ] = None,
    model: Model = None,
    allow_pickle: Pickles = False,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
) -> None:
    """Write an adapter in another tool's dialect. Its numbers stay as they are, unless --as-lora or --dtype ask."""
    from ldm.adapters.tools import Keep
    from ldm.adapters.tools import as_lora as plain

    refuse_output(output, to, overwrite)
    with working(f"converting {file.name}"):
        opened = open_for(file, model, allow_pickle)
        adapter, rows = opened.adapter, {"notes": opened.notes}
        if as_lora:
            biases = to in ("kohya", "comfy")  # the other dialects have no place for them
            fitted = plain(adapter, Keep(as_lora), opened.target.networks, biases)
            adapter, rows = fitted.adapter, rows | errors_of(fitted)
        told = keep(adapter, opened.target, output, to, dtype)
    tell(told | rows, as_json)


@app.command(epilog=examples("ldm lora merge ink.safetensors:0.8 --model sd15/ -o inked/"))
def merge(
    files: Weighted,
    output: Output,
    model: Annotated[str | None, typer.Option("--model", metavar="MODEL", help="absent = the one in the box")] = None,
    dtype: Dtype = None,
    partial: Annotated[bool, typer.Option("--partial", help="take what fits of one that does not as a whole")] = False,
    allow_pickle: Pickles = False,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
) -> None:
    """Write a model with adapters in its weights: one file if OUT ends in .safetensors, else a folder."""
    from ldm.pipeline import Pipeline

    out = Out(output, type_of(dtype), "5GB")
    asked = [file_option(text) for text in files]
    for path, strength in asked:
        refuse(path, output, overwrite)
        if strength and len(strength.unet) > 1:
            raise UsageError(f"the strength {strength} of {path} changes over a run; weights can hold one only")
    with working("merging"):
        c = components_of(model, allow_pickle)
        pipeline = Pipeline(c)
        for path, strength in asked:
            pipeline.load_lora(path, strength or 1.0, partial=partial, allow_pickle=allow_pickle)
        c.weights.rest()
        c.name = output.stem
        save(c, out)
    tell({"was": [f"{name} {one.strength}" for name, one in c.weights.loaded.items()], "notes": list(c.notes)}
         | written(output), as_json)  # fmt: skip


@app.command(epilog=examples("ldm lora combine ink.safetensors:0.7 paper.safetensors:0.5 -o both.safetensors"))
def combine(
    files: Weighted,
    output: Output,
    to: To = "diffusers",
    rank: Rank = None,
    measure: Measure = None,
    dtype: Dtype = None,
    model: Model = None,
    allow_pickle: Pickles = False,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
) -> None:
    """Make one adapter of several, which does at strength 1 what they do together: exactly, unless it is cut down."""
    from ldm.adapters.tools import combine as together

    refuse_output(output, to, overwrite)
    size = kept(rank, measure)
    asked = [(path, plain_weight(path, strength)) for path, strength in map(file_option, files)]
    parts, target, notes = [], None, list[str]()
    with working("combining"):
        for path, weight in asked:
            opened = open_for(path, model, allow_pickle)
            if target and target.title != opened.target.title:
                raise ModelError(f"{path} is for {opened.target.title}, the others for {target.title}; they do not mix")
            target = target or opened.target
            parts.append((opened.adapter, weight))
            notes += opened.notes
        assert target
        fitted = together(parts, size, target.networks, output.stem)
        told = keep(fitted.adapter, target, output, to, dtype)
    tell(told | {"notes": notes} | (errors_of(fitted) if rank or measure else {}), as_json)


@app.command(epilog=examples("ldm lora extract sd15/ tuned/ -o tuned-lora.safetensors --rank 32"))
def extract(
    base: Annotated[str, typer.Argument(metavar="BASE", help="the model as it was")],
    tuned: Annotated[str, typer.Argument(metavar="TUNED", help="the model that was made of it")],
    output: Output,
    to: To = "diffusers",
    rank: Rank = None,
    measure: Measure = None,
    dtype: Dtype = None,
    biases: Annotated[
        bool, typer.Option("--biases", help="also what norms and biases learnt (kohya and comfy only)")
    ] = False,
    allow_pickle: Pickles = False,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
) -> None:
    """Make an adapter of the difference of two models, the best there is of its rank (by SVD; default 32)."""
    from ldm.adapters.tools import extract as difference

    refuse_output(output, to, overwrite)
    size = kept(rank or (None if measure else 32), measure)
    with working("extracting"):
        first, second = components_of(base, allow_pickle), components_of(tuned, allow_pickle)
        fitted = difference(first.networks, second.networks, size, output.stem, biases)
        target = target_of(first)
        told = keep(fitted.adapter, target, output, to, dtype)
    tell(told | errors_of(fitted), as_json)


@app.command(epilog=examples("ldm lora resize ink.safetensors -o small.safetensors --keep sv_fro=0.9 --rank 16"))
def resize(
    file: File,
    output: Output,
    to: To = "diffusers",
    rank: Rank = None,
    measure: Measure = None,
    dtype: Dtype = None,
    model: Model = None,
    allow_pickle: Pickles = False,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
) -> None:
    """Cut an adapter down to a rank, or to what a measure says for each layer, with the least error (by SVD)."""
    from ldm.adapters.tools import resize as smaller

    if not rank and not measure:
        raise UsageError("say how small it is to be: --rank 8, --keep sv_fro=0.9, or both")
    refuse_output(output, to, overwrite)
    size = kept(rank, measure)
    with working(f"resizing {file.name}"):
        opened = open_for(file, model, allow_pickle)
        fitted = smaller(opened.adapter, size, opened.target.networks)
        told = keep(fitted.adapter, opened.target, output, to, dtype)
    tell(told | {"notes": opened.notes} | errors_of(fitted), as_json)


# -- what they share --------------------------------------------------------------------------------------------------


def open_for(file: Path, model: str | None, allow_pickle: bool, partial: bool = False) -> Opened:
    """An adapter from its file, for the model named or the one that its names and shapes tell. ModelError: neither."""
    from ldm.adapters.matching import family_of, fit
    from ldm.adapters.names import book_of, book_of_family
    from ldm.adapters.reading import matched, open_adapter
    from ldm.checkpoints.families import FAMILIES

    loose = open_adapter(file, allow_pickle=allow_pickle)
    if model is not None:
        c = components_of(model, allow_pickle)
        target = target_of(c)
    else:
        box = components_of(None, False)
        family = family_of(loose, {box.name: book_of(box.networks)})
        key = next((key for key, row in FAMILIES.items() if row.title == family), None)
        if family == box.name:
            target = Target(book_of(box.networks), box.name, "", box.networks)
        elif key is None:
            raise ModelError(f"{file} is for none of the models known here; name the model it is for with --model")
        else:
            target = Target(book_of_family(key), FAMILIES[key].title, FAMILIES[key].architectures["epsilon"])
    read = matched(loose, target.book)
    found = fit(read, target.book.modules, target.title, partial)
    return Opened(read, target, found.adapter, [f"{name}: {why}" for name, why in found.left.items()])


def target_of(c: Any) -> Target:
    """A model in memory as what an adapter is for."""
    from ldm.adapters.names import book_of
    from ldm.loras import architecture, title

    return Target(book_of(c.networks), title(c), architecture(c), c.networks)


def components_of(model: str | None, allow_pickle: bool) -> Any:
    """A model, in the types it has, on the CPU."""
    import torch

    from ldm.sources import open_model

    return open_model(model, torch.float32, torch.device("cpu"), allow_pickle=allow_pickle, safety_checker=False)


def refuse_output(output: Path, to: str, overwrite: bool) -> None:
    """UsageError: an unknown dialect, a name that does not go with it, or something there that would be lost."""
    suffix = DIALECTS[choose("dialect", to, DIALECTS)]
    if output.suffix != suffix and (suffix or output.suffix == ".safetensors"):
        raise UsageError(f"{output}: {to} writes {'a file that ends in .safetensors' if suffix else 'a folder'}")
    if output.exists() and not overwrite:
        raise UsageError(f"{output} exists; add --overwrite to replace, or choose another name")


def kept(rank: int | None, measure: str | None) -> "Keep":
    """How much of a layer is kept."""
    from ldm.adapters.tools import Keep

    name, equals, value = (measure or "").partition("=")
    if measure and not equals:
        raise UsageError(f"--keep {measure!r} is no MEASURE=VALUE; write for example --keep sv_fro=0.9")
    return Keep(rank, name, number(value) if measure else 0.0)


def plain_weight(path: Path, strength: Any) -> float:
    """The one number of a strength. UsageError: it has several."""
    if strength is None:
        return 1.0
    if strength.blocks or len(strength.unet) > 1 or strength.unet[0][1] != strength.text:
        raise UsageError(f"the strength {strength} of {path} is not one number; adapters combine with one each")
    return float(strength.text)


def keep(adapter: "Adapter", target: Target, output: Path, to: str, dtype: str | None) -> Rows:
    """Write an adapter; the beginning of the report."""
    from ldm.adapters.writing import write_adapter

    output.parent.mkdir(parents=True, exist_ok=True)
    write_adapter(adapter, output, target.book, to, dtype=type_of(dtype), architecture=target.architecture)
    return {"for": target.title, "dialect": to, "layers": len(adapter.layers)} | written(output)


def errors_of(fitted: "Fitted") -> Rows:
    """How good a new adapter is."""
    errors = sorted(fitted.errors.values())
    if not errors:
        return {"dropped": list(fitted.dropped)}
    middle, worst = errors[len(errors) // 2], max(fitted.errors, key=fitted.errors.__getitem__)
    said = f"{middle:.2%} of a layer's change in the middle, {errors[-1]:.2%} at most ({worst})"
    return {"error": said} | ({"dropped": list(fitted.dropped)} if fitted.dropped else {})


def tell(rows: Rows, as_json: bool) -> None:
    """The report on stdout; of one for people, notes are on stderr."""
    if not as_json:
        for note in rows.pop("notes", []):
            say(f"note: {printable(note)}")
    show(rows, as_json)
