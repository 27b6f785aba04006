"""Retrieval: Gaussian-process regression that never uses what it claims not to know."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import get_args

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.retrieval.screens import D, matrix_normal, responses, screen

from scperturbdiff.retrieval import Conditions, Novelty, Retrieval, RetrievalSettings
from scperturbdiff.retrieval._kernel import ResponseKernel, Widths
from scperturbdiff.retrieval._retrieval import LEFT_OUT, Lengths

EVERY: tuple[Novelty, ...] = ("seen", "replicate", "pair", "context", "perturbation")


def fitted(conditions: Conditions, seed: int = 0, settings: RetrievalSettings | None = None) -> Retrieval:
    """Retrieval of random shifts, with kernel widths that use everything, so that any leak shows."""
    shift = np.random.default_rng(seed).normal(size=(len(conditions), D))
    spread = np.random.default_rng(seed + 1).normal(size=len(conditions))
    widths = Widths(context_scale=3.0, context_share=0.3, common_share=0.5, nugget=0.05)
    found = Retrieval.fit(responses(conditions, shift, spread), settings=settings)
    return replace(found, lengths=None, widths=dict.fromkeys(EVERY, widths))


def with_widths(retrieval: Retrieval, novelty: Novelty, widths: Widths) -> Retrieval:
    return replace(retrieval, widths={**retrieval.widths, novelty: widths})


def with_shift(retrieval: Retrieval, rows: np.ndarray | int, add: float) -> Retrieval:
    """The same with other measured shifts, everything that was chosen left as it was."""
    shift = retrieval.responses.shift.copy()
    shift[rows] += add
    return replace(retrieval, responses=replace(retrieval.responses, shift=shift))


def kernel(
    retrieval: Retrieval, widths: Widths, a: Conditions, i: int, b: Conditions, j: int, mean_variance: float = 1.0
) -> float:
    """Prior covariance of two conditions, from the definition (no features, doses alike)."""
    apart = np.linalg.norm(a.control_mean[i] - b.control_mean[j])
    near = math.exp(-0.5 * (apart / (widths.context_scale * retrieval.median_distance)) ** 2)
    alike = 0.0
    for p, dose_p in zip(a.component[i], a.dose[i], strict=True):
        for q, dose_q in zip(b.component[j], b.dose[j], strict=True):
            if p >= 0 and p == q:
                alike += math.exp(-0.5 * (dose_p - dose_q) ** 2)
    perturbations = widths.common_share + (1 - widths.common_share) * alike
    return (mean_variance + widths.context_share * near) * perturbations


def by_formula(
    retrieval: Retrieval, widths: Widths, query: Conditions, allowed: np.ndarray
) -> tuple[np.ndarray, float, float]:
    """Mean, variance and prior variance for one query from the conditions `allowed`.

    Weights are those of a Gaussian process with an almost flat prior of means; their error is that under a proper one.
    """
    known, signal = retrieval.responses.conditions, retrieval.signal
    noise = np.diag(widths.nugget + known.noise[allowed] / signal)

    def system(mean_variance: float) -> tuple[np.ndarray, np.ndarray]:
        pairs = [[kernel(retrieval, widths, known, i, known, j, mean_variance) for j in allowed] for i in allowed]
        to_known = [kernel(retrieval, widths, query, 0, known, j, mean_variance) for j in allowed]
        return np.array(pairs) + noise, np.array(to_known)

    weights = np.linalg.solve(*system(retrieval.settings.mean_variance))
    covariance, to_known = system(1.0)
    prior = kernel(retrieval, widths, query, 0, query, 0) + widths.nugget
    variance = prior - 2 * weights @ to_known + weights @ covariance @ weights
    shift = weights @ retrieval.responses.shift[allowed]
    real = np.clip(2 * (1 - weights**2 @ known.noise[allowed] / (shift**2).mean()), 0, 1)
    return real * shift, signal * min(variance, prior), signal * prior


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
    assert set(EVERY) == set(get_args(Novelty)) == {"seen", *LEFT_OUT}


@pytest.mark.parametrize("novelty", EVERY)
def test_prediction_equals_the_formula(novelty: Novelty) -> None:
    known = screen()
    retrieval = fitted(known)
    for row in (0, 7, 23):
        query = replace(known.take(np.array([row])), control_mean=known.control_mean[[row]] + 0.3)
        allowed = allowed_for(query, known, novelty)
        mean, variance, prior = by_formula(retrieval, retrieval.widths[novelty], query, allowed)
        found = retrieval.predict(query, novelty)
        np.testing.assert_allclose(found.shift[0], mean, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(found.variance[0], variance, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(found.prior_variance[0], prior, rtol=1e-9)
        assert found.novelty == [novelty]


@pytest.mark.parametrize("novelty", ["pair", "context", "perturbation"])
def test_what_a_novelty_forbids_is_never_used(novelty: Novelty) -> None:
    known = screen()
    retrieval = fitted(known)
    query = known.take(np.array([5]))
    before = retrieval.predict(query, novelty).shift
    allowed = allowed_for(query, known, novelty)
    forbidden = np.setdiff1d(np.arange(len(known)), allowed)
    assert len(forbidden) and len(allowed)
    after = with_shift(retrieval, forbidden, 1000).predict(query, novelty).shift
    np.testing.assert_allclose(after, before, rtol=0, atol=1e-4)
    assert np.abs(with_shift(retrieval, allowed, 1).predict(query, novelty).shift - before).min() > 0.1


@pytest.mark.parametrize("novelty", ["replicate", "pair", "context", "perturbation"])
def test_a_condition_left_out_does_not_see_itself(novelty: Novelty) -> None:
    retrieval = fitted(screen())
    before = retrieval.leave_out(novelty).shift
    for row in (0, 11):
        after = with_shift(retrieval, row, 1000).leave_out(novelty).shift
        np.testing.assert_allclose(after[row], before[row], rtol=0, atol=1e-4)
        assert np.abs(after - before).max() > 1  # others do see it
    assert np.abs(retrieval.leave_out("seen").shift - retrieval.leave_out("replicate").shift).max() > 0.01


def test_leaving_out_is_predicting_from_the_rest() -> None:
    known = screen()
    retrieval = fitted(known)
    found, some = retrieval.leave_out("context"), retrieval.leave_out("context", np.array([15, 2]))
    for row, of_some in ((2, 1), (15, 0)):
        query = known.take(np.array([row]))
        allowed = allowed_for(query, known, "context")
        mean, variance, _ = by_formula(retrieval, retrieval.widths["context"], query, allowed)
        for part, at in ((found, row), (some, of_some)):
            np.testing.assert_allclose(part.shift[at], mean, rtol=1e-5, atol=1e-6)
            np.testing.assert_allclose(part.variance[at], variance, rtol=1e-5, atol=1e-6)


def test_nearest_neighbours_are_those_most_correlated() -> None:
    known = screen(n_contexts=5, n_perturbations=4, n_batches=3)
    retrieval = fitted(known, settings=RetrievalSettings(n_neighbors=12))
    query = replace(known.take(np.array([17])), control_mean=known.control_mean[[17]] + 0.2)
    widths = retrieval.widths["seen"]
    flat = retrieval.settings.mean_variance
    correlation = [kernel(retrieval, widths, query, 0, known, j, flat) for j in range(len(known))]
    mean, variance, _ = by_formula(retrieval, widths, query, np.argsort(correlation)[-12:])
    found = retrieval.predict(query, "seen")
    np.testing.assert_allclose(found.shift[0], mean, rtol=1e-6)
    np.testing.assert_allclose(found.variance[0], variance, rtol=1e-6)


def test_far_away_a_context_gets_what_the_perturbation_does_on_average() -> None:
    known = screen(noise=1e-4)
    widths = Widths(context_scale=0.1, context_share=1.0, common_share=0.0, nugget=0.01)
    retrieval = with_widths(fitted(known), "context", widths)
    near = replace(known.take(np.array([0])), context=np.array([-1]))
    far = replace(near, control_mean=near.control_mean + 1000)
    found, close = retrieval.predict(far, "context"), retrieval.predict(near, "context")
    same = known.component[:, 0] == 0
    np.testing.assert_allclose(found.shift[0], retrieval.responses.shift[same].mean(0), atol=0.05)
    assert found.variance[0] > 0.5 * found.prior_variance[0] > 2 * close.variance[0]


@pytest.mark.parametrize("common", [0.0, 0.5])
def test_of_an_unknown_perturbation_only_what_all_do_is_known(common: float) -> None:
    known = screen(noise=1e-4)
    widths = Widths(common_share=common, context_share=0.3, nugget=0.01)
    retrieval = with_widths(fitted(known), "perturbation", widths)
    found = retrieval.predict(replace(known.take(np.array([0])), component=np.array([[7]])))
    assert found.novelty == ["perturbation"]
    open_ = found.variance[0] / found.prior_variance[0]
    if common:
        assert 1 - common < open_ < 1
    else:
        np.testing.assert_array_equal(found.shift, 0)
        assert open_ == pytest.approx(1)


def test_many_exact_replicates_pin_the_response_down() -> None:
    known = screen(n_contexts=1, n_perturbations=2, n_batches=40, noise=0.01)
    truth = np.array([[1.0, 0.0, -2.0], [0.5, 0.5, 0.5]])
    rng = np.random.default_rng(1)
    retrieval = Retrieval.fit(responses(known, truth[known.component[:, 0]] + 0.1 * rng.normal(size=(len(known), D))))
    np.testing.assert_allclose(retrieval.predict(known.take(np.array([0, 40])), "seen").shift, truth, atol=0.1)


def test_order_of_components_does_not_matter() -> None:
    retrieval = fitted(screen())
    there = Conditions(np.zeros((1, D)), np.array([[0, 2]]), np.array([[0.5, -1.0]]), np.array([0]), np.full(1, 0.1))
    back = replace(there, component=there.component[:, ::-1], dose=there.dose[:, ::-1])
    for novelty in EVERY:
        np.testing.assert_allclose(retrieval.predict(there, novelty).shift, retrieval.predict(back, novelty).shift)
    assert there.same_perturbation(back).all()


def test_combinations_add_up() -> None:
    """With independent responses of components the shift of A+B is that of A plus that of B."""
    known = screen(n_contexts=1, n_perturbations=3, n_batches=1, noise=1e-6)
    shifts = np.array([[1.0, 0.0, 0.0], [0.0, 2.0, 0.0], [5.0, 5.0, 5.0]])
    widths = Widths(context_share=0.0, common_share=0.0, nugget=1e-6)
    retrieval = with_widths(Retrieval.fit(responses(known, shifts)), "pair", widths)
    pair = Conditions(known.control_mean[:1], np.array([[0, 1]]), np.zeros((1, 2)), np.zeros(1, np.int64), np.zeros(1))
    np.testing.assert_allclose(retrieval.predict(pair, "pair").shift[0], [1.0, 2.0, 0.0], atol=1e-3)


def test_doses_are_near_or_far() -> None:
    conditions = screen(n_contexts=1, n_perturbations=1, n_batches=2, noise=1e-6)
    known = replace(conditions, dose=np.array([[0.0], [6.0]]))
    widths = Widths(context_share=0.0, common_share=0.0, nugget=1e-6, dose_scale=1.0)
    retrieval = with_widths(Retrieval.fit(responses(known, np.array([[1.0] * D, [-1.0] * D]))), "pair", widths)
    asked = replace(conditions, dose=np.array([[0.3], [5.7]]))
    found = retrieval.predict(asked, "pair").shift[:, 0]
    assert found[0] == pytest.approx(math.exp(-0.045), abs=1e-3) and found[1] == pytest.approx(-found[0], abs=1e-3)


def test_features_carry_an_unseen_component() -> None:
    """Component 3 was never seen; its features are those of component 1."""
    known = screen(n_contexts=2, n_perturbations=3)
    features = np.array([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0], [0.0, 1.0, 0.0]])
    shifts = np.eye(3)[known.component[:, 0]]
    widths = Widths(context_share=0.0, common_share=0.0, feature_share=0.9, nugget=0.01)
    retrieval = with_widths(Retrieval.fit(responses(known, shifts), features[:3]), "perturbation", widths)
    query = replace(known.take(np.array([0])), component=np.array([[3]]))
    found = retrieval.with_features(features).predict(query).shift[0]
    assert found[1] > 0.7 and abs(found[0]) < 0.2 and abs(found[2]) < 0.2
    unknown = features.copy()
    unknown[3] = np.nan
    np.testing.assert_allclose(retrieval.with_features(unknown).predict(query, "perturbation").shift, 0, atol=1e-8)
    assert retrieval.features is not None and len(retrieval.features) == 3


@pytest.mark.parametrize("novelty", ["replicate", "pair", "context"])
def test_widths_are_chosen_to_predict_what_is_left_out(novelty: Novelty) -> None:
    """Where contexts respond alike, retrieval must find the mean over contexts; where each is its own, give up."""
    known = screen(n_contexts=6, n_perturbations=3, n_batches=2, noise=0.01)
    rng = np.random.default_rng(5)
    own = rng.normal(size=(3, D))[known.component[:, 0]]
    alike = own + 0.1 * rng.normal(size=own.shape)
    retrieval = Retrieval.fit(responses(known, alike))
    assert ((retrieval.leave_out(novelty).shift - own) ** 2).mean() < 0.1**2
    unlike = rng.normal(size=own.shape)
    retrieval = Retrieval.fit(responses(known, unlike))
    error = ((retrieval.leave_out(novelty).shift - unlike) ** 2).mean()
    assert error < 1.25 * (unlike**2).mean()
    for widths in (Widths(), Widths(nugget=0.01, context_share=0.0, common_share=0.6)):
        other = with_widths(retrieval, novelty, widths)
        assert error <= 1.001 * ((other.leave_out(novelty).shift - unlike) ** 2).mean()


def test_responses_that_follow_the_controls_are_interpolated() -> None:
    rng = np.random.default_rng(2)
    place = np.repeat(np.linspace(0, 4, 20), 2)[:, None]
    known = Conditions(
        place, np.tile([[0], [1]], (20, 1)), np.zeros((40, 1)), np.repeat(np.arange(20), 2), np.full(40, 0.001)
    )
    shifts = np.where(known.component == 0, np.sin(2 * place), np.cos(2 * place)) + 0.02 * rng.normal(size=(40, 1))
    retrieval = Retrieval.fit(responses(known, shifts))
    inner = slice(4, 36)
    error = (retrieval.leave_out("context").shift - shifts)[inner]
    assert (error**2).mean() < 0.05 * (shifts[inner] ** 2).mean()


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
    retrieval = fitted(known)
    assert retrieval.predict(narrow).novelty == retrieval.predict(wide).novelty == ["seen", "seen"]
    for novelty in EVERY:
        np.testing.assert_allclose(retrieval.predict(narrow, novelty).shift, retrieval.predict(wide, novelty).shift)


@pytest.mark.parametrize("novelty", EVERY)
def test_all_of_a_response_is_retrieved_with_the_weights_of_shifts(novelty: Novelty) -> None:
    rng = np.random.default_rng(0)
    n = 12
    conditions = Conditions(
        rng.normal(size=(n, D)), rng.integers(0, 3, (n, 1)), np.zeros((n, 1)), np.arange(n) % 4, np.full(n, 0.1)
    )
    shift = rng.normal(size=(n, D))
    measured = responses(conditions, shift, shift[:, 1], shift[:, 0], shift.astype(np.float16))
    retrieval = replace(Retrieval.fit(measured), lengths=None)
    found = retrieval.predict(conditions, novelty)
    np.testing.assert_allclose(found.residual, found.shift, atol=5e-3)
    np.testing.assert_allclose(found.library, found.shift[:, 0])
    np.testing.assert_allclose(found.spread, found.shift[:, 1])
    assert retrieval.leave_out(novelty).residual.shape == (n, 0)


# ---- length of the shift, spread of the cells ------------------------------------------------------------------------


def test_the_length_is_that_of_similar_conditions() -> None:
    """Left out, conditions of one family turn out longer than predicted, of the other shorter."""
    known = screen(n_contexts=8, n_perturbations=1, n_batches=1, noise=1e-4)
    long = known.context < 4
    lengths = Lengths(np.arange(8), np.where(long, 1.3, 0.6), np.ones(8))
    retrieval = replace(fitted(known), lengths=lengths)
    similar = np.stack([long, ~long, np.ones(8), np.zeros(8)]).astype(float)
    every = np.tile(np.arange(8), (4, 1))
    np.testing.assert_allclose(retrieval._length("context", every, similar), [1.3, 0.6, 0.95, 1.0], atol=0.01)


@pytest.mark.parametrize(("measured", "wanted"), [(1.3, 1.3), (0.6, 0.6), (9.0, 1.5), (0.01, 0.5), (-1.0, 0.5)])
def test_shifts_for_new_contexts_are_as_long_as_they_should_have_been(measured: float, wanted: float) -> None:
    """A factor on the whole shift, within bounds; spread and the other ways of being new are left alone."""
    known = screen(n_contexts=8, n_perturbations=1, n_batches=1, noise=1e-4)
    plain = fitted(known)
    corrected = replace(plain, lengths=Lengths(np.arange(8), np.full(8, measured), np.ones(8)))
    query = known.take(np.array([0, 5]))
    before, after = (r.predict(query, "context") for r in (plain, corrected))
    np.testing.assert_allclose(after.shift, wanted * before.shift, rtol=1e-3)
    np.testing.assert_array_equal(after.spread, before.spread)
    for novelty in ("seen", "replicate", "pair", "perturbation"):
        np.testing.assert_array_equal(corrected.predict(query, novelty).shift, plain.predict(query, novelty).shift)


def test_averages_of_unlike_directions_are_lengthened() -> None:
    """Shifts of equal length in scattered directions: their mean is short, their common part is kept."""
    rng = np.random.default_rng(7)
    known = screen(n_contexts=40, n_perturbations=1, n_batches=1, noise=0.01)
    shifts = np.ones((40, D)) + 0.5 * rng.normal(size=(40, D))
    retrieval = Retrieval.fit(responses(known, shifts))
    lengths = retrieval.lengths
    assert lengths is not None
    assert lengths.explained.sum() / lengths.predicted.sum() == pytest.approx(1.0, abs=0.1)
    short = Widths(context_share=0.0, common_share=0.0, nugget=20.0)  # shrinks far too much
    shrinking = RetrievalSettings(mean_variance=1.0)  # the mean, too
    retrieval = with_widths(replace(retrieval, lengths=None, settings=shrinking), "context", short)
    plain = retrieval.leave_out("context").shift
    mended = replace(retrieval, lengths=Lengths(np.arange(40), (plain * shifts).sum(1), (plain**2).sum(1)))
    assert ((mended.leave_out("context").shift - shifts) ** 2).mean() < 0.8 * ((plain - shifts) ** 2).mean()


def test_without_evidence_the_length_is_left_alone() -> None:
    known = screen(noise=50.0)
    shift = 0.01 * np.random.default_rng(0).normal(size=(len(known), D))
    retrieval = Retrieval.fit(responses(known, shift))
    assert retrieval.lengths is not None
    every = np.arange(len(known))[None]
    np.testing.assert_allclose(retrieval._length("context", every, np.ones_like(every)), 1.0, atol=1e-3)


def test_spread_follows_the_nearest_contexts() -> None:
    known = screen(n_contexts=6, n_perturbations=1, n_batches=2, noise=0.01)
    shifts = np.ones((len(known), D)) + 0.1 * known.control_mean
    spread = np.where(known.context < 3, -0.5, 0.5)
    widths = Widths(context_scale=0.2, context_share=1.0, nugget=0.001)
    retrieval = with_widths(Retrieval.fit(responses(known, shifts, spread)), "context", widths)
    query = replace(known.take(np.array([0, 11])), context=np.array([-1, -1]))
    np.testing.assert_allclose(retrieval.predict(query, "context").spread, [-0.5, 0.5], atol=0.05)
    far = replace(query, control_mean=query.control_mean + 1000)
    np.testing.assert_allclose(retrieval.predict(far, "context").spread, 0, atol=0.05)  # the mean over contexts


# ---- similarities learned from responses -----------------------------------------------------------------------------


@pytest.mark.parametrize("seed", [0, 1])
def test_similarities_are_learned_where_responses_have_them(seed: int) -> None:
    conditions, shifts, test = matrix_normal(seed, structured=True)
    retrieval = Retrieval.fit(responses(conditions.take(np.flatnonzero(~test)), shifts[~test]))
    pair = retrieval.widths["pair"]
    assert pair.response_share > 0
    held_out = conditions.take(np.flatnonzero(test))

    def error(of: Retrieval) -> float:
        return float(((of.predict(held_out, "pair").shift - shifts[test]) ** 2).mean())

    learned = error(retrieval)
    assert learned < 0.5 * error(with_widths(retrieval, "pair", replace(pair, response_share=0.0)))
    assert learned < 0.2 * (shifts[test] ** 2).mean()
    assert f"{pair.response_share:.0%} of the similarity is learned" in retrieval.notes[0]


def test_no_similarity_is_invented() -> None:
    """Independent responses: what learning promises on left-out conditions must hold on held-out ones."""
    conditions, shifts, test = matrix_normal(0, structured=False)
    retrieval = Retrieval.fit(responses(conditions.take(np.flatnonzero(~test)), shifts[~test]))
    found = retrieval.predict(conditions.take(np.flatnonzero(test)), "pair").shift
    assert ((found - shifts[test]) ** 2).mean() < 1.15 * (shifts[test] ** 2).mean()


def test_a_pair_left_out_is_unknown_to_its_similarities() -> None:
    """The similarities that predict a left-out condition do not change with its response."""
    conditions, shifts, _ = matrix_normal(2, structured=True, n_contexts=5, n_perturbations=12)
    changed = shifts.copy()
    changed[17] += 5.0
    first, second = (Retrieval.fit(responses(conditions, shift)).similarity for shift in (shifts, changed))
    assert first is not None and second is not None
    fold = first.fold[17]
    ours, theirs = first.folds[fold], second.folds[fold]
    scale = np.trace(ours.context_covariance) / np.trace(theirs.context_covariance)
    np.testing.assert_allclose(scale * theirs.context_covariance, ours.context_covariance, rtol=0.05, atol=0.05)
    assert np.abs(first.folds[(fold + 1) % 5].factors).max() > 0


def test_components_that_came_later_are_unrelated() -> None:
    conditions, shifts, _ = matrix_normal(1, structured=True, n_contexts=5, n_perturbations=8)
    similarity = Retrieval.fit(responses(conditions, shifts)).similarity
    assert similarity is not None
    learned = similarity.whole
    new = replace(conditions.take(np.array([0])), component=np.array([[99]]))
    alike = ResponseKernel(Widths())._doses
    assert learned(new, conditions, alike).max() == 0
    assert learned(new, new, alike)[0, 0] > 0
    elsewhere = replace(conditions.take(np.array([0])), context=np.array([-1]))
    assert np.abs(learned(elsewhere, conditions, alike)).max() == 0


def test_too_many_contexts_are_noted() -> None:
    conditions, shifts, _ = matrix_normal(0, structured=True, n_perturbations=4)
    few = Retrieval.fit(responses(conditions, shifts), settings=RetrievalSettings(max_contexts=6))
    assert few.similarity is None and "7 contexts, more than 6" in few.notes[0]
    alone = Retrieval.fit(responses(conditions.take(np.array([0])), shifts[:1]))
    assert "too few conditions" in alone.notes[0]


@pytest.mark.parametrize("n_batches", [1, 3])
def test_a_single_context_carries_its_shift_over_whole(n_batches: int) -> None:
    """Nothing can be left out that would tell how far, so a far context gets what the mean shift would say."""
    known = screen(n_contexts=1, n_perturbations=2, n_batches=n_batches, noise=0.01)
    shift = np.array([[3.0, 0.0, 0.0], [0.0, -2.0, 1.0]])[known.component[:, 0]]
    found = Retrieval.fit(responses(known, shift))
    asked = replace(
        known.take(np.array([0, len(known) - 1])), control_mean=np.full((2, D), 50.0), context=np.ones(2, int)
    )
    got = found.predict(asked)
    assert got.novelty == ["context", "context"]
    np.testing.assert_allclose(got.shift, shift[[0, -1]], atol=0.2)


@given(common_share=st.floats(0, 1), seed=st.integers(0, 9))
def test_the_response_to_a_combination_is_the_sum_of_those_to_its_components(common_share: float, seed: int) -> None:
    """What all perturbations have in common is brought along by each component."""
    rng = np.random.default_rng(seed)
    component = np.array([(0, -1), (1, -1), (2, -1), (0, 1), (1, 2)])
    means = np.repeat(rng.normal(size=(1, 3)), len(component), 0)
    conditions = Conditions(means, component, np.zeros((5, 2)), np.zeros(5, np.int64), np.zeros(5))
    covariance = ResponseKernel(Widths(common_share=common_share), mean_variance=100.0)(conditions, conditions)
    np.testing.assert_allclose(covariance[3], covariance[0] + covariance[1])
    np.testing.assert_allclose(covariance[4], covariance[1] + covariance[2])
