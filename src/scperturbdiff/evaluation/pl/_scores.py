"""The heat map of normalised scores."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from scperturbdiff.data import preview
from scperturbdiff.evaluation.metrics import METRICS
from scperturbdiff.evaluation.pl._cells import get_axes

if TYPE_CHECKING:
    from collections.abc import Sequence

    import pandas as pd
    from matplotlib.axes import Axes


def scores(
    summary: pd.DataFrame,
    *,
    metrics: Sequence[str] | None = None,
    models: Sequence[str] | None = None,
    ax: Axes | None = None,
) -> Axes:
    """Heat map of the normalised scores of models: 0 is the best baseline, 1 a real replicate.

    Parameters
    ----------
    summary
        Result of :func:`~scperturbdiff.metrics.summarize_evaluation`.
    metrics
        Metrics to show, in order; `None`: those with a normalised score for any model.
    models
        Models to show, in order; `None`: all but the ceiling.
    ax
        Axes to draw into; `None`: a new figure.

    Returns
    -------
    The Axes: one row per model, one column per metric. Colours end at -1 and 1, the numbers do not; `–` is undefined,
    and numbers stand in brackets where ceiling and floor cannot be told apart with these conditions.
    """
    table = summary.pivot(index="model", columns="metric", values="normalized")
    if models is None:
        models = list(dict.fromkeys(summary.loc[summary["role"] != "ceiling", "model"]))
    if metrics is None:
        metrics = [name for name in METRICS if name in table and table[name].notna().any()]
    for wanted, known, what in ((models, table.index, "models"), (metrics, table.columns, "metrics")):
        unknown = [name for name in wanted if name not in known]
        if unknown:
            raise ValueError(f"{what} not in the summary: {preview(unknown)}. There are: {preview(known, 40)}.")
    if not len(metrics) or not len(models):
        raise ValueError("Nothing to show: the summary has no normalised score (it needs a baseline and a ceiling).")
    values = table.loc[list(models), list(metrics)].to_numpy(dtype=np.float64)
    ax = get_axes(ax, (2.4 + 0.55 * len(metrics), 1.8 + 0.36 * len(models)))
    import matplotlib as mpl

    colors = mpl.colormaps["RdBu"].with_extremes(bad="0.9")
    image = ax.imshow(np.ma.masked_invalid(values), cmap=colors, vmin=-1, vmax=1, aspect="auto")
    separated = summary.pivot(index="model", columns="metric", values="separated")
    sure = separated.loc[list(models), list(metrics)].to_numpy()
    for (row, column), value in np.ndenumerate(values):
        text = "–" if np.isnan(value) else f"{value:.2f}" if abs(value) < 10 else f"{value:.0f}"
        text = text if sure[row, column] or np.isnan(value) else f"({text})"
        color = "white" if abs(value) > 0.65 else "black"
        ax.text(column, row, text, ha="center", va="center", fontsize=7.5, color=color)
    ax.set_xticks(range(len(metrics)), [name.replace("_", " ") for name in metrics], rotation=40, ha="right")
    ax.set_yticks(range(len(models)), [str(name).replace("_", " ") for name in models])
    ax.tick_params(length=0)
    ax.spines[:].set_visible(False)
    bar = ax.figure.colorbar(image, ax=ax, extend="both", pad=0.02, ticks=[-1, 0, 1])
    bar.ax.set_yticklabels(["-1", "0 best baseline", "1 replicate"], fontsize=8)
    bar.outline.set_visible(False)
    return ax
