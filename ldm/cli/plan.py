"""What `ldm generate --dry-run` says: everything that is decided, and what it would take."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ldm.cli.common import printable
from ldm.request import Request

if TYPE_CHECKING:
    from ldm.pipeline import Pipeline

SHOWN = 8  # pictures listed one by one; --json lists all


def plan(pipeline: "Pipeline", pictures: Sequence[Request], paths: Sequence[Path], as_json: bool) -> str:
    """The resolved plan as text, or as JSON. Nothing is drawn; UsageError where drawing would be refused at once."""
    import torch

    from ldm.editing import length
    from ldm.memory import available_bytes
    from ldm.recipe import fields_of, inputs_of
    from ldm.runtime import short_name, working_bytes

    networks = pipeline.components.networks.values()
    weights = sum(p.numel() * p.element_size() for network in networks for p in network.parameters())
    work = max(working_bytes(pipeline.unet, pipeline.vae, p.height or 0, p.width or 0, 1) for p in pictures)
    told: dict[str, Any] = {
        "model": pipeline.components.name,
        "device": str(pipeline.device),
        "dtype": short_name(pipeline.dtype),
        "threads": torch.get_num_threads(),
        "bytes": {"weights": weights, "work": work, "free": available_bytes(pipeline.device)},
        "notes": list(dict.fromkeys(note for one in pictures for note in pipeline.remarks(one))),
        "pictures": [
            {"path": str(path), **fields_of(one), "inputs": inputs_of(one), "canvas": sides_of(pipeline, one)}
            for path, one in zip(paths, pictures, strict=True)
        ],
    }
    if as_json:
        return json.dumps(told)
    free = told["bytes"]["free"]
    rows = [
        ("pictures", str(len(pictures))),
        ("steps", f"{sum(map(length, pictures))} in all"),
        ("model", told["model"]),
        ("device", f"{told['device']}, {told['dtype']}, {told['threads']} threads"),
        ("memory", f"about {(weights + work) / 2**20:,.0f} MiB ({weights / 2**20:,.0f} of them weights, already "
                   f"taken), {free / 2**20:,.0f} MiB are free"),
    ]  # fmt: skip
    rows += [("note", text) for text in told["notes"]]
    lines = [f"{name:<9} {printable(text)}" for name, text in rows]
    for path, one, row in list(zip(paths, pictures, told["pictures"], strict=True))[:SHOWN]:
        how = f"{one.width}x{one.height}, {one.num_inference_steps} steps of {one.scheduler}"
        lines += [
            f"{path}",
            f"    {printable(str(one.prompt))}",
            f"    {how}, guidance {one.guidance_scale}, seed {one.seed}",
        ]
        if one.image is not None:
            strength = "listed levels" if one.strength is None else f"strength {one.strength}"
            canvas = "{}x{}".format(*row["canvas"])
            edited = f"edits {row['image']}: {canvas} pixels, drawn at {one.width}x{one.height}, {strength}"
            lines.append(f"    {printable(edited)}")
    hidden = len(pictures) - SHOWN
    return "\n".join([*lines, f"... and {hidden} more; --json lists all"] if hidden > 0 else lines)


def sides_of(pipeline: "Pipeline", picture: Request) -> tuple[int, int]:
    """(width, height) of the file that a picture comes to."""
    from ldm.editing import canvas

    if picture.image is None:
        return picture.width or 0, picture.height or 0
    return canvas(pipeline.components, picture).picture.size
