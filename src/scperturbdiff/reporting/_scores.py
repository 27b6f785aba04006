"""From the table of an evaluation to the comparison with the best rule, the table of metrics, and the heat map."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from scperturbdiff.evaluation.metrics import DEFAULT_METRICS, METRICS
from scperturbdiff.reporting._blocks import Items, Table, Text

if TYPE_CHECKING:
    from collections.abc import Sequence

    import pandas as pd

    from scperturbdiff.reporting._blocks import Block
    from scperturbdiff.reporting._subject import Condition

CEILING = "ceiling"
NO_CHANGE = "no_change"
ENOUGH = 3
"""Conditions from which on the spread of their ceilings says something."""
NONE = "–"


@dataclass(frozen=True)
class Scores:
    """An evaluation, by condition.

    Attributes
    ----------
    table, summary
        As :func:`~scperturbdiff.evaluate` and :func:`~scperturbdiff.summarize_evaluation` return them.
    keys
        Columns that name a condition.
    subject
        The model that the report is about, the first of the predictions.
    """

    table: pd.DataFrame
    summary: pd.DataFrame
    keys: tuple[str, ...]
    subject: str

    @property
    def metrics(self) -> list[str]:
        """The default ones first."""
        there = list(dict.fromkeys(self.table["metric"]))
        return [m for m in DEFAULT_METRICS if m in there] + [m for m in there if m not in DEFAULT_METRICS]

    @cached_property
    def values(self) -> dict[tuple[str, str], dict[Condition, float]]:
        """Values of each metric and model, by condition."""
        found: dict[tuple[str, str], dict[Condition, float]] = {}
        names = map(tuple, self.table[list(self.keys)].astype(str).to_numpy())
        rows = zip(self.table["metric"], self.table["model"], names, self.table["value"], strict=True)
        for metric, model, condition, value in rows:
            found.setdefault((str(metric), str(model)), {})[condition] = float(value)
        return found

    def best_rule(self, metric: str) -> str | None:
        """The rule with the best mean."""
        floor = self.summary.loc[self.summary["metric"] == metric, "floor"].iloc[0]
        return str(floor) if isinstance(floor, str) else None

    def advantage(self, metric: str, rule: str) -> dict[Condition, float]:
        """How much better the subject is than a rule, in units of the metric, where both have a value."""
        ours, theirs, cost = (
            self.values[metric, self.subject],
            self.values.get((metric, rule), {}),
            METRICS[metric].cost,
        )
        ahead = {c: float(cost(theirs[c]) - cost(value)) for c, value in ours.items() if c in theirs}
        return {c: value for c, value in ahead.items() if np.isfinite(value)}

    def noise(self, metric: str) -> float:
        """How far values of a metric are off by the sampling of cells: how those of the split-half ceiling spread.

        0 where there are too few of them to say. Where conditions differ in how hard they are, it is an upper bound.
        """
        halves = np.array(list(self.values.get((metric, CEILING), {}).values()))
        halves = halves[np.isfinite(halves)]
        return float(halves.std(ddof=1)) if len(halves) >= ENOUGH else 0.0

    @property
    def leading(self) -> tuple[str, str] | None:
        """The metric that the first sentence is about, and the best rule by it."""
        for metric in self.metrics:
            rule = self.best_rule(metric)
            if rule is not None and self.advantage(metric, rule):
                return metric, rule
        return None


def number(value: Any, digits: int = 3) -> str:
    """A number as text; a dash where there is none."""
    if value is None or (isinstance(value, float | np.floating) and not np.isfinite(value)):
        return NONE
    return f"{value:,}" if isinstance(value, int | np.integer) else f"{float(value):.{digits}g}"


def spoken(name: str) -> str:
    """A name of a metric or rule in a sentence."""
    return name.replace("_", " ")


def first_sentence(scores: Scores | None, n: int) -> str:
    """Whether the prediction is better than the best rule."""
    if scores is None:
        return f"There are no real cells to compare with: this page shows what was predicted for {n} conditions."
    if scores.leading is None:
        rules = scores.table.loc[scores.table["role"] == "baseline", "model"].unique()
        if not len(rules):
            return (
                "No simple rule was compared with the prediction, as there were no training cells to fit one on: these "
                "scores do not say whether a model was needed."
            )
        return f"None of the {len(rules)} simple rules has a value to compare the prediction with; see below why."
    metric, rule = scores.leading
    ahead = list(scores.advantage(metric, rule).values())
    n = sum(value > 0 for value in ahead)
    return (
        f"The prediction is better than the best simple rule, {spoken(rule)}, on {n} of {len(ahead)} conditions "
        f"({spoken(metric)})."
    )


def metric_blocks(scores: Scores) -> tuple[Block, ...]:
    """The table of metrics, and which rules are missing."""
    rows = []
    models = list(scores.summary.loc[scores.summary["role"] == "prediction", "model"].unique())
    for metric in scores.metrics:
        part: Any = scores.summary[scores.summary["metric"] == metric].set_index("model")
        rule, better = scores.best_rule(metric), METRICS[metric].better
        for model in models:
            row = part.loc[model]
            rows.append(
                (
                    spoken(metric),
                    {"one": "1 is best"}.get(better, f"{better} is better"),
                    *((str(model),) if len(models) > 1 else ()),
                    _interval(row, "mean", "low", "high"),
                    NONE if rule is None else f"{spoken(rule)}: {number(part.loc[rule, 'mean'])}",
                    _interval(part.loc[CEILING], "mean", "low", "high") if CEILING in part.index else NONE,
                    _interval(row, "normalized", "normalized_low", "normalized_high"),
                    f"{row['n_conditions'] - row['n_nan']} of {row['n_conditions']}",
                )
            )
    model = ("model",) if len(models) > 1 else ()
    header = ("metric", "direction", *model, "prediction [95 %]", "best simple rule", "split-half ceiling [95 %]")
    blocks: list[Block] = [
        Table((*header, "0 rule to 1 ceiling [95 %]", "conditions"), tuple(rows)),
        Text(
            "Means over conditions, with intervals over conditions. The ceiling is one half of the real cells scored "
            "against the other. The last score is 0 at the best simple rule and 1 at the ceiling; it has an interval "
            "where these two can be told apart."
        ),
    ]
    if missing := missing_rules(scores):
        blocks += [Text("Simple rules without a value:"), Items(tuple(missing))]
    return tuple(blocks)


def missing_rules(scores: Scores) -> list[str]:
    """Rules that could not be fitted, or not predict every condition, and why."""
    out = []
    rules = scores.table[scores.table["role"] == "baseline"]
    for name, group in rules.groupby("model", sort=False):
        lost = group[group["status"].isin(["not fitted", "unavailable"])]
        if lost.empty:
            continue
        n, of = len(lost[list(scores.keys)].drop_duplicates()), len(group[list(scores.keys)].drop_duplicates())
        status, reason = lost.iloc[0][["status", "reason"]]
        out.append(f"{spoken(str(name))}: {status} in {n} of {of} conditions. {reason}")
    return out


def _interval(row: pd.Series, mean: str, low: str, high: str) -> str:
    if not np.isfinite(row[mean]):
        return NONE
    inside = f" [{number(row[low])}, {number(row[high])}]" if np.isfinite(row[low]) else ""
    return number(row[mean]) + inside


def heat_map(scores: Scores, conditions: Sequence[Condition], names: Sequence[str]) -> Table:
    """Conditions x metrics: values of the prediction, coloured by how they compare with the best rule."""
    values: list[list[str]] = []
    colors: list[list[float | None]] = []
    for metric in scores.metrics:
        ours, rule = scores.values[metric, scores.subject], scores.best_rule(metric)
        values.append([number(ours.get(c)) for c in conditions])
        ahead = {} if rule is None else scores.advantage(metric, rule)
        largest = max(map(abs, ahead.values()), default=0.0)
        colors.append([ahead[c] / largest if c in ahead and largest > 0 else None for c in conditions])
    rows = tuple((name, *column) for name, column in zip(names, zip(*values, strict=True), strict=True))
    return Table(("condition", *map(spoken, scores.metrics)), rows, tuple(zip(*colors, strict=True)))
