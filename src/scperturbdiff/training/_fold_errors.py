"""How far predicted fold changes of genes are off, beyond what draws vary, told by populations that are left out."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from scperturbdiff.retrieval import variance_of_errors
from scperturbdiff.seeds import derive_seed
from scperturbdiff.training._settings import SETTINGS

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from scperturbdiff.module import PerturbDiffModule
    from scperturbdiff.retrieval import FoldEvidence, RetrievalSettings
    from scperturbdiff.training._left_out import LeftOut


def with_fold_errors(
    evidence: FoldEvidence,
    parts: Sequence[LeftOut],
    n_replicates: NDArray[np.int64],
    settings: RetrievalSettings,
    seed: int,
) -> FoldEvidence:
    """`evidence`, with the variance of errors of log fold changes.

    The squared errors of populations that are left out, less the noise of their sampling and less what draws vary
    already: along the latent directions in which left-out populations were off, or replicates differ. A population that
    is the only one of its condition says nothing of how replicates vary.

    Parameters
    ----------
    evidence
        Of the populations that are left out.
    parts
        These, in order.
    n_replicates
        Populations of the condition of each, `(n,)`.
    settings
        How many must tell.
    seed
        Of the draws.
    """
    telling = np.ones(len(evidence.distance), bool) if parts[0].novelty != "replicate" else n_replicates > 1
    n_populations = int(telling.sum())
    if n_populations < settings.doubt_min:
        return evidence
    excess, folds, first = list[Tensor](), list[Tensor](), 0
    for part in parts:
        weights = [evidence.weight(float(distance), settings) for distance in part.distance]
        at = np.flatnonzero(telling[first : first + len(part)])
        of_part = _errors(part, at, weights, seed)
        excess, folds, first = [*excess, *of_part[0]], [*folds, *of_part[1]], first + len(part)
    excess_of, fold_of = (torch.stack(values).cpu().numpy().astype(np.float64) for values in (excess, folds))
    if not (np.isfinite(excess_of).all() and np.isfinite(fold_of).all()):
        return evidence  # what is not finite is named when training ends
    constant, proportional = variance_of_errors(excess_of, fold_of, n_populations)
    return replace(evidence, constant=constant, proportional=proportional)


def _errors(
    part: LeftOut, rows: NDArray[np.int64], weights: Sequence[float], seed: int
) -> tuple[list[Tensor], list[Tensor]]:
    """Squared errors of log fold changes beyond noise and draws, and what is expected, `(n_genes,)` each."""
    module, found = part.module, part.found
    directions, size = part.directions
    rng = np.random.default_rng(derive_seed(seed, "fold errors", part.novelty))
    normal = rng.normal(size=(len(part), SETTINGS.fold_draws, directions.shape[1]))
    misses = size[:, None, None] * (normal @ directions.T)
    measured = torch.as_tensor(part.populations.responses.fold.astype(np.float32), device=module.device)
    excess, folds = [], []
    for i in map(int, rows):
        sample, start = part.cells.samples[i], part.cells.samples[i].latent[None]
        residual, fold = (_tensor(values[i], module) for values in (found.residual, found.fold))
        means = module.moved_means(sample, part.prior.at(i).move(start)[0], residual)
        factor = means.towards_fold(fold, weights[i])
        expected, n_draws = means.fold(factor), len(misses[i])
        moved = part.prior.at(i).repeat(n_draws).shifted(_tensor(misses[i], module)).move(start.expand(n_draws, -1, -1))
        varied = (module.moved_means(sample, moved, residual).fold(factor) - expected).square().mean(0)
        excess.append((measured[i] - expected).square() - part.noise(i) - varied)
        folds.append(expected)
    return excess, folds


def _tensor(values: NDArray, module: PerturbDiffModule) -> Tensor:
    return torch.as_tensor(values, dtype=torch.float32, device=module.device)
