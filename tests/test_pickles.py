"""Pickled checkpoints become safetensors, number for number, in a process of their own; programs do not run."""

import argparse
import io
import os
import pathlib
import pickle
import subprocess
import sys
import tempfile
import textwrap
import types
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from ldm.checkpoints import pickles
from ldm.checkpoints.pickles import as_safetensors, refuse_pickle
from ldm.checkpoints.safe import atomic_save_safetensors
from ldm.errors import LdmError, ModelError


@pytest.fixture(autouse=True)
def temporary(tmp_path, monkeypatch) -> Path:
    """A folder for temporary files of its own, which every test must leave empty."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setenv("TMPDIR", str(folder))
    monkeypatch.setattr(tempfile, "tempdir", None)
    yield folder
    assert list(folder.iterdir()) == []


@pytest.fixture
def in_process(monkeypatch) -> None:
    """The child's work done here, for tests of what it makes of a file; importing torch again takes seconds."""

    def convert(path: Path, target: Path, names: list[str]) -> None:
        try:
            atomic_save_safetensors(pickles._extract(str(path), names), target)
        except LdmError as error:
            raise ModelError(f"{path} {error}") from error

    monkeypatch.setattr(pickles, "_convert", convert)


def converted(path: Path) -> dict[str, torch.Tensor]:
    with as_safetensors(path) as file:
        assert file != path and file.is_file()
        tensors = load_file(file)
    assert not file.exists()
    return tensors


def saved(path: Path, value: object, **options: object) -> Path:
    torch.save(value, path, **options)
    return path


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    same = all(torch.equal(a[name], b[name]) and a[name].dtype == b[name].dtype for name in a if name in b)
    return a.keys() == b.keys() and same


WEIGHTS = {
    "weight": nn.Parameter(torch.randn(5, 3)),
    "half": torch.randn(4).half(),
    "bf16": torch.randn(2, 2).to(torch.bfloat16),
    "whole": torch.arange(4),
    "scalar": torch.tensor(2.5),
    "empty": torch.empty(0, 3),
    "turned": torch.randn(4, 6).T,
    "part": torch.randn(10)[3:7],
}


def test_weights_come_out_of_the_child_as_they_went_in(tmp_path) -> None:
    path = saved(tmp_path / "model.ckpt", {"state_dict": WEIGHTS, "epoch": 3})
    assert equal(converted(path), WEIGHTS)


@pytest.mark.parametrize("form", [True, False])
def test_both_forms_of_files_are_read(tmp_path, in_process, form: bool) -> None:
    """Zip archives, and torch's form before 1.6; optimizer and counters beside the state_dict are passed over."""
    tied = WEIGHTS | {"again": WEIGHTS["weight"]}
    whole = {"state_dict": tied, "epoch": 3, "optimizer_states": [{"exp": torch.ones(3)}], "note": "x", "ema": WEIGHTS}
    path = saved(tmp_path / "model.ckpt", whole, _use_new_zipfile_serialization=form)
    before = path.read_bytes()
    assert equal(converted(path), tied)
    assert path.read_bytes() == before


def test_tables_in_tables_and_what_tools_leave_beside_weights(tmp_path, in_process, monkeypatch) -> None:
    """Lightning's callbacks, omegaconf's nodes, numpy's numbers, argparse's options: stood in for, never imported."""

    class Foreign:
        def __init__(self) -> None:
            self.state = {"a": [1, 2]}

    for name in ("omegaconf", "omegaconf.dictconfig", "pytorch_lightning", "pytorch_lightning.callbacks"):
        module = types.ModuleType(name)
        module.__path__ = []
        monkeypatch.setitem(sys.modules, name, module)
        module.Foreign = type("Foreign", (Foreign,), {"__module__": name, "__qualname__": "Foreign"})
    config = sys.modules["omegaconf.dictconfig"].Foreign()
    callback = sys.modules["pytorch_lightning.callbacks"].Foreign
    value = {
        "net": {"inner": {"w": torch.ones(2)}, "list": [torch.ones(1)], 7: torch.ones(1)},
        "b": torch.zeros(1),
        "hyper_parameters": config,
        "callbacks": {callback: {"best": np.float64(0.5), "scores": np.arange(3.0)}},
        "args": argparse.Namespace(lr=1e-4, out=pathlib.PurePosixPath("/x")),
        "kinds": [dict, int, np.dtype("float32")],
        "code": bytearray(b"abc"),
    }
    expected = {"net.inner.w": torch.ones(2), "b": torch.zeros(1)}
    assert equal(converted(saved(tmp_path / "model.pt", value)), expected)


@pytest.mark.parametrize("box", [dict, nn.ParameterDict])
def test_embeddings_of_a1111(tmp_path, in_process, box: type) -> None:
    vectors = torch.randn(2, 8)
    value = {
        "string_to_token": {"*": torch.tensor(265)},
        "string_to_param": box({"*": nn.Parameter(vectors)}),
        "step": 5,
    }
    assert equal(converted(saved(tmp_path / "word.pt", value)), {"*": vectors})


def test_safetensors_under_another_name_is_handed_out_itself(tmp_path) -> None:
    path = tmp_path / "model.ckpt"
    save_file({"w": torch.ones(2)}, path)
    with as_safetensors(str(path)) as file:
        assert file == path
    assert path.exists()


def zipped(path: Path, program: bytes) -> Path:
    """A checkpoint in torch's zip form around any pickle."""
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in (("data.pkl", program), ("byteorder", b"little"), ("version", b"3\n")):
            archive.writestr(f"archive/{name}", content)
    return path


def called(name: str, *arguments: object) -> bytes:
    """The pickle (protocol 2) of {"w": name(*arguments)}."""
    module, _, function = name.rpartition(".")
    inner = pickle.dumps(arguments, 2)[2:-1]
    return b"\x80\x02}X\x01\x00\x00\x00wc" + f"{module}\n{function}\n".encode() + inner + b"Rs."


def test_more_than_tensors_is_refused(tmp_path, in_process, monkeypatch) -> None:
    """What the first look lets pass: torch's own functions, numbers that are not there, other kinds of tensors."""
    monkeypatch.setattr(pickles, "MAX_TENSORS", 8)
    w = torch.ones(1)
    cases = {
        "giant": (saved(tmp_path / "a.pt", {"w": w.expand(10**12)}), r"'w' of 4,000,000,000,000 bytes with 4 in it"),
        "complex": (saved(tmp_path / "c.pt", {"w": w.to(torch.complex64)}), "complex64"),
        "sparse": (saved(tmp_path / "d.pt", {"w": torch.eye(3).to_sparse()}), "sparse"),
        "nothing": (saved(tmp_path / "e.pt", {"epoch": 1, "w": [w]}), "holds no tensors"),
        "function": (zipped(tmp_path / "f.pt", called("torch.hub.load", "a/b", "c")), "asks for 'torch.hub.load'"),
        "short": (zipped(tmp_path / "h.pt", b"\x80\x02}X\x01\x00\x00\x00wR."), "plain tensors"),
        "many": (saved(tmp_path / "k.pt", {str(i): w for i in range(12)}), "more than 8 tensors"),
        "twice": (saved(tmp_path / "l.pt", {"a.b": w, "a": {"b": w}}), "two of one name"),
        "meta": (saved(tmp_path / "i.pt", {"w": torch.ones(3, device="meta")}), "has 'w'|meta"),
        "name": (saved(tmp_path / "j.pt", {"w\x1b[31m": w}), r"j.pt, converted, is damaged: tensor name 'w\\x1b"),
    }
    for path, said in cases.values():
        with pytest.raises(ModelError, match=said) as caught:
            converted(path)
        text = str(caught.value)
        assert str(path) in text and "\x1b" not in text and "weights_only" not in text and len(text.splitlines()) == 1


@pytest.mark.parametrize(
    ("name", "arguments", "said"),
    [
        ("builtins.exec", ("open('{}', 'w')",), "asks for"),
        pytest.param("posix.system", ("touch {}",), "asks for", marks=pytest.mark.slow),
        pytest.param("os.system", ("touch {}",), "asks for", marks=pytest.mark.slow),
        pytest.param("pathlib.Path.touch", ("{}",), "asks for", marks=pytest.mark.slow),
    ],
)
def test_the_walls_do_not_lean_on_the_first_look(tmp_path, monkeypatch, name, arguments, said) -> None:
    """With nothing looked at before, the child still runs none of it."""
    canary = tmp_path / "canary"
    monkeypatch.setattr(pickles, "_look", lambda path: ["builtins.exec", "torch.hub.load"])
    with pytest.raises(ModelError, match=said):
        converted(zipped(tmp_path / "model.pt", called(name, *[str(part).format(canary) for part in arguments])))
    assert not canary.exists()


def test_a_child_has_no_way_out() -> None:
    """Once fenced, a process has no network, no other processes, no ordinary unpickler, and little memory."""
    script = """
        import builtins, os, pickle, socket, subprocess, sys
        from ldm.checkpoints.pickles import _fence
        _fence(0)
        ways = (lambda: socket.socket(), lambda: socket.getaddrinfo("x", 1), lambda: os.system("true"), os.fork,
                lambda: subprocess.run(["true"]), lambda: os.execv("/bin/true", ["true"]),
                lambda: pickle.loads(b"cbuiltins\\nprint\\n."), lambda: bytearray(10**11),
                lambda: open(sys.argv[1], "wb").write(bytes(2**28)))
        for way in ways:
            try:
                way()
                print("OPEN", end=" ")
            except (PermissionError, MemoryError, OSError) as error:
                print(type(error).__name__, end=" ")
    """
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run(
            [sys.executable, "-c", textwrap.dedent(script), f"{folder}/large"],
            capture_output=True,
            text=True,
            check=True,
            timeout=120,
        )
    assert done.stdout.split() == ["PermissionError"] * 7 + ["MemoryError", "OSError"]


def test_the_converter_ends_by_a_signal_or_late(tmp_path, monkeypatch) -> None:
    path = saved(tmp_path / "model.pt", {"w": torch.ones(1)})
    monkeypatch.setattr(pickles, "CHILD", "import os, signal; os.kill(os.getpid(), signal.SIGSEGV)")
    with pytest.raises(ModelError, match=r"model.pt could not be converted, its process ended with signal 11"):
        converted(path)
    monkeypatch.setattr(pickles, "CHILD", "import time; time.sleep(60)")
    real = subprocess.run
    monkeypatch.setattr(subprocess, "run", lambda *a, **options: real(*a, **options | {"timeout": 0.2}))
    with pytest.raises(ModelError, match="took more than"):
        converted(path)


def test_no_room_is_said_before(tmp_path, monkeypatch) -> None:
    path = saved(tmp_path / "model.pt", {"w": torch.ones(1)})
    monkeypatch.setattr(pickles.shutil, "disk_usage", lambda _: types.SimpleNamespace(free=1000))
    with pytest.raises(LdmError, match="1,000 are free; set TMPDIR"):
        converted(path)


@pytest.mark.slow
def test_memory_is_bounded_in_the_child(tmp_path) -> None:
    with pytest.raises(ModelError, match=r"asks for more memory than weights of its size need; take safetensors"):
        converted(zipped(tmp_path / "model.pt", called("builtins.bytearray", 10**11)))


@pytest.mark.slow
def test_nothing_of_the_current_folder_or_the_secrets_reach_the_child(tmp_path, monkeypatch) -> None:
    """A torch.py beside the checkpoint is not imported; tokens of the environment are not handed on."""
    (tmp_path / "torch.py").write_text("raise SystemExit('imported')")
    saved(tmp_path / "model.pt", {"w": torch.ones(1)})
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    seen: list[dict[str, str]] = []
    real = subprocess.run

    def run(*arguments: object, **options: object) -> object:
        seen.append(options["env"])
        return real(*arguments, **options)

    monkeypatch.setattr(subprocess, "run", run)
    assert equal(converted(Path("model.pt")), {"w": torch.ones(1)})
    assert set(seen[0]) <= {*pickles.KEPT, "OMP_NUM_THREADS"}


def test_refusing_says_how_to_convert() -> None:
    assert "`ldm convert a.ckpt a.safetensors --allow-pickle`" in str(refuse_pickle("x/a.ckpt"))


def test_the_first_look_reads_real_checkpoints(tmp_path) -> None:
    """What torch writes in either form passes it, with the names that are in it."""
    for form in (True, False):
        buffer = io.BytesIO()
        torch.save(nn.Linear(2, 2).state_dict(), buffer, _use_new_zipfile_serialization=form)
        (tmp_path / "model.pt").write_bytes(buffer.getvalue())
        names = pickles._look(tmp_path / "model.pt")
        assert "torch._utils._rebuild_tensor_v2" in names and "torch.FloatStorage" in names
    assert os.listdir(tmp_path / "temporary") == []
