"""Figures the commands write."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence

    import pandas as pd
    from anndata import AnnData
    from matplotlib.figure import Figure


def draw_conditions(
    kind: str,
    cells: tuple[AnnData, AnnData, str],
    conditions: pd.DataFrame,
    *,
    perturbation_key: str,
    notes: Sequence[str] | None = None,
    **shown: Any,
) -> Figure:
    """A figure with one panel a condition, which is a row of `conditions`: contexts and perturbation.

    `kind` names the function of :mod:`scperturbdiff.pl` that draws a panel; `cells` (predicted, real and control) and
    `shown` are its arguments. `notes` are lines below the titles of panels.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    from scperturbdiff import pl

    draw = getattr(pl, kind)
    n = len(conditions)
    n_columns = min(n, 3)
    n_rows = -(-n // n_columns)
    figure = Figure(figsize=(3.9 * n_columns, 3.7 * n_rows), layout="constrained")
    FigureCanvasAgg(figure)  # needs no display
    axes = figure.subplots(n_rows, n_columns, squeeze=False)
    for ax in axes.flat[n:]:
        ax.set_visible(False)
    for i, ax in enumerate(axes.flat[:n]):
        context = {str(key): str(value) for key, value in conditions.iloc[i].items()}
        name = context.pop(perturbation_key)
        draw(*cells, perturbation_key=perturbation_key, perturbation=name, context=context, ax=ax, **shown)
        if notes is not None:
            ax.set_title(f"{ax.get_title(loc='left')}\n{notes[i]}", fontsize=9, loc="left")
    return figure
