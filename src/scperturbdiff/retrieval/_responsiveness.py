"""How strongly the cells of a population respond: the law of a factor, of mean 1, on what is predicted for all of them.

Where a part of the cells responds the factor is 0 for the others. It varies, too, where predictions are too long or too
short: the law is measured on populations that were left out.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence

    from scperturbdiff.retrieval._conditions import Floats

N_QUANTILES = 64
HARDLY = 0.25
"""Factor below which a cell hardly responds. A law of this mean or less says nothing: predictions are off."""


def factors_along(controls: Floats, treated: Floats, shift: Floats) -> Floats:
    """How far treated cells went along a shift that was predicted for them, in its length, `(n_cells,)`.

    Parameters
    ----------
    controls, treated
        Cells, `(n_controls, n_latent)` and `(n_cells, n_latent)`. What controls vary by themselves is taken off.
    shift
        Predicted mean shift, `(n_latent,)`.
    """
    length = max(float(np.linalg.norm(shift)), 1e-12)
    direction = shift / length
    of_controls = controls @ direction
    places = treated @ direction - of_controls.mean()
    mean, variance = places.mean(), max(float(places.var()), 1e-12)
    kept = np.sqrt(max(variance - float(of_controls.var()), 0.0) / variance)
    out: Floats = (mean + kept * (places - mean)) / length
    return out


def responsiveness_law(factors: Sequence[Floats], lengths: Sequence[float]) -> Floats:
    """Quantiles of the factor, `(n_quantiles,)`, none negative, of mean 1.

    Parameters
    ----------
    factors
        Of the cells of populations that were left out, one population at least.
    lengths
        Of the shifts that were predicted for these, which count by their squares.
    """
    weights = [np.full(len(f), length**2 / len(f)) for f, length in zip(factors, lengths, strict=True)]
    values, weight = np.concatenate(factors), np.concatenate(weights)
    order = np.argsort(values, kind="stable")
    values, weight = values[order], weight[order] + 1e-12
    place = (weight.cumsum() - weight / 2) / weight.sum()
    out: Floats = np.interp((np.arange(N_QUANTILES) + 0.5) / N_QUANTILES, place, values).clip(0)
    mean = float(out.mean())
    return out / mean if mean > HARDLY else np.ones(N_QUANTILES)


def draw_factors(law: Floats, n: int, rng: np.random.Generator) -> Floats:
    """Factors of `n` cells in random order, spread evenly over the law, `(n,)`."""
    place = (rng.permutation(n) + rng.random(n)) / n * len(law) - 0.5
    out: Floats = np.interp(place, np.arange(len(law)), law)
    return out
