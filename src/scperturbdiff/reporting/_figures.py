"""Figures of a condition, as bytes of PNG files."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING, Any

from scipy import sparse

from scperturbdiff.evaluation.metrics import Projection, pearson, subsample
from scperturbdiff.evaluation.pl import COLORS, scatter_groups, scatter_shifts
from scperturbdiff.reporting._blocks import Figure

if TYPE_CHECKING:
    from collections.abc import Mapping

    import numpy as np
    from matplotlib.axes import Axes
    from numpy.typing import NDArray

SIZE, DPI = (4.6, 3.8), 100
SHOWN_CELLS = 500
"""Cells of each kind in a figure, at most."""
PLAIN: dict[Any, Any] = {"text.parse_math": False, "text.usetex": False, "font.size": 9}
"""Names of users are no formulas, whatever is in them."""


def draw_populations(groups: Mapping[str, Any], seed: int) -> Figure | None:
    """Cells of each kind (log-normalised CSR) in two principal components, fitted on the real ones among them.

    `None` where there are not two cells that differ to fit them on.
    """
    shown = {name: subsample(cells, SHOWN_CELLS, seed) for name, cells in groups.items()}
    measured = [cells for name, cells in shown.items() if name != "predicted"] or [shown["predicted"]]
    try:
        place = Projection(sparse.vstack(measured, format="csr"), n_pcs=2, seed=seed)
    except ValueError:  # all cells are alike
        return None
    points = {name: place(cells) for name, cells in shown.items()}
    if min(found.shape[1] for found in points.values()) < 2:
        return None

    def draw(ax: Axes) -> None:
        scatter_groups(ax, points, {name: groups[name].shape[0] for name in points}, size=9, seed=seed)
        ax.set(xlabel="PC1", ylabel="PC2", title="populations")
        ax.legend(frameon=False, fontsize=8)

    return _png(draw, f"Cells in two principal components: {', '.join(points)}.")


def draw_shifts(predicted: NDArray[np.float64], observed: NDArray[np.float64]) -> Figure:
    """Predicted against observed mean shift, one point a gene."""

    def draw(ax: Axes) -> None:
        scatter_shifts(ax, observed, predicted, COLORS["predicted"])
        ax.set_title(f"shift of {len(observed):,} genes (r = {pearson(predicted, observed):.2f})")

    return _png(draw, "Predicted against observed mean shift of every gene.")


def draw_genes(names: list[str], shifts: NDArray[np.float64]) -> Figure:
    """Bars of the shifts of a few genes, the first on top."""

    def draw(ax: Axes) -> None:
        ax.barh(range(len(names)), shifts, color=COLORS["predicted"])
        ax.set_yticks(range(len(names)), [name if len(name) <= 24 else f"{name[:23]}…" for name in names])
        ax.invert_yaxis()
        ax.axvline(0, color="0.6", lw=0.8)
        ax.set(xlabel="predicted mean shift", title="genes that change most")

    return _png(draw, "Predicted mean shift of the genes that change most.")


def _png(draw: Any, alt: str) -> Figure:
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure as Drawing

    with rc_context(PLAIN):
        figure = Drawing(figsize=SIZE, layout="constrained")
        FigureCanvasAgg(figure)  # needs no display
        ax = figure.subplots()
        ax.spines[["top", "right"]].set_visible(False)
        draw(ax)
        stream = io.BytesIO()
        figure.savefig(stream, format="png", dpi=DPI)
    return Figure(stream.getvalue(), alt)
