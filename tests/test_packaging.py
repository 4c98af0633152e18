"""What is handed out: the wheel holds the model, the types and the command; the versions agree; the recipe runs."""

import os
import re
import subprocess
import sys
import tomllib
import venv
import zipfile
import zlib
from email import message_from_string
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from PIL import Image

import ldm

ROOT = Path(__file__).parents[1]
PROMPT = "a taco on a red background"


@pytest.fixture(scope="session")
def wheel(tmp_path_factory) -> Path:
    """The wheel, built once with the backend that is installed: nothing is fetched."""
    out = tmp_path_factory.mktemp("wheel")
    build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(out)]
    done = subprocess.run(build, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    (built,) = out.glob("*.whl")
    return built


def checksums(folder: str) -> dict[str, int]:
    """Checksum of every file of a folder of the checkout, by the name it has in the wheel."""
    files = (path for path in (ROOT / folder).rglob("*") if path.is_file() and "__pycache__" not in path.parts)
    inside = folder if folder == "ldm" else f"ldm/{folder}"
    return {f"{inside}/{path.relative_to(ROOT / folder).as_posix()}": zlib.crc32(path.read_bytes()) for path in files}


def test_wheel_holds_package_model_and_configs(wheel):
    """Byte for byte the files of the checkout, and nothing else beside the metadata."""
    wanted = checksums("ldm") | checksums("weights") | checksums("configs")
    with zipfile.ZipFile(wheel) as archive:
        found = {info.filename: info.CRC for info in archive.infolist() if ".dist-info/" not in info.filename}
    assert found == wanted
    assert {"ldm/py.typed", "ldm/weights/model_index.json", "ldm/cli/__init__.py"} <= found.keys()
    assert any(name.endswith(".safetensors") for name in found)
    assert wheel.stat().st_size < 60e6


def test_wheel_metadata(wheel):
    """The names, the version, the command and the licences; what only training or tests need is in extras."""
    with zipfile.ZipFile(wheel) as archive:
        info = {Path(n).name: archive.read(n).decode() for n in archive.namelist() if ".dist-info/" in n}
    metadata = message_from_string(info["METADATA"])
    assert (metadata["Name"], metadata["Version"]) == ("ldm-toolkit", ldm.__version__)
    assert metadata["Requires-Python"] == ">=3.11"
    assert metadata["License-Expression"] == "Apache-2.0"
    assert {"LICENSE", "NOTICE"} <= info.keys()
    assert info["entry_points.txt"].split("\n", 1)[1].strip() == "ldm = ldm.cli:main"
    core = {r.name for r in map(Requirement, metadata.get_all("Requires-Dist")) if r.marker is None}
    assert "torch" in core
    assert not core & {"diffusers", "transformers", "accelerate", "matplotlib", "pytest"}


def test_every_requirement_has_a_tested_version():
    """constraints.txt pins all direct requirements, each inside the range of pyproject.toml, and torch first."""
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if line and line[0] != "#"]
    pins = {canonicalize_name(name): version for name, version in (line.split("==") for line in lines)}
    assert next(iter(pins)) == "torch"
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for text in [*project["dependencies"], *chain(*project["optional-dependencies"].values())]:
        wanted = Requirement(text)
        if wanted.name != project["name"]:
            assert wanted.specifier.contains(pins[canonicalize_name(wanted.name)]), text


def test_changelog_names_this_version():
    assert re.search(rf"^## \[{re.escape(ldm.__version__)}\]", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)


@pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy keyword:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:__array_wrap__ must accept context:DeprecationWarning")  # diffusers with numpy 2
def test_scheduler_recipe_of_contributing():
    """The example solver of CONTRIBUTING.md and its test against diffusers run as printed."""
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "CONTRIBUTING.md").read_text(), re.DOTALL)
    solver, test = (block for block in blocks if "dpmpp_2m_heun" in block)
    names: dict[str, Any] = {}
    exec(solver, names)
    exec(test, names)
    names["test_dpmpp_2m_heun_equals_diffusers"]()


def environment(folder: Path) -> Path:
    """A new environment with the packages of this one in reach, but not its own ldm -> its bin folder."""
    venv.create(folder, with_pip=False)
    (site,) = folder.glob("lib/python*/site-packages")
    # Only the folder is added, its own .pth files are not read: an editable ldm stays out of sight.
    (site / "reach.pth").write_text("\n".join(path for path in sys.path if path.endswith("-packages")))
    return folder / "bin"


@pytest.mark.slow
def test_installed_wheel_draws_outside_the_checkout(wheel, tmp_path):
    """Installed elsewhere, `ldm` draws with the model it brought, and the same picture as the checkout does."""
    tools = environment(tmp_path / "environment")
    pip = [sys.executable, "-m", "pip", "--python", str(tools / "python"), "install", "--no-index", "--no-deps"]
    subprocess.run([*pip, "--force-reinstall", str(wheel)], check=True, capture_output=True, timeout=120)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    clean = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}

    def run(*command: str | Path, cwd: Path) -> str:
        done = subprocess.run(command, cwd=cwd, env=clean, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        return done.stdout

    home = run(tools / "python", "-c", "import ldm; print(ldm.__file__)", cwd=elsewhere)
    assert Path(home.strip()).is_relative_to(tmp_path)
    order = ("generate", PROMPT, "--seed", "7", "--steps", "4", "-o")
    run(tools / "ldm", *order, "installed.png", cwd=elsewhere)
    run(sys.executable, "-m", "ldm", *order, elsewhere / "checkout.png", cwd=ROOT)
    drawn = [np.asarray(Image.open(elsewhere / name).convert("RGB")) for name in ("installed.png", "checkout.png")]
    assert drawn[0].std() > 1  # a picture, not one colour
    assert np.array_equal(*drawn)
