"""What runs on CUDA against what runs on the CPU. Skipped where there is no GPU."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from test_pipeline import components
from test_training import SMALL, STAGES
from torch import Tensor

from ldm.checkpoints.folder import save_folder
from ldm.errors import NumericalError, UsageError
from ldm.noise import Noise, generators
from ldm.pipeline import Pipeline
from ldm.request import Request
from ldm.training.loop import run_stage

pytestmark = pytest.mark.cuda
SCHEDULERS = ("ddim", "ddpm", "euler", "euler_a", "heun", "dpm++2m", "dpm++2m_karras")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model") / "tiny"
    save_folder(components(), path, None)
    return path


@pytest.fixture
def exact() -> Iterator[None]:
    """float32 that is float32: cuDNN's convolutions otherwise take 10 bits of each number (TF32)."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        yield
    torch.backends.cuda.matmul.allow_tf32 = before


def pair(folder: Path) -> tuple[Pipeline, Pipeline]:
    """The model on the CPU and on CUDA, both float32."""
    return Pipeline.from_pretrained(folder, device="cpu"), Pipeline.from_pretrained(folder, device="cuda", dtype="fp32")


def far(a: Tensor, b: Tensor) -> float:
    """The largest difference as a share of the largest value."""
    return float((a.cpu() - b.cpu()).abs().max() / b.cpu().abs().max())


def test_noise_is_the_same_bit_for_bit() -> None:
    seeds = (5, 0, 123)
    here, there = (Noise(generators(None, seeds), (4, 9, 7), torch.device(name)) for name in ("cpu", "cuda"))
    for _ in range(3):
        a, b = here(), there()
        assert b.device.type == "cuda" and torch.equal(a, b.cpu())


@pytest.mark.usefixtures("exact")
@pytest.mark.parametrize("guidance", [1.0, 4.0])
@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_float32_equals_the_cpu(folder: Path, scheduler: str, guidance: float) -> None:
    options: dict[str, Any] = {"seed": 3, "scheduler": scheduler, "guidance_scale": guidance, "num_inference_steps": 5}
    here, there = (p(["a taco", "an owl"], output_type="np", **options) for p in pair(folder))
    assert there.latents.device.type == "cuda" and there.request == here.request
    assert far(there.latents, here.latents) <= 1e-3
    assert np.abs(np.asarray(there.images) - np.asarray(here.images)).max() <= 1 / 255


@pytest.mark.usefixtures("exact")
def test_a_picture_does_not_hang_on_its_neighbours(folder: Path) -> None:
    there = Pipeline.from_pretrained(folder, device="cuda", dtype="fp32")
    many = there(["a taco", "an owl", "two owls"], seed=3, output_type="np")
    for i, prompt in enumerate(("a taco", "an owl", "two owls")):
        alone = there(prompt, seed=3 + i, output_type="np")
        assert np.abs(np.asarray(alone.images)[0] - np.asarray(many.images)[i]).max() <= 1 / 255


def test_bfloat16_is_the_default(folder: Path) -> None:
    there = Pipeline.from_pretrained(folder)
    assert there.device.type == "cuda" and there.dtype == torch.bfloat16
    drawn = there(["a taco", "an owl"], seed=3, output_type="pt")
    assert isinstance(drawn.images, Tensor) and torch.isfinite(drawn.images).all()
    assert drawn.latents.dtype == torch.float32 and torch.isfinite(drawn.latents).all()
    here = Pipeline.from_pretrained(folder, device="cpu")(["a taco", "an owl"], seed=3, output_type="pt")
    assert isinstance(here.images, Tensor) and float((drawn.images.cpu() - here.images).abs().mean()) < 0.05
    assert len(there("a taco", seed=3).images) == 1


def test_all_pictures_are_one_network_call(folder: Path) -> None:
    there, batches = Pipeline.from_pretrained(folder, device="cuda"), list[int]()
    there.unet.register_forward_hook(lambda module, args, output: batches.append(len(args[0])))
    there(["a taco", "an owl"], guidance_scale=4, num_inference_steps=3)
    there(["a taco", "an owl"], guidance_scale=1, num_inference_steps=3)
    assert batches == [4, 4, 4, 2, 2, 2]


@pytest.mark.parametrize("rescale", [0.0, 0.7])
@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_no_step_waits_for_the_device(folder: Path, scheduler: str, rescale: float) -> None:
    there = Pipeline.from_pretrained(folder, device="cuda")
    order = Request("a taco", seed=3, scheduler=scheduler, num_inference_steps=6, guidance_rescale=rescale)
    list(there.sample(order))  # cuDNN chooses its kernels
    steps = there.sample(order)
    next(steps)  # what comes before the first step may wait
    torch.cuda.set_sync_debug_mode("error")
    try:
        taken = [next(steps) for _ in range(5)]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert next(steps, None) is None  # after the last step it is asked whether all were finite
    assert [step.index for step in taken] == [1, 2, 3, 4, 5] and torch.isfinite(taken[-1].x).all()


def test_a_latent_that_is_not_finite_is_named_at_the_end(folder: Path) -> None:
    there, counted = Pipeline.from_pretrained(folder, device="cuda"), iter(range(100))
    there.unet.register_forward_hook(lambda module, args, output: output * (np.inf if next(counted) == 2 else 1))
    with pytest.raises(NumericalError, match=r"step 3 of ddim in bfloat16"):
        there("a taco", seed=1)


def test_moving_there_and_back(folder: Path) -> None:
    here = Pipeline.from_pretrained(folder, device="cpu")
    before = here("a taco", seed=3, output_type="latent").latents
    assert here.to("cuda").device.type == "cuda" and here.dtype == torch.float32
    assert torch.equal(here.to("cpu")("a taco", seed=3, output_type="latent").latents, before)


def test_what_does_not_fit_or_is_not_there_is_refused(folder: Path) -> None:
    there = Pipeline.from_pretrained(folder, device="cuda")
    before = torch.cuda.max_memory_allocated()
    with pytest.raises(UsageError, match=r"10000 pictures of 16384x16384 .* free on cuda"):
        there("a taco", height=16384, width=16384, num_images_per_prompt=10_000)
    assert torch.cuda.max_memory_allocated() == before
    with pytest.raises(UsageError, match=r"device is 'cuda:99'; this machine has"):
        Pipeline.from_pretrained(folder, device="cuda:99")


def test_every_stage_trains(tmp_path: Path, noto_font: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in SMALL.items():
        monkeypatch.setattr(name, value)
    AcceleratorState._reset_state(True)  # else the device of an earlier run in this process
    try:
        for name in STAGES:
            make, config = STAGES[name](tmp_path, tmp_path)
            config = dataclasses.replace(config, loop=dataclasses.replace(config.loop, device="cuda"))
            stage = make(config)
            assert [progress.step for progress in run_stage(stage, config)] == [1, 2, 3, 4]
            assert next(stage.objective.parameters()).device.type == "cuda"
    finally:
        AcceleratorState._reset_state(True)
    assert len(Pipeline.from_pretrained(tmp_path / "denoiser" / "result")("a taco", seed=1).images) == 1
