"""What the README says to type is typed, and does what it says."""

import json
import re
import shlex
from pathlib import Path

import pytest
from helpers import write_adapters
from PIL import Image
from singles import model_of, single_state, small_family, write

from ldm.checkpoints.families import FAMILIES
from ldm.checkpoints.safe import read_header
from ldm.checkpoints.single_file import open_single_file
from ldm.cli import main

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text("utf-8")
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
COMMANDS = [
    shlex.split(line, comments=True)
    for kind, text in BLOCKS
    if kind == "sh"
    for line in text.replace("\\\n", " ").splitlines()
    if line
]
HOURS = ("train",)  # its configs and options are tested on runs of their own
OWN = "model.safetensors"  # a file that the reader has


@pytest.mark.usefixtures("one_thread")
def test_the_python_example_draws(tmp_path, monkeypatch, capsys):
    """The block runs as it stands, in an empty folder: four owls, then twelve steps of a taco."""
    monkeypatch.chdir(tmp_path)
    (example,) = [text for kind, text in BLOCKS if kind == "python"]
    exec(compile(example, "README.md", "exec"), {})
    assert sorted(p.name for p in tmp_path.iterdir()) == [f"owl-{seed}.png" for seed in (10, 7, 8, 9)]
    for path in tmp_path.iterdir():
        with Image.open(path) as image:
            assert image.size == (64, 64)
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == [str(i) for i in range(12)]


@pytest.mark.usefixtures("noto_font", "quick")
def test_the_commands_run(run, model, tmp_path, monkeypatch):
    """One after the other in one folder, as a reader types them, with a small model for the one in the box, which the
    Python example draws with; every path that is printed is a file.
    """
    monkeypatch.setattr("ldm.sources.model_in_the_box", lambda: model)
    aside = {*HOURS, OWN, "--fast"}
    typed = [command for command in COMMANDS if command[0] == "ldm" and not aside & {*command}]
    assert len(typed) >= 8
    for command in typed:
        done = run(*command[1:])
        assert done.code == 0, (command, done.err)
        if command[1] in ("generate", "grid", "gallery", "data") and "--help" not in command:
            assert done.out and all(Path(line).is_file() for line in done.out.splitlines()), command
    assert {"owl.png", "owl.strip.png", "owl.gif", "gallery.html"} <= {path.name for path in tmp_path.iterdir()}


@pytest.mark.usefixtures("one_thread")
def test_the_model_in_the_box_is_fast(run, tmp_path, monkeypatch):
    """Six steps without guidance, and a tiny decoder in a place of its own."""
    monkeypatch.chdir(tmp_path)
    ((_, *words),) = [command for command in COMMANDS if "--fast" in command]
    done = run(*words)
    with Image.open(done.out.strip()) as image:
        assert image.size == (64, 64)
        request = json.loads(image.info["ldm"])["request"]
    assert (request["num_inference_steps"], request["guidance_scale"]) == (6, 1.0)


def test_the_commands_run_with_a_model_of_ones_own(tmp_path, monkeypatch):
    """With a narrow Stable Diffusion 1 under the name of the reader's file: a picture, and a folder in fp16."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(FAMILIES, "sd1", small_family("sd1"))
    write(tmp_path / OWN, single_state("sd1", model_of(FAMILIES["sd1"], 4)))
    write_adapters(open_single_file(tmp_path / OWN), tmp_path)
    typed = [command for command in COMMANDS if OWN in command]
    assert [command[1] for command in typed] == ["generate", "generate", "convert"]
    for _, *words in typed:
        with pytest.raises(SystemExit) as end:
            main([*words, *(["--size", "64", "--steps", "2"] if words[0] == "generate" else [])])
        assert not end.value.code, words
    with Image.open("lighthouse.png") as image:
        assert image.size == (64, 64) and "model" in image.info["ldm"]
    header = read_header(tmp_path / "model-folder/unet/diffusion_pytorch_model.safetensors")
    assert {str(entry.dtype) for entry in header.tensors.values()} == {"torch.float16"}


def test_every_command_and_target_is_real():
    """No `make` target is named that the Makefile lacks, and the commands are the ones the text is about."""
    targets = set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = {c[1] for c in COMMANDS if c[0] == "make"}
    assert {"demo", "test"} <= named <= targets
    for path in re.findall(r"\]\(([\w/.]+)\)", README):
        assert (ROOT / path).exists(), path
