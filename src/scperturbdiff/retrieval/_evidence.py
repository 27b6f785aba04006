"""How far features are trusted: as far as perturbations that act, left out one at a time, speak for them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from scperturbdiff.retrieval._kernel import GRID
from scperturbdiff.retrieval._kriging import DIGITS, left_out_errors

if TYPE_CHECKING:
    from collections.abc import Callable

    from scperturbdiff.retrieval._conditions import Conditions, Floats
    from scperturbdiff.retrieval._kernel import ResponseKernel, Widths

CHOSEN = ("common_share", "feature_share", "feature_linear", "feature_scale")
"""Parameters that are averaged."""
LEAST_GAIN = 0.02
"""Share by which features must lower the error of what is left out."""


@dataclass(frozen=True)
class FeatureEvidence:
    """What features told of perturbations that were left out.

    Attributes
    ----------
    n
        Perturbations.
    n_act
        Those whose shift is more signal than sampling noise.
    explained, without
        Share of the responses of those that act, left out, that is predicted with features, and by what all
        perturbations have in common; 0 is no better than no change. NaN where nothing acts.
    used
        Whether features are used for perturbations never seen.
    enough
        Whether so many act that left-out ones can tell.
    """

    n: int = 0
    n_act: int = 0
    explained: float = float("nan")
    without: float = float("nan")
    used: bool = False
    enough: bool = False

    def __str__(self) -> str:
        """The same in words; empty without features."""
        if not self.n:
            return ""
        act = f"Of {self.n} perturbations {self.n_act} act."
        if not self.used:
            what = "the mean of the others is used, as far as it predicts them"
            return f"{act} Features told nothing of those left out: {what}."
        share, mean = (f"{max(value, 0):.0%}" for value in (self.explained, self.without))
        told = (
            f"{act} Features explain {share} of their responses when they are left out, the mean of the others {mean}."
        )
        return told if self.enough else f"{told} Too few act to tell how far features help: they are used in part."


def acting_weights(conditions: Conditions, shifts: Floats) -> tuple[Floats, Floats]:
    r"""How much the error of each condition counts, and how much of a perturbation it shows.

    Most of a genetic screen does nothing, and zeros predict zeros. Squared errors are taken relative to the squared
    length of a shift plus the mean one, so that the strongest one alone does not decide. A shift of squared length
    :math:`s` of which sampling noise makes up :math:`n` shows :math:`\max(0, 1 - 2 n / s)` of a perturbation.
    Populations of a perturbation count together as one.

    Returns
    -------
    Weight of each condition's squared error and its share of a perturbation that acts, `(n,)` each.
    """
    size, noise = (shifts**2).sum(1), conditions.noise * shifts.shape[1]
    signal = np.clip(1 - 2 * noise / np.maximum(size, 1e-12), 0, 1)
    share = conditions.mass / np.maximum(conditions.same_perturbation(conditions) @ conditions.mass, 1e-12)
    return share / np.maximum(size + np.average(size, weights=conditions.mass), 1e-12), share * signal


def average_widths(
    conditions: Conditions,
    shifts: Floats,
    signal: float,
    start: Widths,
    kernel: Callable[[Widths], ResponseKernel],
    min_act: int,
) -> tuple[Widths, FeatureEvidence]:
    r"""Trust features as far as perturbations that are left out speak for them.

    A handful of perturbations that act cannot choose among a hundred kernels: the best of them is best by chance. The
    parameters are averaged instead, over all values of the grid, with equal prior weight of each
    :attr:`~Widths.feature_share` and the likelihood :math:`e^{-n/2}` of Gaussian errors of unknown size, where
    :math:`e` is the mean weighted error and :math:`n` the number of perturbations that act (:func:`acting_weights`): of
    many the best kernel is left. The mean of the others, ridge regression on features and, nearly, the nearest
    neighbour in features are corners of the grid. Where `min_act` perturbations act and features do not lower the
    error, they are not used.

    Parameters
    ----------
    conditions, shifts
        Training conditions and their mean shifts `(n, n_latent)`.
    signal
        Variance of shifts per dimension, the unit of the kernel.
    start
        All other parameters.
    kernel
        Makes the kernel of given widths.
    min_act
        Perturbations that must act before features can be found to tell nothing.
    """
    weight, act = acting_weights(conditions, shifts)
    size = (shifts**2).sum(1)
    patterns, pattern = np.unique(conditions.barred(conditions, "perturbation"), axis=0, return_inverse=True)

    def errors(widths: Widths) -> Floats:
        covariance = kernel(widths)(conditions, conditions)
        covariance[np.diag_indices(len(conditions))] += widths.nugget + conditions.treated_noise / signal
        return left_out_errors(covariance, shifts, patterns, pattern.reshape(-1))

    grid = [*_grid(start)]
    n_act = float(act.sum())
    error = np.maximum([weight @ errors(widths) for widths, _ in grid], 1e-12)
    log_weight = np.log([prior for _, prior in grid]) - 0.5 * n_act * np.log(error)
    posterior = np.exp(log_weight - log_weight.max())
    alone = np.array([w.feature_share == 0 for w, _ in grid])
    with_features = _mean([w for w, _ in grid], posterior)
    without = _mean([w for (w, _), a in zip(grid, alone, strict=True) if a], posterior[alone])

    def explained(widths: Widths) -> float:
        all_of_it = float(act * weight @ size)
        return 1 - float(act * weight @ errors(widths)) / all_of_it if all_of_it > 0 else float("nan")

    found = FeatureEvidence(
        n=len(np.unique(conditions.same_perturbation(conditions), axis=0)),
        n_act=round(n_act),
        explained=explained(with_features),
        without=explained(without),
        enough=n_act >= min_act,
    )
    helps = weight @ errors(with_features) < (1 - LEAST_GAIN) * (weight @ errors(without))
    used = n_act > 0 and (bool(helps) or not found.enough)
    return with_features if used else without, replace(found, used=used)


def _grid(start: Widths) -> list[tuple[Widths, float]]:
    """Parameters to average over and their prior weights: the same for each share of features."""
    out = []
    for share in GRID["feature_share"]:
        lines = GRID["feature_linear"] if share else (0.0,)
        some = [
            replace(start, common_share=common, feature_share=share, feature_linear=linear, feature_scale=scale)
            for common in GRID["common_share"]
            for linear in lines
            # without a part that falls with distance its scale says nothing
            for scale in (GRID["feature_scale"] if share and linear < 1 else (start.feature_scale,))
        ]
        out += [(widths, 1 / len(some)) for widths in some]
    return out


def _mean(grid: list[Widths], weight: Floats) -> Widths:
    """Parameters of the kernel that is, but for the scale of features, the mean of the kernels of `grid`."""
    weight = weight / weight.sum()
    common, share, linear, scale = (np.array([getattr(w, name) for w in grid]) for name in CHOSEN)
    of_features, near = weight * share, weight * share * (1 - linear)
    found = {
        "common_share": weight @ common,
        "feature_share": of_features.sum(),
        "feature_linear": of_features @ linear / of_features.sum() if of_features.any() else 0.0,
        "feature_scale": np.exp(near @ np.log(scale) / near.sum()) if near.any() else grid[0].feature_scale,
    }
    return replace(grid[0], **{name: round(float(value), DIGITS) for name, value in found.items()})
