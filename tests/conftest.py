"""What every test shares: quiet libraries, one thread, a fixed seed, the folder of real data."""

from __future__ import annotations

import logging
import os
from pathlib import Path

# before matplotlib is imported anywhere: tests run without a display
os.environ.setdefault("MPLBACKEND", "Agg")
# Before numpy is imported: tensors and matrices of tests are small, more threads only wait for each other. numba's
# OpenMP layer would set torch's number of threads, too.
for library in ("NUMBA", "OMP", "OPENBLAS", "MKL"):
    os.environ.setdefault(f"{library}_NUM_THREADS", "1")

import pytest
import scvi
import torch

DATA_VARIABLE = "SCPERTURBDIFF_DATA"
SEED = 0


def pytest_configure(config: pytest.Config) -> None:
    torch.set_num_threads(1)
    scvi.settings.verbosity = logging.ERROR
    for name in ("lightning", "lightning.pytorch", "lightning.fabric", "pytorch_lightning"):
        logging.getLogger(name).setLevel(logging.ERROR)


@pytest.fixture(autouse=True)
def seed() -> int:
    """Seed Python, NumPy and torch, and reset `scvi.settings.seed` to the same value, before every test."""
    scvi.settings.seed = SEED
    return SEED


@pytest.fixture(autouse=True, scope="session")
def logging_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Keep scvi-tools' logs and checkpoints out of the working directory."""
    folder = tmp_path_factory.mktemp("scvi_log")
    scvi.settings.logging_dir = folder
    return folder


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """The folder of real data sets; skips where the variable is not set, fails where it points to nothing."""
    named = os.environ.get(DATA_VARIABLE)
    if not named:
        pytest.skip(f"no real data: {DATA_VARIABLE} is not set to a folder")
    folder = Path(named).expanduser()
    if not folder.is_dir():
        pytest.fail(f"{DATA_VARIABLE}={named!r} is not a folder. Unset it to skip the tests on real data.")
    return folder
