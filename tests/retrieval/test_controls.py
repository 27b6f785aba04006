"""The mean of a few controls is off; other conditions from the same controls tell by how much."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from tests.retrieval.screens import responses

from scperturbdiff.retrieval import Conditions, Retrieval, RetrievalSettings
from scperturbdiff.retrieval._kernel import Widths

D, CONTEXTS, PERTURBATIONS, TREATED, CONTROL = 12, 6, 10, 0.02, 0.2
"""Latent dimensions, design, and sampling variances of treated and of control means."""


def screen(effect: float, seed: int = 0) -> tuple[Conditions, np.ndarray, np.ndarray, np.ndarray]:
    """All conditions of a screen, measured shifts, true shifts from the true means of controls, and their errors."""
    rng = np.random.default_rng(seed)
    context, component = np.indices((CONTEXTS, PERTURBATIONS)).reshape(2, -1)
    centre, off = 3 * rng.normal(size=(CONTEXTS, D)), np.sqrt(CONTROL) * rng.normal(size=(CONTEXTS, D))
    true = effect * rng.normal(size=(PERTURBATIONS, D))[component]
    n = len(context)
    shift = true - off[context] + np.sqrt(TREATED) * rng.normal(size=(n, D))
    noise, control = np.full(n, TREATED + CONTROL), np.full(n, CONTROL)
    known = Conditions(
        (centre + off)[context], component[:, None], np.zeros((n, 1)), context, noise, control_noise=control
    )
    return known, shift, true, off


def fit(known: Conditions, shift: np.ndarray, rows: np.ndarray) -> Retrieval:
    return Retrieval.fit(responses(known.take(rows), shift[rows]), settings=RetrievalSettings(n_left_out=100))


@pytest.mark.parametrize(("effect", "least"), [(0.0, 0.1), (0.2, 0.2), (1.0, 1.0)])
def test_the_error_of_the_controls_is_predicted_where_others_have_it(effect: float, least: float) -> None:
    """It matters where effects are weak, and does no harm where they are strong."""
    known, shift, true, off = screen(effect)
    held = (known.context + known.component[:, 0]) % 4 == 0
    rows, asked = np.flatnonzero(~held), known.take(np.flatnonzero(held))
    wanted = (true - off[known.context])[held]
    found = fit(known, shift, rows).predict(asked)
    without = fit(replace(known, control_noise=np.zeros(len(known))), shift, rows).predict(
        replace(asked, control_noise=np.zeros(len(asked)))
    )
    error, before = (((part.shift - wanted) ** 2).mean() for part in (found, without))
    assert error < 0.1 * CONTROL
    assert error < least * before


def test_other_controls_of_the_context_have_other_errors() -> None:
    known, shift, _, off = screen(0.0)
    held = (known.context + known.component[:, 0]) % 4 == 0
    retrieval, asked = fit(known, shift, np.flatnonzero(~held)), known.take(np.flatnonzero(held))
    elsewhere = replace(asked, control_mean=asked.control_mean + np.sqrt(2 * CONTROL))
    same, other = (((retrieval.predict(part).shift + off[part.context]) ** 2).mean() for part in (asked, elsewhere))
    assert same < 0.3 * CONTROL < other


def test_cells_that_are_encoded_again_are_the_same() -> None:
    """Latent vectors may have been kept in half precision."""
    known, shift, _, _ = screen(0.0)
    retrieval, asked = fit(known, shift, np.arange(9, len(known))), known.take(np.arange(9))
    rounded = replace(asked, control_mean=asked.control_mean.astype(np.float16).astype(np.float64))
    np.testing.assert_allclose(retrieval.predict(rounded).shift, retrieval.predict(asked).shift, atol=0.02)


def test_what_is_explained_is_the_response_not_the_noise() -> None:
    """Without any effect nothing is explained, though most of the measured shifts is predicted."""
    known, shift, _, off = screen(0.0, seed=1)
    retrieval = fit(known, shift, np.arange(len(known)))
    left_out = retrieval.leave_out("pair").shift
    assert ((left_out + off[known.context]) ** 2).mean() < 0.3 * CONTROL
    assert not retrieval.explained["pair"] > 0.2


def test_weights_are_those_of_a_model_with_the_errors_as_unknowns() -> None:
    """Brute force: shifts are responses plus an error for each set of controls plus noise."""
    known, shift, _, _ = screen(0.5)
    widths, rows, asked = Widths(context_scale=0.7, nugget=0.1), np.arange(7, len(known)), np.arange(7)
    fitted = Retrieval(
        responses(known.take(rows), shift[rows]), median_distance=5.0, signal=0.4, widths={"pair": widths}
    )
    bare = replace(known, control_noise=np.zeros(len(known)))
    belongs = (known.context[:, None] == np.arange(CONTEXTS)).astype(float)
    covariance = fitted._kernel(widths)(bare, bare) + belongs @ belongs.T * CONTROL / 0.4
    system = covariance[np.ix_(rows, rows)] + np.eye(len(rows)) * (0.1 + TREATED / 0.4)
    wanted = np.linalg.solve(system, covariance[np.ix_(rows, asked)]).T @ shift[rows]
    found = fitted.predict(known.take(asked), "pair").shift
    length = np.linalg.norm(found, axis=1) / np.linalg.norm(wanted, axis=1)  # what may be noise is made shorter
    assert ((length > 0.5) & (length < 1 + 1e-9)).all()
    np.testing.assert_allclose(found, wanted * length[:, None], atol=1e-9)
