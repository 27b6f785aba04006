"""Cases that once failed in a way nobody could act on."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest
from tests.fuzz.cells import Screen
from tests.fuzz.quick import quick_constants
from tests.fuzz.run import run_case
from tests.fuzz.strategies import Case, Training
from tests.helpers import FEW_STEPS
from tests.screens import screen, tiny

from scperturbdiff.retrieval import Conditions, Responses, Retrieval, RetrievalSettings

if TYPE_CHECKING:
    from pathlib import Path

FIVE = ("P1", "P2", "P3", "P4", "P5")
CASES = {
    "replicates of cells that are all alike": Case(Screen(n_cells=40, level="equal", batches=("B1", "B2"))),
    "similarities of cells that are all alike": Case(Screen(n_cells=80, names=FIVE, level="equal")),
    "similarities of populations of one cell each": Case(
        Screen(n_cells=14, names=FIVE, n_pairs=5, design="thin"), Training(n_latent=2, n_states=(2,))
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_it_runs(name: str, tmp_path: Path) -> None:
    with quick_constants():
        run_case(CASES[name], tmp_path)


def test_nothing_is_learned_of_components_that_a_fold_has_in_combinations_alone() -> None:
    rng = np.random.default_rng(0)
    pairs = [(i, (i + 1) % 5) for i in range(5)]
    component = np.array([(i, -1) for i in range(4)] + 2 * pairs)
    n = len(component)
    context = np.arange(n) % 2
    means = rng.normal(size=(2, 3))[context]
    conditions = Conditions(means, component, np.zeros((n, 2)), context, np.full(n, 0.1))
    responses = Responses(conditions, rng.normal(size=(n, 3)), np.zeros(n), np.zeros(n), np.zeros((n, 0), np.float16))
    alone, code, seeds = (component >= 0).sum(1) == 1, conditions.pair_codes(), []
    for seed in range(100):  # as they are drawn
        fold = (np.random.default_rng(seed).permutation(code.max() + 1) % 2)[code]
        seeds += [seed] if len(np.unique(fold[alone])) == 1 else []
    assert seeds
    for seed in seeds[:2]:
        found = Retrieval.fit(responses, settings=RetrievalSettings(n_folds=2), seed=seed)
        assert np.isfinite(found.predict(conditions).shift).all()


@pytest.mark.parametrize(
    ("name", "value"),
    [("n_states", 2), ("n_states", (2.5,)), ("n_neighbors", 0), ("doubt_min", 1), ("length_bounds", (1.0,))],
)
def test_settings_of_retrieval_are_checked_before_training(name: str, value: object) -> None:
    with pytest.raises((TypeError, ValueError), match=name):
        RetrievalSettings(**{name: value})


def test_settings_of_retrieval_may_be_lists() -> None:
    assert RetrievalSettings(n_states=[2, 3]).n_states == (2, 3)  # type: ignore[arg-type]


@pytest.mark.parametrize("validation_size", [None, 0.0, 0.3])
def test_a_seed_below_zero_is_named_wherever_it_is_first_used(validation_size: float | None) -> None:
    model = tiny(screen(donors=1))
    with pytest.raises(ValueError, match="seed=-1 must be"):
        model.train(**FEW_STEPS | {"seed": -1, "validation_size": validation_size})
