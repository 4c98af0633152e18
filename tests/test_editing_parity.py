"""Edits as diffusers' pipelines make them: image-to-image, inpainting with networks of 4 and of 9 channels, and
instruct-pix2pix, of Stable Diffusion 1 and SDXL with their true topologies, narrower, and random weights.

Both sides begin with the same seed. What is compared is the last latents, the picture, and where the random generator
stands at the end: diffusers draws a sample of the picture's posterior, then the noise, then a sample of the masked
picture's posterior, then what the solver wants, and every wrong order gives other numbers.

Three things of diffusers are not taken over, and are shown here: of several pictures, its inpainting pipelines sample
the posterior from the first one's generator alone; its PNDM scheduler, entered in the middle, moves on as if at a lower
level than x has; and instruct-pix2pix with guidance 1 leaves out the guidance by the picture.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any, NamedTuple

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image
from test_families_folders import NEGATIVE, PROMPTS, noise, theirs
from test_profiles import SD1, ZERO_SNR
from torch import Tensor

from ldm.images import of_type
from ldm.pipeline import Pipeline
from ldm.request import Request

PROMPT, SEED, STEPS = PROMPTS[0], 7, 4
NEAR, FAR = 2e-5, 1e-2  # of the largest value of latents; pictures, from 0 to 1, to 1e-4
WIDTH, HEIGHT = 64, 48
# What stock diffusers says of itself, nothing of ours.
pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy keyword"),
]
SCHEDULERS = {
    "ddim": "DDIMScheduler", "euler": "EulerDiscreteScheduler", "euler_a": "EulerAncestralDiscreteScheduler",
    "dpm++2m": "DPMSolverMultistepScheduler", "pndm": "PNDMScheduler",
}  # fmt: skip
KINDS = {  # family, channels of the U-Net, diffusers' pipeline
    "img2img": ("sd1", 4, "StableDiffusionImg2ImgPipeline"),
    "inpaint4": ("sd1", 4, "StableDiffusionInpaintPipeline"),
    "inpaint9": ("sd1", 9, "StableDiffusionInpaintPipeline"),
    "pix2pix": ("sd1", 8, "StableDiffusionInstructPix2PixPipeline"),
    "xl-img2img": ("sdxl", 4, "StableDiffusionXLImg2ImgPipeline"),
    "xl-inpaint4": ("sdxl", 4, "StableDiffusionXLInpaintPipeline"),
    "xl-inpaint9": ("sdxl", 9, "StableDiffusionXLInpaintPipeline"),
    "refiner": ("refiner", 4, "StableDiffusionXLImg2ImgPipeline"),
}
CONFIG = SD1 | {"timestep_spacing": "leading"}  # said, for diffusers' classes differ in what they do without
V = CONFIG | {"_class_name": "DDIMScheduler", "prediction_type": "v_prediction"}
TERMINAL = {name: value for name, value in ZERO_SNR.items() if value is not None} | {"timestep_spacing": "trailing"}


def picture(seed: int) -> Image.Image:
    coarse = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC)


def masks() -> dict[str, Image.Image]:
    """Regions with edges inside the 8 x 8 pixels of a latent; gray ones on both sides of the middle."""
    levels = np.zeros((HEIGHT, WIDTH), np.uint8)
    levels[5:31, 13:50] = 255
    gray = levels.copy()
    gray[31:40, 10:45], gray[20:44, 50:60] = 100, 128
    return {"binary": Image.fromarray(levels), "gray": Image.fromarray(gray)}


PICTURE, MASKS = picture(0), masks()


class Drawn(NamedTuple):
    """latents: [B, 4, H, W]. pictures: [B, 3, 8 H, 8 W] in 0..1. state: of its generator at the end."""

    latents: Tensor
    pictures: Tensor
    state: bytes


Models = Callable[[str, int], tuple[Any, Pipeline]]


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Models:
    """(family, channels) -> diffusers' pipeline, and ours, opened from the folder that it writes."""

    @cache
    def model(family: str, channels: int) -> tuple[Any, Pipeline]:
        place = tmp_path_factory.mktemp("editing")
        pipe = theirs(family, place)
        if channels != 4:
            (kind,) = (one for of, takes, one in KINDS.values() if (of, takes) == (family, channels))
            network = diffusers.UNet2DConditionModel.from_config(pipe.unet.config, in_channels=channels).eval()
            pipe = getattr(diffusers, kind).from_pipe(pipe, unet=network)
        with torch.no_grad():
            pipe.unet.conv_out.weight *= 3  # an untrained network says next to nothing of its input
            for weight in (one for name, one in pipe.unet.named_parameters() if "attn2" in name):
                weight *= 3
        pipe.save_pretrained(place / "model")
        return pipe, Pipeline.from_pretrained(place / "model", device="cpu")

    return model


class Pair:
    """One of KINDS, drawn by both sides with the same options."""

    def __init__(self, models: Models, kind: str, scheduler: str, config: dict[str, Any] | None = None) -> None:
        family, channels, name = KINDS[kind]
        stock, ours = models(family, channels)
        self.masked, self.scheduler, self.config = "inpaint" in kind, scheduler, config or CONFIG
        self.pipe = getattr(diffusers, name).from_pipe(stock, scheduler=self.lent())
        self.pipe.set_progress_bar_config(disable=True)
        self.ours = Pipeline(replace(ours.components, scheduler_config=self.config))

    def lent(self) -> Any:
        """diffusers' scheduler."""
        return getattr(diffusers, SCHEDULERS[self.scheduler]).from_config(self.config)

    def by_diffusers(self, seed: int = SEED, **options: Any) -> Drawn:
        last: list[Tensor] = []
        generator = noise(seed)[0]
        told = {"image": PICTURE, "negative_prompt": NEGATIVE, "num_inference_steps": STEPS, "guidance_scale": 4.0}
        if self.masked:
            told |= {"mask_image": MASKS["binary"], "height": HEIGHT, "width": WIDTH}

        def keep(_: Any, index: int, time: Any, held: dict[str, Tensor]) -> dict[str, Tensor]:
            last[:] = [held["latents"]]
            return held

        told |= {"callback_on_step_end": keep, "output_type": "pt"}
        images = self.pipe(PROMPT, generator=generator, **told | options).images
        return Drawn(last[0], images, generator.get_state().numpy().tobytes())

    def by_us(self, seed: int = SEED, **options: Any) -> Drawn:
        told = {"image": PICTURE, "negative_prompt": NEGATIVE, "num_inference_steps": STEPS, "guidance_scale": 4.0}
        told |= {"mask_image": MASKS["binary"]} if self.masked else {}
        asked = Request(PROMPT, seed=seed, scheduler=self.scheduler, profile="diffusers", **told | options)
        order = self.ours.resolve(asked)
        *_, last = self.ours.sample(order)
        images, _, _ = self.ours.finished(last.latents, order)
        return Drawn(last.latents, of_type(images, "pt"), last.state[0])


def apart(ours: Tensor, reference: Tensor) -> float:
    """Of the largest value."""
    return float((ours - reference).abs().max() / reference.abs().max())


def agree(ours: Drawn, reference: Drawn) -> None:
    assert ours.latents.shape == reference.latents.shape and ours.pictures.shape == reference.pictures.shape
    assert apart(ours.latents, reference.latents) <= NEAR
    assert (ours.pictures - reference.pictures).abs().max() <= 1e-4


SAMPLED = {"strength": 0.5, "mask_image": MASKS["gray"]}
WHOLE = {"strength": 1.0, "mask_image": MASKS["gray"]}
TEXT_AND_IMAGE = {"guidance_scale": 7.5, "image_guidance_scale": 1.5}
CASES: list[tuple[str, str, dict[str, Any], dict[str, Any]]] = [
    ("img2img", "ddim", {"strength": 0.3}, CONFIG),
    ("img2img", "pndm", {"strength": 1.0}, CONFIG),
    ("img2img", "ddim", {"strength": 1.0}, TERMINAL),
    ("inpaint4", "ddim", SAMPLED, CONFIG),
    ("inpaint4", "euler_a", {"strength": 1.0}, CONFIG),
    ("inpaint9", "euler_a", {"strength": 0.5}, CONFIG),
    ("inpaint9", "dpm++2m", WHOLE, CONFIG),
    ("pix2pix", "euler_a", TEXT_AND_IMAGE, CONFIG),
    ("pix2pix", "euler", {"guidance_scale": 7.5, "image_guidance_scale": 1.0}, V),
    ("xl-inpaint9", "euler_a", {"strength": 0.5}, CONFIG),
]
MORE: list[tuple[str, str, dict[str, Any], dict[str, Any]]] = [
    *(("img2img", "ddim", {"strength": strength}, CONFIG) for strength in (0.75, 1.0)),
    ("img2img", "euler", {"strength": 0.75, "guidance_scale": 1.0}, CONFIG),
    ("img2img", "dpm++2m", {"strength": 0.3}, CONFIG),
    ("img2img", "euler_a", {"strength": 0.75}, CONFIG),
    ("img2img", "ddim", {"strength": 0.75}, V),
    *(
        (kind, *case)
        for kind in ("inpaint4", "inpaint9")
        for case in (
            ("ddim", SAMPLED, CONFIG),
            ("ddim", {"strength": 1.0}, CONFIG),
            ("ddim", {"strength": 0.5}, TERMINAL),
            ("euler", {"strength": 0.5}, V),
            ("euler_a", {"strength": 0.5}, CONFIG),
            ("euler_a", {"strength": 1.0, "guidance_scale": 1.0}, CONFIG),
            ("dpm++2m", {"strength": 0.5}, CONFIG),
            ("pndm", WHOLE, CONFIG),
        )
    ),
    ("pix2pix", "ddim", TEXT_AND_IMAGE, CONFIG),
    ("pix2pix", "ddim", {"guidance_scale": 1.0, "image_guidance_scale": 1.0}, CONFIG),
    ("pix2pix", "dpm++2m", TEXT_AND_IMAGE, CONFIG),
    ("pix2pix", "pndm", TEXT_AND_IMAGE, CONFIG),
    *((f"xl-{kind}", "euler", {"strength": 0.5}, CONFIG) for kind in ("img2img", "inpaint4", "inpaint9")),
    ("xl-inpaint4", "euler_a", WHOLE, CONFIG),
    ("xl-inpaint9", "ddim", WHOLE, CONFIG),
    ("refiner", "euler", {"strength": 0.3}, CONFIG),
]


@pytest.mark.parametrize(("kind", "scheduler", "options", "config"), CASES)
def test_a_picture_is_that_of_diffusers(models, kind, scheduler, options, config):
    pair = Pair(models, kind, scheduler, config)
    ours, reference = pair.by_us(**options), pair.by_diffusers(**options)
    agree(ours, reference)
    if scheduler != "euler_a":  # diffusers' draws noise for its last step too, and adds none of it
        assert ours.state == reference.state


@pytest.mark.slow  # last result: all agree, latents to 7e-6 and pictures to 1.3e-5, in 52 s
@pytest.mark.parametrize(("kind", "scheduler", "options", "config"), MORE)
def test_longer_runs(models, kind, scheduler, options, config):
    pair, longer = Pair(models, kind, scheduler, config), options | {"num_inference_steps": 2 * STEPS}
    agree(pair.by_us(**longer), pair.by_diffusers(**longer))


@pytest.mark.parametrize("kind", ["inpaint9", "pix2pix"])
def test_what_agrees_depends_on_all_that_is_told(models, kind):
    """So that no part of the input could be left out on both sides, and they still agree."""
    pair, short = Pair(models, kind, "euler"), {"num_inference_steps": 2}
    before = pair.by_us(**short)
    changes: list[dict[str, Any]] = [{"image": picture(1)}, {"guidance_scale": 2.0}]
    changes += [{"mask_image": MASKS["gray"]}] if pair.masked else [{"image_guidance_scale": 1.0}]
    for change in changes:
        after = pair.by_us(**short, **change)
        assert apart(after.latents, before.latents) > FAR and (after.pictures - before.pictures).abs().max() > FAR


@pytest.mark.parametrize("kind", ["img2img", "inpaint4"])
def test_several_pictures_of_one_prompt(models, kind):
    """Each is the one that diffusers draws alone with its seed; of image-to-image also the one of its batch."""
    pair = Pair(models, kind, "euler_a")
    options: dict[str, Any] = {"num_inference_steps": 2, "guidance_scale": 4.0, "strength": 0.5}
    both = pair.by_us(num_images_per_prompt=2, **options)
    agree(Drawn(both.latents[1:], both.pictures[1:], b""), pair.by_diffusers(SEED + 1, **options))
    told = {"image": PICTURE, "output_type": "latent", "generator": noise(SEED, SEED + 1), **options}
    told |= {"mask_image": MASKS["binary"], "height": HEIGHT, "width": WIDTH} if pair.masked else {}
    batch = pair.pipe([PROMPT] * 2, negative_prompt=[NEGATIVE] * 2, **told).images
    assert apart(both.latents[:1], batch[:1]) <= NEAR
    assert (apart(both.latents[1:], batch[1:]) <= NEAR) == (kind == "img2img")


class Entered(diffusers.PNDMScheduler):
    """PNDM that makes no step twice: of first order, then of second, third and fourth, wherever a run begins."""

    def set_timesteps(self, num_inference_steps: int, device: Any = None) -> None:
        super().set_timesteps(num_inference_steps, device)
        self.timesteps = self.timesteps.unique().flip(0)

    def step(self, *told: Any, **options: Any) -> Any:
        made = super().step(*told, **options)
        self.counter = max(self.counter, 2)
        return made


@pytest.mark.parametrize("kind", ["img2img", "inpaint4"])
def test_pndm_from_the_middle(models, kind):
    """diffusers' own asks for the second time of the whole schedule twice. A run that begins below that does not, and
    its scheduler takes the second call for a repetition all the same: from then on the network is told a lower time
    than x is at, and the picture keeps noise.
    """
    pair, options = Pair(models, kind, "pndm"), {"strength": 0.5, "num_inference_steps": 6}
    ours = pair.by_us(**options)
    assert apart(ours.latents, pair.by_diffusers(**options).latents) > FAR
    pair.pipe.scheduler = Entered.from_config(CONFIG)
    agree(ours, pair.by_diffusers(**options))


@pytest.mark.parametrize("image", [1.5, 0.5])
def test_guidance_by_the_picture_alone(models, monkeypatch, image):
    """Brooks et al. 2023, eq. 3, in diffusers' own loop, which skips it where guidance is 1 or image guidance below."""
    pair = Pair(models, "pix2pix", "euler")
    options = {"guidance_scale": 1.0, "image_guidance_scale": image, "num_inference_steps": 2}
    ours = pair.by_us(**options)
    assert apart(ours.latents, pair.by_diffusers(**options).latents) > FAR
    monkeypatch.setattr(type(pair.pipe), "do_classifier_free_guidance", True)
    agree(ours, pair.by_diffusers(**options))


@pytest.mark.parametrize(
    ("text", "image", "rows"), [(1.0, 1.0, 1), (7.5, 1.0, 2), (1.0, 1.5, 3), (7.5, 1.5, 3), (7.5, 0.0, 3)]
)
def test_rows_of_the_network(models, text, image, rows):
    """Every step is one call for each picture, of as many rows as its guidance has different parts."""
    _, ours = models("sd1", 8)
    seen: list[int] = []
    hook = ours.unet.register_forward_pre_hook(lambda _, told: seen.append(len(told[0])))
    options = {"guidance_scale": text, "image_guidance_scale": image, "num_inference_steps": 2}
    ours(PROMPT, seed=SEED, image=PICTURE, scheduler="euler", num_images_per_prompt=2, output_type="latent", **options)
    hook.remove()
    assert seen == [rows] * 2 * 2
