"""What scvi-tools offers around a model: seeds, resuming, hub, autotune."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import pytest
import scvi
import torch
from anndata import AnnData
from lightning.pytorch.callbacks import ModelCheckpoint
from scipy import sparse
from tests import helpers

import scperturbdiff as spd

if TYPE_CHECKING:
    from pathlib import Path

TINY = helpers.TINY | {"dropout": 0.1}
FEW_STEPS = helpers.FEW_STEPS | {
    "max_epochs_generator": 4,
    "plan_kwargs": {"steps_per_epoch": 3, "n_populations": 4, "n_cells": 8},
}


@pytest.fixture
def cells() -> AnnData:
    rng = np.random.default_rng(4)
    rows = [(p, c, d) for p in ("control", "A", "B") for c in ("T", "NK") for d in ("d0", "d1") for _ in range(6)]
    obs = pd.DataFrame(rows, columns=["perturbation", "cell_type", "donor"])
    obs.index = [f"cell{i}" for i in range(len(obs))]
    counts = sparse.csr_matrix(rng.poisson(3, (len(obs), 15)).astype(np.float32))
    adata = AnnData(counts, obs=obs, var=pd.DataFrame(index=[f"g{i}" for i in range(15)]))
    spd.PerturbDiff.setup_anndata(adata, "perturbation", "control", context_keys=["cell_type"], batch_key="donor")
    return adata


def assert_same_state(first: spd.PerturbDiff, second: spd.PerturbDiff) -> None:
    ours, theirs = first.module.state_dict(), second.module.state_dict()
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(value, theirs[name]), name
    a, b = first.module.retrieval, second.module.retrieval
    assert a.widths == b.widths
    np.testing.assert_array_equal(a.responses.shift, b.responses.shift)


def test_settings_seed_makes_training_repeatable(cells: AnnData) -> None:
    models = []
    for seed in (7, 7, 8):
        scvi.settings.seed = seed
        model = spd.PerturbDiff(cells, **TINY)
        torch.rand(seed + len(models))  # what else is drawn in between does not matter
        model.train(**FEW_STEPS)
        models.append(model)
    assert_same_state(models[0], models[1])
    weights = [m.module.generator_ema.transformer.project.weight for m in models]
    assert not torch.equal(weights[0], weights[2])


@pytest.mark.parametrize("validation_size", [None, 0.0])
def test_resumed_training_reaches_the_same_state(cells: AnnData, tmp_path: Path, validation_size: float | None) -> None:
    arguments = FEW_STEPS | {"validation_size": validation_size}
    keep = ModelCheckpoint(tmp_path, filename="{epoch}", every_n_epochs=1, save_top_k=-1)
    whole = spd.PerturbDiff(cells, **TINY)
    whole.train(seed=3, callbacks=[keep], **arguments)
    checkpoints = sorted(path.name for path in tmp_path.glob("*.ckpt"))
    assert checkpoints == [f"epoch={i}.ckpt" for i in range(4)]
    resumed = spd.PerturbDiff(cells, **TINY)
    torch.rand(5)
    resumed.train(ckpt_path=tmp_path / "epoch=1.ckpt", **arguments)
    assert_same_state(whole, resumed)
    kwargs = {"n_cells": 5, "seed": 1, "progress": False}
    first, second = (m.predict(cells, ["A", "A+B"], **kwargs) for m in (whole, resumed))
    assert (first.layers["counts"] != second.layers["counts"]).nnz == 0


def test_checkpoint_of_something_else(cells: AnnData, tmp_path: Path) -> None:
    torch.save({"state_dict": {}}, tmp_path / "other.ckpt")
    with pytest.raises(ValueError, match="is not a checkpoint of the second stage"):
        spd.PerturbDiff(cells, **TINY).train(ckpt_path=tmp_path / "other.ckpt", **FEW_STEPS)


def test_resuming_with_other_cells(cells: AnnData, tmp_path: Path) -> None:
    keep = ModelCheckpoint(tmp_path, filename="last", save_top_k=1)
    few = FEW_STEPS | {"max_epochs_generator": 2}
    spd.PerturbDiff(cells, **TINY).train(callbacks=[keep], **few)
    fewer = cells[np.arange(cells.n_obs) % 6 > 0].copy()
    spd.PerturbDiff.setup_anndata(fewer, "perturbation", "control", context_keys=["cell_type"], batch_key="donor")
    with pytest.raises(ValueError, match="resume with the cells"):
        spd.PerturbDiff(fewer, **TINY).train(ckpt_path=tmp_path / "last.ckpt", **few)


def test_autotune(cells: AnnData, tmp_path: Path) -> None:
    for package in ("ray", "hyperopt", "scib_metrics"):
        pytest.importorskip(package, reason=f"scvi.autotune needs {package} (scvi-tools[autotune])")
    from ray import tune
    from scvi import autotune

    few = {k: v for k, v in FEW_STEPS.items() if k not in ("enable_progress_bar", "logger", "accelerator")}
    result = autotune.run_autotune(
        spd.PerturbDiff,
        cells,
        metrics=["energy_score_validation"],
        mode="min",
        search_space={
            "model_params": TINY | {"width": tune.choice([8, 16])},
            "train_params": few | {"max_epochs": 2, "validation_size": 0.25},  # else too few to be scored
        },
        num_samples=2,
        searcher="random",
        resources={"cpu": 1},
        logging_dir=str(tmp_path),
        seed=0,
    )
    assert len(result.result_grid) == 2 and not result.result_grid.errors
