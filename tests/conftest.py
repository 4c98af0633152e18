"""What all tests share: offline, two threads at most, a fixed seed before each test, skips that say why, the command in
this process, and a model small enough to draw in milliseconds.
"""

import gc
import json
import os
import random
import shutil
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before huggingface_hub is imported; `network` tests are run with 0
os.environ.setdefault("MPLBACKEND", "Agg")

import numpy as np
import pytest
import torch
from helpers import Done, copier, small_model, without_sockets

import ldm.checkpoints.folder
import ldm.cli
from ldm.checkpoints import pickles
from ldm.checkpoints.components import Components
from ldm.checkpoints.folder import open_folder
from ldm.checkpoints.single_file import MODELS, open_single_file
from ldm.cli import main
from ldm.errors import LdmError
from ldm.pipeline import Pipeline
from ldm.request import Request
from ldm.text.tokenizer import CLIPTokenizer


def pytest_configure() -> None:
    """One thread for each of several pytest-xdist processes, else at most two: the results must not hang on more."""
    torch.set_num_threads(1 if "PYTEST_XDIST_WORKER" in os.environ else min(2, os.cpu_count() or 1))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what is marked cuda where there is no GPU."""
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("cuda"):
            item.add_marker(pytest.mark.skip(reason="no CUDA device on this machine"))


def pytest_collection_finish() -> None:
    """What is loaded by now stays: the garbage collector need not look through it again and again."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def fixed_seed() -> None:
    """The global generators begin every test at the same place, in whatever order the tests run."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Networks as small as those of tests only lose time to a second one."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def no_sockets(monkeypatch) -> None:
    """No other machine can be reached."""
    without_sockets(monkeypatch)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """The system's chromium, worked by playwright; skipped where one of them is absent."""
    api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: pip install playwright")
    executable = shutil.which("chromium")
    if executable is None:
        pytest.skip("no chromium on this machine: apt-get install chromium")
    options = ["--no-sandbox"] if os.geteuid() == 0 else []  # chromium refuses root with its sandbox
    with api.sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=executable, args=options)
        yield opened
        opened.close()


@pytest.fixture(scope="session")
def noto_font() -> Path:
    """The Noto Color Emoji font file, as training finds it. Tests that ask for it are skipped where it is absent."""
    from ldm.data.glyphs import find_font
    from ldm.errors import LdmError

    try:
        return find_font()
    except LdmError as error:  # its sentence says `apt-get install fonts-noto-color-emoji`
        pytest.skip(str(error))


@pytest.fixture
def run(capsys, tmp_path, monkeypatch):
    """Runs a command in this process, in an empty folder."""
    monkeypatch.chdir(tmp_path)

    def command(*words: object) -> Done:
        capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            main([str(word) for word in words])
        out, err = capsys.readouterr()
        return Done(int(end.value.code or 0), out, err)

    return command


@pytest.fixture(scope="session")
def model(tmp_path_factory) -> Path:
    """A folder with a model of some thousand random weights that draws 16 x 16 pixels."""
    return small_model(tmp_path_factory.mktemp("models") / "small")


@pytest.fixture(scope="session", autouse=True)
def standard_tokenizers() -> Iterator[None]:
    """OpenAI's tokenizer is made once: it never changes, and costs as much as all else in a small model of SD1."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CLIPTokenizer, "standard", cache(CLIPTokenizer.standard))
        yield


@pytest.fixture(scope="session", autouse=True)
def one_command() -> Iterator[None]:
    """The command is put together once, as in a process of its own: it takes longer than most of what it does here."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("get_command", "tidied"):
            patch.setattr(f"ldm.cli.{name}", cache(getattr(ldm.cli, name)))
        yield


@pytest.fixture(scope="session", autouse=True)
def networks_built_once() -> Iterator[None]:
    """Where files are opened, a network of one configuration is built once, and copied in less than half the time: it
    has no numbers yet.
    """
    copiers: dict[str, Callable[[], Any]] = {}

    def once(build: Callable[..., Any]) -> Callable[..., Any]:
        def built(*described: object) -> Any:
            key = repr((build, described))
            if key not in copiers:
                copiers[key] = copier(build(*described))
            return copiers[key]()

        return built

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ldm.checkpoints.folder.build", once(ldm.checkpoints.folder.build))
        for config, network in MODELS.items():
            patch.setitem(MODELS, config, once(network))
        yield


@pytest.fixture(scope="session", autouse=True)
def disks_do_not_wait() -> Iterator[None]:
    """No test cuts the power: what the system has been given it has, written to the disk or not. Those that ask in what
    order files are synced count the calls.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("os.fsync", os.fstat)  # which refuses what is no file, too
        yield


@pytest.fixture(scope="session")
def opened() -> dict[tuple[object, ...], Callable[[], Components]]:
    """Copiers of the models that `quick` has opened."""
    return {}


@pytest.fixture
def quick(monkeypatch, opened) -> Iterator[None]:
    """What makes many runs of the command with small models quick: one thread, for more only wait for each other, and
    a model folder or file is opened once for as long as it stays as it is.
    """

    def once(opener: Callable[..., Components]) -> Callable[..., Components]:
        def open_once(path: str | Path, *options: object, **named: object) -> Components:
            place = Path(path)
            found = (place, Path(str(named["vae"]))) if named.get("vae") else (place,)
            parts = [file for one in found for file in (one.rglob("*") if one.is_dir() else [one]) if file.is_file()]
            files = sorted((str(file), file.stat().st_mtime_ns) for file in parts)
            key = (opener, place.resolve(), *files, *options, *sorted(named.items()))
            if key not in opened:
                opened[key] = copier(opener(path, *options, **named))
            return opened[key]()  # whoever opens it may change it

        return open_once

    monkeypatch.setattr("ldm.sources.open_folder", once(open_folder))
    monkeypatch.setattr("ldm.checkpoints.single_file.open_single_file", once(open_single_file))
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def asked(monkeypatch) -> list[Request]:
    """The requests that reach a model; each is then refused ("enough")."""
    requests: list[Request] = []

    class Recorder:
        @staticmethod
        def resolve(request: Request) -> None:
            requests.append(request)
            raise LdmError("enough")

    monkeypatch.setattr(Pipeline, "from_pretrained", lambda *_, **__: Recorder)
    return requests


@pytest.fixture
def pickles_here(monkeypatch) -> None:
    """Pickles are read in this process: one of their own, which test_pickles.py and test_hostile.py are about, is
    seconds in beginning.
    """

    def convert(path: Path, target: Path, names: list[str]) -> None:
        pickles.atomic_save_safetensors(pickles._extract(str(path), names), target)

    monkeypatch.setattr(pickles, "_convert", convert)


@pytest.fixture
def draw(run, model):
    """`ldm generate` with the small model, which must succeed."""

    def command(*words: object) -> Done:
        done: Done = run("generate", "--model", model, *words)
        assert done.code == 0, done.err
        return done

    return command


@pytest.fixture
def planned(draw):
    """The pictures that `ldm generate` would draw, as it tells them."""

    def command(*words: object) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = json.loads(draw(*words, "--dry-run", "--json").out)["pictures"]
        return found

    return command
