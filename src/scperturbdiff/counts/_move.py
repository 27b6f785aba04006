"""How counts of a cell change with their means."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from scperturbdiff.counts._sampling import EPS, _draw, positions, sample_negative_binomial, uniform_like

if TYPE_CHECKING:
    from collections.abc import Callable


def move_counts(
    counts: Tensor,
    before: Tensor,
    after: Tensor,
    dispersion: Tensor,
    repeated: Tensor | None = None,
    rng: torch.Generator | None = None,
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
    repeated
        Cells that are the copy of another one, `(n_cells,)`; `None` for none. They keep `w`, and get Poisson noise of
        their own.
    rng
        What is drawn from, on the device of the counts; `None`: torch's global generator.
    """
    move: Callable[..., Tensor] = _move if counts.device.type == "cpu" else _move_dense
    if repeated is None or not repeated.any():
        return move(counts, before, after, dispersion, rng)
    all_of = counts, before, after, dispersion
    if repeated.all():
        return _redraw(*all_of, rng=rng)
    first, copies = positions(~repeated), positions(repeated)
    out = torch.empty_like(counts)
    out.index_copy_(0, first, move(*(_rows(x, first) for x in all_of), rng))
    return out.index_copy_(0, copies, _redraw(*(_rows(x, copies) for x in all_of), rng=rng))


def _redraw(
    counts: Tensor, before: Tensor, after: Tensor, dispersion: Tensor, *, rng: torch.Generator | None
) -> Tensor:
    """:func:`move_counts` of copies: what their cell shows of `w` is kept, its Poisson noise is not."""
    shape = dispersion + counts
    mean = (after * shape).div_(dispersion + before)
    return sample_negative_binomial(mean, shape, rng)


def _rows(values: Tensor, rows: Tensor) -> Tensor:
    """Some rows, a copy; but what all rows share is not copied."""
    if values.stride(0) == 0:
        return values[:1].expand(len(rows), *values.shape[1:])
    return values.index_select(0, rows)


def scale_response(before: Tensor, after: Tensor, further: Tensor, factor: Tensor) -> Tensor:
    """Means of cells that respond `factor` `(n_cells, 1)` times as strongly as from `before` to `after`.

    The mean of two ways to scale a response. Along the latent space (`further`: what is decoded there) strong responses
    come out too strong, as rates are convex in it; along the rates themselves their mean stays, but not their shape.
    All others `(n_cells, n_genes)`.
    """
    return 0.5 * (further + (before + factor * (after - before)).clamp(min=0))


def _move(
    counts: Tensor, before: Tensor, after: Tensor, dispersion: Tensor, rng: torch.Generator | None = None
) -> Tensor:
    """:func:`move_counts` of cells that are nobody's copy; only entries that may change are looked at."""
    rise = (after - before).reshape(-1)
    out, old, new = counts.reshape(-1).clone(), before.reshape(-1), after.reshape(-1)
    here = positions(out > 0)
    falls = rise.take(here) < 0
    lost, kept = here[falls], here[~falls]
    thinned = _thin(out.take(lost), new.take(lost) / old.take(lost), rng)
    uniform = uniform_like(rise, rng)
    # of counts of 0 few are added to: w is expected to be at most 1 there
    fresh = positions((uniform < rise) & (out == 0))
    out.put_(lost, thinned)
    more = torch.cat([fresh, kept])
    drawn = torch.cat([uniform.take(fresh), torch.rand(len(kept), generator=rng, dtype=rise.dtype, device=rise.device)])
    shape = dispersion[0].take(more % counts.shape[1]) if dispersion.stride(0) == 0 else dispersion.take(more)
    known = shape + out.take(more)
    added = _draw(drawn, rise.take(more) * known / (shape + old.take(more)), known, rng)
    return out.put_(more, added, accumulate=True).view(counts.shape)


def _move_dense(
    counts: Tensor, before: Tensor, after: Tensor, dispersion: Tensor, rng: torch.Generator | None = None
) -> Tensor:
    """:func:`_move` for devices on which drawing a number costs less than finding out whether to."""
    shape = dispersion + counts
    kept = torch.binomial(counts, (after / before.clamp(min=EPS)).clamp(max=1), generator=rng)
    return kept + sample_negative_binomial((after - before).clamp(min=0) * shape / (dispersion + before), shape, rng)


def thin(counts: Tensor, share: float, rng: torch.Generator | None = None) -> Tensor:
    """Counts of any size of which each molecule stays with probability `share`, above 0 and at most 1."""
    if counts.device.type != "cpu":
        return torch.binomial(counts, torch.full_like(counts, share), generator=rng)
    here = positions(counts > 0)
    some = counts.take(here)
    return torch.zeros_like(counts).put_(here, _thin(some, torch.full_like(some, share), rng))


def _thin(counts: Tensor, probability: Tensor, rng: torch.Generator | None) -> Tensor:
    """Counts `(n,)`, none of them 0, of which each molecule stays with a probability."""
    out = (uniform_like(counts, rng) < probability).to(counts.dtype)
    several = positions(counts > 1)
    return out.put_(several, torch.binomial(counts.take(several), probability.take(several), generator=rng))
