"""`ldm data`: look at what models are trained on."""

import json
import warnings
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ldm.cli.common import examples, free_name, printable, progress_bar, refuse_unwritable, whole

if TYPE_CHECKING:
    from ldm.data.check import Report
    from ldm.data.sources import Found

SHOWN = 128  # pixels at which a smaller scene is shown, so that it can be looked at

app = typer.Typer(help="Look at the training data.", epilog=examples("ldm data preview", "ldm data check out"))


@app.callback()
def group() -> None:
    """Look at the training data."""


@app.command(epilog=examples("ldm data preview", "ldm data preview --seed 3 --count 64 --columns 8 -o sheet.png"))
def preview(
    seed: Annotated[int, typer.Option("--seed", parser=whole(0), metavar="N", help="of the corpus")] = 0,
    count: Annotated[int, typer.Option("--count", parser=whole(1, 1000), metavar="N", help="scenes")] = 32,
    columns: Annotated[int, typer.Option("--columns", parser=whole(1, 100), metavar="N", help="scenes in a row")] = 8,
    size: Annotated[
        int, typer.Option("--size", parser=whole(16, 1024), metavar="N", help="pixels a scene is drawn at")
    ] = 64,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="FILE", help="picture; absent = a free name in out/")
    ] = None,
) -> None:
    """Write a contact sheet of captioned training scenes."""
    from PIL import Image

    from ldm.data.emoji import CorpusConfig, EmojiScenes
    from ldm.errors import choose
    from ldm.images import FORMATS, contact_sheet, save

    path = output or free_name(Path("out") / f"scenes-{seed}.png")
    choose("image suffix", path.suffix.lower(), FORMATS)
    refuse_unwritable(path)
    scenes = EmojiScenes(CorpusConfig(size=size), seed)
    shown = [scenes.scene(i) for i in range(count)]
    sheet = contact_sheet(
        [Image.fromarray(scene.image) for scene in shown],
        [scene.caption for scene in shown],
        columns,
        max(SHOWN, size),
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    save(sheet, path)
    print(path)


@app.command(epilog=examples("ldm data check out", "ldm data check out --policy skip --min-side 32 --json"))
def check(
    source: Annotated[
        list[str], typer.Argument(metavar="DATA", help="folder, tar shards, parquet files, or owner/name on the hub")
    ],
    policy: Annotated[
        str, typer.Option("--policy", metavar="NAME", help="error = defects are exit code 1; skip = left out")
    ] = "error",
    as_json: Annotated[bool, typer.Option("--json", help="all of it as a JSON object on stdout")] = False,
    min_side: Annotated[
        int, typer.Option("--min-side", parser=whole(1), metavar="N", help="pixels that a side must have")
    ] = 64,
    image_column: Annotated[
        str, typer.Option("--image-column", metavar="NAME", help="of metadata or a table: the picture")
    ] = "image",
    caption_column: Annotated[
        str, typer.Option("--caption-column", metavar="NAME", help="of metadata or a table: its caption")
    ] = "text",
) -> None:
    """Look for what is wrong with captioned pictures before they are trained on.

    Every picture is decoded. A defect (a damaged picture, an empty caption ...) stops training; a note (a duplicate, a
    picture that is turned by its EXIF ...) is only told. Exit code 1: there are defects, or with --policy skip nothing
    is left without them.
    """
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn

    from ldm.data.check import looks, report
    from ldm.data.sources import find
    from ldm.errors import choose

    choose("policy", policy, ("error", "skip"))
    found = find(source, image_column=image_column, caption_column=caption_column)
    columns = (TextColumn("looking at pictures"), BarColumn(), MofNCompleteColumn())
    with progress_bar(*columns) as bar, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what Pillow warns of is either harmless or a finding
        result = report(found, bar.track(looks(found, min_side), total=len(found.pictures)))
    told = _as_json(found, result) if as_json else _as_table(found, result, policy)
    print(told)
    raise typer.Exit(int(bool(result.defects) if policy == "error" else not result.usable))


def _as_json(found: "Found", result: "Report") -> str:
    from ldm.data.check import KINDS

    findings = [
        {"path": one.path, "kind": one.kind, "severity": KINDS[one.kind][0], "reason": one.reason}
        for one in result.findings
    ]
    left_out = sorted({one.key for one in found.pictures} - {one.key for one in result.usable})
    head = {"summary": found.summary, "images": len(found.pictures), "usable": len(result.usable)}
    return json.dumps({**head, "left_out": left_out, "findings": findings})


def _as_table(found: "Found", result: "Report", policy: str) -> str:
    """Defects first, a finding a line."""
    from ldm.data.check import KINDS

    rows = sorted((KINDS[one.kind][0], one.kind, printable(one.path), printable(one.reason)) for one in result.findings)
    widths = [max((len(row[i]) for row in rows), default=0) for i in range(3)]
    lines = ["  ".join([*(f"{row[i]:<{widths[i]}}" for i in range(3)), row[3]]) for row in rows]
    counts = Counter(row[0] for row in rows)
    verdict = ", ".join(f"{counts[name] or 'no'} {name}{'s' * (counts[name] != 1)}" for name in ("defect", "note"))
    rest = f"; {len(result.usable)} of {len(found.pictures)} images are used" if policy == "skip" else ""
    return "\n".join([printable(found.summary), *lines, verdict + rest])
