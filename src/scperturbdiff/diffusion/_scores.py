"""Training objectives: scores of generated populations against an observed one.

`draws` are `(..., n_draws, n_cells, n_latent)`: independent populations generated for the same condition.
`target` is `(..., n_cells, n_latent)`: the observed population. All return one value for each `...`.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

from scperturbdiff.diffusion._distances import cross_mean, embedding_distance, pairwise_distances, self_mean

Objective = Literal["energy_score", "mmd", "mmd+mse", "mse"]
"""Names of the training objectives."""
OBJECTIVES: tuple[str, ...] = get_args(Objective)


def check_objective(objective: object, n_draws: int = 2) -> None:
    """Raise a `ValueError` unless it is the name of a training objective for which `n_draws` are enough."""
    if objective not in OBJECTIVES:
        raise ValueError(f"objective={objective!r} is not one of {OBJECTIVES}.")
    if objective == "energy_score" and n_draws < 2:
        raise ValueError(f"n_draws={n_draws}: the energy score compares draws and needs at least 2.")


def functional_energy_score(
    draws: Tensor, target: Tensor, draw_mask: Tensor | None = None, target_mask: Tensor | None = None
) -> Tensor:
    r"""Energy score whose points are kernel mean embeddings of populations.

    .. math::
        \frac1K \sum_k D(\hat P_k, P) - \frac{1}{2K(K-1)} \sum_{k \neq l} D(\hat P_k, \hat P_l)

    with `D` (not squared) the maximum mean discrepancy of the energy kernel. Lower is better. `D` is a metric of
    negative type, so the score is strictly proper for the law of a distribution-valued random variable
    (Gneiting & Raftery 2007). `D` is taken between empirical measures (V-statistic): with as many generated as observed
    cells, both sides are laws of empirical measures of the same size and no spread is lost to small samples.

    Parameters
    ----------
    draws
        `(..., n_draws, n_cells, n_latent)` with `n_draws >= 2`.
    target
        `(..., n_target, n_latent)`.
    draw_mask
        `(..., n_cells)`, shared by the draws of a condition.
    target_mask
        `(..., n_target)`.

    Returns
    -------
    Scores `(...)`.
    """
    n_draws = draws.shape[-3]
    if n_draws < 2:
        raise ValueError(f"The functional energy score needs at least 2 draws, got {n_draws}.")
    within, between = _pair_means(draws, draw_mask)  # (..., K), (..., K, K)
    target_within = self_mean(target, target_mask, unbiased=False)
    flat_mask = None if draw_mask is None else draw_mask[..., None, :].expand(*draws.shape[:-1])
    crossed = cross_mean(
        draws, target[..., None, :, :], flat_mask, None if target_mask is None else target_mask[..., None, :]
    )
    to_target = embedding_distance(2 * crossed - within - target_within[..., None])
    apart = embedding_distance(2 * between - within[..., :, None] - within[..., None, :])
    different = ~torch.eye(n_draws, dtype=torch.bool, device=draws.device)
    spread = (apart * different).sum((-1, -2)) / (n_draws * (n_draws - 1))
    return to_target.mean(-1) - 0.5 * spread


def _pair_means(draws: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Mean distances within each draw `(..., K)` and between draws `(..., K, K)`, over all pairs (V-statistic)."""
    *lead, n_draws, m, d = draws.shape
    flat = draws.reshape(*lead, n_draws * m, d)
    distances = pairwise_distances(flat, flat)
    keep = ~torch.eye(n_draws * m, dtype=torch.bool, device=draws.device)
    if mask is not None:
        repeated = mask.repeat(*([1] * (mask.dim() - 1)), n_draws)
        keep = keep & repeated[..., :, None] & repeated[..., None, :]
    blocks = (distances * keep).reshape(*lead, n_draws, m, n_draws, m).sum((-1, -3))
    n = torch.full(tuple(lead), m, device=draws.device) if mask is None else mask.sum(-1)
    means = blocks / n.square().clamp_min(1)[..., None, None]
    return means.diagonal(dim1=-2, dim2=-1), means


def squared_mmd(
    draws: Tensor, target: Tensor, draw_mask: Tensor | None = None, target_mask: Tensor | None = None
) -> Tensor:
    """Mean over draws of the squared maximum mean discrepancy (energy kernel, U-statistic); the paper's main term.

    Minimised by the *mean* embedding, so that one evaluation trained with it returns the mixture of all responses.
    """
    mask = None if draw_mask is None else draw_mask[..., None, :].expand(*draws.shape[:-1])
    other = None if target_mask is None else target_mask[..., None, :]
    crossed = cross_mean(draws, target[..., None, :, :], mask, other)
    return (
        2 * crossed - self_mean(draws, mask, unbiased=True) - self_mean(target, target_mask, unbiased=True)[..., None]
    ).mean(-1)


def mean_squared_error(draws: Tensor, clean: Tensor, mask: Tensor | None = None) -> Tensor:
    """Mean squared error per cell and dimension to the clean population `(..., n_cells, n_latent)`, cell by cell.

    Cells correspond because the noised population was made from `clean`.
    """
    error = (draws - clean[..., None, :, :]).square().mean(-1).mean(-2)
    return error.mean(-1) if mask is None else (error * mask).sum(-1) / mask.sum(-1).clamp_min(1)
