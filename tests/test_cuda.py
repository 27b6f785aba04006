"""Training and prediction on a GPU, where there is one."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from tests.helpers import FEW_STEPS, SETUP, TINY, FirstStep

from scperturbdiff import PerturbDiff

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from anndata import AnnData

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


def trained(screen: AnnData, **options: Any) -> PerturbDiff:
    adata = screen.copy()
    PerturbDiff.setup_anndata(adata, **SETUP)
    model = PerturbDiff(adata, **TINY)
    plan = FEW_STEPS["plan_kwargs"] | options.pop("plan_kwargs", {})
    model.train(**FEW_STEPS | {"accelerator": "cuda", "plan_kwargs": plan} | options)
    return model


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize("compiled", [False, True])
def test_both_stages_and_prediction(screen: AnnData, precision: str, compiled: bool) -> None:
    model = trained(screen, precision=precision, plan_kwargs={"compile": compiled})
    assert model.module.device.type == "cuda"
    model.module.generator_ema.network_weight.fill_(1)  # the network takes part
    one, two = (model.predict(perturbations=["P01"], n_cells=20, seed=0, progress=False) for _ in range(2))
    assert np.isfinite(one.obsm["X_perturbdiff"]).all() and one.layers["counts"].min() >= 0
    assert (one.layers["counts"] != two.layers["counts"]).nnz == 0


def test_cells_are_those_of_a_cpu_but_for_rounding_and_chance(screen: AnnData, tmp_path: Path) -> None:
    """Latent vectors are the same where no network draws; counts are drawn by other generators."""
    model = trained(screen)
    model.module.generator_ema.network_weight.fill_(0)
    there = model.predict(perturbations=["P01"], seed=0, progress=False)
    model.save(str(tmp_path / "model"))
    moved = PerturbDiff.load(str(tmp_path / "model"), adata=model.adata, accelerator="cpu")
    here = moved.predict(perturbations=["P01"], seed=0, progress=False)
    np.testing.assert_allclose(there.obsm["X_perturbdiff"], here.obsm["X_perturbdiff"], rtol=1e-3, atol=1e-3)
    shares = [np.asarray(cells.layers["counts"].sum(0)).ravel() for cells in (there, here)]
    assert np.corrcoef(*shares)[0, 1] > 0.98


def never_waiting(step: Callable[[], None]) -> None:
    """An error where a step makes the host wait for the device."""
    step()  # what is set up at first use may wait
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_step_does_not_wait(screen: AnnData) -> None:
    trained(screen, callbacks=[FirstStep(never_waiting)], validation_size=0.0)
