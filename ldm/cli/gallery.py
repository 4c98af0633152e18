"""`ldm gallery`: a folder of pictures as one page to look at in a browser."""

from pathlib import Path
from typing import Annotated

import typer

from ldm.cli.common import printable, progress_bar, say
from ldm.cli.places import refuse_taken
from ldm.errors import LdmError


def gallery(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="where the pictures lie, in folders below it too")],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="FILE", help="the page; absent = index.html in the folder")
    ] = None,
    title: Annotated[
        str | None, typer.Option("--title", metavar="TEXT", help="heading of the page; absent = the folder's name")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="replace a page that is there")] = False,
) -> None:
    """Show a folder of pictures, and the recipe of each, as one HTML file.

    The page needs no network: thumbnails and recipes are inside it. It links to the pictures where they lie, so move it
    together with them.
    """
    from ldm.checkpoints.safe import atomic_text
    from ldm.gallery import describe, find_pictures
    from ldm.gallery import gallery as page_of

    page = output or folder / "index.html"
    found = list(find_pictures(folder))
    if not found:
        raise LdmError(f"no PNG, JPEG, WebP or AVIF picture lies in {folder} or below it; choose another folder")
    refuse_taken([page], overwrite)
    pictures = []
    with progress_bar() as bar:
        for path in bar.track(found, description="reading pictures"):
            try:
                pictures.append(describe(path, page.parent))
            except LdmError as error:
                say(f"note: {printable(' '.join(str(error).split()))}; it is left out")
    if not pictures:
        raise LdmError(f"none of the {len(found)} pictures in {folder} can be read; nothing is written")
    page.parent.mkdir(parents=True, exist_ok=True)
    atomic_text(page, page_of(pictures, title or folder.name or "Pictures"))
    print(page)
