"""What tests share: quiet libraries, one thread, a fixed seed, a screen and a model, the folder of real data."""

from __future__ import annotations

import logging
import os
from pathlib import Path

# before matplotlib is imported anywhere: tests run without a display
os.environ.setdefault("MPLBACKEND", "Agg")
# Before numpy is imported: tensors and matrices of tests are small, more threads only wait for each other. numba's
# OpenMP layer would set torch's number of threads, too.
os.environ.setdefault("NUMBA_NUM_THREADS", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
os.environ.setdefault("MKL_NUM_THREADS", "1")

from typing import TYPE_CHECKING

import pytest

# scvi-tools takes seconds to import: where others run the tests (pytest -n), this process does without, and they need
# not wait for it
from tests.fuzz import profiles
from tests.helpers import BRIEF, N_LATENT, SETUP

if TYPE_CHECKING:
    from anndata import AnnData

    from scperturbdiff import PerturbDiff

DATA_VARIABLE = "SCPERTURBDIFF_DATA"
SEED = 0
profiles.register()  # --hypothesis-profile takes their names


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("numprocesses", None):
        return
    import scvi
    import torch

    torch.set_num_threads(1)
    scvi.settings.verbosity = logging.ERROR
    for name in ("lightning", "lightning.pytorch", "lightning.fabric", "pytorch_lightning"):
        logging.getLogger(name).setLevel(logging.ERROR)


@pytest.fixture(autouse=True)
def seed() -> int:
    """Seed Python, NumPy and torch, and reset `scvi.settings.seed` to the same value, before every test."""
    import scvi

    scvi.settings.seed = SEED
    return SEED


@pytest.fixture(autouse=True, scope="session")
def logging_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Keep scvi-tools' logs and checkpoints out of the working directory."""
    import scvi

    folder = tmp_path_factory.mktemp("scvi_log")
    scvi.settings.logging_dir = folder
    return folder


@pytest.fixture(scope="session")
def screen() -> AnnData:
    """A small simulated screen: C1 to C3, P01 to P04 and a pair, D1 and D2. Tests that change it take a copy."""
    from scperturbdiff import datasets

    return datasets.simulate(
        n_contexts=3, n_perturbations=4, n_genes=100, n_cells_per_population=10, n_batches=2, combinations=1, seed=3
    )


@pytest.fixture(scope="session")
def trained_model(screen: AnnData) -> PerturbDiff:
    """A model of `screen`, hardly trained. Tests that change a model make their own."""
    import scvi

    from scperturbdiff import PerturbDiff

    scvi.settings.seed = SEED
    adata = screen.copy()
    PerturbDiff.setup_anndata(adata, **SETUP)
    model = PerturbDiff(adata, n_latent=N_LATENT)
    model.train(**BRIEF)
    return model


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
