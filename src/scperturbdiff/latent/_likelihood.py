"""Negative binomial likelihood of sparse counts."""

from __future__ import annotations

import torch
from torch import Tensor

EPS = 1e-8
"""As in scvi-tools' own negative binomial."""


def negative_binomial_log_prob(counts: Tensor, mean: Tensor, dispersion: Tensor) -> Tensor:
    """Log probability of counts, summed over genes, `(n_cells, n_genes) -> (n_cells,)`.

    Equal to :class:`scvi.distributions.NegativeBinomial`, but the gamma functions, which are nearly all of its cost
    on a CPU, are evaluated only where a count is not zero: elsewhere they cancel.
    """
    log_total = torch.log(dispersion + mean + EPS)
    dense = dispersion * (torch.log(dispersion + EPS) - log_total) + counts * (torch.log(mean + EPS) - log_total)
    cell, gene = counts.nonzero(as_tuple=True)
    count, theta = counts[cell, gene], dispersion.expand_as(counts)[cell, gene]
    gammas = torch.lgamma(count + theta) - torch.lgamma(theta) - torch.lgamma(count + 1)
    return dense.sum(-1).index_add(0, cell, gammas)
