"""Figures the commands write."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    import pandas as pd
    from anndata import AnnData


def draw_conditions(
    kind: Literal["populations", "mean_shift"] | str,
    pred: AnnData,
    real: AnnData,
    control: str,
    conditions: pd.DataFrame,
    path: Path,
    *,
    perturbation_key: str,
    separator: str | None = "+",
    notes: Sequence[str] | None = None,
    layer_pred: str | None = "counts",
    layer_real: str | None = None,
) -> None:
    """Write a figure with one panel a condition.

    Parameters
    ----------
    kind
        Function of :mod:`scperturbdiff.pl` that draws a panel.
    pred, real, control, perturbation_key, separator, layer_pred, layer_real
        As for that function.
    conditions
        One row a panel: columns of the contexts and of the perturbation.
    path
        File to write.
    notes
        A line below the title of each panel.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    from scperturbdiff import pl

    n = len(conditions)
    n_columns = min(n, 3)
    n_rows = -(-n // n_columns)
    figure = Figure(figsize=(3.9 * n_columns, 3.7 * n_rows), layout="constrained")
    FigureCanvasAgg(figure)  # needs no display
    axes = figure.subplots(n_rows, n_columns, squeeze=False)
    for i, ax in enumerate(axes.flat):
        if i >= n:
            ax.set_visible(False)
            continue
        context = {str(key): str(value) for key, value in conditions.iloc[i].items()}
        getattr(pl, kind)(
            pred, real, control, perturbation_key=perturbation_key, perturbation=context.pop(perturbation_key),
            context=context, separator=separator, layer_pred=layer_pred, layer_real=layer_real, ax=ax,
        )  # fmt: skip
        if notes is not None:
            ax.set_title(f"{ax.get_title(loc='left')}\n{notes[i]}", fontsize=9, loc="left")
    _save(figure, path)


def draw_scores(summary: pd.DataFrame, path: Path) -> None:
    """Write the heat map of normalised scores."""
    from scperturbdiff import pl

    _save(pl.scores(summary).figure, path)


def _save(figure: Any, path: Path) -> None:
    figure.savefig(path, dpi=100, bbox_inches="tight")
