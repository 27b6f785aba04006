"""What a report says of one condition: whether to trust it, and what changes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from scperturbdiff.data import FAR, FEW_CELLS, STATE
from scperturbdiff.evaluation.metrics import gene_moments, rank_genes, subsample
from scperturbdiff.reporting._blocks import Fold, Table, Text
from scperturbdiff.reporting._figures import draw_genes, draw_populations, draw_shifts
from scperturbdiff.reporting._scores import CEILING, NO_CHANGE, NONE, number, spoken
from scperturbdiff.reporting._subject import WAYS

if TYPE_CHECKING:
    import pandas as pd
    from numpy.typing import NDArray

    from scperturbdiff.reporting._blocks import Block, Figure
    from scperturbdiff.reporting._scores import Scores
    from scperturbdiff.reporting._subject import Condition, Subject

    Floats = NDArray[np.float64]

NOISE = 2.0
"""Noise of a metric by which a rule must be better to count."""
TESTED_CELLS = 2000
"""Cells of a population that genes are tested on, at most."""


def doubts_of(subject: Subject, scores: Scores | None) -> dict[Condition, tuple[str, ...]]:
    """Why conditions are not to be trusted; nothing for those that are."""
    behind = _behind_a_rule(scores)
    return {
        condition: (*_doubts_of_cells(subject, condition), *behind.get(condition, ()))
        for condition in subject.conditions
    }


def _behind_a_rule(scores: Scores | None) -> dict[Condition, tuple[str, ...]]:
    """Conditions in which a rule is better beyond the noise of the metric: no change, or else the best one."""
    if scores is None or scores.leading is None:
        return {}
    metric, best = scores.leading
    found: dict[Condition, tuple[str, ...]] = {}
    margin = NOISE * scores.noise(metric)
    for rule in dict.fromkeys([NO_CHANGE, best]):
        for condition, ahead in scores.advantage(metric, rule).items():
            if ahead < -margin:
                found.setdefault(condition, (f"worse than {spoken(rule)} by {spoken(metric)}",))
    return found


def _doubts_of_cells(subject: Subject, condition: Condition) -> list[str]:
    """What evidence of training and numbers of cells say against a condition."""
    found = []
    known = subject.evidence.get(condition)
    if known is not None and np.isnan(known.unexplained) and known.novelty != "control":
        found.append("training knows nothing like it")
    elif known is not None and known.unexplained >= FAR:
        found.append(f"far from training, which leaves {known.unexplained:.0%} of the variance open")
    n_controls = subject.n_controls(condition)
    if n_controls is not None and n_controls < FEW_CELLS:
        found.append(f"{n_controls} control cells")
    rows = subject.real_rows.get(condition)
    if rows is not None and len(rows) < FEW_CELLS:
        found.append(f"{len(rows)} real cells to compare with")
    return found


@dataclass(frozen=True)
class Change:
    """How expression changes in a condition; `None` where there is nothing to compare."""

    predicted: Floats | None
    observed: Floats | None
    top_predicted: list[int]
    top_observed: list[int]


def change_of(subject: Subject, condition: Condition, n_genes: int, seed: int) -> Change:
    """Mean shifts from the controls, shapes `(n_genes,)`, and the positions of the genes that change most."""
    control = subject.control(condition)
    if control is None:
        return Change(None, None, [], [])
    base = gene_moments(control)[0]
    shifts: list[Floats | None] = []
    tops: list[list[int]] = []
    for cells in (subject.predicted(condition), subject.observed(condition)):
        if cells is None:
            shifts.append(None)
            tops.append([])
            continue
        shift = gene_moments(cells)[0] - base
        strength = np.abs(shift)
        if min(cells.shape[0], control.shape[0]) > 1:
            some = subsample(cells, TESTED_CELLS, seed)
            strength = rank_genes(some, subsample(control, TESTED_CELLS, seed))["score"].abs().to_numpy()
        shifts.append(shift)
        tops.append(np.argsort(-strength, kind="stable")[:n_genes].tolist())
    return Change(shifts[0], shifts[1], tops[0], tops[1])


def condition_fold(
    subject: Subject, scores: Scores | None, condition: Condition, doubts: tuple[str, ...], states: pd.DataFrame | None,
    n_genes: int, seed: int,
) -> Fold:  # fmt: skip
    """Everything about one condition."""
    change = change_of(subject, condition, n_genes, seed)
    blocks: list[Block] = [Table(("cells", "number"), _sizes(subject, condition))]
    blocks += _figures(subject, condition, change, seed)
    if change.predicted is None:
        blocks.append(Text("There are no control cells of this context here, so that no shift can be shown."))
    else:
        blocks += _gene_tables(subject, change)
    if scores is not None:
        blocks.append(_score_table(scores, condition))
    if (shares := _states(subject, condition, states)) is not None:
        blocks.append(shares)
    if (known := subject.evidence.get(condition)) is not None:
        way = WAYS.get(known.novelty, known.novelty)
        left = "an unknown share" if np.isnan(known.unexplained) else f"{known.unexplained:.0%}"
        blocks.append(
            Text(f"For the model this is {way}. Training leaves {left} of the variance of the response open.")
        )
    note = f"not to be trusted: {'; '.join(doubts)}" if doubts else ""
    return Fold(subject.name(condition), note, tuple(blocks))


def _sizes(subject: Subject, condition: Condition) -> tuple[tuple[str, str], ...]:
    real, control = subject.real_rows.get(condition), subject.n_controls(condition)
    rows = [("predicted", "a mean" if subject.means else number(len(subject.rows[condition])))]
    rows += [] if real is None else [("real", number(len(real)))]
    return (*rows, ("control", number(control)))


def _figures(subject: Subject, condition: Condition, change: Change, seed: int) -> list[Figure]:
    groups = {
        "control": subject.control(condition),
        "real": subject.observed(condition),
        "predicted": None if subject.means else subject.predicted(condition),
    }
    there = {name: cells for name, cells in groups.items() if cells is not None}
    found = [draw_populations(there, seed) if "predicted" in there else None]
    if change.predicted is not None and change.observed is not None:
        found.append(draw_shifts(change.predicted, change.observed))
    elif change.predicted is not None:
        names = [str(name) for name in subject.genes[change.top_predicted]]
        found.append(draw_genes(names, change.predicted[change.top_predicted]))
    return [figure for figure in found if figure is not None]


def _gene_tables(subject: Subject, change: Change) -> list[Block]:
    """Genes that change most in the prediction, and in the real cells."""

    def rows(top: list[int]) -> tuple[tuple[str, ...], ...]:
        sides = [side for side in (change.predicted, change.observed) if side is not None]
        return tuple((str(subject.genes[i]), *(number(side[i]) for side in sides)) for i in top)

    shifts = ("predicted shift", *(("observed shift",) if change.observed is not None else ()))
    blocks: list[Block] = [Table(("top gene, predicted", *shifts), rows(change.top_predicted))]
    if change.observed is not None:
        both = len(set(change.top_predicted) & set(change.top_observed))
        blocks.append(Table(("top gene, observed", *shifts), rows(change.top_observed)))
        blocks.append(Text(f"{both} of {len(change.top_observed)} genes are in both lists."))
    return blocks


def _score_table(scores: Scores, condition: Condition) -> Table:
    rows = []
    for metric in scores.metrics:
        rule = scores.best_rule(metric)
        ours, ceiling, theirs = (
            number(scores.values.get((metric, model or ""), {}).get(condition))
            for model in (scores.subject, CEILING, rule)
        )
        rows.append((spoken(metric), ours, NONE if rule is None else f"{spoken(rule)}: {theirs}", ceiling))
    return Table(("metric", "prediction", "best simple rule", "split-half ceiling"), tuple(rows))


def _states(subject: Subject, condition: Condition, states: pd.DataFrame | None) -> Table | None:
    """Shares of states of cells among the controls that predicted cells start from."""
    if STATE not in subject.pred.obs or subject.means:
        return None
    share = subject.pred.obs[STATE].astype(str).iloc[subject.rows[condition]].value_counts(normalize=True).sort_index()

    def told(state: Any, column: str) -> str:
        known = states is not None and state in states.index and column in states
        return str(states.loc[state, column]) if known and states is not None else NONE

    rows = tuple((str(state), f"{part:.0%}", told(state, "markers")) for state, part in share.items())
    return Table(("state of cells", "share of predicted cells", "markers"), rows)
