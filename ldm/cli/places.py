"""Where pictures go: free names in a folder, one file, or a pattern; never over what is there unless told."""

import os
import re
import string
import sys
from collections.abc import Sequence
from pathlib import Path

import typer

from ldm.cli.common import free_name, refuse_unwritable, terminal
from ldm.errors import UsageError, choose
from ldm.request import Request

SLUG = 40  # characters of the prompt in a file's name
OUTPUT = (
    "file (.png, .jpg, .webp, .avif), folder, or pattern with {index}, {seed}, {variation}, {prompt}, {scheduler}, "
    "{steps}, {guidance}, {width}, {height}; absent = a free name in out/"
)


def slug(prompt: str) -> str:
    """The words of a prompt as they may stand in a file's name."""
    return re.sub(r"\W+", "-", prompt.lower())[:SLUG].strip("-") or "picture"


def named(index: int, picture: Request) -> dict[str, int | float | str | None]:
    """What may stand in the braces of a pattern. No value has a separator of folders in it."""
    assert isinstance(picture.prompt, str) and not isinstance(picture.seed, tuple)
    assert not isinstance(picture.variation_seed, tuple)
    return {
        "index": index,
        "seed": picture.seed,
        "variation": picture.variation_seed,
        "prompt": slug(picture.prompt),
        "scheduler": picture.scheduler,
        "steps": picture.num_inference_steps,
        "guidance": picture.guidance_scale,
        "width": picture.width,
        "height": picture.height,
    }


def paths_of(output: str | None, pictures: Sequence[Request]) -> list[Path]:
    """The file of each picture. UsageError: an unknown pattern or suffix, or one file for several pictures."""
    rows = [named(i, picture) for i, picture in enumerate(pictures)]
    plain = output is None or not ("{" in output or "." in os.path.basename(output))  # no pattern, and no suffix
    if output is None or plain or output.endswith(("/", os.sep)) or os.path.isdir(output):
        taken: list[Path] = []
        for row in rows:
            words = [str(row[name]) for name in ("prompt", "seed", "variation") if row[name] is not None]
            taken.append(free_name(Path(output or "out", f"{'-'.join(words)}.png"), {*taken}))
        return taken
    from ldm.images import FORMATS

    try:
        if any("." in (field or "") or "[" in (field or "") for _, field, _, _ in string.Formatter().parse(output)):
            raise ValueError
        found = [Path(output.format(**row)) for row in rows]
    except (KeyError, IndexError, ValueError, AttributeError, TypeError):
        known = ", ".join(f"{{{name}}}" for name in rows[0])
        raise UsageError(
            f"output is {output!r}; what may stand in braces is {known}, for example 'out/{{index:03}}-{{seed}}.png'"
        ) from None
    for path in found:
        choose("image suffix", path.suffix.lower(), FORMATS)
    if len(set(found)) < len(found):
        raise UsageError(
            f"{len(found)} pictures do not fit into {found[0]}; name a folder (out/) or a pattern (out/{{index}}.png)"
        )
    return found


def refuse_taken(paths: Sequence[Path], overwrite: bool) -> None:
    """Nothing is lost unasked: LdmError when a file cannot be written there; where one exists a person at a terminal is
    asked, and anyone else gets a UsageError that names `--overwrite`.
    """
    for path in paths:
        refuse_unwritable(path)
    there = [path for path in paths if os.path.lexists(path)]
    if not there or overwrite:
        return
    what = f"{there[0]} exists" if len(there) == 1 else f"{there[0]} and {len(there) - 1} more files exist"
    if not (sys.stdin.isatty() and terminal()):
        raise UsageError(f"{what}; add --overwrite to replace, or choose another name")
    print(f"{what}; replace? [y/N] ", end="", file=sys.stderr, flush=True)  # typer's question also writes to stdout
    if sys.stdin.readline().strip().lower() not in ("y", "yes"):
        raise typer.Exit(1)
