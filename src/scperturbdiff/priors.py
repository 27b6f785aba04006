"""From what is retrieved to what the generator is told of populations."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from scperturbdiff.diffusion import Prior, StatePrior

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from scperturbdiff.retrieval import Conditions, Retrieved, States


def make_prior(
    found: Retrieved,
    conditions: Conditions,
    of_states: tuple[States, Conditions, Retrieved] | None = None,
    device: torch.device | str = "cpu",
) -> Prior:
    """What the generator is told of `n` populations.

    Parameters
    ----------
    found
        Their retrieved responses.
    conditions
        What these were retrieved for.
    of_states
        The same for the states of their cells, `n_states` rows for each population in turn; `None`: cells of a
        population respond alike.
    device
        Where to.
    """

    def put(values: NDArray, *shape: int) -> torch.Tensor:
        out = torch.as_tensor(values, dtype=torch.float32, device=device)
        return out.reshape(shape) if shape else out

    prior = Prior(put(found.shift), put(found.variance), put(found.spread), put(conditions.control_mean))
    if of_states is None:
        return prior
    states, where, each = of_states
    n, k, d = len(conditions), len(states), found.shift.shape[1]
    mass = put(where.mass, n, k)
    shift, spread = put(each.shift, n, k, d), put(each.spread, n, k)
    parts = StatePrior(shift, spread, put(where.control_mean, n, k, d), put(states.centres), states.softness)
    mean = (mass[..., None] * shift).sum(1)
    variance = (mass * put(each.variance, n, k)).sum(1)
    return replace(prior, shift=mean, variance=variance, states=parts)
