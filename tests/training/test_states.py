"""How many states of cells are chosen: one where cells respond alike, more where they do not."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from tests.screens import screen, table_of

from scperturbdiff.responses import MeasuredPopulations, measure_populations
from scperturbdiff.retrieval import Retrieval
from scperturbdiff.training._states import StateSearch

D, CELLS = 4, 60


def populations(kind: str, contexts: int) -> MeasuredPopulations:
    """One kind of cell, two kinds that respond alike, or two that respond in opposite ways."""
    adata = screen(contexts=contexts, donors=1, perturbations=3, n_cells=CELLS)
    table, rng = table_of(adata), np.random.default_rng(0)
    latent = 0.5 * rng.normal(size=(adata.n_obs, D))
    second = np.arange(adata.n_obs) % 2 == 1  # half of every population
    if kind != "pure":
        latent[:, 0] += np.where(second, 3.0, -3.0)
    for i in range(len(table)):
        rows = table.cells[i]
        size = 1.0 + table.component[i, 0]
        latent[rows, 1] += np.where(second[rows] & (kind == "opposite"), -size, size)
    tensor = torch.as_tensor(latent, dtype=torch.float32)

    def decode(z: torch.Tensor, batch: Any) -> torch.Tensor:
        return torch.full((len(z), adata.n_vars), 1 / adata.n_vars)

    return measure_populations(table, tensor, adata.X, np.zeros(adata.n_obs, np.int64), decode)


def search(kind: str, contexts: int) -> StateSearch:
    measured = populations(kind, contexts)
    return StateSearch(measured, Retrieval.fit(measured.responses), lambda latent: latent, 0)


@pytest.mark.parametrize(("kind", "contexts"), [("pure", 1), ("pure", 3), ("alike", 3)])
def test_cells_that_respond_alike_are_of_one_state(kind: str, contexts: int) -> None:
    assert search(kind, contexts).choose() is None


@pytest.mark.parametrize("contexts", [1, 3])
def test_cells_that_respond_differently_are_of_several(contexts: int) -> None:
    found = search("opposite", contexts).choose()
    assert found is not None and len(found.states) > 1
    assert {np.sign(centre) for centre in found.states.centres[:, 0]} == {-1, 1}
    responses = found.retrieval.responses
    assert len(responses) == len(found.states) * 3 * contexts
    where, size = responses.conditions.control_mean[:, 0], 1.0 + responses.conditions.component[:, 0]
    sizable = responses.conditions.mass > 0.1
    np.testing.assert_allclose(responses.shift[sizable, 1], (-np.sign(where) * size)[sizable], atol=0.8)


def test_states_need_cells(monkeypatch: pytest.MonkeyPatch) -> None:
    from scperturbdiff.training import _states

    more = type(_states.SETTINGS)(cells_per_state=3 * CELLS)
    monkeypatch.setattr(_states, "SETTINGS", more)
    assert search("opposite", 3).choose() is None
