"""What the second stage is shown: populations held out, and retrieved responses as if populations were new."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from scperturbdiff.diffusion import Components, PopulationSampler, PopulationTensors, Prior
from scperturbdiff.priors import make_prior
from scperturbdiff.responses import response_of_states
from scperturbdiff.retrieval import Retrieved
from scperturbdiff.training._settings import SETTINGS

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from scperturbdiff.data import PopulationTable
    from scperturbdiff.responses import MeasuredPopulations
    from scperturbdiff.retrieval import Novelty, Retrieval, StateRetrieval


def split_populations(
    table: PopulationTable, validation_size: float | None, seed: int, has_features: bool | NDArray[np.bool_] = False
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Rows of the populations to train on and of those held out.

    Whole conditions are held out (all replicates of a perturbation in a context), and only such whose perturbation is
    known from others, or described by features: what else training would not know at all says nothing about it.

    Raises
    ------
    ValueError
        If `validation_size` is not a share, or nothing would be left to train on.
    """
    condition = table.condition
    n = int(condition.max()) + 1 if len(table) else 0
    if validation_size is None:
        validation_size = min(max(SETTINGS.held_out, round(0.1 * n)), n // 3) / max(n, 1)
    if not 0 <= validation_size < 1:
        raise ValueError(f"validation_size={validation_size} must lie in [0, 1): the share of conditions held out.")
    held = known_otherwise(table, round(n * validation_size), np.random.default_rng(seed), has_features)
    if n and held.all():
        raise ValueError(f"All {n} conditions would be held out and none trained on: lower validation_size.")
    return np.flatnonzero(~held), np.flatnonzero(held)


def known_otherwise(
    table: PopulationTable,
    n: int,
    rng: np.random.Generator,
    has_features: bool | NDArray[np.bool_] = False,
    *,
    contexts: bool = False,
) -> NDArray[np.bool_]:
    """Which populations are of a random choice of at most `n` conditions that are known from others, too.

    Their components are, unless they have features, and with `contexts` their contexts as well.
    """
    first = np.unique(table.condition, return_index=True)[1]
    components, context = [np.unique(row[row >= 0]) for row in table.component[first]], table.context[first]
    left = np.bincount(np.concatenate([*components, np.empty(0, np.int64)]))  # conditions of each that stay
    left_there = dict(zip(*np.unique(context, return_counts=True), strict=True))
    described = np.zeros(len(left), bool) | np.asarray(has_features).reshape(-1)[: len(left)]
    chosen = list[int]()
    for c in rng.permutation(len(first)):
        if len(chosen) == n:
            break
        known = (described[components[c]] | (left[components[c]] > 1)).all()
        if known and (left_there[context[c]] > 1 or not contexts):
            left[components[c]] -= 1
            left_there[context[c]] -= 1
            chosen.append(c)
    return np.isin(table.condition, chosen)


def have_features(features: NDArray[np.float64] | None) -> bool | NDArray[np.bool_]:
    """Which components have features, by their rows in the table; without one none has."""
    return False if features is None else np.asarray(np.isfinite(features).all(axis=1))


def hold_out(
    table: PopulationTable, validation_size: float | None, seed: int, has_features: bool | NDArray[np.bool_] = False
) -> tuple[NDArray[np.int64], NDArray[np.int64], bool]:
    """Rows of the populations to train on and of those held out, and whether these say anything about a network.

    Too few conditions say nothing: none is held out then, unless the user asked for a share. A share of 0 asks for a
    network that nothing is known about.
    """
    training, held_out = split_populations(table, validation_size, seed, has_features=has_features)
    least = SETTINGS.min_held_out if validation_size is None else int(validation_size > 0)
    enough = len(table) == 0 or len(np.unique(table.condition[held_out])) >= least
    return (training, held_out, True) if enough else (np.arange(len(table)), np.empty(0, np.int64), False)


def check_shared(
    table: PopulationTable,
    validation_size: float | None,
    seed: int,
    has_features: bool | NDArray[np.bool_] = False,
    *,
    asked: bool,
    n_ranks: int,
) -> None:
    """Raise, before anything is trained, the error of :meth:`PopulationSampler.share` if there are too many processes.

    `asked` says whether a network is trained even where populations are too few to tell if it helps.
    """
    if n_ranks == 1:
        return
    training, _, enough = hold_out(table, validation_size, seed, has_features)
    if enough or asked:
        some = training[: SETTINGS.rehearsed]
        population_sampler(table.take(some), torch.device("cpu")).share(0, n_ranks)


def population_sampler(table: PopulationTable, device: torch.device) -> PopulationSampler:
    """Draws the populations of `table`; control populations, to be pretrained on, where there are none."""
    perturbed = len(table) > 0
    if perturbed:
        cells, controls, group = table.cells, table.match.groups, table.match.group
    else:
        cells, controls, group = table.controls, table.controls, np.arange(len(table.controls))
    (cells_of, controls_of) = ((g.rows, g.start, g.count) for g in (cells, controls))
    return PopulationSampler(cells_of, controls_of, torch.as_tensor(group), device, perturbed=perturbed)


def population_tensors(
    populations: MeasuredPopulations, priors: Sequence[Prior], device: torch.device
) -> PopulationTensors:
    """Conditions of populations on the device, with a last row for control populations.

    Parameters
    ----------
    populations
        Populations.
    priors
        Their retrieved responses for each way of being new; with none, no response.
    device
        Where to.
    """
    table = populations.table

    def put(values: NDArray, last: float, dtype: torch.dtype) -> torch.Tensor:
        return with_last(torch.as_tensor(values, dtype=dtype, device=device), last)

    def with_last(values: torch.Tensor, last: float = 0.0) -> torch.Tensor:
        return torch.cat([values, torch.full((1, *values.shape[1:]), last, dtype=values.dtype, device=device)])

    priors = priors or [Prior.none(len(table), populations.latent.shape[1], device)]
    return PopulationTensors(
        Components(put(table.component, -1, torch.long), put(table.dose, 0.0, torch.float32)),
        put(table.categories, -1, torch.long),
        put(table.numbers, 0.0, torch.float32),
        Prior.stack([prior.map(with_last) for prior in priors]),
    )


def useful_novelties(table: PopulationTable, retrieval: Retrieval) -> list[Novelty]:
    """Ways of being new that training can rehearse on these populations, of which `retrieval` is."""
    if len(table) < 2:
        return ["seen"]
    out: list[Novelty] = ["replicate"]
    if retrieval.rehearsed("context"):
        out.append("context")
    if retrieval.rehearsed("context") or (count_replicates(table) > 1).any():
        out.append("pair")
    if retrieval.rehearsed("perturbation"):
        out.append("perturbation")
    return out


def left_out_prior(
    populations: MeasuredPopulations,
    retrieval: Retrieval,
    by_state: StateRetrieval | None,
    novelty: Novelty,
    rows: NDArray[np.int64],
    device: torch.device | str = "cpu",
    *,
    shown: bool = False,
) -> Prior:
    """What is retrieved of training populations `rows` as if each were new in the way of `novelty`.

    Where a condition has many replicates, leaving one out tells which one it was: the mean of the others and what is
    left out add up to the same sum. A network that has learned to solve for it invents a replicate when it is shown the
    mean of all, as it is at prediction. From `many_replicates` on that mean is what is given, to be `shown` to a
    network; it is no evidence.
    """
    many = np.zeros(len(rows), bool)
    if shown and novelty == "replicate":
        many = count_replicates(populations.table)[rows] >= SETTINGS.many_replicates
    found = _leave_out(retrieval, novelty, rows, many, device)
    conditions = retrieval.responses.conditions.take(rows)
    if by_state is None:
        return make_prior(found, conditions, device=device)
    of_states = by_state.rows(rows)
    each = _leave_out(by_state.retrieval, novelty, of_states, np.repeat(many, len(by_state.states)), device)
    where = by_state.retrieval.responses.conditions.take(of_states)
    return make_prior(found, conditions, (by_state.states, where, each), device)


def predicted_prior(
    populations: MeasuredPopulations,
    retrieval: Retrieval,
    by_state: StateRetrieval | None,
    device: torch.device | str = "cpu",
) -> tuple[Prior, Retrieved]:
    """What is retrieved of `populations` that `retrieval` does not know, for a generator and as it is."""
    conditions = populations.responses.conditions
    found, of_states = retrieval.predict(conditions), None
    if by_state is not None:
        where = response_of_states(populations, by_state.states, by_state.retrieval.settings).conditions
        of_states = by_state.states, where, by_state.retrieval.predict(where)
    return make_prior(found, conditions, of_states, device), found


def _leave_out(
    retrieval: Retrieval,
    novelty: Novelty,
    rows: NDArray[np.int64],
    whole: NDArray[np.bool_],
    device: torch.device | str,
) -> Retrieved:
    """Responses of `rows` as if new in the way of `novelty`, but as if seen where `whole`."""
    out = Retrieved.nothing(len(rows), retrieval.responses.shift.shape[1], novelty=novelty)
    ways: list[tuple[Novelty, NDArray[np.bool_]]] = [(novelty, ~whole), ("seen", whole)]
    for way, of in ways:
        if of.any():
            out.put(np.flatnonzero(of), retrieval.leave_out(way, rows[of], device=device))
    return out


def rehearsed_priors(
    populations: MeasuredPopulations,
    retrieval: Retrieval,
    by_state: StateRetrieval | None,
    rows: NDArray[np.int64],
    device: torch.device,
) -> list[Prior]:
    """What is retrieved of the training populations `rows` for each way of being new that training rehearses."""
    ways = useful_novelties(populations.table, retrieval)
    return [left_out_prior(populations, retrieval, by_state, way, rows, device, shown=True) for way in ways]


def count_replicates(table: PopulationTable) -> NDArray[np.int64]:
    """Number of populations of each population's condition."""
    replicates: NDArray[np.int64] = np.bincount(table.condition)[table.condition]
    return replicates
