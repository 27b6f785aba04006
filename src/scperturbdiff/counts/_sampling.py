"""Drawing negative binomial counts, fast on a CPU."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

EPS = 1e-8
"""As in scvi-tools' own negative binomial."""
LARGE_MEAN = 4.0
"""Counts of a larger mean are drawn as a gamma-Poisson mixture."""
TINY = 1e-18
"""Probabilities of counts that rounding alone could ask for."""


def sample_negative_binomial(mean: Tensor, shape: Tensor, rng: torch.Generator | None = None) -> Tensor:
    """Negative binomial counts of the given means and shapes (variance = mean + mean^2 / shape), any common size.

    On a CPU gamma and Poisson numbers are nearly all of the cost of prediction, while most counts are 0. There one
    uniform number decides which are (:func:`_draw`).
    """
    if mean.device.type != "cpu":
        return _gamma_poisson(mean, shape, rng)
    size, mean = mean.shape, mean.reshape(-1)
    uniform = uniform_like(mean, rng)
    at = positions(uniform < mean)
    drawn = _draw(uniform.take(at), mean.take(at), shape.reshape(-1).take(at), rng)
    return torch.zeros_like(mean).put_(at, drawn).view(size)


def uniform_like(values: Tensor, rng: torch.Generator | None) -> Tensor:
    """Uniform numbers, as many as `values`; :func:`torch.rand_like` knows only the global generator."""
    return torch.rand(values.shape, generator=rng, dtype=values.dtype, device=values.device)


def _gamma_poisson(mean: Tensor, shape: Tensor, rng: torch.Generator | None) -> Tensor:
    rate = torch._standard_gamma(shape, generator=rng).clamp_(min=torch.finfo(shape.dtype).tiny)
    return torch.poisson(mean / shape * rate, generator=rng)


def positions(mask: Tensor) -> Tensor:
    """Where a mask of any size is true, as positions in the flat tensor; NumPy finds them faster on a CPU."""
    if mask.device.type == "cpu":
        return torch.from_numpy(np.flatnonzero(mask.numpy()))
    return mask.reshape(-1).nonzero().view(-1)


def _draw(uniform: Tensor, mean: Tensor, shape: Tensor, rng: torch.Generator | None) -> Tensor:
    """Negative binomial counts `(n,)` from uniform numbers, which may be conditioned on being less than the mean.

    Counts are 0 where the number is larger than the probability of another count, which is less than the mean. Small
    counts are found by inverting the distribution function, large ones drawn as a gamma-Poisson mixture.
    """
    out = torch.zeros_like(mean)
    mean, shape = mean.double(), shape.double()
    none = -shape * torch.log1p(mean / shape)
    large = mean > LARGE_MEAN
    at = positions((uniform < -torch.expm1(none)) & ~large)
    out.put_(at, _invert(uniform.take(at).double(), mean.take(at), shape.take(at), none.take(at)).to(out.dtype))
    at = positions(large)
    mean, shape = mean.take(at), shape.take(at)
    return out.put_(at, _gamma_poisson(mean, shape, rng).to(out.dtype))


def _invert(uniform: Tensor, mean: Tensor, shape: Tensor, none: Tensor) -> Tensor:
    """Largest counts that a share of at least `uniform` of all counts reach, for small means and counts above 0.

    `none` is the logarithm of the probability of 0; that of other counts would lose it at large shapes.
    """
    left = (-torch.expm1(none) - uniform.clamp(min=2.0**-25)).numpy()  # probability of smaller counts that are not 0
    odds, mass, more = (mean / (shape + mean)).numpy(), none.exp().numpy(), shape.numpy()
    out, active, count = np.ones(len(mean)), np.arange(len(mean)), 0
    while True:  # in NumPy: the last steps are of a few numbers, and calls of torch cost more
        mass = mass * odds * (more + count) / (count + 1)
        left = left - mass
        count += 1
        wanted = np.flatnonzero((left > 0) & (mass > TINY))
        if not len(wanted):
            return torch.from_numpy(out)
        active, mass, odds, more, left = (x[wanted] for x in (active, mass, odds, more, left))
        out[active] = count + 1
