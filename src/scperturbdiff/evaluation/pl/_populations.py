"""Figures of whole populations: a joint embedding, and the spread of independent draws."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pandas as pd

from scperturbdiff.data import POPULATION, check_obs_key
from scperturbdiff.evaluation.metrics import Projection, gene_moments, subsample
from scperturbdiff.evaluation.pl._cells import COLORS, get_axes, read_condition

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from anndata import AnnData
    from matplotlib.axes import Axes
    from numpy.typing import NDArray


def populations(
    pred: AnnData,
    real: AnnData,
    control: str | AnnData,
    *,
    perturbation_key: str,
    perturbation: str | None = None,
    context: Mapping[str, str] | None = None,
    separator: str | None = "+",
    basis: Literal["pca", "umap"] = "pca",
    n_pcs: int = 50,
    max_cells: int = 2000,
    layer_pred: str | None = "counts",
    layer_real: str | None = None,
    target_sum: float = 1e4,
    seed: int = 0,
    ax: Axes | None = None,
) -> Axes:
    """Control, real perturbed and predicted cells in one embedding that is fitted on the real cells only.

    Parameters
    ----------
    pred, real, control, perturbation_key, perturbation, context, separator, layer_pred, layer_real, target_sum, ax
        As in :func:`mean_shift`.
    basis
        `"pca"`: the first two principal components. `"umap"`: UMAP of `n_pcs` components, fitted on the real cells;
        predicted cells are placed into it.
    n_pcs
        Principal components for UMAP.
    max_cells
        Cells shown of each kind.
    seed
        Of the subsample, the embedding and the order in which cells are drawn.

    Returns
    -------
    The Axes.
    """
    if basis not in ("pca", "umap"):
        raise ValueError(f"basis={basis!r} is unknown. Allowed: 'pca', 'umap'.")
    from scipy import sparse

    cells = read_condition(
        pred, real, control, perturbation_key=perturbation_key, perturbation=perturbation, context=context,
        separator=separator, layer_pred=layer_pred, layer_real=layer_real, target_sum=target_sum,
    )  # fmt: skip
    groups = {"control": cells.control, "real": cells.real, "predicted": cells.pred}
    groups = {name: subsample(matrix, max_cells, seed) for name, matrix in groups.items()}
    observed = sparse.vstack([groups["control"], groups["real"]], format="csr")
    projection = Projection(observed, n_pcs=max(2, n_pcs), seed=seed)
    placed = {name: projection(matrix) for name, matrix in groups.items()}
    axis = "PC"
    if basis == "umap":
        placed, axis = _umap(placed, seed), "UMAP"
    points = np.concatenate([coordinates[:, :2] for coordinates in placed.values()])
    colors = np.repeat([COLORS[name] for name in placed], [len(coordinates) for coordinates in placed.values()])
    order = np.random.default_rng(seed).permutation(len(points))
    ax = get_axes(ax, (4.6, 4.2))
    size = float(np.clip(6000 / len(points), 4, 20))
    x, y = points[order].T
    ax.scatter(x, y, s=size, c=colors[order], alpha=0.6, linewidths=0, rasterized=len(points) > 5000)
    for name, coordinates in placed.items():
        ax.scatter([], [], s=24, color=COLORS[name], label=f"{name} ({len(coordinates)})")
    ax.set_xlabel(f"{axis}1")
    ax.set_ylabel(f"{axis}2")
    ax.set_xticks([])
    ax.set_yticks([])
    ax.set_title(cells.title, fontsize=10, loc="left")
    ax.legend(
        frameon=False, fontsize=8, ncols=3, loc="upper center", bbox_to_anchor=(0.5, -0.06), handletextpad=0.2,
        columnspacing=1.0,
    )  # fmt: skip
    return ax


def _umap(placed: dict[str, NDArray[Any]], seed: int) -> dict[str, NDArray[Any]]:
    import warnings

    from umap import UMAP  # type: ignore[import-untyped]

    observed = np.concatenate([placed["control"], placed["real"]])
    with warnings.catch_warnings():
        # A seed makes UMAP run on one thread, of which it warns.
        warnings.filterwarnings("ignore", message=".*n_jobs value.*")
        reducer = UMAP(random_state=seed, n_neighbors=min(15, len(observed) - 1)).fit(observed)
    n_control = len(placed["control"])
    return {
        "control": reducer.embedding_[:n_control],
        "real": reducer.embedding_[n_control:],
        "predicted": reducer.transform(placed["predicted"]),
    }


def draws(
    pred: AnnData,
    real: AnnData,
    control: str | AnnData,
    *,
    replicate_key: str,
    perturbation_key: str,
    perturbation: str | None = None,
    context: Mapping[str, str] | None = None,
    separator: str | None = "+",
    genes: Sequence[str] | None = None,
    n_genes: int = 5,
    population_key: str = POPULATION,
    layer_pred: str | None = "counts",
    layer_real: str | None = None,
    target_sum: float = 1e4,
    seed: int = 0,
    ax: Axes | None = None,
) -> Axes:
    """Mean shift of each predicted draw of a population beside that of each real replicate.

    A model of distributions over populations should spread its draws as real replicates (donors, wells, batches) are
    spread, in place of repeating one average response. Small populations spread by sampling alone, so draw about as
    many cells as the replicates have.

    Parameters
    ----------
    pred, real, control, perturbation_key, perturbation, context, separator, layer_pred, layer_real, target_sum, ax
        As in :func:`mean_shift`.
    replicate_key
        Column of `real.obs` that names the replicate populations. Replicates with fewer than two cells are left out.
    genes
        Genes to show; `None`: the `n_genes` that change most in the real cells.
    n_genes
        How many genes where `genes` is `None`.
    population_key
        Column of `pred.obs` that numbers the draws.
    seed
        Of the sideways scatter and the principal component.

    Returns
    -------
    The Axes: for the first principal component of the real cells and for each gene, one point per population; bars
    span mean plus or minus one s.d. over populations. Shifts are from the mean of all controls, in units of the s.d.
    of the real perturbed cells.
    """
    from scipy import sparse

    cells = read_condition(
        pred, real, control, perturbation_key=perturbation_key, perturbation=perturbation, context=context,
        separator=separator, layer_pred=layer_pred, layer_real=layer_real, target_sum=target_sum,
    )  # fmt: skip
    check_obs_key(real, replicate_key, "replicate_key")
    check_obs_key(pred, population_key, "population_key")
    names = cells.choose(genes, n_genes)
    at = cells.genes.get_indexer(pd.Index(names))
    projection = Projection(sparse.vstack([cells.control, cells.real], format="csr"), n_pcs=1, seed=seed)

    def features(matrix: Any) -> NDArray[np.float64]:
        return np.column_stack([projection(matrix)[:, :1], matrix[:, at].toarray().astype(np.float64)])

    origin = gene_moments(features(cells.control))[0]
    center, unit = gene_moments(features(cells.real))
    # The sign of a principal component is arbitrary: let the real response be positive.
    sign = np.where(np.arange(len(unit)) == 0, np.where(center < origin, -1.0, 1.0), 1.0)
    unit = np.where(unit > 0, unit, 1.0) * sign
    ax = get_axes(ax, (1.6 + 0.85 * (len(names) + 1), 3.6))
    rng = np.random.default_rng(seed)
    sides = (
        ("real", cells.real, cells.obs["real"][replicate_key], -0.18, "real replicates"),
        ("predicted", cells.pred, cells.obs["pred"][population_key], 0.18, "predicted draws"),
    )
    for name, matrix, labels, offset, label in sides:
        means = (_population_means(features(matrix), labels) - origin) / unit
        positions = np.arange(means.shape[1]) + offset
        sideways = rng.uniform(-0.09, 0.09, size=means.shape)
        ax.scatter(positions + sideways, means, s=14, color=COLORS[name], alpha=0.7, linewidths=0)
        if len(means) > 1:
            middle, spread = means.mean(axis=0), means.std(axis=0, ddof=1)
            ax.errorbar(positions, middle, spread, fmt="_", color="black", lw=1, ms=9, capsize=0, zorder=3)
        ax.scatter([], [], s=20, color=COLORS[name], label=f"{label} ({len(means)})")
    ax.axhline(0, color="0.8", lw=0.8, zorder=0)
    ax.set_xticks(range(len(names) + 1), ["PC1", *names], rotation=30, ha="right")
    ax.set_ylabel("mean shift (s.d. of real cells)")
    ax.set_title(cells.title, fontsize=10, loc="left")
    ax.legend(frameon=False, fontsize=8, ncols=2, loc="lower right", bbox_to_anchor=(1, 1), borderaxespad=0.1)
    return ax


def _population_means(values: NDArray[np.float64], labels: pd.Series) -> NDArray[np.float64]:
    """Mean per population of two cells or more, shape `(n_populations, n_features)`."""
    groups = pd.DataFrame(values).groupby(labels.astype(str).to_numpy())
    means = groups.mean().to_numpy()[groups.size().to_numpy() > 1]
    if not len(means):
        raise ValueError(f"No population of {labels.name!r} has two cells.")
    return means
