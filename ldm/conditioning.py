"""What a network is told beside the latents: the states of the text, the pooled text, and SDXL's sizes."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ldm.checkpoints.components import Components
from ldm.errors import UsageError
from ldm.request import Request
from ldm.text.encoder import Conditioning, JoinedEncoders, TextEncoder
from ldm.text.transformers_text import TransformersText

SIZES = ("original_height", "original_width", "crop_top", "crop_left")
"""Fields of Request that only a network with size conditioning hears."""


AnyEncoder = TextEncoder | JoinedEncoders | TransformersText


def encoder_of(c: Components) -> AnyEncoder:
    """The text encoder of a model: one, SDXL's two together, or its refiner's second alone."""
    if isinstance(c.text_encoder, TransformersText):
        return c.text_encoder
    pairs = ((c.tokenizer, c.text_encoder), (c.tokenizer_2, c.text_encoder_2))
    parts = [TextEncoder(tokenizer, model, c.is_xl) for tokenizer, model in pairs if tokenizer and model]
    return parts[0] if len(parts) == 1 else JoinedEncoders(tuple(parts))


def encode(encoder: AnyEncoder, prompts: Sequence[str], clip_skip: int | None) -> Conditioning:
    """Prompts -> Conditioning. UsageError names the words that do not fit the encoder's window."""
    for dropped in encoder.dropped(prompts):
        if dropped:
            raise UsageError(
                f"the prompt is longer than the encoder's {encoder.room} tokens: {' '.join(dropped)!r} would be "
                f"lost; shorten it"
            )
    said: Conditioning = encoder(prompts, clip_skip)
    return said


def conditioning(
    c: Components,
    encoder: AnyEncoder,
    order: Request,
    guiding: bool,
    given: Conditioning | None,
    negative: Conditioning | None,
) -> Conditioning:
    """What the network is told: [B, T, D], or [2 B, T, D] with the negative half first when guiding.

    given, negative: ready embeddings in place of the prompts. UsageError: a wrong number of negative prompts, or
    embeddings that do not fit.
    """
    n = order.num_images_per_prompt
    positive = _fitting(c, given) if given else encode(encoder, order.prompts, order.clip_skip)
    parts = [positive]
    if guiding:
        asides = order.negative_prompts or ("",)
        asides = asides * len(positive) if len(asides) == 1 else asides
        if len(asides) != len(positive):
            raise UsageError(f"{len(asides)} negative prompts for {len(positive)} prompts; give one, or one for each")
        if negative:
            other = _fitting(c, negative)
        elif c.flags.get("force_zeros_for_empty_prompt") and not any(asides):  # as SDXL was trained
            pooled = None if positive.pooled is None else torch.zeros_like(positive.pooled)
            other = Conditioning(torch.zeros_like(positive.context), pooled)
        else:
            other = encode(encoder, asides, None)  # diffusers' clip_skip is the prompt's alone
        shapes = [list(part.context.shape) for part in (other, positive)]
        if shapes[0] != shapes[1]:
            raise UsageError(
                f"negative_prompt_embeds of shape {shapes[0]} with a prompt's {shapes[1]}; give equal ones"
            )
        parts.insert(0, other)
    if not c.unet.config.projection_class_embeddings_input_dim:  # only SDXL hears the pooled text
        parts = [Conditioning(part.context) for part in parts]
    return Conditioning.cat([part.repeat(n) for part in parts])


def _fitting(c: Components, given: Conditioning) -> Conditioning:
    """Ready embeddings, if they fit the network. UsageError otherwise."""
    width, shape = c.unet.config.cross_attention_dim, list(given.context.shape)
    if len(shape) != 3 or shape[-1] != width:
        raise UsageError(f"embeddings of shape {shape}; this model takes [prompts, tokens, {width}]")
    if c.unet.config.projection_class_embeddings_input_dim and given.pooled is None:
        raise UsageError("this model (SDXL) also hears the pooled text; give pooled_prompt_embeds beside the others")
    return given


def sizes(c: Components, order: Request, images: int, guiding: bool) -> Tensor | None:
    """SDXL's size conditioning (Podell et al. 2023, sec. 2.2) [images, 6], or twice as many when guiding: original
    height and width, crop top and left, height and width. The refiner's, [images, 5], has an aesthetic score in place
    of the last two. None for networks without.
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
    rows = [[*first, *end] for end in last[not guiding :]]
    return torch.tensor([row for row in rows for _ in range(images)], dtype=torch.float32)
