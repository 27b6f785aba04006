"""Negative binomial counts: likelihood, sampling, and how counts of a cell change with their means."""

from __future__ import annotations

import torch
from torch import Tensor

EPS = 1e-8
"""As in scvi-tools' own negative binomial."""
LARGE_MEAN = 4.0
"""Counts of a larger mean are drawn as a gamma-Poisson mixture."""


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


def sample_negative_binomial(mean: Tensor, shape: Tensor) -> Tensor:
    """Negative binomial counts of the given means and shapes (variance = mean + mean^2 / shape), any common size.

    On a CPU gamma and Poisson numbers are nearly all of the cost of prediction, while most counts are 0. There one
    uniform number decides which are (:func:`_draw`).
    """
    if mean.device.type != "cpu":
        return torch.poisson(mean / shape * torch._standard_gamma(shape))
    uniform = torch.rand_like(mean).view(-1)
    out = torch.zeros_like(uniform)
    at = (uniform < mean.reshape(-1)).nonzero().view(-1)
    out[at] = _draw(uniform[at], mean.reshape(-1)[at], shape.reshape(-1)[at])
    return out.view(mean.shape)


def move_counts(
    counts: Tensor, before: Tensor, after: Tensor, dispersion: Tensor, again: Tensor | None = None
) -> Tensor:
    r"""Counts of cells if their negative binomial means had been others, all `(n_cells, n_genes)`.

    A negative binomial count is Poisson with rate :math:`\mu w`, `w` Gamma with mean 1 and shape :math:`\theta`. What
    cells show of both `w` and their Poisson noise is kept; only the rate changes, by :math:`r = \mu' / \mu`. Where it
    falls, each molecule stays with probability `r`. Where it rises, counts of mean :math:`(\mu' - \mu) w` are added,
    :math:`w \mid x \sim \mathrm{Gamma}(\theta + x, \theta + \mu)`. Counts of law :math:`\mu, \theta` become counts
    of law :math:`\mu', \theta`, and stay as they are where :math:`\mu' = \mu`.

    Parameters
    ----------
    counts
        Counts as they are.
    before, after
        Their means, and those they would have had.
    dispersion
        :math:`\theta`: variance = mean + mean^2 / dispersion.
    again
        Cells that are the copy of another one, `(n_cells,)`; `None` for none. They keep `w`, and get Poisson noise of
        their own.
    """
    move = _move if counts.device.type == "cpu" else _move_dense
    if again is None or not again.any():
        return move(counts, before, after, dispersion)
    out = torch.empty_like(counts)
    first = ~again
    out[first] = move(counts[first], before[first], after[first], dispersion[first])
    shape = dispersion[again] + counts[again]
    out[again] = sample_negative_binomial(after[again] * shape / (dispersion[again] + before[again]), shape)
    return out


def _move(counts: Tensor, before: Tensor, after: Tensor, dispersion: Tensor) -> Tensor:
    """:func:`move_counts` of cells that are nobody's copy; only entries that may change are looked at."""
    rise = after - before
    out = counts.clone()
    here = (counts > 0).nonzero(as_tuple=True)
    falls = rise[here] < 0
    lost = here[0][falls], here[1][falls]
    out[lost] = _thin(counts[lost], after[lost] / before[lost])
    uniform = torch.rand_like(rise)
    # of counts of 0 few are added to: w is expected to be at most 1 there
    new = ((uniform < rise) & (counts == 0)).nonzero(as_tuple=True)
    more = tuple(torch.cat([a, b[~falls]]) for a, b in zip(new, here, strict=True))
    shape = dispersion[more] + counts[more]
    drawn = torch.cat([uniform[new], torch.rand(len(more[0]) - len(new[0]), dtype=rise.dtype, device=rise.device)])
    out[more] += _draw(drawn, rise[more] * shape / (dispersion[more] + before[more]), shape)
    return out


def _move_dense(counts: Tensor, before: Tensor, after: Tensor, dispersion: Tensor) -> Tensor:
    """:func:`_move` for devices on which drawing a number costs less than finding out whether to."""
    shape = dispersion + counts
    kept = torch.binomial(counts, (after / before.clamp(min=EPS)).clamp(max=1))
    return kept + sample_negative_binomial((after - before).clamp(min=0) * shape / (dispersion + before), shape)


def _thin(counts: Tensor, probability: Tensor) -> Tensor:
    """Counts `(n,)`, none of them 0, of which each molecule stays with a probability."""
    out = (torch.rand_like(counts) < probability).to(counts.dtype)
    several = counts > 1
    out[several] = torch.binomial(counts[several], probability[several])
    return out


def _draw(uniform: Tensor, mean: Tensor, shape: Tensor) -> Tensor:
    """Negative binomial counts `(n,)` from uniform numbers, which may be conditioned on being less than the mean.

    Counts are 0 where the number is larger than the probability of another count, which is less than the mean. Small
    counts are found by inverting the distribution function, large ones drawn as a gamma-Poisson mixture.
    """
    out = torch.zeros_like(mean)
    mean, shape = mean.double(), shape.double()
    some = uniform < -torch.expm1(-shape * torch.log1p(mean / shape))
    large = mean > LARGE_MEAN
    at = (some & ~large).nonzero().view(-1)
    out[at] = _invert(uniform[at].double(), mean[at], shape[at]).to(out.dtype)
    at = large.nonzero().view(-1)
    out[at] = torch.poisson(mean[at] / shape[at] * torch._standard_gamma(shape[at])).to(out.dtype)
    return out


def _invert(uniform: Tensor, mean: Tensor, shape: Tensor) -> Tensor:
    """Largest counts that a share of at least `uniform` of all counts reach, for small means and counts above 0."""
    odds = mean / (shape + mean)
    mass = (1 - odds) ** shape
    left = (1 - mass) - uniform.clamp(min=2.0**-25)  # probability of smaller counts that are not 0
    out, active = torch.ones_like(mean), torch.arange(len(mean), device=mean.device)
    count = 0
    while True:
        mass = mass * odds * (shape + count) / (count + 1)
        left = left - mass
        count += 1
        more = left > 0
        if not more.any():
            return out
        active, mass, odds, shape, left = active[more], mass[more], odds[more], shape[more], left[more]
        out[active] = count + 1
