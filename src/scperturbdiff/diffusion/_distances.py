"""Distances between populations: norms of differences of kernel mean embeddings for the kernel -||x - y||.

Populations are tensors `(..., n_cells, n_latent)`. Masks are boolean `(..., n_cells)`, `True` where there is a cell.
Everything is computed in float32 at least, whatever the input, because differences of means of distances cancel.
"""

from __future__ import annotations

import torch
from torch import Tensor

EPS = 1e-8
"""Added to squared distances under the root: gradients stay finite for duplicated cells."""
FLOOR = 1e-6
"""Added to squared population distances under the root."""


def pairwise_distances(x: Tensor, y: Tensor) -> Tensor:
    """Euclidean distances `(..., n, m)` of the cells of `x` `(..., n, d)` to those of `y` `(..., m, d)`.

    By matrix products; differentiable everywhere. Both are centred first, which keeps the products small where
    populations lie far out.
    """
    dtype = torch.promote_types(torch.promote_types(x.dtype, y.dtype), torch.float32)
    x, y = x.to(dtype), y.to(dtype)
    with torch.autocast(x.device.type, enabled=False):
        centre = y.detach().mean(-2, keepdim=True)
        x, y = x - centre, y - centre
        squared = x.square().sum(-1)[..., :, None] + y.square().sum(-1)[..., None, :] - 2 * (x @ y.transpose(-1, -2))
        return (squared.clamp_min(0) + EPS).sqrt()


def _counts(x: Tensor, mask: Tensor | None) -> Tensor:
    return torch.full(x.shape[:-2], x.shape[-2], device=x.device) if mask is None else mask.sum(-1)


def cross_mean(x: Tensor, y: Tensor, x_mask: Tensor | None = None, y_mask: Tensor | None = None) -> Tensor:
    """Mean distance between a cell of `x` and a cell of `y`, shape `(...)`."""
    distances = pairwise_distances(x, y)
    if x_mask is not None:
        distances = distances * x_mask[..., :, None]
    if y_mask is not None:
        distances = distances * y_mask[..., None, :]
    pairs = (_counts(x, x_mask) * _counts(y, y_mask)).clamp_min(1)
    return distances.sum((-1, -2)) / pairs


def self_mean(x: Tensor, mask: Tensor | None = None, *, unbiased: bool) -> Tensor:
    """Mean distance between two cells of `x`, shape `(...)`.

    Over pairs of different cells (`unbiased`, U-statistic; 0 for a population of one cell), or over all pairs, a cell
    with itself included at distance zero (V-statistic).
    """
    distances = pairwise_distances(x, x)
    off_diagonal = ~torch.eye(x.shape[-2], dtype=torch.bool, device=x.device)
    keep = off_diagonal if mask is None else off_diagonal & mask[..., :, None] & mask[..., None, :]
    n = _counts(x, mask)
    pairs = n * (n - 1) if unbiased else n * n
    return (distances * keep).sum((-1, -2)) / pairs.clamp_min(1)


def energy_distance(
    x: Tensor, y: Tensor, x_mask: Tensor | None = None, y_mask: Tensor | None = None, *, unbiased: bool = True
) -> Tensor:
    r"""Squared distance of the kernel mean embeddings, :math:`2E|x-y| - E|x-x'| - E|y-y'|`, shape `(...)`.

    Parameters
    ----------
    x, y
        Populations `(..., n, d)` and `(..., m, d)`.
    x_mask, y_mask
        Which cells there are.
    unbiased
        U-statistic (zero on average for two samples of one law, may be negative) or V-statistic (never negative, the
        exact distance of the two empirical measures).
    """
    return (
        2 * cross_mean(x, y, x_mask, y_mask)
        - self_mean(x, x_mask, unbiased=unbiased)
        - self_mean(y, y_mask, unbiased=unbiased)
    )


def embedding_distance(squared: Tensor) -> Tensor:
    """Root of a squared (V-statistic) distance, finite in value and gradient at zero."""
    return (squared.clamp_min(0) + FLOOR).sqrt()
