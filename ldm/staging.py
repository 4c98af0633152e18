"""From a request to a run: every open choice made; prompt -> embeddings, picture -> latents."""

import secrets
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from ldm import loras
from ldm.adapters.weights import at
from ldm.checkpoints.components import Components
from ldm.conditioning import AnyEncoder, script, sizes
from ldm.decoding import VAE
from ldm.editing import Ground, ground_of, guided_by_picture
from ldm.noise import Generator
from ldm.refusals import refuse_unfit
from ldm.request import Request
from ldm.runtime import latent_sides, refuse_if_too_large
from ldm.schedulers import Sampling
from ldm.text.encoder import Conditioning
from ldm.walk import Run, steps_of

FALLBACKS = {"num_inference_steps": 25, "guidance_scale": 7.5}  # of a model without generation_config.json
XL_FALLBACKS = FALLBACKS | {"guidance_scale": 5.0}


def resolved(c: Components, sampling: Sampling, request: Request, count: int) -> Request:
    """A request for `count` pictures with every open choice made, that of the seeds too. Its pictures are `settled`.
    UsageError: it cannot be drawn.
    """
    side = c.unet.config.sample_size * c.vae.config.factor
    known: dict[str, Any] = XL_FALLBACKS if c.is_xl else FALLBACKS
    known = {"height": side, "width": side, **known, **c.generation}
    known |= {"noise_source": "gpu" if request.profile == "a1111" else "cpu"}
    chosen = {name: value for name, value in known.items() if getattr(request, name) is None}
    drawn = ("seed", "variation_seed") if request.variation_strength else ("seed",)
    chosen |= {name: secrets.randbelow(2**32) for name in drawn if getattr(request, name) is None}
    chosen |= {"scheduler": sampling.scheduler.name, "nfe": None}
    chosen |= {"schedule_type": sampling.spacing.sigma_grid or request.schedule_type}
    chosen |= {"num_inference_steps": steps_of(sampling, request, known["num_inference_steps"])}
    order = replace(request, **chosen)
    refuse_unfit(c, sampling, order)
    return replace(order, seed=order.seeds(count), variation_seed=order.variation_seeds(count))


def run_of(
    c: Components,
    vae: VAE,
    encoder: AnyEncoder,
    sampling: Sampling,
    order: Request,
    draws: Sequence[Generator],
    at_once: int,
    given: Conditioning | None = None,
    negative: Conditioning | None = None,
    ground: Ground | None = None,
) -> Run:
    """A run of a resolved request. draws: where each picture's noise comes from. at_once: pictures in one network call.
    given, negative: embeddings in place of the prompts. ground: the picture, where it is encoded already. UsageError:
    it does not fit the memory, or embeddings not the network.
    """
    assert order.height and order.width and order.guidance_scale is not None
    images = len(draws)
    refuse_if_too_large(c.unet, vae, order.height, order.width, at_once, images)
    cast, by_picture = loras.cast_of(c, order), guided_by_picture(order)
    with c.weights.using(at(cast)):
        said = script(c, encoder, order, by_picture or order.guidance_scale != 1, given, negative)
    shape = (vae.config.latent_channels, *latent_sides(order.height, order.width, vae.config.factor))
    told = sizes(c, order, images, said.guiding, len(said.weights))
    if by_picture:
        said, told = said.twice_negative(images), told if told is None else torch.cat([told[:images], told])
    ground = ground or ground_of(c, vae, order)
    return Run(c.unet, sampling, order, shape, said, told, draws, c.weights, cast, ground)
