"""`ldm verify FOLDER`: its files against the manifest in it, as sha256sum would compare them."""

import json
import shutil
import subprocess
from pathlib import Path

import pytest
from helpers import Done, files, refused


@pytest.fixture
def net(model, tmp_path) -> Path:
    """A copy of the small model in the folder where commands run."""
    return Path(shutil.copytree(model, tmp_path / "net"))


def listed(folder: Path) -> list[str]:
    return [line[66:] for line in (folder / "manifest.sha256").read_text("utf-8").splitlines()]


def test_unchanged(run, net):
    count = len(listed(net))
    assert count == len([path for path in net.rglob("*") if path.is_file()]) - 1
    assert run("verify", "net") == Done(0, f"unchanged: {count} files\n", "")
    told = json.loads(run("verify", "net", "--json").out)
    assert told == {"path": "net", "equal": True, "files": count, "differences": {}}


def test_what_differs_is_named(run, net):
    """One bit of the weights, a file gone, one more, and a name with an escape in it: each by its name, exit code 1."""
    (weights,) = (net / "unet").glob("*.safetensors")
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    (net / "vae/config.json").unlink()
    (net / "red\x1b[31m.txt").write_text("x")
    done = run("verify", "net")
    lines = done.out.splitlines()
    assert done.code == 1 and done.err == ""
    assert lines[0] == f"different: 1 unlisted, 1 changed, 1 missing, of {len(listed(net))} files"
    assert set(lines[1:]) == {
        f"- changed: unet/{weights.name}", "- missing: vae/config.json", r"- unlisted: red\x1b[31m.txt",
    }  # fmt: skip
    done = run("verify", "net", "--json")
    told = json.loads(done.out)
    assert done.code == 1 and told["equal"] is False
    assert told["differences"] == {
        f"unet/{weights.name}": "changed", "vae/config.json": "missing", "red\x1b[31m.txt": "unlisted",
    }  # fmt: skip


def test_folder_without_manifest(run, tmp_path):
    """It says how to write one; what is written is what sha256sum reads; a second time it is not replaced."""
    folder = tmp_path / "any"
    (folder / "deep").mkdir(parents=True)
    (folder / "a.txt").write_text("a")
    (folder / "deep/b c.txt").write_text("b")
    refused(run("verify", "any"), 1, "no manifest.sha256", "ldm verify any --write")
    assert files(folder) == ["a.txt", "deep", "deep/b c.txt"]
    assert run("verify", "any", "--write") == Done(0, "written: any/manifest.sha256 of 2 files\n", "")
    subprocess.run(["sha256sum", "--check", "--strict", "manifest.sha256"], cwd=folder, check=True, capture_output=True)
    assert run("verify", "any").out == "unchanged: 2 files\n"
    (folder / "a.txt").write_text("other")
    before = (folder / "manifest.sha256").read_bytes()
    refused(run("verify", "any", "--write"), 2, "has a manifest.sha256", "remove it")
    assert (folder / "manifest.sha256").read_bytes() == before
    assert run("verify", "any").code == 1


def test_what_does_not_go_together(run, net):
    refused(run("verify", "net", "--model", net), 2, "--model", "for a picture")
    refused(run("verify", "net", "--dtype", "fp16"), 2, "for a picture")
    Path("a.png").write_bytes(b"")
    refused(run("verify", "a.png", "--write"), 2, "--write is for a folder")
    (net / "manifest.sha256").write_text("words\n")
    refused(run("verify", "net"), 1, "lines that are not", "write it again")
    (net / "manifest.sha256").write_bytes(b"\xff\xfe")
    refused(run("verify", "net"), 1, "manifest.sha256")
