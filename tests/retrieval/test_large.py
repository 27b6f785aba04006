"""Screens of which parameters are chosen on a part, and requests that name what is known and what is not."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from tests.retrieval.screens import D, responses, screen

from scperturbdiff.retrieval import Conditions, Retrieval, RetrievalSettings
from scperturbdiff.retrieval._retrieval import FEWEST, whole_perturbations


@pytest.mark.parametrize(("contexts", "perturbations"), [(3, 200), (60, 20), (400, 3)])
def test_parameters_are_chosen_on_whole_perturbations(contexts: int, perturbations: int) -> None:
    known = screen(contexts, perturbations, 1)
    rows = whole_perturbations(known, 120, seed=0)
    component, context = known.component[rows, 0], known.context[rows]
    assert 60 <= len(rows) <= 120
    assert len(rows) == len(np.unique(component)) * len(np.unique(context))  # every pair of them
    assert len(np.unique(component)) >= min(FEWEST, perturbations)
    np.testing.assert_array_equal(whole_perturbations(known, 10**6, seed=0), np.arange(len(known)))


def test_combinations_are_chosen_with_their_components() -> None:
    pairs = np.array([(i, j) for i in range(30) for j in range(-1, i)])
    pairs = pairs[:, ::-1]
    known = Conditions(
        np.zeros((len(pairs), D)), pairs, np.zeros(pairs.shape), np.zeros(len(pairs), int), np.ones(len(pairs))
    )
    rows = whole_perturbations(known, 60, seed=1)
    chosen = set(pairs[rows].ravel()) - {-1}
    assert 0 < len(rows) <= 60
    assert {tuple(p) for p in pairs[rows]} == {tuple(p) for p in pairs if set(p) - {-1} <= chosen}


@pytest.mark.parametrize("seed", [0])
def test_what_is_chosen_on_a_part_is_nearly_as_good_as_on_all(seed: int) -> None:
    """Contexts of three kinds, in which perturbations act differently: of one population each nothing would show it."""
    rng, n, d = np.random.default_rng(seed), 120, 8
    known = screen(6, n, 1, noise=0.02)
    places = rng.normal(size=(3, d))[np.arange(6) % 3] + 0.25 * rng.normal(size=(6, d))
    apart = np.linalg.norm(places[:, None] - places, axis=-1)
    alike = np.exp(-2 * (apart / np.median(apart[np.triu_indices(6, 1)])) ** 2)
    of_context = np.einsum("ce,ped->pcd", np.linalg.cholesky(alike + 1e-6 * np.eye(6)), rng.normal(size=(n, 6, d)))
    response = 0.3 * (rng.normal(size=(n, 1, d)) + of_context)
    shift = response[known.component[:, 0], known.context] + 0.14 * rng.normal(size=(len(known), d))
    measured = responses(replace(known, control_mean=places[known.context]), shift)
    rows = np.arange(0, len(known), 5)
    for way in ("pair", "context"):
        part, whole = (
            Retrieval.fit(measured, settings=RetrievalSettings(max_contexts=0, n_left_out=m)).leave_out(way, rows).shift
            for m in (90, 10**5)
        )
        error, least = (float(((found - shift[rows]) ** 2).mean()) for found in (part, whole))
        assert error < 1.1 * least


def test_what_is_known_of_one_component_counts_where_the_other_is_new() -> None:
    rng = np.random.default_rng(0)
    known = screen(3, 6, 1, noise=0.001)
    of_component = 2 * rng.normal(size=(7, D))
    features = np.column_stack([of_component, rng.normal(size=(7, 2))])
    found = Retrieval.fit(responses(known, of_component[known.component[:, 0]]), features)
    asked = replace(known.take(np.zeros(2, int)), component=np.array([[2, -1], [2, 6]]), dose=np.zeros((2, 2)))
    single, both = found.predict(asked).shift
    np.testing.assert_allclose(single, of_component[2], atol=0.2)
    new = found.predict(replace(asked, component=np.array([[6, -1], [6, -1]]))).shift[0]
    np.testing.assert_allclose(both, single + new, atol=0.35 * np.linalg.norm(single))


@pytest.mark.parametrize("replicates", [1, 3])
def test_a_measured_response_is_not_that_of_contexts_with_the_same_controls(replicates: int) -> None:
    """Two times with controls alike: nothing happens at the first. Replicates tell what is noise."""
    rng = np.random.default_rng(0)
    known = screen(6, 8, replicates, noise=0.001)
    known = replace(known, control_mean=known.control_mean[(known.context // 2) * 8 * replicates * 2])
    effect = np.where(known.context % 2 == 1, 2.0, 0.0)[:, None] * rng.normal(size=(8, D))[known.component[:, 0]]
    found = Retrieval.fit(responses(known, effect + 0.03 * rng.normal(size=effect.shape)))
    said = found.predict(known)
    assert set(said.novelty) == {"seen"}
    error = ((said.shift - effect) ** 2).mean() / (effect**2).mean()
    assert error < 0.05
