"""What the README says to type is typed, and does what it says."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text("utf-8")
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
COMMANDS = [
    shlex.split(line, comments=True) for kind, text in BLOCKS if kind == "sh" for line in text.splitlines() if line
]
HOURS = ("train",)  # its configs and options are tested on runs of their own


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Python in a process of its own, with one thread: the tests share the cores."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, timeout=120, env=environment, check=False
    )


def test_the_python_example_draws(tmp_path, monkeypatch):
    """The block runs as it stands, in an empty folder: four owls, then twelve steps of a taco."""
    monkeypatch.chdir(tmp_path)
    (example,) = [text for kind, text in BLOCKS if kind == "python"]
    done = run("-c", example)
    assert done.returncode == 0, done.stderr
    assert sorted(p.name for p in tmp_path.iterdir()) == [f"owl-{seed}.png" for seed in (10, 7, 8, 9)]
    for path in tmp_path.iterdir():
        with Image.open(path) as image:
            assert image.size == (64, 64)
    assert [line.split()[0] for line in done.stdout.splitlines()] == [str(i) for i in range(12)]


@pytest.mark.parametrize("command", [c for c in COMMANDS if c[0] == "ldm" and c[1] not in HOURS], ids=" ".join)
def test_the_commands_run(command, tmp_path, monkeypatch, request):
    if command[1] == "data":
        request.getfixturevalue("noto_font")
    monkeypatch.chdir(tmp_path)
    done = run("-m", *command)
    assert done.returncode == 0, done.stderr
    if "--help" not in command:
        assert any(p.suffix == ".png" for p in tmp_path.rglob("*"))


def test_every_command_and_target_is_real():
    """No `make` target is named that the Makefile lacks, and the commands are the ones the text is about."""
    targets = set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = {c[1] for c in COMMANDS if c[0] == "make"}
    assert {"demo", "test"} <= named <= targets
    for path in re.findall(r"\]\(([\w/.]+)\)", README):
        assert (ROOT / path).exists(), path
