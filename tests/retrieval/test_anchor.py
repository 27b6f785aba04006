"""The retrieved anchor: Gaussian-process regression that never uses what it claims not to know."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest

from scperturbdiff.retrieval import Conditions, ResponseAnchor
from scperturbdiff.retrieval._conditions import NOVELTIES
from scperturbdiff.retrieval._kernel import ResponseKernel, Widths
from scperturbdiff.retrieval._retrieval import Calibration

D = 3
"""Latent dimensions."""
EVERY = ("seen", "replicate", "pair", "context", "perturbation")


def screen(n_contexts: int = 4, n_perturbations: int = 3, n_batches: int = 2, noise: float = 0.05, seed: int = 0):
    """Conditions of every perturbation in every context and batch, a context's controls lying together."""
    rng = np.random.default_rng(seed)
    context, perturbation, _ = np.array(
        list(itertools.product(range(n_contexts), range(n_perturbations), range(n_batches)))
    ).T
    centre = 3 * rng.normal(size=(n_contexts, D))
    return Conditions(
        centre[context] + 0.05 * rng.normal(size=(len(context), D)),
        perturbation[:, None],
        np.zeros((len(context), 1)),
        context,
        np.full(len(context), noise),
    )


def fitted(conditions: Conditions, seed: int = 0, **kwargs) -> ResponseAnchor:
    """An anchor on random shifts, with kernel widths that use everything, so that any leak shows."""
    anchor = ResponseAnchor(**kwargs)
    shifts = np.random.default_rng(seed).normal(size=(len(conditions), D))
    anchor.fit(conditions, shifts, None, np.random.default_rng(seed + 1).normal(size=len(conditions)))
    anchor.gains.clear()
    for novelty in EVERY:
        anchor.widths[novelty] = Widths(context_scale=3.0, context_share=0.3, common_share=0.5, nugget=0.05)
    return anchor


def kernel(anchor: ResponseAnchor, widths: Widths, a: Conditions, i: int, b: Conditions, j: int) -> float:
    """Prior covariance of two conditions, from the definition (no features)."""
    apart = np.linalg.norm(a.control_mean[i] - b.control_mean[j])
    near = math.exp(-0.5 * (apart / (widths.context_scale * anchor.median_distance)) ** 2)
    alike = 0.0
    for p, dose_p in zip(a.component[i], a.dose[i], strict=True):
        for q, dose_q in zip(b.component[j], b.dose[j], strict=True):
            if p >= 0 and p == q:
                alike += math.exp(-0.5 * (dose_p - dose_q) ** 2)
    perturbations = widths.common_share + (1 - widths.common_share) * alike
    return (1 - widths.context_share + widths.context_share * near) * perturbations


def by_formula(anchor: ResponseAnchor, widths: Widths, query: Conditions, allowed: np.ndarray):
    """Mean and variance of the Gaussian process for one query from the training conditions `allowed`."""
    known, signal = anchor.train_conditions, anchor.signal
    assert known is not None and anchor.shifts is not None
    covariance = np.array([[kernel(anchor, widths, known, i, known, j) for j in allowed] for i in allowed])
    covariance += np.diag(widths.nugget + known.noise[allowed] / signal)
    to_known = np.array([kernel(anchor, widths, query, 0, known, j) for j in allowed])
    weights = np.linalg.inv(covariance) @ to_known
    prior = kernel(anchor, widths, query, 0, query, 0)
    return weights @ anchor.shifts[allowed], signal * (prior + widths.nugget - weights @ to_known)


def allowed_for(query: Conditions, known: Conditions, novelty: str) -> np.ndarray:
    same_context = known.context == query.context[0]
    mine = {(c, d) for c, d in zip(query.component[0], query.dose[0], strict=True) if c >= 0}
    theirs = [
        {(c, d) for c, d in zip(cs, ds, strict=True) if c >= 0}
        for cs, ds in zip(known.component, known.dose, strict=True)
    ]
    same = np.array([t == mine for t in theirs])
    shared = np.array([bool({c for c, _ in t} & {c for c, _ in mine}) for t in theirs])
    forbidden = {"pair": same_context & same, "context": same_context, "perturbation": shared}
    return np.flatnonzero(~forbidden.get(novelty, np.zeros(len(same), bool)))


def test_the_novelties_are_those_tested() -> None:
    assert set(EVERY) == set(NOVELTIES)


@pytest.mark.parametrize("novelty", EVERY)
def test_prediction_equals_the_formula(novelty) -> None:
    known = screen()
    anchor = fitted(known)
    for row in (0, 7, 23):
        query = replace(known.take(np.array([row])), control_mean=known.control_mean[[row]] + 0.3)
        mean, variance = by_formula(anchor, anchor.widths[novelty], query, allowed_for(query, known, novelty))
        found = anchor.predict(query, novelty)
        np.testing.assert_allclose(found.mean[0], mean, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(found.variance[0], variance, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("novelty", ["pair", "context", "perturbation"])
def test_what_a_novelty_forbids_is_never_used(novelty) -> None:
    known = screen()
    anchor = fitted(known)
    query = known.take(np.array([5]))
    before = anchor.predict(query, novelty).mean
    allowed = allowed_for(query, known, novelty)
    forbidden = np.setdiff1d(np.arange(len(known)), allowed)
    assert len(forbidden) and len(allowed)
    anchor.shifts[forbidden] += 1000
    np.testing.assert_allclose(anchor.predict(query, novelty).mean, before, rtol=0, atol=1e-4)
    anchor.shifts[allowed] += 1
    assert np.abs(anchor.predict(query, novelty).mean - before).min() > 0.1


@pytest.mark.parametrize("novelty", ["replicate", "pair", "context", "perturbation"])
def test_a_condition_left_out_does_not_see_itself(novelty) -> None:
    known = screen()
    anchor = fitted(known)
    before = anchor.leave_out(novelty).mean
    for row in (0, 11):
        kept = anchor.shifts.copy()
        anchor.shifts[row] += 1000
        after = anchor.leave_out(novelty).mean
        np.testing.assert_allclose(after[row], before[row], rtol=0, atol=1e-4)
        assert np.abs(after - before).max() > 1  # others do see it
        anchor.shifts = kept
    assert np.abs(anchor.leave_out("seen").mean - anchor.leave_out("replicate").mean).max() > 0.01


def test_leaving_out_is_predicting_from_the_rest() -> None:
    known = screen()
    anchor = fitted(known)
    widths = anchor.widths["context"]
    found = anchor.leave_out("context")
    for row in (2, 15):
        query = known.take(np.array([row]))
        mean, variance = by_formula(anchor, widths, query, allowed_for(query, known, "context"))
        np.testing.assert_allclose(found.mean[row], mean, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(found.variance[row], variance, rtol=1e-5, atol=1e-6)


def test_nearest_neighbours_are_those_most_correlated() -> None:
    known = screen(n_contexts=5, n_perturbations=4, n_batches=3)
    anchor = fitted(known, n_neighbors=12)
    query = replace(known.take(np.array([17])), control_mean=known.control_mean[[17]] + 0.2)
    widths = anchor.widths["seen"]
    correlation = [kernel(anchor, widths, query, 0, known, j) for j in range(len(known))]
    mean, variance = by_formula(anchor, widths, query, np.argsort(correlation)[-12:])
    found = anchor.predict(query, "seen")
    np.testing.assert_allclose(found.mean[0], mean, rtol=1e-6)
    np.testing.assert_allclose(found.variance[0], variance, rtol=1e-6)


def test_far_away_the_anchor_knows_nothing() -> None:
    known = screen()
    anchor = fitted(known)
    widths = Widths(context_scale=0.5, context_share=1.0, nugget=0.05)
    anchor.widths["context"] = widths
    near, far = known.take(np.array([0])), known.take(np.array([0]))
    far = replace(far, control_mean=far.control_mean + 1000, context=np.array([-1]))
    near = replace(near, context=np.array([-1]))
    found = anchor.predict(far, "context")
    np.testing.assert_allclose(found.mean, 0, atol=1e-9)
    np.testing.assert_allclose(found.variance, anchor.signal * (1 + widths.nugget), rtol=1e-6)
    close = anchor.predict(near, "context")
    assert np.abs(close.mean).max() > 0.1 and close.variance[0] < 0.5 * found.variance[0]


def test_many_exact_replicates_pin_the_anchor_down() -> None:
    known = screen(n_contexts=1, n_perturbations=2, n_batches=40, noise=0.01)
    anchor = ResponseAnchor()
    truth = np.array([[1.0, 0.0, -2.0], [0.5, 0.5, 0.5]])
    rng = np.random.default_rng(1)
    anchor.fit(known, truth[known.component[:, 0]] + 0.1 * rng.normal(size=(len(known), D)), None)
    found = anchor.predict(known.take(np.array([0, 40])), "seen")
    np.testing.assert_allclose(found.mean, truth, atol=0.1)


def test_order_does_not_matter() -> None:
    known = screen()
    anchor, shuffled = fitted(known), ResponseAnchor()
    order = np.random.default_rng(3).permutation(len(known))
    shuffled.fit(known.take(order), anchor.shifts[order], None)
    shuffled.widths = anchor.widths
    shuffled.gains.clear()
    queries = known.take(np.array([3, 9]))
    for novelty in EVERY:
        ours, theirs = anchor.predict(queries, novelty), shuffled.predict(queries, novelty)
        np.testing.assert_allclose(ours.mean, theirs.mean, rtol=1e-6, atol=1e-8)
        np.testing.assert_allclose(ours.variance, theirs.variance, rtol=1e-6, atol=1e-8)


def test_order_of_components_does_not_matter() -> None:
    anchor = fitted(screen())
    there = Conditions(np.zeros((1, D)), np.array([[0, 2]]), np.array([[0.5, -1.0]]), np.array([0]), np.full(1, 0.1))
    back = replace(there, component=there.component[:, ::-1], dose=there.dose[:, ::-1])
    for novelty in EVERY:
        np.testing.assert_allclose(anchor.predict(there, novelty).mean, anchor.predict(back, novelty).mean)
    assert there.same_perturbation(back).all()


def test_combinations_add_up() -> None:
    """With independent responses of components the shift of A+B is that of A plus that of B."""
    known = screen(n_contexts=1, n_perturbations=3, n_batches=1, noise=1e-6)
    anchor = ResponseAnchor()
    shifts = np.array([[1.0, 0.0, 0.0], [0.0, 2.0, 0.0], [5.0, 5.0, 5.0]])
    anchor.fit(known, shifts, None)
    anchor.gains.clear()
    anchor.widths["pair"] = Widths(context_share=0.0, common_share=0.0, nugget=1e-6)
    pair = Conditions(known.control_mean[:1], np.array([[0, 1]]), np.zeros((1, 2)), np.zeros(1, np.int64), np.zeros(1))
    np.testing.assert_allclose(anchor.predict(pair, "pair").mean[0], [1.0, 2.0, 0.0], atol=1e-3)


def test_doses_are_near_or_far() -> None:
    conditions = screen(n_contexts=1, n_perturbations=1, n_batches=2, noise=1e-6)
    known = replace(conditions, dose=np.array([[0.0], [6.0]]))
    anchor = ResponseAnchor()
    anchor.fit(known, np.array([[1.0] * D, [-1.0] * D]), None)
    anchor.gains.clear()
    anchor.widths["pair"] = Widths(context_share=0.0, common_share=0.0, nugget=1e-6, dose_scale=1.0)
    asked = replace(conditions, dose=np.array([[0.3], [5.7]]))
    found = anchor.predict(asked, "pair").mean[:, 0]
    assert found[0] == pytest.approx(math.exp(-0.045), abs=1e-3) and found[1] == pytest.approx(-found[0], abs=1e-3)


def test_features_carry_an_unseen_component() -> None:
    """Component 3 was never seen; its features are those of component 1."""
    known = screen(n_contexts=2, n_perturbations=3)
    features = np.array([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0], [0.0, 1.0, 0.0]])
    shifts = np.eye(3)[known.component[:, 0]]
    anchor = ResponseAnchor()
    anchor.fit(known, shifts, features)
    anchor.gains.clear()
    anchor.widths["perturbation"] = Widths(context_share=0.0, common_share=0.0, feature_share=0.9, nugget=0.01)
    query = replace(known.take(np.array([0])), component=np.array([[3]]))
    found = anchor.predict(query, "perturbation", features).mean[0]
    assert found[1] > 0.7 and abs(found[0]) < 0.2 and abs(found[2]) < 0.2
    unknown = features.copy()
    unknown[3] = np.nan
    np.testing.assert_allclose(anchor.predict(query, "perturbation", unknown).mean, 0, atol=1e-8)


@pytest.mark.parametrize("novelty", ["replicate", "pair", "context"])
def test_widths_are_chosen_to_predict_what_is_left_out(novelty) -> None:
    """Where contexts respond alike, the anchor must find the mean over contexts; where each is its own, give up."""
    known = screen(n_contexts=6, n_perturbations=3, n_batches=2, noise=0.01)
    rng = np.random.default_rng(5)
    own = rng.normal(size=(3, D))[known.component[:, 0]]
    alike = own + 0.1 * rng.normal(size=own.shape)
    anchor = ResponseAnchor()
    anchor.fit(known, alike, None)
    assert ((anchor.leave_out(novelty).mean - own) ** 2).mean() < 0.1**2
    unlike = rng.normal(size=own.shape)
    anchor.fit(known, unlike, None)
    error = ((anchor.leave_out(novelty).mean - unlike) ** 2).mean()
    assert error < 1.25 * (unlike**2).mean()
    for widths in (Widths(), Widths(nugget=0.01, context_share=0.0, common_share=0.6)):
        anchor.widths[novelty] = widths
        assert error <= 1.001 * ((anchor.leave_out(novelty).mean - unlike) ** 2).mean()


def test_responses_that_follow_the_controls_are_interpolated() -> None:
    rng = np.random.default_rng(2)
    place = np.repeat(np.linspace(0, 4, 20), 2)[:, None]
    known = Conditions(
        place, np.tile([[0], [1]], (20, 1)), np.zeros((40, 1)), np.repeat(np.arange(20), 2), np.full(40, 0.001)
    )
    shifts = np.where(known.component == 0, np.sin(2 * place), np.cos(2 * place)) + 0.02 * rng.normal(size=(40, 1))
    anchor = ResponseAnchor()
    anchor.fit(known, shifts, None)
    inner = slice(4, 36)
    error = (anchor.leave_out("context").mean - shifts)[inner]
    assert (error**2).mean() < 0.05 * (shifts[inner] ** 2).mean()


def test_state_survives_a_round_trip() -> None:
    anchor = fitted(screen())
    other = ResponseAnchor()
    assert not other.is_fitted and other.get_extra_state() == {}
    other.set_extra_state(anchor.get_extra_state())
    queries = screen(seed=4).take(np.array([0, 6, 13]))
    for novelty in EVERY:
        ours, theirs = anchor.predict(queries, novelty), other.predict(queries, novelty)
        assert np.array_equal(ours.mean, theirs.mean) and np.array_equal(ours.variance, theirs.variance)
    other.set_extra_state({})
    assert not other.is_fitted


def test_the_novelty_of_a_condition_is_recognised() -> None:
    known = screen()
    anchor = fitted(known.take(np.flatnonzero((known.context != 1) | (known.component[:, 0] != 2))))
    asked = Conditions(
        np.zeros((6, D)),
        np.array([[0], [2], [0], [9], [9], [0]]),
        np.array([[0.0], [0.0], [0.0], [0.0], [0.0], [1.0]]),
        np.array([0, 1, -1, 0, -1, 0]),
        np.zeros(6),
    )
    assert anchor.novelty(asked) == ["seen", "pair", "context", "perturbation", "perturbation", "pair"]


def test_padding_of_components_does_not_matter() -> None:
    """A single perturbation is the same one whether or not combinations stand beside it in the table."""
    singles = screen()
    known = replace(
        singles,
        component=np.pad(singles.component, ((0, 0), (0, 1)), constant_values=-1),
        dose=np.pad(singles.dose, ((0, 0), (0, 1))),
    )
    narrow, wide = singles.take(np.array([0, 7])), known.take(np.array([0, 7]))
    assert np.array_equal(narrow.same_perturbation(known), wide.same_perturbation(known))
    anchor = fitted(known)
    assert anchor.novelty(narrow) == anchor.novelty(wide) == ["seen", "seen"]
    for novelty in EVERY:
        np.testing.assert_allclose(anchor.predict(narrow, novelty).mean, anchor.predict(wide, novelty).mean)


# ---- length of the shift, spread of the cells ------------------------------------------------------------------------


def test_the_length_is_that_of_similar_conditions() -> None:
    """Left out, conditions of one family turn out longer than predicted, of the other shorter."""
    known = screen(n_contexts=8, n_perturbations=1, n_batches=1, noise=1e-4)
    anchor = fitted(known)
    long = known.context < 4
    anchor.gains["context"] = Calibration(np.arange(8), np.where(long, 1.3, 0.6), np.ones(8))
    similar = np.stack([long, ~long, np.ones(8), np.zeros(8)]).astype(float)
    np.testing.assert_allclose(anchor._gain("context", similar), [1.3, 0.6, 0.95, 1.0], atol=0.01)
    plain = fitted(known).predict(known.take(np.array([0])), "context").mean
    longer = anchor.predict(known.take(np.array([0])), "context").mean
    ratio = longer / plain
    assert ratio.min() > 1 / 1.5 and np.ptp(ratio) < 1e-9  # a factor on the whole shift


def test_averages_of_unlike_directions_are_lengthened() -> None:
    """Shifts of equal length in scattered directions: their mean is short, their common part is kept."""
    rng = np.random.default_rng(0)
    known = screen(n_contexts=40, n_perturbations=1, n_batches=1, noise=0.01)
    shifts = np.ones((40, D)) + 0.5 * rng.normal(size=(40, D))
    anchor = ResponseAnchor()
    anchor.fit(known, shifts, None)
    gains = anchor.gains["context"]
    assert gains.explained.sum() / gains.predicted.sum() == pytest.approx(1.0, abs=0.1)
    anchor.widths["context"] = Widths(context_share=0.0, common_share=0.0, nugget=5.0)  # shrinks far too much
    anchor.gains.clear()
    short = anchor.leave_out("context").mean
    measured = (short * shifts).sum(1), (short**2).sum(1)
    anchor.gains["context"] = Calibration(np.arange(40), *measured)
    mended = anchor.leave_out("context").mean
    assert ((mended - shifts) ** 2).mean() < ((short - shifts) ** 2).mean()


def test_without_evidence_the_length_is_left_alone() -> None:
    known = screen(noise=50.0)
    anchor = ResponseAnchor()
    anchor.fit(known, 0.01 * np.random.default_rng(0).normal(size=(len(known), D)), None)
    weights = np.ones((1, len(known)))
    np.testing.assert_allclose(anchor._gain("context", weights), 1.0, atol=1e-3)


def test_spread_follows_the_nearest_contexts() -> None:
    known = screen(n_contexts=6, n_perturbations=1, n_batches=2, noise=0.01)
    shifts = np.ones((len(known), D)) + 0.1 * known.control_mean
    spread = np.where(known.context < 3, -0.5, 0.5)
    anchor = ResponseAnchor()
    anchor.fit(known, shifts, None, spread)
    anchor.widths["context"] = Widths(context_scale=0.2, context_share=1.0, nugget=0.001)
    query = replace(known.take(np.array([0, 11])), context=np.array([-1, -1]))
    np.testing.assert_allclose(anchor.predict(query, "context").spread, [-0.5, 0.5], atol=0.05)
    far = replace(query, control_mean=query.control_mean + 1000)
    np.testing.assert_allclose(anchor.predict(far, "context").spread, 0, atol=1e-9)


# ---- similarities learned from responses -----------------------------------------------------------------------------


def matrix_normal(seed: int, structured: bool, n_contexts: int = 7, n_perturbations: int = 18, n_latent: int = 12):
    """Responses with covariances of contexts and perturbations that controls do not show; a quarter held out."""
    rng = np.random.default_rng(seed)
    contexts = rng.normal(size=(n_contexts, 2)) if structured else 2 * np.eye(n_contexts)
    perturbations = rng.normal(size=(n_perturbations, 3)) if structured else 2 * np.eye(n_perturbations)
    core = rng.normal(size=(contexts.shape[1], perturbations.shape[1], n_latent))
    response = np.einsum("ci,pj,ijd->cpd", contexts, perturbations, core) + 0.1 * rng.normal(
        size=(n_contexts, n_perturbations, n_latent)
    )
    context, component = np.indices((n_contexts, n_perturbations)).reshape(2, -1)
    place = rng.normal(size=(n_contexts, n_latent))
    conditions = Conditions(
        place[context], component[:, None], np.zeros((len(context), 1)), context, np.full(len(context), 0.01)
    )
    test = rng.permutation(len(context)) % 4 == 0
    return conditions, response.reshape(-1, n_latent), test


@pytest.mark.parametrize("seed", [0, 1])
def test_similarities_are_learned_where_responses_have_them(seed) -> None:
    conditions, shifts, test = matrix_normal(seed, structured=True)
    anchor = ResponseAnchor()
    anchor.fit(conditions.take(np.flatnonzero(~test)), shifts[~test], None)
    assert anchor.widths["pair"].response_share > 0
    held_out = conditions.take(np.flatnonzero(test))

    def error() -> float:
        return float(((anchor.predict(held_out, "pair").mean - shifts[test]) ** 2).mean())

    learned = error()
    anchor.widths["pair"] = replace(anchor.widths["pair"], response_share=0.0)
    assert learned < 0.5 * error()
    assert learned < 0.2 * (shifts[test] ** 2).mean()


def test_no_similarity_is_invented() -> None:
    """Independent responses: what learning promises on left-out conditions must hold on held-out ones."""
    conditions, shifts, test = matrix_normal(0, structured=False)
    anchor = ResponseAnchor()
    anchor.fit(conditions.take(np.flatnonzero(~test)), shifts[~test], None)
    found = anchor.predict(conditions.take(np.flatnonzero(test)), "pair").mean
    assert ((found - shifts[test]) ** 2).mean() < 1.15 * (shifts[test] ** 2).mean()


def test_a_pair_left_out_is_unknown_to_its_similarities() -> None:
    """The similarities that predict a left-out condition do not change with its response."""
    conditions, shifts, _ = matrix_normal(2, structured=True)
    first, second = ResponseAnchor(), ResponseAnchor()
    first.fit(conditions, shifts, None)
    changed = shifts.copy()
    changed[17] += 5.0
    second.fit(conditions, changed, None)
    second.signal = first.signal
    second.widths = first.widths
    fold = first._fold[17]
    ours, theirs = first._folds[fold], second._folds[fold]
    scale = np.trace(ours.context_covariance) / np.trace(theirs.context_covariance)
    np.testing.assert_allclose(scale * theirs.context_covariance, ours.context_covariance, rtol=0.05, atol=0.05)
    assert np.abs(first._folds[(fold + 1) % 5].factors).max() > 0


def test_learned_similarities_survive_a_round_trip() -> None:
    conditions, shifts, test = matrix_normal(1, structured=True)
    anchor, other = ResponseAnchor(), ResponseAnchor()
    anchor.fit(conditions.take(np.flatnonzero(~test)), shifts[~test], None)
    other.set_extra_state(anchor.get_extra_state())
    held_out = conditions.take(np.flatnonzero(test))
    assert np.array_equal(anchor.predict(held_out, "pair").mean, other.predict(held_out, "pair").mean)
    assert np.array_equal(anchor.leave_out("pair").mean, other.leave_out("pair").mean)


def test_components_that_came_later_are_unrelated() -> None:
    conditions, shifts, _ = matrix_normal(1, structured=True)
    anchor = ResponseAnchor()
    anchor.fit(conditions, shifts, None)
    assert anchor.learned is not None
    new = replace(conditions.take(np.array([0])), component=np.array([[99]]))
    alike = ResponseKernel(Widths())._doses
    assert anchor.learned(new, conditions, alike).max() == 0
    assert anchor.learned(new, new, alike)[0, 0] > 0
    elsewhere = replace(conditions.take(np.array([0])), context=np.array([-1]))
    assert np.abs(anchor.learned(elsewhere, conditions, alike)).max() == 0
