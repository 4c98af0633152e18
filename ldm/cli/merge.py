"""`ldm merge`: one model of several."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer

from ldm.cli.common import number, say
from ldm.cli.convert import (
    PREDICTS,
    SINGLE,
    Out,
    Rows,
    noted,
    refuse,
    save,
    show,
    type_of,
    working,
    written,
)
from ldm.errors import ModelError, UsageError
from ldm.foreign import json_object

if TYPE_CHECKING:
    from ldm.checkpoints.components import Components
    from ldm.merging import Mix

RECIPE, ANCESTORS = "sd_merge_recipe", "sd_merge_models"
HASHES = ("primary_model_hash", "secondary_model_hash", "tertiary_model_hash")
BLOCKS = "alpha by block: BASE,IN00,... as numbers, or NAME=NUMBER,... with names such as M00 or unet.mid_block"


def _from(what: str) -> Any:
    return typer.Option(metavar="LETTER", help=f"{what}: that of one model (A, B ...), or merge")


class Asked(NamedTuple):
    """What was typed about the mixture."""

    alpha: float | None
    weights: str | None
    difference: bool
    normalize: bool
    blocks: str | None
    take: dict[str, str]


def merge(
    models: Annotated[
        list[Path],
        typer.Argument(metavar="MODEL", help="A, B, C ... in this order: model folders, or files of weights"),
    ],
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="OUT", help="one file if it ends in .safetensors; else a folder")
    ],
    alpha: Annotated[
        float | None, typer.Option(parser=number, metavar="NUMBER", help="(1 - alpha) A + alpha B, of two models")
    ] = None,
    weights: Annotated[str | None, typer.Option(metavar="NUMBERS", help="one for each model: 0.3,0.5,0.2")] = None,
    normalize: Annotated[bool, typer.Option("--normalize", help="divide the weights by their sum")] = False,
    add_difference: Annotated[
        bool, typer.Option("--add-difference", help="A + alpha (B - C), of three models")
    ] = False,
    blocks: Annotated[str | None, typer.Option(metavar="WEIGHTS", help=BLOCKS)] = None,
    unet: Annotated[str, _from("the U-Net")] = "merge",
    text_encoder: Annotated[str, _from("the text encoders")] = "merge",
    vae: Annotated[str, _from("the autoencoder")] = "A",
    dtype: Annotated[
        str | None, typer.Option("--dtype", metavar="NAME", help="fp32, bf16 or fp16; absent = as in A")
    ] = None,
    allow_pickle: Annotated[
        bool, typer.Option("--allow-pickle", help="read pickled weights, in a process of its own that runs nothing")
    ] = False,
    prediction_type: Annotated[str | None, typer.Option("--prediction-type", metavar="NAME", help=PREDICTS)] = None,
    max_shard_size: Annotated[
        str, typer.Option("--max-shard-size", metavar="SIZE", help="of the files in a folder, such as 2GB")
    ] = "5GB",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="replace what is there")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="say what would be merged how, and write nothing")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="the report as a JSON object on stdout")] = False,
) -> None:
    """Merge models of one family: a weighted sum, or what B has learned beyond C added to A.

    Everything else, from the tokenizer to the scheduler, is A's. What is written appears whole or not at all.
    """
    out = Out(output, type_of(dtype), max_shard_size)
    for source in models:
        refuse(source, output, overwrite)
    if prediction_type and all(source.is_dir() for source in models):
        raise UsageError("--prediction-type is for single files, and all of the models are folders")
    take = {"unet": unet, "text_encoder": text_encoder, "vae": vae}
    asked = Asked(alpha, weights, add_difference, normalize, blocks, take)
    try:
        with working(f"merging {len(models)} models"):
            rows = merged(models, asked, out, allow_pickle, prediction_type, dry_run)
    except KeyboardInterrupt:
        say("stopped: nothing was written")
        raise typer.Exit(130) from None
    show(rows if as_json else rows | {"plan": lines_of(rows["plan"])}, as_json)


def lines_of(plan: Sequence[Mapping[str, Any]]) -> list[str]:
    """The plan as lines."""
    places = [row["block"] if "." in row["block"] else f"{row['network']} {row['block']}".strip() for row in plan]
    width = max(map(len, places))
    return [f"{place:<{width}}  {row['formula']}  ({row['tensors']} tensors)"
            for place, row in zip(places, plan, strict=True)]  # fmt: skip


def merged(models: Sequence[Path], asked: Asked, out: Out, allow_pickle: bool, prediction_type: str | None,
           dry_run: bool) -> Rows:  # fmt: skip
    """Merge, and write unless it is a dry run; the report."""
    from ldm.checkpoints.single_file import family_of, save_single_file
    from ldm.merging import merge, mixture, parse_blocks, parse_number, summary

    pairs = [_opened(path, allow_pickle, prediction_type, path is models[0]) for path in models]
    opened, told = [components for components, _ in pairs], [metadata for _, metadata in pairs]
    mix = mixture(
        len(models),
        alpha=asked.alpha,
        weights=None if asked.weights is None else [parse_number(word) for word in asked.weights.split(",")],
        difference=asked.difference,
        normalize=asked.normalize,
        blocks=None if asked.blocks is None else parse_blocks(asked.blocks, opened[0].unet.config),
        take=asked.take,
    )
    rows: Rows = {"was": [f"{components.pipeline} {path}" for components, path in zip(opened, models, strict=True)]}
    rows["plan"] = summary(opened, mix)
    if out.path.suffix == SINGLE:
        family_of(opened[0])  # before any work: ModelError where there is no such file
    if dry_run:
        return rows
    result = merge(opened, mix, out.dtype)
    result.name = out.path.stem
    if out.path.suffix == SINGLE:
        out.path.parent.mkdir(parents=True, exist_ok=True)
        save_single_file(result, out.path, out.dtype, lineage(models, told, opened, mix, out))
    else:
        save(result, out)
    return rows | noted(result, out) | written(out.path)


def _opened(
    path: Path, allow_pickle: bool, prediction_type: str | None, first: bool
) -> "tuple[Components, Mapping[str, str]]":
    """A model, mapped, in the types it has, and the metadata of its file (none of a folder)."""
    from ldm.checkpoints.folder import open_folder
    from ldm.checkpoints.pickles import readable
    from ldm.checkpoints.safe import read_header
    from ldm.checkpoints.single_file import open_single_file

    if path.is_dir():
        return open_folder(path, None, "cpu", None, allow_pickle, safety_checker=first), {}
    with readable(path, allow_pickle) as file:
        components = open_single_file(file, prediction_type=prediction_type)
        components.name = path.stem
        return components, read_header(file).metadata


def lineage(
    paths: Sequence[Path], told: "Sequence[Mapping[str, str]]", models: "Sequence[Components]", mix: "Mix", out: Out
) -> dict[str, str]:
    """The metadata of a single file that says what it was merged from. Reads the models' files whole, for their hashes.

    modelspec.merged_from: titles, as the Stability AI model specification has it. sd_merge_recipe, sd_merge_models:
    JSON, with the fields that A1111's merger writes, where its "type" is "webui"; ours has weights, blocks and networks
    beside. told: the metadata of each model's own file; of what that was merged from, it is kept.
    """
    hashes = [fingerprint(path) for path in paths]
    recipe = {
        "type": "ldm",
        **dict(zip(HASHES, [*hashes, None], strict=False)),
        "interp_method": "Add difference" if mix.difference else "Weighted sum",
        "multiplier": mix.weights[1] if mix.difference or len(paths) == 2 else None,
        "save_as_half": str(out.dtype) == "torch.float16",
        "custom_name": out.path.stem,
        "config_source": 0,
        "bake_in_vae": "None",
        "discard_weights": "",
        "is_inpainting": models[0].task == "inpainting",
        "is_instruct_pix2pix": models[0].task == "instruct-pix2pix",
        "weights": list(mix.weights),
        "blocks": dict(mix.blocks),
        "networks": dict(mix.take),
    }
    ancestors: dict[str, Any] = {}
    for digest, path, metadata in zip(hashes, paths, told, strict=True):
        before = _object(metadata.get(RECIPE))
        row = {"name": path.name, "legacy_hash": legacy_hash(path), RECIPE: before or None}
        ancestors |= {digest: row} | _object(metadata.get(ANCESTORS))
    names = ", ".join(model.name for model in models)
    return {"modelspec.merged_from": names, RECIPE: json.dumps(recipe), ANCESTORS: json.dumps(ancestors)}


def fingerprint(path: Path) -> str:
    """The SHA-256 of a file in hex; of a folder that of the lines "SHA-256  name" of its weights files."""
    from ldm.checkpoints.safe import file_sha256

    if path.is_file():
        return file_sha256(path)
    files = (file for file in path.rglob("*") if file.suffix in (SINGLE, ".bin"))
    names = sorted(file.relative_to(path).as_posix() for file in files)
    return hashlib.sha256("".join(f"{file_sha256(path / name)}  {name}\n" for name in names).encode()).hexdigest()


def legacy_hash(path: Path) -> str | None:
    """A1111's hash of 2022: 8 digits of the SHA-256 of 64 KiB that begin 1 MiB into a file; None of a folder."""
    if path.is_dir():
        return None
    with path.open("rb") as file:
        file.seek(1 << 20)
        return hashlib.sha256(file.read(1 << 16)).hexdigest()[:8]


def _object(text: str | None) -> dict[str, Any]:
    """A JSON object in a stranger's metadata; empty where it is none, or deeper than can be written again."""
    try:
        value = json_object(text or "{}", "a recipe", lenient=True)
        json.dumps([[[value]]])
    except (ModelError, RecursionError):
        return {}
    return value
