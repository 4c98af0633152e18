"""Textual inversion (Gal et al. 2022): learned words. The vectors of a small file become rows of the text encoders'
token tables, and a name that stands for all of them becomes a word of the tokenizers.
"""

import re
import unicodedata
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import safe_open
from torch import Tensor, nn

from ldm.checkpoints.components import TOKENIZERS, Components
from ldm.checkpoints.pickles import readable
from ldm.checkpoints.safe import Header, read_header
from ldm.errors import ModelError, UsageError
from ldm.models.clip import CLIPTextModel
from ldm.text.tokenizer import CLIPTokenizer

PAIR = ("clip_l", "clip_g")  # one file for both text encoders of SDXL
NAMELESS = re.compile(r"\*|emb_params|" + "|".join(PAIR))  # keys that are no word
MOST = 75  # vectors: what CLIP's window of 77 tokens has room for
LONGEST = 128  # characters of a name
KINDS = {(768,): "Stable Diffusion 1", (1024,): "Stable Diffusion 2", (768, 1280): "SDXL", (1280,): "SDXL's refiner"}


@dataclass(frozen=True, eq=False)
class Embedding:
    """A learned word. name: what it is called in prompts. vectors: width of a text encoder -> [n, width], one n."""

    name: str
    vectors: Mapping[int, Tensor]


class Change(NamedTuple):
    """What becomes of one text encoder and of its tokenizer (by its name in Components). rows: new ones of its table,
    after those of the old tokenizer.
    """

    tokenizer: str
    encoder: CLIPTextModel
    old: CLIPTokenizer
    new: CLIPTokenizer
    rows: Tensor


def read_embedding(path: str | Path, allow_pickle: bool = False) -> Embedding:
    """Reads a file of diffusers ({"<word>": [n, D] or [D]}), A1111 ("string_to_param"), kohya ("emb_params"), or of
    SDXL ("clip_l" and "clip_g").

    Its name is the word in the file, or where that is none, the file's name without its ending. allow_pickle: also read
    .pt and .bin, in a process of its own. ModelError: it is something else (a pickle: how to convert it), damaged, or
    its numbers are not finite.
    """
    with readable(path, allow_pickle) as file:
        return _read(file, Path(path))


def is_embedding(header: Header) -> bool:
    """Whether a file with this header is one for `read_embedding`, by its names and shapes."""
    names, entries = list(header.tensors), header.tensors.values()
    if not all(entry.dtype.is_floating_point and len(entry.shape) in (1, 2) for entry in entries):
        return False
    return len(names) == 1 or set(names) == set(PAIR)


def _read(file: Path, source: Path) -> Embedding:
    """The embedding in a safetensors file that was made of `source`."""
    header = read_header(file)
    if not is_embedding(header):
        first = ", ".join(list(header.tensors)[:3])
        raise ModelError(
            f"{source} is no textual-inversion embedding: it has {len(header.tensors)} tensors ({first}), not one, or "
            f"{' and '.join(PAIR)} of SDXL; `ldm info {source}` says what it is"
        )
    vectors: dict[int, Tensor] = {}
    with safe_open(file, framework="pt") as data:
        for name, entry in header.tensors.items():
            count, width = (1, *entry.shape)[-2:]
            if not 1 <= count <= MOST or not width:
                raise ModelError(f"{source} has {count} vectors of {width} numbers; an embedding has 1 to {MOST}")
            vectors[width] = data.get_tensor(name).reshape(count, width)
            if not torch.isfinite(vectors[width].float()).all():
                raise ModelError(f"{source} has numbers that are not finite in {name}; fetch it again, or another")
    shapes = [tuple(tensor.shape) for tensor in vectors.values()]
    if len(vectors) < len(header.tensors) or len({count for count, _ in shapes}) > 1:
        raise ModelError(f"{source}: {' and '.join(PAIR)} are not one embedding, their shapes are {shapes}")
    word = next(iter(header.tensors))
    return Embedding(source.stem if NAMELESS.fullmatch(word) else word, vectors)


def attach(components: Components, embedding: Embedding, name: str | None = None) -> Callable[[], None]:
    """Makes an embedding a word of a model; returns what takes it away again, to the last bit.

    name: in place of the embedding's own. In a prompt it stands for all vectors, whose tokens are `name`, `name_1`,
    `name_2` ... as in diffusers. The model's tokenizers are replaced, so that a TextEncoder made before knows nothing
    of it. Until the embedding is taken away, the end of a text is found by its token and no longer by the largest id
    (which diffusers does where config.json says eos_token_id 2, and takes SDXL's pooled vector from the learned word).
    UsageError, and nothing is changed: the embedding is for another model, has more vectors than fit a prompt, is not
    finite in the model's type, or its name is no word or taken. Taken away first must be what came last.
    """
    word = " ".join(unicodedata.normalize("NFC", embedding.name if name is None else name).split())
    if not word or not word.isprintable() or len(word) > LONGEST:
        raise UsageError(f"{word!a:.60} is no name for an embedding; give it one of 1 to {LONGEST} printed characters")
    changes = _changes(components, embedding, word)
    configs = [change.encoder.config for change in changes]
    tables = [_spliced(change, change.rows) for change in changes]
    for change, config, table in zip(changes, configs, tables, strict=True):
        _put(change.encoder, table)
        change.encoder.config = replace(config, vocab_size=len(table), eos_token_id=change.new.eos_id)
        setattr(components, change.tokenizer, change.new)

    def detach() -> None:
        """Takes the embedding away. UsageError: it was before, or one that was attached later is still there."""
        if any(getattr(components, change.tokenizer) is not change.new for change in changes):
            raise UsageError(f"{word!a} is not the embedding that was attached last; take away the later ones first")
        tables = [_spliced(change, change.rows[:0], len(change.rows)) for change in changes]
        for change, config, table in zip(changes, configs, tables, strict=True):
            _put(change.encoder, table)
            change.encoder.config = config
            setattr(components, change.tokenizer, change.old)

    return detach


def _changes(components: Components, embedding: Embedding, word: str) -> list[Change]:
    """What is to become of each text encoder; UsageError as `attach` says."""
    encoders = {name: getattr(components, TOKENIZERS[name]) for name in components.tokenizers}
    if not encoders or not all(isinstance(encoder, CLIPTextModel) for encoder in encoders.values()):
        raise UsageError(f"the embedding {word!a} is for CLIP text encoders, which {components.name!a} has not")
    widths = [encoder.config.hidden_size for encoder in encoders.values()]
    whole = components.text_encoder is None or len(embedding.vectors) == len(set(widths))  # a refiner takes its half
    if not whole or not embedding.vectors.keys() >= set(widths):
        raise UsageError(
            f"the embedding {word!a} is for {_kind(embedding.vectors)} and the model {components.name!a} is of "
            f"{_kind(widths)}; take one that was made for it"
        )
    changes = []
    for name, encoder in encoders.items():
        old, vectors = getattr(components, name), embedding.vectors[encoder.config.hidden_size]
        if len(vectors) > old.max_length - 2:
            fault = f"{len(vectors)} vectors; a prompt of this model has room for {old.max_length - 2}"
            raise UsageError(f"the embedding {word!a} has {fault}; take one with fewer")
        rows = vectors.to(_table(encoder).weight)
        if not torch.isfinite(rows).all():
            raise UsageError(f"the embedding {word!a} is not finite in {rows.dtype}; open the model in float32")
        changes.append(Change(name, encoder, old, _with_word(old, word, len(vectors)), rows))
    return changes


def _with_word(old: CLIPTokenizer, word: str, count: int) -> CLIPTokenizer:
    """The tokenizer with a word of `count` tokens more; UsageError when it cannot be told from others."""
    tokens = [word, *(f"{word}_{i}" for i in range(1, count))]
    _refuse_taken(old, tokens)
    added = {token: len(old) + i for i, token in enumerate(tokens)}
    new = CLIPTokenizer(old.vocab, old.merges, old.max_length, old.pad, old.added | added)
    if new([word]).ids[0, 1 : count + 2].tolist() != [*added.values(), new.eos_id]:
        raise UsageError(f"the name {word!a} is read as other words; choose another name for the embedding")
    return new


def _refuse_taken(tokenizer: CLIPTokenizer, tokens: list[str]) -> None:
    """UsageError if a token is a word already, or would be read as part of another embedding, or that as part of it."""
    added = {token.lower() for token in tokenizer.added}
    for token in (token.lower() for token in tokens):
        if token in added or token in tokenizer.vocab or f"{token}</w>" in tokenizer.vocab:
            raise UsageError(f"{token!a} is a word of the model already; choose another name for the embedding")
    name = tokens[0].lower()
    before, _, number = name.rpartition("_")
    if f"{name}_{len(tokens)}" in added or (number.isdigit() and before in added):
        raise UsageError(f"{name!a} is numbered like a part of another embedding; choose another name for it")


def _kind(widths: "Mapping[int, Tensor] | list[int]") -> str:
    """ "Stable Diffusion 1 (768 numbers a vector)"."""
    known = KINDS.get(tuple(sorted(set(widths))), "another model")
    return f"{known} ({' and '.join(map(str, sorted(set(widths))))} numbers a vector)"


def _table(encoder: CLIPTextModel) -> nn.Embedding:
    return encoder.text_model.embeddings.token_embedding


def _spliced(change: Change, rows: Tensor, instead_of: int = 0) -> Tensor:
    """The encoder's table with these rows in place of so many after those of the old tokenizer."""
    table, at = _table(change.encoder).weight, len(change.old)
    return torch.cat([table[:at], rows.to(table), table[at + instead_of :]])


def _put(encoder: CLIPTextModel, rows: Tensor) -> None:
    """Puts these rows in place of the encoder's token table."""
    table = _table(encoder)
    table.weight = nn.Parameter(rows.detach(), requires_grad=table.weight.requires_grad)
    table.num_embeddings = len(rows)
