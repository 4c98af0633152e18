"""`ldm data`: look at what models are trained on."""

from pathlib import Path
from typing import Annotated

import typer

from ldm.cli.common import examples, free_name, refuse_unwritable, whole

SHOWN = 128  # pixels at which a smaller scene is shown, so that it can be looked at

app = typer.Typer(help="Look at the training data.", epilog=examples("ldm data preview"))


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
