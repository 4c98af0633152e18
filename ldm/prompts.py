"""Where prompts come from: wildcards, matrices of parts, and files of one prompt a line. Pure functions of text.

The syntax of wildcards is that of A1111's Dynamic Prompts: {red|blue}, {3::red|blue}, __name__; the matrix is A1111's.
"""

import codecs
import json
import math
import os
import random
import re
from bisect import bisect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import fields, replace
from difflib import get_close_matches
from itertools import accumulate
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, NamedTuple

from ldm.adapters.strength import Tag, tags
from ldm.errors import UsageError, choose
from ldm.request import Request

MOST_CHOICES = 1000  # in one prompt: lists that name the next list twice double with every list
DEEPEST = 10  # braces in braces, and lists in lists
MOST_PARTS = 10  # of a matrix: 512 pictures
HEAVIEST = 1e6
SHOWN = 60  # characters of a prompt in a message
TOKEN = re.compile(
    r"\\[{}|]|[{}|]|__(?P<name>[^\s_{}|\\](?:(?:(?!__)[^{}|\\\n]){0,200}[^\s_{}|\\])?)__|[^\\{}|_]+|.", re.S
)
ESCAPED = ("\\{", "\\}", "\\|")
WEIGHT = re.compile(r"\s*([+-]?\.?\d[\d.]*)::", re.ASCII)
OTHER_SYNTAX = re.compile(r"(?<!\\)\{\s*[\d-]*\$\$|\$\{", re.ASCII)  # {2$$a|b} picks several, ${x=a} is a variable
HALF_A_PAIR = re.compile("[\ud800-\udfff]")  # JSON can write it, UTF-8 cannot
FIELDS = {f.name: f.name for f in fields(Request)} | {
    f.metadata["flag"]: f.name for f in fields(Request) if f.metadata["flag"]
}  # what a line of jsonl may say -> the field of Request


class _List(NamedTuple):
    """A choice among the lines of a wildcard's file."""

    name: str


class _Braces(NamedTuple):
    """A choice among alternatives, by weight."""

    weights: list[float]
    alternatives: "list[_Pieces]"


_Pieces = list[str | _List | _Braces]


def asked(order: Request) -> list[tuple[Tag, ...]]:
    """What each prompt of a request says of adapters. UsageError: a faulty tag, or one in a negative prompt."""
    if order.plain:
        return []
    if any(tags(text)[1] for text in order.negative_prompts):
        raise UsageError("a negative prompt names an adapter, which works on the whole picture; put it in the prompt")
    return [tags(prompt)[1] for prompt in order.prompts]


def untagged(order: Request) -> Request:
    """The request with prompts that name no adapters."""
    return order if order.plain else replace(order, prompt=tuple(tags(prompt)[0] for prompt in order.prompts))


def expand(text: str, seed: int, wildcards: Mapping[str, Sequence[str]]) -> str:
    r"""`text` with every choice in it made: {red|blue} is one of both, {3::red|blue} the first three times as often,
    __name__ one of wildcards["name"]; alternatives and lines may hold choices again. \{ \} \| stand for themselves, and
    a text without any of these comes back unchanged.

    The n-th choice, in reading order, follows the n-th number of Python's generator seeded with `seed`, so that other
    words beside it change nothing. UsageError: braces that do not match, a weight that is none, an unknown or empty
    wildcard, wildcards that name each other in a circle, choices nested more than 10 deep or more than 1000.
    """
    numbers = random.Random(seed)
    return _expanded(text, (numbers.random() for _ in range(MOST_CHOICES)), wildcards, ())


def _expanded(
    text: str, numbers: Iterator[float], wildcards: Mapping[str, Sequence[str]], inside: tuple[str, ...]
) -> str:
    """inside: the wildcards that this text is a line of, the outermost first."""
    where = f"a line of the wildcard {inside[-1]!r}" if inside else "the prompt"
    return "".join(_chosen(_parsed(text, where), numbers, wildcards, inside))


def _chosen(
    pieces: _Pieces, numbers: Iterator[float], wildcards: Mapping[str, Sequence[str]], inside: tuple[str, ...]
) -> Iterator[str]:
    """The pieces as text, choices made."""
    for piece in pieces:
        if isinstance(piece, str):
            yield piece
            continue
        number = next(numbers, None)
        if number is None:
            raise UsageError(
                f"the prompt has more than {MOST_CHOICES} choices, those of its wildcards counted; use fewer"
            )
        if isinstance(piece, _Braces):
            sums = list(accumulate(piece.weights))
            pick = bisect(sums, number * sums[-1], hi=len(sums) - 1)
            yield from _chosen(piece.alternatives[pick], numbers, wildcards, inside)
        else:
            lines = _lines_of(piece.name, wildcards, inside)
            line = lines[int(number * len(lines))]
            yield _expanded(line, numbers, wildcards, (*inside, piece.name))


def _lines_of(name: str, wildcards: Mapping[str, Sequence[str]], inside: tuple[str, ...]) -> Sequence[str]:
    """The lines of a wildcard. UsageError: unknown, empty, in a circle or too deep."""
    if name not in wildcards:
        near = get_close_matches(name, wildcards, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]!r}?" if near else f"give a folder of wildcards that has {name}.txt"
        raise UsageError(f"unknown wildcard {name!r}, {len(wildcards)} are known; {hint}")
    if not wildcards[name]:
        raise UsageError(f"the wildcard {name!r} is empty; write its choices into its file, one a line")
    if name in inside:
        raise UsageError(f"the wildcards {' -> '.join((*inside, name))} go in a circle; take one of them out")
    if len(inside) >= DEEPEST:
        raise UsageError(f"the wildcards {' -> '.join((*inside, name))} are more than {DEEPEST} deep; use fewer")
    return wildcards[name]


def _tokens(text: str, where: str) -> Iterator[tuple[re.Match[str], int]]:
    """The parts of a text that mean something, each with the number of braces it stands in. UsageError: braces that do
    not match, or are too deep.
    """
    opened: list[int] = []
    shown = text if len(text) <= SHOWN else f"{text[:SHOWN]}..."
    for match in TOKEN.finditer(text):
        if match[0] == "}":
            if not opened:
                place = f"the }} at character {match.start() + 1} of {where} {shown!r}"
                raise UsageError(f"{place} closes nothing; write \\}} for a brace that is meant as such")
            opened.pop()
        yield match, len(opened)
        if match[0] == "{":
            opened.append(match.start())
            if len(opened) > DEEPEST:
                raise UsageError(f"{where} {shown!r} has braces more than {DEEPEST} deep; use fewer")
    if opened:
        place = f"the {{ at character {opened[-1] + 1} of {where} {shown!r}"
        raise UsageError(f"{place} is never closed; close it, or write \\{{ for a brace that is meant as such")


def _parsed(text: str, where: str) -> _Pieces:
    """The text as pieces."""
    if other := OTHER_SYNTAX.search(text):
        meant = "only one choice of several is understood, {a|b}; write \\{ for a brace that is meant as such"
        raise UsageError(f"{where} has {other[0]!r}; {meant}")
    levels: list[list[_Pieces]] = [[[]]]  # the alternatives so far of the braces we are in; the text itself has one
    for match, depth in _tokens(text, where):
        token = match[0]
        if token == "{":
            levels.append([[]])
        elif token == "}":
            braces = _weighed(levels.pop(), where)
            levels[-1][-1].append(braces)
        elif token == "|" and depth:
            levels[-1].append([])
        else:
            name = match["name"]
            levels[-1][-1].append(_List(name) if name else token[1:] if token in ESCAPED else token)
    return levels[0][0]


def _weighed(alternatives: list[_Pieces], where: str) -> _Braces:
    """The alternatives of braces without the weights written before them. UsageError: no such weight, or all zero."""
    weights = []
    for pieces in alternatives:
        match = WEIGHT.match(pieces[0]) if pieces and isinstance(pieces[0], str) else None
        weights.append(_weight(match[1], where) if match else 1.0)
        if match:
            pieces[0] = match.string[match.end() :]
    if not any(weights):
        raise UsageError(f"{where} has braces whose weights are all 0, so that nothing can be chosen; raise one")
    return _Braces(weights, alternatives)


def _weight(text: str, where: str) -> float:
    weight = float(text) if text.count(".") <= 1 else math.nan
    if not 0 <= weight <= HEAVIEST:
        raise UsageError(f"{where} has the weight {text}; it must be a number from 0 to {HEAVIEST:,.0f}")
    return weight


def read_wildcards(folder: str | Path) -> dict[str, tuple[str, ...]]:
    """The lines of every *.txt below a folder, by its name without suffix: "colours", "animals/small".

    Blank lines and lines that begin with # are left out; links that lead out of the folder are not followed.
    UsageError: no such folder, a file that cannot be read, or, with its line, is not UTF-8.
    """
    root = Path(folder)
    if not root.is_dir():
        raise UsageError(f"{folder} is not a folder; name the folder of wildcards, which holds a .txt for each")
    inside = root.resolve()
    paths = sorted(Path(top, name) for top, _, names in os.walk(root) for name in names if name.endswith(".txt"))
    return {
        path.relative_to(root).as_posix().removesuffix(".txt"): tuple(_choices(path))
        for path in paths
        if path.is_file() and path.resolve().is_relative_to(inside)
    }


def _choices(path: Path) -> Iterator[str]:
    """The lines of a wildcard's file."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UsageError(f"cannot read the wildcards in {path}: {error.strerror}") from None
    for number, raw in enumerate(data.removeprefix(codecs.BOM_UTF8).split(b"\n"), 1):
        try:
            line = raw.decode("utf-8").strip()
        except UnicodeDecodeError:
            raise UsageError(f"{path}, line {number}: this is not UTF-8 text; save the file as UTF-8") from None
        if line and not line.startswith("#"):
            yield line


def matrix(text: str) -> list[str]:
    """A1111's prompt matrix: "a taco|on fire|at night" is "a taco", "a taco, on fire", "a taco, at night" and
    "a taco, on fire, at night": part i after the first is in combination k where bit i of k is set.

    A | in braces, or written as \\|, separates nothing; `expand` comes after this. UsageError: more than 10 parts, an
    empty one, braces that do not match.
    """
    parts = [""]
    for match, depth in _tokens(text, "the prompt"):
        if match[0] == "|" and not depth:
            parts.append("")
        else:
            parts[-1] += match[0]
    if len(parts) == 1:
        return [text]
    if len(parts) > MOST_PARTS:
        pictures = f"{2 ** (len(parts) - 1):,}" if len(parts) <= 64 else f"2^{len(parts) - 1}"
        raise UsageError(f"{len(parts)} parts of a prompt are {pictures} pictures; give at most {MOST_PARTS} parts")
    first, *rest = (part.strip().strip(",").strip() for part in parts)
    if not all((first, *rest)):
        raise UsageError("a part of the prompt's matrix is empty; put words on both sides of every |")
    return [", ".join([first, *(part for i, part in enumerate(rest) if k >> i & 1)]) for k in range(1 << len(rest))]


def read_prompts(
    lines: Iterable[str],
    kind: Literal["txt", "jsonl"],
    where: str,
    base: Mapping[str, Any] = MappingProxyType({}),
    names: Mapping[str, str] = FIELDS,
) -> Iterator[dict[str, Any]]:
    """The fields of Request that each line says, one after the other: a file may be longer than the memory.

    txt: a line is a prompt; lines that begin with # are left out. jsonl: a line is a JSON object of fields of Request,
    also by the short names of their flags (steps, guidance, negative, n), with at least a prompt. Blank lines are left
    out. base: fields that are said elsewhere and hold for every line that does not say them. names: what a line may
    say -> the field of Request. UsageError names `where`, the line, and what is wrong with it.
    """
    read = READERS[choose("kind of prompts", kind, READERS)]
    number = 0
    try:
        for number, line in enumerate(lines, 1):  # noqa: B007  # the messages want it
            text = line.removeprefix("\ufeff").strip()  # a byte order mark at the start
            if text and (options := read(text, names)) is not None:
                yield _checked(options, base)
    except UnicodeDecodeError:  # of a file that is decoded as it is read, some lines ahead
        raise UsageError(f"{where} is not UTF-8 text some way after line {number}; save it as UTF-8") from None
    except (UsageError, OverflowError) as error:  # the latter of whole numbers beyond every float
        raise UsageError(f"{where}, line {number}: {error}") from error


def _from_text(line: str, names: Mapping[str, str]) -> dict[str, Any] | None:
    return None if line.startswith("#") else {"prompt": line}


def _from_json(line: str, names: Mapping[str, str]) -> dict[str, Any]:
    try:
        found = json.loads(line, object_pairs_hook=_unique, parse_constant=_no_number)
    except UsageError:
        raise
    except json.JSONDecodeError as error:
        raise UsageError(f"this is not JSON ({error.msg}, column {error.colno}); write one object a line") from None
    except (ValueError, RecursionError):
        raise UsageError("this JSON has a number that is too long, or is nested too deep; write it shorter") from None
    if not isinstance(found, dict):
        raise UsageError('this is no JSON object; write for example {"prompt": "an owl", "steps": 30}')
    return _unique([(names[choose("field", name, names)], value) for name, value in found.items()])


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object's members. UsageError for a name that comes twice, which json itself lets pass."""
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise UsageError(f"{name!r} is said twice; say it once")
        found[name] = value
    return found


def _no_number(text: str) -> None:
    raise UsageError(f"{text} is no number; write a number, or leave the field out")


def _checked(options: dict[str, Any], base: Mapping[str, Any]) -> dict[str, Any]:
    """The options, if a Request can be made of them over the base. UsageError otherwise."""
    if HALF_A_PAIR.search(json.dumps(options, ensure_ascii=False)):
        raise UsageError(
            "there is half a surrogate pair (\\ud800 to \\udfff) in it, which is no character; take it out"
        )
    if not Request(**{**base, **options}).prompts:
        raise UsageError('there is no prompt; say "prompt": "an owl"')
    return options


READERS: dict[str, Callable[[str, Mapping[str, str]], dict[str, Any] | None]] = {"txt": _from_text, "jsonl": _from_json}
