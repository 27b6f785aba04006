"""States of cells: found among controls, matched to treated cells by unbalanced transport."""

from __future__ import annotations

import io
from dataclasses import replace

import numpy as np
import pytest
import torch

from scperturbdiff.retrieval import (
    Conditions,
    Retrieval,
    RetrievalSettings,
    StateRetrieval,
    States,
    control_moments,
    match_states,
    state_responses,
)

D = 6
PLACES = np.array([[4.0, *[0.0] * (D - 1)], [-4.0, *[0.0] * (D - 1)]])
SHIFTS = np.array([[0.0, 1.5, *[0.0] * (D - 2)], [0.0, -1.5, *[0.0] * (D - 2)]])
SETTINGS = RetrievalSettings()


def cells(n: int, seed: int, share: float = 0.5, shifts: np.ndarray | float = 0.0) -> tuple[np.ndarray, np.ndarray]:
    """Cells of two states, and which they are in."""
    rng = np.random.default_rng(seed)
    state = (rng.random(n) >= share).astype(int)
    return (PLACES + shifts)[state] + rng.normal(size=(n, D)), state


@pytest.fixture(scope="module")
def states() -> States:
    found = States.fit(cells(2000, 0)[0], 2, SETTINGS.state_softness)
    order = np.argsort(-found.centres[:, 0])
    return replace(found, centres=found.centres[order])


def matched(
    states: States, treated: np.ndarray, settings: RetrievalSettings = SETTINGS, n: int = 2000
) -> tuple[np.ndarray, np.ndarray]:
    """Shifts of the states and their shares of the treated cells."""
    start = control_moments(states, cells(n, 1)[0], np.array([n]))
    moved = match_states(states, treated, np.array([len(treated)]), start, settings)
    return (moved.mean - start.mean)[0], moved.size[0] / len(treated)


def test_states_are_where_cells_are(states: States) -> None:
    np.testing.assert_allclose(states.centres, PLACES, atol=0.15)
    assert states.variance == pytest.approx(1, abs=0.05) and states.softness == pytest.approx(2, abs=0.1)
    some, state = cells(500, 3)
    share = states.shares(some)
    np.testing.assert_allclose(share.sum(1), 1)
    assert (share.argmax(1) == state).mean() > 0.99


def test_without_an_effect_no_state_is_shifted(states: States) -> None:
    """Beyond chance: four standard errors of the difference of two means."""
    for seed in (5, 6):
        shift, share = matched(states, cells(2000, seed)[0])
        assert np.abs(shift).max() < 4 * np.sqrt(2 / 1000)
        np.testing.assert_allclose(share, 0.5, atol=0.05)


def test_states_that_are_shifted_in_opposite_ways_are_told_apart(states: States) -> None:
    """Their mean shift is nothing."""
    treated = cells(2000, 5, shifts=SHIFTS)[0]
    assert np.abs(treated.mean(0)[1:]).max() < 0.2
    np.testing.assert_allclose(matched(states, treated)[0], SHIFTS, atol=0.25)


def test_a_common_shift_is_that_of_every_state(states: States) -> None:
    common = np.full(D, 0.8)
    np.testing.assert_allclose(matched(states, cells(2000, 5, shifts=common)[0])[0], [common] * 2, atol=0.25)


def test_another_composition_is_not_taken_for_a_shift(states: States) -> None:
    """Unless states must keep their share of cells, as in balanced transport."""
    treated = cells(2000, 5, share=0.8)[0]
    shift, share = matched(states, treated)
    np.testing.assert_allclose(shift, 0, atol=0.5)
    assert share[0] > 0.7
    free = matched(states, treated, RetrievalSettings(state_balance=0.0))
    np.testing.assert_allclose(free[0], 0, atol=0.25)
    assert free[1][0] == pytest.approx(0.8, abs=0.05)
    balanced = matched(states, treated, RetrievalSettings(state_balance=1.0))
    assert balanced[1][0] < share[0] < free[1][0] + 0.02


def test_the_order_of_cells_does_not_matter(states: States) -> None:
    treated, _ = cells(300, 5, shifts=SHIFTS)
    order = np.random.default_rng(0).permutation(300)
    for ours, theirs in zip(matched(states, treated), matched(states, treated[order]), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-9)


def test_populations_are_matched_each_on_its_own(states: States) -> None:
    """In one call, and over the borders of chunks."""
    counts = np.array([3, 6000, 1, 500])
    treated = [cells(n, seed, shifts=SHIFTS)[0] for seed, n in enumerate(counts)]
    controls = control_moments(states, cells(400, 1)[0], np.array([400]))
    together = match_states(states, np.concatenate(treated), counts, controls.take(np.zeros(4, np.int64)), SETTINGS)
    for i, (n, own) in enumerate(zip(counts, treated, strict=True)):
        alone = match_states(states, own, np.array([n]), controls, SETTINGS)
        for name in ("size", "effective", "mean", "variance"):
            np.testing.assert_allclose(getattr(together, name)[i], getattr(alone, name)[0], rtol=1e-8, atol=1e-10)
    np.testing.assert_allclose(together.size.sum(1), counts)
    assert (together.effective >= together.size - 1e-9).all()
    assert (together.effective <= counts[:, None] + 1e-9).all()


# ---- retrieval by states ---------------------------------------------------------------------------------------------


def by_state(states: States) -> StateRetrieval:
    """Of three perturbations in four contexts, states shifted in opposite ways."""
    context, component = np.indices((4, 3)).reshape(2, -1)
    n, count = len(context), np.full(12, 300)
    place = np.random.default_rng(0).normal(size=(4, D)) * [0, 0, 1, 1, 1, 1]
    size = np.array([1.0, -0.6, 0.3])[component]
    controls = np.concatenate([cells(300, 100 + i)[0] + place[context[i]] for i in range(n)])
    treated = np.concatenate([cells(300, 200 + i, shifts=size[i] * SHIFTS)[0] + place[context[i]] for i in range(n)])
    start = control_moments(states, controls, count)
    moved = match_states(states, treated, count, start, SETTINGS)
    whole = Conditions(place[context], component[:, None], np.zeros((n, 1)), context, np.full(n, 2 / 300))
    return StateRetrieval(states, Retrieval.fit(state_responses(states, whole, start, moved, 5.0)))


@pytest.fixture(scope="module")
def retrieval(states: States) -> StateRetrieval:
    return by_state(states)


def asked(component: int, context: int = 9) -> Conditions:
    return Conditions(
        np.zeros((1, D)), np.array([[component]]), np.zeros((1, 1)), np.array([context]), np.full(1, 0.01)
    )


def test_each_state_is_predicted_to_do_what_it_did_elsewhere(retrieval: StateRetrieval) -> None:
    conditions, found = retrieval.predict(asked(0), cells(300, 7)[0])
    assert conditions.state.tolist() == [0, 1] and conditions.population.tolist() == [0, 0]
    np.testing.assert_allclose(conditions.mass, 0.5, atol=0.1)
    np.testing.assert_allclose(conditions.control_mean, PLACES, atol=0.3)
    np.testing.assert_allclose(found.shift, SHIFTS, atol=0.3)
    assert found.novelty == ["context", "context"]


def test_states_of_a_population_are_left_out_together(retrieval: StateRetrieval) -> None:
    some = retrieval.retrieval.leave_out("context", retrieval.rows(np.array([7, 2]))).shift
    every = retrieval.retrieval.leave_out("context").shift
    np.testing.assert_allclose(some, every[[14, 15, 4, 5]])


def test_a_state_retrieval_is_saved_and_loaded(retrieval: StateRetrieval) -> None:
    file = io.BytesIO()
    torch.save(retrieval.state(), file)
    file.seek(0)
    again = StateRetrieval.from_state(torch.load(file, weights_only=True))
    np.testing.assert_array_equal(again.states.centres, retrieval.states.centres)
    assert (again.states.softness, again.states.variance) == (retrieval.states.softness, retrieval.states.variance)
    for component in (0, 2):
        (ours, found), (theirs, other) = (r.predict(asked(component), cells(50, 8)[0]) for r in (retrieval, again))
        np.testing.assert_array_equal(ours.control_mean, theirs.control_mean)
        np.testing.assert_array_equal(found.shift, other.shift)
        np.testing.assert_array_equal(found.variance, other.variance)
    with pytest.raises(ValueError, match="format None"):
        StateRetrieval.from_state({**retrieval.state(), "version": None})
