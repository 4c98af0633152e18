"""Checkpoints merged into one: weighted sums, an added difference, with a weight for every block of the U-Net.

Every number of the result is a combination of those that the models have in the same place. The formulas are those of
A1111's checkpoint merger; the blocks are those of sdweb-merge-block-weighted ("MBW"), which sd-meh takes over.
"""

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from string import ascii_uppercase
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ldm.checkpoints.components import TASKS, TOKENIZERS, Components, check_fit
from ldm.checkpoints.load import finite
from ldm.checkpoints.single_file import FREE, known_family
from ldm.checkpoints.spelling import Spelling, spelled, unet_rules
from ldm.errors import ModelError, NumericalError, UsageError, choose
from ldm.models.unet import UNetConfig
from ldm.schedulers.config import network_of

LETTERS = ascii_uppercase
MERGE = "merge"
GROUPS = {"unet": ("unet",), "text_encoder": ("text_encoder", "text_encoder_2"), "vae": ("vae",)}
"""What is merged, or taken whole from one model: a word for it, and the networks of Components that it means."""
TAKEN = {"unet": MERGE, "text_encoder": MERGE, "vae": "A"}
"""What becomes of them if nothing else is said: the mean of two autoencoders is seldom a good one."""
STEMS = {"input_blocks": "IN", "output_blocks": "OUT"}
CLOSE = 1e-6  # of a sum of weights to 1


@dataclass(frozen=True)
class Mix:
    """How models A, B, C ... are combined; made and checked by `mixture`.

    weights: of the models, where nothing else is said: those of a weighted sum, together 1, or (1, alpha, -alpha) of an
    added difference. difference: it is one. blocks: name of a block (`block_names`), or beginning of a tensor's address
    ("unet.mid_block"), -> alpha there. take: group of GROUPS -> the letter of the one model it comes from, or "merge".
    """

    weights: tuple[float, ...]
    difference: bool = False
    blocks: Mapping[str, float] = field(default_factory=dict)
    take: Mapping[str, str] = field(default_factory=lambda: dict(TAKEN))

    def at(self, alpha: float) -> tuple[float, ...]:
        """The weights of the models at this alpha."""
        return _weights(alpha, self.difference)

    def source(self, network: str) -> str:
        """The letter of the one model that a network comes from, or "merge"; the safety checker is A's."""
        return next((self.take[group] for group, names in GROUPS.items() if network in names), "A")


class Share(NamedTuple):
    """How much of each model is in a tensor, in their order, and the entry of Mix.blocks that says so ("" for none)."""

    label: str
    weights: tuple[float, ...]


def _weights(alpha: float, difference: bool) -> tuple[float, ...]:
    return (1.0, alpha, -alpha) if difference else (1.0 - alpha, alpha)


def weighted_sum(tensors: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """sum_i w_i theta_i in float32; for two models with w = (1 - alpha, alpha) A1111's "Weighted sum".

    A tensor of weight 0 is not read, so that neither its NaN nor its infinity is in the sum. Some weight is not 0.
    """
    terms = [(tensor, weight) for tensor, weight in zip(tensors, weights, strict=True) if weight]
    total = terms[0][0].float() * terms[0][1]
    for tensor, weight in terms[1:]:
        total.add_(tensor.float(), alpha=weight)
    return total


def add_difference(tensors: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """theta_A + alpha (theta_B - theta_C) in float32, A1111's "Add difference". weights: (1, alpha, -alpha)."""
    a, b, c = tensors
    return (b.float() - c.float()).mul_(weights[1]).add_(a.float())


def mixture(
    count: int,
    *,
    alpha: float | None = None,
    weights: Sequence[float] | None = None,
    difference: bool = False,
    normalize: bool = False,
    blocks: Mapping[str, float] | None = None,
    take: Mapping[str, str] | None = None,
) -> Mix:
    """The Mix of `count` models, from either alpha or weights. normalize: the weights are divided by their sum.

    alpha: the part of B in a weighted sum of two, (1 - alpha) A + alpha B, or the factor of a difference, A + alpha
    (B - C), of three; beyond 0 to 1 it goes past the models. weights: of a sum of any number. blocks, take: as in Mix;
    "BASE" among the blocks is the alpha of all else. UsageError in one sentence for what does not go together.
    """
    blocks, take = dict(blocks or {}), TAKEN | dict(take or {})
    letters = LETTERS[:count]
    if not 2 <= count <= len(LETTERS):
        raise UsageError(f"{count} models to merge; give two to {len(LETTERS)}")
    for group, source in take.items():
        choose("part of a model", group, GROUPS)
        choose(f"source of the {group}", source, [*letters, MERGE])
    given = [*(weights or ()), *([] if alpha is None else [alpha]), *blocks.values()]
    if not all(map(math.isfinite, given)):
        raise UsageError(f"a weight is {next(w for w in given if not math.isfinite(w))}; all must be finite numbers")
    if given and MERGE not in take.values():
        raise UsageError("every network is taken whole from one model, where no weights count; leave them out")
    if difference and (count != 3 or weights is not None):
        raise UsageError(f"an added difference is A + alpha (B - C): three models and an alpha, not {count} models"
                         f"{' and weights' if weights is not None else ''}")  # fmt: skip
    if weights is not None and (alpha is not None or blocks):
        raise UsageError("weights are for whole models and alpha (also that of a block) for B; give one of them")
    if weights is None:
        if normalize:
            raise UsageError("only weights can be normalized; give weights, or leave normalize out")
        if not difference and count != 2 and MERGE in take.values():
            raise UsageError(f"alpha says how two models are summed, and there are {count}; give a weight for each")
        return Mix(_weights(_base(alpha, blocks, take), difference), difference, blocks, take)
    if len(weights) != count:
        raise UsageError(f"{len(weights)} weights for {count} models; give one for each")
    total = math.fsum(weights)
    if abs(total - 1) > CLOSE and not (normalize and total):
        raise UsageError(f"the weights sum to {total:g}, not to 1; change them{', or normalize them' if total else ''}")
    return Mix(tuple(w / total for w in weights) if normalize else tuple(weights), False, {}, take)


def _base(alpha: float | None, blocks: Mapping[str, float], take: Mapping[str, str]) -> float:
    """The alpha where no block says another. UsageError: it is not said, or twice."""
    if alpha is not None and "BASE" in blocks:
        raise UsageError("BASE is the alpha of all that is in no block; leave the other alpha out")
    if alpha is None and "BASE" not in blocks and MERGE in take.values():
        raise UsageError("nothing says how much of each model there shall be; give alpha or weights")
    return blocks.get("BASE", 0.0 if alpha is None else alpha)


def block_names(c: UNetConfig) -> tuple[str, ...]:
    """The names of MBW's blocks, in the order of its lists of numbers: BASE, IN00 ..., M00, OUT00 ...

    26 of Stable Diffusion 1 and 2 and SDXL's refiner (12 blocks in, 12 out), 20 of SDXL (9 and 9).
    """
    count = len(c.block_out_channels) * (c.layers_per_block + 1)
    rows = [[f"{stem}{i:02}" for i in range(count)] for stem in STEMS.values()]
    return ("BASE", *rows[0], "M00", *rows[1])


def _said(c: UNetConfig) -> str:
    names = block_names(c)
    return f"BASE, IN00 to {names[len(names) // 2 - 1]}, M00, OUT00 to {names[-1]}"


def blocks_of(keys: Sequence[str], c: UNetConfig) -> dict[str, str]:
    """The block of every key of a U-Net, by its name in the original files, as MBW and sd-meh count them.

    input_blocks.i is INi, output_blocks.i is OUTi, middle_block M00; time_embed goes with the first block in, the
    output layers with the last one out, and SDXL's label_emb, which those tools do not look for, with BASE.
    """
    names = block_names(c)
    ends = {"time_embed": names[1], "middle_block": "M00", "out": names[-1]}
    found = {}
    for key, rule in spelled(keys, Spelling("", unet_rules), c).items():
        kind, number = rule.theirs.split(".")[:2]
        found[key] = f"{STEMS[kind]}{int(number):02}" if kind in STEMS else ends.get(kind, "BASE")
    return found


def parse_blocks(text: str, c: UNetConfig) -> dict[str, float]:
    """Mix.blocks of "0.5,0.1,..." (a number for each of `block_names`) or of "M00=0.2,unet.conv_in=1". UsageError."""
    names, words = block_names(c), [word.strip() for word in text.split(",")]
    if "=" not in text:
        if len(words) != len(names):
            raise UsageError(f"{len(words)} block weights; this U-Net takes {len(names)}: {_said(c)}")
        words = [f"{name}={word}" for name, word in zip(names, words, strict=True)]
    found: dict[str, float] = {}
    for word in words:
        name, equals, value = (part.strip() for part in word.partition("="))
        if not equals or not name or name in found:
            raise UsageError(f"block weight {word!r}; write each name once, as in M00=0.2,unet.conv_in=1")
        found[name] = parse_number(value)
    return found


def parse_number(text: str) -> float:
    """A number of a list. UsageError for what is none."""
    try:
        return float(text)
    except ValueError:
        raise UsageError(f"{text!r} is no number; write weights as in 0.3,0.7") from None


def plan(models: Sequence[Components], mix: Mix) -> dict[str, Share]:
    """How much of each model goes into every parameter that is merged, by its address ("unet.conv_in.weight").

    The most exact entry of Mix.blocks counts: the longest beginning of the address, then the block, then BASE.
    UsageError: an entry that is no block and begins no address. ModelError: models that cannot be merged, and why.
    """
    _check(models, mix)
    a = models[0]
    keys = {n: [k for k, _ in net.named_parameters()] for n, net in a.networks.items() if mix.source(n) == MERGE}
    inside = blocks_of(keys["unet"], a.unet.config) if "unet" in keys else {}
    shares: dict[str, Share] = {}
    heads = {*block_names(a.unet.config), *keys}
    for name, of in keys.items():
        for key in of:
            parts = (name, *key.split("."))
            starts = [".".join(parts[:i]) for i in range(len(parts), 0, -1)]
            heads.update(starts)
            block = inside[key] if name == "unet" else "BASE"
            label = next((word for word in (*starts, block, "BASE") if word in mix.blocks), "")
            shares[starts[0]] = Share(label, mix.at(mix.blocks[label]) if label else mix.weights)
    if unknown := sorted(mix.blocks.keys() - heads):
        begin = " or ".join(keys) or "none is merged"
        said = f"no block ({_said(a.unet.config)}) and begins the name of no tensor that is merged"
        raise UsageError(f"{unknown[0]!r} is {said}; those begin with {begin}, as unet.mid_block does")
    return shares


def _check(models: Sequence[Components], mix: Mix) -> None:
    """ModelError where models cannot be merged: another family, prediction, noise schedule, vocabulary or task."""
    a = models[0]
    names = [name for group, names in GROUPS.items() if mix.take[group] == MERGE for name in names]
    for letter, other in zip(LETTERS[1:], models[1:], strict=False):
        pair = f"{letter} ({other.name}) and A ({a.name})"
        if faults := list(_faults(a, other, names)):
            titles = [_title(other), _title(a)]
            said = "are {} and {}".format(*titles) if len({*titles}) > 1 else f"differ in {' and '.join(faults[:2])}"
            raise ModelError(f"{pair} {said}; only models of one family and shape can be merged")
        if mix.take["unet"] != "A" and a.scheduler_config != other.scheduler_config:
            ours, theirs = network_of(a.scheduler_config), network_of(other.scheduler_config)
            if ours[1] != theirs[1]:
                raise ModelError(f"{pair} predict {theirs[1]} and {ours[1]}; only models that predict the same can be "
                                 "merged (where a single file does not say, give its prediction type)")  # fmt: skip
            betas = ours[0].betas, theirs[0].betas
            if betas[0].shape != betas[1].shape or not np.allclose(*betas):
                raise ModelError(f"{pair} have other noise schedules; only models of one schedule can be merged")
        if mix.take["text_encoder"] == MERGE and _words(a) != _words(other):
            raise ModelError(f"{pair} have tokenizers with other words; take the text encoder from one of them")
    if mix.take["unet"] == MERGE:
        channels, narrow = [model.unet.config.in_channels for model in models], a.vae.config.latent_channels
        if set(channels[1:]) not in ({channels[0]}, {narrow}):
            tasks = [TASKS[count - narrow] for count in channels]
            said = ", ".join(f"{letter} is for {task}" for letter, task in zip(LETTERS, tasks, strict=False))
            raise ModelError(f"{said}; if tasks differ, only A may be of another one than {TASKS[0]}")


def _faults(a: Components, b: Components, names: Sequence[str]) -> Iterator[str]:
    """The fields in which networks of these names differ so that their numbers do not mean the same."""
    for name in names:
        ours, theirs = a.configs.get(name, {}), b.configs.get(name, {})
        for key in dict.fromkeys((*ours, *theirs)):
            if key not in FREE and ours.get(key) != theirs.get(key):
                yield f"{name} {key} {theirs.get(key)} and {ours.get(key)}"


def _title(components: Components) -> str:
    family = known_family(components)
    return f"of the family {family.title}" if family else "of no published family"


def _words(c: Components) -> list[Any]:
    """The vocabularies: token -> id; of transformers' tokenizers the whole file."""
    own = getattr(c.text_encoder, "vocabulary", None)
    return [own, *(c.tokenizers[name].vocab | c.tokenizers[name].added for name in c.tokenizers)]


@torch.no_grad()
def merge(models: Sequence[Components], mix: Mix, dtype: torch.dtype | None = None) -> Components:
    """The merged model. Tokenizers, configurations, scheduler and defaults are A's, but for networks that Mix.take
    names another model for (with text encoders come their tokenizers).

    dtype: of what is merged; None keeps that of each of A's tensors. Every tensor is computed in float32 and rounded
    once. To hold no more than the models and one tensor, A's networks become the result: `models[0]` is used up (not
    its file, of which it is a private map). A U-Net A for inpainting or instruct-pix2pix may be merged with common
    ones: as in A1111, the first 4 of its input channels are, and the others stay A's.

    UsageError, ModelError: as of `plan`. NumericalError: a result that is not finite in its type.
    """
    shares, combine = plan(models, mix), add_difference if mix.difference else weighted_sum
    parameters = [
        {f"{n}.{key}": p for n, net in model.networks.items() for key, p in net.named_parameters()} for model in models
    ]
    for address, share in shares.items():
        mine, *others = (of[address] for of in parameters)
        kept = dtype or mine.dtype
        if kept == mine.dtype and share.weights[0] == 1 and not any(share.weights[1:]):
            continue  # A alone; it stays mapped
        shared = mine[:, : others[0].shape[1]] if mine.shape != others[0].shape else mine
        result = combine([shared, *others], share.weights).to(kept)
        if not finite(result):
            raise NumericalError(f"the merged {address} is not finite in {kept}; change the weights, or choose fp32")
        place = mine.data.to(kept)  # itself where it is of that type
        (place[:, : shared.shape[1]] if shared is not mine else place).copy_(result)
        mine.data = place
    return _assembled(models, mix)


def _assembled(models: Sequence[Components], mix: Mix) -> Components:
    """A with the networks that are taken whole from others, and the notes of all."""
    parts: dict[str, Any] = {}
    for group, names in GROUPS.items():
        if (letter := mix.take[group]) not in ("A", MERGE):
            parts |= {name: getattr(models[LETTERS.index(letter)], name) for name in names}
            tokenizers = [name for name, encoder in TOKENIZERS.items() if encoder in names]
            parts |= {name: getattr(models[LETTERS.index(letter)], name) for name in tokenizers}
    notes = dict.fromkeys(note for model in models for note in model.notes)
    merged = replace(models[0], **parts, notes=tuple(notes))
    check_fit(merged, "the merged model")
    return merged


def formula(weights: Sequence[float], difference: bool) -> str:
    """ "0.7 A + 0.3 B", "A + 0.5 (B - C)"."""
    if difference:
        return f"A + {weights[1]:g} (B - C)"
    return " + ".join(f"{weight:g} {letter}" for letter, weight in zip(LETTERS, weights, strict=False) if weight)


def summary(models: Sequence[Components], mix: Mix) -> list[dict[str, Any]]:
    """What goes into the result, by network and block: rows of network, block, tensors (how many) and formula."""
    rows: list[dict[str, Any]] = []
    groups = Counter((key.partition(".")[0], share) for key, share in plan(models, mix).items())
    for name in models[0].networks:
        letter = mix.source(name)
        for share, count in [(share, count) for (of, share), count in groups.items() if of == name]:
            said = formula(share.weights, mix.difference)
            rows.append({"network": name, "block": share.label, "tensors": count, "formula": said})
        if letter != MERGE:
            count = sum(1 for _ in getattr(models[LETTERS.index(letter)], name).parameters())
            rows.append({"network": name, "block": "", "tensors": count, "formula": letter})
    return rows
