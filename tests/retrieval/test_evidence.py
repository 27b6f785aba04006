"""Features are trusted as far as perturbations that act, left out, speak for them; simple rules are limits."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from tests.retrieval.screens import responses

from scperturbdiff.retrieval import Conditions, Retrieval, RetrievalSettings
from scperturbdiff.retrieval._evidence import acting_weights
from scperturbdiff.retrieval._kernel import FeatureMoments, Widths

D, F = 8, 6
NOISE = 0.01


def singles(component: np.ndarray, noise: float = NOISE) -> Conditions:
    """Conditions of one component each in a single context."""
    n = len(component)
    return Conditions(np.zeros((n, D)), component[:, None], np.zeros((n, 1)), np.zeros(n, np.int64), np.full(n, noise))


def screen(kind: str, n: int = 36, n_act: int | None = None, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Features and responses of perturbations, of which the first `n_act` act: as features say, or as they do not."""
    rng = np.random.default_rng(seed)
    features = rng.normal(size=(n, F))
    told = features if kind == "informative" else rng.normal(size=(n, F))
    effect = told @ rng.normal(size=(F, D)) / 2 + 0.3
    effect[n if n_act is None else n_act :] = 0
    return features, effect + np.sqrt(NOISE) * rng.normal(size=effect.shape)


def fitted(features: np.ndarray, shifts: np.ndarray, n: int, **settings: float) -> Retrieval:
    """Retrieval that knows the first `n` perturbations."""
    known = singles(np.arange(n))
    return Retrieval.fit(responses(known, shifts[:n]), features, RetrievalSettings(**settings))


def predicted(retrieval: Retrieval, components: np.ndarray) -> np.ndarray:
    return retrieval.predict(singles(components), "perturbation").shift


def with_widths(retrieval: Retrieval, **widths: float) -> Retrieval:
    usual = Widths(common_share=0.6, context_share=0.0, nugget=1e-6)
    return replace(retrieval, widths={**retrieval.widths, "perturbation": replace(usual, **widths)})


# ---- what counts as evidence -------------------------------------------------------------------------------------


def test_what_does_nothing_is_no_evidence_and_the_strongest_does_not_decide_alone() -> None:
    """Closed form: squared lengths of 9, 1 and that of noise; a perturbation measured twice counts once."""
    shift = np.zeros((4, D))
    shift[0, 0], shift[1, 0], shift[2, 0] = 3.0, 1.0, 1.0
    shift[3, 0] = np.sqrt(NOISE * D)
    weight, act = acting_weights(singles(np.array([0, 1, 1, 2])), shift)
    noise = NOISE * D
    np.testing.assert_allclose(act, [1 - 2 * noise / 9, (1 - 2 * noise) / 2, (1 - 2 * noise) / 2, 0])
    mean = (9 + 1 + 1 + noise) / 4
    np.testing.assert_allclose(weight, [1 / (9 + mean), 0.5 / (1 + mean), 0.5 / (1 + mean), 1 / (noise + mean)])


def test_features_that_tell_are_used_and_told() -> None:
    features, shifts = screen("informative")
    found = fitted(features, shifts, 30)
    evidence = found.evidence
    assert evidence.used and evidence.enough and evidence.n == evidence.n_act == 30
    assert evidence.explained > 0.9 and evidence.without < 0.3
    assert any("Of 30 perturbations 30 act. Features explain 9" in note for note in found.notes)
    error = ((predicted(found, np.arange(30, 36)) - shifts[30:]) ** 2).sum()
    assert error < 0.1 * ((shifts[:30].mean(0) - shifts[30:]) ** 2).sum()


@pytest.mark.parametrize("seed", range(3))
def test_features_that_tell_nothing_are_not_used(seed: int) -> None:
    """The mean of the others is what is left, drawn towards no change at most."""
    features, shifts = screen("random", seed=seed)
    found = fitted(features, shifts, 30)
    assert not found.evidence.used and found.widths["perturbation"].feature_share == 0
    assert any("told nothing of those left out: the mean of the others" in note for note in found.notes)
    new = predicted(found, np.arange(30, 36))
    mean = shifts[:30].mean(0)
    np.testing.assert_allclose(new, np.broadcast_to(new[0], new.shape), atol=1e-9)
    assert new[0] @ mean / np.linalg.norm(new[0]) / np.linalg.norm(mean) > 0.99
    assert ((new - shifts[30:]) ** 2).sum() < 1.02 * ((mean - shifts[30:]) ** 2).sum()


def test_from_few_that_act_features_are_used_in_part_and_this_is_told() -> None:
    features, shifts = screen("random", n_act=4)
    found = fitted(features, shifts, 30)
    assert found.evidence.n_act == 4 and found.evidence.used and not found.evidence.enough
    assert 0 < found.widths["perturbation"].feature_share < 0.9
    assert any("Too few act to tell" in note for note in found.notes)
    assert fitted(features, shifts, 30, feature_min_act=2).evidence.enough


def test_a_screen_in_which_nothing_acts_says_so() -> None:
    features, shifts = screen("informative", n_act=0)
    found = fitted(features, shifts, 30)
    assert found.evidence.n_act <= 2  # of noise alone
    assert np.abs(predicted(found, np.arange(30, 36))).max() < 0.2


def test_evidence_is_saved() -> None:
    features, shifts = screen("informative")
    found = fitted(features, shifts, 30)
    again = Retrieval.from_state(found.state())
    assert again.evidence == found.evidence and again.notes == found.notes
    np.testing.assert_array_equal(predicted(again, np.arange(30, 36)), predicted(found, np.arange(30, 36)))


# ---- limits ------------------------------------------------------------------------------------------------------


def test_ridge_regression_is_a_limit() -> None:
    """Standardised features around the mean response, the penalty the share that features leave over theirs."""
    features, shifts = screen("random")
    found = with_widths(fitted(features, shifts, 30), feature_share=0.6, feature_linear=1.0, common_share=0.9999)
    x = (features - features[:30].mean(0)) / (features[:30].std(0) * np.sqrt(F))
    kernel = x[:30] @ x[:30].T + (1 - 0.6) / 0.6 * np.eye(30)
    mean = shifts[:30].mean(0)
    ridge = mean + x[30:] @ x[:30].T @ np.linalg.solve(kernel, shifts[:30] - mean)
    found = replace(found, responses=replace(found.responses, conditions=singles(np.arange(30), 1e-9)))
    np.testing.assert_allclose(predicted(found, np.arange(30, 36)), ridge, atol=0.03)


def test_the_mean_of_the_others_and_the_nearest_are_limits() -> None:
    features, shifts = screen("random")
    features[30:] = 2 * features[:6] + 0.01
    found = fitted(features, shifts, 30)
    mean = predicted(with_widths(found, feature_share=0.0, common_share=0.9999), np.arange(30, 36))
    np.testing.assert_allclose(mean, np.broadcast_to(shifts[:30].mean(0), mean.shape), atol=0.02)
    nearest = predicted(
        with_widths(found, feature_share=0.999, feature_linear=0.0, feature_scale=0.05), np.arange(30, 36)
    )
    np.testing.assert_allclose(nearest, shifts[:6], atol=0.1)


# ---- tables that say little --------------------------------------------------------------------------------------


@pytest.mark.parametrize("known", [0, 1, "the same"])
def test_fewer_than_two_rows_that_differ_are_not_used(known: int | str) -> None:
    """A single row is its own mean: distances from it were in units of nothing, and predictions exploded."""
    features, shifts = screen("informative")
    if known == "the same":
        features[:30] = features[0]
    else:
        features[known:30] = np.nan
    found = fitted(features, shifts, 30)
    assert found.moments is None
    assert any("Features are not used" in note for note in found.notes)
    new = predicted(found, np.arange(30, 36))
    assert np.abs(new).max() <= np.abs(shifts[:30].mean(0)).max() + 1e-6


def test_units_and_constant_columns_of_features_change_no_linear_prediction() -> None:
    features, shifts = screen("informative")
    linear = {"feature_share": 0.9, "feature_linear": 1.0}
    plain = predicted(with_widths(fitted(features, shifts, 30), **linear), np.arange(30, 36))
    other = np.column_stack([features * np.logspace(-3, 3, F) + 5, np.full(len(features), 7.0)])
    other[30:, -1] = 1e6  # nobody knows what this column does
    np.testing.assert_allclose(
        predicted(with_widths(fitted(other, shifts, 30), **linear), np.arange(30, 36)), plain, atol=1e-6
    )


def test_moments_are_those_of_training_components() -> None:
    features = np.array([[1.0, 5.0], [3.0, 5.0], [np.nan, np.nan], [100.0, 9.0]])
    moments = FeatureMoments.of(features, singles(np.array([0, 1, 2])))
    assert moments is not None and moments.size == 1
    np.testing.assert_allclose(moments.standardised(features[[0, 1, 3]]), [[-1, 0], [1, 0], [98, 0]])
