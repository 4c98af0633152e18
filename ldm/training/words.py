"""Textual inversion (Gal et al. 2022, arXiv:2208.01618): the vectors of a new word are trained, and nothing else.

They are a module of their own, float32 over text encoders of any type. While it is attached, forward hooks put them in
place of what the token tables have for the word. So the tables get no gradient and cannot drift, where diffusers'
textual_inversion.py and kohya's train_textual_inversion.py train whole tables and put all other rows back after every
step. As in those two, nothing but the learning rate and the weight decay holds the vectors' lengths. (diffusers'
scripts of pivotal tuning draw them towards the table's deviation after every step.)
"""

import copy
import re
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.checkpoints.components import TOKENIZERS, Components
from ldm.checkpoints.load import finite
from ldm.checkpoints.safe import atomic_save_safetensors
from ldm.errors import ModelError, UsageError
from ldm.models.clip import CLIPTextModel
from ldm.text.inversion import NAMELESS, PAIR, Embedding, attach
from ldm.text.tokenizer import CLIPTokenizer

NOT_KEPT = re.compile(rf"{NAMELESS.pattern}|__metadata__|.*\.\./.*", re.DOTALL)
"""Names that a file of safetensors cannot give back."""


class Place(NamedTuple):
    """Where a word is in a text encoder: the id of its first token, and so the row of the token table."""

    encoder: CLIPTextModel
    first: int


class Words(nn.Module):
    """The vectors of a new word, [n, width] for each text encoder: the parameters `rows.<its name in Components>`.

    name: the word. The text encoders are no part of it: it can be saved and moved by itself, and a copy (a running
    average) has rows of its own for the same encoders. Where several are attached, the last one speaks.
    """

    def __init__(self, name: str, rows: Mapping[str, Tensor], places: Mapping[str, Place]) -> None:
        super().__init__()
        self.name = name
        self.rows = nn.ParameterDict({key: nn.Parameter(row.to(torch.float32, copy=True)) for key, row in rows.items()})
        self._places = dict(places)

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        memo |= {id(place.encoder): place.encoder for place in self._places.values()}
        memo[id(self)] = twin = type(self).__new__(type(self))
        vars(twin).update(copy.deepcopy(vars(self), memo))
        return twin

    @classmethod
    def for_model(cls, components: Components, token: str, initializer: str = "", count: int = 1) -> Self:
        """Makes `token` a word of a model, of `count` vectors in each of its text encoders.

        initializer: vector i begins as that of its token i modulo their number (kohya's rule; diffusers takes a single
        token); every text has tokens, for words that are not in the vocabulary are read letter by letter. Without one,
        all begin as the mean of the table. Equal ones part in the first step, for their places in the text differ.

        The tokenizers are replaced (ldm.text.inversion.attach): a Pipeline or TextEncoder made before knows nothing of
        the word. UsageError, and nothing is changed: a text encoder that is not CLIP's, two of one width, which no file
        keeps apart, fewer than one vector or more than fit a prompt, a name that is no word, taken, or of NOT_KEPT.
        """
        texts = {key: each for key, each in components.networks.items() if key in TOKENIZERS.values()}
        encoders = {key: each for key, each in texts.items() if isinstance(each, CLIPTextModel)}
        if len(encoders) < len(texts):
            fault = f"the text encoder of {components.name!a} is not CLIP's"
            raise UsageError(f"{fault}, whose table learned words are rows of; train without the word {token!a}")
        if len({encoder.config.hidden_size for encoder in encoders.values()}) < len(encoders):
            fault = f"the text encoders of {components.name!a} are of one width"
            raise UsageError(f"{fault}, and files of learned words tell them apart by it; train without a word")
        if count < 1:
            raise UsageError(f"{count} vectors for the word {token!a}; it takes at least 1")
        if NOT_KEPT.fullmatch(token.strip()):
            raise UsageError(f"{token!a} stands for something else in files of learned words; choose another name")
        rows, places = {}, {}
        for words, (key, encoder) in zip(components.tokenizers.values(), encoders.items(), strict=True):
            rows[key] = _beginning(words, _table(encoder).weight.detach(), initializer, count)
            places[key] = Place(encoder, len(words))
        attach(components, Embedding(token, {row.shape[1]: row for row in rows.values()}))
        now = next(iter(components.tokenizers.values()))
        return cls(list(now.added)[-count], rows, places)  # the name as attach spells it

    @contextmanager
    def attached(self) -> Iterator[None]:
        """While it lasts, the text encoders read these vectors, and have no gradients of their own."""
        with ExitStack() as undo:
            for key, (encoder, first) in self._places.items():
                hook = _table(encoder).register_forward_hook(partial(self._speak, key, first))
                undo.callback(hook.remove)
                for parameter in [parameter for parameter in encoder.parameters() if parameter.requires_grad]:
                    undo.callback(parameter.requires_grad_(False).requires_grad_, True)
            yield

    def _speak(self, key: str, first: int, table: nn.Module, args: tuple[Tensor], y: Tensor) -> Tensor:
        """The table's vectors y [B, T, width] of the ids [B, T], with those of the word in their places."""
        rows, place = self.rows[key], args[0] - first
        own = (place >= 0) & (place < len(rows))
        # cast behind the look-up, so that the gradients of all places are summed in float32
        spoken = F.embedding(place.clamp(0, len(rows) - 1), rows).to(y.dtype)
        return torch.where(own[..., None], spoken, y)

    def embedding(self) -> Embedding:
        """What has been learned so far, as an Embedding of its own: training on does not change it."""
        return Embedding(self.name, {row.shape[1]: row.detach().clone() for row in self.rows.values()})


def write_embedding(embedding: Embedding, path: str | Path) -> None:
    """Writes a learned word, whole or not at all, as a safetensors file that diffusers, A1111 and ComfyUI read.

    One text encoder: {word: [n, width]}, as diffusers' textual_inversion.py. Two: {"clip_l": the narrower, "clip_g":
    the wider}, without the word, which all tools then take from the file's name or are told. ModelError: a number is
    not finite. LdmError: the file cannot be written.
    """
    vectors = [embedding.vectors[width] for width in sorted(embedding.vectors)]
    names = (embedding.name,) if len(vectors) == 1 else PAIR
    if not all(finite(rows) for rows in vectors):
        raise ModelError(f"the word {embedding.name!a} has numbers that are not finite; it was not written")
    atomic_save_safetensors(dict(zip(names, vectors, strict=True)), path)


def _beginning(tokenizer: CLIPTokenizer, table: Tensor, initializer: str, count: int) -> Tensor:
    """What the vectors of a word begin as, [count, width]; the rule is for_model's."""
    ids = [index for word in tokenizer.words(initializer) for index in word.ids]
    if not ids:
        return table[: len(tokenizer)].mean(0, dtype=torch.float32).repeat(count, 1)
    return table[[ids[i % len(ids)] for i in range(count)]]


def _table(encoder: CLIPTextModel) -> nn.Embedding:
    return encoder.text_model.embeddings.token_embedding
