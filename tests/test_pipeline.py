"""The pipeline against stock diffusers' own, opened from the folder we save, and against itself: the same image from
(model, request, seed) alone, whatever stands beside it.
"""

import json
import math
import resource
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from ldm.checkpoints.components import Components
from ldm.checkpoints.folder import save_folder
from ldm.errors import ModelError, NumericalError, UsageError
from ldm.models.clip import CLIPTextConfig, CLIPTextModel
from ldm.models.unet import CROSS, UNet, UNetConfig
from ldm.models.vae import AutoencoderKL, VAEConfig
from ldm.noise import Noise, generators
from ldm.pipeline import Pipeline
from ldm.request import Request, make_request
from ldm.runtime import resolve_device, resolve_dtype
from ldm.sources import model_in_the_box
from ldm.text.tokenizer import CLIPTokenizer

# numpy 2 and torch's tensors, in several schedulers of diffusers
pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy:DeprecationWarning"),
]
OUTPUTS = ("pil", "pt", "np", "latent")
CAPTIONS = ["a taco on a red background", "an owl on blue", "two owls and a pizza on a green background"] * 2
SCHEDULER: dict[str, Any] = {
    "_class_name": "DDIMScheduler",
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "prediction_type": "v_prediction",
    "rescale_betas_zero_snr": True,
    "timestep_spacing": "trailing",
    "clip_sample": False,
    "set_alpha_to_one": True,
    "steps_offset": 1,
}
CLASSES = {
    "ddim": "DDIMScheduler",
    "euler": "EulerDiscreteScheduler",
    "heun": "HeunDiscreteScheduler",
    "dpm++2m": "DPMSolverMultistepScheduler",
    "dpm++2m_karras": "DPMSolverMultistepScheduler",
}


def components(**scheduler: Any) -> Components:
    """A small model with random weights, none of them zero: 32 pixels, 8 x 8 latents, 16 tokens."""
    torch.manual_seed(1)
    tokenizer = CLIPTokenizer.train(CAPTIONS, 540, 16)
    text = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=16,
    )
    unet = UNetConfig(
        sample_size=8,
        block_out_channels=(32, 64, 64),
        down_block_types=("DownBlock2D", CROSS, CROSS),
        layers_per_block=1,
        num_heads=(4, 4, 4),
        transformer_layers_per_block=(1, 1, 1),
        cross_attention_dim=32,
        norm_num_groups=16,
    )
    vae = VAEConfig(
        block_out_channels=(8, 16, 16), layers_per_block=1, norm_num_groups=8, sample_size=32, scaling_factor=0.7
    )
    return Components(
        UNet(unet).eval(),
        AutoencoderKL(vae).eval(),
        CLIPTextModel(text).eval(),
        tokenizer,
        SCHEDULER | scheduler,
        {"num_inference_steps": 4, "guidance_scale": 3.0},
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model") / "tiny"
    save_folder(components(), path, None)
    return path


@pytest.fixture(scope="module")
def pipeline(folder: Path) -> Pipeline:
    return Pipeline.from_pretrained(folder, device="cpu")


@pytest.fixture
def fresh(folder: Path) -> Pipeline:
    """One that a test may break."""
    return Pipeline.from_pretrained(folder, device="cpu")


def stock_of(path: Path) -> Any:
    from diffusers import StableDiffusionPipeline

    found = StableDiffusionPipeline.from_pretrained(path, local_files_only=True)
    found.set_progress_bar_config(disable=True)
    return found


@pytest.fixture(scope="module")
def stock(folder: Path) -> Any:
    return stock_of(folder)


def with_scheduler(stock: Any, config: dict[str, Any], name: str) -> Any:
    import diffusers

    karras = {"use_karras_sigmas": True} if name == "dpm++2m_karras" else {}
    stock.scheduler = getattr(diffusers, CLASSES[name]).from_config(config | karras)
    return stock


def far(ours: Tensor | np.ndarray[Any, Any], theirs: Tensor | np.ndarray[Any, Any]) -> float:
    """The largest difference as a share of the largest value."""
    a, b = (torch.as_tensor(np.asarray(v)).double() for v in (ours, theirs))
    assert a.shape == b.shape
    return float((a - b).abs().max() / b.abs().max())


def same(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and torch.equal(a, b)


def latents_of(pipeline: Pipeline, *args: Any, **kwargs: Any) -> Tensor:
    return pipeline(*args, output_type="latent", **kwargs).latents


# -- against stock diffusers -------------------------------------------------------------------------------------------

Case = tuple[str, dict[str, Any], dict[str, Any]]
ORDINARY = SCHEDULER | {"rescale_betas_zero_snr": False}  # stock Heun has no zero terminal SNR
LISTS = {"prompt": ["a taco", "an owl on blue"], "negative_prompt": ["a pizza", "red"], "num_images_per_prompt": 2}
PARITY: dict[str, Case] = {  # scheduler, scheduler_config.json, request
    "ddim": ("ddim", SCHEDULER, {"guidance_scale": 4.0}),
    "ddim, unguided": ("ddim", SCHEDULER, {"guidance_scale": 1.0}),
    "ddim, 1 step": ("ddim", SCHEDULER, {"guidance_scale": 4.0, "num_inference_steps": 1}),
    "euler": ("euler", SCHEDULER, {"guidance_scale": 4.0}),
    "euler, unguided": ("euler", SCHEDULER, {"guidance_scale": 1.0}),
    "euler, ordinary": ("euler", ORDINARY, {"guidance_scale": 4.0}),
    "heun": ("heun", ORDINARY, {"guidance_scale": 4.0}),
    "heun, unguided": ("heun", ORDINARY, {"guidance_scale": 1.0}),
    "dpm++2m": ("dpm++2m", SCHEDULER, {"guidance_scale": 4.0, "num_inference_steps": 10}),
    "dpm++2m, unguided": ("dpm++2m", SCHEDULER, {"guidance_scale": 1.0, "num_inference_steps": 16}),
    "dpm++2m_karras": ("dpm++2m_karras", SCHEDULER, {"guidance_scale": 4.0}),
    "rescaled": ("ddim", SCHEDULER, {"guidance_scale": 4.0, "guidance_rescale": 0.7}),
    "rescaled, dpm++2m": ("dpm++2m", ORDINARY, {"guidance_scale": 4.0, "guidance_rescale": 1.0}),
    "negative": ("ddim", SCHEDULER, {"guidance_scale": 4.0, "negative_prompt": "a pizza on green"}),
    "clip_skip 1": ("ddim", SCHEDULER, {"guidance_scale": 4.0, "clip_skip": 1, "profile": "diffusers"}),
    "clip_skip 2": ("ddim", SCHEDULER, {"guidance_scale": 1.0, "clip_skip": 2, "profile": "diffusers"}),
    "odd levels": ("ddim", SCHEDULER, {"guidance_scale": 4.0, "height": 72, "width": 56}),
    "lists": ("ddim", SCHEDULER, {"guidance_scale": 2.5, **LISTS}),
}


# Of these solvers test_solvers.py has more than here.
MORE = (
    "ddim, 1 step",
    "euler, unguided",
    "heun, unguided",
    "dpm++2m, unguided",
)


@pytest.mark.parametrize("case", [pytest.param(c, marks=pytest.mark.slow) if c in MORE else c for c in PARITY])
def test_equals_stock_diffusers(pipeline: Pipeline, stock: Any, case: str) -> None:
    scheduler, config, options = PARITY[case]
    pipeline = Pipeline(replace(pipeline.components, scheduler_config=config))
    options = {"prompt": "a taco on a red background", "num_inference_steps": 5, "height": 32, "width": 32} | options
    images = (len(options["prompt"]) if isinstance(options["prompt"], list) else 1) * options.get(
        "num_images_per_prompt", 1
    )
    noise = torch.randn(images, 4, options["height"] // 4, options["width"] // 4)
    ours = pipeline(scheduler=scheduler, latents=noise, output_type="np", **options)
    given = {name: value for name, value in options.items() if name not in ("clip_skip", "profile")}
    if "clip_skip" in options:  # stock diffusers looks for the norm where transformers 5 no longer has it
        given |= skipped(stock, given.pop("prompt"), options["clip_skip"])
    theirs = with_scheduler(stock, config, scheduler)(latents=noise.clone(), output_type="latent", **given).images
    # From sigma 4096 on, stock Euler adds -4096 * slope to x: what is left of float32 there is 4096 * 2^-24 = 2.4e-4.
    assert far(ours.latents, theirs) <= (1e-4 if config is SCHEDULER and scheduler == "euler" else 1e-5)
    with torch.inference_mode():
        decoded = stock.vae.decode(theirs / stock.vae.config.scaling_factor).sample
    pictures = stock.image_processor.postprocess(decoded, output_type="np")
    assert isinstance(ours.images, np.ndarray)
    assert np.abs(ours.images - pictures).max() <= 1e-4


def skipped(stock: Any, prompt: str, layers: int) -> dict[str, Tensor]:
    """The prompt without the text encoder's last layers, by transformers; the negative prompt keeps them."""

    def states(text: str) -> Any:
        ids = stock.tokenizer(text, padding="max_length", max_length=16, return_tensors="pt").input_ids
        return stock.text_encoder(ids, output_hidden_states=True)

    with torch.inference_mode():
        said = stock.text_encoder.final_layer_norm(states(prompt).hidden_states[-1 - layers])
        return {"prompt_embeds": said, "negative_prompt_embeds": states("").last_hidden_state}


def test_seeds_are_diffusers_generators(pipeline: Pipeline, stock: Any) -> None:
    seeded = [torch.Generator().manual_seed(seed) for seed in (40, 41)]
    theirs = with_scheduler(stock, SCHEDULER, "ddim")(
        ["a taco", "an owl"], generator=seeded, num_inference_steps=4, guidance_scale=3.0, output_type="np"
    )
    ours = pipeline(["a taco", "an owl"], seed=40, output_type="np")
    assert np.abs(np.asarray(ours.images) - theirs.images).max() <= 1e-5


def test_the_model_in_the_box_equals_stock_diffusers() -> None:
    folder = model_in_the_box()
    ours, stock = Pipeline.from_pretrained(device="cpu"), stock_of(folder)
    side = ours.unet.config.sample_size
    noise = torch.randn(1, ours.unet.config.in_channels, side, side)
    prompts = ["an owl to the left of a pizza on a white background"]
    drawn = ours(prompts, latents=noise, output_type="np")
    order = drawn.request
    options = {"num_inference_steps": order.num_inference_steps, "guidance_scale": order.guidance_scale}
    latents = stock(prompts, latents=noise.clone(), output_type="latent", **options).images
    with torch.inference_mode():
        decoded = stock.vae.decode(latents / stock.vae.config.scaling_factor).sample
    assert CLASSES[str(order.scheduler)] == type(stock.scheduler).__name__  # its own, in both
    assert (drawn.latents - latents).abs().max() <= 1e-4
    pictures = stock.image_processor.postprocess(decoded, output_type="np")
    assert np.abs(np.asarray(drawn.images) - pictures).max() <= 1e-4
    assert pictures.std() > 0.05  # a picture, not one grey


# -- an image depends on its own seed and prompt alone -----------------------------------------------------------------

SEVEN = (11, 3, 2**62 + 9, 0, 77, 5, 6)
ORDER = (4, 0, 6, 2, 1, 5, 3)


def test_noise_is_the_same_alone_in_seven_and_in_another_order() -> None:
    def noise(*seeds: int) -> Tensor:
        drawn = Noise(generators(None, seeds), (4, 8, 8), torch.device("cpu"))
        return torch.stack([drawn(), drawn()], 1)  # the beginning, and what an ancestral step draws

    together = noise(*SEVEN)
    assert same(noise(*(SEVEN[i] for i in ORDER)), together[list(ORDER)])
    for i, seed in enumerate(SEVEN):
        assert same(noise(seed)[0], together[i])
        expected = torch.Generator().manual_seed(seed)
        assert same(together[i, 0], torch.randn(4, 8, 8, generator=expected))
        assert same(together[i, 1], torch.randn(4, 8, 8, generator=expected))
    assert len({float(value) for value in together[:, 0, 0, 0, 0]}) == 7


@pytest.mark.parametrize(("scheduler", "guidance"), [("ddim", 4.0), ("euler_a", 1.0), ("dpm++2m", 4.0)])
def test_pictures_are_the_same_alone_in_seven_and_in_another_order(
    pipeline: Pipeline, scheduler: str, guidance: float
) -> None:
    prompts = ["a taco", "an owl", "two owls", "a red pizza", "blue", "a green owl", "on"]
    options: dict[str, Any] = {"scheduler": scheduler, "guidance_scale": guidance, "num_inference_steps": 3}
    together = pipeline(prompts, seed=SEVEN, output_type="np", **options)
    assert together.seeds == SEVEN
    turned = pipeline([prompts[i] for i in ORDER], seed=tuple(SEVEN[i] for i in ORDER), output_type="np", **options)
    assert same(turned.latents, together.latents[list(ORDER)])
    assert np.array_equal(np.asarray(turned.images), np.asarray(together.images)[list(ORDER)])
    for i in (0, 4):
        alone = pipeline(prompts[i], seed=SEVEN[i], output_type="np", **options)
        assert same(alone.latents[0], together.latents[i])
        assert np.array_equal(np.asarray(alone.images)[0], np.asarray(together.images)[i])


def test_images_of_one_prompt_count_up_from_the_seed(pipeline: Pipeline) -> None:
    many = pipeline(["a taco", "an owl"], seed=20, num_images_per_prompt=3, output_type="latent")
    assert many.seeds == (20, 21, 22, 23, 24, 25) and len(many.latents) == 6
    assert same(many.latents[2], latents_of(pipeline, "a taco", seed=22)[0])
    assert same(many.latents[4], latents_of(pipeline, "an owl", seed=24)[0])


# -- network calls -----------------------------------------------------------------------------------------------------


@pytest.fixture
def calls(pipeline: Pipeline) -> Iterator[list[int]]:
    """The batch of every call of the U-Net."""
    seen: list[int] = []
    hook = pipeline.unet.register_forward_hook(lambda module, args, output: seen.append(len(args[0])))
    yield seen
    hook.remove()


@pytest.mark.parametrize("scheduler", ["ddim", "euler", "dpm++2m", "euler_a"])
def test_network_calls(pipeline: Pipeline, calls: list[int], scheduler: str) -> None:
    pipeline("a taco", scheduler=scheduler, num_inference_steps=6, guidance_scale=1)
    assert calls == [1] * 6  # guidance 1: the prompt alone
    calls.clear()
    pipeline("a taco", scheduler=scheduler, num_inference_steps=6, guidance_scale=1.5, num_images_per_prompt=2)
    assert calls == [2] * 12  # the guidance pair in one call, image by image


def test_network_calls_of_heun(pipeline: Pipeline, calls: list[int]) -> None:
    pipeline("a taco", scheduler="heun", num_inference_steps=6, guidance_scale=1)
    assert calls == [1] * 11


def test_guidance_1_does_not_read_the_negative_prompt(pipeline: Pipeline) -> None:
    options: dict[str, Any] = {"seed": 1, "guidance_scale": 1}
    plain = latents_of(pipeline, "a taco", **options)
    assert same(plain, latents_of(pipeline, "a taco", negative_prompt="an owl", **options))
    assert not same(plain, latents_of(pipeline, "a taco", seed=1, guidance_scale=1.01))


# -- other ways in and out ---------------------------------------------------------------------------------------------


def test_generators_and_latents_equal_seeds(pipeline: Pipeline) -> None:
    for scheduler in ("ddim", "euler_a"):
        expected = latents_of(pipeline, ["a taco", "an owl"], seed=8, scheduler=scheduler)
        seeded = [torch.Generator().manual_seed(seed) for seed in (8, 9)]
        given = pipeline(["a taco", "an owl"], generator=seeded, scheduler=scheduler, output_type="latent")
        assert same(given.latents, expected) and given.seeds == ()
    noise = Noise(generators(None, (8, 9)), (4, 8, 8), torch.device("cpu"))()
    kept = noise.clone()
    assert same(
        latents_of(pipeline, ["a taco", "an owl"], latents=noise), latents_of(pipeline, ["a taco", "an owl"], seed=8)
    )
    assert same(noise, kept)  # what the caller gave is not written to
    one = torch.Generator().manual_seed(8)  # one for all, as in diffusers: one after the other from its sequence
    both = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(8))
    assert same(
        latents_of(pipeline, ["a taco", "an owl"], generator=one),
        latents_of(pipeline, ["a taco", "an owl"], latents=both),
    )


@pytest.mark.parametrize("guidance", [1.0, 4.0])
def test_embeddings_equal_prompts(pipeline: Pipeline, guidance: float) -> None:
    options: dict[str, Any] = {"seed": 3, "guidance_scale": guidance, "num_images_per_prompt": 2}
    options["num_inference_steps"] = 2
    prompts, negatives = ["a taco", "an owl"], ["a pizza", ""]
    expected = latents_of(pipeline, prompts, negative_prompt=negatives, **options)
    said, unsaid = (pipeline.text_encoder(texts).context for texts in (prompts, negatives))
    assert same(latents_of(pipeline, prompt_embeds=said, negative_prompt_embeds=unsaid, **options), expected)
    assert same(latents_of(pipeline, prompt_embeds=said, negative_prompt=negatives, **options), expected)
    assert same(latents_of(pipeline, prompts, negative_prompt_embeds=unsaid, **options), expected)
    plain = latents_of(pipeline, prompts, **options)
    assert same(latents_of(pipeline, prompt_embeds=said, **options), plain)  # the empty negative prompt


def test_output_types_agree(pipeline: Pipeline) -> None:
    results = {kind: pipeline("a taco", seed=(4, 5), num_images_per_prompt=2, output_type=kind) for kind in OUTPUTS}
    pil, pt, array, latent = (results[kind].images for kind in OUTPUTS)
    assert all(same(result.latents, results["pil"].latents) for result in results.values())
    assert isinstance(pt, Tensor) and isinstance(array, np.ndarray) and isinstance(pil, list)
    assert isinstance(latent, Tensor) and same(latent, results["pt"].latents)
    assert pt.shape == (2, 3, 32, 32) and array.shape == (2, 32, 32, 3) and array.dtype == np.float32
    assert array.min() >= 0 and array.max() <= 1
    assert np.array_equal(pt.permute(0, 2, 3, 1).numpy(), array)
    for picture, row in zip(pil, array, strict=True):
        assert picture.mode == "RGB" and np.array_equal(np.asarray(picture), (row * 255).round().astype(np.uint8))
    with torch.inference_mode():
        decoded = pipeline.vae.decode(latent[:1])
    assert np.allclose(array[0], (decoded[0].permute(1, 2, 0).numpy() / 2 + 0.5).clip(0, 1), atol=1e-6)


def test_the_request_of_a_result_draws_it_again(pipeline: Pipeline) -> None:
    first = pipeline(["a taco", "an owl"], num_images_per_prompt=2)
    order = first.request
    assert order == Request(
        prompt=("a taco", "an owl"),
        num_images_per_prompt=2,
        seed=first.seeds,
        num_inference_steps=4,  # the model's generation_config.json
        guidance_scale=3.0,
        height=32,
        width=32,
        scheduler="ddim",
        noise_source="cpu",
    )
    assert len(set(first.seeds)) == 4 and pipeline("a taco").seeds != pipeline("a taco").seeds
    again = pipeline(order)
    assert same(again.latents, first.latents) and again.request == order and again.seeds == first.seeds
    assert [a.tobytes() for a in again.images] == [b.tobytes() for b in first.images]  # type: ignore[union-attr]
    fewer = pipeline(replace(order, prompt="an owl"), num_images_per_prompt=1, seed=first.seeds[2])
    assert same(fewer.latents[0], first.latents[2])


# -- step by step ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheduler", ["ddim", "heun", "dpm++2m"])
def test_sample_yields_every_step(pipeline: Pipeline, scheduler: str) -> None:
    order = Request("a taco", seed=7, num_inference_steps=5, scheduler=scheduler)
    steps = list(pipeline.sample(order))
    assert [step.index for step in steps] == [0, 1, 2, 3, 4] and steps[-1].sigma == 0
    sigmas = [step.sigma for step in steps]
    assert sigmas == sorted(sigmas, reverse=True)
    result = pipeline(order).latents
    assert same(steps[-1].x, result)
    away = [float((step.x0 - result).abs().max()) for step in steps]
    assert away[-1] <= 1e-5 < away[0]  # the estimates end at the result


def test_stopping_early_leaves_nothing_behind(pipeline: Pipeline) -> None:
    order = Request("a taco", seed=7, num_inference_steps=5, scheduler="euler_a")
    before = pipeline(order).latents
    steps = pipeline.sample(order)
    next(steps)
    next(steps)
    steps.close()  # type: ignore[attr-defined]
    assert not torch.is_inference_mode_enabled() and torch.is_grad_enabled()
    assert same(pipeline(order).latents, before)


def test_two_runs_can_take_turns(pipeline: Pipeline) -> None:
    orders = [
        Request("a taco", seed=7, num_inference_steps=4, scheduler="euler_a", guidance_scale=4.0),
        Request("an owl", seed=8, num_inference_steps=4, scheduler="dpm++2m", guidance_scale=1.0),
    ]
    expected = [pipeline(order).latents for order in orders]
    turns = list(zip(*(pipeline.sample(order) for order in orders), strict=True))
    assert [same(step.x, latents) for step, latents in zip(turns[-1], expected, strict=True)] == [True, True]


def test_threads_share_a_pipeline(pipeline: Pipeline) -> None:
    schedulers = ("ddim", "euler_a", "heun", "dpm++2m")
    orders = [Request("a taco", seed=i, num_inference_steps=4, scheduler=schedulers[i % 4]) for i in range(8)]
    expected = [pipeline(order).latents for order in orders]
    threads = torch.get_num_threads()  # a setting of each thread; sums depend on it
    with ThreadPoolExecutor(4, initializer=lambda: torch.set_num_threads(threads)) as pool:
        drawn = list(pool.map(lambda order: pipeline(order).latents, orders))
    assert all(same(a, b) for a, b in zip(drawn, expected, strict=True))


# -- saving, types -----------------------------------------------------------------------------------------------------


def test_saved_and_opened_it_draws_the_same(pipeline: Pipeline, tmp_path: Path) -> None:
    pipeline.save_pretrained(tmp_path / "copy")
    copy = Pipeline.from_pretrained(tmp_path / "copy", device="cpu")
    a, b = (p("a taco", seed=3, output_type="np") for p in (pipeline, copy))
    assert same(a.latents, b.latents) and np.array_equal(np.asarray(a.images), np.asarray(b.images))
    assert b.request == a.request


@pytest.mark.parametrize(("dtype", "near"), [("fp16", 0.01), ("bf16", 0.05)])
def test_half_precision_draws_on_the_cpu(pipeline: Pipeline, folder: Path, dtype: str, near: float) -> None:
    half = Pipeline.from_pretrained(folder, device="cpu", dtype=dtype)
    assert half.dtype == {"fp16": torch.float16, "bf16": torch.bfloat16}[dtype]
    a, b = (np.asarray(p("a taco", seed=3, output_type="np").images) for p in (pipeline, half))
    assert np.isfinite(b).all() and b.dtype == np.float32 and b.std() > 0.01
    assert np.abs(a - b).mean() < near
    assert half("a taco", seed=3, output_type="latent").latents.dtype == torch.float32


def test_to_changes_type_and_back(fresh: Pipeline) -> None:
    assert fresh.to(dtype="bf16").dtype == torch.bfloat16
    assert fresh.vae.quant_conv.weight.dtype == torch.bfloat16
    assert fresh.to("cpu", "fp32").dtype == torch.float32


# -- what bad input gets -----------------------------------------------------------------------------------------------

BAD: list[tuple[dict[str, Any], tuple[str, ...]]] = [  # fields -> what the sentence holds: name, value, what is allowed
    ({"prompt": ""}, ("prompt is ''", "words")),
    ({"prompt": ["a taco", " "]}, ("prompt is ' '", "words")),
    ({"prompt": ["a taco", 3]}, ("prompt is 3", "words")),
    ({"prompt": 3}, ("prompt is 3", "words")),
    ({"negative_prompt": 3}, ("negative_prompt is 3", "words")),
    ({"negative_prompt": ["a", None]}, ("negative_prompt is ('a', None)", "words")),
    ({"prompt": ["a", "b", "c"], "negative_prompt": ["a", "b"]}, ("2 negative prompts for 3 prompts", "one for each")),
    ({"num_images_per_prompt": 0}, ("num_images_per_prompt is 0", "whole number from 1 to 10000")),
    ({"num_images_per_prompt": None}, ("num_images_per_prompt is None", "whole number from 1")),
    ({"num_images_per_prompt": 10**9}, ("num_images_per_prompt is 1000000000", "from 1 to 10000")),
    ({"seed": -1}, ("seed is -1", "whole number from 0 to")),
    ({"seed": 2**63}, (f"seed is {2**63}", "from 0 to")),
    ({"seed": 1.5}, ("seed is 1.5", "whole number")),
    ({"seed": True}, ("seed is True", "whole number")),
    ({"seed": "7"}, ("seed is '7'", "whole number")),
    ({"seed": [1, -2]}, ("seed is -2", "whole number")),
    ({"num_inference_steps": 0}, ("num_inference_steps is 0", "from 1 to 1000")),
    ({"num_inference_steps": 1001}, ("num_inference_steps is 1001", "from 1 to 1000")),
    ({"num_inference_steps": 4.0}, ("num_inference_steps is 4.0", "whole number")),
    ({"guidance_scale": -1}, ("guidance_scale is -1", "number from 0 to 1000")),
    ({"guidance_scale": math.nan}, ("guidance_scale is nan", "number from 0 to 1000")),
    ({"guidance_scale": "4"}, ("guidance_scale is '4'", "number from 0")),
    ({"guidance_rescale": 1.5}, ("guidance_rescale is 1.5", "from 0 to 1")),
    ({"guidance_rescale": None}, ("guidance_rescale is None", "from 0 to 1")),
    ({"height": 0}, ("height is 0", "from 1 to 16384")),
    ({"height": -64}, ("height is -64", "from 1 to 16384")),
    ({"width": 10**6}, ("width is 1000000", "from 1 to 16384")),
    ({"width": True}, ("width is True", "whole number")),
    ({"scheduler": 3}, ("scheduler is 3", "name")),
    ({"eta": 2}, ("eta is 2", "from 0 to 1")),
    ({"clip_skip": 0}, ("clip_skip is 0", "from 1 to 100")),
    ({"clip_skip": -1, "profile": "diffusers"}, ("clip_skip is -1", "from 0 to 100")),
    ({"nfe": 7, "sigmas": (2.0, 1.0)}, ("nfe and sigmas", "one of them")),
    ({"timesteps": ("a",)}, ("timesteps are ('a',)", "numbers that fall")),
    ({"profile": "comfy"}, ("unknown profile 'comfy'", "diffusers, a1111")),
    ({"noise_source": "gpus"}, ("did you mean 'gpu'",)),
    ({"literal": 1}, ("literal is 1", "true or false")),
    ({"schedule_type": 3}, ("schedule_type is 3", "text")),
    ({"output_type": "jpg"}, ("unknown output_type 'jpg'", "pil, pt, np, latent")),
    ({"output_type": None}, ("unknown output_type 'None'", "pil, pt, np, latent")),
]


@pytest.mark.parametrize(("given", "said"), BAD, ids=[json.dumps(given, default=str) for given, _ in BAD])
def test_requests_refuse(given: dict[str, Any], said: tuple[str, ...]) -> None:
    with pytest.raises(UsageError) as caught:
        Request(**({"prompt": "a taco"} | given))
    message = str(caught.value)
    assert [part for part in said if part not in message] == [] and "\n" not in message
    assert caught.value.exit_code == 2


def test_requests_take() -> None:
    assert Request(["a", "b"], seed=[1, 2]) == Request(("a", "b"), seed=(1, 2))
    assert Request("a", None) == Request("a")  # type: ignore[arg-type]
    assert make_request(["a", "b"], {"seed": 1}) == make_request(Request(("a", "b")), {"seed": 1})
    assert Request("a", guidance_scale=0, num_inference_steps=1000, eta=1, height=1, width=16384).seeds is not None
    with pytest.raises(UsageError, match=r"unknown argument 'step'.*did you mean.*known: prompt"):
        make_request("a", {"step": 3})
    with pytest.raises(UsageError, match="unknown argument 'picture'"):
        make_request("a", {"picture": None})


def shaped(*shape: int) -> Tensor:
    return torch.zeros(shape)


UNFIT: list[tuple[dict[str, Any], tuple[str, ...]]] = [
    ({"prompt": None}, ("give a prompt or prompt_embeds",)),
    ({"prompt": []}, ("give a prompt or prompt_embeds",)),
    ({"prompt_embeds": shaped(1, 16, 32)}, ("one of them",)),  # beside a prompt
    ({"scheduler": "euler b"}, ("unknown scheduler 'euler b'", "did you mean 'euler", "ddim")),
    ({"seed": [1, 2]}, ("2 seeds for 1 pictures", "one for each")),
    ({"num_images_per_prompt": 6000, "prompt": ["a", "b"]}, ("12000 pictures", "at most 10000")),
    ({"clip_skip": 7}, ("clip_skip is 7", "takes 1 to 3")),
    ({"scheduler": "heun", "eta": 0.5}, ("eta is 0.5", "heun", "one of ddim, euler_a")),
    ({"schedule_type": "karas"}, ("did you mean 'karras'",)),
    ({"schedule_type": "karras", "scheduler": "lcm"}, ("lcm visits the times", "grid karras")),
    ({"timesteps": (5, 7)}, ("timesteps are (5, 7)", "fall")),
    ({"timesteps": (1000, 7), "num_inference_steps": None}, ("timesteps begin at 1000", "from 0 to 999")),
    ({"timesteps": (999, 7)}, ("1 steps were asked for, and a run of 2",)),
    ({"timestep_respacing": "a,b"}, ("timesteps are 'a,b'", "'10,15,20'")),
    ({"timestep_respacing": "ddim999"}, ("no whole stride",)),
    ({"latents": shaped(1, 4, 8, 9)}, ("latents of shape [1, 4, 8, 9]", "[1, 4, 8, 8]")),
    ({"latents": shaped(1, 4, 8, 8) / 0}, ("not all finite",)),
    ({"generator": [torch.Generator()] * 2}, ("2 generators for 1 pictures", "one for each")),
    ({"prompt": None, "prompt_embeds": shaped(1, 16, 33)}, ("[1, 16, 33]", "[prompts, tokens, 32]")),
    ({"negative_prompt_embeds": shaped(1, 9, 32)}, ("shape [1, 9, 32]", "[1, 16, 32]")),
    ({"negative_prompt_embeds": shaped(2, 16, 32)}, ("shape [2, 16, 32]", "[1, 16, 32]")),
    ({"num_inference_steps": 1000, "scheduler": "dpm++2m", "guidance": 3}, ("unknown argument 'guidance'",)),
]


@pytest.mark.parametrize(("given", "said"), UNFIT, ids=[" ".join(given) for given, _ in UNFIT])
def test_pipelines_refuse(pipeline: Pipeline, given: dict[str, Any], said: tuple[str, ...]) -> None:
    with pytest.raises(UsageError) as caught:
        pipeline(**({"prompt": "a taco", "num_inference_steps": 1} | given))
    assert [part for part in said if part not in str(caught.value)] == []


@pytest.mark.parametrize(
    ("choice", "said"),
    [
        (lambda: resolve_device("gpu"), "unknown device 'gpu'; .*auto, cpu, cuda"),
        (lambda: resolve_device("cpu:x"), "device is 'cpu:x'; it must be"),
        (lambda: resolve_device("cuda:x"), "device is 'cuda:x'; it must be"),
        (lambda: resolve_dtype("fp8", torch.device("cpu")), "unknown dtype 'fp8'; .*fp32.*bf16"),
        (lambda: resolve_dtype(torch.int8, torch.device("cpu")), "unknown dtype 'int8'; .*fp32.*bf16"),
    ],
)
def test_devices_and_types_refuse(choice: Any, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        choice()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device here")
def test_cuda_asked_and_absent(folder: Path) -> None:
    with pytest.raises(UsageError, match="cuda was asked for, but torch sees no CUDA device; use cpu"):
        Pipeline.from_pretrained(folder, device="cuda")


def test_a_missing_model_says_so(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="there is no model folder"):
        Pipeline.from_pretrained(tmp_path / "none")


# -- numbers that are none, and pictures that do not fit ---------------------------------------------------------------


@pytest.mark.parametrize("scheduler", ["ddim", "dpm++2m"])
def test_nan_in_the_network_is_an_error(fresh: Pipeline, scheduler: str) -> None:
    with torch.no_grad():
        fresh.unet.conv_out.bias[2] = math.nan
    with pytest.raises(NumericalError) as caught:
        fresh("a taco", seed=1, scheduler=scheduler)
    assert [w for w in ("step 1 ", scheduler, "float32", "lower guidance") if w not in str(caught.value)] == []


def test_an_overflow_names_its_step(fresh: Pipeline) -> None:
    counted = iter(range(100))
    fresh.unet.register_forward_hook(lambda module, args, output: output * (math.inf if next(counted) == 2 else 1))
    with pytest.raises(NumericalError, match=r"step 3 of euler in bfloat16"):
        fresh.to(dtype="bf16")("a taco", seed=1, scheduler="euler")


def test_nan_in_the_decoder_is_an_error(fresh: Pipeline) -> None:
    with torch.no_grad():
        fresh.vae.decoder.conv_out.bias[0] = math.nan
    with pytest.raises(NumericalError, match=r"not finite.*float32"):
        fresh("a taco", seed=1)


def test_absurd_sizes_are_refused_before_anything_is_allocated(
    pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    monkeypatch.setattr("ldm.runtime.available_bytes", lambda device: 2**30)
    with pytest.raises(UsageError, match=r"10000 pictures of 512x512 .* GiB, and 1\.0 GiB are free on cpu; ask for a"):
        pipeline("a taco", height=512, width=512, num_images_per_prompt=10_000, generator=torch.Generator())
    with pytest.raises(UsageError, match=r"1 picture of 4096x4096 .* and 1\.0 GiB are free"):
        pipeline("a taco", height=4096, width=4096)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak < 16 * 1024  # KiB
    pipeline("a taco", height=64, width=64, num_inference_steps=1)


def test_the_text_encoder_is_a_plain_attribute(pipeline: Pipeline) -> None:
    """Another in its place is what reads the prompts."""
    other = Pipeline(pipeline.components)
    other.text_encoder = replace(pipeline.text_encoder, penultimate=True)  # type: ignore[type-var]  # it is a TextEncoder
    first, second = (one("a taco", seed=1, num_inference_steps=1).latents for one in (pipeline, other))
    assert not torch.equal(first, second)


def test_odd_sizes(pipeline: Pipeline) -> None:
    drawn = pipeline("a taco", seed=1, height=68, width=52)
    assert drawn.latents.shape == (1, 4, 17, 13)
    assert [picture.size for picture in drawn.images] == [(52, 68)]  # type: ignore[union-attr]
