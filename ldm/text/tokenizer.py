"""CLIP's tokenizer: lower-cased byte-level byte-pair encoding with `</w>` at the end of words.

Radford et al. 2021, sec. 2.4 (the encoding is that of Sennrich et al. 2016, over bytes as in Radford et al. 2019).
Reads and writes the folders of transformers' CLIPTokenizer and gives the same ids, by the `tokenizers` package alone.
"""

import gzip
import json
from collections.abc import Iterable, Mapping, Sequence
from itertools import count, takewhile
from pathlib import Path
from typing import Any, NamedTuple, Self

import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers, processors, trainers
from tokenizers.models import BPE
from torch import Tensor

from ldm.checkpoints.safe import atomic_json, atomic_text, read_json
from ldm.errors import ModelError, UsageError

BOS, EOS, WORD_END = "<|startoftext|>", "<|endoftext|>", "</w>"
WORDS = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
WINDOW = 77  # of every published CLIP text encoder; some tokenizer_config.json leave it out
FEWEST = 2 * 256 + 2  # every byte, every byte that ends a word, and the two special tokens
MERGES = Path(__file__).with_name("clip_merges.txt.gz")  # OpenAI's, in their order; see NOTICE


class Tokens(NamedTuple):
    """ids: int64 [B, max_length]. dropped: for each prompt the words that did not fit, in order; mostly ()."""

    ids: Tensor
    dropped: tuple[tuple[str, ...], ...]


class Word(NamedTuple):
    """ids: of a token, or of all that a learned word stands for. start: its first character in the text."""

    ids: tuple[int, ...]
    start: int


class CLIPTokenizer:
    """Prompts -> token ids [B, max_length]: the start token, the text, the end token, then padding.

    vocab: token -> id. merges: pairs of tokens, in the order in which they are joined. pad: the padding token (SD1: the
    end token, SD2: "!"). added: further tokens matched whole before the encoding, such as those of textual inversion:
    of `name`, `name_1`, `name_2` ... the first stands in a prompt for all of them, as in diffusers.
    Raises ModelError when a special token or part of a merge has no id, or `added` does not follow the vocabulary.
    """

    def __init__(
        self,
        vocab: Mapping[str, int],
        merges: Sequence[tuple[str, str]],
        max_length: int = WINDOW,
        pad: str = EOS,
        added: Mapping[str, int] | None = None,
    ) -> None:
        self.vocab, self.merges, self.max_length, self.pad = dict(vocab), list(merges), max_length, pad
        self.added = dict(added or {})
        known = self.vocab | self.added
        if absent := {BOS, EOS, pad} - known.keys():
            raise ModelError(f"the tokenizer's vocabulary has no token {min(absent)!a:.60}; it is not one of CLIP")
        if max_length < 3:
            raise ModelError(f"a tokenizer window of {max_length} tokens; it takes at least 3 to hold any text")
        self.bos_id, self.eos_id, self.pad_id = known[BOS], known[EOS], known[pad]
        self._stands_for = _runs(self.added)
        try:
            self._tokenizer = _backend(self.vocab, self.merges)
        except Exception as error:  # the package has no finer one; it looks every merge up
            fault = f"the tokenizer's vocabulary has no token that its merges make ({error!s:.100})"
            raise ModelError(f"{fault}; it is not one of CLIP") from error
        for token in dict.fromkeys((BOS, EOS, pad)):
            self._tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True)])
        for token in sorted(self.added.keys() - {BOS, EOS, pad}, key=self.added.__getitem__):
            self._tokenizer.add_tokens([AddedToken(token, normalized=True)])
        shifted = {token for token, _ in known.items() - self._tokenizer.get_vocab().items()}
        if shifted:
            raise ModelError(f"token {min(shifted)!a:.60}: ids of added tokens must continue those of the vocabulary")
        ends = (EOS, self.eos_id), (BOS, self.bos_id)
        self._tokenizer.post_processor = processors.RobertaProcessing(*ends, False, False)

    def __len__(self) -> int:
        return len(self.vocab | self.added)

    def __call__(self, prompts: Sequence[str]) -> Tokens:
        """The ids of each prompt, alone or in a batch the same. UsageError for text that is not valid Unicode."""
        rows, dropped = [], []
        for prompt in prompts:
            spelt = [(index, word.start) for word in self.words(prompt) for index in word.ids]
            rows.append(self.window([index for index, _ in spelt[: self.room]]))
            cut = spelt[self.room][1] if len(spelt) > self.room else len(prompt)
            while 0 < cut < len(prompt) and not prompt[cut].isspace() and not prompt[cut - 1].isspace():
                cut -= 1  # a word is lost whole when one of its tokens is
            dropped.append(tuple(prompt[cut:].split()))
        return Tokens(torch.cat(rows) if rows else torch.empty(0, self.max_length, dtype=torch.int64), tuple(dropped))

    @property
    def room(self) -> int:
        """How many tokens of text fit beside the two that begin and end it."""
        return self.max_length - 2

    def words(self, text: str) -> list[Word]:
        """The tokens of a text of any length, those of a learned word together. UsageError as above."""
        try:
            text.encode()
        except UnicodeEncodeError as error:
            fault = f"the prompt {text!a:.60} is not valid Unicode ({error.reason})"
            raise UsageError(f"{fault}; retype it") from error
        # one at a time: encode_batch starts threads, after which the package complains when a process forks
        said = self._tokenizer.encode(text, add_special_tokens=False)
        return [
            Word(self._stands_for.get(token, (token,)), start)
            for token, (start, _) in zip(said.ids, said.offsets, strict=True)
        ]

    def window(self, ids: Sequence[int]) -> Tensor:
        """At most `room` ids as the text encoder takes them, [1, max_length]."""
        padding = [self.pad_id] * (self.room - len(ids))
        return torch.tensor([[self.bos_id, *ids, self.eos_id, *padding]])

    @property
    def comma_id(self) -> int | None:
        """The id of a comma that ends a word."""
        return self.vocab.get(f",{WORD_END}")

    @classmethod
    def from_folder(cls, folder: str | Path, max_length: int | None = None) -> Self:
        """Reads `tokenizer.json`, or `vocab.json` and `merges.txt`, and the special tokens beside them.

        max_length: the window of the text encoder; tokenizers that state none, or a longer one, are held to it.
        ModelError when the files are missing, damaged or of another kind of tokenizer.
        """
        folder = Path(folder)
        config: dict[str, Any] = {}
        for name in ("tokenizer_config.json", "special_tokens_map.json"):  # transformers lets the second win
            config |= read_json(folder / name) if (folder / name).is_file() else {}
        pad = config.get("pad_token", EOS)
        window = config.get("model_max_length", WINDOW)
        window = int(window) if isinstance(window, (int, float)) and window < 10**6 else WINDOW
        try:
            vocab, merges, added = _read(folder)
            pad = pad["content"] if isinstance(pad, dict) else pad or EOS
            return cls(vocab, merges, min(window, max_length or window), pad, added)
        except ModelError as error:
            raise error if str(folder) in str(error) else ModelError(f"{folder}: {error}") from error
        except (KeyError, TypeError, ValueError, OSError) as error:
            fault = f"{folder} holds no CLIP tokenizer that can be read ({error!r:.100})"
            raise ModelError(f"{fault}; fetch it again") from error

    def save(self, folder: str | Path) -> None:
        """Writes both forms (`tokenizer.json`; `vocab.json` and `merges.txt`) for new and for old readers."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        special = {"bos_token": BOS, "eos_token": EOS, "pad_token": self.pad, "unk_token": EOS}
        atomic_text(folder / "tokenizer.json", self._tokenizer.to_str(pretty=True))
        config = {"model_max_length": self.max_length, "tokenizer_class": "CLIPTokenizer"}
        atomic_json(folder / "tokenizer_config.json", special | config)
        atomic_json(folder / "special_tokens_map.json", special)
        atomic_json(folder / "vocab.json", self.vocab)
        atomic_text(folder / "merges.txt", "\n".join(["#version: 0.2", *map(" ".join, self.merges), ""]))
        if self.added:
            atomic_json(folder / "added_tokens.json", self.added)

    @classmethod
    def standard(cls, pad: str = EOS) -> Self:
        """OpenAI's tokenizer of 49,408 tokens, which every Stable Diffusion 1, 2 and XL was trained with.

        pad: the end token for the CLIP of SD1 and SDXL; "!" (id 0) for OpenCLIP, in SD2 and SDXL's second encoder.
        ModelError when the package has lost its table of merges.
        """
        try:
            words = gzip.decompress(MERGES.read_bytes()).decode().split()
        except (OSError, EOFError, ValueError) as error:
            raise ModelError(f"cannot read {MERGES} ({error}); install the package again") from error
        merges = list(zip(words[::2], words[1::2], strict=True))
        return cls(_vocabulary(merges), merges, WINDOW, pad)

    @classmethod
    def train(cls, captions: Iterable[str], vocab_size: int, max_length: int = WINDOW) -> Self:
        """Learns merges from captions; the same captions in the same order give the same tokenizer on any run.

        vocab_size: at least 514 (bytes, word-ending bytes, special tokens); fewer tokens come out when no more pairs
        occur twice in the captions. The end token has the largest id, by which CLIP finds the end of the text.
        """
        if vocab_size < FEWEST:
            raise UsageError(f"vocab_size {vocab_size}; a CLIP tokenizer has at least {FEWEST} tokens; choose more")
        # naming all letters beforehand fixes their order; else ties between pairs fall differently on every run
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            min_frequency=2,
            special_tokens=_letters(),
            end_of_word_suffix=WORD_END,
            show_progress=False,
        )
        learner = _backend({}, [])
        learner.train_from_iterator(captions, trainer)
        merges = [tuple(pair) for pair in json.loads(learner.to_str())["model"]["merges"]]
        merges = merges[: vocab_size - FEWEST]
        return cls(_vocabulary(merges), merges, max_length)


def _runs(added: Mapping[str, int]) -> dict[int, tuple[int, ...]]:
    """The id of `name` -> those of `name`, `name_1`, `name_2` ..., where there are any."""
    runs = {name: [*takewhile(added.__contains__, (f"{name}_{i}" for i in count(1)))] for name in added}
    return {added[name]: (added[name], *map(added.__getitem__, run)) for name, run in runs.items() if run}


def _letters() -> list[str]:
    """Every byte, then every byte that ends a word, as the encoding writes them."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    return [*letters, *(letter + WORD_END for letter in letters)]


def _vocabulary(merges: Sequence[tuple[str, str]]) -> dict[str, int]:
    """token -> id in CLIP's order: bytes, what the merges make, the special tokens."""
    tokens = dict.fromkeys([*_letters(), *map("".join, merges), BOS, EOS])
    return {token: index for index, token in enumerate(tokens)}


def _backend(vocab: dict[str, int], merges: list[tuple[str, str]]) -> Tokenizer:
    """The steps of CLIP's encoding, before special tokens."""
    unknown = EOS if vocab else None
    tokenizer = Tokenizer(
        BPE(vocab, merges, unk_token=unknown, continuing_subword_prefix="", end_of_word_suffix=WORD_END)
    )
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORDS), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _read(folder: Path) -> tuple[dict[str, int], list[tuple[str, str]], dict[str, int]]:
    """vocab, merges and added tokens of either form; KeyError, TypeError or ValueError when they are not CLIP's."""
    if (folder / "tokenizer.json").is_file():
        whole = read_json(folder / "tokenizer.json")
        model: dict[str, Any] = whole["model"]
        if model["type"] != "BPE" or model["end_of_word_suffix"] != WORD_END:
            raise ValueError(f"a {model['type']} model without {WORD_END}")
        vocab, pairs = model["vocab"], model["merges"]
        extra = {token["content"]: token["id"] for token in whole["added_tokens"]}
    else:
        vocab = read_json(folder / "vocab.json")
        lines = (folder / "merges.txt").read_text(encoding="utf-8").split("\n")
        pairs = [line for line in lines[lines[0].startswith("#version") :] if line]
        extra = read_json(folder / "added_tokens.json") if (folder / "added_tokens.json").is_file() else {}
    merges = [(left, right) for left, right in (pair.split(" ") if isinstance(pair, str) else pair for pair in pairs)]
    if not all(type(index) is int for index in [*vocab.values(), *extra.values()]):
        raise ValueError("ids that are no numbers")
    return vocab, merges, {token: index for token, index in extra.items() if token not in vocab}
