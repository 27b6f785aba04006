"""Ordinary kriging: what is known of a perturbation is carried over whole, unless it may be noise."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from tests.retrieval.screens import D, responses, screen

from scperturbdiff.retrieval import Conditions, Retrieval, RetrievalSettings
from scperturbdiff.retrieval._kernel import Widths
from scperturbdiff.retrieval._lengths import Lengths, real_share


def elsewhere(known: Conditions, rows: list[int], away: float = 50.0) -> Conditions:
    """The same perturbations in contexts that nobody measured."""
    asked = known.take(np.array(rows))
    return replace(asked, context=np.full(len(rows), 99), control_mean=asked.control_mean + away)


def test_a_lone_shift_is_carried_over_whole() -> None:
    known = screen(n_contexts=1, n_perturbations=1, n_batches=1, noise=1e-9)
    shift = np.array([[2.0, -1.0, 0.5]])
    retrieval = Retrieval.fit(responses(known, shift, np.array([0.3]), np.array([-0.2])))
    found = retrieval.predict(elsewhere(known, [0]))
    assert found.novelty == ["context"]
    weight = found.shift[0] / shift[0]
    assert (weight > 0.98).all() and (weight <= 1).all()
    assert found.spread[0] == pytest.approx(0.3 * weight[0]) and found.library[0] == pytest.approx(-0.2 * weight[0])


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("near", [0.0, 0.5, 50.0])
def test_weights_of_what_is_known_of_a_perturbation_sum_to_one(share: float, near: float) -> None:
    """Wherever the context lies: shifts that are 1 in every context are predicted to be 1, and all others say 0."""
    known = screen(n_contexts=5, n_perturbations=3, n_batches=1, noise=1e-3)
    shift = np.repeat((known.component == 1).astype(float), D, axis=1)
    widths = Widths(context_scale=0.4, context_share=share, common_share=0.0)
    retrieval = Retrieval.fit(responses(known, shift))
    retrieval = replace(retrieval, lengths=None, widths=dict.fromkeys(retrieval.widths, widths))
    found = retrieval.predict(elsewhere(known, [1, 0], near)).shift
    np.testing.assert_allclose(found[0], 1, atol=0.02)
    np.testing.assert_allclose(found[1], 0, atol=1e-9)


@pytest.mark.parametrize("known_places", ["shared controls", "same means", "a constant dimension"])
def test_contexts_that_cannot_be_told_apart_are_no_trouble(known_places: str) -> None:
    known = screen(n_contexts=3, n_perturbations=5, n_batches=1, noise=0.01)
    place = known.control_mean.copy()
    if known_places == "a constant dimension":
        place[:, 1] = 0.0
    else:
        place[:] = place[0] if known_places == "shared controls" else place[:1].repeat(len(place), axis=0)
    context = np.zeros_like(known.context) if known_places == "shared controls" else known.context
    known = replace(known, control_mean=place, context=context)
    effect = np.random.default_rng(0).normal(size=(5, D))[known.component[:, 0]]
    shift = effect + 0.1 * np.random.default_rng(1).normal(size=effect.shape)
    retrieval = Retrieval.fit(responses(known, shift))
    assert retrieval.median_distance > 0
    for novelty in ("seen", "replicate", "pair", "context"):
        found = retrieval.predict(known, novelty)
        for part in (found.shift, found.variance, found.prior_variance):
            assert np.isfinite(part).all()
    np.testing.assert_allclose(retrieval.predict(elsewhere(known, [0, 6])).shift, effect[[0, 6]], atol=0.4)


def test_unexplained_variance_is_a_share() -> None:
    """Although the prior of means is flat; for a dose far from the others, too."""
    known = screen(n_contexts=2, n_perturbations=4, n_batches=2, noise=0.01)
    known = replace(known, dose=np.tile([[0.0], [1.0]], (len(known) // 2, 1)))
    effect = np.random.default_rng(0).normal(size=(4, D))[known.component[:, 0]] * (1 + known.dose)
    retrieval = Retrieval.fit(responses(known, effect))
    asked = known.take(np.zeros(3, np.int64))
    asked = replace(asked, dose=np.array([[0.0], [40.0], [0.0]]), component=np.array([[0], [0], [9]]))
    found = retrieval.predict(asked)
    assert found.novelty == ["seen", "pair", "perturbation"]
    share = found.variance / found.prior_variance
    assert share[0] < 0.2 and share[0] < share[1] <= 1 and 0.9 < share[2] <= 1


def test_shifts_are_kept_unless_they_may_be_noise() -> None:
    shift = np.array([[1.0, 1.0], [1.0, 1.0], [1.0, 1.0], [0.0, 0.0], [2.0, 0.0]])
    noise = np.array([0.0, 0.5, 0.75, 1.0, 2.0])
    np.testing.assert_allclose(real_share(shift, noise), [1, 1, 0.5, 0, 0], atol=1e-12)


def test_what_is_all_noise_is_not_predicted() -> None:
    """One context with a shift that is as large as its noise."""
    known = screen(n_contexts=1, n_perturbations=4, n_batches=1, noise=1.0)
    shift = np.full((4, D), 0.1)
    found = Retrieval.fit(responses(known, shift, np.ones(4), np.ones(4))).predict(elsewhere(known, [0, 3]))
    for part in (found.shift, found.spread, found.library):
        np.testing.assert_array_equal(part, 0)


@pytest.mark.parametrize("n_contexts", [3, 4])
def test_lengths_need_contexts_to_be_judged_by(n_contexts: int) -> None:
    known = screen(n_contexts=n_contexts, n_perturbations=2, n_batches=1, noise=1e-4)
    n = len(known)
    retrieval = replace(
        Retrieval.fit(responses(known, np.ones((n, D)))), lengths=Lengths(np.arange(n), 2 * np.ones(n), np.ones(n))
    )
    factor = retrieval._length("context", np.arange(n)[None], np.ones((1, n)))[0]
    assert factor == (1.0 if n_contexts < RetrievalSettings().min_contexts_for_length else 1.5)


@pytest.mark.parametrize("n_contexts", [1, 2])
def test_of_few_contexts_no_widths_are_chosen_for_new_ones(n_contexts: int) -> None:
    known = screen(n_contexts=n_contexts, n_perturbations=6, n_batches=2, noise=0.01)
    shift = np.random.default_rng(0).normal(size=(len(known), D))
    assert Retrieval.fit(responses(known, shift)).widths["context"] == Widths()


def test_rows_of_a_population_are_left_out_together() -> None:
    known = screen(n_contexts=3, n_perturbations=3, n_batches=2)
    n = len(known)
    known = replace(known, population=np.arange(n) // 2, state=np.arange(n) % 2, mass=np.full(n, 0.5))
    assert (known.site != known.context).any() and len(np.unique(known.site)) == 6 == len(known.site_means())
    retrieval = Retrieval.fit(responses(known, np.random.default_rng(0).normal(size=(n, D))))
    before = retrieval.leave_out("replicate").shift
    shift = retrieval.responses.shift.copy()
    shift[[4, 5]] += 1000  # both states of population 2
    changed = replace(retrieval, responses=replace(retrieval.responses, shift=shift)).leave_out("replicate").shift
    np.testing.assert_allclose(changed[[4, 5]], before[[4, 5]], atol=1e-4)
    assert np.abs(changed - before).max() > 1


def test_three_contexts_cannot_rule_out_that_near_ones_respond_alike() -> None:
    """Leaving out the one that lies apart speaks for the mean of all. It is no reason to ignore it where it is near."""
    known = screen(n_contexts=3, n_perturbations=1, n_batches=1, noise=1e-3)
    place = np.array([[0.0, 0, 0], [1.0, 0, 0], [0.5, 4, 0]])
    shift = np.array([[1.0, 1.2, 0], [1.0, -1.2, 0], [1.0, 0, 2]])
    retrieval = Retrieval.fit(responses(replace(known, control_mean=place), shift))
    near = replace(known.take(np.array([2])), context=np.array([9]), control_mean=place[2:] + 0.3)
    assert retrieval.predict(near, "context").shift[0, 2] > 0.9


def test_many_contexts_choose_how_alike_near_ones_respond() -> None:
    """Responses that follow the place of their context, or have nothing to do with it."""
    known = screen(n_contexts=24, n_perturbations=2, n_batches=1, noise=1e-3)
    rng = np.random.default_rng(3)
    effect = np.array([[1.0, 0, 0], [0, 1.0, 0]])[known.component[:, 0]]
    local = effect + np.tanh(known.control_mean / 3)
    scattered = effect + rng.normal(size=(24, D))[known.context]
    settings = RetrievalSettings(max_contexts=0)  # no similarities are learned
    found = [Retrieval.fit(responses(known, shift), settings=settings) for shift in (local, scattered)]
    shares = [retrieval.widths["context"].context_share for retrieval in found]
    assert shares[0] > 0.5 and shares[1] < 0.2
