"""Negative binomial counts: likelihood, sampling, and how counts of a cell change with their means."""

from __future__ import annotations

import numpy as np
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
    size, mean = mean.shape, mean.reshape(-1)
    uniform = torch.rand_like(mean)
    at = positions(uniform < mean)
    drawn = _draw(uniform.take(at), mean.take(at), shape.reshape(-1).take(at))
    return torch.zeros_like(mean).put_(at, drawn).view(size)


def positions(mask: Tensor) -> Tensor:
    """Where a mask of any size is true, as positions in the flat tensor; NumPy finds them faster on a CPU."""
    if mask.device.type == "cpu":
        return torch.from_numpy(np.flatnonzero(mask.numpy()))
    return mask.reshape(-1).nonzero().view(-1)


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
    all_of = counts, before, after, dispersion
    first, copies = positions(~again), positions(again)
    out = torch.empty_like(counts)
    out.index_copy_(0, first, move(*(x.index_select(0, first) for x in all_of)))
    counts, before, after, dispersion = (x.index_select(0, copies) for x in all_of)
    shape = dispersion + counts
    return out.index_copy_(0, copies, sample_negative_binomial(after * shape / (dispersion + before), shape))


def _move(counts: Tensor, before: Tensor, after: Tensor, dispersion: Tensor) -> Tensor:
    """:func:`move_counts` of cells that are nobody's copy; only entries that may change are looked at."""
    rise, shape = (after - before).reshape(-1), dispersion.reshape(-1)
    out, old, new = counts.reshape(-1).clone(), before.reshape(-1), after.reshape(-1)
    here = positions(out > 0)
    falls = rise.take(here) < 0
    lost, kept = here[falls], here[~falls]
    thinned = _thin(out.take(lost), new.take(lost) / old.take(lost))
    uniform = torch.rand_like(rise)
    # of counts of 0 few are added to: w is expected to be at most 1 there
    fresh = positions((uniform < rise) & (out == 0))
    out.put_(lost, thinned)
    more = torch.cat([fresh, kept])
    drawn = torch.cat([uniform.take(fresh), torch.rand(len(kept), dtype=rise.dtype, device=rise.device)])
    known = shape.take(more) + out.take(more)
    added = _draw(drawn, rise.take(more) * known / (shape.take(more) + old.take(more)), known)
    return out.put_(more, added, accumulate=True).view(counts.shape)


def _move_dense(counts: Tensor, before: Tensor, after: Tensor, dispersion: Tensor) -> Tensor:
    """:func:`_move` for devices on which drawing a number costs less than finding out whether to."""
    shape = dispersion + counts
    kept = torch.binomial(counts, (after / before.clamp(min=EPS)).clamp(max=1))
    return kept + sample_negative_binomial((after - before).clamp(min=0) * shape / (dispersion + before), shape)


def _thin(counts: Tensor, probability: Tensor) -> Tensor:
    """Counts `(n,)`, none of them 0, of which each molecule stays with a probability."""
    out = (torch.rand_like(counts) < probability).to(counts.dtype)
    several = positions(counts > 1)
    return out.put_(several, torch.binomial(counts.take(several), probability.take(several)))


def _draw(uniform: Tensor, mean: Tensor, shape: Tensor) -> Tensor:
    """Negative binomial counts `(n,)` from uniform numbers, which may be conditioned on being less than the mean.

    Counts are 0 where the number is larger than the probability of another count, which is less than the mean. Small
    counts are found by inverting the distribution function, large ones drawn as a gamma-Poisson mixture.
    """
    out = torch.zeros_like(mean)
    mean, shape = mean.double(), shape.double()
    some = uniform < -torch.expm1(-shape * torch.log1p(mean / shape))
    large = mean > LARGE_MEAN
    at = positions(some & ~large)
    out.put_(at, _invert(uniform.take(at).double(), mean.take(at), shape.take(at)).to(out.dtype))
    at = positions(large)
    mean, shape = mean.take(at), shape.take(at)
    return out.put_(at, torch.poisson(mean / shape * torch._standard_gamma(shape)).to(out.dtype))


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
        more = positions(left > 0)
        if not len(more):
            return out
        active, mass, odds, shape, left = (x.take(more) for x in (active, mass, odds, shape, left))
        out.put_(active, torch.full_like(left, count + 1))
