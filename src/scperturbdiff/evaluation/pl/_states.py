"""States of cells that a model found populations to be mixtures of."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from scperturbdiff.evaluation.pl._cells import get_axes

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

SHARE = "share "


def states(table: pd.DataFrame | None, *, n_markers: int = 3, ax: Axes | None = None) -> Axes:
    """Which states of cells the controls of each context are mixtures of.

    Parameters
    ----------
    table
        ``model.states_``.
    n_markers
        Marker genes of each state in the legend.
    ax
        Where to draw.

    Returns
    -------
    The Axes: one bar a context, divided by the shares of states.

    Raises
    ------
    ValueError
        If the model has one state, or `table` is another table.
    """
    if table is None:
        raise ValueError("The model has one state of cells: there is nothing to show (model.states_ is None).")
    if not {"markers", "share"} <= set(table.columns):
        raise ValueError(
            f"Not the table of model.states_: columns {list(table.columns)}, needed 'markers' and 'share'."
        )
    shares = table.filter(regex=f"^{SHARE}").rename(
        columns=lambda name: name.removeprefix(SHARE).replace("\x1f", " / ")
    )
    shares = shares if shares.shape[1] > 1 else table[["share"]].set_axis(["all controls"], axis=1)
    ax = get_axes(ax, (6.4, 0.8 + 0.32 * shares.shape[1]))
    left = np.zeros(shares.shape[1])
    for number, (name, markers) in enumerate(table["markers"].items()):
        label = f"{name}: {', '.join(str(markers).split(', ')[:n_markers])}"
        width = shares.iloc[number].to_numpy(dtype=np.float64)
        ax.barh(list(shares.columns), width, left=left, color=f"C{number % 10}", label=label, height=0.75)
        left += width
    ax.invert_yaxis()
    ax.set_xlim(0, 1)
    ax.set_xlabel("share of control cells")
    ax.legend(title="state: markers", frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    return ax
