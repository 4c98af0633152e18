"""What the commands share: options, help texts, lines on stderr, and checks before any work. Imports nothing heavy."""

import os
import sys
import unicodedata
from collections.abc import Callable, Iterable
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ldm.errors import LdmError, UsageError

if TYPE_CHECKING:
    from rich.progress import Progress, ProgressColumn

# Packages that only an extra brings, and the extra.
EXTRAS = {"accelerate": "train", "matplotlib": "train"}

PANEL = "The model and where it runs"  # of help pages
Model = Annotated[
    str | None,
    typer.Option(
        "--model",
        metavar="MODEL",
        help="folder, checkpoint file, or owner/name on the hub; absent = the model in the box",
        rich_help_panel=PANEL,
    ),
]
Device = Annotated[
    str | None,
    typer.Option(
        "--device", metavar="NAME", help="cpu, cuda or cuda:N; absent = cuda if there is one", rich_help_panel=PANEL
    ),
]
Dtype = Annotated[
    str | None,
    typer.Option(
        "--dtype",
        metavar="NAME",
        help="fp32, bf16 or fp16; absent = fp32 on the CPU, bf16 on cuda",
        rich_help_panel=PANEL,
    ),
]


def examples(*lines: str) -> str:
    """The Examples block of a help page."""
    return "\n\n".join(["[bold]Examples[/bold]", *(f"$ {line}".replace("[", r"\[") for line in lines)])


def number(text: str | float) -> float:
    """A parser of options that says what came, for typer's `parser`."""
    try:
        return float(text)
    except ValueError:
        raise typer.BadParameter(f"{text!r} is no number") from None


def whole(low: int | None = None, high: int | None = None) -> Callable[[str | int], int]:
    """The same for whole numbers, from `low` to `high` if they are given."""
    ends = f"from {low} to {high}" if high is not None else f"of at least {low}"

    def parse(text: str | int) -> int:
        try:
            value = int(text)
        except ValueError:
            raise typer.BadParameter(f"{text!r} is no whole number") from None
        if (low is not None and value < low) or (high is not None and value > high):
            raise typer.BadParameter(f"{value} is no whole number {ends}")
        return value

    return parse


def parse_settings(settings: Iterable[str], example: str = "loop.steps=10") -> dict[str, Any]:
    """["loop.steps=10"] -> {"loop.steps": 10}; values are YAML. UsageError, with the example, for what is none."""
    import yaml

    parsed = {}
    for setting in settings:
        key, equals, value = setting.partition("=")
        try:
            parsed[key] = yaml.safe_load(value)
        except yaml.YAMLError:
            equals = ""
        if not key or not equals:
            raise UsageError(f"--set {setting!r} is no KEY=VALUE; write for example --set {example}")
    return parsed


def printable(text: str) -> str:
    """Foreign text as it may go to a terminal: control characters (escapes, directions) are shown, not obeyed."""
    hidden = ("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp")
    return "".join(repr(c)[1:-1] if unicodedata.category(c) in hidden and c not in "\n\u200d" else c for c in text)


def say(text: str) -> None:
    """One line for the person, on stderr: stdout is for what programs read."""
    print(text, file=sys.stderr, flush=True)


def terminal() -> bool:
    """Whether a person watches stderr."""
    return sys.stderr.isatty()


def progress_bar(*columns: "ProgressColumn | str", quiet: bool = False) -> "Progress":
    """A bar on stderr that is gone when it is done; nothing at all where stderr is no terminal, or if quiet."""
    from rich.console import Console
    from rich.progress import Progress

    # What goes to stdout meanwhile is shown above the bar if it is the same terminal, and else must stay on stdout.
    same, silent = sys.stdout.isatty(), quiet or not terminal()
    return Progress(*columns, console=Console(stderr=True), transient=True, redirect_stdout=same, disable=silent)


def needs(*packages: str) -> None:
    """LdmError naming the extra to install, for the first of these packages that is absent."""
    for package in packages:
        if find_spec(package) is None:
            raise LdmError(missing(package))


def missing(package: str) -> str:
    """What to do about a package that is not installed."""
    extra = f"[{EXTRAS[package]}]" if package in EXTRAS else ""
    return f"{package} is not installed, and this command needs it; run: pip install 'ldm-toolkit{extra}'"


def refuse_unwritable(path: Path) -> None:
    """LdmError unless a file can be made at `path`; nothing is touched. Folders that are missing may be made later."""
    folder = path.parent
    while not os.path.exists(folder):
        folder = folder.parent
    if path.is_dir():
        problem = "it is a folder"
    elif not folder.is_dir():
        problem = f"{folder} is not a folder"
    elif not os.access(folder, os.W_OK | os.X_OK):  # also where the file system is mounted read-only
        problem = f"the folder {folder} is not writable"
    else:
        return
    raise LdmError(f"cannot write {path}: {problem}; choose another place with -o")


def free_name(path: Path, taken: "set[Path] | frozenset[Path]" = frozenset()) -> Path:
    """`path`, or with -2, -3 ... before its suffix the first that neither exists nor is in `taken`."""
    found, number = path, 1
    while found in taken or os.path.lexists(found):
        number += 1
        found = path.with_stem(f"{path.stem}-{number}")
    return found
