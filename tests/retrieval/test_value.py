"""Retrieval as a value: immutable, saved and loaded, the same whatever else is asked for and in whatever order."""

from __future__ import annotations

import copy
import io
from dataclasses import FrozenInstanceError, fields, replace
from typing import Any

import numpy as np
import pytest
import torch
from tests.retrieval.screens import matrix_normal, responses

from scperturbdiff.retrieval import Conditions, Novelty, Responses, Retrieval, RetrievalSettings, Retrieved
from scperturbdiff.retrieval._retrieval import LEFT_OUT, VERSION

EVERY: tuple[Novelty, ...] = ("seen", *LEFT_OUT)
FIELDS = ("shift", "variance", "prior_variance", "spread", "library", "residual", "fold")


def rich(seed: int = 1) -> tuple[Responses, np.ndarray]:
    """Responses with everything in them: combinations, doses, genes, features, learnable similarities."""
    conditions, shift, _ = matrix_normal(seed, structured=True, n_contexts=5, n_perturbations=9, n_latent=6)
    rng = np.random.default_rng(seed)
    n = len(conditions)
    component = np.pad(conditions.component, ((0, 0), (0, 1)), constant_values=-1)
    dose = np.pad(rng.integers(-1, 2, (n, 1)).astype(float), ((0, 0), (0, 1)))
    component[:4, 1], dose[:4, 1] = [5, 6, 7, 8], 1.0
    conditions = replace(conditions, component=component, dose=dose)
    twice = np.concatenate([np.arange(n), np.arange(0, n, 4)])  # some have a replicate
    conditions = replace(conditions.take(twice), population=np.arange(len(twice)))
    shift = shift[twice] + 0.1 * rng.normal(size=(len(twice), 6))
    features = rng.normal(size=(13, 4))
    features[10] = np.nan
    genes = rng.normal(size=(len(twice), 3)).astype(np.float16)
    return responses(conditions, shift, rng.normal(size=len(twice)), rng.normal(size=len(twice)), genes), features


@pytest.fixture(scope="module")
def retrieval() -> Retrieval:
    return Retrieval.fit(*rich())


@pytest.fixture(scope="module")
def asked() -> Conditions:
    """Conditions that are new in every way."""
    known = rich()[0].conditions
    some = known.take(np.arange(0, 30, 2))
    context, component = some.context.copy(), some.component.copy()
    context[2:5], component[5, 0], component[6, 0], component[8, 1] = -1, 12, 10, 3
    return replace(some, context=context, component=component, control_mean=some.control_mean + 0.1)


def assert_equal(a: Retrieved, b: Retrieved) -> None:
    assert a.novelty == b.novelty
    for name in FIELDS:
        np.testing.assert_array_equal(getattr(a, name), getattr(b, name), err_msg=name)


def arrays(value: Any) -> list[np.ndarray]:
    if isinstance(value, np.ndarray | float):
        return [np.asarray(value)]
    return [a for f in fields(value) for a in arrays(getattr(value, f.name))]


@pytest.mark.parametrize("name", [f.name for f in fields(Retrieval)])
def test_no_field_can_be_set(retrieval: Retrieval, name: str) -> None:
    with pytest.raises(FrozenInstanceError):
        setattr(retrieval, name, None)


def test_fitting_and_predicting_change_nothing_they_are_given(asked: Conditions) -> None:
    measured, features = rich()
    given = [*arrays(measured), *arrays(asked), features]
    before = copy.deepcopy(given)
    retrieval = Retrieval.fit(measured, features)
    state = copy.deepcopy(retrieval.state())
    for novelty in (None, *EVERY):
        retrieval.predict(asked, novelty)
    retrieval.with_features(np.vstack([features, features])).predict(asked)
    retrieval.leave_out("pair", np.array([3, 1]))
    for now, then in zip(given, before, strict=True):
        np.testing.assert_array_equal(now, then)
    assert str(retrieval.state()) == str(state)


def test_fitting_twice_gives_the_same(retrieval: Retrieval, asked: Conditions) -> None:
    assert_equal(Retrieval.fit(*rich()).predict(asked), retrieval.predict(asked))


@pytest.mark.parametrize("n_neighbors", [7, 192])
def test_a_prediction_does_not_depend_on_the_others_in_the_call(asked: Conditions, n_neighbors: int) -> None:
    """To the last bit, whether or not every training condition is used, and whatever was asked before."""
    retrieval = Retrieval.fit(*rich(), RetrievalSettings(n_neighbors=n_neighbors))
    for novelty in (None, *EVERY):
        together = retrieval.predict(asked, novelty)
        assert len(set(together.novelty)) == (4 if novelty is None else 1)
        reverse = retrieval.predict(asked.take(slice(None, None, -1)), novelty)
        for i in range(len(asked)):
            alone = replace(retrieval).predict(asked.take(slice(i, i + 1)), novelty)  # with nothing remembered
            for name in FIELDS:
                one = getattr(alone, name)[0]
                assert np.array_equal(getattr(together, name)[i], one), (novelty, i, name)
                assert np.array_equal(getattr(reverse, name)[len(asked) - 1 - i], one), (novelty, i, name)


@pytest.mark.parametrize("seed", [0, 1])
def test_the_order_of_training_populations_does_not_matter(retrieval: Retrieval, asked: Conditions, seed: int) -> None:
    measured, features = rich()
    order = np.random.default_rng(seed).permutation(len(measured))
    shuffled = Retrieval.fit(measured.take(order), features)
    assert shuffled.widths == retrieval.widths
    assert shuffled.explained == pytest.approx(retrieval.explained, rel=1e-6, abs=1e-9, nan_ok=True)
    for novelty in (None, *EVERY):
        ours, theirs = retrieval.predict(asked, novelty), shuffled.predict(asked, novelty)
        for name in FIELDS:
            np.testing.assert_allclose(getattr(theirs, name), getattr(ours, name), rtol=1e-5, atol=1e-6, err_msg=name)
        if novelty is not None:
            left_out = retrieval.leave_out(novelty).shift[order]
            np.testing.assert_allclose(shuffled.leave_out(novelty).shift, left_out, rtol=1e-5, atol=1e-6)


# ---- saving ----------------------------------------------------------------------------------------------------------


def saved_and_loaded(state: dict[str, Any]) -> dict[str, Any]:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def test_a_state_loads_without_running_code_and_predicts_the_same(retrieval: Retrieval, asked: Conditions) -> None:
    assert retrieval.similarity is not None and retrieval.lengths is not None and retrieval.moments is not None
    again = Retrieval.from_state(saved_and_loaded(retrieval.state()))
    for novelty in (None, *EVERY):
        assert_equal(again.predict(asked, novelty), retrieval.predict(asked, novelty))
        if novelty is not None:
            assert_equal(again.leave_out(novelty), retrieval.leave_out(novelty))
    assert again.settings == retrieval.settings and again.widths == retrieval.widths
    assert again.explained == retrieval.explained and again.notes == retrieval.notes
    assert again.responses.residual.dtype == np.float16


def test_a_state_without_features_or_similarities_loads(asked: Conditions) -> None:
    measured = rich()[0].take(np.array([0, 1]))
    plain = Retrieval.fit(measured)
    assert plain.features is None and plain.similarity is None
    assert_equal(Retrieval.from_state(saved_and_loaded(plain.state())).predict(asked), plain.predict(asked))


@pytest.mark.parametrize("version", [VERSION + 1, None])
def test_a_state_of_another_version_is_refused(retrieval: Retrieval, version: int | None) -> None:
    state = {**retrieval.state(), "version": version}
    with pytest.raises(ValueError, match=f"format {version}; this version reads {VERSION}"):
        Retrieval.from_state(state)


def test_a_state_of_unknown_parts_is_refused(retrieval: Retrieval) -> None:
    state = retrieval.state()
    state["retrieval"]["strength"] = {"kind": "Elsewhere"}
    with pytest.raises(ValueError, match="holds a 'Elsewhere'"):
        Retrieval.from_state(state)


# ---- what is explained -----------------------------------------------------------------------------------------------


def conditions_of(n_contexts: int, n_perturbations: int, n_replicates: int, noise: float = 1e-9) -> Conditions:
    context, component, _ = np.indices((n_contexts, n_perturbations, n_replicates)).reshape(3, -1)
    place = np.random.default_rng(0).normal(size=(n_contexts, 5))
    n = len(context)
    return Conditions(place[context], component[:, None], np.zeros((n, 1)), context, np.full(n, noise))


def test_responses_that_are_alike_everywhere_are_explained() -> None:
    known = conditions_of(4, 6, 2)
    shift = np.random.default_rng(1).normal(size=(6, 5))[known.component[:, 0]]
    found = Retrieval.fit(responses(known, shift)).explained
    assert found["replicate"] == pytest.approx(1, abs=0.01)
    assert found["pair"] == pytest.approx(1, abs=0.01) and found["context"] == pytest.approx(1, abs=0.01)
    assert np.isnan(found["perturbation"])  # without features nothing is said of it


def test_responses_that_follow_features_are_explained_for_new_perturbations() -> None:
    known = conditions_of(2, 30, 1)
    rng = np.random.default_rng(1)
    features = rng.normal(size=(30, 2))
    shift = (features @ rng.normal(size=(2, 5)))[known.component[:, 0]]
    assert Retrieval.fit(responses(known, shift), features).explained["perturbation"] > 0.95


def test_nothing_is_said_where_nothing_can_be_left_out() -> None:
    known = conditions_of(1, 6, 1)
    shift = np.random.default_rng(1).normal(size=(6, 5))
    found = Retrieval.fit(responses(known, shift)).explained
    assert set(found) == set(LEFT_OUT)
    assert np.isnan(found["context"]) and np.isnan(found["replicate"])
    assert np.isnan(list(Retrieval.fit(responses(conditions_of(1, 1, 1), shift[:1])).explained.values())).all()


@pytest.mark.parametrize("seed", range(3))
def test_independent_responses_are_not_explained(seed: int) -> None:
    known = conditions_of(6, 8, 2)
    shift = np.random.default_rng(seed).normal(size=(len(known), 5))
    found = Retrieval.fit(responses(known, shift)).explained
    for novelty in ("replicate", "pair", "context"):
        assert -0.2 < found[novelty] < 0.1, novelty  # means are carried over whole, at the cost of their noise


def test_sampling_noise_is_taken_off_both_sides() -> None:
    """Half of the variance of shifts is noise: what can be explained is explained nearly all the same."""
    known = conditions_of(6, 5, 2, noise=1.0)
    rng = np.random.default_rng(3)
    shift = rng.normal(size=(5, 5))[known.component[:, 0]] + rng.normal(size=(len(known), 5))
    found = Retrieval.fit(responses(known, shift)).explained
    assert found["replicate"] > 0.8 and found["context"] > 0.8
