"""What is to be drawn, gathered from all the places it may be said: a picture's recipe, a YAML file, --set, the flags,
files of prompts, standard input. Later places win. Imports nothing heavy.
"""

import os
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ldm.cli.common import parse_settings
from ldm.cli.opening import SAID
from ldm.cli.options import FILES, NOT_HERE
from ldm.errors import UsageError, choose
from ldm.prompts import FIELDS, expand, matrix, read_prompts, read_wildcards
from ldm.request import Request, make_request

BESIDE = (*SAID, "output")  # what a YAML file may say beside the fields of Request
NAMES = {name: field for name, field in FIELDS.items() if field not in NOT_HERE}  # that may be said of a field
STEPS = {"num_inference_steps", "nfe", "timesteps", "timestep_respacing", "sigmas"}  # each says how many there are
LINES = {".jsonl": "jsonl", ".ndjson": "jsonl"}  # suffix -> kind of a file of prompts; any other is plain text


@dataclass(frozen=True)
class Sources:
    """Where an order may come from, beside the flags."""

    picture: Path | None = None  # draw again what this picture's recipe says
    config: Path | None = None
    settings: Sequence[str] = ()  # KEY=VALUE
    prompts_file: Path | None = None
    matrix: bool = False  # "a|b|c" is every combination of its parts
    wildcards: Path | None = None  # folder of lists for __name__


def gathered(sources: Sources, recipe: Mapping[str, Any], typed: Mapping[str, Any]) -> tuple[list[Request], dict]:  # type: ignore[type-arg]
    """-> the requests, and what the YAML file and --set say of BESIDE.

    recipe: the fields of Request that a picture brings. UsageError, in one sentence, for whatever is wrong with any of
    it, naming the file and line it stands in.
    """
    said = config_fields(sources.config, sources.settings)
    beside = {name: said.pop(name) for name in BESIDE if name in said}
    prompts = typed.get("prompt")
    words = [prompts] if isinstance(prompts, str) else list(prompts or ())
    if "-" in words:
        read = [row["prompt"] for row in read_prompts(sys.stdin, "txt", "standard input")]
        words = [text for word in words for text in (read if word == "-" else [word])]
        if not words:
            raise UsageError("standard input has no prompt; write one a line")
    base = {**recipe, **said, **typed}
    if not base.get("variation_strength") and "variation_seed" not in {**said, **typed}:
        base.pop("variation_seed", None)  # of a recipe whose variation is taken back
    if STEPS & (said.keys() | typed.keys()):
        for name in STEPS - said.keys() - typed.keys():
            base.pop(name, None)  # of a recipe, which says it in another way
    if "image" in {**said, **typed} and base.get("fit") is None and base.get("padding_mask_crop") is None:
        for name in {"height", "width"} - said.keys() - typed.keys():
            base.pop(name, None)  # of a recipe; another picture has its own
    if words and "literal" not in {**said, **typed}:
        base.pop("literal", None)  # of a recipe; it was said of its own words
    unworded = {name: value for name, value in base.items() if name != "prompt"}
    lines = list(file_lines(sources.prompts_file, unworded)) if sources.prompts_file else []
    if words:
        base["prompt"] = tuple(words) if len(words) > 1 else words[0]
    elif lines:
        base = unworded
    here = base.get("prompt") not in (None, ())  # an empty prompt is for Request to refuse
    if not lines and not here:
        raise UsageError("there is no prompt; give one (ldm generate 'an owl'), --prompts-file, --from or a --config")
    orders: list[Request] = []
    name, seeds = "variation_seed" if base.get("variation_strength") else "seed", 0
    for line in [*([{}] if here else []), *lines]:  # one seed for a whole file counts on from line to line
        counted = {name: base[name] + seeds} if seeds and isinstance(base.get(name), int) else {}
        order = make_request(None, at_home(base | counted | line))
        seeds += order.num_images_per_prompt * len(order.prompts)
        orders.append(combined(order) if sources.matrix else order)
    return orders, beside


def at_home(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The fields with ~ in the names of files written out, which a shell does only at the beginning of a word."""
    named = {name: text for name in FILES if isinstance(text := fields.get(name), str)}
    return {**fields, **{name: os.path.expanduser(text) for name, text in named.items()}}


def config_fields(path: Path | None, settings: Sequence[str]) -> dict[str, Any]:
    """What a YAML file says, and --set in its place, by the names of fields or of their flags. UsageError: no such
    file, no mapping, an unknown field.
    """
    said: dict[str, Any] = {}
    if path is not None:
        import yaml

        try:
            said = yaml.safe_load(path.read_text("utf-8"))
        except yaml.MarkedYAMLError as error:
            line = error.problem_mark.line + 1 if error.problem_mark else 1
            raise UsageError(f"{path}, line {line}: this is not YAML ({error.problem})") from None
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            raise UsageError(f"{path} cannot be read as a YAML file: {str(error).splitlines()[0]}") from None
        if not isinstance(said, dict):
            raise UsageError(f"{path} holds {type(said).__name__}, not fields; write for example 'prompt: an owl'")
    known = NAMES | {n: n for n in BESIDE}
    found: dict[str, Any] = {}
    for where, values in ((f"field of {path}", said), ("field of --set", parse_settings(settings, "steps=30"))):
        for name, value in values.items():
            field = known[choose(where, str(name), known)]
            if field in BESIDE and not isinstance(value, str):
                raise UsageError(f"{where} {field!r} is {value!r}; it must be text")
            found[field] = value
    return found


def file_lines(path: Path, base: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """The fields of Request that each line of a file of prompts says. UsageError: unreadable, empty or wrong."""
    kind = LINES.get(path.suffix.lower(), "txt")
    try:
        with path.open(encoding="utf-8") as file:
            found = list(read_prompts(file, kind, str(path), base, NAMES))  # type: ignore[arg-type]
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror.lower() if isinstance(error, OSError) and error.strerror else "it is not UTF-8 text"
        raise UsageError(f"the file of prompts {path} cannot be read: {reason}") from None
    if not found:
        raise UsageError(f"{path} has no prompt; write one a line")
    yield from found


def combined(order: Request) -> Request:
    """The request with every prompt replaced by the combinations of its parts. A prompt's combinations share its
    negative prompt and its seeds.
    """
    negatives = order.negative_prompts
    own = negatives if len(negatives) == len(order.prompts) > 1 else negatives[:1] * len(order.prompts)
    n, name = order.num_images_per_prompt, "variation_seed" if order.variation_strength else "seed"
    if getattr(order, name) is None:
        import secrets

        order = make_request(order, {name: secrets.randbelow(2**32)})
    numbers = (order.variation_seeds if order.variation_strength else order.seeds)(n * len(order.prompts)) or ()
    texts, asides, counted = [], [], list[int]()
    for j, (prompt, negative) in enumerate(zip(order.prompts, own, strict=True)):
        combinations = matrix(prompt)
        texts += combinations
        asides += [negative] * len(combinations)
        counted += numbers[j * n : (j + 1) * n] * len(combinations)  # only the words change from one to the next
    # One seed stands for all pictures of variations, and one negative prompt for all prompts.
    changed = {"prompt": tuple(texts), name: tuple(counted)}
    return make_request(order, changed | ({"negative_prompt": tuple(asides)} if len(negatives) > 1 else {}))


def singles(resolved: Iterable[Request], sources: Sources, recipe: Mapping[str, Any]) -> list[Request]:
    """The pictures of resolved requests, one by one, their wildcards chosen by their own seeds.

    recipe: the fields of Request that a picture brought. Its texts stand as they are, for they hold what was chosen.
    """
    pictures = [single for order in resolved for single in order.singles()]
    lists = read_wildcards(sources.wildcards) if sources.wildcards else {}
    written = [recipe.get(name) for name in ("prompt", "negative_prompt")]
    return [single if single.literal else chosen(single, lists, written) for single in pictures]


def chosen(single: Request, lists: Mapping[str, Sequence[str]], written: Sequence[Any]) -> Request:
    """A picture's request with its wildcards chosen, but for texts that are `written` so."""
    assert isinstance(single.prompt, str) and isinstance(single.negative_prompt, str) and isinstance(single.seed, int)
    number = single.seed if single.variation_seed is None else single.variation_seed
    assert isinstance(number, int)
    texts = (single.prompt, single.negative_prompt)
    prompt, negative = (text if text in written else expand(text, number, lists) for text in texts)
    return replace(single, prompt=prompt, negative_prompt=negative)
