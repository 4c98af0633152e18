"""`ldm convert`: a model from one packing to another, and pickled weights to safetensors."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer

from ldm.cli.common import printable, progress_bar, refuse_unwritable, say
from ldm.errors import LdmError, NumericalError, UsageError

if TYPE_CHECKING:
    import torch

    from ldm.checkpoints.components import Components

SINGLE = ".safetensors"
UNWRITTEN = (".ckpt", ".pt", ".pth", ".bin", ".pkl", ".gguf", ".onnx")
PREDICTS = "what a single file's U-Net predicts, where it does not say: epsilon or v_prediction"
IN_FOLDERS = {"safety_checker": "safety checker", "generation": "defaults (generation_config.json)"}

Rows = dict[str, Any]


class Out(NamedTuple):
    """What is to be written: where, in which type (None: as it is), and the size of the largest file in a folder."""

    path: Path
    dtype: "torch.dtype | None"
    max_shard_size: str


def convert(
    source: Annotated[Path, typer.Argument(metavar="IN", help="model folder, or file of weights")],
    target: Annotated[Path, typer.Argument(metavar="OUT", help="one file if it ends in .safetensors; else a folder")],
    dtype: Annotated[
        str | None, typer.Option("--dtype", metavar="NAME", help="fp32, bf16 or fp16; absent = as it is")
    ] = None,
    allow_pickle: Annotated[
        bool, typer.Option("--allow-pickle", help="read pickled weights, in a process of its own that runs nothing")
    ] = False,
    ema: Annotated[bool, typer.Option("--ema", help="take the averaged weights of a single file's U-Net")] = False,
    prediction_type: Annotated[str | None, typer.Option("--prediction-type", metavar="NAME", help=PREDICTS)] = None,
    max_shard_size: Annotated[
        str, typer.Option("--max-shard-size", metavar="SIZE", help="of the files in a folder, such as 2GB")
    ] = "5GB",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="replace what is there")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="the report as a JSON object on stdout")] = False,
) -> None:
    """Make a model folder of a single file, the reverse, or safetensors of pickled weights.

    The numbers stay as they are unless --dtype asks for others. What is written appears whole or not at all; stdout
    says what it was and what was written.
    """
    out = Out(target, type_of(dtype), max_shard_size)
    refuse(source, target, overwrite)
    if source.is_dir() and (ema or prediction_type):
        raise UsageError(f"--ema and --prediction-type are for single files, and {source} is a folder")
    try:
        with working(f"converting {source.name}"):
            if source.is_dir():
                rows = from_folder(source, out, allow_pickle)
            else:
                rows = from_file(source, out, allow_pickle, prediction_type, ema)
    except KeyboardInterrupt:
        say("stopped: nothing was written")
        raise typer.Exit(130) from None
    show(rows | written(target), as_json)


def type_of(dtype: str | None) -> "torch.dtype | None":
    """The type that is asked for; None: as it is. UsageError: unknown."""
    import torch

    from ldm.runtime import resolve_dtype

    return None if dtype is None else resolve_dtype(dtype, torch.device("cpu"))


def show(rows: Rows, as_json: bool) -> None:
    """A report on stdout: a name and a line, or several, for each row; or one JSON object."""
    if as_json:
        print(json.dumps(rows))
        return
    width = max(map(len, rows), default=0)
    for name, value in rows.items():
        for i, line in enumerate(value if isinstance(value, list) else [value]):
            print(f"{'' if i else name:<{width}}  {printable(f'{line:,}' if isinstance(line, int) else str(line))}")


def refuse(source: Path, target: Path, overwrite: bool) -> None:
    """LdmError before any work: nothing to read, no place to write, or something there that would be lost."""
    if not source.exists():
        raise LdmError(f"there is no {source}; give a model folder or a file of weights")
    if target.suffix.lower() in UNWRITTEN:
        raise UsageError(f"{target}: only safetensors files and model folders are written; name one of them")
    there = os.path.lexists(target) and not (target.is_dir() and not any(target.iterdir()))
    if there and target.exists() and source.samefile(target):
        raise UsageError(f"{source} would be written over itself; choose another name for OUT")
    if there and not overwrite:
        raise UsageError(f"{target} exists; add --overwrite to replace, or choose another name")
    if target.suffix != SINGLE and target.is_dir():
        if there and not (target / "model_index.json").is_file():
            raise UsageError(f"{target} is a folder of other things than a model; choose a new or empty folder")
    elif target.suffix != SINGLE and there:
        raise UsageError(f"{target} is a file, and only files that end in {SINGLE} are written; choose another name")
    else:
        refuse_unwritable(target)


@contextmanager
def working(text: str) -> Iterator[None]:
    """What is done and for how long, on a terminal."""
    from rich.progress import SpinnerColumn, TextColumn, TimeElapsedColumn

    with progress_bar(SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn()) as bar:
        bar.add_task(printable(text), total=None)
        yield


def from_folder(source: Path, out: Out, allow_pickle: bool) -> Rows:
    """Convert a model folder; the beginning of the report."""
    from ldm.checkpoints.folder import open_folder

    components = open_folder(source, None, "cpu", None, allow_pickle)
    save(components, out)
    return {"was": f"model folder of a {components.pipeline}"} | noted(components, out)


def from_file(source: Path, out: Out, allow_pickle: bool, prediction_type: str | None, ema: bool) -> Rows:
    """Convert a file of weights, a model or anything else; the beginning of the report."""
    from ldm.checkpoints.families import recognise
    from ldm.checkpoints.pickles import readable
    from ldm.checkpoints.safe import read_header
    from ldm.checkpoints.single_file import open_single_file

    with readable(source, allow_pickle) as file:
        facts = recognise(read_header(file))
        rows: Rows = {"was": f"{facts.what} in one {'file' if file == source else 'pickled file'}"}
        if facts.family:
            components = open_single_file(file, prediction_type=prediction_type, ema=ema)
            components.name = source.stem
            save(components, out)
            return rows | noted(components, out)
        if out.path.suffix != SINGLE:
            raise LdmError(f"{source} is {facts.what}, not a whole model, and becomes no model folder; {facts.advice}")
        if prediction_type or ema:
            raise UsageError(f"--ema and --prediction-type are for whole models, and {source} is {facts.what}")
        if file == source and out.dtype is None:
            raise UsageError(f"{source} is {facts.what} in safetensors already; give --dtype to change its numbers")
        copy(file, out)
        return rows


def save(components: "Components", out: Out) -> None:
    """Write a model as OUT's name has it."""
    from ldm.checkpoints.folder import save_folder
    from ldm.checkpoints.single_file import save_single_file

    if out.path.suffix == SINGLE:
        out.path.parent.mkdir(parents=True, exist_ok=True)
        save_single_file(components, out.path, out.dtype)
    else:
        save_folder(components, out.path, out.dtype, max_shard_size=out.max_shard_size)


def noted(components: "Components", out: Out) -> Rows:
    """What was said on opening, and what a single file has no place for."""
    lost = [text for name, text in IN_FOLDERS.items() if getattr(components, name)] if out.path.suffix == SINGLE else []
    notes = [*components.notes, *(f"a single file has no place for the model's {text}" for text in lost)]
    return {"notes": notes} if notes else {}


def copy(source: Path, out: Out) -> None:
    """The same tensors in another type; NumericalError where they are finite only in theirs."""
    import torch
    from safetensors.torch import load_file

    from ldm.checkpoints.safe import atomic_save_safetensors, read_header

    tensors = load_file(source)
    for name, tensor in tensors.items():
        tensors[name] = tensor.to(out.dtype) if tensor.is_floating_point() else tensor
        if out.dtype and not torch.isfinite(tensors[name].float()).all() and torch.isfinite(tensor.float()).all():
            raise NumericalError(f"{name} is not finite in {out.dtype}; choose fp32")
    out.path.parent.mkdir(parents=True, exist_ok=True)
    atomic_save_safetensors(tensors, out.path, read_header(source).metadata)


def written(target: Path) -> Rows:
    """What is there now, by its headers."""
    from ldm.checkpoints.safe import read_header

    files = sorted(target.rglob("*.safetensors")) if target.is_dir() else [target]
    entries = [entry for file in files for entry in read_header(file).tensors.values()]
    return {
        "wrote": str(target),
        "files": len(files),
        "tensors": len(entries),
        "dtype": ", ".join(sorted({str(entry.dtype).removeprefix("torch.") for entry in entries})),
        "bytes": sum(file.stat().st_size for file in files),
    }
