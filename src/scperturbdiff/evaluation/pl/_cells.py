"""What the figures share: the cells of one condition, colours, axes and labels that keep apart."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Required, TypedDict

import numpy as np
import pandas as pd

from scperturbdiff.data import PERTURBATION, Labels, check_obs_keys, did_you_mean, preview, read_text, value_text
from scperturbdiff.evaluation.metrics import rank_genes, read_expression, read_predicted, top_genes

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from anndata import AnnData
    from matplotlib.axes import Axes
    from numpy.typing import NDArray


MANY = 5000
"""Points from which on they are drawn as pixels in files of vectors."""
COLORS = {"control": "#9a9a9a", "real": "#1f6fb4", "predicted": "#e07b1a"}


@dataclass
class ShownCells:
    """Log-normalised cells of one condition (CSR, same genes), and the `obs` of each."""

    pred: Any
    real: Any
    control: Any
    genes: pd.Index
    obs: dict[str, pd.DataFrame]
    title: str

    @property
    def groups(self) -> dict[str, Any]:
        """Cells of each kind, in the order in which they are shown."""
        return {"control": self.control, "real": self.real, "predicted": self.pred}

    def choose(self, genes: Sequence[str] | None, n: int) -> tuple[list[str], NDArray[np.intp]]:
        """`genes`, checked, or the `n` that change most in the real cells, and their positions."""
        if genes is None:
            ranked = top_genes(rank_genes(self.real, self.control), len(self.genes))[: max(n, 0)]
            return list(self.genes[ranked]), ranked
        return find_genes(genes, self.genes)


def find_genes(genes: str | Sequence[str], known: pd.Index) -> tuple[list[str], NDArray[np.intp]]:
    """Genes by name, and their positions among those of the real cells; a `ValueError` where one is unknown."""
    genes = [genes] if isinstance(genes, str) else list(genes)
    unknown = [gene for gene in genes if gene not in known]
    if unknown or not genes:
        hint = did_you_mean(unknown[0], known) if unknown else ""
        raise ValueError(f"{len(unknown)} of the genes are not in real.var_names: {preview(unknown)}.{hint}")
    return genes, known.get_indexer(pd.Index(genes))


class Shown(TypedDict, total=False):
    """Arguments of every figure that say which cells it shows; see :func:`~scperturbdiff.pl.mean_shift`."""

    perturbation_key: Required[str]
    perturbation: str | None
    context: Mapping[str, str] | None
    separator: str | None
    layer_pred: str | None
    layer_real: str | None
    target_sum: float
    normalized: bool


def read_condition(
    pred: AnnData,
    real: AnnData,
    control: str | AnnData,
    *,
    perturbation_key: str,
    perturbation: str | None = None,
    context: Mapping[str, str] | None = None,
    separator: str | None = "+",
    layer_pred: str | None = "counts",
    layer_real: str | None = None,
    target_sum: float = 1e4,
    normalized: bool = False,
) -> ShownCells:
    """Find and normalise the cells of one condition; messages name what is missing."""
    context = dict(context or {})
    labels = Labels(perturbation_key, control if isinstance(control, str) else None, separator)
    check_obs_keys(pred, "pred", perturbation_key=perturbation_key)
    if perturbation is None:
        names = labels.read(pred.obs.iloc[_rows(pred, context, "pred", labels)], "pred.obs")[PERTURBATION].unique()
        found = [name for name in names if name != labels.control]
        if len(found) != 1:
            raise ValueError(f"pred holds {len(found)} perturbations: {preview(found)}. Name one: perturbation=...")
        perturbation = found[0]
    name = labels.canonical(perturbation)
    sources = {
        "pred": (pred, name, layer_pred),
        "real": (real, name, layer_real),
        "control": (real if isinstance(control, str) else control, labels.control, layer_real),
    }
    cells, obs = {}, {}
    for name, (adata, label, layer) in sources.items():
        rows = _rows(adata, context, name, labels, label)
        how: Any = {"layer": layer, "rows": rows, "target_sum": target_sum, "where": name}
        if name == "pred":
            cells[name] = read_predicted(adata, real.var_names, "normalized" if normalized else "counts", **how)
        else:
            cells[name] = read_expression(adata, real.var_names, **how)
        obs[name] = adata.obs.iloc[rows]
    title = ", ".join([perturbation, *map(str, context.values())])
    return ShownCells(cells["pred"], cells["real"], cells["control"], real.var_names, obs, title)


def _rows(
    adata: AnnData, context: Mapping[str, str], where: str, labels: Labels, label: str | None = None
) -> NDArray[np.intp]:
    """Rows of a context and, with `label`, of one perturbation; two at least."""
    columns = {} if label is None else {labels.key: label}
    check_obs_keys(adata, where, context=context, perturbation_key=columns)
    text = read_text(adata.obs, list(context), f"{where}.obs")
    if label is not None:
        text[labels.key] = labels.read(adata.obs, f"{where}.obs")[PERTURBATION].to_numpy()
    columns |= {key: value_text(value) for key, value in context.items()}
    for key, value in columns.items():
        if value not in set(text[key]):
            raise ValueError(f"{where}.obs[{key!r}] has no {value!r}. Values: {preview(text[key].unique(), 20)}.")
    rows = np.flatnonzero((text[list(columns)] == pd.Series(columns)).all(axis=1).to_numpy())
    if len(rows) < 2:
        raise ValueError(f"{where} has {len(rows)} cells with {columns}; a figure needs 2 at least.")
    return rows


def scatter_groups(
    ax: Axes, placed: Mapping[str, NDArray[Any]], numbers: Mapping[str, int], *, size: float, seed: int
) -> None:
    """Draw cells of each kind at the first two of their coordinates `(n_cells, n)`, no kind above the others.

    The legend tells `numbers` of cells.
    """
    points = np.concatenate([coordinates[:, :2] for coordinates in placed.values()])
    colors = np.repeat([COLORS[name] for name in placed], [len(coordinates) for coordinates in placed.values()])
    order = np.random.default_rng(seed).permutation(len(points))
    x, y = points[order].T
    ax.scatter(x, y, s=size, c=colors[order], alpha=0.6, linewidths=0, rasterized=len(points) > MANY)
    for name in placed:
        ax.scatter([], [], s=24, color=COLORS[name], label=f"{name} ({numbers[name]})")
    ax.set(xticks=[], yticks=[])


def scatter_shifts(ax: Axes, observed: NDArray[np.float64], predicted: NDArray[np.float64], color: str) -> None:
    """Draw predicted against observed mean shifts of genes, `(n_genes,)` each, with the lines of no shift."""
    ax.axline((0, 0), slope=1, color="0.75", lw=0.8, zorder=0)
    ax.axhline(0, color="0.88", lw=0.8, zorder=0)
    ax.axvline(0, color="0.88", lw=0.8, zorder=0)
    ax.scatter(observed, predicted, s=9, color=color, alpha=0.6, linewidths=0, rasterized=len(observed) > MANY)
    ax.set(xlabel="observed mean shift", ylabel="predicted mean shift")


def get_axes(ax: Axes | None, figsize: tuple[float, float]) -> Axes:
    """`ax`, or the axes of a new figure of this size in inches; without the upper and right spine."""
    if ax is None:
        import matplotlib.pyplot as plt

        _, ax = plt.subplots(figsize=figsize, layout="constrained")
    ax.spines[["top", "right"]].set_visible(False)
    return ax


_DIRECTIONS = ((1, 0.3), (-1, 0.3), (1, -0.6), (-1, -0.6), (0, 1), (0, -1), (1, 1.2), (-1, 1.2), (1, -1.5), (-1, -1.5))
_RADII = (8, 16, 26, 38, 52, 68)


def label_points(ax: Axes, x: NDArray[Any], y: NDArray[Any], names: Sequence[str], *, fontsize: float = 8) -> None:
    """Write `names` next to points, each at the nearest place where it covers neither a label nor a labelled point."""
    from matplotlib.text import Text
    from matplotlib.transforms import Bbox

    figure = ax.figure
    figure.canvas.draw()
    renderer = figure.canvas.get_renderer()  # type: ignore[attr-defined]
    pixels = figure.dpi / 72
    points = ax.transData.transform(np.column_stack([x, y]))
    taken = [Bbox.from_bounds(px - 3, py - 3, 6, 6) for px, py in points]

    def covered(place: tuple[float, float, Bbox]) -> int:
        box = place[2]
        outside = box.x0 < ax.bbox.x0 or box.x1 > ax.bbox.x1 or box.y0 < ax.bbox.y0 or box.y1 > ax.bbox.y1
        return sum(bool(box.overlaps(other)) for other in taken) + 2 * outside

    for (px, py), at, name in zip(points, zip(x, y, strict=True), names, strict=True):
        text = ax.annotate(
            name, at, xytext=(0, 0), textcoords="offset points", fontsize=fontsize, va="center",
            arrowprops={"arrowstyle": "-", "lw": 0.5, "color": "0.5", "shrinkA": 0, "shrinkB": 2},
        )  # fmt: skip
        # Annotation's own extent includes its line; only the letters must keep clear.
        size = Text.get_window_extent(text, renderer)
        width, height = size.width + 2, size.height
        places = []
        for dx, dy in ((float(radius * a), float(radius * b)) for radius in _RADII for a, b in _DIRECTIONS):
            left = px + dx * pixels - width * 0.5 * (1 - np.sign(dx))
            places.append((dx, dy, Bbox.from_bounds(left, py + dy * pixels - height / 2, width, height)))
        dx, dy, box = min(places, key=covered)
        text.set_position((dx, dy))
        text.set_horizontalalignment("left" if dx > 0 else "right" if dx < 0 else "center")
        taken.append(box)
