"""Errors of what is retrieved: their covariance, from conditions that were left out."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from scipy.stats import norm
from scipy.stats import t as student_t
from tests.retrieval.screens import D, responses, screen

from scperturbdiff.retrieval import FoldEvidence, Retrieval, RetrievalSettings
from scperturbdiff.retrieval._doubt import error_factors, variance_of_errors, widening

SETTINGS = RetrievalSettings()
DIRECTIONS = np.array([[2.0, 0.0, 1.0, 0.0], [0.0, 1.0, 0.0, 0.0]])


def errors(n: int, noise: float, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return rng.normal(size=(n, 2)) @ DIRECTIONS + noise**0.5 * rng.normal(size=(n, 4))


@pytest.mark.parametrize("noise", [0.0, 0.5])
@pytest.mark.parametrize("variance", [1.0, 4.0])
def test_the_covariance_of_many_errors_is_found(noise: float, variance: float) -> None:
    """Sampling noise is taken off; in units of the variance that was expected."""
    n = 20_000
    found = errors(n, noise)
    shifts = np.random.default_rng(1).normal(size=(n, 4))
    factors = error_factors(found, shifts, np.full(n, noise), np.full(n, variance), n, SETTINGS)
    np.testing.assert_allclose(variance * factors @ factors.T, DIRECTIONS.T @ DIRECTIONS, atol=0.15)


def test_intervals_are_wider_where_few_were_left_out() -> None:
    found = errors(50, 0.0)
    sizes = [error_factors(found, found, np.zeros(50), np.ones(50), n, SETTINGS) for n in (3, 10, 10_000)]
    for n, factors in zip((3, 10), sizes, strict=False):
        wider = student_t.ppf(0.9, n - 1) / norm.ppf(0.9)
        np.testing.assert_allclose(np.linalg.norm(factors), wider * np.linalg.norm(sizes[-1]), rtol=1e-3)


def test_errors_that_are_no_more_than_noise_leave_no_doubt() -> None:
    noise = np.full(200, 4.0)
    factors = error_factors(0.1 * errors(200, 1.0), errors(200, 1.0), noise, np.ones(200), 200, SETTINGS)
    assert not factors.any()


def test_of_one_error_directions_of_responses_are_doubted() -> None:
    shifts = np.outer(np.linspace(-1, 1, 30), [1.0, 0.0, 0.0, 0.0])
    settings = replace(SETTINGS, doubt_prior=1e6)
    factors = error_factors(errors(30, 0.0), shifts, np.zeros(30), np.ones(30), 30, settings)
    assert np.abs(factors[1:]).max() < 1e-2 * np.abs(factors[0]).max()


@pytest.mark.parametrize("n_contexts", [SETTINGS.doubt_min - 1, SETTINGS.doubt_min])
def test_new_contexts_are_doubted_where_contexts_could_be_left_out(n_contexts: int) -> None:
    known = screen(n_contexts=n_contexts, n_perturbations=4)
    shift = np.random.default_rng(0).normal(size=(len(known), D))
    retrieval = Retrieval.fit(responses(known, shift))
    assert ("context" in retrieval.doubt) == (n_contexts >= SETTINGS.doubt_min)
    assert "pair" in retrieval.doubt and "perturbation" not in retrieval.doubt
    again = Retrieval.from_state(retrieval.state()).doubt
    for way, factors in retrieval.doubt.items():
        np.testing.assert_array_equal(again[way], factors)


@pytest.mark.parametrize(("constant", "proportional"), [(0.0, 0.0), (0.02, 0.0), (0.0, 0.3), (0.02, 0.3)])
def test_the_variance_of_errors_of_genes_is_found(constant: float, proportional: float) -> None:
    """Genes that hardly change tell the first, those that do the second; sampling noise is taken off."""
    rng = np.random.default_rng(0)
    fold = rng.normal(size=(20, 4000)) * (rng.random((20, 4000)) < 0.2)
    noise = rng.uniform(0.01, 0.1, fold.shape)
    errors = rng.normal(size=fold.shape) * np.sqrt(noise + constant + proportional * fold**2)
    found = variance_of_errors(errors**2 - noise, fold, 10_000)
    np.testing.assert_allclose(found, (constant, proportional), rtol=0.1, atol=0.006)
    few = variance_of_errors(errors**2 - noise, fold, 3)
    np.testing.assert_allclose(few, np.array(found) * (widening(3) / widening(10_000)) ** 2)
    assert variance_of_errors(-noise, fold, 20) == (0.0, 0.0)


def test_errors_are_drawn_with_their_variance() -> None:
    fold = np.repeat([0.0, 1.0, -2.0], 20_000)
    none = np.zeros(1)
    evidence = FoldEvidence(none, none, none, constant=0.1, proportional=0.5)
    drawn = evidence.errors(fold, np.random.default_rng(0)).reshape(3, -1)
    np.testing.assert_allclose(drawn.var(1), [0.1, 0.6, 2.1], rtol=0.05)
    assert not evidence.exact and FoldEvidence(none, none, none).exact
