"""One pipeline in many threads: no shared state, no lock while networks compute, the bits of one after the other."""

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ldm.pipeline import Pipeline
from ldm.request import Request
from ldm.schedulers import SCHEDULERS

THREADS = 8


@pytest.fixture
def pipeline(model: Path) -> Iterator[Pipeline]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield Pipeline.from_pretrained(model)
    torch.set_num_threads(before)


def orders(count: int) -> list[Request]:
    """Requests that differ in all that a call could leave behind."""
    names = list(SCHEDULERS)
    return [
        Request(
            ("an owl", "a pizza", "a taco")[i % 3],
            seed=i,
            scheduler=names[i % len(names)],
            num_inference_steps=2 + i % 2,
            guidance_scale=1.0 + i % 3,
            width=8 + 4 * (i % 4),
            height=8,
            variation_strength=0.3 * (i % 5 == 0),
            variation_seed=i if i % 5 == 0 else None,
            output_type="np",
        )
        for i in range(count)
    ]


@pytest.mark.parametrize("count", [35, pytest.param(1000, marks=pytest.mark.slow)])
def test_eight_threads_draw_what_one_draws(pipeline: Pipeline, count: int) -> None:
    asked = orders(count)
    alone = [pipeline(order).images for order in asked]
    with ThreadPoolExecutor(THREADS) as pool:
        together = list(pool.map(lambda order: pipeline(order).images, asked))
    assert all(a.tobytes() == b.tobytes() for a, b in zip(alone, together, strict=True))  # type: ignore[union-attr]
    assert len({a.tobytes() for a in alone}) == count  # type: ignore[union-attr]


def test_network_calls_overlap(pipeline: Pipeline) -> None:
    """Every thread waits inside the U-Net until all of them are there, which a lock around it would never let be."""
    together = threading.Barrier(THREADS, timeout=60)

    def wait(*_: Any) -> None:
        together.wait()

    for network in (pipeline.unet, pipeline.vae.decoder, pipeline.text_encoder.model):
        hook = network.register_forward_pre_hook(wait)
        # every request makes the same number of calls of each network
        asked = [Request("an owl", seed=i, num_inference_steps=2, output_type="np") for i in range(THREADS)]
        with ThreadPoolExecutor(THREADS) as pool:
            drawn = list(pool.map(lambda order: pipeline(order).images, asked))
        hook.remove()
        assert len(drawn) == THREADS and not together.broken


def test_two_runs_step_by_step_in_turns(pipeline: Pipeline) -> None:
    """The state of a run is in its generator: two runs that take turns end as each does alone."""
    first, second = orders(2)
    alone: list[Tensor] = [list(pipeline.sample(order))[-1].latents for order in (first, second)]
    runs = [pipeline.sample(order) for order in (first, second)]
    last: list[Any] = [None, None]
    while any(runs):
        for i, run in enumerate(runs):
            if run is None:
                continue
            step = next(run, None)
            last[i] = step or last[i]
            if step is None:
                runs[i] = None  # type: ignore[call-overload]
    assert all(torch.equal(a, b.latents) for a, b in zip(alone, last, strict=True))
