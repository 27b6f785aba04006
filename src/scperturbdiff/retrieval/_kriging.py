"""Kriging: which training conditions a new one draws on, with what weights, and the parameters that suit it best."""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from scperturbdiff.retrieval._kernel import GRID

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from numpy.typing import NDArray

    from scperturbdiff.retrieval._conditions import Conditions, Floats, Novelty
    from scperturbdiff.retrieval._kernel import ResponseKernel, Widths


FEW, BATCHED = 2048, 768
"""So many training conditions have their covariances computed once; more than so many are left out in batches."""
AVERAGED, FEW_CONTEXTS = ("context_scale", "context_share"), 3
"""Parameters of the kernel that are averaged for new contexts, where no more contexts than this can be left out."""
DIGITS = 6
"""Of averages: sums round by the order of populations, which must not matter."""


class System(NamedTuple):
    """A kernel, and the same with mean variance 1, as that of a flat prior says nothing.

    Both with their values among training conditions; `None` where these are many, or variances are not asked for.
    """

    kernel: ResponseKernel
    usual: ResponseKernel
    among: Floats | None
    usual_among: Floats | None

    @classmethod
    def of(cls, kernel: ResponseKernel, known: Conditions, variance: bool = True) -> System:
        """That of a kernel."""
        usual, few = replace(kernel, mean_variance=1.0), len(known) <= FEW
        among = kernel(known, known) if few else None
        return cls(kernel, usual, among, usual(known, known) if few and variance else None)


class Neighborhood(NamedTuple):
    """The `k` training conditions most correlated with each of `q` new ones.

    Which of the new ones these are, the training conditions' numbers `(q, k)`, the covariance of their measured shifts
    `(q, k, k)` and that with the new condition's `(q, k)`, 0 for what may not be used.
    """

    rows: slice
    near: NDArray[np.int64]
    system: Floats
    to_known: Floats

    def weights(self) -> Floats:
        """Weights of the training conditions, `(q, k)`."""
        return np.asarray(np.linalg.solve(self.system, self.to_known[..., None])[..., 0], np.float64)


def neighborhoods(
    kernel: ResponseKernel,
    known: Conditions,
    noise: Floats,
    queries: Conditions,
    barred: NDArray[np.bool_] | None,
    n_neighbors: int,
    chunk: int = 128,
    among_known: Floats | None = None,
) -> Iterator[Neighborhood]:
    """Neighbourhoods of `queries`, `chunk` at a time.

    Parameters
    ----------
    kernel
        Covariance of responses.
    known
        Training conditions.
    noise
        Variance of their measurements in units of the kernel, that of controls left out, `(n,)`.
    queries
        New conditions.
    barred
        Training conditions that each may not use, `(n_queries, n)`; `None`: all may be used.
    n_neighbors
        Training conditions that each uses at most.
    chunk
        New conditions at a time.
    among_known
        ``kernel(known, known)``, if at hand.
    """
    k = min(n_neighbors, len(known))
    shared = among_known
    if shared is None and len(known) <= n_neighbors:
        shared = kernel(known, known)
    diagonal = np.arange(k)
    for start in range(0, len(queries), chunk):
        rows = slice(start, min(start + chunk, len(queries)))
        part = queries.take(rows)
        closed = np.zeros((len(part), len(known)), bool) if barred is None else barred[rows]
        covariance = np.where(closed, 0.0, kernel(part, known))
        near = np.tile(diagonal, (len(part), 1))
        if k < len(known):
            near = np.argpartition(-np.abs(covariance), k - 1, axis=1)[:, :k]
        if shared is not None:
            system = shared[near[:, :, None], near[:, None, :]]
        else:
            system = np.stack([kernel(known.take(n), known.take(n)) for n in near])
        # what may not be used gets endless noise, hence no weight
        system[:, diagonal, diagonal] += noise[near] + 1e12 * np.take_along_axis(closed, near, axis=1)
        yield Neighborhood(rows, near, system, np.take_along_axis(covariance, near, axis=1))


def error_variance(
    kernel: ResponseKernel,
    known: Conditions,
    noise: Floats,
    queries: Conditions,
    around: Neighborhood,
    weights: Floats,
    nugget: float,
    among_known: Floats | None = None,
) -> Floats:
    """Variance of the error of predictions with these weights, `(q,)`, whichever kernel they were found with.

    As large as without a prediction at most.

    Parameters
    ----------
    kernel
        Covariance of responses.
    known
        Training conditions.
    noise
        Variance of their measurements in units of the kernel, that of controls left out, `(n,)`.
    queries
        The new conditions of `around`.
    around
        Their neighbourhoods.
    weights
        Weights of the training conditions, `(q, k)`.
    nugget
        Variance of the new conditions that nothing explains.
    among_known
        ``kernel(known, known)``, if at hand.
    """
    near = around.near
    if among_known is not None:
        covariance = among_known[near[:, :, None], near[:, None, :]]
        among = np.einsum("qk,qkl,ql->q", weights, covariance, weights, optimize=True)
        to_known = np.take_along_axis(kernel(queries, known), near, axis=1)
    else:  # of many the nearest only
        parts = [known.take(n) for n in near]
        among = np.array([w @ kernel(part, part) @ w for w, part in zip(weights, parts, strict=True)])
        to_known = np.concatenate([kernel(queries.take(slice(i, i + 1)), part) for i, part in enumerate(parts)])
    explained = 2 * (weights * to_known).sum(1) - among
    prior = kernel.diagonal(queries) + nugget
    return np.clip(prior - explained + (weights**2 * noise[near]).sum(1), 0, prior)


def choose_widths(
    conditions: Conditions,
    shifts: Floats,
    signal: float,
    novelty: Novelty,
    start: Widths,
    names: list[str],
    kernel: Callable[[Widths], ResponseKernel],
) -> Widths:
    r"""Coordinate descent over :data:`GRID` on the error for conditions left out in the way of `novelty`.

    For new contexts, how alike contexts are is averaged in the end, not chosen, where no more than three were left out:
    these cannot choose among so many widths, and the best one is best by chance. Each counts by the likelihood
    :math:`e^{-n/2}` of Gaussian errors of unknown size, where :math:`e` is the mean error and :math:`n` the number of
    contexts.

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
    patterns, pattern = np.unique(conditions.barred(conditions, novelty), axis=0, return_inverse=True)

    def error_of(widths: Widths) -> float:
        covariance = kernel(widths)(conditions, conditions)
        covariance[np.diag_indices(len(conditions))] += widths.nugget + conditions.treated_noise / signal
        errors = left_out_errors(covariance, shifts, patterns, pattern.reshape(-1))
        return float(np.average(errors, weights=conditions.mass))

    best, best_error = start, np.inf
    for _ in range(2):
        for name in names:
            for value in GRID[name]:
                widths = replace(best, **{name: value})
                if widths == best and np.isfinite(best_error):
                    continue
                error = error_of(widths)
                if error < best_error * (1 - 1e-3):
                    best, best_error = widths, error
    if novelty != "context" or len(patterns) > FEW_CONTEXTS:
        return best
    grid = [replace(best, context_scale=h, context_share=b) for h, b in product(*map(GRID.__getitem__, AVERAGED))]
    log_weight = -0.5 * len(patterns) * np.log(np.maximum([error_of(widths) for widths in grid], 1e-12))
    weight = np.exp(log_weight - log_weight.max())
    weight /= weight.sum()
    scale, share = np.array([[getattr(widths, name) for widths in grid] for name in AVERAGED])
    scale, share = round(float(np.exp(weight @ np.log(scale))), DIGITS), round(float(weight @ share), DIGITS)
    return replace(best, context_scale=scale, context_share=share)


def left_out_errors(
    covariance: Floats, shifts: Floats, patterns: NDArray[np.bool_], pattern: NDArray[np.int64]
) -> Floats:
    """Squared errors, summed over dimensions, when each condition is predicted without what it excludes, `(n,)`.

    Closed form, one inverse.

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
        error[members[wanted]] = (residual[wanted] ** 2).sum(1)
    return error
