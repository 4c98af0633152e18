"""`ldm doctor`: is everything here that drawing and training need."""

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, NamedTuple

import typer

from ldm import __version__
from ldm.errors import LdmError

PACKAGES = {  # package -> what it is for; those marked * are needed to draw
    "torch": "*", "numpy": "*", "safetensors": "*", "tokenizers": "*", "pillow": "*", "typer": "*", "rich": "*",
    "huggingface_hub": "models of the hub", "pyyaml": "configurations", "pydantic": "training",
    "accelerate": "training", "matplotlib": "curves and plots", "transformers": "T5 and BERT, tests",
    "diffusers": "tests",
}  # fmt: skip
MIB = 2**20


class Finding(NamedTuple):
    """One line of the report. fault: something to mend."""

    name: str
    text: str
    fault: bool = False


def doctor(as_json: Annotated[bool, typer.Option("--json", help="the same as a JSON object")] = False) -> None:
    """Check this installation: versions, devices, memory, the font, and that the model in the box is whole.

    Exit code 1 when something that drawing needs is missing or damaged.
    """
    found = [finding for check in (software, machine, models) for finding in check()]
    if as_json:
        print(json.dumps([finding._asdict() for finding in found]))
    else:
        width = max(len(finding.name) for finding in found)
        for finding in found:
            print(f"{'FAULT' if finding.fault else 'ok':<5}  {finding.name:<{width}}  {finding.text}")
    raise typer.Exit(1 if any(finding.fault for finding in found) else 0)


def software() -> Iterator[Finding]:
    """Versions of Python, ldm and the packages beside it."""
    import platform
    from importlib.metadata import PackageNotFoundError, version

    yield Finding("ldm", __version__)
    yield Finding("python", platform.python_version(), sys.version_info < (3, 11))
    for name, purpose in PACKAGES.items():
        try:
            yield Finding(name, version(name))
        except PackageNotFoundError:
            needed = purpose == "*"
            yield Finding(name, "missing: pip install ldm-toolkit" if needed else f"not here ({purpose})", needed)


def machine() -> Iterator[Finding]:
    """Devices, memory and the emoji font."""
    import torch

    from ldm.data.glyphs import find_font
    from ldm.memory import available_bytes

    cores, threads = os.cpu_count() or 1, torch.get_num_threads()
    capability = torch.backends.cpu.get_cpu_capability()
    free = available_bytes(torch.device("cpu")) // MIB
    yield Finding("cpu", f"{cores} cores, {threads} threads in use, {capability}, {free:,} MiB free", free < 700)
    for i in range(torch.cuda.device_count()):
        free, total = (value // MIB for value in torch.cuda.mem_get_info(i))
        yield Finding(f"cuda:{i}", f"{torch.cuda.get_device_name(i)}, {free:,} of {total:,} MiB free")
    if not torch.cuda.is_available():
        yield Finding("cuda", "no device that torch can use; drawing on the CPU")
    try:
        yield Finding("font", f"{find_font().name}, to train and to judge")
    except LdmError:
        yield Finding("font", "no Noto Color Emoji (needed to train and to judge, never to draw)")


def models() -> Iterator[Finding]:
    """The model in the box against its manifest, and where other models are kept."""
    from ldm.checkpoints.safe import check_manifest
    from ldm.sources import model_in_the_box

    try:
        folder = model_in_the_box()
        changed = check_manifest(folder)
    except LdmError as error:
        yield Finding("weights", str(error), True)
    else:
        size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) / 1e6
        worst = "; ".join(f"{name} is {what}" for name, what in changed.items())
        yield Finding("weights", worst or f"the model in the box is whole ({size:.0f} MB)", bool(changed))
    cache = Path(os.environ.get("HF_HOME") or Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")) / "huggingface")
    there = "there" if cache.expanduser().is_dir() else "not there yet"
    yield Finding("cache", f"of downloaded models: {there}")
