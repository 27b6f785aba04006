"""How far what is retrieved may be off: the covariance of errors between latent dimensions."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from scipy.optimize import nnls
from scipy.stats import norm
from scipy.stats import t as student_t

if TYPE_CHECKING:
    from scperturbdiff.retrieval._conditions import Floats
    from scperturbdiff.retrieval._settings import RetrievalSettings


def widening(n_independent: int) -> float:
    """By how much wider intervals are where errors were measured `n_independent` times (Student's t), two at least."""
    return float(student_t.ppf(0.9, n_independent - 1) / norm.ppf(0.9))


def variance_of_errors(excess: Floats, fold: Floats, n_populations: int) -> tuple[float, float]:
    """Variance of errors of log fold changes: a part that all genes share, and a part relative to the squared change.

    Parameters
    ----------
    excess
        Squared errors less the variance that is expected, `(n, n_genes)`.
    fold
        Predicted log fold changes, `(n, n_genes)`.
    n_populations
        Populations that were left out, two at least.
    """
    (constant, proportional), _ = nnls(np.stack([np.ones(fold.size), fold.ravel() ** 2], axis=1), excess.ravel())
    wider = widening(n_populations) ** 2
    return wider * float(constant), wider * float(proportional)


def error_factors(
    errors: Floats, shifts: Floats, noise: Floats, variance: Floats, n_independent: int, settings: RetrievalSettings
) -> Floats:
    """Directions in which predictions for conditions left out were off, `(n_latent, n_factors)`.

    Times the root of a prediction's variance, the outer product of the factors is the covariance of its error. It is
    pooled over conditions, less their sampling noise, and drawn towards the directions in which responses lie, all the
    more the fewer were left out.

    Parameters
    ----------
    errors
        Measured less predicted shifts, `(n, n_latent)`.
    shifts
        Measured shifts, `(n, n_latent)`.
    noise
        Their sampling variance per dimension, `(n,)`.
    variance
        Variance of the predictions per dimension, `(n,)`.
    n_independent
        Contexts or populations that were left out: intervals are wider where there are few (Student's t).
    settings
        Number of factors, weight of the directions of responses.
    """
    n, d = errors.shape
    measured = errors.T @ errors / n - noise.mean() * np.eye(d)
    responses = shifts.T @ shifts
    size, prior = max(float(np.trace(measured)), 0.0), settings.doubt_prior
    towards = responses * (size / max(float(np.trace(responses)), 1e-12))
    strength, axes = np.linalg.eigh((n * measured + prior * towards) / (n + prior))
    kept = np.argsort(-strength)[: settings.doubt_factors]
    wider = widening(n_independent)
    factors: Floats = (
        wider * axes[:, kept] * np.sqrt(np.maximum(strength[kept], 0) / max(float(variance.mean()), 1e-12))
    )
    return np.ascontiguousarray(factors)  # as they are after saving and loading: products round by the order of numbers
