"""The recipes of configs/: each file says how it is run and what came out, its stages fit together, `make weights` runs
them in order, and the smallest one makes a model that draws what it is told.
"""

import json
import math
import os
import re
import shlex
import shutil
import signal
import subprocess
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ldm.checkpoints.load import Bare
from ldm.cli.train import STAGES
from ldm.data.emoji import EmojiScenes
from ldm.data.glyphs import COLOURED_SHAPES, COLOURS
from ldm.evaluation.judging import Judge
from ldm.evaluation.reconstruction import psnr
from ldm.lora import LoRA
from ldm.models.classifier import SceneClassifier, SceneClassifierConfig
from ldm.models.clip import CLIPTextModel
from ldm.models.tiny_vae import AutoencoderTiny
from ldm.models.unet import UNet
from ldm.models.vae import AutoencoderKL
from ldm.pipeline import Pipeline
from ldm.training import loop
from ldm.training.config import read_config
from ldm.training.first_stage import held_out_images
from ldm.training.state import states
from ldm.training.tiny_decoder import shape_of

ROOT = Path(__file__).parents[1]
CONFIGS = ROOT / "configs"
TRAIN = import_module("ldm.cli.train")  # `ldm.cli.train` is the command there
ORDER = ("first-stage", "clip", "denoiser", "tiny-decoder", "distill", "classifier")
RECIPES = ("cpu", "flagship", "quick")
FILES = {(recipe, stage): CONFIGS / recipe / f"{STAGES[stage][0]}.yaml" for recipe in RECIPES for stage in ORDER}
OTHERS = [*(CONFIGS / "lora").glob("*.yaml"), CONFIGS / "experiments.yaml"]
MEGABYTES = 45  # that all of weights/ may have


def header(path: Path) -> list[str]:
    """The comment that a file begins with, without its signs."""
    lines = path.read_text("utf-8").splitlines()
    return [line[1:].strip() for line in lines[: next(i for i, line in enumerate(lines) if not line.startswith("#"))]]


@cache
def of(recipe: str, stage: str) -> Any:
    """A stage's configuration, read by its own class."""
    file, kind, _ = STAGES[stage]
    return read_config(FILES[recipe, stage], getattr(import_module(f"ldm.training.{file}"), kind))


# -- what the files say -----------------------------------------------------------------------------------------------


def test_every_file_is_one_of_these() -> None:
    """The recipes have all six stages; beside them are LoRAs and the experiments."""
    assert {*CONFIGS.rglob("*.yaml")} == {*FILES.values(), *OTHERS}


@pytest.mark.parametrize(("recipe", "stage"), FILES)
def test_a_file_begins_with_its_command(recipe: str, stage: str, run, monkeypatch) -> None:
    """The command's own parser takes it, and it trains this file's stage by this file; then duration and scores."""
    path, started = FILES[recipe, stage], list[tuple[Any, ...]]()
    monkeypatch.setattr(TRAIN, "run", lambda *given: started.append(given))
    first, *rest = header(path)
    words = shlex.split(first.split("   ")[0])
    assert words[0] == "ldm" and run(*words[1:]).code == 0
    assert started == [(stage, path.relative_to(ROOT), [], None)]
    said = " ".join(rest)
    assert re.search(r"Duration: (planned )?\d", said) and re.search(r"(Scores|Result)[^:]*: (none yet|.*\d)", said)


@pytest.mark.parametrize("recipe", RECIPES)
def test_the_stages_of_a_recipe_fit(recipe: str) -> None:
    """What a stage begins with is what another one writes, and the networks have each other's sizes."""
    vae, words, unet = (of(recipe, stage) for stage in ORDER[:3])
    assert all(of(recipe, stage).corpus == vae.corpus for stage in ORDER)
    assert (unet.first_stage, unet.clip) == (f"{vae.loop.out}/result", f"{words.loop.out}/result")
    assert words.first_stage == unet.first_stage
    tiny, distilled, seen = (of(recipe, stage) for stage in ORDER[3:])
    assert unet.weights and {tiny.weights, distilled.model, distilled.weights, seen.weights} == {unet.weights}
    assert tiny.first_stage == unet.first_stage
    outs = [of(recipe, stage).loop.out for stage in ORDER]
    assert len({*outs}) == len(outs)
    side = vae.corpus.size
    assert side == vae.vae.sample_size == words.vision.image_size
    assert unet.unet.sample_size * vae.vae.factor == side
    assert unet.unet.in_channels == unet.unet.out_channels == vae.vae.latent_channels
    assert unet.unet.cross_attention_dim == words.text.hidden_size and words.vocab_size == words.text.vocab_size


def test_the_other_files_name_their_command() -> None:
    """That they are read stands in test_training.py."""
    for path in OTHERS:
        told = f"{'ldm train-lora --config ' if path.parent.name == 'lora' else ''}configs/{path.relative_to(CONFIGS)}"
        assert any(told in line for line in header(path)[:2]), path


def test_the_flagship_is_as_large_as_it_may_be() -> None:
    """At least 800 objects of 128 x 128 pixels; in float16 all its networks, with a tenth of that for names and words,
    have at most 45 MB.
    """
    vae, words, unet, tiny, distilled, seen = (of("flagship", stage) for stage in ORDER)
    scenes = EmojiScenes(vae.corpus)
    assert len(scenes.names) >= 800 and vae.corpus.size == 128 and vae.vae.factor == 8
    labels = (*scenes.names, *COLOURED_SHAPES), tuple(COLOURS)
    shape = seen.block_out_channels, seen.features, seen.norm_num_groups
    with Bare():
        network = UNet(unet.unet)
        networks = {
            "unet": network,
            "vae": AutoencoderKL(vae.vae),
            "text encoder": CLIPTextModel(words.text),
            "LoRA": LoRA.for_model({"unet": network}, distilled.rank, distilled.lora_alpha, distilled.targets),
            "tiny": AutoencoderTiny(shape_of(tiny, vae.vae)),
            "classifier": SceneClassifier(SceneClassifierConfig(*labels, 4, vae.corpus.size, *shape)),
        }
    sizes = {name: sum(p.numel() for p in model.parameters()) / 1e6 for name, model in networks.items()}
    assert sizes["unet"] <= 20
    assert 2 * sum(sizes.values()) < MEGABYTES - 1, sizes
    assert f"has {2 * sum(sizes.values()):.1f} MB" in " ".join(header(FILES["flagship", "denoiser"]))
    for stage in ORDER:
        c = of("flagship", stage).loop
        assert c.mixed_precision == "bf16" and c.workers >= 8 and c.save_every <= c.steps / 4


# -- `make weights` ---------------------------------------------------------------------------------------------------


@pytest.fixture
def make(tmp_path: Path):
    """Runs make with an environment whose `ldm` writes down what it is told, and fails at the stage that $BAD names."""
    if shutil.which("make") is None:
        pytest.skip("no make on this machine: apt-get install make")
    bin_folder = tmp_path / "venv" / "bin"
    bin_folder.mkdir(parents=True)
    (tmp_path / "venv" / ".core").touch()
    (tmp_path / "venv" / ".train").touch()
    fake = bin_folder / "ldm"
    fake.write_text(f'#!/bin/sh\necho "$@" >> "{tmp_path}/told"\n[ "$2" != "$BAD" ] || exit 3\n')
    fake.chmod(0o755)

    def command(*words: str, bad: str = "") -> tuple[int, list[str], str]:
        (tmp_path / "told").write_text("")
        env = os.environ | {"BAD": bad}
        done = subprocess.run(
            ["make", f"VENV={tmp_path / 'venv'}", "weights", *words], cwd=ROOT, env=env, capture_output=True, text=True
        )
        return done.returncode, (tmp_path / "told").read_text().splitlines(), done.stderr

    return command


@pytest.mark.parametrize("recipe", RECIPES)
def test_make_weights_runs_the_stages_in_order(make, recipe: str) -> None:
    wanted = [f"train {stage} --config configs/{recipe}/{STAGES[stage][0]}.yaml" for stage in ORDER]
    assert make(f"RECIPE={recipe}")[:2] == (0, wanted)
    if recipe == "cpu":
        assert make()[:2] == (0, wanted)  # it is what stands for no RECIPE


def test_make_weights_stops_where_a_stage_does(make) -> None:
    code, told, error = make("RECIPE=quick", bad="clip")
    assert code == 2 and [line.split()[1] for line in told] == ["first-stage", "clip"]  # make's own code is 2
    assert "Error 3" in error
    code, told, error = make("RECIPE=qiuck")
    assert code == 2 and told == [] and "RECIPE=cpu, flagship or quick" in error


# -- the recipes run --------------------------------------------------------------------------------------------------

TOY: dict[str, dict[str, Any]] = {  # networks of the flagship's form, but of toy size, and a few steps
    "first-stage": {"crop": 64, "crops": 2, "vae.block_out_channels": [8, 8, 16, 16]},
    "clip": {"vocab_size": 600, "text.vocab_size": 600, "text.hidden_size": 32, "text.intermediate_size": 64,
             "vision.hidden_size": 32, "vision.intermediate_size": 64, "vision.projection_dim": 32},
    "denoiser": {"latents": 32, "unet.block_out_channels": [16, 32, 32], "unet.num_heads": [1, 2, 2],
                 "unet.cross_attention_dim": 32, "loop.ema_snapshots_every": 2, "num_inference_steps": 2},
    "tiny-decoder": {"width": 8, "encoder_width": 8},
    "distill": {"latents": 32, "rank": 2, "num_inference_steps": 2},
    "classifier": {"block_out_channels": [8, 16], "features": 16},
}  # fmt: skip
FEW = {"clip.TOKENIZER_CAPTIONS": 300, "clip.HELD_OUT_SCENES": 16, "denoiser.HELD_OUT_SCENES": 8,
       "first_stage.SCALE_SCENES": 64, "distill.HELD_OUT_SCENES": 8, "classifier.HELD_OUT_SCENES": 16,
       "tiny_decoder.HELD_OUT_SCENES": 16}  # fmt: skip
SHORT = {"loop.steps": 4, "loop.batch_size": 4, "loop.workers": 2, "loop.save_every": 2, "loop.sample_every": 4,
         "loop.log_every": 1}  # fmt: skip


def typed(recipe: str, stage: str, changes: dict[str, Any]) -> list[str]:
    """The command of a file of configs/, which lies in the working directory, with fields replaced."""
    settings = [word for key, value in changes.items() for word in ("--set", f"{key}={value}")]
    return ["train", stage, "--config", f"configs/{recipe}/{STAGES[stage][0]}.yaml", "--device", "cpu", *settings]


@pytest.mark.slow
@pytest.mark.usefixtures("noto_font", "one_thread")
def test_the_flagship_recipe_at_toy_size(run, tmp_path: Path, monkeypatch) -> None:
    """All six stages with bf16 and workers, each ended by SIGTERM half-way and gone on with; then the fast mode draws.

    Last run 2026-11-23: passed, 99 seconds beside other work.
    """
    (tmp_path / "configs").symlink_to(CONFIGS)
    save = loop.save_state
    for name, value in FEW.items():  # what a stage computes beside its steps
        monkeypatch.setattr(f"ldm.training.{name}", value)

    def save_and_end(*given: Any) -> Path:
        saved = save(*given)
        if saved.name == "state-2":  # the one after the signal is saved in peace
            os.kill(os.getpid(), signal.SIGTERM)
        return saved

    for stage in ORDER:
        command, folder = typed("flagship", stage, SHORT | TOY[stage]), Path(of("flagship", stage).loop.out)
        with monkeypatch.context() as patch:
            patch.setattr(loop, "save_state", save_and_end)
            assert run(*command).code == 143
        assert [path.name for path in states(folder)][-1] == "state-3" and not (folder / "result").exists()
        done = run(*command)
        assert done.code == 0 and "goes on from step 3 of 4" in done.err, (stage, done.err)
        rows = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
        assert [row["step"] for row in rows] == [1, 2, 3, 4] and all(math.isfinite(row["loss"]) for row in rows)
    pipeline = Pipeline.from_pretrained("runs/flagship/weights", fast=True)
    assert np.asarray(pipeline("an upside-down face on blue").images[0]).shape == (128, 128, 3)
    assert (tmp_path / "runs/flagship/weights/classifier/model.safetensors").is_file()


@pytest.mark.slow
@pytest.mark.usefixtures("noto_font")
def test_the_quick_recipe_draws_what_it_is_told(run, tmp_path: Path) -> None:
    """From nothing to a model whose held-out single objects and backgrounds are right far more often than by chance,
    which is one in ten of both; the first stage and the classifier are better than chance, too.

    Last run 2026-11-22: passed; 23 and 52 of 60, in the fast mode 26 and 47; 19.8 dB, by mean colours 16.4; 100 seconds
    on two cores of an AMD EPYC (Zen 5).
    """
    (tmp_path / "configs").symlink_to(CONFIGS)
    figures = {}
    for stage in ORDER:
        assert run(*typed("quick", stage, {})).code == 0, stage
        log = Path(of("quick", stage).loop.out) / "log.jsonl"
        figures[stage] = json.loads(log.read_text().splitlines()[-1])
    scenes = EmojiScenes(of("quick", "denoiser").corpus)
    plain = held_out_images(scenes, 64)
    bare = float(psnr(plain, plain.mean((2, 3), keepdim=True).expand_as(plain)).mean())  # of each picture's mean colour
    assert figures["first-stage"]["held_out_psnr"] > bare + 2
    assert figures["clip"]["held_out_retrieval"] > 0.2  # by chance less than 0.03
    assert figures["classifier"]["held_out_objects"] > 0.5  # by chance 0.1
    judge, specs = Judge(scenes), scenes.held_out_specs(60, 0, "single")
    assert len(scenes.names) == len(COLOURS) == 10 and judge.classes == ()
    for fast, single, ground in ((False, 18, 40), (True, 18, 36)):  # by chance about 6 of 60 each
        pipeline = Pipeline.from_pretrained("runs/quick/weights", device="cpu", fast=fast)
        drawn = pipeline([spec.caption() for spec in specs], seed=0).images
        verdicts = [judge.judge(np.asarray(image), spec) for image, spec in zip(drawn, specs, strict=True)]
        told = sum(all(verdict.objects) for verdict in verdicts), sum(verdict.background for verdict in verdicts)
        print("fast" if fast else "whole", *told)
        assert told[0] >= single and told[1] >= ground
