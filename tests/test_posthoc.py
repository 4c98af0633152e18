"""Averages of any length after the run: profiles against closed forms, sums of snapshots against averages tracked
directly, and runs that were killed against those that were not.
"""

import os
import signal
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import Done
from numpy.typing import NDArray
from safetensors.torch import load_file
from test_training import SMALL, Pairs, Toy, clip_config, denoiser_config, first_stage_config, loop_config, nothing
from torch import nn

from ldm.checkpoints.safe import check_manifest
from ldm.errors import LdmError, ModelError, UsageError
from ldm.pipeline import Pipeline
from ldm.training.clip import clip
from ldm.training.config import LoopConfig
from ldm.training.denoiser import denoiser
from ldm.training.ema import EMA, WIDEST, gamma_of
from ldm.training.first_stage import first_stage
from ldm.training.loop import Progress, Stage, generator, run_stage, train
from ldm.training.posthoc import SNAPSHOTS, Profiles, averaged, overlap, shares, summands

pytestmark = pytest.mark.usefixtures("one_thread")
TRACKED = (0.05, 0.1)
Numbers = NDArray[np.float64]
Command = Callable[..., Done]


def profile(t: Numbers, gamma: float, end: float) -> Numbers:
    """(gamma + 1) t^gamma / T^(gamma + 1) up to T, then 0."""
    return np.where(t <= end, (gamma + 1) * (t / end) ** gamma / end, 0.0)


# -- profiles ----------------------------------------------------------------------------------------------------------


def test_gamma_is_as_published() -> None:
    """Karras et al. 2024: sigma_rel 0.05 and 0.10 are gamma 16.97 and 6.94. 1 and 3 by the closed form."""
    assert gamma_of(0.05) == pytest.approx(16.97, abs=0.005)
    assert gamma_of(0.10) == pytest.approx(6.94, abs=0.005)
    assert gamma_of((2 / (9 * 4)) ** 0.5) == pytest.approx(1)  # (gamma + 1) / ((gamma + 2)^2 (gamma + 3))
    assert gamma_of((4 / (25 * 6)) ** 0.5) == pytest.approx(3)


@pytest.mark.parametrize("sigma_rel", [0.02, 0.05, 0.1, 0.15, 0.2, 0.28])
def test_a_profile_has_its_standard_deviation(sigma_rel: float) -> None:
    """By summing it up over a run of 1,000,000 moments."""
    end = 1_000_000
    t = np.arange(end) + 0.5
    share = profile(t, gamma_of(sigma_rel), end)
    mean = float((share * t).sum())
    assert float(share.sum()) == pytest.approx(1, rel=1e-6)
    assert float((share * (t - mean) ** 2).sum()) ** 0.5 / end == pytest.approx(sigma_rel, rel=1e-4)


@pytest.mark.parametrize("sigma_rel", [0.0, -0.1, WIDEST, 0.5, float("nan")])
def test_lengths_that_no_profile_has_are_refused(sigma_rel: float) -> None:
    with pytest.raises(UsageError, match=r"sigma_rel is .*; it must be above 0 and below 0.2887, as 0.05 and 0.1 are"):
        gamma_of(sigma_rel)


@pytest.mark.parametrize(
    ("a", "b"), [((3, 2.0), (5, 7.0)), ((5, 7.0), (3, 2.0)), ((4, 16.97), (4, 6.94)), ((2, 0.5),) * 2]
)
def test_overlaps_are_integrals(a: tuple[float, float], b: tuple[float, float]) -> None:
    step = 1e-5
    t = np.arange(step / 2, 5, step)
    wanted = float((profile(t, a[1], a[0]) * profile(t, b[1], b[0])).sum() * step)
    assert float(overlap(*map(np.array, (*a, *b)))) == pytest.approx(wanted, rel=1e-4)


def test_what_is_tracked_has_the_profile(tmp_path: Path) -> None:
    """After update T the weights of update i have the share that the profile has from i - 1 to i, however many."""
    model = nn.Linear(1, 1, bias=False).double()
    weights = torch.randn(300, generator=torch.Generator().manual_seed(2), dtype=torch.float64).numpy()
    c = loop_config(tmp_path, steps=1000, ema_profiles=TRACKED, ema_snapshots_every=1000)
    profiles = Profiles(model, c)
    for steps, weight in enumerate(weights, 1):
        nn.init.constant_(model.weight, float(weight))
        profiles.after(steps)
        if steps in (1, 2, 10, 300):
            i = np.arange(steps + 1) / steps
            for sigma, average in zip(TRACKED, profiles.models, strict=True):
                share = np.diff(i ** (gamma_of(sigma) + 1))
                assert average.weight.item() == pytest.approx(float(share @ weights[:steps]), rel=1e-9)
    assert not (tmp_path / SNAPSHOTS).exists() and not any(p.requires_grad for p in profiles.models.parameters())


# -- sums of snapshots -------------------------------------------------------------------------------------------------


def many(n: int) -> tuple[list[float], list[float]]:
    """Times and powers of n snapshots of both averages."""
    return [float(i) for _ in TRACKED for i in range(1, n + 1)], [gamma_of(s) for s in TRACKED for _ in range(n)]


@pytest.mark.parametrize(("n", "error"), [(8, 0.08), (16, 0.024), (32, 0.0066), (64, 0.0018)])
def test_sums_have_the_wanted_profile(n: int, error: float) -> None:
    """The root mean square of what is missing, as a share: a quarter for twice as many snapshots. No sum of them is
    nearer, and numbers are not blown up.
    """
    times, gammas = many(n)
    t = np.linspace(0, n, 40_001)[1:]
    kept = np.stack([profile(t, gamma, end) for end, gamma in zip(times, gammas, strict=True)])
    rng = np.random.default_rng(0)
    for sigma in (0.05, 0.06, 0.08, 0.1, 0.15, 0.2):
        found = shares(times, gammas, n, gamma_of(sigma))
        assert found.sum() == pytest.approx(1) and np.abs(found).sum() < 2.1
        wanted = profile(t, gamma_of(sigma), n)
        missing = float(np.linalg.norm(found @ kept - wanted) / np.linalg.norm(wanted))
        assert missing < error
        for _ in range(3):
            other = found + 1e-2 * rng.standard_normal(len(found))
            assert np.linalg.norm(other @ kept - wanted) > missing * np.linalg.norm(wanted)


def test_an_average_that_was_tracked_is_its_own_snapshot() -> None:
    times, gammas = many(20)
    for i in (19, 39, 24):
        wanted = np.zeros(40)
        wanted[i] = 1
        assert np.allclose(shares(times, gammas, times[i], gammas[i]), wanted, atol=1e-6)


# -- runs --------------------------------------------------------------------------------------------------------------


OPTIONS: dict[str, Any] = {"steps": 240, "save_every": 60, "log_every": 60, "final_share": 1.0, "learning_rate": 0.05,
                           "ema_profiles": TRACKED, "ema_snapshots_every": 8}  # fmt: skip


class Noisy(Pairs):
    """Of the same sixteen batches, each time with other noise, so that the weights never come to rest."""

    def __getitem__(self, index: int) -> Any:
        x, y = super().__getitem__(index % 16)
        return x, y + torch.randn(y.shape, generator=generator(9, index))


def toy(out: Path, objective: nn.Module, **options: Any) -> Iterator[Progress]:
    c = loop_config(out, **OPTIONS | options)
    stage = Stage(objective, objective.model, Noisy(4), nothing, nothing, nothing)  # type: ignore[arg-type]
    yield from train(stage, c, {}, EMA(objective.model, 0.9))  # type: ignore[arg-type]


def snapshots(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted((folder / SNAPSHOTS).iterdir())}


@pytest.mark.parametrize("every", [1, 2])
def test_a_run_s_snapshots_make_any_average(tmp_path: Path, every: int) -> None:
    """30 of them, against averages of the weights after every step (or second step), taken in closed form."""
    objective = Toy()
    weights = [
        objective.model.weight.detach().clone()
        for progress in toy(tmp_path, objective, ema_every=every)
        if progress.step % every == 0
    ]
    seen = torch.stack(weights).double()[:, 0]
    kept = snapshots(tmp_path)
    assert list(kept) == [f"{i * 8 // every:07}.safetensors" for i in range(1, 31)]
    assert max(map(len, kept.values())) < 600  # numbers of two bytes
    i = torch.arange(len(seen) + 1, dtype=torch.float64) / len(seen)
    spread = float(seen[len(seen) // 2 :].std(0).max())
    for sigma in (0.05, 0.07, 0.1, 0.15):
        wanted = torch.diff(i ** (gamma_of(sigma) + 1)) @ seen
        made = averaged(Toy().model, summands(tmp_path, sigma))
        error = float((made.weight[0] - wanted).abs().max())  # type: ignore[operator]
        assert error < 0.02 * spread + 2 * 2**-11 * float(seen.abs().max())
        assert float((seen[-1] - wanted).abs().max()) > 10 * error  # it is not just anything
    assert not made.training and not any(p.requires_grad for p in made.parameters())


def test_a_run_that_was_killed_has_the_same_snapshots(tmp_path: Path) -> None:
    """Killed between a snapshot and the next state, twice, and gone on with; the averages are in the states."""
    options: dict[str, Any] = {"steps": 14, "save_every": 5, "ema_snapshots_every": 3}
    whole = Toy()
    for _ in toy(tmp_path / "whole", whole, **options):
        pass
    for moment in (4, 7):
        if (child := os.fork()) == 0:
            for progress in toy(tmp_path / "killed", Toy(), **options):
                if progress.step == moment:
                    os.kill(os.getpid(), signal.SIGKILL)
            os._exit(0)
        assert os.waitpid(child, 0)[1] == signal.SIGKILL
    assert [progress.step for progress in toy(tmp_path / "killed", Toy(), **options)] == [*range(6, 15)]
    kept = snapshots(tmp_path / "whole")
    assert list(kept) == [f"{t:07}.safetensors" for t in (3, 6, 9, 12, 14)]
    assert snapshots(tmp_path / "killed") == kept
    state, other = (load_file(tmp_path / name / "state-14" / "state.safetensors") for name in ("whole", "killed"))
    assert {key.split("/")[0] for key in state} >= {"objective", "ema", "profiles"}
    assert all(torch.equal(value, other[key]) for key, value in state.items())


def test_the_state_is_saved_after_the_snapshot(tmp_path: Path) -> None:
    """So that a run killed between the two takes the snapshot again."""
    times = {}
    for progress in toy(tmp_path, Toy(), steps=4, save_every=2, ema_snapshots_every=2, keep_states=3):
        if progress.saved is not None:
            snapshot = tmp_path / SNAPSHOTS / f"{progress.step:07}.safetensors"
            times[progress.step] = snapshot.stat().st_mtime_ns <= (progress.saved / "state.json").stat().st_mtime_ns
    assert times == {2: True, 4: True}


def test_a_run_that_begins_anew_forgets_another_s(tmp_path: Path) -> None:
    (tmp_path / SNAPSHOTS).mkdir()
    (tmp_path / SNAPSHOTS / "0000003.safetensors").write_bytes(b"of another run")
    for _ in toy(tmp_path, Toy(), steps=8, ema_snapshots_every=4):
        pass
    assert list(snapshots(tmp_path)) == ["0000004.safetensors", "0000008.safetensors"]


def test_without_profiles_a_run_is_as_before(tmp_path: Path) -> None:
    """No snapshots, and states with the same tensors; a state from before there were such fields is gone on from."""
    off: dict[str, Any] = {"steps": 6, "save_every": 3, "ema_profiles": (), "ema_snapshots_every": 0}
    c = loop_config(tmp_path, **OPTIONS | off)
    objective = Toy()
    stage = Stage(objective, objective.model, Pairs(4), nothing, nothing, nothing)
    for progress in train(stage, c, {"loop": {"steps": 6, "gone": 0}}, EMA(objective.model, 0.9)):
        if progress.step == 3:
            break
    assert not (tmp_path / SNAPSHOTS).exists()
    state = load_file(tmp_path / "state-3" / "state.safetensors")
    assert {key.split("/")[0] for key in state} == {"objective", "ema", "optimizer", "group"}
    newer = {"loop": {"steps": 6, "ema_profiles": [], "ema_snapshots_every": 0, "name": "", "switch": False}}
    with pytest.raises(LdmError, match=r"saved by a run with loop.ema_snapshots_every None, not 8; go on"):
        next(train(stage, c, {"loop": newer["loop"] | {"ema_snapshots_every": 8}}, EMA(objective.model, 0.9)))
    assert [progress.step for progress in train(stage, c, newer, EMA(objective.model, 0.9))] == [4, 5, 6]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"ema_profiles": (0.05, 0.4)}, "sigma_rel is 0.4"),
        ({"ema_profiles": (0.05,)}, "ema_snapshots_every is 0; with ema_profiles it must be a multiple of ema_every 1"),
        ({"ema_profiles": (0.05,), "ema_every": 4, "ema_snapshots_every": 6}, "is 6; .* a multiple of ema_every 4"),
    ],
)
def test_configurations_refuse(options: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        LoopConfig("out", **options)


def test_averages_refuse(tmp_path: Path) -> None:
    with pytest.raises(LdmError, match=r"holds no snapshots .* that has ema_profiles \(such as 0.05 and 0.1\)"):
        averaged(Toy().model, summands(tmp_path, 0.1))
    for _ in toy(tmp_path, Toy(), steps=8):
        pass
    with pytest.raises(UsageError, match=r"sigma_rel is 0.3"):
        averaged(Toy().model, summands(tmp_path, 0.3))
    with pytest.raises(ModelError, match=r"0000008.safetensors does not fit"):
        averaged(nn.Linear(4, 1), summands(tmp_path, 0.1))
    path = tmp_path / SNAPSHOTS / "0000008.safetensors"
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(ModelError, match=r"0000008.safetensors"):
        averaged(Toy().model, summands(tmp_path, 0.1))


# -- the command -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model_run(tmp_path_factory: pytest.TempPathFactory, noto_font: Path) -> Path:
    """The folders of three tiny runs that make a model, the first and the last with snapshots."""
    base = tmp_path_factory.mktemp("runs")
    kept = {"ema_profiles": TRACKED, "ema_snapshots_every": 2}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ldm.training.record.plot", lambda *_: None)
        for name, value in SMALL.items():
            patch.setattr(name, value)
        first = first_stage_config(base / "first_stage")
        whole = denoiser_config(base / "denoiser", base, weights=str(base / "box"))
        first, whole = (replace(one, loop=replace(one.loop, **kept)) for one in (first, whole))
        words = clip_config(base / "clip", base)
        for make, config in ((first_stage, first), (clip, words), (denoiser, whole)):
            for _ in run_stage(make(config), config):  # type: ignore[operator]
                pass
    return base


def test_the_command_writes_a_whole_model(
    run: Command, model_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a denoiser's run, moved elsewhere: a folder like its result, with weights between those that were averaged; it
    draws. The place that the run's own result went to, beside, is left alone.
    """
    for name, value in SMALL.items():
        monkeypatch.setattr(name, value)
    before = {path: path.stat().st_mtime_ns for path in (model_run / "box").rglob("*")}
    moved = tmp_path / "moved"
    (model_run / "denoiser").rename(moved)
    done = run("train", "ema", moved, "--sigma-rel", 0.08, "-o", "out")
    moved.rename(model_run / "denoiser")
    assert (done.code, done.out) == (0, f"{Path('out') / 'result'}\n"), done.err
    assert "denoiser, the average of sigma_rel 0.08: held-out loss " in done.err
    made, own = Path("out") / "result", model_run / "denoiser" / "result"
    assert {p.relative_to(made) for p in made.rglob("*")} == {p.relative_to(own) for p in own.rglob("*")}
    assert check_manifest(made) == {}
    assert {path: path.stat().st_mtime_ns for path in (model_run / "box").rglob("*")} == before
    network = Path("unet") / "diffusion_pytorch_model.safetensors"
    weights, ends = load_file(made / network), load_file(model_run / "denoiser" / SNAPSHOTS / "0000004.safetensors")
    other = load_file(own / network)
    assert any(not torch.equal(value, other[key]) for key, value in weights.items())
    low, high = (torch.cat([ends[f"{sigma}/{key}"].flatten() for key in weights]).float() for sigma in TRACKED)
    found = torch.cat([value.flatten() for value in weights.values()]).float()
    assert float((found - (low + high) / 2).norm()) < 2 * float((high - low).norm())
    assert len(Pipeline.from_pretrained(made, device="cpu")("a taco on a red background", seed=1).images) == 1


def test_the_command_knows_the_stage_of_a_run(run: Command, model_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in SMALL.items():
        monkeypatch.setattr(name, value)
    done = run("train", "ema", model_run / "first_stage", "--sigma-rel", 0.05, "-o", "out")
    assert done.code == 0 and "first-stage, the average of sigma_rel 0.05: held-out loss " in done.err
    snapshot = load_file(model_run / "first_stage" / SNAPSHOTS / "0000004.safetensors")
    made = load_file(Path("out") / "result" / "diffusion_pytorch_model.safetensors")
    assert all(torch.allclose(value, snapshot[f"0.05/{key}"].float(), rtol=0, atol=1e-4) for key, value in made.items())


def test_the_command_refuses(run: Command, model_run: Path, tmp_path: Path) -> None:
    (tmp_path / SNAPSHOTS).symlink_to(model_run / "first_stage" / SNAPSHOTS)
    cases = {
        (model_run / "clip", 0.05): (1, "holds no snapshots of averages"),
        (model_run / "first_stage", 0.7): (2, "sigma_rel is 0.7; it must be above 0 and below 0.2887"),
        (tmp_path / "nowhere", 0.05): (1, "holds no snapshots of averages"),
        (tmp_path, 0.05): (1, "holds no state of a run; give the folder of one, its `loop.out`"),
    }
    for (folder, sigma), (code, said) in cases.items():
        done = run("train", "ema", folder, "--sigma-rel", sigma, "-o", "out")
        assert done.code == code and said in " ".join(done.err.split()), done.err
