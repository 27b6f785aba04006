"""What the second stage is shown: populations held out, and retrieved responses as if populations were new."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from scperturbdiff.diffusion import Components, PopulationTensors, Prior
from scperturbdiff.retrieval import Retrieval, Retrieved
from scperturbdiff.training._settings import SETTINGS

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from scperturbdiff.data import PopulationTable
    from scperturbdiff.responses import MeasuredPopulations
    from scperturbdiff.retrieval import Novelty


def split_populations(
    table: PopulationTable, validation_size: float | None, seed: int, has_features: bool = False
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Rows of the populations to train on and of those held out.

    Whole conditions are held out at a time (all batches of a perturbation in a context).

    A perturbation that training would then not know at all says nothing about when to stop: that share of its
    populations is held out if there are several, else none.
    """
    n = len(table)
    if validation_size is None:
        enough = min(max(SETTINGS.held_out, round(0.1 * n)), n // 3)
        validation_size = enough / n if n else 0.0
    if not 0 <= validation_size < 1:
        raise ValueError(f"validation_size={validation_size} must lie in [0, 1): the share of populations held out.")
    wanted = round(n * validation_size)
    condition = table.condition
    rng = np.random.default_rng(seed)
    order = rng.permutation(condition.max() + 1) if n else np.empty(0, int)
    held = np.zeros(n, bool)
    for c in order:
        members = np.flatnonzero(condition == c)
        left = table.component[~held & (condition != c)]
        if not has_features and not np.isin(table.component[members], np.append(left, -1)).all():
            few = max(1, round(validation_size * len(members))) if len(members) > 1 else 0
            members = rng.choice(members, few, replace=False)
        if held.sum() + len(members) > wanted:
            continue
        held[members] = True
    return np.flatnonzero(~held), np.flatnonzero(held)


def population_tensors(
    populations: MeasuredPopulations, retrieved: list[Retrieved], device: torch.device
) -> PopulationTensors:
    """Conditions of populations on the device, with a last row for control populations.

    Parameters
    ----------
    populations
        Populations.
    retrieved
        Their retrieved responses for each way of being new; with none, no response.
    device
        Where to.
    """
    table, centre = populations.table, populations.responses.conditions.control_mean

    def put(values: NDArray, last: float, dtype: torch.dtype) -> torch.Tensor:
        out = torch.as_tensor(values, dtype=dtype)
        return torch.cat([out, torch.full((1, *out.shape[1:]), last, dtype=dtype)]).to(device)

    if not retrieved:
        retrieved = [Retrieved.nothing(*centre.shape)]
    shift, variance, spread = (
        torch.stack([put(part, 0.0, torch.float32) for part in parts])
        for parts in zip(*((r.shift, r.variance, r.spread) for r in retrieved), strict=True)
    )
    centres = put(centre, 0.0, torch.float32).expand(len(retrieved), -1, -1)
    return PopulationTensors(
        Components(put(table.component, -1, torch.long), put(table.dose, 0.0, torch.float32)),
        put(table.categories, -1, torch.long),
        put(table.numbers, 0.0, torch.float32),
        Prior(shift, variance, spread, centres),
    )


def useful_novelties(table: PopulationTable, has_features: bool) -> list[Novelty]:
    """Ways of being new that training can rehearse on these populations."""
    if len(table) < 2:
        return ["seen"]
    out: list[Novelty] = ["replicate"]
    n_contexts = len(np.unique(table.context))
    if n_contexts > 1:
        out.append("context")
    if n_contexts > 1 or (count_replicates(table) > 1).any():
        out.append("pair")
    if has_features:
        out.append("perturbation")
    return out


def rehearsed_responses(retrieval: Retrieval, table: PopulationTable) -> list[Retrieved]:
    """Retrieved responses of the training populations for each way of being new that training rehearses.

    Where a condition has many replicates, leaving one out tells which one it was: the mean of the others and what is
    left out add up to the same sum. A network that has learned to solve for it invents a replicate when it is shown the
    mean of all, as it is at prediction. From `many_replicates` on that mean is what training shows, too.
    """
    out: list[Retrieved] = []
    for novelty in useful_novelties(table, retrieval.features is not None):
        found = retrieval.leave_out(novelty)
        if novelty == "replicate" and (many := count_replicates(table) >= SETTINGS.many_replicates).any():
            found.put(np.flatnonzero(many), retrieval.leave_out("seen", np.flatnonzero(many)))
        out.append(found)
    return out


def count_replicates(table: PopulationTable) -> NDArray[np.int64]:
    """Number of populations of each population's condition."""
    replicates: NDArray[np.int64] = np.bincount(table.condition)[table.condition]
    return replicates
