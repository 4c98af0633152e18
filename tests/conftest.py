"""What all tests share: offline, two threads at most, a fixed seed before each test, and skips that say why."""

import os
import random
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before huggingface_hub is imported; `network` tests are run with 0
os.environ.setdefault("MPLBACKEND", "Agg")

import numpy as np
import pytest
import torch


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


@pytest.fixture(autouse=True)
def fixed_seed() -> None:
    """The global generators begin every test at the same place, in whatever order the tests run."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def noto_font() -> Path:
    """The Noto Color Emoji font file, as training finds it. Tests that ask for it are skipped where it is absent."""
    from ldm.data.emoji import find_font
    from ldm.errors import LdmError

    try:
        return find_font()
    except LdmError as error:  # its sentence says `apt-get install fonts-noto-color-emoji`
        pytest.skip(str(error))
