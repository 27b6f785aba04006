"""How far predicted fold changes of genes are off, beyond what draws vary, told by populations that are left out."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import torch

from scperturbdiff.counts import PER_CELL
from scperturbdiff.retrieval import variance_of_errors
from scperturbdiff.seeds import derive_seed
from scperturbdiff.training._settings import SETTINGS

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray
    from torch import Tensor

    from scperturbdiff.diffusion import Prior
    from scperturbdiff.module import ControlSample, PerturbDiffModule
    from scperturbdiff.retrieval import FoldEvidence, Novelty, Retrieval, Retrieved


def fold_noise(counts: Tensor, n_cells: int) -> Tensor:
    """Sampling variance of the log of mean counts per 10,000, plus 1, over `n_cells` like these, `(n_genes,)`.

    Parameters
    ----------
    counts
        Of some of the cells, `(n, n_genes)`.
    n_cells
        Cells that the mean is over.
    """
    library = counts.sum(-1, keepdim=True)
    size = library.mean().clamp(min=1.0)
    mean = PER_CELL * counts.mean(0) / size
    apart = PER_CELL * counts / size - mean * library / size
    return apart.square().sum(0) / max(len(counts) - 1, 1) / n_cells / (1 + mean).square()


@dataclass(frozen=True)
class LeftOut:
    """Populations that are left out in one way of being new: what they did, and what is predicted of them.

    Attributes
    ----------
    novelty
        The way.
    rows
        Numbers of the populations, `(n,)`.
    samples
        Some control cells of each.
    noise
        Sampling variance of the measured log fold changes of each, `(n_genes,)`.
    n_replicates
        Populations of the condition of each, `(n,)`.
    found, prior
        What is predicted.
    """

    novelty: Novelty
    rows: NDArray[np.int64]
    samples: Sequence[ControlSample]
    noise: Sequence[Tensor]
    n_replicates: NDArray[np.int64]
    found: Retrieved
    prior: Prior


def with_fold_errors(
    evidence: FoldEvidence, left_out: LeftOut, module: PerturbDiffModule, retrieval: Retrieval, seed: int
) -> FoldEvidence:
    """`evidence`, with the variance of errors of log fold changes.

    The squared errors of populations that are left out, less the noise of their sampling and less what draws vary
    already: along the latent directions in which left-out populations were off, or replicates differ. A population that
    is the only one of its condition says nothing of how replicates vary.

    Parameters
    ----------
    evidence
        Of the populations that are left out.
    left_out
        These.
    module, retrieval
        What predicts.
    seed
        Of the draws.
    """
    novelty, rows, found, prior = left_out.novelty, left_out.rows, left_out.found, left_out.prior
    telling = np.ones(len(rows), bool) if novelty != "replicate" else left_out.n_replicates > 1
    n_populations = int(telling.sum())
    if n_populations < retrieval.settings.doubt_min:
        return evidence
    measured = torch.as_tensor(retrieval.responses.fold[rows].astype(np.float32), device=module.device)
    directions, scale = retrieval.doubt.get(novelty), np.sqrt(found.variance)
    if directions is None:
        directions, scale = module.generator_ema.replicate_factors.cpu().numpy(), np.ones(len(rows))
    rng = np.random.default_rng(derive_seed(seed, "fold errors", novelty))
    normal = rng.normal(size=(len(rows), SETTINGS.fold_draws, directions.shape[1]))
    misses = scale[:, None, None] * (normal @ directions.T)
    excess, folds = [], []
    for i in map(int, np.flatnonzero(telling)):
        sample = left_out.samples[i]
        start = sample.latent[None]
        residual, fold = (_tensor(part[i], module) for part in (found.residual, found.fold))
        means = module.moved_means(sample, prior.at(i).move(start)[0], residual)
        factor = means.towards_fold(fold, evidence.weight(float(evidence.distance[i]), retrieval.settings))
        expected, varied = means.fold(factor), torch.zeros_like(residual)
        for miss in misses[i]:
            moved = prior.at(i).shifted(_tensor(miss, module)[None]).move(start)[0]
            varied += (module.moved_means(sample, moved, residual).fold(factor) - expected).square()
        excess.append((measured[i] - expected).square() - left_out.noise[i] - varied / len(misses[i]))
        folds.append(expected)
    excess_of, fold_of = (torch.stack(part).cpu().numpy().astype(np.float64) for part in (excess, folds))
    if not (np.isfinite(excess_of).all() and np.isfinite(fold_of).all()):
        return evidence  # what is not finite is named when training ends
    constant, proportional = variance_of_errors(excess_of, fold_of, n_populations)
    return replace(evidence, constant=constant, proportional=proportional)


def _tensor(values: NDArray, module: PerturbDiffModule) -> Tensor:
    return torch.as_tensor(values, dtype=torch.float32, device=module.device)
