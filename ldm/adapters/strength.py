"""How strongly an adapter is applied, where and when; and how that is written: in words, in a prompt, behind a file.

    0.8                         everywhere and always
    0.8:0.5, te=0.8:unet=0.5    the text encoders, the U-Net (A1111's order and names)
    0@0,1@0.5,0@1               weight@place in the run, linear in between (sd-webui-loractl's)
    mid_block=0.5               half of it there: a module path, of the U-Net unless it begins with text_encoder
    lbw=0,1,1,...               12, 17, 20 or 26 factors of blocks (sd-webui-lora-block-weight's)

Parts are put together with colons, in any order but for the first two. Nothing here imports torch.
"""

import re
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

from ldm.errors import UsageError, choose

LARGEST = 100.0  # of a weight or factor, either way; past a few times 1 pictures are noise
LATEST = 1000.0  # step, as many as a run may have
LONGEST_NAME = 200
SHOWN = 60  # characters of a text in a message
TEXT_ENCODERS = ("text_encoder", "text_encoder_2")
UNET_PARTS = ("down_blocks", "mid_block", "up_blocks", "conv_in", "conv_norm_out", "conv_out", "time_embedding",
              "add_embedding", "class_embedding")  # fmt: skip
WEIGHTS = {"te": "te", "text": "te", "unet": "unet"}
NUMBER = re.compile(r"[+-]?(?:\d+(?:\.\d*)?|\.\d+)(?:[eE][+-]?\d{1,3})?", re.ASCII)
PATH = re.compile(r"\w+(?:\.\w+)*", re.ASCII)
TAG = re.compile(r"<(lora|lyco):([^>]*)>")
OPENED = re.compile(r"<(?:lora|lyco):")
NAME = re.compile(r"[^/\\<>]+")

BLOCKS = ("BASE", *(f"IN{i:02}" for i in range(12)), "M00", *(f"OUT{i:02}" for i in range(12)))
SDXL = (*(f"IN{i:02}" for i in range(9)), "M00", *(f"OUT{i:02}" for i in range(9)))
LISTS: dict[int, tuple[str, ...]] = {  # how many factors -> the blocks they are for
    12: ("BASE", "IN04", "IN05", "IN07", "IN08", "M00", *SDXL[10:16]),
    17: ("BASE", "IN01", "IN02", "IN04", "IN05", "IN07", "IN08", "M00", *BLOCKS[17:]),
    20: ("BASE", *SDXL),
    26: BLOCKS,
}
"""Those of sd-webui-lora-block-weight: SDXL's blocks with attention, Stable Diffusion's, all of SDXL, all of Stable
Diffusion. There as here, blocks that a list does not have get 0."""

Points = tuple[tuple[float, float], ...]


def _paths(block: str) -> tuple[str, ...]:
    """The module paths of one of BLOCKS, which count through the U-Net of CompVis' code: three blocks a level, of two
    layers and what changes the size on the way down, of three layers on the way up.
    """
    if block in ("BASE", "IN00", "M00"):
        return {"BASE": TEXT_ENCODERS, "IN00": ("unet.conv_in",), "M00": ("unet.mid_block",)}[block]
    down = block.startswith("IN")
    level, layer = divmod(int(block[-2:]) - down, 3)
    blocks = f"unet.{'down' if down else 'up'}_blocks.{level}"
    layers = (f"{blocks}.resnets.{layer}", f"{blocks}.attentions.{layer}")
    samplers = (f"{blocks}.{'down' if down else 'up'}samplers",) if layer == 2 else ()
    return samplers if down and samplers else (*layers, *samplers)


@dataclass(frozen=True)
class Factors:
    """How strongly an adapter is applied at one moment. blocks: those of Strength."""

    unet: float
    text: float
    blocks: tuple[tuple[str, float], ...] = ()

    @cached_property
    def _of_block(self) -> dict[str, float]:
        return dict(self.blocks)

    def of(self, address: str) -> float:
        """The strength for the module at `address` (of ldm.adapters.adapter.Adapter): that of its network, times the
        factor of the longest path in blocks that it is or lies in.
        """
        weight = self.text if address.split(".", 1)[0] in TEXT_ENCODERS else self.unet
        path = address
        while self.blocks and path:
            if path in self._of_block:
                return weight * self._of_block[path]
            path = path.rpartition(".")[0]
        return weight


@dataclass(frozen=True)
class Strength:
    """How strongly an adapter is applied, where and when.

    unet: points (place, weight), by place; linear in between and constant outside. Places are shares of the run, 0 to
    1; where the last is beyond 1 they are numbers of steps, the first step being 0 (loractl's rule). One point, at 0,
    is a constant. text: the weight for the text encoders, whose work is done before the run. blocks: (address, factor)
    of modules and all that lies in them, by address. Weights and factors are from -100 to 100. UsageError: others.

    A point that shares its place with the one before is a jump: from there on the later one holds.
    """

    unet: Points = ((0.0, 1.0),)
    text: float = 1.0
    blocks: tuple[tuple[str, float], ...] = ()

    def __post_init__(self) -> None:
        points = tuple(sorted(((_place(t), _weight(w)) for t, w in self.unet), key=lambda point: point[0]))
        if not points:
            raise UsageError("the strength of an adapter has no points; give one at least, for example (0, 0.8)")
        constant = len({weight for _, weight in points}) == 1
        object.__setattr__(self, "unet", ((0.0, points[0][1]),) if constant else points)
        object.__setattr__(self, "text", _weight(self.text))
        blocks = {_address(path): _weight(factor) for path, factor in self.blocks}
        object.__setattr__(self, "blocks", tuple(sorted(blocks.items())))

    @classmethod
    def of(cls, value: "float | str | Mapping[str, float | str] | Strength") -> "Strength":
        """A number for everything, a text as `parse` reads it, or a mapping of what a text names to numbers or texts:
        {"text": 0.8, "unet": "0@0,1@0.5", "down_blocks.2": 0}.
        """
        if isinstance(value, Strength):
            return value
        if isinstance(value, Mapping):
            return _strength({str(key): str(given) for key, given in value.items()})
        return cls.parse(str(value))

    @classmethod
    def parse(cls, text: str) -> "Strength":
        """The strength that a text says (see above).

        A1111's rules: the text encoders have te, else the first weight without a name, else 1; the U-Net has unet, else
        the second weight without a name, else what the text encoders have (so 0.8:te=0 is 0 everywhere). Of weights
        over the run the text encoders get the one at the beginning. Points stand between commas or semicolons; one
        without a place is at 1. UsageError: what is none of this, or is said twice.
        """
        named, plain = dict[str, str](), list[str]()
        for part in text.split(":"):
            key, equals, value = (word.strip() for word in part.partition("="))
            if not equals:
                plain.append(key)
            elif key in named:
                raise UsageError(f"the strength {_shown(text)} says {_shown(key)} twice; say it once")
            else:
                named[key] = value
        if len(plain) > 2:
            raise UsageError(
                f"the strength {_shown(text)} has {len(plain)} parts without a name; there are two, for the text "
                f"encoders and for the U-Net (A1111's third, a smaller rank, is not understood)"
            )
        return _strength(dict(zip(("te", "unet"), plain, strict=False)) | named)

    def at(self, share: float, steps: int | None = None) -> Factors:
        """The strengths at a share of the run: step i of n, counted from 0, is at i / (n - 1), so that the first step
        has the weight at 0 and the last the weight at 1. steps: n, needed where places are numbers of steps.
        """
        return Factors(self._weight_at(share, steps), self.text, self.blocks)

    def _weight_at(self, share: float, steps: int | None) -> float:
        places = [place for place, _ in self.unet]
        if len(places) > 1 and places[-1] > 1:
            if steps is None:
                raise UsageError(f"the strength {self} counts steps, and nothing is said of how many there are")
            share = round(share * (steps - 1), 6)  # rounded, so that a jump at step i is there at step i
        after = bisect_right(places, share)
        if after in (0, len(places)):
            return self.unet[max(after - 1, 0)][1]
        (begin, first), (end, last) = self.unet[after - 1 : after + 1]
        return first + (last - first) * (share - begin) / (end - begin)

    def __str__(self) -> str:
        """A text that parses to the same, without what goes without saying. Without points and blocks it is one that
        A1111 takes.
        """
        weights = ",".join(_points_shown(self.unet))
        beginning = self._weight_at(0.0, 1)
        whole = weights if beginning == self.text else f"{_number(self.text)}:{weights}"
        blocks = [_listed(self.blocks)] if _listed(self.blocks) else [
            f"{path.removeprefix('unet.')}={_number(factor)}" for path, factor in self.blocks
        ]  # fmt: skip
        return ":".join(blocks if blocks and whole == "1" else [whole, *blocks])


class Tag(NamedTuple):
    """What <lora:NAME:STRENGTH> in a prompt says."""

    name: str
    strength: Strength


def tags(prompt: str) -> tuple[str, tuple[Tag, ...]]:
    """The prompt without its <lora:...> and <lyco:...>, and what they say, in order.

    As in A1111 (modules/extra_networks.py) a tag goes from "<" to the next ">" and leaves nothing behind: spaces on
    both sides of it stay. Without a strength it is 1. UsageError: a tag without a name, with a name that could be of
    another folder, with a strength that is none, that is never closed, or a name twice.
    """
    closed = prompt[: prompt.rfind(">") + 1]  # so that the search never runs to the end in vain
    found = [_tag(match[0], match[2]) for match in TAG.finditer(closed)]
    words = TAG.sub("", closed) + prompt[len(closed) :]
    if (opened := OPENED.search(prompt, len(closed))) is not None:
        raise UsageError(f"the tag {_shown(prompt[opened.start() :])} is never closed; close it with >")
    name, count = Counter(tag.name for tag in found).most_common(1)[0] if found else ("", 1)
    if count > 1:
        raise UsageError(f"the prompt has the adapter {_shown(name)} {count} times; say once how strong it is")
    return words, tuple(found)


def _tag(whole: str, said: str) -> Tag:
    """A tag from what stands between <lora: and >."""
    name, colon, strength = (word.strip() for word in said.partition(":"))
    if not NAME.fullmatch(name) or not name.isprintable() or name.startswith(".") or len(name) > LONGEST_NAME:
        raise UsageError(
            f"the tag {_shown(whole)} names no adapter; write the name of its file without folder and ending, "
            f"for example <lora:ink:0.8>"
        )
    try:
        return Tag(name, Strength.parse(strength if colon else "1"))
    except UsageError as error:
        raise UsageError(f"in the tag {_shown(whole)}: {error}") from None


def file_option(text: str) -> tuple[Path, Strength | None]:
    """FILE[:STRENGTH] as path and strength, None where none is said. Names may hold colons: the file is the longest
    beginning, up to a colon or the end, that is there or ends in .safetensors; without one, what stands before the
    first colon. UsageError: no file is named, or the strength is none.
    """
    ends = [len(text), *(i for i in range(len(text) - 1, -1, -1) if text[i] == ":")]
    known = (end for end in ends if text[:end].endswith(".safetensors") or (end and _exists(text[:end])))
    end = next(known, ends[-1])
    if not text[:end]:
        raise UsageError(f"{_shown(text)} names no file; write FILE or FILE:STRENGTH, for example ink.safetensors:0.8")
    return Path(text[:end]), Strength.parse(text[end + 1 :]) if end < len(text) else None


def _exists(path: str) -> bool:
    try:
        return Path(path).exists()
    except (OSError, ValueError):  # too long for a name, or with a character that no name has
        return False


def _strength(named: Mapping[str, str]) -> Strength:
    """A strength from its parts by name: those of WEIGHTS, lbw, and module paths."""
    weights = dict[str, Points]()
    factors = _factors(named["lbw"]) if "lbw" in named else {}
    for key, value in named.items():
        if key in WEIGHTS:
            weights[WEIGHTS[key]] = tuple(_points(value))
        elif key != "lbw":
            factors[_address(key)] = _parsed(value)
    text = weights.get("te", ((0.0, 1.0),))
    beginning = Strength(text).at(0.0, 1).unet
    return Strength(weights.get("unet", text), beginning, tuple(factors.items()))


def _points(text: str) -> Iterator[tuple[float, float]]:
    """The points of a schedule in loractl's syntax, or of a number."""
    parts = [part.partition("@") for part in re.split("[,;]", text)]
    if len(parts) > 1 and not parts[0][1]:
        raise UsageError(
            f"{_shown(text)} begins with a weight without a place; write weight@share of the run, such as 0@0,1@0.5"
        )
    for weight, at, place in parts:
        yield (_parsed(place) if at else float(len(parts) > 1)), _parsed(weight)


def _factors(text: str) -> dict[str, float]:
    """The factors by path of a list of block weights."""
    values = text.split(",")
    if len(values) not in LISTS:
        counts = ", ".join(map(str, LISTS))
        raise UsageError(f"lbw has {len(values)} of its numbers, it takes one of {counts}; {_shown(text)} came")
    said = dict(zip(LISTS[len(values)], map(_parsed, values), strict=True))
    return {path: said.get(block, 0.0) for block in BLOCKS for path in _paths(block)}


def _listed(blocks: tuple[tuple[str, float], ...]) -> str:
    """The factors as the shortest lbw=..., "" where no list says the same."""
    factors = dict(blocks)
    for names in LISTS.values() if blocks else ():
        text = "lbw=" + ",".join(_number(factors.get(_paths(name)[0], 0.0)) for name in names)
        if _factors(text.removeprefix("lbw=")) == factors:
            return text
    return ""


def _points_shown(points: Points) -> Iterator[str]:
    for i, (place, weight) in enumerate(points):
        silent = len(points) == 1 or (place == 1 and i > 0)
        yield _number(weight) if silent else f"{_number(weight)}@{_number(place)}"


def _address(path: str) -> str:
    """The address of a module path, as far as it can be known without a model."""
    if not PATH.fullmatch(path):
        raise UsageError(f"{_shown(path)} is no module path; write one such as down_blocks.2.attentions.0")
    first, _, rest = path.partition(".")
    if first in TEXT_ENCODERS:
        return path
    inner = rest if first == "unet" else path
    if inner.partition(".")[0] not in UNET_PARTS:
        known = (*UNET_PARTS, *TEXT_ENCODERS, *WEIGHTS, "lbw")
        choose("part of an adapter's strength", f"{path[:SHOWN]}=", known)
    return f"unet.{inner}"


def _parsed(text: str) -> float:
    if not NUMBER.fullmatch(text.strip()):
        raise UsageError(
            f"{_shown(text)} is no strength of an adapter; write a number such as 0.8, or weights over the run such as "
            f"0@0,1@0.5"
        )
    return float(text)


def _weight(value: float) -> float:
    if not -LARGEST <= value <= LARGEST:
        raise UsageError(f"the strength {value} of an adapter is not between {-LARGEST:g} and {LARGEST:g}")
    return float(value) + 0.0  # no -0.0, which would be another text for the same


def _place(value: float) -> float:
    if not 0 <= value <= LATEST:
        raise UsageError(
            f"{value} is no place in a run; it is a share from 0 to 1, or the number of a step up to {LATEST:g}"
        )
    return float(value) + 0.0


def _number(value: float) -> str:
    return f"{value:g}" if float(f"{value:g}") == value else repr(value)


def _shown(text: str) -> str:
    return repr(text if len(text) <= SHOWN else f"{text[:SHOWN]}...")
