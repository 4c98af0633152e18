"""Distillation to few steps, and the tiny autoencoder: against diffusers' schedulers, a closed form, and sums done by
hand on the networks themselves.
"""

import json
import math
import shutil
from collections.abc import Iterator
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from helpers import VELOCITY, of_velocity
from safetensors.torch import load_file
from torch import Tensor, nn

from ldm.adapters.strength import Strength
from ldm.data.emoji import CorpusConfig, EmojiScenes
from ldm.diffusion import NoiseSchedule
from ldm.diffusion.prediction import PREDICTIONS, Estimate
from ldm.errors import ModelError, UsageError
from ldm.fast import LORA
from ldm.lora import LoRA
from ldm.pipeline import Pipeline
from ldm.schedulers import SCHEDULERS, network_of
from ldm.sources import open_model
from ldm.training.config import LoopConfig
from ldm.training.distill import Distillation, DistillConfig, Paths, consistency_loss, distill
from ldm.training.first_stage import to_signal
from ldm.training.loop import run_stage
from ldm.training.tiny_decoder import TinyAutoencoding, TinyDecoderConfig, tiny_decoder

STOCK = {name: value for name, value in VELOCITY.items() if not name.startswith("_")}
ZERO_SNR, PLAIN = NoiseSchedule.from_config(VELOCITY), NoiseSchedule.scaled_linear()
pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    # diffusers with numpy 2
    pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy keyword"),
    pytest.mark.filterwarnings("ignore:__array_wrap__ must accept context"),
]


@pytest.fixture(scope="module", autouse=True)
def runs_as_of_tests() -> Iterator[None]:
    """Few held-out scenes, no curves; and runs on the CPU flush denormals, which the tests after these do not want."""
    with pytest.MonkeyPatch.context() as patch:
        for stage in ("distill", "tiny_decoder"):
            patch.setattr(f"ldm.training.{stage}.HELD_OUT_SCENES", 12)
        patch.setattr("ldm.training.record.plot", lambda *_: None)
        yield
    torch.set_flush_denormal(False)


@pytest.fixture(scope="module")
def finished(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small model of random numbers that predicts v with zero terminal SNR."""
    folder = tmp_path_factory.mktemp("finished") / "small"
    return of_velocity(model, folder)


def configured(folder: Path, out: Path, **options: object) -> DistillConfig:
    loop = LoopConfig(
        str(out), steps=3, batch_size=4, learning_rate=0.01, warmup_steps=1, ema_decay=0.5, workers=0, threads=1,
        device="cpu", log_every=1, save_every=3, sample_every=3,
    )  # fmt: skip
    chosen = {"corpus": CorpusConfig(size=16, objects=2), "latents": 8, "rank": 2, "num_inference_steps": 2}
    return DistillConfig(loop, str(folder), **(chosen | options))  # type: ignore[arg-type]


# -- the paths ---------------------------------------------------------------------------------------------------------


def test_a_path_ends_where_it_is_at_time_0() -> None:
    x, output = torch.randn(3, 4, 2, 2), torch.randn(3, 4, 2, 2) * 1e3
    for kind in ("v_prediction", "epsilon", "sample"):
        assert torch.equal(Paths(PLAIN, kind).consistent(x, torch.zeros(3, dtype=torch.long), output), x)


def test_f_is_what_diffusers_lcm_scheduler_takes_for_the_picture() -> None:
    """At the times that it visits in 4 steps, the first of which is at zero SNR."""
    stock = diffusers.LCMScheduler.from_config(STOCK)
    stock.set_timesteps(4)
    x, output, paths = torch.randn(1, 4, 2, 2), torch.randn(1, 4, 2, 2), Paths(ZERO_SNR, "v_prediction")
    assert stock.timesteps.tolist() == [999, 759, 499, 259]
    assert {*stock.timesteps.tolist()} <= {*paths.times.tolist()}
    for t in stock.timesteps:
        wanted = stock.step(output, t, x, generator=torch.Generator()).denoised
        torch.testing.assert_close(paths.consistent(x, t[None], output), wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["v_prediction", "epsilon", "sample"])
def test_the_teachers_step_is_ddims(kind: str) -> None:
    """diffusers' DDIM in 50 steps, and ldm's own between the same levels; v and x0 begin at zero SNR."""
    schedule = PLAIN if kind == "epsilon" else ZERO_SNR
    config = STOCK | {"prediction_type": kind, "rescale_betas_zero_snr": kind != "epsilon"}
    stock = diffusers.DDIMScheduler(**config)
    stock.num_inference_steps = 50  # it goes down 20 times from wherever it is
    paths, solve = Paths(schedule, kind), SCHEDULERS["ddim"].bound()
    x, output = torch.randn(1, 4, 2, 2, dtype=torch.float64), torch.randn(1, 4, 2, 2, dtype=torch.float64)
    for t in (999, 979, 499, 39):
        times = torch.tensor([t])
        until = paths.below(times)
        assert until.tolist() == [t - 20]
        ours = paths.step(x, times, until, output)
        torch.testing.assert_close(ours.float(), stock.step(output, t, x).prev_sample.float(), rtol=1e-4, atol=1e-5)
        sigma, lower = min(schedule.sigma(t), 1e8), schedule.sigma(t - 20)
        scale = math.hypot(1, sigma)

        def denoise(noisy: Tensor, level: float) -> Estimate:
            return Estimate(PREDICTIONS[kind].to_x0(noisy, level, output))

        (step,) = solve(denoise, x * scale, (sigma, lower), lambda a, b: torch.zeros_like(x))
        torch.testing.assert_close(ours, step.x / math.hypot(1, lower), rtol=1e-6, atol=1e-6)


def test_a_leap_is_no_longer_than_the_path() -> None:
    paths = Paths(ZERO_SNR, "v_prediction", 50, 4)
    assert paths.below(torch.tensor([999, 99, 79, 59, 19])).tolist() == [919, 19, 0, 0, 0]
    assert Paths(ZERO_SNR, "v_prediction", 25).times.tolist() == list(range(39, 1000, 40))
    for points, skip in ((0, 1), (1001, 1), (50, 0), (50, 51)):
        with pytest.raises(UsageError, match="it must be from 1 to"):
            Paths(ZERO_SNR, "v_prediction", points, skip)


# -- a closed form -----------------------------------------------------------------------------------------------------

MEAN, DEVIATION = 0.7, 0.3


def gaussian_v(x: Tensor, t: Tensor) -> Tensor:
    """What a perfect network says of v where the data is normal: E[alpha noise - beta x0 | x]."""
    alpha, beta = (torch.from_numpy(rates)[t].view(-1, 1) for rates in ZERO_SNR.rates)
    variance = alpha**2 * DEVIATION**2 + beta**2
    x0 = MEAN + alpha * DEVIATION**2 / variance * (x - alpha * MEAN)
    return alpha * beta / variance * (x - alpha * MEAN) - beta * x0


def ended(x: Tensor, t: int) -> Tensor:
    """Where the probability flow of normal data ends: all x_t = alpha mean + deviation_t z of one path have one z."""
    (alpha, beta), (alpha_0, beta_0) = ((rates[t] for rates in ZERO_SNR.rates), (rates[0] for rates in ZERO_SNR.rates))
    spread, spread_0 = (math.hypot(a * DEVIATION, b) for a, b in ((alpha, beta), (alpha_0, beta_0)))
    return alpha_0 * MEAN + spread_0 * (x - alpha * MEAN) / spread


class Affine(nn.Module):
    """A network of two numbers for each time, which is all that normal data asks for."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(1000, 2, dtype=torch.float64)
        nn.init.zeros_(self.table.weight)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        slope, offset = self.table(t).split(1, 1)
        return slope * x + offset


def walked(points: int, z: Tensor) -> Tensor:
    """Where DDIM in so many steps ends that begins at pure noise."""
    paths, x = Paths(ZERO_SNR, "v_prediction", points), z
    for time in paths.times.flip(0).tolist():
        t = torch.full((len(z),), time)
        x = paths.step(x, t, paths.below(t), gaussian_v(x, t))
    return x


def test_distilling_normal_data_finds_the_ends_of_its_paths() -> None:
    """The teacher's steps come to the flow's end, known in closed form, with an error that their number divides. The
    student says in one step from pure noise what 20 of them give, which before it is taught it is far from.
    """
    z = torch.linspace(-2, 2, 9, dtype=torch.float64)[:, None]
    errors = [float((walked(points, z) - ended(z, 999)).abs().max()) for points in (20, 50, 100, 200)]
    assert errors[1] < 0.06 < float(ended(z, 999).max()) / 20
    assert all(1.8 < more / fewer < 2.2 for more, fewer in pairwise(errors[1:]))

    paths, student, dice = Paths(ZERO_SNR, "v_prediction", 20), Affine(), torch.Generator().manual_seed(0)
    times, last = paths.times.repeat(8), torch.full((len(z),), 999)
    data, noise = torch.randn(2, len(times), 1, generator=dice, dtype=torch.float64)
    noisy = paths.noised(MEAN + DEVIATION * data, times, noise)

    def apart(wanted: Tensor) -> float:
        return float((paths.consistent(z, last, student(z, last)) - wanted).detach().abs().max())

    untaught = apart(walked(20, z))
    optimizer = torch.optim.Adam(student.parameters(), betas=(0.5, 0.9))
    for step in range(500):
        optimizer.param_groups[0]["lr"] = 0.02 * min(1.0, 2 * (1 - step / 500))
        optimizer.zero_grad()
        consistency_loss(paths, student, gaussian_v, noisy, times, huber_c=1.0).mean().backward()
        optimizer.step()
    assert apart(walked(20, z)) < 0.005 < untaught / 100
    assert apart(ended(z, 999)) == pytest.approx(errors[0], abs=0.005)


# -- the objective -----------------------------------------------------------------------------------------------------


def test_the_loss_is_that_of_the_networks_one_by_one(finished: Path, tmp_path: Path) -> None:
    """Teacher: the bare U-Net, with and without the caption, twice. Student and target: the U-Net with the adapter in
    its weights. Gradients reach the adapter, and nothing else.
    """
    frozen, config = open_model(finished, torch.float32, torch.device("cpu")), configured(finished, tmp_path)
    paths = Paths(*network_of(frozen.scheduler_config), 50, 2)
    lora = LoRA.for_model({"unet": frozen.unet}, 2, None, config.targets)
    for parameter in lora.parameters():
        nn.init.normal_(parameter, std=0.1)
    objective = Distillation(config, frozen, paths, lora)
    assert objective.scale == 2.5  # the model's own
    assert Distillation(configured(finished, tmp_path, guidance_scale=4), frozen, paths, lora).scale == 4
    x0, noise, t = (*torch.randn(2, 3, 4, 8, 8), torch.tensor([999, 499, 19]))
    ids = objective.empty.repeat(3, 1)
    ids[:, 1] = torch.tensor([300, 301, 302])
    losses = objective.losses(lora, x0, ids, t, noise)

    pipeline = Pipeline.from_pretrained(finished, device="cpu")
    text, bare = pipeline.text_encoder.model, pipeline.components.unet  # type: ignore[union-attr]
    context, empty = text(ids)[0], text(objective.empty)[0].expand(3, -1, -1)
    alpha, beta = (torch.from_numpy(rates).float()[t].view(-1, 1, 1, 1) for rates in ZERO_SNR.rates)
    noisy, until = alpha * x0 + beta * noise, torch.tensor([959, 459, 0])
    with torch.no_grad():
        v = (1 - 2.5) * bare(noisy, t, empty) + 2.5 * bare(noisy, t, context)
        a, b = (torch.from_numpy(rates).float()[until].view(-1, 1, 1, 1) for rates in ZERO_SNR.rates)
        lower = a * (alpha * noisy - beta * v) + b * (beta * noisy + alpha * v)
    pipeline.components.weights.load("taught", lora.adapter(), Strength.of(1))
    both = pipeline.unet
    with torch.no_grad():
        wanted = paths.consistent(lower, until, both(lower, until, context))
        said = paths.consistent(noisy, t, both(noisy, t, context))
    apart = 2 * (((said - wanted) ** 2 + 1e-6).sqrt() - 1e-3)
    torch.testing.assert_close(losses, apart.mean((1, 2, 3)), rtol=1e-3, atol=1e-5)

    losses.sum().backward()
    for name, parameter in objective.named_parameters():
        reached = parameter.grad is not None
        assert reached == parameter.requires_grad == name.startswith("lora."), name
        assert not reached or parameter.grad.abs().max() > 0, name  # type: ignore[union-attr]


def test_every_layer_that_lcm_lora_adapts_is_adapted(finished: Path, tmp_path: Path) -> None:
    frozen = open_model(finished, torch.float32, torch.device("cpu"))
    targets = configured(finished, tmp_path).targets
    adapted = {address for address, _ in LoRA.for_model({"unet": frozen.unet}, 1, None, targets).items()}
    all_layers = {f"unet.{n}" for n, part in frozen.unet.named_modules() if isinstance(part, nn.Linear | nn.Conv2d)}
    ends = ("conv_in", "conv_out", "time_embedding.linear_1", "time_embedding.linear_2")
    assert all_layers - adapted == {f"unet.{end}" for end in ends}


# -- whole runs --------------------------------------------------------------------------------------------------------


def test_the_command_gives_an_adapter_and_a_fast_mode(
    run: Any, finished: Path, tmp_path: Path, noto_font: Path
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(finished, folder)
    config = configured(folder, tmp_path / "run", weights=str(folder))
    Path("distill.yaml").write_text(json.dumps(asdict(config)))  # which is YAML
    done = run("train", "distill", "--config", "distill.yaml")
    result = tmp_path / "run" / "result"
    assert (done.code, done.out) == (0, f"{result}\n"), done.err
    rows = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3] and rows[-1]["held_out_loss"] > 0
    tensors = load_file(result / LORA)
    assert {value.dtype for value in tensors.values()} == {torch.float16}
    assert all(value.abs().max() > 0 for name, value in tensors.items())  # the last factors began as zeros
    assert json.loads((result / "generation_config.json").read_text()) == {
        "num_inference_steps": 2, "guidance_scale": 1.0, "scheduler": "lcm",
    }  # fmt: skip
    assert (folder / "fast" / LORA).read_bytes() == (result / LORA).read_bytes()
    for name in ("unet", "vae", "text_encoder"):  # nothing of the model has changed
        for file in (folder / name).iterdir():
            assert file.read_bytes() == (finished / name / file.name).read_bytes()
    kept = load_file(tmp_path / "run" / "state-3" / "state.safetensors")
    assert not any(".unet." in name or ".text." in name for name in kept)
    drawn = Pipeline.from_pretrained(folder, fast=True)("an owl", seed=1)
    assert drawn.request.scheduler == "lcm" and drawn.request.num_inference_steps == 2


def test_a_tiny_autoencoder_learns_the_latents_of_the_first_stage(
    finished: Path, tmp_path: Path, noto_font: Path
) -> None:
    """What is held out is decoded better after some steps; the result opens in stock diffusers, which makes the same
    pictures and latents of it.
    """
    loop = LoopConfig(
        str(tmp_path / "run"), steps=30, batch_size=4, learning_rate=0.01, warmup_steps=5, ema_decay=0.9, workers=0,
        threads=1, device="cpu", log_every=30, save_every=30, sample_every=30,
    )  # fmt: skip
    config = TinyDecoderConfig(
        loop, str(finished / "vae"), corpus=CorpusConfig(size=16, objects=2), width=8, encoder_width=8, blocks=1
    )
    stage = tiny_decoder(config)
    before = stage.held_out(stage.model)
    *_, last = run_stage(stage, config)
    after = {name.removeprefix("held_out_"): value for name, value in last.figures.items()}
    assert after["psnr"] > before["psnr"] + 3 and after["round_trip_psnr"] > before["round_trip_psnr"] + 3
    assert after["full_psnr"] == pytest.approx(before["full_psnr"], rel=1e-4)
    stock = diffusers.AutoencoderTiny.from_pretrained(tmp_path / "run" / "result", torch_dtype=torch.float32)
    assert {
        v.dtype for v in load_file(tmp_path / "run" / "result" / "diffusion_pytorch_model.safetensors").values()
    } == {torch.float16}
    ours = open_model(finished, torch.float32, torch.device("cpu"), vae=tmp_path / "run" / "result").vae
    z, x = torch.randn(1, 4, 8, 8), torch.rand(1, 3, 16, 16) * 2 - 1
    with torch.no_grad():
        torch.testing.assert_close(ours.decode(z), stock.decode(z).sample, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(ours.encode(x), stock.encode(x).latents, rtol=1e-5, atol=1e-5)


def test_the_tiny_losses_are_of_pictures_and_scaled_latents(finished: Path, noto_font: Path) -> None:
    config = TinyDecoderConfig(LoopConfig("unused"), "unused", width=4, encoder_width=4, blocks=1)
    vae = open_model(finished, torch.float32, torch.device("cpu")).vae
    objective = TinyAutoencoding(config, vae)  # type: ignore[arg-type]  # an AutoencoderKL
    images = torch.tensor(EmojiScenes(CorpusConfig(size=16, objects=2))[0][0])[None]
    loss, figures = objective((images,), 0)
    loss.backward()  # type: ignore[no-untyped-call]
    x = to_signal(images)
    with torch.no_grad():
        latent = (objective.tiny.encode(x) - vae.config.scaling_factor * vae.posterior(x)[0]).square().mean()
    assert float(figures["latent"]) == pytest.approx(float(latent))
    for name, parameter in objective.named_parameters():
        assert (parameter.grad is not None) == name.startswith("tiny."), name


def test_what_cannot_be_distilled_is_said(finished: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"latents is 3; it must be at least loop.batch_size, 4"):
        distill(configured(finished, tmp_path, latents=3))
    with pytest.raises(ModelError, match="there is no model folder"):
        distill(configured(tmp_path / "nothing", tmp_path))
    flow = tmp_path / "flow"
    shutil.copytree(finished, flow)
    (flow / "scheduler" / "scheduler_config.json").write_text('{"_class_name": "FlowMatchEulerDiscreteScheduler"}')
    with pytest.raises(ModelError, match="without a table of noise levels"):
        distill(configured(flow, tmp_path))
    with pytest.raises(UsageError, match="blocks is 0"):
        TinyDecoderConfig(LoopConfig("unused"), "unused", blocks=0)
