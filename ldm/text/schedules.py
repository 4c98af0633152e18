"""What of a prompt is said when: `[from:to:when]`, `[one|another]`, and parts joined by AND.

The syntax is A1111's (stable-diffusion-webui, modules/prompt_parser.py): `when` with a point is a share of the steps
(`[cat:dog:0.5]`), without one a number of steps; `[to:when]` adds and `[from::when]` takes away; `[a|b]` changes with
every step. All of it nests. What is no such form, and a bracket without its other half, is text. Backslashes quote, and
stay for ldm.text.weighting to take away. Prompts come from strangers: nothing here recurses, and the time grows with
the length of the prompt, times the steps at which something changes.
"""

import re
from typing import NamedTuple

from ldm.errors import UsageError
from ldm.text.weighting import STRONGEST

TOKEN = re.compile(r"\\.|[^\\\[\]():|]+|.", re.DOTALL)
NUMBER = re.compile(r"\s*([+-]?(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][+-]?[0-9]+)?)\s*")
OPENERS = {")": "(", "]": "["}
AND = re.compile(r"\bAND\b")
MOST_PARTS = 64  # each is a call of the network in every step
WEIGHT = re.compile(r"\s*([+-]?(?:[0-9]+\.?|[0-9]*\.[0-9]+))\s*")


class Change(NamedTuple):
    """[before:after:until]: `before` in the first `until` steps, then `after`."""

    before: "list[Node]"
    after: "list[Node]"
    until: int


class Turns(NamedTuple):
    """[one|another|...]: one after the other, a step each, over and over."""

    options: "list[list[Node]]"


Node = str | Change | Turns | list["Node"]
"""A piece of a prompt: text, a form, or a bracketed group of such pieces."""


def acts(prompt: str, steps: int) -> tuple[tuple[int, str], ...]:
    """The text of each stretch of a run of `steps`, as (until, text): said in the steps before number `until`, which
    rises and ends at `steps`. A1111's get_learned_conditioning_prompt_schedules.
    """
    said = _parsed(prompt, steps)
    return tuple((end, _text(said, end)) for end in sorted(_ends(said, steps)))


def composed(prompt: str) -> tuple[tuple[str, float], ...]:
    """The parts that AND joins, each with the weight of its direction: "a AND b :0.5" -> ("a", 1), ("b", 0.5).

    Composed as in Liu et al. 2022, eq. 11: unconditional + guidance * sum of weight * (part - unconditional). A1111's
    get_multicond_prompt_list: a weight is read at the end of a prompt of one part, too. UsageError: more than 64 parts,
    or a weight beyond 1000.
    """
    found = []
    for part in AND.split(prompt):
        text, colon, end = part.rpartition(":")
        number = WEIGHT.fullmatch(end) if colon else None
        found.append((text.rstrip(), float(number[1])) if number else (part.rstrip(), 1.0))
    if len(found) > MOST_PARTS:
        raise UsageError(f"the prompt {prompt!a:.60} has {len(found)} parts joined by AND; give at most {MOST_PARTS}")
    for text, weight in found:
        if abs(weight) > STRONGEST:
            raise UsageError(f"the weight of {text!a:.60} is {weight:g}; give one from {-STRONGEST:g} to {STRONGEST:g}")
    return tuple(found)


def _parsed(prompt: str, steps: int) -> list[Node]:
    """A prompt as text and forms. In a form everything is balanced; what cannot be read so is text, and so are the
    brackets that are open around it.
    """
    said: list[Node] = []
    opened: list[list[Node]] = [said]  # the prompt itself, then the groups that are open, each begun by its bracket
    for token in TOKEN.findall(prompt):
        if token in ("(", "["):
            opened.append([token])
        elif token in OPENERS:
            group = _closed(opened[-1], token, steps) if len(opened) > 1 else None
            if group is None:
                for stray in opened[1:]:
                    said.extend(stray)
                del opened[1:]
            else:
                opened.pop()
            opened[-1].append(token if group is None else group)
        else:
            opened[-1].append(token)
    for stray in opened[1:]:
        said.extend(stray)
    return said


def _closed(group: list[Node], closer: str, steps: int) -> Node | None:
    """What an open group is once it is closed; None if it is nothing that could be."""
    if group[0] != OPENERS[closer]:
        return None
    colons = group.count(":")
    if closer == ")":
        return [*group, closer] if colons < 2 else None
    *texts, when = _split(group[1:], ":")
    number = NUMBER.fullmatch(when[0]) if len(when) == 1 and isinstance(when[0], str) else None
    if colons in (1, 2) and number:
        return Change(texts[0] if colons == 2 else [], texts[-1], _until(number[1], steps))
    if colons:
        return None
    options = _split(group[1:], "|")
    return Turns(options) if len(options) > 1 else [*group, closer]


def _split(nodes: list[Node], separator: str) -> list[list[Node]]:
    fields: list[list[Node]] = [[]]
    for node in nodes:
        if node == separator:
            fields.append([])
        else:
            fields[-1].append(node)
    return fields


def _until(when: str, steps: int) -> int:
    """The number of steps that `when` says: a share of them if it has a point."""
    value = float(when) * (steps if "." in when else 1)
    return int(min(max(value, 0), steps))


def _ends(said: list[Node], steps: int) -> set[int]:
    """The steps before which something changes, also in what is not said then."""
    ends, rest = {steps}, list(said)
    while rest:
        node = rest.pop()
        if isinstance(node, Change):
            rest += node.before + node.after
            ends |= {node.until} - {0}
        elif isinstance(node, Turns):
            rest += node.options
            ends |= set(range(1, steps))
        elif isinstance(node, list):
            rest += node
    return ends


def _text(said: list[Node], step: int) -> str:
    """The text in a step, counted from 1."""
    words, rest = [], said[::-1]
    while rest:
        node = rest.pop()
        if isinstance(node, str):
            words.append(node)
        elif isinstance(node, Change):
            rest += (node.before if step <= node.until else node.after)[::-1]
        elif isinstance(node, Turns):
            rest += node.options[(step - 1) % len(node.options)][::-1]
        else:
            rest += node[::-1]
    return "".join(words)
