"""What can go wrong, said in one sentence: what came, what is allowed, what to do."""

from collections.abc import Iterable
from difflib import get_close_matches


class LdmError(Exception):
    """A failure we can name. The command line prints its text and exits with `exit_code`."""

    exit_code = 1

    def __init__(self, text: object = "") -> None:
        shown = "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in str(text))
        super().__init__(shown)  # names in files can hold codes that would act on a terminal


class UsageError(LdmError, ValueError):
    """The request itself is wrong (a value out of range, an unknown name); nothing was begun."""

    exit_code = 2


class ModelError(LdmError):
    """A model folder or weights file is missing, incomplete, damaged or of another kind."""


class NumericalError(LdmError):
    """A computation left the finite numbers; no picture is made of it."""


def choose(kind: str, name: str, known: Iterable[str]) -> str:
    """`name` if it is one of `known`; else a UsageError that offers the nearest.

    `kind` is the noun for the message ("scheduler", "field of train.yaml").
    """
    options = list(known)
    if name in options:
        return name
    near = get_close_matches(name.lower(), options, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]!r}? " if near else ""
    raise UsageError(f"unknown {kind} {name!r}; {hint}known: {', '.join(options)}")
