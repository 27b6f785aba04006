"""Cells that respond unevenly: found where conditions are left out, predicted, reported, saved."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import pytest
import scvi
import torch
from tests.helpers import assert_same_cells

import scperturbdiff as spd
from scperturbdiff.counts import scale_response

if TYPE_CHECKING:
    from pathlib import Path

    from anndata import AnnData

KEYS = {"perturbation_key": "perturbation", "control": "control", "context_keys": ["cell_type"]}


def screen(responders: float) -> AnnData:
    return spd.datasets.simulate(4, 6, 60, 150, n_batches=1, effect_scale=2.0, responders=responders, seed=3)


def trained(adata: AnnData) -> spd.PerturbDiff:
    spd.PerturbDiff.setup_anndata(adata, **KEYS)
    scvi.settings.seed = 0
    model = spd.PerturbDiff(adata, n_latent=8, n_hidden=32)
    model.train(
        max_epochs_vae=25, max_epochs_generator=1, plan_kwargs={"steps_per_epoch": 1}, accelerator="cpu",
        enable_progress_bar=False, logger=False, seed=0,
    )  # fmt: skip
    return model


@pytest.fixture(scope="module")
def half() -> spd.PerturbDiff:
    return trained(screen(0.5))


def test_cells_that_do_not_respond_are_found_and_reported(half: spd.PerturbDiff) -> None:
    report = half.report_
    assert report is not None
    assert report.network_weight == 0
    assert 0.25 < report.hardly_respond["pair"] < 0.6
    assert "Cells respond unevenly" in str(report)
    assert "cells that hardly respond, pair" in set(report.to_frame()["what"])


def test_predicted_cells_are_a_mixture(half: spd.PerturbDiff) -> None:
    assert half.adata is not None
    controls = half.adata[half.adata.obs["perturbation"] == "control"]
    asked = {"perturbations": ["P02"], "n_cells": 100, "seed": 0, "progress": False}
    uneven = half.predict(controls, **asked)
    assert half.module.retrieval is not None
    laws = half.module.retrieval.responsiveness
    try:
        half.module.retrieval = replace(half.module.retrieval, responsiveness={})
        alike = half.predict(controls, **asked)
    finally:
        half.module.retrieval = replace(half.module.retrieval, responsiveness=laws)
    for name, group in uneven.obs.groupby("cell_type", observed=True):
        at = uneven.obs_names.get_indexer(group.index)
        start = half.get_latent_representation(controls[uneven.obs["control_cell"].iloc[at]])
        moved, evenly = (x.obsm["X_perturbdiff"][at] - start for x in (uneven, alike))
        lengths = np.linalg.norm(moved, axis=1) / np.linalg.norm(evenly, axis=1)
        assert 0.2 < (lengths < 0.25).mean() < 0.7, name
        assert lengths.mean() == pytest.approx(1, abs=0.02)


def test_the_law_is_saved_with_the_model(half: spd.PerturbDiff, tmp_path: Path) -> None:
    half.save(tmp_path / "model", save_anndata=False)
    again = spd.PerturbDiff.load(tmp_path / "model", half.adata)
    assert half.adata is not None
    controls = half.adata[half.adata.obs["perturbation"] == "control"]
    asked = {"perturbations": ["P01", "P03"], "n_cells": 30, "seed": 1, "progress": False}
    assert_same_cells(half.predict(controls, **asked), again.predict(controls, **asked))


def test_cells_that_all_respond_alike_have_no_law() -> None:
    rng, calm = np.random.default_rng(0), screen(1.0)
    genes = rng.integers(1, 30, calm.n_vars)  # a response that is the same factor of rates in every cell
    base, treated = rng.gamma(2, 2, calm.n_vars), calm.obs["perturbation"].str[1:].where(lambda s: s != "ontrol", "0")
    rates = np.where((genes % 6 + 1) == treated.astype(int).to_numpy()[:, None], 4, 1) * base
    calm.X = rng.poisson(rates).astype(np.float32)
    report = trained(calm).report_
    assert report is not None
    assert not report.hardly_respond
    assert "unevenly" not in str(report)


def test_scaled_responses() -> None:
    before, after, further = torch.rand(3, 5, 7)
    torch.testing.assert_close(scale_response(before, after, after, torch.ones(5, 1)), after)
    torch.testing.assert_close(scale_response(before, after, before, torch.zeros(5, 1)), before)
    assert (scale_response(before, after, further, torch.full((5, 1), 9.0)) >= 0).all()


def test_populations_of_a_few_cells_say_nothing() -> None:
    adata = screen(0.5)
    treated = adata.obs["perturbation"] != "control"
    few = adata.obs.groupby(["perturbation", "cell_type"], observed=True).cumcount() < 5
    report = trained(adata[(few | ~treated).to_numpy()].copy()).report_
    assert report is not None
    assert not report.hardly_respond
