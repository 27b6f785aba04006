"""Choosing the kernel's widths: which would have predicted the training conditions that are left out."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from scperturbdiff.retrieval._kernel import GRID

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

    from scperturbdiff.retrieval._conditions import Conditions, Floats, Novelty
    from scperturbdiff.retrieval._kernel import ResponseKernel, Widths


def choose_widths(
    conditions: Conditions,
    shifts: Floats,
    signal: float,
    novelty: Novelty,
    start: Widths,
    names: list[str],
    kernel: Callable[[Widths], ResponseKernel],
) -> Widths:
    """Coordinate descent over :data:`GRID` on the error for conditions left out in the way of `novelty`.

    Parameters
    ----------
    conditions, shifts
        Training conditions and their mean shifts `(n, n_latent)`, standardised latent space.
    signal
        Variance of shifts per dimension, the unit of the kernel.
    novelty
        How a condition is new when it is left out.
    start
        Where the descent begins.
    names
        Parameters to choose.
    kernel
        Makes the kernel of given widths.
    """
    left_out = conditions.excluded(conditions, novelty) | np.eye(len(conditions), dtype=bool)
    patterns, pattern = np.unique(left_out, axis=0, return_inverse=True)
    best, best_error = start, np.inf
    for _ in range(2):
        for name in names:
            for value in GRID[name]:
                widths = replace(best, **{name: value})
                if widths == best and np.isfinite(best_error):
                    continue
                covariance = kernel(widths)(conditions, conditions)
                covariance[np.diag_indices(len(conditions))] += widths.nugget + conditions.noise / signal
                error = left_out_error(covariance, shifts, patterns, pattern.reshape(-1))
                if error < best_error * (1 - 1e-3):
                    best, best_error = widths, error
    return best


def left_out_error(
    covariance: Floats, shifts: Floats, patterns: NDArray[np.bool_], pattern: NDArray[np.int64]
) -> float:
    """Mean squared error when each condition is predicted without what it excludes (closed form, one inverse).

    Parameters
    ----------
    covariance
        Of the measured shifts, noise included, `(n, n)`.
    shifts
        Measured shifts, `(n, n_latent)`.
    patterns
        Sets of conditions to leave out together, `(n_patterns, n)`.
    pattern
        Set left out for each condition, itself included, `(n,)`.
    """
    precision = np.linalg.inv(covariance)
    weighted = precision @ shifts
    error = np.zeros(len(shifts))
    for number, out in enumerate(patterns):
        members = np.flatnonzero(out)
        residual = np.linalg.solve(precision[np.ix_(members, members)], weighted[members])
        wanted = pattern[members] == number
        error[members[wanted]] = (residual[wanted] ** 2).mean(1)
    return float(error.mean())
