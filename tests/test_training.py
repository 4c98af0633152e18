"""Training: the loop against plain loops and closed forms, the stages' losses against two-pass computations, and runs
that are killed at any moment.
"""

import dataclasses
import json
import math
import os
import runpy
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from statistics import NormalDist
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.data import Dataset

from ldm.checkpoints.safe import check_manifest, read_json
from ldm.cli.train import STAGES as COMMANDS
from ldm.data.emoji import CorpusConfig, EmojiScenes
from ldm.errors import LdmError, ModelError, NumericalError, UsageError
from ldm.evaluation.drawing import Drawing
from ldm.models.clip import CLIPTextConfig, CLIPVisionConfig
from ldm.models.unet import CROSS, UNetConfig
from ldm.models.vae import AutoencoderKL, VAEConfig
from ldm.pipeline import Pipeline
from ldm.training.clip import clip
from ldm.training.config import (
    NAMED,
    ClipConfig,
    DenoiserConfig,
    FirstStageConfig,
    LoopConfig,
    SmallVAEConfig,
    checked,
    read_config,
)
from ldm.training.denoiser import LatentBatches, components, denoiser
from ldm.training.ema import EMA
from ldm.training.first_stage import (
    FirstStage,
    SceneBatches,
    edge_l1,
    first_stage,
    held_out_images,
    measured_scale,
    multiscale_l1,
)
from ldm.training.loop import Batch, Progress, Stage, generator, run_stage, train
from ldm.training.lora_config import LoRAConfig
from ldm.training.optimizers import OPTIMIZERS, RATES
from ldm.training.state import load_state, save_state, states

ROOT = Path(__file__).parents[1]
CORPUS = CorpusConfig(size=16, objects=12)
SMALL = {  # what a stage computes beside its steps, made small
    "ldm.training.clip.TOKENIZER_CAPTIONS": 300,
    "ldm.training.clip.HELD_OUT_SCENES": 16,
    "ldm.training.denoiser.HELD_OUT_SCENES": 16,
    "ldm.training.first_stage.SCALE_SCENES": 256,
}


def loop_config(out: Path, **options: Any) -> LoopConfig:
    chosen: dict[str, Any] = {
        "steps": 4,
        "batch_size": 4,
        "learning_rate": 0.01,
        "warmup_steps": 1,
        "ema_decay": 0.9,
        "workers": 0,
        "threads": 1,
        "device": "cpu",
        "log_every": 1,
        "save_every": 2,
    }
    return LoopConfig(str(out), **chosen | options)


def first_stage_config(out: Path, **options: Any) -> FirstStageConfig:
    vae = SmallVAEConfig(block_out_channels=(8, 16), norm_num_groups=4, sample_size=16)
    chosen: dict[str, Any] = {"crop": 12, "crops": 1, "disc_start": 1, "disc_width": 4}
    return FirstStageConfig(loop_config(out), CORPUS, vae, **chosen | options)


def clip_config(out: Path, parts: Path) -> ClipConfig:
    text = CLIPTextConfig(
        vocab_size=700, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2
    )
    vision = CLIPVisionConfig(
        hidden_size=16,
        intermediate_size=32,
        projection_dim=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=16,
        patch_size=8,
    )
    return ClipConfig(loop_config(out), str(parts / "first_stage" / "result"), CORPUS, 700, 2.0, text, vision)


def denoiser_config(out: Path, parts: Path, **options: Any) -> DenoiserConfig:
    unet = UNetConfig(
        sample_size=8,
        block_out_channels=(8, 16),
        down_block_types=("DownBlock2D", CROSS),
        layers_per_block=1,
        norm_num_groups=4,
        cross_attention_dim=16,
        num_heads=(2, 2),
        transformer_layers_per_block=(1, 1),
    )
    chosen: dict[str, Any] = {"latents": 16, "num_inference_steps": 2, "corpus": CORPUS, "unet": unet}
    folders = (str(parts / "first_stage" / "result"), str(parts / "clip" / "result"))
    return DenoiserConfig(loop_config(out), *folders, **chosen | options)


STAGES: dict[str, Callable[[Path, Path], tuple[Callable[[Any], Stage], Any]]] = {  # (where, finished stages) -> stage
    "first_stage": lambda base, parts: (first_stage, first_stage_config(base / "first_stage")),
    "clip": lambda base, parts: (clip, clip_config(base / "clip", parts)),
    "denoiser": lambda base, parts: (denoiser, denoiser_config(base / "denoiser", parts)),
}


def run(name: str, base: Path, parts: Path) -> Iterator[Progress]:
    make, config = STAGES[name](base, parts)
    yield from run_stage(make(config), config)


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Runs on the CPU set the number of threads and flush denormals; the tests after these do not want that."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        for name, value in SMALL.items():
            patch.setattr(name, value)
        yield
    torch.set_num_threads(threads)
    torch.set_flush_denormal(False)


# -- a run of every stage, killed and resumed --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory, noto_font: Path) -> Path:
    """The folder of three unbroken runs of 4 steps, the denoiser on the other two's results."""
    base = tmp_path_factory.mktemp("unbroken")
    for name in STAGES:
        assert [progress.step for progress in run(name, base, base)] == [1, 2, 3, 4]
    return base


def be_killed(base: str, parts: str) -> None:
    """Runs in a process of its own. Forks one for every moment of a save (see `die_saving`), then one for each stage,
    which is killed after step 3, the last state being that of step 2. Prints what came of them.
    """
    torch.set_num_threads(1)
    patch = pytest.MonkeyPatch()
    for name, value in SMALL.items():
        patch.setattr(name, value)
    moments, ends = die_saving(Path(base) / "moments"), {}
    for name in STAGES:
        if (child := os.fork()) == 0:
            for progress in run(name, Path(base), Path(parts)):
                if progress.step == 3:
                    os.kill(os.getpid(), signal.SIGKILL)
        ends[name] = os.waitpid(child, 0)[1]
    print(json.dumps({"ends": ends, "moments": moments}))


def die_saving(folder: Path) -> list[list[int]]:
    """Saves state 3 beside states 1 and 2, killed at the k-th touch of the file system, k = 1, 2 ... until a save gets
    to its end. -> for every k the steps of the states that are there and load as they were saved.
    """
    model = nn.Conv2d(3, 5, 3).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)

    def save(step: int) -> None:
        model(torch.full((1, 3, 4, 4), float(step))).sum().backward()
        optimizer.step()
        save_state(folder, step, {"model": model}, optimizer, {}, 2)
        saved[step] = {name: value.clone() for name, value in model.state_dict().items()}

    saved: dict[int, dict[str, Tensor]] = {}
    save(1)
    save(2)
    shutil.copytree(folder, before := folder.with_name("before"))
    found: list[list[int]] = []
    for moment in range(1, 1000):
        if (child := os.fork()) == 0:
            left = moment

            def count(event: str, args: Any) -> None:
                nonlocal left
                left -= event == "open" or event.startswith(("os.", "shutil."))
                if left == 0:
                    os.kill(os.getpid(), signal.SIGKILL)

            sys.addaudithook(count)
            save(3)
            os._exit(0)
        status = os.waitpid(child, 0)[1]
        found.append([])
        for path in states(folder):
            step, _ = load_state(path, {"model": model}, optimizer, {})
            if step == 3 or all(torch.equal(saved[step][name], value) for name, value in model.state_dict().items()):
                found[-1].append(step)
        if status == 0:
            break
        if moment % 10:  # and sometimes what the killed one left stays there
            shutil.rmtree(folder)
            shutil.copytree(before, folder)
    return found


@pytest.fixture(scope="module")
def killed(unbroken: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    base = tmp_path_factory.mktemp("killed")
    code = "import sys, test_training; test_training.be_killed(*sys.argv[1:])"
    where = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, (ROOT, ROOT / "tests"))), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "ignore", "-c", code, str(base), str(unbroken)]
    done = subprocess.run(command, env=where, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return base, json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("name", STAGES)
def test_killed_and_resumed_a_run_ends_as_if_unbroken(
    name: str, unbroken: Path, killed: tuple[Path, dict[str, Any]]
) -> None:
    base, report = killed
    assert report["ends"][name] == signal.SIGKILL
    assert [path.name for path in states(base / name)] == ["state-2"] and not (base / name / "result").exists()
    assert [progress.step for progress in run(name, base, unbroken)] == [3, 4]
    ended, expected = (load_file(folder / name / "state-4" / "state.safetensors") for folder in (base, unbroken))
    assert ended.keys() == expected.keys()
    assert [key for key, value in expected.items() if not torch.equal(ended[key], value)] == []
    begun = load_file(unbroken / name / "state-2" / "state.safetensors")
    parts = {key.split("/")[0] for key, value in expected.items() if not torch.equal(begun[key], value)}
    assert parts == {"objective", "ema", "optimizer"}  # all of them move
    weights = sorted((unbroken / name / "result").rglob("*.safetensors"))
    for path in weights:
        resumed = load_file(base / name / "result" / path.relative_to(unbroken / name / "result"))
        assert all(torch.equal(resumed[key], value) for key, value in load_file(path).items())
    assert len(weights) == {"first_stage": 1, "clip": 2, "denoiser": 3}[name]


def test_killed_at_any_moment_of_a_save_the_state_before_it_is_there(killed: tuple[Path, dict[str, Any]]) -> None:
    moments = killed[1]["moments"]
    assert len(moments) >= 20  # mkdir, open, rename, fsync ... each one a place to die
    assert {tuple(steps) for steps in moments} == {(1, 2), (1, 2, 3), (2, 3)}
    assert moments[0] == [1, 2] and moments[-1] == [2, 3]


def test_what_a_run_leaves(unbroken: Path) -> None:
    for name, kept in {"first_stage": "psnr", "clip": "retrieval", "denoiser": "loss"}.items():
        out = unbroken / name
        rows = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
        assert [row["step"] for row in rows] == [1, 2, 3, 4]
        assert [f"held_out_{kept}" in row for row in rows] == [False, True, False, True]
        assert all(math.isfinite(value) for row in rows for value in row.values())
        for picture in (out / "curve.png", out / "samples" / "0000004.png"):
            with Image.open(picture) as image:
                assert image.width > 16
        assert [path.name for path in out.glob(".*")] == []  # nothing temporary
    result = unbroken / "denoiser" / "result"
    assert check_manifest(result) == {}
    assert {"taco", "owl"} <= {entry["name"] for entry in read_json(result / "vocabulary.json")["objects"]}
    drawn = Pipeline.from_pretrained(result, device="cpu")("a taco on a red background", seed=1)
    assert drawn.request.num_inference_steps == 2 and len(drawn.images) == 1


def test_the_text_encoder_stays_frozen(unbroken: Path) -> None:
    trained = load_file(unbroken / "clip" / "result" / "text_encoder" / "model.safetensors")
    state = load_file(unbroken / "denoiser" / "state-4" / "state.safetensors")
    result = load_file(unbroken / "denoiser" / "result" / "text_encoder" / "model.safetensors")
    assert all(torch.equal(result[key].half(), value.half()) for key, value in trained.items())
    assert not trained.keys() & {key.removeprefix("objective/text.") for key in state}  # and fills no disk
    moments = {key.split("/")[1] for key in state if key.startswith("optimizer/")}
    assert len(moments) == sum(key.startswith("objective/unet.") for key in state)
    assert len(moments) == sum(key.startswith("ema/") for key in state)


def test_the_scale_factor_is_measured(unbroken: Path) -> None:
    result = unbroken / "first_stage" / "result"
    config = VAEConfig.from_dict(read_json(result / "config.json"))
    vae = AutoencoderKL(config)
    vae.load_state_dict(load_file(result / "diffusion_pytorch_model.safetensors"))
    assert abs(spread_of(vae, seed=77) - 1) <= 0.02
    with torch.no_grad():  # and of one whose latents are small and clear, so that the scenes make their spread
        vae.quant_conv.weight.mul_(0.05)
        vae.quant_conv.bias.zero_()[4:].fill_(-12.0)
    images = held_out_images(EmojiScenes(CORPUS), 256)
    scale = measured_scale(vae, images)
    assert scale > 2 * config.scaling_factor
    assert measured_scale(vae.to(memory_format=torch.channels_last), images) == scale  # by sums in another order
    vae.config = dataclasses.replace(config, scaling_factor=scale)
    assert abs(spread_of(vae, seed=78) - 1) <= 0.02


@torch.inference_mode()
def spread_of(vae: AutoencoderKL, seed: int) -> float:
    """Standard deviation of the scaled latents of 384 scenes, posterior samples."""
    scenes = EmojiScenes(CORPUS, seed)
    images = torch.from_numpy(np.stack([scenes[i][0] for i in range(384)])).float() / 127.5 - 1
    noise = torch.randn(384, 4, 8, 8, generator=torch.Generator().manual_seed(seed))
    return float(vae.encode(images, noise).std())


# -- the loop, on a toy ------------------------------------------------------------------------------------------------


class Toy(nn.Module):
    """Least squares; its loss is not finite at the steps of `broken`."""

    def __init__(self, broken: tuple[int, ...] = ()) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.model, self.broken = nn.Linear(3, 1), broken

    def forward(self, batch: Batch, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        loss = (self.model(batch[0]) - batch[1]).square().mean()
        return (loss * math.nan if step in self.broken else loss), {"twice": 2 * loss.detach()}


class Pairs(Dataset[Batch]):
    def __init__(self, size: int) -> None:
        numbers = torch.Generator().manual_seed(0)
        self.size, self.x = size, torch.randn(64, 3, generator=numbers)
        self.y = self.x @ torch.tensor([[1.0], [-2.0], [0.5]]) + 3

    def __getitem__(self, index: int) -> Batch:
        rows = slice(index * self.size, (index + 1) * self.size)
        return self.x[rows], self.y[rows]


def nothing(*args: Any) -> Any:
    raise AssertionError("not wanted here")


def trained(out: Path, objective: Toy, batch: int = 4, run: dict[str, Any] | None = None, **options: Any) -> EMA:
    """Train a toy; -> the average."""
    c = loop_config(out, **options)
    ema = EMA(objective.model, c.ema_decay)
    for progress in train(
        Stage(objective, objective.model, Pairs(batch), nothing, nothing, nothing), c, run or {}, ema
    ):
        assert bool(progress.figures) == (progress.step % c.log_every == 0 or progress.saved is not None)
    return ema


def test_runs_of_two_precisions_in_one_process(tmp_path: Path) -> None:
    ends = [trained(tmp_path / kind, Toy(), mixed_precision=kind).model.weight for kind in ("no", "bf16", "no")]
    assert torch.equal(ends[0], ends[2]) and not torch.equal(ends[0], ends[1])


def learning_rate(step: int, c: LoopConfig) -> float:
    return c.learning_rate * RATES[c.lr_scheduler](step, c)


def test_the_loop_is_the_plain_loop(tmp_path: Path) -> None:
    options: dict[str, Any] = {"steps": 8, "warmup_steps": 3, "max_grad_norm": 2.0, "weight_decay": 0.1, "beta2": 0.9}
    objective, plain = Toy(), Toy()
    ema = trained(tmp_path, objective, ema_every=2, **options)
    optimizer = torch.optim.AdamW(plain.parameters(), betas=(0.9, 0.9), weight_decay=0.1)
    average, updates = plain.model.weight.detach().clone(), 0
    for step in range(8):
        optimizer.param_groups[0]["lr"] = learning_rate(step, loop_config(tmp_path, **options))
        x, y = Pairs(4)[step]
        optimizer.zero_grad()
        (plain.model(x) - y).square().mean().backward()
        nn.utils.clip_grad_norm_(plain.parameters(), 2.0)
        optimizer.step()
        if step % 2:
            decay = min(0.9, (1 + updates) / (10 + updates))
            average = decay * average + (1 - decay) * plain.model.weight.detach()
            updates += 1
    assert torch.allclose(objective.model.weight, plain.model.weight, rtol=1e-6)
    assert torch.allclose(objective.model.bias, plain.model.bias, rtol=1e-6)
    assert torch.allclose(ema.model.weight, average, rtol=1e-6)


def test_accumulated_batches_make_one_step(tmp_path: Path) -> None:
    whole, halves = Toy(), Toy()
    whole_ema = trained(tmp_path / "whole", whole, batch=8, steps=6)
    halves_ema = trained(tmp_path / "halves", halves, batch=4, steps=6, gradient_accumulation_steps=2)
    assert torch.allclose(whole.model.weight, halves.model.weight, rtol=1e-5)
    assert torch.allclose(whole_ema.model.weight, halves_ema.model.weight, rtol=1e-5)
    assert states(tmp_path / "halves")[-1].name == "state-6"


def test_only_the_newest_states_are_kept(tmp_path: Path) -> None:
    trained(tmp_path, Toy(), steps=11, save_every=3, keep_states=3)
    assert [path.name for path in states(tmp_path)] == ["state-6", "state-9", "state-11"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["state-11", "state-6", "state-9"]


def test_a_finished_run_does_nothing_more(tmp_path: Path) -> None:
    first = trained(tmp_path, Toy()).model.weight
    assert torch.equal(trained(tmp_path, Toy()).model.weight, first)


def test_a_state_of_another_configuration_is_refused(tmp_path: Path) -> None:
    trained(tmp_path, Toy(), run={"loop": {"steps": 4, "seed": 0}, "crop": 40})
    before = (tmp_path / "state-4" / "state.safetensors").read_bytes()
    with pytest.raises(LdmError, match=r"state-4 was saved by a run with loop.seed 0, not 1; go on with .*`loop.out`"):
        trained(tmp_path, Toy(), run={"loop": {"steps": 4, "seed": 1}, "crop": 40}, steps=6)
    assert (tmp_path / "state-4" / "state.safetensors").read_bytes() == before


def test_a_stage_goes_on_with_what_it_was_begun_with(tmp_path: Path) -> None:
    """Its own networks and fields; how often it tells, and in how many processes, may change."""
    objective, c = Toy(), loop_config(tmp_path, sample_every=100)
    stage = Stage(
        objective, objective.model, Pairs(4), lambda _: {}, lambda _: Image.new("RGB", (8, 8)), lambda *_: None
    )
    stage = dataclasses.replace(stage, base="1a")
    assert [progress.step for progress in run_stage(stage, Plan(c))] == [1, 2, 3, 4]
    free = dataclasses.replace(c, log_every=3, save_every=1, keep_states=5, max_skipped_steps=7)
    assert [*run_stage(stage, Plan(free, weights="elsewhere"))] == []
    with pytest.raises(LdmError, match="rank 2, not 3"):
        next(run_stage(stage, Plan(c, rank=3)))
    with pytest.raises(LdmError, match="base '1a', not '2b'"):
        next(run_stage(dataclasses.replace(stage, base="2b"), Plan(c)))


def test_unfinished_states_are_passed_over(tmp_path: Path) -> None:
    whole = trained(tmp_path / "whole", Toy(), steps=6).model.weight
    trained(tmp_path, Toy(), steps=2, learning_rate=0.01, final_share=1.0)
    shutil.rmtree(tmp_path / "state-2")
    steps = iter(train_toy(tmp_path, Toy(), 6))
    next(steps), next(steps)
    for name in (".state-9.tmp", ".0123456789ab.tmp", ".0123456789ab.old", "state-8", "state-7", "states-9"):
        shutil.copytree(tmp_path / "state-2", tmp_path / name)
    (tmp_path / "state-8" / "state.json").unlink()
    (tmp_path / "state-7" / "state.safetensors").unlink()
    assert [path.name for path in states(tmp_path)] == ["state-2"]
    assert torch.equal(trained(tmp_path, Toy(), steps=6).model.weight, whole)
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def train_toy(out: Path, objective: Toy, steps: int) -> Iterator[Progress]:
    c = loop_config(out, steps=steps)
    stage = Stage(objective, objective.model, Pairs(4), nothing, nothing, nothing)
    return train(stage, c, {}, EMA(objective.model, c.ema_decay))


@pytest.mark.parametrize("log_every", [1, 1000])
def test_a_loss_that_is_not_finite_stops_the_run(tmp_path: Path, log_every: int) -> None:
    options = {"steps": 8, "log_every": log_every, "save_every": 2}
    trained(tmp_path / "good", Toy(), **options)
    with pytest.raises(NumericalError, match=r"loss .*not finite at step 5; lower the learning rate"):
        trained(tmp_path / "bad", Toy(broken=(4,)), **options)
    assert [path.name for path in states(tmp_path / "bad")] == ["state-2", "state-4"]  # all from before step 5
    kept = load_file(tmp_path / "bad" / "state-4" / "state.safetensors")
    assert all(torch.isfinite(value).all() for value in kept.values())
    assert torch.isfinite(trained(tmp_path / "bad", Toy(), **options).model.weight).all()


def test_a_run_goes_on_from_the_newest_sound_state(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A damaged one is passed over, with a warning, and written anew (what else may befall states: test_state.py)."""
    whole = trained(tmp_path, Toy()).model.weight
    before = (tmp_path / "state-4" / "state.safetensors").read_bytes()
    (tmp_path / "state-4" / "state.safetensors").write_bytes(before[:-1])
    assert torch.equal(trained(tmp_path, Toy()).model.weight, whole)
    assert "state-4 is passed over: state.safetensors is changed" in caplog.text
    assert (tmp_path / "state-4" / "state.safetensors").read_bytes() == before


def test_other_networks_are_named(tmp_path: Path) -> None:
    trained(tmp_path, Toy())
    path = tmp_path / "state-4"
    run = read_json(path / "state.json")["run"]
    wide = nn.Linear(4, 1)
    kept = wide.weight.detach().clone()
    modules = {"objective": wide, "ema": wide}
    with pytest.raises(ModelError, match=r"state-4.state.safetensors does not fit .*objective/"):
        load_state(path, modules, torch.optim.AdamW(wide.parameters()), run)
    assert torch.equal(wide.weight, kept)


def test_the_optimiser_is_restored_in_the_layout_of_its_parameters(tmp_path: Path) -> None:
    """A fused optimiser takes parameter and moments as they lie in memory, so both must lie alike."""

    def begun() -> tuple[nn.Module, torch.optim.Optimizer]:
        torch.manual_seed(0)
        model = nn.Conv2d(3, 5, 3).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        return model, torch.optim.AdamW(model.parameters(), lr=0.1, fused=True)

    def step(model: nn.Module, optimizer: torch.optim.Optimizer, seed: int) -> None:
        model(torch.randn(2, 3, 8, 8, generator=generator(1, seed))).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    model, optimizer = begun()
    step(model, optimizer, 0)
    path = save_state(tmp_path, 1, {"model": model}, optimizer, {}, 1)
    step(model, optimizer, 1)
    again, other = begun()
    assert load_state(path, {"model": again}, other, {}) == (1, {})
    step(again, other, 1)
    assert torch.equal(again.weight, model.weight)  # type: ignore[arg-type]


# -- closed forms ------------------------------------------------------------------------------------------------------


def test_learning_rate_is_torch_s_warm_up_and_cosine(tmp_path: Path) -> None:
    c = loop_config(tmp_path, steps=50, warmup_steps=10, learning_rate=0.02, final_share=0.05)
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.02)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=40, eta_min=0.05 * 0.02)
    for step in range(50):
        expected = 0.02 * (step + 1) / 10
        if step >= 10:
            expected = cosine.get_last_lr()[0]
            optimizer.step()
            cosine.step()
        assert learning_rate(step, c) == pytest.approx(expected, rel=1e-6)
    assert learning_rate(50, c) == pytest.approx(0.001) and learning_rate(10, c) == pytest.approx(0.02)
    assert learning_rate(0, dataclasses.replace(c, warmup_steps=0)) == pytest.approx(0.02)


def test_the_average_has_its_closed_form() -> None:
    model = nn.Linear(1, 1, bias=False).double()
    weights = [float(value) for value in torch.randn(200, generator=torch.Generator().manual_seed(2)).double()]
    begun = float(model.weight.detach())
    ema = EMA(model, 0.97)
    assert not ema.model.training and not ema.model.weight.requires_grad
    for n, weight in enumerate(weights):
        nn.init.constant_(model.weight, weight)
        ema.update(n)
    decays = np.array([min(0.97, (1 + n) / (10 + n)) for n in range(200)])
    assert decays[0] == 0.1 and 0.9 < decays[100] < 0.97 and decays[-1] < 0.97
    after = np.append(np.cumprod(decays[::-1])[::-1], 1.0)  # what is left of what was there before update n
    expected = after[0] * begun + sum((1 - decays[n]) * after[n + 1] * weight for n, weight in enumerate(weights))
    assert ema.model.weight.item() == pytest.approx(expected, rel=1e-12)
    assert model.weight.item() == weights[-1]


# -- the stages' losses ------------------------------------------------------------------------------------------------


def test_the_first_stage_learns(tmp_path: Path, noto_font: Path) -> None:
    config = first_stage_config(tmp_path, disc_start=1000, crops=0)
    config = dataclasses.replace(
        config, loop=loop_config(tmp_path, steps=60, batch_size=8, learning_rate=0.005, save_every=60, log_every=60)
    )
    stage = first_stage(config)
    before = stage.held_out(stage.model)
    ema = EMA(stage.model, 0.9)
    for _ in train(stage, config.loop, {}, ema):
        pass
    after = stage.held_out(ema.model)
    assert after["loss"] < 0.75 * before["loss"] and after["psnr"] > before["psnr"] + 1


def test_one_backward_pass_updates_both_players_as_two_would(tmp_path: Path, noto_font: Path) -> None:
    c = first_stage_config(tmp_path, disc_start=0, disc_weight=0.3)
    torch.manual_seed(0)
    objective = FirstStage(c)
    images = SceneBatches(EmojiScenes(CORPUS), 4)[0][0]
    loss, figures = objective((images,), 5)
    loss.backward()

    x = images.float() / 127.5 - 1
    vae, discriminator = objective.vae, objective.discriminator
    ours, theirs = dict(vae.named_parameters()), dict(discriminator.named_parameters())
    mean, logvar = vae.posterior(x)
    noise = torch.randn(mean.shape, generator=generator(c.loop.seed, 5))
    y = vae.decode(vae.config.scaling_factor * (mean + (logvar / 2).exp() * noise))
    kl = (mean**2 + logvar.exp() - 1 - logvar).mean() / 2
    seen = multiscale_l1(x, y, c.scales) + c.edge_weight * edge_l1(x, y)
    fooled = -discriminator(y).mean()
    last = vae.decoder.conv_out.weight
    norms = [torch.autograd.grad(value, last, retain_graph=True)[0].norm() for value in (seen, fooled)]
    weight = 0.3 * float(norms[0] / (norms[1] + 1e-4))
    assert float(figures["adversarial_weight"]) == pytest.approx(weight, rel=1e-4)
    total = seen + c.kl_weight * kl + weight * fooled  # no hinge in it
    for name, gradient in zip(ours, torch.autograd.grad(total, list(ours.values())), strict=True):
        assert close(ours[name].grad, gradient), name
    y = y.detach()  # no autoencoder in it
    hinge = (1 - discriminator(x)).clamp(min=0).mean() + (1 + discriminator(y)).clamp(min=0).mean()
    for name, gradient in zip(theirs, torch.autograd.grad(hinge / 2, list(theirs.values())), strict=True):
        assert close(theirs[name].grad, gradient), name
    assert float(loss.detach()) == pytest.approx(float((total + hinge / 2).detach()), rel=1e-5)

    early = FirstStage(dataclasses.replace(c, disc_start=6))
    early((images,), 5)[0].backward()
    assert all(p.grad is None for p in early.discriminator.parameters())
    assert all(p.grad is not None for p in early.vae.parameters())


def close(a: Tensor | None, b: Tensor) -> bool:
    """Equal to 1e-4 of the largest value (the sums are taken in another order)."""
    assert a is not None
    return float((a - b).abs().max()) <= 1e-4 * float(b.abs().max()) + 1e-9


def test_the_adaptive_weight_is_the_ratio_of_gradients(tmp_path: Path) -> None:
    objective = FirstStage(first_stage_config(tmp_path))
    last = objective.vae.decoder.conv_out.weight
    a, b = torch.randn_like(last), torch.randn_like(last)
    ratio = objective.adaptive_weight((a * last).sum(), (b * last).sum())
    assert float(ratio) == pytest.approx(float(a.norm()) / (float(b.norm()) + 1e-4), rel=1e-5)
    assert not ratio.requires_grad
    assert float(objective.adaptive_weight((1e3 * a * last).sum(), (0 * last).sum())) == 1e4


@dataclasses.dataclass(frozen=True)
class Plan:
    """A stage's configuration."""

    loop: LoopConfig
    rank: int = 2
    weights: str = ""


class Listener(nn.Module):
    """In place of the text encoder: keeps the ids it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.heard: list[Tensor] = []

    def forward(self, ids: Tensor) -> tuple[Tensor]:
        self.heard.append(ids)
        return (torch.zeros(len(ids), 1, 16),)


class Silent(nn.Module):
    """In place of the U-Net."""

    def forward(self, x: Tensor, t: Tensor, context: Tensor) -> Tensor:
        return 0 * x


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 1.0])
def test_captions_are_dropped_at_the_rate_configured(unbroken: Path, tmp_path: Path, share: float) -> None:
    objective: Any = denoiser(denoiser_config(unbroken / "denoiser", unbroken, caption_dropout=share)).objective
    objective.text, objective.unet = Listener(), Silent()
    ids = torch.arange(32 * 77).reshape(32, 77) + 10_000  # no caption of the corpus
    for step in range(300):
        loss, _ = objective((torch.zeros(32, 4, 8, 8), torch.ones(32, 4, 8, 8), ids), step)
        assert torch.isfinite(loss)
    heard = torch.stack(objective.text.heard)
    kept = (heard == ids).all(-1)
    assert ((heard == objective.empty).all(-1) == ~kept).all()  # the caption itself, or the empty one
    assert abs(float((~kept).float().mean()) - share) <= 4 * math.sqrt(share * (1 - share) / kept.numel())
    assert share in (0.0, 1.0) or len({tuple(row.tolist()) for row in kept}) > 250  # others at every step


@pytest.mark.parametrize(("mean", "std"), [(0.0, 0.0), (0.3, 1.1), (-0.5, 0.6)])
def test_timesteps_follow_their_distribution(unbroken: Path, mean: float, std: float) -> None:
    """Quantiles in closed form: even ones of t / T, or those of a normal logit."""
    config = denoiser_config(unbroken / "denoiser", unbroken, timestep_mean=mean, timestep_std=std)
    t = denoiser(config).objective.timesteps(40_000, generator(0, 0))  # type: ignore[operator]  # LatentDiffusion's
    assert t.dtype == torch.int64 and t.min() >= 0 and t.max() <= 999
    for share in (0.1, 0.25, 0.5, 0.75, 0.9):
        logit = mean + std * NormalDist().inv_cdf(share)
        below = 1000 * (share if std == 0 else 1 / (1 + math.exp(-logit)))
        # t is the whole part: those below `below` lie between those of its own whole part and of the next
        low, high = float((t < math.floor(below)).float().mean()), float((t < math.ceil(below)).float().mean())
        error = 4 * math.sqrt(share * (1 - share) / len(t))
        assert low - error <= share <= high + error


def test_the_text_encoder_gets_no_gradient(unbroken: Path) -> None:
    stage = denoiser(denoiser_config(unbroken / "denoiser", unbroken))
    objective: Any = stage.objective
    for step in range(2):  # the fresh network's last layer is zero: nothing but it learns in the first step
        loss, _ = objective(stage.batches[step], step)
        loss.backward()
        with torch.no_grad():
            for p in objective.unet.parameters():
                p -= 0.1 * p.grad
    assert all(p.grad is None and not p.requires_grad for p in objective.text.parameters())
    assert all(p.grad is not None for p in objective.unet.parameters())


def test_a_run_may_begin_with_a_trained_network(unbroken: Path, tmp_path: Path) -> None:
    """`start` names a model folder: its U-Net, in float32, is what the first step sees."""
    result = unbroken / "denoiser" / "result"
    begun = components(denoiser_config(tmp_path, unbroken, start=str(result))).unet
    stored = load_file(result / "unet" / "diffusion_pytorch_model.safetensors")
    assert {v.dtype for v in begun.state_dict().values()} == {torch.float32}
    assert all(torch.equal(value.half(), stored[key].half()) for key, value in begun.state_dict().items())
    assert all(p.requires_grad for p in begun.parameters())
    with pytest.raises(ModelError, match="nowhere"):
        components(denoiser_config(tmp_path, unbroken, start=str(tmp_path / "nowhere")))


def test_every_seed_and_step_has_numbers_of_its_own() -> None:
    pairs = [(seed, step) for seed in (0, 1, 2, 1_000_003) for step in (0, 1, 2, 100_000)]
    assert len({float(torch.rand((), generator=generator(*pair)).double()) for pair in pairs}) == len(pairs)
    assert torch.equal(torch.randn(9, generator=generator(7, 3)), torch.randn(9, generator=generator(7, 3)))


def test_every_latent_comes_once_an_epoch() -> None:
    encoded = (torch.arange(12.0), torch.arange(12.0), torch.arange(12))
    batches = LatentBatches(encoded, 4, seed=5)
    epochs = [torch.cat([batches[3 * epoch + i][2] for i in range(3)]) for epoch in range(3)]
    assert all(torch.equal(order.sort().values, torch.arange(12)) for order in epochs)
    assert not torch.equal(epochs[0], epochs[1])
    assert torch.equal(LatentBatches(encoded, 4, seed=5)[7][2], batches[7][2])  # by the number alone


# -- configurations ----------------------------------------------------------------------------------------------------


def written(folder: Path, text: str) -> Path:
    (folder / "run.yaml").write_text(text)
    return folder / "run.yaml"


def test_configurations_are_read(tmp_path: Path) -> None:
    path = written(tmp_path, "loop: {out: runs/a, steps: 7}\nkl_weight: 1e-4\nvae: {block_out_channels: [32, 64]}\n")
    config = read_config(path, FirstStageConfig)
    assert config.loop == LoopConfig("runs/a", steps=7) and config.kl_weight == 1e-4
    assert config.vae.block_out_channels == (32, 64) and config.corpus == CorpusConfig()
    other = read_config(path, FirstStageConfig, {"loop.steps": 9, "corpus.size": 32, "crop": 8})
    assert (other.loop.steps, other.loop.out, other.corpus.size, other.crop) == (9, "runs/a", 32, 8)
    assert read_config(
        written(tmp_path, "loop:\n"), ClipConfig, {"loop.out": "b", "first_stage": "a"}
    ).loop == LoopConfig("b")


WRONG = {
    "lop: {out: a}": (r"unknown field of .*run.yaml 'lop'; did you mean 'loop'\?",),
    "loop: {out: a, step: 3}": (r"unknown field of .*run.yaml, loop 'step'; did you mean 'steps'\?",),
    "loop: {out: a}\nvae: {scale_factor: 1}": (r"run.yaml, vae 'scale_factor'; did you mean 'scaling_factor'\?",),
    "loop: {out: a, steps: many}": (r"loop.steps = 'many'", "integer"),
    "loop: {out: 3}": (r"loop.out = 3", "string"),
    "loop: {out: a, learning_rate: [1]}": (r"loop.learning_rate = \[1\]", "number"),
    "loop: {out: a}\nvae: {block_out_channels: [a]}": (r"vae.block_out_channels.0 = 'a'", "integer"),
    "loop: {out: a}\ncorpus: 3": (r"corpus = 3",),
    "loop: {steps: 3}": (r"run.yaml: loop.out: ", "required"),
    "crop: 8": (r"run.yaml: loop: ", "required"),
    "loop: {out: a, steps: 0}": (r"run.yaml: loop: .*steps is 0; it must be at least 1",),
    "loop: {out: a, batch_size: -1}": (r"batch_size is -1; it must be at least 1",),
    "loop: {out: a, log_every: 0}": (r"log_every is 0",),
    "loop: {out: a, max_grad_norm: -1}": (r"max_grad_norm is -1.0; it must be at least 0",),
    "loop: {out: a, ema_decay: 1}": (r"ema_decay is 1.0; it must be below 1",),
    "loop: {out: a, lr_scheduler: cosin}": (r"unknown lr_scheduler 'cosin'; did you mean 'cosine'",),
    "loop: {out: a, mixed_precision: bf61}": (r"unknown mixed_precision 'bf61'; did you mean 'bf16'",),
    "loop: {out: a, report_to: wandb}": (r"unknown report_to 'wandb'; .*tensorboard",),
    "- loop": (r"run.yaml holds list, not fields",),
    "": (r"run.yaml holds NoneType, not fields",),
    "loop: {out: a": (r"run.yaml cannot be read as a YAML file",),
    "loop: !!python/object/apply:os.system [ls]": (r"run.yaml cannot be read as a YAML file",),
}


@pytest.mark.parametrize("text", WRONG)
def test_configurations_refuse(tmp_path: Path, text: str) -> None:
    for said in WRONG[text]:
        with pytest.raises(UsageError, match=said):
            read_config(written(tmp_path, text), FirstStageConfig)


def test_overrides_refuse(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"cannot be read as a YAML file"):
        read_config(tmp_path / "none.yaml", ClipConfig)
    path = written(tmp_path, "loop: {out: a}\ncrop: 8")
    with pytest.raises(UsageError, match=r"unknown field .*'stepz'; did you mean 'steps'"):
        read_config(path, FirstStageConfig, {"loop.stepz": 1})
    with pytest.raises(UsageError, match=r"crop is 8, which has no field 'x'"):
        read_config(path, FirstStageConfig, {"crop.x": 1})
    with pytest.raises(UsageError, match=r"loop.steps = 'x'"):
        read_config(path, FirstStageConfig, {"loop.steps": "x"})


KINDS: dict[str, type[Any]] = {
    file: getattr(import_module(f"ldm.training.{file}"), kind) for file, kind, _ in COMMANDS.values()
}


@pytest.mark.parametrize(
    "path", sorted((ROOT / "configs").glob("*/*.yaml")), ids=lambda path: f"{path.parent.name}/{path.name}"
)
def test_the_configurations_here_are_read(path: Path) -> None:
    if path.parent.name == "lora":
        assert read_config(path, LoRAConfig).output_name in ("", path.stem)
    else:
        assert read_config(path, KINDS[path.stem.removesuffix("_2")]).loop.steps > 1


def test_names_of_a_run_are_those_that_there_are() -> None:
    assert (*OPTIMIZERS,) == NAMED["optimizer"] and (*RATES,) == NAMED["lr_scheduler"]


def test_a_part_of_the_autoencoder_leaves_the_rest_small(tmp_path: Path) -> None:
    vae = read_config(written(tmp_path, "loop: {out: a}\nvae: {latent_channels: 8}"), FirstStageConfig).vae
    assert vae == dataclasses.replace(SmallVAEConfig(), latent_channels=8) and vae.block_out_channels == (16, 32, 64)


def test_the_experiments_are_read() -> None:
    """Every stage of every row, as bench/recipes.py makes them of the plan."""
    script = runpy.run_path(str(ROOT / "bench" / "recipes.py"))
    plan = yaml.safe_load((ROOT / "configs" / "experiments.yaml").read_text("utf-8"))
    rows = list(script["runs"](plan))
    for row, seed, stages, judged in rows:
        Drawing(**judged.get("drawing", {}))
        for name, fields in stages.items():
            before = {"first_stage": (), "clip": ("first_stage",), "denoiser": ("first_stage", "clip")}[name]
            folders = dict.fromkeys(before, "a")
            config = checked(script["changed"](fields, {"loop.out": "c"} | folders), KINDS[name], f"{row}, {name}")
            assert config.loop.seed == seed and config.corpus.objects == plan["corpus"]["objects"]
    assert len(rows) == len(plan["seeds"]) * (1 + len(plan["rows"]))


def test_stages_ask_for_what_they_need(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"no trained CLIPTextModel in .*clip.*train it first"):
        denoiser(denoiser_config(tmp_path / "run", tmp_path))
    with pytest.raises(UsageError, match=r"no trained AutoencoderKL in .*first_stage.*train it first"):
        clip(clip_config(tmp_path / "run", tmp_path))
    with pytest.raises(UsageError, match=r"latents is 3; it must be at least loop.batch_size, 4"):
        denoiser(denoiser_config(tmp_path / "run", tmp_path, latents=3))
    with pytest.raises(UsageError, match="device is 'tpu'; use auto, cpu or cuda"):
        trained(tmp_path, Toy(), device="tpu")
    with pytest.raises(UsageError, match="crop is 20; it must be from 1 to 16, the side of a picture"):
        first_stage(first_stage_config(tmp_path, crop=20))
    (tmp_path / "others").mkdir()
    (tmp_path / "others" / "letter.txt").touch()
    with pytest.raises(UsageError, match="others is a folder with other things in it"):
        denoiser(denoiser_config(tmp_path / "run", tmp_path, weights=str(tmp_path / "others")))
