"""Figures of genes: mean shifts and distributions."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from scperturbdiff.evaluation.metrics import mean_shift as shift_of_means
from scperturbdiff.evaluation.metrics import pearson
from scperturbdiff.evaluation.pl._cells import COLORS, get_axes, label_points, read_condition

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from anndata import AnnData
    from matplotlib.axes import Axes


def mean_shift(
    pred: AnnData,
    real: AnnData,
    control: str | AnnData,
    *,
    perturbation_key: str,
    perturbation: str | None = None,
    context: Mapping[str, str] | None = None,
    separator: str | None = "+",
    n_label: int = 10,
    genes: Sequence[str] | None = None,
    layer_pred: str | None = "counts",
    layer_real: str | None = None,
    target_sum: float = 1e4,
    ax: Axes | None = None,
) -> Axes:
    """Predicted against observed mean shift of every gene from the real controls, log-normalised.

    Parameters
    ----------
    pred, real, control
        Predicted cells, real cells, and the label of the controls in `real` or an AnnData of real control cells.
    perturbation_key
        Column of `obs` with the perturbation.
    perturbation
        Which one; `None` where `pred` holds only one.
    context
        Columns and values that choose the cells in all three, such as `{"cell_type": "B"}`.
    separator
        Joins the names of a combination; `None`: no label is one.
    n_label
        How many of the genes that change most in the real cells are named.
    genes
        Genes to name instead.
    layer_pred, layer_real
        Layers with counts; `None` for X.
    target_sum
        Counts per cell after normalisation.
    ax
        Axes to draw into; `None`: a new figure.

    Returns
    -------
    The Axes. Its title has the Pearson correlation over genes.
    """
    cells = read_condition(
        pred, real, control, perturbation_key=perturbation_key, perturbation=perturbation, context=context,
        separator=separator, layer_pred=layer_pred, layer_real=layer_real, target_sum=target_sum,
    )  # fmt: skip
    names = cells.choose(genes, n_label) if genes is not None or n_label > 0 else []
    observed, predicted = (shift_of_means(matrix, cells.control) for matrix in (cells.real, cells.pred))
    at = cells.genes.get_indexer(pd.Index(names))
    ax = get_axes(ax, (4.6, 4.4))
    low, high = min(observed.min(), predicted.min()), max(observed.max(), predicted.max())
    pad = 0.12 * (high - low) or 1.0
    ax.set_xlim(low - pad, high + pad)
    ax.set_ylim(low - pad, high + pad)
    ax.axline((0, 0), slope=1, color="0.75", lw=0.8, zorder=0)
    ax.axhline(0, color="0.88", lw=0.8, zorder=0)
    ax.axvline(0, color="0.88", lw=0.8, zorder=0)
    ax.scatter(observed, predicted, s=9, color="0.55", alpha=0.6, linewidths=0, rasterized=len(observed) > 5000)
    ax.scatter(observed[at], predicted[at], s=16, color=COLORS["predicted"], linewidths=0, zorder=3)
    r = pearson(observed, predicted)
    ax.set_title(f"{cells.title}  (r = {r:.2f}, {len(observed)} genes)", fontsize=10)
    ax.set_xlabel("observed mean shift")
    ax.set_ylabel("predicted mean shift")
    label_points(ax, observed[at], predicted[at], names)
    return ax


def violins(
    pred: AnnData,
    real: AnnData,
    control: str | AnnData,
    genes: Sequence[str] | None = None,
    *,
    perturbation_key: str,
    perturbation: str | None = None,
    context: Mapping[str, str] | None = None,
    separator: str | None = "+",
    n_genes: int = 6,
    layer_pred: str | None = "counts",
    layer_real: str | None = None,
    target_sum: float = 1e4,
    ax: Axes | None = None,
) -> Axes:
    """Distribution over cells of a few genes in control, real perturbed and predicted cells, log-normalised.

    Parameters
    ----------
    pred, real, control, perturbation_key, perturbation, context, separator, layer_pred, layer_real, target_sum, ax
        As in :func:`mean_shift`.
    genes
        Genes to show; `None`: the `n_genes` that change most in the real cells.
    n_genes
        How many genes where `genes` is `None`.

    Returns
    -------
    The Axes: per gene a violin each of control, real and predicted cells, with a bar at the mean.
    """
    cells = read_condition(
        pred, real, control, perturbation_key=perturbation_key, perturbation=perturbation, context=context,
        separator=separator, layer_pred=layer_pred, layer_real=layer_real, target_sum=target_sum,
    )  # fmt: skip
    names = cells.choose(genes, n_genes)
    at = cells.genes.get_indexer(pd.Index(names))
    ax = get_axes(ax, (1.0 + 0.95 * len(names), 3.4))
    groups = {"control": cells.control, "real": cells.real, "predicted": cells.pred}
    handles: list[Any] = []
    for offset, (name, matrix) in zip((-0.27, 0.0, 0.27), groups.items(), strict=True):
        values = matrix[:, at].toarray()
        positions = np.arange(len(names)) + offset
        drawn: Any = ax.violinplot(list(values.T), positions=positions, widths=0.25, showextrema=False)
        for body in drawn["bodies"]:
            body.set(facecolor=COLORS[name], edgecolor="none", alpha=0.75)
        ax.hlines(values.mean(axis=0), positions - 0.1, positions + 0.1, color="black", lw=1.2)
        handles.append(drawn["bodies"][0])
    ax.set_xticks(
        range(len(names)), names, rotation=30 if len(names) > 4 else 0, ha="right" if len(names) > 4 else "center"
    )
    ax.set_ylabel("log-normalised expression")
    ax.set_title(cells.title, fontsize=10, loc="left")
    ax.legend(handles, list(groups), frameon=False, fontsize=8, ncols=3, loc="lower right", bbox_to_anchor=(1, 1))
    return ax
