"""`ldm convert`: single file to folder and back without a changed bit, pickles to safetensors, whole or not at all."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import files, refused
from safetensors.torch import load_file, save_file
from singles import model_of, single_state, small_family, write
from torch import Tensor

from ldm.checkpoints.families import FAMILIES

State = dict[str, Tensor]
FAMILY_NAMES = ("sd1", "sd2", "sdxl")
HIDDEN = {f".{end}" for end in ("tmp", "old")}  # how what is half written is called


@pytest.fixture(scope="session")
def states() -> dict[str, State]:
    """Single files of narrow networks, by diffusers and transformers in the names of real files."""
    found = {}
    for name in FAMILY_NAMES:
        family = small_family(name)
        found[name] = single_state(name, model_of(family, 4))
    return found


@pytest.fixture(autouse=True)
def narrow(monkeypatch) -> None:
    """The families as they are, with narrow networks."""
    for name in FAMILY_NAMES:
        monkeypatch.setitem(FAMILIES, name, small_family(name))


@pytest.fixture
def convert(run):
    """`ldm convert`, which must succeed: its report, and nothing half written beside the result."""

    def command(*words: object) -> dict[str, Any]:
        done = run("convert", *words, "--json")
        assert done.code == 0, done.err
        assert done.err == "" and not [name for name in files(Path()) if Path(name).suffix in HIDDEN]
        report: dict[str, Any] = json.loads(done.out)
        return report

    return command


def weights(folder: Path) -> dict[str, State]:
    """Everything in the safetensors files of a model folder, by component."""
    found: dict[str, State] = {}
    for path in sorted(Path(folder).glob("*/*.safetensors")):
        found.setdefault(path.parent.name, {}).update(load_file(path))
    return found


def equal(a: State, b: State) -> bool:
    return a.keys() == b.keys() and all(a[key].dtype == b[key].dtype and torch.equal(a[key], b[key]) for key in a)


@pytest.mark.parametrize("name", ["sd1", pytest.param("sdxl", marks=pytest.mark.slow)])
def test_there_and_back(convert, states, name):
    """Single file -> folder -> single file -> folder: what drawing needs comes back to the bit, and diffusers names the
    folder's components as it does its own.
    """
    write(Path("in.safetensors"), states[name])
    report = convert("in.safetensors", "net")
    assert FAMILIES[name].title in report["was"] and "in one file" in report["was"]
    first = weights(Path("net"))
    assert report["tensors"] == sum(map(len, first.values())) and report["dtype"] == "float32"
    assert report["bytes"] == sum(path.stat().st_size for path in Path("net").glob("*/*.safetensors"))
    assert set(first) == FAMILIES[name].parts.keys()
    report = convert("net", "out.safetensors")
    assert "model folder of a StableDiffusion" in report["was"] and report["files"] == 1
    kept = load_file("out.safetensors")
    for key, value in kept.items():
        assert torch.equal(value.reshape(states[name][key].shape), states[name][key]), key
    assert report["tensors"] == len(kept)
    convert("out.safetensors", "again")
    again = weights(Path("again"))
    assert all(equal(first[part], again[part]) for part in first)
    passed = states[name].keys() - kept.keys()  # constants, and of SD2's text encoder the last layer
    assert all("model.diffusion_model" not in key and "first_stage_model" not in key for key in passed)


@pytest.mark.parametrize("target", ["out.safetensors", "net"])
def test_dtype(convert, states, target):
    write(Path("in.safetensors"), states["sd1"])
    report = convert("in.safetensors", target, "--dtype", "fp16")
    assert report["dtype"] == "float16"
    path = Path(target) if target != "net" else Path("net/unet/diffusion_pytorch_model.safetensors")
    key = "conv_in.weight" if target == "net" else "model.diffusion_model.input_blocks.0.0.weight"
    expected = states["sd1"]["model.diffusion_model.input_blocks.0.0.weight"].half()
    assert torch.equal(load_file(path)[key], expected)


def test_what_is_passed_over_is_told(convert, states, run):
    """EMA weights, constants: by number and first names. With --ema they are what is taken."""
    unet = {key: value for key, value in states["sd1"].items() if key.startswith("model.diffusion_model.")}
    averaged = {f"model_ema.{key.removeprefix('model.').replace('.', '')}": value + 1 for key, value in unet.items()}
    constants = {"alphas_cumprod": torch.ones(1000), "model_ema.decay": torch.ones(())}
    write(Path("in.safetensors"), states["sd1"] | averaged | constants)
    report = convert("in.safetensors", "plain.safetensors")
    assert any("passed over" in note and "keys" in note for note in report["notes"])
    assert set(load_file("plain.safetensors")) <= states["sd1"].keys()
    convert("in.safetensors", "ema.safetensors", "--ema")
    key = "model.diffusion_model.input_blocks.0.0.weight"
    assert torch.equal(load_file("ema.safetensors")[key], unet[key] + 1)
    done = run("convert", "in.safetensors", "net")
    assert done.code == 0 and "passed over" in done.out and done.out.startswith("was ")
    assert json.loads(Path("net/scheduler/scheduler_config.json").read_text())["prediction_type"] == "epsilon"


def test_prediction_type(convert, states, run):
    write(Path("in.safetensors"), states["sd2"])
    convert("in.safetensors", "epsilon", "--prediction-type", "epsilon")  # without it: v_prediction, and a note
    assert json.loads(Path("epsilon/scheduler/scheduler_config.json").read_text())["prediction_type"] == "epsilon"
    refused(run("convert", "in.safetensors", "x", "--prediction-type", "flow"), 2, "flow", "v_prediction")
    refused(run("convert", "epsilon", "x", "--prediction-type", "epsilon"), 2, "is a folder")
    refused(run("convert", "epsilon", "x", "--ema"), 2, "is a folder")


def test_pickled_model(convert, states, run):
    """Only when allowed; the same numbers; nothing of it is left in the temporary folder."""
    torch.save({"state_dict": states["sd1"], "global_step": 7, "epoch": "last"}, "in.ckpt")
    refused(run("convert", "in.ckpt", "out.safetensors"), 1, "in.ckpt", "--allow-pickle")
    assert not Path("out.safetensors").exists()
    report = convert("in.ckpt", "out.safetensors", "--allow-pickle")
    assert "pickled" in report["was"]
    kept = load_file("out.safetensors")
    assert len(kept) > 1000 and all(torch.equal(value, states["sd1"][key]) for key, value in kept.items())


PARTS: dict[str, State] = {  # no whole models
    "a LoRA": {"lora_unet_x.lora_down.weight": torch.randn(4, 8), "lora_unet_x.lora_up.weight": torch.randn(8, 4),
               "lora_unet_x.alpha": torch.tensor(4)},
    "an embedding": {"<cat-toy>": torch.randn(2, 768)},
}  # fmt: skip


@pytest.mark.usefixtures("pickles_here")
@pytest.mark.parametrize("kind", PARTS)
def test_pickled_part(convert, run, kind):
    """A LoRA or an embedding becomes safetensors, tensor by tensor; a folder of it there is none."""
    torch.save(PARTS[kind], "x.pt")
    report = convert("x.pt", "x.safetensors", "--allow-pickle")
    assert kind in report["was"] and report["tensors"] == len(PARTS[kind])
    assert equal(load_file("x.safetensors"), PARTS[kind])
    report = convert("x.safetensors", "half.safetensors", "--dtype", "fp16")
    for key, value in load_file("half.safetensors").items():
        assert torch.equal(value, PARTS[kind][key].half() if value.is_floating_point() else PARTS[kind][key])
    refused(run("convert", "x.safetensors", "net"), 1, kind, "no model folder")
    refused(run("convert", "x.safetensors", "y.safetensors"), 2, kind, "--dtype")
    refused(run("convert", "x.safetensors", "y.safetensors", "--ema"), 2, "--ema", kind)
    assert files(Path()) == ["half.safetensors", "x.pt", "x.safetensors"]


class Bomb:
    def __reduce__(self):
        return Path.touch, (Path("opened"),)


def test_hostile_pickle(run):
    torch.save({"state_dict": {"x": torch.ones(2)}, "bomb": Bomb()}, "x.ckpt")
    refused(run("convert", "x.ckpt", "x.safetensors", "--allow-pickle"), 1, "x.ckpt")
    assert files(Path()) == ["x.ckpt"]


def test_shards(convert, states, run):
    """A folder's files are held to the size asked for, and stock diffusers opens it with every number."""
    from diffusers import StableDiffusionPipeline

    write(Path("in.safetensors"), states["sd1"])
    convert("in.safetensors", "net", "--max-shard-size", "100KB")
    assert len(list(Path("net/unet").glob("*-of-*.safetensors"))) > 2
    pipe = StableDiffusionPipeline.from_pretrained("net", local_files_only=True)
    found = weights(Path("net"))
    assert equal(pipe.unet.state_dict(), found["unet"]) and equal(pipe.vae.state_dict(), found["vae"])
    expected = states["sd1"]["model.diffusion_model.input_blocks.0.0.weight"]
    assert torch.equal(found["unet"]["conv_in.weight"], expected)
    assert pipe.scheduler.config.prediction_type == "epsilon" and len(pipe.tokenizer) == 49408
    refused(run("convert", "in.safetensors", "other", "--max-shard-size", "much"), 2, "much")
    assert not Path("other").exists()


def test_nothing_is_lost_unasked(convert, states, run, model):
    """What is there stays as it was, whatever goes wrong; --overwrite replaces it and keeps what lies beside."""
    write(Path("in.safetensors"), states["sd1"])
    Path("taken.safetensors").write_bytes(b"mine")
    Path("notes").mkdir()
    Path("notes/a.txt").write_text("mine")
    net = Path(shutil.copytree(model, "net"))
    (net / "README.md").write_text("mine")
    before = {path: path.read_bytes() for path in sorted(Path().rglob("*")) if path.is_file()}
    for target in ("taken.safetensors", "net"):
        refused(run("convert", "in.safetensors", target), 2, f"{target} exists", "--overwrite")
    refused(run("convert", "in.safetensors", "in.safetensors", "--overwrite"), 2, "over itself")
    refused(run("convert", "net", "net", "--overwrite"), 2, "over itself")
    refused(run("convert", "in.safetensors", "notes", "--overwrite"), 2, "other things than a model")
    refused(run("convert", "in.safetensors", "notes/a.txt", "--overwrite"), 2, "is a file")
    refused(run("convert", "in.safetensors", "x.ckpt"), 2, "only safetensors")
    refused(run("convert", "in.safetensors", "in.safetensors/x.safetensors"), 1, "in.safetensors is not a folder")
    refused(run("convert", "gone", "x"), 1, "no gone")
    refused(run("convert", "notes", "x"), 1, "model_index.json")
    refused(run("convert", "taken.safetensors", "x"), 1, "taken.safetensors")
    refused(run("convert", "in.safetensors", "x", "--dtype", "int3"), 2, "int3", "fp16")
    huge = {
        key: value * 1e6 if key.endswith("input_blocks.0.0.weight") else value for key, value in states["sd1"].items()
    }
    write(Path("huge.safetensors"), huge)
    for target in ("taken.safetensors", "net"):
        refused(run("convert", "huge.safetensors", target, "--dtype", "fp16", "--overwrite"), 1, "not finite")
    Path("huge.safetensors").unlink()
    assert {path: path.read_bytes() for path in sorted(Path().rglob("*")) if path.is_file()} == before
    convert("in.safetensors", "net", "--overwrite")
    assert (net / "README.md").read_text() == "mine" and run("verify", "net").code == 0
    convert("in.safetensors", "deep/er/x.safetensors")
    convert("in.safetensors", "taken.safetensors", "--overwrite")


def test_model_of_no_family(run, model):
    """The small model of these tests is none that a single file can say; the folder form takes it."""
    refused(run("convert", model, "x.safetensors"), 1, "folder")
    assert files(Path()) == []
    done = run("convert", model, "net", "--dtype", "bf16")
    assert done.code == 0 and "bfloat16" in done.out
    save_file({"x": torch.ones(2)}, "x.safetensors")
    refused(run("convert", "x.safetensors", "net", "--overwrite"), 1, "x.safetensors is")


def test_stopped(run, states, monkeypatch):
    """Ctrl-C while it is written: exit code 130, one sentence, and nothing is left."""

    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("os.fsync", stop)
    write(Path("in.safetensors"), states["sd1"])
    for target in ("net", "out.safetensors"):
        done = run("convert", "in.safetensors", target)
        assert (done.code, done.out, done.err) == (130, "", "stopped: nothing was written\n")
    assert files(Path()) == ["in.safetensors"]


def test_eight_bits_are_converted_as_they_are(run, model, tmp_path):
    """float8: as some programs store the U-Net, which torch has no isfinite for."""
    run("convert", model, "small8")
    file = tmp_path / "small8/unet/diffusion_pytorch_model.safetensors"
    eight = {name: tensor.to(torch.float8_e4m3fn) for name, tensor in load_file(file).items()}
    save_file(eight, file, {"format": "pt"})
    done = run("convert", "small8", "out")
    assert done.code == 0, done.err
    written = load_file(tmp_path / "out/unet/diffusion_pytorch_model.safetensors")
    assert all(torch.equal(written[name].view(torch.uint8), eight[name].view(torch.uint8)) for name in eight)
