"""How strongly each word of a prompt is said, and how a prompt of any length is cut into windows of the encoder.

The syntax and the cuts are A1111's (stable-diffusion-webui, modules/prompt_parser.py and sd_hijack_clip.py). Nothing
here knows of tensors; ldm.text.encoder multiplies.
"""

import re
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

from ldm.errors import UsageError

TOKEN = re.compile(r"\\[()\[\]\\]?|[(\[]|:\s*([+-]?(?:\d+(?:\.\d*)?|\.\d+))\s*\)|[)\]]|[^\\()\[\]:]+|:")
BREAK = re.compile(r"\bBREAK\b")
ROUND, SQUARE = 1.1, 1 / 1.1  # what a pair of brackets multiplies by
DEEPEST = 64  # brackets in brackets: 1.1^64 is 446
STRONGEST = 1000.0  # of all weights, of either sign
BACKTRACK = 20  # tokens at the end of a window among which a comma draws the cut to itself

Chunk = list[tuple[int, float]]
"""What one window holds between its two special tokens: ids and their weights."""


class Piece(NamedTuple):
    """Text that is tokenised by itself, and the weight of its tokens. begins: it opens a new window."""

    text: str
    weight: float = 1.0
    begins: bool = False


def weighted(prompt: str) -> tuple[Piece, ...]:
    r"""The pieces of a prompt, at least one. (a) is 1.1, [a] 1 / 1.1, (a:1.3) 1.3, nested ones multiply; \( \) \[ \] \\
    are the characters themselves; BREAK opens a new window. A bracket that is never closed reaches to the end; a
    closing one alone, and a weight that is no number, are text. Neighbours of one weight are one piece.

    A1111's parse_prompt_attention, but for two faults: there `(a:1.1.1)` raises, and a BREAK in brackets is a word.
    UsageError: brackets more than 64 deep, or a weight beyond 1000.
    """
    texts: list[tuple[str, bool]] = []
    weights: list[float] = []
    opened: dict[str, list[int]] = {"(": [], "[": []}  # the numbers of the texts before which one stands open

    def multiply(start: int, factor: float) -> None:
        weights[start:] = [weight * factor for weight in weights[start:]]

    for match in TOKEN.finditer(prompt):
        token, number = match.group(), match[1]
        if token in opened:
            opened[token].append(len(texts))
            if sum(map(len, opened.values())) > DEEPEST:
                raise UsageError(
                    f"the prompt {prompt!a:.60} has brackets more than {DEEPEST} deep; close some, or put \\ before "
                    "those that are text"
                )
        elif number is not None and opened["("]:
            multiply(opened["("].pop(), float(number))
        elif token == ")" and opened["("]:
            multiply(opened["("].pop(), ROUND)
        elif token == "]" and opened["["]:
            multiply(opened["["].pop(), SQUARE)
        else:
            texts += _broken(token[1:] if token[0] == "\\" else token)
            weights += [1.0] * (len(texts) - len(weights))
    for start in opened["("]:
        multiply(start, ROUND)
    for start in opened["["]:
        multiply(start, SQUARE)
    return _merged(texts, weights)


def joined(pieces: Iterable[Piece]) -> str:
    """The text alone, for an encoder of one window."""
    return "".join(f" {piece.text}" if piece.begins else piece.text for piece in pieces)


def chunks(
    pieces: Iterable[Piece], words: Callable[[str], Sequence[Sequence[int]]], room: int, comma: int | None
) -> list[Chunk]:
    """The windows that the pieces fill, each of at most `room` tokens; at least one, which may be empty.

    words: text -> the ids of each part that is never divided: one, or the several of a learned word. comma: its id.
    Where a window is full, what follows a comma among its last 20 tokens moves to the next one. A1111's tokenize_line.
    """
    done: list[Chunk] = []
    chunk: Chunk = []
    last = -1  # the place of the last comma in the window
    for piece in pieces:
        if piece.begins:
            done.append(chunk)
            chunk, last = [], -1
        for ids in words(piece.text):
            if list(ids) == [comma]:
                last = len(chunk)
            elif len(chunk) == room and last >= 0 and room - last <= BACKTRACK:
                done.append(chunk[: last + 1])
                chunk, last = chunk[last + 1 :], -1
            if len(chunk) + len(ids) > room:
                done.append(chunk)
                chunk, last = [], -1
            chunk += [(index, piece.weight) for index in ids]
    return [*done, chunk] if chunk or not done else done


def _broken(text: str) -> list[tuple[str, bool]]:
    """A text at its BREAKs, which take the white space around them along, and whether each part follows one."""
    if "BREAK" not in text:
        return [(text, False)]
    parts = BREAK.split(text)
    for i in range(1, len(parts)):
        parts[i - 1], parts[i] = parts[i - 1].rstrip(), parts[i].lstrip()
    return [(part, i > 0) for i, part in enumerate(parts)]


def _merged(texts: Sequence[tuple[str, bool]], weights: Sequence[float]) -> tuple[Piece, ...]:
    """Neighbours of one weight as one piece, up to a BREAK. UsageError for a weight that is too large."""
    groups: list[tuple[list[str], float, bool]] = []
    for (text, begins), weight in zip(texts, weights, strict=True):
        if groups and not begins and weight == groups[-1][1]:
            groups[-1][0].append(text)
        else:
            groups.append(([text], weight, begins))
    pieces = tuple(Piece("".join(parts), weight, begins) for parts, weight, begins in groups)
    for piece in pieces:
        if not abs(piece.weight) <= STRONGEST:
            fault = f"the weight of {piece.text!a:.60} in the prompt is {piece.weight:g}"
            raise UsageError(f"{fault}; give one from {-STRONGEST:g} to {STRONGEST:g}")
    return pieces or (Piece(""),)
