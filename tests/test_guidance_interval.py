"""Guidance in an interval of the steps: against diffusers' guider and schedulers in a loop by hand, and against runs
that are guided all through or not at all, of which it is made.
"""

import json
from collections.abc import Iterator
from dataclasses import replace
from itertools import groupby, islice
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusers.guiders import ClassifierFreeGuidance
from PIL import Image
from test_families_folders import theirs
from torch import Tensor

from ldm import infotext
from ldm.checkpoints.components import Components
from ldm.checkpoints.folder import open_folder
from ldm.diffusion.guidance import interval
from ldm.errors import UsageError
from ldm.grid import axes
from ldm.interop import from_diffusers, with_scheduler
from ldm.models.unet import UNet
from ldm.pipeline import Pipeline
from ldm.recipe import fields_of
from ldm.request import Request
from ldm.schedulers import SCHEDULERS, Step

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy keyword"),  # in Heun's
]
MIDDLE = {"guidance_start": 0.25, "guidance_stop": 0.75, "num_inference_steps": 4}  # steps 1 and 2
INSIDE = [False, True, True, False]
PROMPTS = ("a taco", "an owl on a pizza")


@pytest.fixture(scope="module")
def parts(model: Path) -> Components:
    return open_folder(model, torch.float32, torch.device("cpu"))


@pytest.fixture(scope="module")
def pipeline(parts: Components) -> Pipeline:
    return Pipeline(parts)


@pytest.fixture(scope="module")
def unet(model: Path) -> torch.nn.Module:
    return diffusers.UNet2DConditionModel.from_pretrained(model / "unet", local_files_only=True).eval()


@pytest.fixture(scope="module")
def xl(tmp_path_factory: pytest.TempPathFactory) -> Pipeline:
    return from_diffusers(theirs("sdxl", tmp_path_factory.mktemp("xl")))


class Rows:
    """Counts the rows that go through a network."""

    def __init__(self, network: torch.nn.Module) -> None:
        self.seen = 0
        self.hook = network.register_forward_pre_hook(self._see)

    def _see(self, _: torch.nn.Module, inputs: tuple[Any, ...]) -> None:
        self.seen += len(inputs[0])

    def taken(self) -> int:
        """Since it was asked last."""
        seen, self.seen = self.seen, 0
        return seen


# -- against diffusers -------------------------------------------------------------------------------------------------


def test_the_steps_inside_are_those_of_diffusers_guiders() -> None:
    shares = [0.0, 0.1, 0.25, 0.29, 1 / 3, 0.5, 0.57, 0.7, 0.99, 1.0]
    for start, stop in [(start, stop) for start in shares for stop in shares if start < stop]:
        guider = ClassifierFreeGuidance(start=start, stop=stop)
        for steps in (1, 2, 3, 7, 10, 25, 49, 100):
            guided = []
            for step in range(steps):
                guider.set_state(step, steps, torch.tensor(0))
                guided += [step] * (guider.num_conditions == 2)
            assert list(interval(start, stop, steps)) == guided, (start, stop, steps)


def by_hand(
    unet: torch.nn.Module, scheduler: Any, guider: Any, texts: list[Tensor], x: Tensor, steps: int
) -> tuple[Tensor, int]:
    """The last latents of diffusers' U-Net, scheduler and guider, and how many rows went through the network. Both
    calls of a step of Heun are that step's.
    """
    scheduler.set_timesteps(steps)
    x, rows, calls = x * scheduler.init_noise_sigma, Rows(unet), getattr(scheduler, "order", 1)
    for k, t in enumerate(scheduler.timesteps):
        guider.set_state(k // calls, steps, t)
        seen = scheduler.scale_model_input(x, t)
        said = [unet(seen, t, text).sample for text in texts[: guider.num_conditions]]
        x = scheduler.step(guider.forward(*said).pred, t, x).prev_sample
    rows.hook.remove()
    return x, rows.taken()


@pytest.mark.parametrize(
    ("theirs", "ours", "fields"),
    [
        ("DDIMScheduler", "ddim", {}),
        ("DDIMScheduler", "ddim", {"guidance_start": 0.0}),
        ("DDIMScheduler", "ddim", {"guidance_start": 0.5, "guidance_stop": 0.6}),  # no step
        ("DPMSolverMultistepScheduler", "dpm++2m", {"guidance_rescale": 0.7, "negative_prompt": "a pizza"}),
        ("HeunDiscreteScheduler", "heun", {"guidance_rescale": 0.5}),
        ("HeunDiscreteScheduler", None, {}),
        ("IPNDMScheduler", None, {"guidance_stop": 0.5}),
    ],
)
@torch.inference_mode()
def test_it_is_diffusers_guider(
    model: Path, parts: Components, unet: torch.nn.Module, theirs: str, ours: str | None, fields: dict[str, Any]
) -> None:
    """ours: None where diffusers' own scheduler steps."""
    config = json.loads((model / "scheduler" / "scheduler_config.json").read_text())
    stock = getattr(diffusers, theirs).from_config(config)
    pipeline = Pipeline(parts) if ours else with_scheduler(Pipeline(parts), stock)
    request = Request(PROMPTS, scheduler=ours, guidance_scale=5.0, **{**MIDDLE, **fields})
    texts = [pipeline.text_encoder([*words]).context for words in (PROMPTS, [request.negative_prompt] * 2)]
    noise = torch.randn(2, 4, 8, 8)
    guider = ClassifierFreeGuidance(
        5.0, request.guidance_rescale, start=request.guidance_start, stop=request.guidance_stop
    )
    latents, count = by_hand(unet, stock, guider, texts, noise.clone(), 4)
    rows = Rows(parts.unet)
    drawn = pipeline(request, latents=noise, output_type="latent").latents
    rows.hook.remove()
    assert rows.taken() == count
    assert float((drawn - latents).abs().max() / latents.abs().max()) <= 1e-5


# -- a run in an interval is made of runs that are guided and runs that are not ----------------------------------------


def made_of(pipeline: Pipeline, request: Request, inside: list[bool], latents: Tensor | None) -> Iterator[Step]:
    """The steps of two runs that know no interval, one at the request's guidance and one at 1, each going on after the
    last step of the other.
    """
    whole = {"guidance_start": 0.0, "guidance_stop": 1.0}
    kinds = {True: replace(request, **whole), False: replace(request, **whole, guidance_scale=1.0)}
    last = None
    for kind, steps in groupby(inside):
        for step in islice(pipeline.sample(kinds[kind], latents=latents, resume=last), len(list(steps))):
            yield step
        last = step


def equal(pipeline: Pipeline, request: Request, inside: list[bool], latents: Tensor | None = None) -> list[int]:
    """How many rows each step takes of a run that is, to the last bit, what it is made of, also where it is resumed."""
    order, rows, each = pipeline.resolve(request), Rows(pipeline.components.unet), []
    expected = list(made_of(pipeline, order, inside, latents))
    needed = rows.taken()
    steps = []
    for step in pipeline.sample(order, latents=latents):
        steps.append(step)
        each.append(rows.taken())
    rows.hook.remove()
    assert len(steps) == len(expected) == len(inside) and sum(each) == needed
    assert all(torch.equal(a.x, b.x) and a.calls == b.calls for a, b in zip(steps, expected, strict=True))
    (*_, last) = pipeline.sample(order, latents=latents, resume=steps[0])
    assert torch.equal(last.latents, steps[-1].latents)
    return each


EVERYDAY = ("euler_a", "heun", "dpm++sde", "dpm++2m", "plms", "lcm")  # the others take 7 s of CPU


@pytest.mark.parametrize(
    "scheduler", [name if name in EVERYDAY else pytest.param(name, marks=pytest.mark.slow) for name in SCHEDULERS]
)
def test_every_scheduler(pipeline: Pipeline, scheduler: str) -> None:
    request = Request("a taco", seed=3, guidance_scale=4.0, scheduler=scheduler, **MIDDLE)
    rows = equal(pipeline, request, INSIDE)
    calls = [step.calls for step in pipeline.sample(replace(request, guidance_scale=1.0))]
    own = [b - a for a, b in zip([0, *calls], calls, strict=False)]
    assert rows == [n * (1 + inside) for n, inside in zip(own, INSIDE, strict=True)]  # half of the work


PICTURE = {"image": Image.new("RGB", (16, 16), "red"), "mask_image": "box:0,0,8,8"}
RUNS: dict[str, tuple[dict[str, Any], list[bool], list[int]]] = {  # fields of Request, steps inside, rows of each step
    "several": ({"prompt": PROMPTS, "negative_prompt": ("a pizza", "an owl")}, INSIDE, [2, 4, 4, 2]),
    "rescaled": ({"guidance_rescale": 0.7}, INSIDE, [1, 2, 2, 1]),
    "all": ({"guidance_start": 0.0, "guidance_stop": 1.0}, [True] * 4, [2] * 4),
    "schedules": ({"prompt": "a [taco|owl] [on::2] [pizza:3]", "negative_prompt": "[owl|taco]"}, INSIDE, [1, 2, 2, 1]),
    "a1111": ({"profile": "a1111", "prompt": "an owl " * 90, "scheduler": "euler"}, INSIDE, [1, 2, 2, 1]),
    "parts": ({"prompt": "a taco AND an owl :0.5"}, INSIDE, [3] * 4),  # as at guidance 1
    "inpainting": (PICTURE, INSIDE, [1, 2, 2, 1]),
    "laps": (
        PICTURE | {"resample": 2, "resample_jump": 2, "scheduler": "dpm++sde"},  # 0 | 1 2 | 1 2 | 3 | 3
        [False, True, True, True, True, False, False], [2, 4, 4, 4, 4, 1, 1],
    ),
    "strength": ({"image": PICTURE["image"], "strength": 0.5}, INSIDE, [1, 2, 2, 1]),
    "strength of diffusers": (
        {"image": PICTURE["image"], "strength": 0.5, "profile": "diffusers"}, [True, False], [2, 1]
    ),
    "first half": ({"denoising_end": 0.5}, INSIDE[:2], [1, 2]),
}  # fmt: skip


@pytest.mark.parametrize("name", RUNS)
def test_every_kind_of_run(pipeline: Pipeline, name: str) -> None:
    fields, inside, rows = RUNS[name]
    asked = {"prompt": "a taco", "seed": 3, "guidance_scale": 4.0, **MIDDLE, **fields}
    assert equal(pipeline, Request(**asked), inside) == rows


def test_a_later_part_counts_the_steps_of_the_whole(pipeline: Pipeline) -> None:
    request = Request("a taco", seed=3, guidance_scale=4.0, denoising_start=0.5, **MIDDLE)
    latents = torch.randn(1, 4, 8, 8)
    assert equal(pipeline, request, INSIDE[2:], latents) == [2, 1]
    assert equal(pipeline, replace(request, profile="diffusers"), [True, False], latents) == [2, 1]
    late = replace(request, guidance_start=0.5, guidance_stop=1.0)
    assert equal(pipeline, late, [True, True], latents) == [2, 2]
    assert equal(pipeline, replace(late, profile="diffusers"), [False, True], latents) == [1, 2]


@pytest.mark.parametrize(
    ("channels", "fields", "rows"),
    [
        (9, PICTURE, [1, 2, 2, 1]),
        (8, {"image": PICTURE["image"]}, [3, 3, 3, 3]),  # guidance by the picture has no interval
        (8, {"image": PICTURE["image"], "image_guidance_scale": 1.0}, [1, 2, 2, 1]),
    ],
)
def test_networks_that_see_a_picture(parts: Components, channels: int, fields: dict[str, Any], rows: list[int]) -> None:
    network = UNet(replace(parts.unet.config, in_channels=channels)).eval()
    pipeline = Pipeline(replace(parts, unet=network))
    assert equal(pipeline, Request("a taco", seed=3, guidance_scale=4.0, **MIDDLE, **fields), INSIDE) == rows


def test_sdxl(xl: Pipeline) -> None:
    request = Request(PROMPTS, seed=3, guidance_scale=4.0, crop_top=8, height=32, width=32, **MIDDLE)
    assert equal(xl, request, INSIDE) == [2, 4, 4, 2]


# -- how it is asked for, and kept -------------------------------------------------------------------------------------


def test_what_is_refused() -> None:
    for fields, said in [
        ({"guidance_start": -0.1}, "guidance_start is -0.1; it must be a number from 0 to 1"),
        ({"guidance_stop": 1.5}, "guidance_stop is 1.5; it must be a number from 0 to 1"),
        ({"guidance_stop": None}, "guidance_stop is None; it must be a number from 0 to 1"),
        ({"guidance_start": 0.5, "guidance_stop": 0.5},
         "guidance_start is 0.5 and guidance_stop 0.5; guidance ends after it starts"),
        ({"guidance_start": 1.0}, "guidance_start is 1.0 and guidance_stop 1.0; guidance ends after it starts"),
    ]:  # fmt: skip
        with pytest.raises(UsageError) as refused:
            Request("a taco", **fields)  # type: ignore[arg-type]
        assert str(refused.value) == said


def test_axes_and_recipes(pipeline: Pipeline) -> None:
    assert axes("guidance-stop=0.5,1") == ("guidance_stop", [0.5, 1.0])
    assert axes("guidance_start=0..0.5:0.25") == ("guidance_start", [0.0, 0.25, 0.5])
    (order,) = pipeline.resolve(Request("a taco", seed=1, **MIDDLE)).singles()
    kept = fields_of(order)
    assert (kept["guidance_start"], kept["guidance_stop"]) == (0.25, 0.75)


@pytest.mark.parametrize("steps", [1, 3, 20, 49, 100])
def test_a1111_skips_as_many_steps(steps: int) -> None:
    """It leaves the negative prompt out where step / steps <= "Skip Early CFG", if that is not 0."""

    def skipped(value: float) -> int:
        return sum(value != 0 and step / steps <= value for step in range(steps))

    for first in range(steps):
        asked = {"prompt": "x", "num_inference_steps": steps, "guidance_start": (first + 0.5) / steps, "seed": 1}
        text = infotext.write(asked, {"Version": "z"})
        said = infotext.parse(text).get("Skip Early CFG", "0")
        assert skipped(float(said)) == first
        back = infotext.request_fields(text)[0]
        assert interval(back.get("guidance_start", 0.0), 1.0, steps).start == first
    for value in [k / 100 for k in range(101)]:  # its slider's
        found, notes = infotext.request_fields(f"x\nSteps: {steps}, Seed: 1, CFG scale: 2, Skip Early CFG: {value}")
        if skipped(value) < steps:
            assert interval(found.get("guidance_start", 0.0), 1.0, steps).start == skipped(value) and not notes
        else:
            assert "guidance_start" not in found and "it was left out" in notes[0]
    for odd in ("nan", "inf", "1e308", "-1", "much"):
        found, notes = infotext.request_fields(f"x\nSteps: {steps}, Seed: 1, CFG scale: 2, Skip Early CFG: {odd}")
        assert "guidance_start" not in found and len(notes) == 1
