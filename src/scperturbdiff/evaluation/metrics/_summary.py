"""From the table of an evaluation to scores between the best baseline (0) and a replicate (1)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from scperturbdiff.arguments import check_int, check_number
from scperturbdiff.evaluation.metrics._registry import METRICS, Metric
from scperturbdiff.seeds import check_seed

if TYPE_CHECKING:
    from numpy.typing import NDArray


FIXED = ("model", "role", "metric", "value", "status", "reason", "n_pred", "n_real", "n_control")
BEST_BASELINE = "best baseline"


def summarize_evaluation(
    table: pd.DataFrame, *, floor: str = BEST_BASELINE, n_bootstrap: int = 1000, level: float = 0.95, seed: int = 0
) -> pd.DataFrame:
    """Average each metric over conditions and put it between floor and ceiling.

    Parameters
    ----------
    table
        Result of :func:`~scperturbdiff.evaluate`.
    floor
        `"best baseline"`: for each metric the baseline with the best mean. Or the name of one model in the table.
    n_bootstrap, level, seed
        Resamples of the conditions (with replacement) for the intervals, level of these, seed of the resampling.

    Returns
    -------
    One row per model and metric with columns `model`, `role`, `metric`, `better`, `mean` over the conditions with a
    value and its interval `low`, `high`; `normalized`, `normalized_low`, `normalized_high`; `separated`; `floor`, the
    name of the floor; `n_conditions` and `n_nan`, how many of these have no value; `status`, `"ok"` where there is any,
    and `reason`, why there is none at the first condition without.

    `normalized` is `(u - floor) / (ceiling - floor)` of the means over those conditions where model, floor and ceiling
    all have a value: 0 is as good as the floor, 1 as good as the ceiling. (Where 1 is the best value, `u` is the
    distance from 1.) It is NaN where there is no baseline or no ceiling, or where the ceiling is not better than the
    floor, which then says nothing about the model. `separated` tells whether the interval of `ceiling - floor` leaves
    out 0; where it does not, the quotient can have any size and no interval is given. The ceiling compares halves of
    the real cells; a model that samples more cells has less noise and may pass 1. Intervals are over conditions only
    and NaN for a single one.
    """
    needed = [column for column in FIXED[:4] if column not in table]
    if needed:
        raise KeyError(f"table lacks the columns {needed}; it must be the result of evaluate().")
    models = table[["model", "role"]].drop_duplicates().set_index("model")["role"]
    if floor != BEST_BASELINE and floor not in models.index:
        raise ValueError(f"floor={floor!r} is not a model of the table: {list(models.index)}, or {BEST_BASELINE!r}.")
    check_number("level", level, "(0, 1)")
    check_int("n_bootstrap", n_bootstrap, 1)
    check_seed(seed)
    condition = [column for column in table.columns if column not in FIXED]
    quantiles = (0.5 - level / 2, 0.5 + level / 2)
    rows = []
    for name, group in table.groupby("metric", sort=False):
        if name not in METRICS:
            raise ValueError(f"Unknown metric {name!r} in the table. Known: {', '.join(METRICS)}.")
        wide = group.pivot(index=condition, columns="model", values="value").reindex(columns=models.index)
        found = _summarize_metric(METRICS[str(name)], wide, models, floor, n_bootstrap, quantiles, seed)
        rows += [row | _why(group[group["model"] == row["model"]]) for row in found]
    out = pd.DataFrame(rows)
    return out.iloc[np.argsort(models.index.get_indexer(pd.Index(out["model"])), kind="stable")].reset_index(drop=True)


def _why(group: pd.DataFrame) -> dict[str, str]:
    """Status and reason of one model and metric."""
    if "status" not in group:  # a table made by hand
        group = group.assign(status=np.where(group["value"].isna(), "undefined", "ok"), reason="")
    missing = group[group["value"].isna()]
    if missing.empty:
        return {"status": "ok", "reason": ""}
    first = missing.iloc[0]
    status = first["status"] if len(missing) == len(group) else "ok"
    return {"status": str(status), "reason": str(first["reason"])}


def _summarize_metric(
    metric: Metric, wide: pd.DataFrame, models: pd.Series, floor: str, n_bootstrap: int, quantiles: Any, seed: int
) -> list[dict[str, Any]]:
    costs = {model: metric.cost(wide[model]) for model in models.index}
    rules = {model: costs[model] for model in models.index[models == "baseline"]}
    floor_name = _best(rules) if floor == BEST_BASELINE else floor
    top = next(iter(models.index[models == "ceiling"]), None)
    draws = np.random.default_rng(seed).integers(len(wide), size=(n_bootstrap, len(wide)))
    rows = []
    for model, role in models.items():
        values = wide[model].to_numpy(dtype=np.float64)
        low, high = _interval(finite_mean(values[draws]), quantiles, np.isfinite(values).sum())
        row = {
            "model": model, "role": role, "metric": metric.name, "better": metric.better,
            "mean": float(finite_mean(values)), "low": low, "high": high,
            "normalized": np.nan, "normalized_low": np.nan, "normalized_high": np.nan,
            "separated": False, "floor": floor_name,
            "n_conditions": len(values), "n_nan": int(np.isnan(values).sum()),
        }  # fmt: skip
        if floor_name is not None and top is not None:
            trio = np.array([costs[str(model)], costs[floor_name], costs[top]])
            trio = np.where(np.isfinite(trio).all(axis=0), trio, np.nan)
            n_shared = int(np.isfinite(trio[0]).sum())
            gap = finite_mean(trio[1][draws]) - finite_mean(trio[2][draws])
            row["normalized"] = float(_normalize(trio))
            row["separated"] = bool(_interval(gap, quantiles, n_shared)[0] > 0)
            if row["separated"]:
                resampled = _normalize(trio[:, draws])
                row["normalized_low"], row["normalized_high"] = _interval(resampled, quantiles, n_shared)
        rows.append(row)
    return rows


def _best(costs: dict[str, NDArray[np.float64]]) -> str | None:
    """The baseline with the least mean cost on the conditions where all that have values have one."""
    costs = {name: cost for name, cost in costs.items() if np.isfinite(cost).any()}
    if not costs:
        return None
    shared = np.isfinite(np.array(list(costs.values()))).all(axis=0)
    means = {name: float(finite_mean(cost[shared] if shared.any() else cost)) for name, cost in costs.items()}
    return min(means, key=means.__getitem__)


def finite_mean(values: NDArray[np.float64], axis: int = -1) -> NDArray[np.float64]:
    """Mean of the finite values along an axis, NaN where there are none."""
    return np.ma.filled(np.ma.masked_invalid(values).mean(axis=axis), np.nan)


def _normalize(trio: NDArray[np.float64]) -> NDArray[np.float64]:
    """`(floor - cost) / (floor - ceiling)` of the means along the last axis; NaN unless ceiling beats floor."""
    cost, floor, ceiling = (finite_mean(part) for part in trio)
    gap = floor - ceiling
    usable = gap > 0
    return np.where(usable, (floor - cost) / np.where(usable, gap, 1.0), np.nan)


def _interval(resampled: NDArray[np.float64], quantiles: tuple[float, float], n: int) -> tuple[float, float]:
    usable = resampled[np.isfinite(resampled)]
    if n < 2 or not len(usable):
        return float("nan"), float("nan")
    low, high = np.quantile(usable, quantiles)
    return float(low), float(high)
