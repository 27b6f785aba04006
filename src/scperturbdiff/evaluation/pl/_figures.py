"""The figures: shifts and distributions of genes, populations, the spread of draws, scores."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pandas as pd
from scipy import sparse

from scperturbdiff.data import POPULATION, check_obs_keys, preview
from scperturbdiff.evaluation.metrics import METRICS, Projection, gene_moments, pearson, subsample
from scperturbdiff.evaluation.metrics import mean_shift as shift_of_means
from scperturbdiff.evaluation.pl._cells import (
    COLORS,
    get_axes,
    label_points,
    read_condition,
    scatter_groups,
    scatter_shifts,
)

if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Unpack

    from anndata import AnnData
    from matplotlib.axes import Axes
    from numpy.typing import NDArray

    from scperturbdiff.evaluation.pl._cells import Shown


def mean_shift(
    pred: AnnData,
    real: AnnData,
    control: str | AnnData,
    *,
    n_label: int = 10,
    genes: Sequence[str] | None = None,
    ax: Axes | None = None,
    **shown: Unpack[Shown],
) -> Axes:
    """Predicted against observed mean shift of every gene from the real controls, log-normalised.

    Parameters
    ----------
    pred, real, control
        Predicted cells, real cells, and the label of the controls in `real` or an AnnData of real control cells.
    perturbation_key, perturbation
        Column of `obs` with the perturbation, and which one; `None` where `pred` holds only one.
    context
        Columns and values that choose the cells in all three, such as `{"cell_type": "B"}`.
    separator
        Joins the names of a combination, by default `"+"`; `None`: no label is one.
    n_label, genes
        How many of the genes that change most in the real cells are named, or which genes instead.
    layer_pred, layer_real, target_sum
        Layers with counts, by default `"counts"` and X (`None`), and counts per cell after normalisation (10,000).
    normalized
        Whether `pred` is log-normalised already, in X or in `layer_pred`; see :func:`~scperturbdiff.evaluate`.
    ax
        Axes to draw into; `None`: a new figure.

    Returns
    -------
    The Axes. Its title has the Pearson correlation over genes.
    """
    cells = read_condition(pred, real, control, **shown)
    names, at = cells.choose(genes, n_label)
    observed, predicted = (shift_of_means(matrix, cells.control) for matrix in (cells.real, cells.pred))
    ax = get_axes(ax, (4.6, 4.4))
    low, high = min(observed.min(), predicted.min()), max(observed.max(), predicted.max())
    pad = 0.12 * (high - low) or 1.0
    limits = low - pad, high + pad
    ax.set(xlim=limits, ylim=limits)
    scatter_shifts(ax, observed, predicted, "0.55")
    ax.scatter(observed[at], predicted[at], s=16, color=COLORS["predicted"], linewidths=0, zorder=3)
    ax.set_title(f"{cells.title}  (r = {pearson(observed, predicted):.2f}, {len(observed)} genes)", fontsize=10)
    label_points(ax, observed[at], predicted[at], names)
    return ax


def violins(
    pred: AnnData,
    real: AnnData,
    control: str | AnnData,
    genes: Sequence[str] | None = None,
    *,
    n_genes: int = 6,
    ax: Axes | None = None,
    **shown: Unpack[Shown],
) -> Axes:
    """Distribution over cells of a few genes in control, real perturbed and predicted cells, log-normalised.

    Parameters
    ----------
    pred, real, control, perturbation_key, perturbation, context, separator, layer_pred, layer_real, target_sum, ax
    normalized
        As in :func:`mean_shift`.
    genes, n_genes
        Genes to show; `None`: as many as `n_genes` says of those that change most in the real cells.

    Returns
    -------
    The Axes: per gene a violin each of control, real and predicted cells, with a bar at the mean.
    """
    cells = read_condition(pred, real, control, **shown)
    names, at = cells.choose(genes, n_genes)
    ax = get_axes(ax, (1.0 + 0.95 * len(names), 3.4))
    handles: list[Any] = []
    for offset, (name, matrix) in zip((-0.27, 0.0, 0.27), cells.groups.items(), strict=True):
        values = matrix[:, at].toarray()
        positions = np.arange(len(names)) + offset
        drawn: Any = ax.violinplot(list(values.T), positions=positions, widths=0.25, showextrema=False)
        for body in drawn["bodies"]:
            body.set(facecolor=COLORS[name], edgecolor="none", alpha=0.75)
        ax.hlines(values.mean(axis=0), positions - 0.1, positions + 0.1, color="black", lw=1.2)
        handles.append(drawn["bodies"][0])
    rotation, ha = (30, "right") if len(names) > 4 else (0, "center")
    ax.set_xticks(range(len(names)), names, rotation=rotation, ha=ha)
    ax.set_ylabel("log-normalised expression")
    ax.set_title(cells.title, fontsize=10, loc="left")
    ax.legend(handles, list(cells.groups), frameon=False, fontsize=8, ncols=3, loc="lower right", bbox_to_anchor=(1, 1))
    return ax


def populations(
    pred: AnnData,
    real: AnnData,
    control: str | AnnData,
    *,
    basis: Literal["pca", "umap"] = "pca",
    n_pcs: int = 50,
    max_cells: int = 2000,
    seed: int = 0,
    ax: Axes | None = None,
    **shown: Unpack[Shown],
) -> Axes:
    """Control, real perturbed and predicted cells in one embedding that is fitted on the real cells only.

    Parameters
    ----------
    pred, real, control, perturbation_key, perturbation, context, separator, layer_pred, layer_real, target_sum, ax
    normalized
        As in :func:`mean_shift`.
    basis
        `"pca"`: the first two principal components. `"umap"`: UMAP of `n_pcs` components, fitted on the real cells;
        predicted cells are placed into it.
    n_pcs, max_cells
        Principal components for UMAP, and cells shown of each kind.
    seed
        Of the subsample, the embedding and the order in which cells are drawn.
    """
    if basis not in ("pca", "umap"):
        raise ValueError(f"basis={basis!r} is unknown. Allowed: 'pca', 'umap'.")
    cells = read_condition(pred, real, control, **shown)
    groups = {name: subsample(matrix, max_cells, seed) for name, matrix in cells.groups.items()}
    observed = sparse.vstack([groups["control"], groups["real"]], format="csr")
    projection = Projection(observed, n_pcs=max(2, n_pcs), seed=seed)
    placed = {name: projection(matrix) for name, matrix in groups.items()}
    placed, axis = (_umap(placed, seed), "UMAP") if basis == "umap" else (placed, "PC")
    numbers = {name: len(coordinates) for name, coordinates in placed.items()}
    ax = get_axes(ax, (4.6, 4.2))
    size = float(np.clip(6000 / sum(numbers.values()), 4, 20))
    scatter_groups(ax, placed, numbers, size=size, seed=seed)
    ax.set(xlabel=f"{axis}1", ylabel=f"{axis}2")
    ax.set_title(cells.title, fontsize=10, loc="left")
    ax.legend(
        frameon=False, fontsize=8, ncols=3, loc="upper center", bbox_to_anchor=(0.5, -0.06), handletextpad=0.2,
        columnspacing=1.0,
    )  # fmt: skip
    return ax


def _umap(placed: dict[str, NDArray[Any]], seed: int) -> dict[str, NDArray[Any]]:
    from umap import UMAP  # type: ignore[import-untyped]

    observed = np.concatenate([placed["control"], placed["real"]])
    with warnings.catch_warnings():
        # A seed makes UMAP run on one thread, of which it warns.
        warnings.filterwarnings("ignore", message=".*n_jobs value.*")
        reducer = UMAP(random_state=seed, n_neighbors=min(15, len(observed) - 1)).fit(observed)
    control, real = np.split(reducer.embedding_, [len(placed["control"])])
    return {"control": control, "real": real, "predicted": reducer.transform(placed["predicted"])}


def draws(
    pred: AnnData,
    real: AnnData,
    control: str | AnnData,
    *,
    replicate_key: str,
    genes: Sequence[str] | None = None,
    n_genes: int = 5,
    population_key: str = POPULATION,
    seed: int = 0,
    ax: Axes | None = None,
    **shown: Unpack[Shown],
) -> Axes:
    """Mean shift of each predicted draw of a population beside that of each real replicate.

    A model of distributions over populations should spread its draws as real replicates (donors, wells, batches) are
    spread. Small populations spread by sampling alone, so draw about as many cells as the replicates have.

    Parameters
    ----------
    pred, real, control, perturbation_key, perturbation, context, separator, layer_pred, layer_real, target_sum, ax
    normalized
        As in :func:`mean_shift`.
    replicate_key, population_key
        Columns that name the replicate populations in `real.obs` and number the draws in `pred.obs`; those with fewer
        than two cells are left out.
    genes, n_genes
        As in :func:`violins`.
    seed
        Of the sideways scatter and the principal component.

    Returns
    -------
    The Axes: for the first principal component of the real cells and for each gene, one point per population; bars
    span mean plus or minus one s.d. over populations. Shifts are from the mean of all controls, in units of the s.d.
    of the real perturbed cells.
    """
    cells = read_condition(pred, real, control, **shown)
    check_obs_keys(real, "real", replicate_key=replicate_key)
    check_obs_keys(pred, "pred", population_key=population_key)
    names, at = cells.choose(genes, n_genes)
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
    metrics, models
        What to show, in order; `None`: metrics with a normalised score for any model, and models but the ceiling.
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
