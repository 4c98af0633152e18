"""`ldm info`: what a model folder, a weights file or a picture is."""

import json
from collections import Counter
from pathlib import Path
from typing import Annotated, Any

import typer

from ldm.cli.common import printable
from ldm.errors import LdmError

LISTED = 12  # longest texts and most entries of a file's own metadata that are shown
MARKS = (  # what the names of tensors tell of a weights file; the first that fits
    (("lora_unet_", "lora_te"), "LoRA (kohya's names)"),
    (("lora_A", "lora_down", "lora.down"), "LoRA (diffusers' or PEFT's names)"),
    (("conditioner.embedders.1.",), "SDXL checkpoint in one file"),
    (("cond_stage_model.model.",), "Stable Diffusion 2.x checkpoint in one file"),
    (("model.diffusion_model.",), "Stable Diffusion 1.x checkpoint in one file"),
    (("down_blocks.0.resnets.0.time_emb_proj.weight",), "U-Net of a model folder"),
    (("quant_conv.weight",), "autoencoder of a model folder"),
    (("text_model.", "embeddings.token_embedding"), "text encoder of a model folder"),
)

Rows = dict[str, Any]


def info(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="model folder, .safetensors file or picture")],
    as_json: Annotated[bool, typer.Option("--json", help="the same as a JSON object")] = False,
) -> None:
    """Say what a model folder, a weights file or a picture is, without loading any weights."""
    if not file.exists():
        raise LdmError(f"there is no {file}; give a model folder, a .safetensors file or a picture")
    read = of_folder if file.is_dir() else of_weights if file.suffix == ".safetensors" else of_picture
    rows = read(file)
    if as_json:
        print(json.dumps(rows))
        return
    width = max(map(len, rows))
    for name, value in rows.items():
        lines = [f"{k}: {v}" for k, v in value.items()] if isinstance(value, dict) else str(value).split("\n")
        for i, line in enumerate(lines):
            print(f"{'' if i else name:<{width}}  {printable(line)}")


def of_folder(folder: Path) -> Rows:
    """A model folder's parts with their parameters and types, its scheduler and defaults."""
    from ldm.checkpoints.components import CLASSES, NETWORKS
    from ldm.checkpoints.folder import GENERATION, INDEX, SCHEDULER, find_weights
    from ldm.checkpoints.safe import read_header, read_json

    if not (folder / INDEX).is_file():
        raise LdmError(f"{folder} is no model folder, for it has no {INDEX}; for a folder of pictures: ldm gallery")
    rows: Rows = {"kind": "model folder", "pipeline": read_json(folder / INDEX).get("_class_name", "unknown")}
    for name, classes in NETWORKS.items():
        found = find_weights(folder / name, CLASSES[classes[0]].stem, None)
        if found is None:
            continue
        tensors = [entry for path in found[0] for entry in read_header(path).tensors.values()]
        rows[name] = counted(tensors) + f", {sum(path.stat().st_size for path in found[0]):,} bytes"
    if (folder / SCHEDULER).is_file():
        config = read_json(folder / SCHEDULER)
        said = ("_class_name", "prediction_type", "beta_schedule", "timestep_spacing", "rescale_betas_zero_snr")
        rows["scheduler"] = {name: config[name] for name in said if name in config}
    if (folder / GENERATION).is_file():
        rows["defaults"] = read_json(folder / GENERATION)
    return rows


def of_weights(path: Path) -> Rows:
    """A safetensors file's kind, by the names of its tensors, their number and types, and its own metadata."""
    from ldm.checkpoints.safe import read_header

    header = read_header(path)
    names = list(header.tensors)
    fits = (kind for marks, kind in MARKS if any(mark in name for mark in marks for name in names))
    rows: Rows = {
        "kind": next(fits, "weights of an unknown kind"),
        "tensors": len(names),
        "parameters": counted(header.tensors.values()),
        "bytes": path.stat().st_size,
    }
    said = dict(sorted(header.metadata.items())[:LISTED])
    return rows | ({"metadata": {k: v if len(v) < 100 else f"{v[:100]}..." for k, v in said.items()}} if said else {})


def counted(tensors: Any) -> str:
    """ "13,653,444 parameters in F16"."""
    kinds: Counter[str] = Counter()
    for entry in tensors:
        size = 1
        for side in entry.shape:
            size *= side
        kinds[str(entry.dtype).removeprefix("torch.")] += size
    total = f"{sum(kinds.values()):,} parameters"
    if len(kinds) == 1:
        return f"{total} in {next(iter(kinds))}"
    return total + "".join(f", {count:,} in {kind}" for kind, count in kinds.items())


def of_picture(path: Path) -> Rows:
    """A picture's size and recipe."""
    from PIL import Image

    from ldm.gallery import command_of, rows_of
    from ldm.images import read_text
    from ldm.recipe import read

    read_text(path)  # ModelError where it is no picture
    with Image.open(path) as image:
        rows: Rows = {"kind": f"{image.format} picture, {image.width}x{image.height}"}
    try:
        found = read(path)
    except LdmError as error:
        return rows | {"recipe": str(error)}
    rows["recipe of"] = found.source
    rows |= {label.lower(): value for label, value in rows_of(found.request, found.recipe, found.notes)}
    return rows | {"command": command_of(found.request)}
