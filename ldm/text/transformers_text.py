"""T5 and BERT as text encoders (Raffel et al. 2020; Devlin et al. 2019), computed by transformers.

That package is imported only when such a model is opened, and given no file of weights and no config.json: what a file
says reaches it through the tables below.
"""

from bisect import bisect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor, nn

from ldm.checkpoints.load import load_into
from ldm.checkpoints.safe import read_header, read_json
from ldm.errors import ModelError, UsageError
from ldm.models.config import refuse_unmodelled, take
from ldm.text.encoder import Conditioning, emphasised
from ldm.text.weighting import Piece, joined

LONGEST = 4096  # a tokenizer that states no window states one far longer
TIED = "encoder.embed_tokens.weight"  # T5's second name for its embedding


class Kind(NamedTuple):
    """What goes with a class of transformers': the class of its config and of its tokenizer, the kind of encoding that
    tokenizer.json holds, the file that may stand in its place, the window of a tokenizer that states none, the field
    with the width, and the fields we take from config.json with transformers' defaults.
    """

    config: str
    tokenizer: str
    encoding: str
    vocabulary: str
    window: int
    width: str
    fields: dict[str, Any]


KINDS = {
    "T5EncoderModel": Kind(
        "T5Config",
        "T5Tokenizer",
        "Unigram",
        "spiece.model",
        77,
        "d_model",
        {
            "model_type": "t5",
            "vocab_size": 32128,
            "d_model": 512,
            "d_kv": 64,
            "d_ff": 2048,
            "num_layers": 6,
            "num_heads": 8,
            "relative_attention_num_buckets": 32,
            "relative_attention_max_distance": 128,
            "layer_norm_epsilon": 1e-6,
            "feed_forward_proj": "relu",
            "use_attention_mask": False,
        },
    ),
    "BertModel": Kind(
        "BertConfig",
        "BertTokenizer",
        "WordPiece",
        "vocab.txt",
        32,
        "hidden_size",
        {
            "model_type": "bert",
            "vocab_size": 30522,
            "hidden_size": 768,
            "num_hidden_layers": 12,
            "num_attention_heads": 12,
            "intermediate_size": 3072,
            "hidden_act": "gelu",
            "max_position_embeddings": 512,
            "type_vocab_size": 2,
            "layer_norm_eps": 1e-12,
            "use_attention_mask": False,
        },
    ),
}


@dataclass(frozen=True)
class TransformersTextConfig:
    """Shape of a TransformersText: the name of transformers' class, and its fields under transformers' names.

    use_attention_mask among them: whether padding is hidden from the text, as diffusers reads it.
    """

    architecture: str
    fields: Mapping[str, Any]

    @property
    def hidden_size(self) -> int:
        """Width of the states."""
        return int(self.fields[KINDS[self.architecture].width])

    @property
    def vocab_size(self) -> int:
        """Number of tokens."""
        return int(self.fields["vocab_size"])

    @classmethod
    def from_dict(cls, config: Mapping[str, object]) -> Self:
        """Reads transformers' `text_encoder/config.json`. ModelError for a class or setting that is not supported."""
        named = config.get("architectures")
        name = str(named[0]) if isinstance(named, list) and named else ""
        if name not in KINDS:
            raise ModelError(f"a text encoder of class {name!a:.80} is not supported; use {' or '.join(KINDS)}")
        kind, fields = f"{name} config", KINDS[name].fields
        fixed: dict[str, tuple[object, ...]] = {
            "model_type": (fields["model_type"],),
            "is_decoder": (None, False),
            "position_embedding_type": (None, "absolute"),
            "quantization_config": (None,),
        }
        refuse_unmodelled(kind, config, fixed, frozenset(config))
        return cls(name, {field: take(kind, config, field, default) for field, default in fields.items()})

    def to_dict(self) -> dict[str, object]:
        """The `config.json` with which stock transformers builds the same network."""
        return {"architectures": [self.architecture], **self.fields}


class TransformersText(nn.Module):
    """A tokenizer and the text model that goes with it, behind the call of ldm.text.encoder.TextEncoder."""

    def __init__(self, config: TransformersTextConfig, model: nn.Module, tokenizer: Any) -> None:
        """model, tokenizer: transformers' objects of the classes that KINDS names."""
        super().__init__()
        self.config, self.tokenizer = config, tokenizer
        # in a tuple, and its parts registered in its place: their keys are then those of the files
        self._whole = (model,)
        for name, part in model.named_children():
            self.add_module(name, part)
        stated, default = tokenizer.model_max_length, KINDS[config.architecture].window
        window = stated if isinstance(stated, int) and 2 < stated <= LONGEST else default
        self.max_length: int = min(window, config.fields.get("max_position_embeddings", window))

    @classmethod
    def from_folder(
        cls,
        folder: str | Path,
        tokenizer: str | Path,
        dtype: torch.dtype | None = None,
        device: str | torch.device = "cpu",
        weights: Sequence[Path] | None = None,
    ) -> Self:
        """Opens the `text_encoder/` and `tokenizer/` of a model folder, local files only.

        weights: the safetensors file, or its shards; by default `model.safetensors`. dtype None keeps the files'.
        ModelError when transformers is not installed, or a file is missing, damaged or of another class.
        """
        folder = Path(folder)
        config = TransformersTextConfig.from_dict(read_json(folder / "config.json"))
        files = [folder / "model.safetensors"] if weights is None else list(weights)
        names = {name for file in files for name in read_header(file).tensors}
        model = _built(config, names)
        load_into(model, files)  # mapped; cast and moved one tensor at a time below
        for name, parameter in model.named_parameters():
            wanted = dtype or parameter.dtype
            # the results of these leave float16's range; transformers, too, keeps them
            wanted = torch.float32 if wanted == torch.float16 and name.endswith(".wo.weight") else wanted
            parameter.data = parameter.data.to(device, wanted)
        if config.architecture == "T5EncoderModel":
            model.encoder.embed_tokens = None  # the forward pass needs but one of the two
        else:  # buffers that no file holds
            places = torch.arange(config.fields["max_position_embeddings"], device=device)[None]
            model.embeddings.position_ids, model.embeddings.token_type_ids = places, torch.zeros_like(places)
        words = _tokenizer(Path(tokenizer), KINDS[config.architecture])
        if len(words) > config.vocab_size:
            sizes = f"a tokenizer of {len(words)} tokens and a text encoder of {config.vocab_size}"
            raise ModelError(f"{folder} and {tokenizer} are of different models: {sizes}; take both of one model")
        return cls(config, model.eval(), words)

    @torch.no_grad()
    def forward(self, prompts: Sequence[str], clip_skip: int | None = None) -> Conditioning:
        """Context [B, T, D], the last hidden states, of the prompts; no pooled vectors.

        UsageError for no prompts at all, or a clip_skip, which only CLIP has.
        """
        if not prompts:
            raise UsageError("no prompts; give at least one (it may be empty)")
        if clip_skip:
            raise UsageError(f"clip_skip {clip_skip}; a text encoder of class {self.config.architecture} has none")
        unique = list(dict.fromkeys(prompts))
        parts = [self._encode(prompt) for prompt in unique]  # one a call: no prompt depends on its neighbours
        return Conditioning(torch.cat(parts)[[unique.index(prompt) for prompt in prompts]])

    @torch.no_grad()
    def read(self, pieces: Sequence[Piece], clip_skip: int | None = None) -> Conditioning:
        """Context [1, T, D] of one prompt with its weights. There is but one window: what is beyond it is not read, and
        a BREAK is a space. Otherwise as above.
        """
        said = self([joined(pieces)], clip_skip)
        ends = list(accumulate(len(joined([piece])) for piece in pieces))
        places = self._window(joined(pieces)).offset_mapping[0].tolist()
        weights = [pieces[bisect(ends, begin)].weight if begin < end else 1.0 for begin, end in places]
        return Conditioning(emphasised(said.context, weights))

    def _window(self, prompt: str) -> Any:
        """transformers' tokens of one prompt, padded and cut to the window, and the places they come from."""
        return self.tokenizer(
            _valid(prompt),
            padding="max_length",
            max_length=self.max_length,
            truncation=True,
            return_tensors="pt",
            return_offsets_mapping=True,
        )

    def _encode(self, prompt: str) -> Tensor:
        """One prompt -> [1, T, D]"""
        said = self._window(prompt)
        model: Any = self._whole[0]
        embedding = model.get_input_embeddings()
        device = embedding.weight.device
        mask = said.attention_mask.to(device) if self.config.fields["use_attention_mask"] else None
        states: Tensor = model(inputs_embeds=embedding(said.input_ids.to(device)), attention_mask=mask)[0]
        return states.to(embedding.weight.dtype)

    @property
    def depth(self) -> int:
        """How many layers may be left out at most: none."""
        return 0

    @property
    def vocabulary(self) -> str:
        """The tokenizer's tokenizer.json."""
        text: str = self.tokenizer.backend_tokenizer.to_str()
        return text

    @property
    def room(self) -> int:
        """How many tokens of text fit beside the special ones."""
        return self.max_length - int(self.tokenizer.num_special_tokens_to_add())

    def dropped(self, prompts: Sequence[str]) -> tuple[tuple[str, ...], ...]:
        """For each prompt the words beyond the window, which the model does not see; () where all of it fits."""
        return tuple(self._dropped(_valid(prompt)) for prompt in prompts)

    def _dropped(self, prompt: str) -> tuple[str, ...]:
        said = self.tokenizer(prompt, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        places = said.offset_mapping[self.room :]
        cut = places[0][0] if places else len(prompt)
        while 0 < cut < len(prompt) and not prompt[cut].isspace() and not prompt[cut - 1].isspace():
            cut -= 1  # a word is lost whole when one of its tokens is
        return tuple(prompt[cut:].split())

    def save_tokenizer(self, folder: str | Path) -> None:
        """Writes the tokenizer's files, which stock transformers reads."""
        self.tokenizer.save_pretrained(str(folder))


def _transformers() -> Any:
    try:
        import transformers
    except ImportError as error:
        raise ModelError("this model's text encoder needs the package transformers; install it") from error
    return transformers


def _built(config: TransformersTextConfig, names: set[str]) -> Any:
    """transformers' model on the meta device, with the parts of which the files have weights."""
    library, kind = _transformers(), KINDS[config.architecture]
    own = {name: value for name, value in config.fields.items() if name not in ("model_type", "use_attention_mask")}
    try:
        with torch.device("meta"):
            made = getattr(library, kind.config)(**own)
            if config.architecture == "BertModel":
                return library.BertModel(made, add_pooling_layer="pooler.dense.weight" in names)
            model = library.T5EncoderModel(made)
    except (ValueError, TypeError, KeyError) as error:
        raise ModelError(f"{config.architecture} config: {error!s:.200}; correct config.json") from error
    if TIED not in names:
        model.encoder.embed_tokens = None
    return model


def _tokenizer(folder: Path, kind: Kind) -> Any:
    """transformers' tokenizer of that kind, whatever class the files name."""
    whole = folder / "tokenizer.json"
    try:
        if not whole.is_file() and not (folder / kind.vocabulary).is_file():
            raise ValueError(f"no {whole.name} or {kind.vocabulary}")  # without, transformers makes up an empty one
        if whole.is_file() and read_json(whole)["model"]["type"] != kind.encoding:
            raise ValueError(f"{whole.name} is not of {kind.encoding}")
        return getattr(_transformers(), kind.tokenizer).from_pretrained(str(folder), local_files_only=True)
    except Exception as error:  # of many kinds, from several packages
        fault = f"{folder} holds no {kind.tokenizer} that can be read ({error!r:.200})"
        raise ModelError(f"{fault}; fetch it again") from error


def _valid(prompt: str) -> str:
    """UsageError for a prompt that is not valid Unicode."""
    try:
        prompt.encode()
    except UnicodeEncodeError as error:
        fault = f"the prompt {prompt!a:.60} is not valid Unicode ({error.reason})"
        raise UsageError(f"{fault}; retype it") from error
    return prompt
