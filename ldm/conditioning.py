"""What a network is told beside the latents: the states of the text, the pooled text, and SDXL's sizes."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
from torch import Tensor

from ldm.adapters.strength import tags
from ldm.checkpoints.components import Components
from ldm.errors import UsageError
from ldm.request import Request
from ldm.text.encoder import Conditioning, JoinedEncoders, TextEncoder
from ldm.text.schedules import acts, composed
from ldm.text.transformers_text import TransformersText
from ldm.text.weighting import joined, weighted

SIZES = ("original_height", "original_width", "crop_top", "crop_left")
"""Fields of Request that only a network with size conditioning hears."""


AnyEncoder = TextEncoder | JoinedEncoders | TransformersText


@dataclass(frozen=True, eq=False)
class Script:
    """What the network is told over a run, for B pictures.

    acts: (until, Conditioning [(1 + K) B, T, D]), `until` rising to the number of steps; an act is said in the steps
    whose index, counted from 0, is below its `until` and not below that of the act before. Acts of the same words are
    one object. Rows: the negative block of B, if there is one; then K blocks of B, the parts that AND joins. weights: K
    tuples of B; parts of weight 0 fill up for prompts of fewer parts and need not be computed. tokens: of the T, how
    many each row is told; what is behind them only makes the rows one tensor, and depends on the other prompts. Rows of
    as many tokens may go through the network together. guiding: whether there is a negative block, which parts and
    weights need at any guidance.
    """

    acts: tuple[tuple[int, Conditioning], ...]
    weights: tuple[tuple[float, ...], ...]
    tokens: tuple[int, ...]
    guiding: bool

    def twice_negative(self, images: int) -> "Script":
        """With the negative block said once more before the others: of networks that are guided by a picture too."""
        return self._of([*range(images), *range(len(self.tokens))])

    def positive(self, images: int) -> "Script":
        """Without the negative block: of steps that are not guided."""
        return replace(self._of(range(images, len(self.tokens))), guiding=False)

    def _of(self, rows: Sequence[int]) -> "Script":
        acts = {id(said): said.select(rows) for _, said in self.acts}
        return replace(
            self,
            acts=tuple((until, acts[id(said)]) for until, said in self.acts),
            tokens=tuple(self.tokens[row] for row in rows),
        )


def encoder_of(c: Components) -> AnyEncoder:
    """The text encoder of a model: one, SDXL's two together, or its refiner's second alone."""
    if isinstance(c.text_encoder, TransformersText):
        return c.text_encoder
    pairs = ((c.tokenizer, c.text_encoder), (c.tokenizer_2, c.text_encoder_2))
    parts = [TextEncoder(tokenizer, model, c.is_xl) for tokenizer, model in pairs if tokenizer and model]
    return parts[0] if len(parts) == 1 else JoinedEncoders(tuple(parts))


def layers_left_out(
    encoder: AnyEncoder, clip_skip: int | None, profile: str | None
) -> tuple[int, int, tuple[str, ...]]:
    """How many layers, beside those that the model was trained without, the prompt's encoding and the negative prompt's
    leave out; and a note where clip_skip is not heeded.

    It counts as in A1111: 1 is the last layer, 2 the one before, for both prompts. Profile "diffusers": as there, the
    number of layers left out, for the prompt alone. Profile "a1111": OpenCLIP's encoders (Stable Diffusion 2, SDXL)
    leave out none, as there. UsageError: a number that the encoder has not.
    """
    first = 0 if profile == "diffusers" else 1
    k = first if clip_skip is None else clip_skip
    if k < first:
        raise UsageError(
            f"clip_skip is {k}; it counts from 1, the last layer (2: the one before), as in A1111; diffusers' count of "
            "layers left out, from 0, is that of the profile 'diffusers'"
        )
    if profile == "a1111" and k > 1 and _is_open(encoder):
        return 0, 0, (f"clip_skip {k} was not heeded: A1111 skips no layers of this kind of model",)
    if k > first + encoder.depth:
        raise UsageError(f"clip_skip is {k}; the text encoder of this model takes {first} to {first + encoder.depth}")
    return k - first, 0 if profile == "diffusers" else k - first, ()


def _is_open(encoder: AnyEncoder) -> bool:
    """Whether it is OpenCLIP's (the exact GELU; OpenAI's is the quick one) or one of SDXL's."""
    if isinstance(encoder, TransformersText):
        return False
    several = encoder.parts if isinstance(encoder, JoinedEncoders) else (encoder,)
    return any(part.penultimate or part.model.config.hidden_act == "gelu" for part in several)


class Voice(NamedTuple):
    """One text over a run, a part of a prompt or a negative prompt.

    line: (until, its states [1, T, D]), as the acts of a Script. skip: the layers that are left out of the empty
    windows behind it; None: it is followed by itself, as zeros are.
    """

    line: list[tuple[int, Conditioning]]
    skip: int | None
    weight: float = 1.0


@dataclass(eq=False)
class _Reader:
    """Texts -> voices, each text encoded once. literal: without any syntax. late: how many steps an act is longer."""

    encoder: AnyEncoder
    steps: int
    literal: bool
    late: int
    known: dict[tuple[str, int], Conditioning] = field(default_factory=dict)
    filled: dict[tuple[int, int], Conditioning] = field(default_factory=dict)

    def voice(self, text: str, skip: int, weight: float = 1.0) -> Voice:
        """A text over the run."""
        scenes = _scenes(text, self.steps, self.literal)
        line = [(min(until + self.late, self.steps), self.said(words, skip)) for until, words in scenes]
        return Voice(line, skip, weight)

    def said(self, text: str, skip: int) -> Conditioning:
        """The states [1, T, D] of a text."""
        if (text, skip) not in self.known:
            heard = self.encoder([text], skip) if self.literal else self.encoder.read(weighted(text), skip)
            self.known[text, skip] = heard
        return self.known[text, skip]

    def states(self, voice: Voice, until: int, tokens: int) -> Conditioning:
        """What a voice says in the act that ends at `until`, [1, tokens, D]; the same object for the same states."""
        said = next(said for end, said in voice.line if until <= end)
        if said.context.shape[1] == tokens:
            return said
        if (id(said), tokens) not in self.filled:
            empty = said if voice.skip is None else self.said("", voice.skip)
            self.filled[id(said), tokens] = said.padded(tokens, empty)
        return self.filled[id(said), tokens]


def _parts(prompt: str, plain: bool) -> tuple[tuple[str, float], ...]:
    return ((prompt, 1.0),) if plain else composed(tags(prompt)[0])


def _scenes(text: str, steps: int, plain: bool) -> tuple[tuple[int, str], ...]:
    return ((steps, text),) if plain else acts(text, steps)


def unheard(encoder: AnyEncoder, order: Request) -> tuple[str, ...]:
    """What of a resolved request's prompts is not heard, or otherwise than it may seem; a sentence each, and no network
    is run. Errors of the prompts as of `script`.
    """
    plain, steps = order.plain, order.num_inference_steps
    assert steps
    notes = list(layers_left_out(encoder, order.clip_skip, order.profile)[2])
    texts = list(order.negative_prompts)
    for prompt in order.prompts:
        said = _parts(prompt, plain)
        texts += [text for text, _ in said]
        if len(said) == 1 and said[0][1] != 1:
            end = f"the end of the prompt, {prompt[-20:]!r}, was read as its weight, {said[0][1]:g}"
            notes.append(f"{end}; if it is text, put a comma behind it")
    if plain or isinstance(encoder, TransformersText):  # one window
        for words in dict.fromkeys(words for text in texts for _, words in _scenes(text, steps, plain)):
            lost = " ".join(encoder.dropped([words if plain else joined(weighted(words))])[0])
            if lost:
                shown = lost if len(lost) <= 300 else f"{lost[:300]} ..."
                notes.append(f"the prompt is longer than the encoder's {encoder.room} tokens; not read: {shown!r}")
    return tuple(dict.fromkeys(notes))


def script(
    c: Components,
    encoder: AnyEncoder,
    order: Request,
    guiding: bool,
    given: Conditioning | None,
    negative: Conditioning | None,
) -> Script:
    """What a resolved request tells the network, step by step.

    given, negative: ready embeddings in place of the prompts. Where the texts of a run fill different numbers of
    windows, the shorter ones are filled up with empty windows (A1111's option pad_cond_uncond); in the profile "a1111"
    the negative prompt keeps its own length, as there. UsageError: a wrong number of negative prompts, embeddings that
    do not fit, or a fault in a prompt.
    """
    steps, n = order.num_inference_steps, order.num_images_per_prompt
    assert steps
    skip, skip_negative, _ = layers_left_out(encoder, order.clip_skip, order.profile)
    # A1111 goes on to the next act a step later than it documents: it compares steps counted from 0 with <=
    reader = _Reader(encoder, steps, order.plain, late=int(order.profile == "a1111"))
    if given:
        prompts = [[voice] for voice in _ready(c, given, steps, skip)]
    else:
        said = [_parts(prompt, reader.literal) for prompt in order.prompts]
        prompts = [[reader.voice(text, skip, weight) for text, weight in parts] for parts in said]
    guiding = guiding or any(len(voices) > 1 or voices[0].weight != 1 for voices in prompts)
    asides: list[Voice] = []
    if guiding and negative:
        asides = _ready(c, negative, steps, skip_negative)
        shapes = [_shape(asides), _shape([voice for voices in prompts for voice in voices[:1]])]
        compared = 3 if given else 1  # texts are filled up
        if shapes[0][:compared] != shapes[1][:compared]:
            fault = f"negative_prompt_embeds of shape {shapes[0]} with a prompt's {shapes[1]}"
            raise UsageError(f"{fault}; give equal ones")
    elif guiding:
        asides = _asides(c, order, reader, prompts, skip_negative)
    tokens = [_tokens(voices, asides[i : i + 1], order.profile == "a1111") for i, voices in enumerate(prompts)]
    most = max(map(len, prompts))
    blocks = [[(voices + [voices[0]._replace(weight=0.0)] * most)[k] for voices in prompts] for k in range(most)]
    rows = [voice for block in ([asides] if guiding else []) + blocks for voice in block]
    lengths = [both[k > 0] for k in range(not guiding, 1 + most) for both in tokens]
    return Script(
        acts=_acts(c, reader, rows, max(lengths), n),
        weights=tuple(tuple(voice.weight for voice in block for _ in range(n)) for block in blocks),
        tokens=tuple(length for length in lengths for _ in range(n)),
        guiding=guiding,
    )


def _tokens(voices: Sequence[Voice], aside: Sequence[Voice], apart: bool) -> tuple[int, int]:
    """How many tokens a negative prompt (one, or none) and a prompt are told: as many, unless they are kept apart."""
    own = _shape(voices)[1]
    other = _shape(aside)[1] if aside and aside[0].skip is not None else own
    return (other, own) if apart else (max(other, own),) * 2


def _ready(c: Components, given: Conditioning, steps: int, skip: int) -> list[Voice]:
    """Ready embeddings, each all through the run."""
    fitting = _fitting(c, given)
    return [Voice([(steps, fitting.select([i]))], skip) for i in range(len(fitting))]


def _asides(c: Components, order: Request, reader: _Reader, prompts: list[list[Voice]], skip: int) -> list[Voice]:
    """The negative prompts, one for each prompt. They have no parts, as in A1111."""
    texts = order.negative_prompts or ("",)
    texts = texts * len(prompts) if len(texts) == 1 else texts
    if len(texts) != len(prompts):
        raise UsageError(f"{len(texts)} negative prompts for {len(prompts)} prompts; give one, or one for each")
    zeros = c.flags.get("force_zeros_for_empty_prompt")  # as SDXL was trained
    return [
        _silence(voices[0].line[0][1], reader.steps) if zeros and not text else reader.voice(text, skip)
        for text, voices in zip(texts, prompts, strict=True)
    ]


def _silence(like: Conditioning, steps: int) -> Voice:
    """Zeros, a token of them."""
    pooled = None if like.pooled is None else torch.zeros_like(like.pooled)
    return Voice([(steps, Conditioning(torch.zeros_like(like.context[:, :1]), pooled))], None)


def _shape(voices: Sequence[Voice]) -> list[int]:
    """How many voices, the tokens of the longest, and their width."""
    contexts = [said.context for voice in voices for _, said in voice.line]
    return [len(voices), max(context.shape[1] for context in contexts), contexts[0].shape[2]]


def _acts(
    c: Components, reader: _Reader, voices: Sequence[Voice], tokens: int, n: int
) -> tuple[tuple[int, Conditioning], ...]:
    """The acts of a Script whose rows are these voices, each n times in a row."""
    found: list[tuple[int, Conditioning]] = []
    made: dict[tuple[int, ...], Conditioning] = {}
    for until in sorted({until for voice in voices for until, _ in voice.line}):
        rows = [reader.states(voice, until, tokens) for voice in voices]
        same = tuple(map(id, rows))
        if same not in made:
            if not c.unet.config.projection_class_embeddings_input_dim:  # only SDXL hears the pooled text
                rows = [Conditioning(row.context) for row in rows]
            made[same] = Conditioning.cat(rows).repeat(n)
        if found and found[-1][1] is made[same]:
            found.pop()
        found.append((until, made[same]))
    return tuple(found)


def _fitting(c: Components, given: Conditioning) -> Conditioning:
    """Ready embeddings, if they fit the network. UsageError otherwise."""
    width, shape = c.unet.config.cross_attention_dim, list(given.context.shape)
    if len(shape) != 3 or shape[-1] != width:
        raise UsageError(f"embeddings of shape {shape}; this model takes [prompts, tokens, {width}]")
    if c.unet.config.projection_class_embeddings_input_dim and given.pooled is None:
        raise UsageError("this model (SDXL) also hears the pooled text; give pooled_prompt_embeds beside the others")
    return given.to(c.unet.conv_in.weight.device)


def sizes(c: Components, order: Request, images: int, guiding: bool, parts: int = 1) -> Tensor | None:
    """SDXL's size conditioning (Podell et al. 2023, sec. 2.2) for the rows of a Script, [(1 + parts) images, 6], or
    [parts images, 6] where there is no negative block: original height and width, crop top and left, height and width.
    The refiner's, [..., 5], has an aesthetic score in place of the last two. None for networks without.
    """
    if not c.unet.config.projection_class_embeddings_input_dim:
        return None
    assert order.height and order.width
    first = (
        order.original_height or order.height,
        order.original_width or order.width,
        order.crop_top,
        order.crop_left,
    )
    last: tuple[tuple[float, ...], ...] = ((order.height, order.width),) * 2
    if c.flags.get("requires_aesthetics_score"):
        last = (order.negative_aesthetic_score,), (order.aesthetic_score,)
    rows = [[*first, *end] for end in last[:guiding] + last[1:] * parts]
    return torch.tensor([row for row in rows for _ in range(images)], dtype=torch.float32)
