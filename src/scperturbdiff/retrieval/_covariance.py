"""Covariances over sets of components."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from scperturbdiff.retrieval._conditions import Conditions, Floats, n_components

if TYPE_CHECKING:
    from collections.abc import Callable


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


def interaction_covariance(a: Conditions, b: Conditions, alike: Floats) -> Floats:
    """Covariance of what two components do beyond their sum, 0 for other numbers of components."""
    (first, is_pair), (second, are_pairs) = _pairs(a, len(alike)), _pairs(b, len(alike))
    straight = alike[first[:, :1], second[:, 0]] * alike[first[:, 1:], second[:, 1]]
    crossed = alike[first[:, :1], second[:, 1]] * alike[first[:, 1:], second[:, 0]]
    out: Floats = (straight + crossed) * np.outer(is_pair, are_pairs)
    return out


def _pairs(conditions: Conditions, n: int) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """The two components of pairs of components below `n`, and which conditions are such pairs."""
    width = max(2, conditions.component.shape[1])
    padded = np.pad(conditions.component, ((0, 0), (0, width - conditions.component.shape[1])), constant_values=-1)
    ordered = -np.sort(-padded, axis=1)
    is_pair = (ordered[:, 1] >= 0) & (ordered[:, 2:] < 0).all(axis=1) & (ordered[:, 0] < n)
    return np.where(is_pair[:, None], ordered[:, :2], 0), is_pair


def response_alike(conditions: Conditions, shifts: Floats) -> Floats | None:
    """How alike components respond when alone, `(n_components, n_components)`.

    An exponential of the cosine of their mean shifts less the mean over components; `None` without a pair or with
    fewer than three single components, for then there is nothing to learn.
    """
    n, number = n_components(conditions), (conditions.component >= 0).sum(axis=1)
    single = conditions.component.max(axis=1)
    alone = np.unique(single[number == 1])
    if len(alone) < 3 or not (number == 2).any():
        return None
    means = np.stack([shifts[(number == 1) & (single == c)].mean(axis=0) for c in alone])
    means = means - means.mean(axis=0)
    means = means / np.maximum(np.linalg.norm(means, axis=1, keepdims=True), 1e-12)
    out = np.eye(n)
    out[np.ix_(alone, alone)] = np.exp((means @ means.T - 1) / 0.5)
    return out


def squared_distances(a: Floats, b: Floats) -> Floats:
    """Squared Euclidean distances of rows, `(len(a), len(b))`."""
    distances: Floats = (a**2).sum(1)[:, None] + (b**2).sum(1)[None, :] - 2 * a @ b.T
    return distances
