"""Which perturbations act alike."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import numpy as np

from scperturbdiff.arguments import check_choice
from scperturbdiff.data import preview
from scperturbdiff.evaluation.pl._cells import get_axes
from scperturbdiff.evaluation.pl._groups import read_groups

if TYPE_CHECKING:
    from typing import Unpack

    from anndata import AnnData
    from matplotlib.axes import Axes
    from numpy.typing import NDArray

    from scperturbdiff.evaluation.pl._groups import Groups, ShownGroups

    Floats = NDArray[np.float64]

MOST_NAMES = 60
"""Perturbations whose names are written, at most."""


def similarity(
    pred: AnnData | None,
    real: AnnData,
    control: str | AnnData,
    *,
    kind: Literal["both", "predicted", "real"] = "both",
    ax: Axes | None = None,
    **shown: Unpack[ShownGroups],
) -> Axes:
    """Correlations between the mean shifts of perturbations, those that act alike beside each other.

    Parameters
    ----------
    pred, real, control
        Predicted cells (`None` with ``kind="real"``), real cells, and the label of the controls in `real` or an AnnData
        of real control cells. Shifts of both are from the real controls.
    kind
        Which shifts: ``"predicted"``, ``"real"``, or ``"both"``, of perturbations and contexts that are in either:
        predicted ones above the diagonal, real ones below, and on it the correlation between the two.
    perturbation_key
        Column of `obs` with the perturbation.
    context_keys
        Columns with contexts. Shifts are taken within a context and averaged over contexts; without them all cells are
        one context, in which another mixture of cells looks like a shift.
    separator, layer_pred, layer_real, target_sum, normalized, ax
        As in :func:`mean_shift`.

    Returns
    -------
    The Axes: a heat map of Pearson correlations over genes from -1 to 1, ordered by average linkage on `1 - r` (of the
    real ones, if there are). Grey is undefined: a shift that is 0 in every gene.

    Raises
    ------
    ValueError
        If fewer than two perturbations can be shown, or a context has no controls.
    """
    check_choice("kind", kind, ("both", "predicted", "real"))
    if pred is None and kind != "real":
        raise ValueError(f"pred=None has no predicted shifts, which kind={kind!r} shows: pass kind='real'.")
    groups = read_groups(None if kind == "real" else pred, real, control, **shown)
    sides: list[str] = ["predicted", "real"] if kind == "both" else [kind]
    names, shifts = _mean_shifts(groups, sides)
    if len(names) < 2:
        raise ValueError(f"kind={kind!r}: correlations need 2 perturbations, and there are {preview(names) or 'none'}.")
    unit = {side: _standardise(of) for side, of in shifts.items()}
    order = _order(unit[sides[-1]] @ unit[sides[-1]].T)
    unit = {side: of[order] for side, of in unit.items()}
    values = unit[sides[-1]] @ unit[sides[-1]].T
    if kind == "both":
        above, own = unit["predicted"] @ unit["predicted"].T, (unit["predicted"] * unit["real"]).sum(1)
        values = np.triu(above, 1) + np.tril(values, -1) + np.diag(own)
    return _draw(values, [names[i] for i in order], kind, ax)


def _mean_shifts(groups: Groups, sides: list[str]) -> tuple[list[str], dict[str, Floats]]:
    """Perturbations, and their mean shifts `(n_perturbations, n_genes)` over the contexts that all `sides` have."""
    shared = [c for c in groups.cells[sides[0]] if all(c in groups.cells[side] for side in sides)]
    names = sorted({condition[-1] for condition in shared})

    def mean(side: str, name: str) -> Floats:
        of = groups.cells[side]
        shifts: Floats = np.array([of[c].mean - groups.control(side, c).mean for c in shared if c[-1] == name])
        return shifts.mean(axis=0)

    return names, {side: np.array([mean(side, name) for name in names]) for side in sides}


def _standardise(shifts: Floats) -> Floats:
    """Shifts whose products are their correlations; NaN for those that are the same in every gene."""
    centred = shifts - shifts.mean(axis=1, keepdims=True)
    length = np.linalg.norm(centred, axis=1, keepdims=True)
    return centred / np.where(length > 0, length, np.nan)


def _order(correlation: Floats) -> NDArray[np.int64]:
    """Leaves of average linkage on `1 - r`; undefined correlations count as 0."""
    from scipy.cluster.hierarchy import leaves_list, linkage
    from scipy.spatial.distance import squareform

    apart = 1 - np.nan_to_num(correlation)
    np.fill_diagonal(apart, 0)
    order: NDArray[np.int64] = leaves_list(linkage(squareform(apart, checks=False), "average", optimal_ordering=True))
    return order


def _draw(values: Floats, names: list[str], kind: str, ax: Axes | None) -> Axes:
    import matplotlib as mpl

    side = float(np.clip(1.2 + 0.24 * len(names), 3.2, 12.0))
    ax = get_axes(ax, (side + 0.9, side))
    colors = mpl.colormaps["RdBu_r"].with_extremes(bad="0.85")
    image = ax.imshow(np.ma.masked_invalid(values), cmap=colors, vmin=-1, vmax=1, interpolation="nearest")
    shown = len(names) <= MOST_NAMES
    ax.set_xticks(range(len(names)) if shown else [], names if shown else [], rotation=90, fontsize=8)
    ax.set_yticks(range(len(names)) if shown else [], names if shown else [], fontsize=8)
    ax.tick_params(length=0)
    ax.spines[:].set_visible(False)
    titles = {"both": "above: predicted, below: real, diagonal: predicted with real"}
    ax.set_title(titles.get(kind, kind), fontsize=9, loc="left")
    bar = ax.figure.colorbar(image, ax=ax, pad=0.02, shrink=0.7, ticks=[-1, 0, 1])
    bar.set_label("correlation of mean shifts", fontsize=8)
    bar.outline.set_visible(False)
    return ax
