"""A target that training never saw loses its own gene as far as the targets of training lost theirs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scvi
from tests.helpers import FEW_STEPS, TINY, assert_same_cells

import scperturbdiff as spd

if TYPE_CHECKING:
    from pathlib import Path

    from anndata import AnnData

GENES = [f"g{i}" for i in range(12)]
SEEN, UNSEEN = GENES[:6], ["g8", "g9"]
LEFT = 0.3
N = 60


def screen(factor: list[float], names: list[str] = SEEN) -> AnnData:
    """Targets whose own gene has `factor` times the counts; nothing else happens."""
    rng = np.random.default_rng(0)
    mean = np.tile(rng.uniform(8, 20, len(GENES)), (len(factor) + 2, 1))
    for row, (gene, change) in enumerate(zip(SEEN, factor, strict=True)):
        mean[row, GENES.index(gene)] *= change
    counts = rng.poisson(np.repeat(mean, N, axis=0)).astype(np.float32)
    labels = np.repeat([*names, "control", "control"], N)
    obs = pd.DataFrame({"target": labels}, index=[f"c{i}" for i in range(len(labels))])
    return ad.AnnData(counts, obs, pd.DataFrame(index=GENES))


def trained(adata: AnnData, names: list[str] = SEEN, unseen: list[str] = UNSEEN) -> spd.PerturbDiff:
    table = pd.DataFrame(np.random.default_rng(1).normal(size=(len(names + unseen), 3)), index=names + unseen)
    spd.PerturbDiff.setup_anndata(adata, "target", "control", perturbation_embeddings=table)
    scvi.settings.seed = 0  # of the initial weights
    model = spd.PerturbDiff(adata, **TINY)
    model.train(seed=0, **FEW_STEPS)
    return model


@pytest.fixture(scope="module")
def model() -> spd.PerturbDiff:
    return trained(screen([LEFT] * 6))


def folds(model: spd.PerturbDiff, perturbation: str, n_cells: int = 600, **options: Any) -> pd.Series:
    """Fold change of each gene's share of counts in predicted cells."""
    cells = model.predict(perturbations=[perturbation], n_cells=n_cells, seed=0, progress=False, **options)
    control = model.adata[(model.adata.obs["target"] == "control").to_numpy()].X.sum(0)
    counts = np.asarray(cells.layers["counts"].sum(0)).ravel()
    return pd.Series(counts / counts.sum() / (control / control.sum()), index=GENES)


def test_what_training_shows_is_learned_and_told(model: spd.PerturbDiff) -> None:
    own = model.module.retrieval.own_gene
    assert own.used and own.n_clear == own.n_targets == 6
    assert own.fold == pytest.approx(np.log(LEFT), abs=0.1)
    assert any("own gene falls clearly in 6 of 6 targets" in note for note in model.report_.notes)


def test_the_gene_of_an_unseen_target_falls_so_far(model: spd.PerturbDiff) -> None:
    found = folds(model, "g8")
    assert found["g8"] == pytest.approx(LEFT, rel=0.15)
    assert (found[["g7", "g9", "g10", "g11"]] > 0.85).all()  # other genes stay


def test_in_pairs_the_gene_of_every_unseen_member_falls(model: spd.PerturbDiff) -> None:
    assert (folds(model, "g8+g9")[["g8", "g9"]] < 1.3 * LEFT).all()
    with_seen = folds(model, "g0+g8")
    assert with_seen["g8"] == pytest.approx(LEFT, rel=0.15)


def test_saved_and_loaded_it_predicts_the_same(model: spd.PerturbDiff, tmp_path: Path) -> None:
    model.save(tmp_path / "model")
    loaded = spd.PerturbDiff.load(tmp_path / "model", adata=model.adata, accelerator="cpu")
    assert loaded.module.retrieval.own_gene == model.module.retrieval.own_gene
    options = {"perturbations": ["g8"], "n_cells": 20, "seed": 3, "progress": False}
    assert_same_cells(model.predict(**options), loaded.predict(**options))


@pytest.mark.parametrize("factor", [[1.0] * 6, [LEFT, 1 / LEFT] * 3])
def test_where_targets_show_nothing_nothing_is_expected(factor: list[float]) -> None:
    model = trained(screen(factor))
    assert not model.module.retrieval.own_gene.used
    assert any("not enough to expect it" in note for note in model.report_.notes)
    assert folds(model, "g8")["g8"] == pytest.approx(1.0, abs=0.15)


def test_drugs_have_no_gene_of_their_own() -> None:
    names = [f"drug {i}" for i in range(6)]
    model = trained(screen([LEFT] * 6, names), names, ["drug 8"])
    assert model.module.retrieval.own_gene.n_targets == 0
    assert not any("own gene" in note for note in model.report_.notes)
