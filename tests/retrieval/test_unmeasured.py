"""What was never measured, from responses drawn from laws that retrieval assumes or does not."""

from __future__ import annotations

import numpy as np
import pytest
from tests.retrieval.screens import responses

from scperturbdiff.retrieval import Conditions, Retrieval


def conditions(component: np.ndarray, dose: np.ndarray | None = None, context: np.ndarray | None = None) -> Conditions:
    """Conditions of the components `(n, c)`; contexts are places on a line."""
    n = len(component)
    context = np.zeros(n, np.int64) if context is None else context
    dose = np.zeros(component.shape) if dose is None else dose
    return Conditions(context[:, None] * np.ones((1, 4)), component, dose, context, np.full(n, 0.02))


def fitted(known: Conditions, shifts: np.ndarray, features: np.ndarray | None = None) -> Retrieval:
    noise = np.random.default_rng(9).normal(0, np.sqrt(0.02), shifts.shape)
    return Retrieval.fit(responses(known, shifts + noise), features)


def explained(predicted: np.ndarray, true: np.ndarray) -> float:
    """Share of the mean square of `true` that is predicted."""
    return 1 - ((predicted - true) ** 2).mean() / (true**2).mean()


def test_retrieval_goes_on_along_doses() -> None:
    rng = np.random.default_rng(0)
    levels = np.log2([0.1, 0.3, 1.0, 3.0, 10.0, 30.0])
    component = np.repeat(np.arange(10), len(levels))[:, None]
    dose = np.tile(levels, 10)[:, None]
    effect = rng.normal(0, 1.5, (10, 12))[component[:, 0]] * (1 / (1 + 2.0 ** (-1.5 * dose)))
    for held, least in ((levels[2], 0.9), (levels[5], 0.85)):
        out = dose[:, 0] == held
        retrieval = fitted(conditions(component[~out], dose[~out]), effect[~out])
        new = conditions(component[out], dose[out])
        assert explained(retrieval.predict(new).shift, effect[out]) > least
        nearest = effect[dose[:, 0] == levels[3 if held == levels[2] else 4]]
        if held == levels[2]:
            assert explained(nearest, effect[out]) < 0.7


@pytest.mark.parametrize("informative", [True, False])
def test_retrieval_reads_features_that_tell_something(informative: bool) -> None:
    rng = np.random.default_rng(1)
    features = rng.normal(1.0, 1.0, (40, 6))
    effect = 0.5 + (features if informative else rng.normal(size=(40, 6))) @ rng.normal(0, 0.4, (6, 12))
    component = np.arange(40)[:, None]
    retrieval = fitted(conditions(component[:32]), effect[:32], features)
    new = conditions(component[32:])
    found = retrieval.predict(new)
    assert set(found.novelty) == {"perturbation"}
    score = explained(found.shift, effect[32:])
    mean = explained(np.broadcast_to(effect[:32].mean(0), (8, 12)), effect[32:])
    assert (score > max(0.85, mean + 0.2)) if informative else (score < mean + 0.1)


def test_retrieval_does_not_depend_on_what_else_has_features() -> None:
    rng = np.random.default_rng(2)
    features = rng.normal(size=(20, 4))
    component = np.arange(20)[:, None]
    retrieval = fitted(conditions(component[:15]), features[:15] @ rng.normal(size=(4, 6)), features)
    new = conditions(component[15:16])
    alone = retrieval.with_features(features[:16]).predict(new, "perturbation").shift
    more = np.concatenate([features, 50 + rng.normal(size=(30, 4))])
    np.testing.assert_allclose(retrieval.with_features(more).predict(new, "perturbation").shift, alone)
    again = Retrieval.from_state(retrieval.state()).with_features(features[:16])
    np.testing.assert_array_equal(again.predict(new, "perturbation").shift, alone)


def test_retrieval_adds_components_up() -> None:
    rng = np.random.default_rng(3)
    pairs = np.array([(a, b) for a in range(10) for b in range(a)])
    component = np.concatenate([np.stack([np.arange(10), np.full(10, -1)], 1), pairs])
    single = rng.normal(size=(10, 12))
    effect = np.concatenate([single, single[pairs[:, 0]] + single[pairs[:, 1]]])
    out = np.isin(np.arange(len(component)), 10 + rng.permutation(len(pairs))[:12])
    retrieval = fitted(conditions(component[~out]), effect[~out])
    assert explained(retrieval.predict(conditions(component[out]), "pair").shift, effect[out]) > 0.95
