"""Control cells, and where they go, are decoded once; where that is too much to keep, piece by piece, to the same."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from scipy import sparse
from tests.helpers import assert_same_cells

from scperturbdiff.module import PerturbDiffModule
from scperturbdiff.prediction import _encoded
from scperturbdiff.prediction._destinations import Destinations
from scperturbdiff.prediction._pieces import ControlGroup

if TYPE_CHECKING:
    from collections.abc import Callable

    from anndata import AnnData

    from scperturbdiff import PerturbDiff
    from scperturbdiff.counts import Decoded


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Cells that are decoded where they go, call by call."""
    cells: list[int] = []
    decode = PerturbDiffModule.decode

    def watched(self: PerturbDiffModule, latent: torch.Tensor, *args: torch.Tensor | None) -> Decoded:
        cells.append(len(latent))
        return decode(self, latent, *args)

    monkeypatch.setattr(PerturbDiffModule, "decode", watched)
    return cells


@pytest.fixture
def predict(trained_model: PerturbDiff, screen: AnnData) -> Callable[..., AnnData]:
    controls = screen[(screen.obs["perturbation"] == "control").to_numpy()].copy()
    still = copy.deepcopy(trained_model)
    still.module.generator_ema.network_weight.zero_()
    still.module.generator_ema.replicate_factors.zero_()
    assert still.module.retrieval is not None
    still.module.retrieval.responsiveness.clear()

    def run(scattered: bool = False, **kwargs: int) -> AnnData:
        model = copy.deepcopy(still)
        if scattered:
            model.module.generator_ema.replicate_factors.fill_(0.1)
        return model.predict(controls, ["P01"], **{"n_cells": 100, "seed": 0, **kwargs}, progress=False)

    return run


def test_each_control_is_decoded_once_where_it_goes(predict: Callable[..., AnnData], decoded: list[int]) -> None:
    kept = predict()
    cells = kept.obs.groupby(["cell_type", "donor"], observed=True)["control_cell"].nunique()
    assert (cells < 100).all()
    # twice for the mean of the population, before and after, and once for its cells
    assert sum(decoded) == 3 * cells.sum()
    assert_same_cells(predict(), kept)


def test_cells_that_scatter_are_decoded_each(predict: Callable[..., AnnData], decoded: list[int]) -> None:
    made = predict(scattered=True)
    assert sum(decoded) >= made.n_obs


def test_cells_are_the_same_whether_shares_are_kept(
    predict: Callable[..., AnnData], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those of control cells, where each predicted cell is decoded."""
    of_controls: list[int] = []
    shares = PerturbDiffModule.shares

    def watched(self: PerturbDiffModule, latent: torch.Tensor, batch: torch.Tensor) -> torch.Tensor:
        of_controls.append(len(latent))
        return shares(self, latent, batch)

    monkeypatch.setattr(PerturbDiffModule, "shares", watched)
    kept = predict(scattered=True)
    assert sum(of_controls) < kept.n_obs
    of_controls.clear()
    monkeypatch.setattr(_encoded, "KEPT_SHARES", 0)
    assert_same_cells(predict(scattered=True), kept)
    assert sum(of_controls) == kept.n_obs


def test_what_is_too_much_to_keep_gives_the_same_cells(
    predict: Callable[..., AnnData], decoded: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = predict()
    monkeypatch.setattr(_encoded, "KEPT_SHARES", 0)
    decoded.clear()
    made = predict()
    assert sum(decoded) >= made.n_obs
    np.testing.assert_array_equal(made.obs["control_cell"], kept.obs["control_cell"])
    np.testing.assert_array_equal(made.obsm["X_perturbdiff"], kept.obsm["X_perturbdiff"])
    # products of matrices of other sizes round otherwise
    changed = (made.layers["counts"] != kept.layers["counts"]).nnz
    assert changed < 1e-4 * kept.layers["counts"].nnz


@pytest.mark.parametrize("dispersion", ["gene", "gene-batch", "gene-cell"])
def test_kept_is_what_is_decoded(dispersion: str) -> None:
    kwargs = {"width": 4, "n_layers": 1, "n_heads": 1}
    module = PerturbDiffModule(
        30, 2, 3, 1, n_hidden=8, vae_kwargs={"dispersion": dispersion}, generator_kwargs=kwargs
    ).eval()
    place, residual = torch.randn(20, 3), torch.randn(30)
    group = ControlGroup(
        np.arange(20), place, place.mean(0).numpy(), sparse.csr_matrix((20, 30)), 1, None, None, lambda: None
    )
    destinations = Destinations(module, group, 1, residual, together=True)
    for controls in (np.array([3, 5, 3, 19]), np.array([5, 0, 0]), np.array([19, 3, 5])):
        found = destinations.decode(controls, place[torch.as_tensor(controls)])
        wanted = module.decode(place[torch.as_tensor(controls)], torch.ones(len(controls)), residual)
        torch.testing.assert_close(found.share, wanted.share)
        torch.testing.assert_close(found.dispersion, wanted.dispersion)
