"""Covariances over sets of components."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

    from scperturbdiff.retrieval._conditions import Conditions, Floats


def additive_covariance(
    a: Conditions,
    b: Conditions,
    covariance: Callable[[NDArray[np.int64], NDArray[np.int64]], Floats],
    doses: Callable[[Floats, Floats], Floats],
) -> Floats:
    """Sum over pairs of components of their covariance times that of their doses."""
    out = np.zeros((len(a), len(b)))
    for i in range(a.component.shape[1]):
        for j in range(b.component.shape[1]):
            first, second = a.component[:, i], b.component[:, j]
            both = np.outer(first >= 0, second >= 0)
            out += both * doses(a.dose[:, i], b.dose[:, j]) * covariance(np.maximum(first, 0), np.maximum(second, 0))
    return out


def squared_distances(a: Floats, b: Floats) -> Floats:
    """Squared Euclidean distances of rows, `(len(a), len(b))`."""
    distances: Floats = (a**2).sum(1)[:, None] + (b**2).sum(1)[None, :] - 2 * a @ b.T
    return distances
