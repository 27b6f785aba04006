"""From AnnData to what the metrics are computed from: cells grouped and normalised, one condition against another."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pandas as pd
from anndata import AnnData
from scipy import sparse

from scperturbdiff.arguments import check_int, check_type
from scperturbdiff.data import (
    DOSE,
    PERTURBATION,
    Labels,
    check_cells,
    check_counts,
    check_obs_keys,
    closest,
    log_normalize,
    matrix_name,
    read_contexts,
    read_genes,
    read_text,
)
from scperturbdiff.evaluation.metrics._distances import median_bandwidth, subsample
from scperturbdiff.evaluation.metrics._expression import rank, top_genes
from scperturbdiff.evaluation.metrics._shifts import Population

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping, Sequence

    from numpy.typing import NDArray

    Condition = tuple[str, ...]


FITTED_CELLS = 20_000
"""Most cells that principal components are fitted on."""


@dataclass(frozen=True)
class Keys:
    """Columns of `obs`: the perturbation (and dose), the context that controls share, what else defines a condition."""

    labels: Labels
    contexts: tuple[str, ...] = ()
    conditions: tuple[str, ...] = ()

    @property
    def all(self) -> tuple[str, ...]:
        """Columns whose values name a condition, contexts first, perturbation last."""
        return (*self.contexts, *self.conditions, self.labels.key)

    def context(self, condition: Condition) -> Condition:
        """The part of a condition that its controls share."""
        return condition[: len(self.contexts)]

    def describe(self, condition: Condition) -> str:
        """`"cell_type=B, perturbation=IFNB"`."""
        names = self.all if len(condition) == len(self.all) else self.contexts
        return ", ".join(f"{key}={value}" for key, value in zip(names, condition, strict=True)) or "all cells"


def make_keys(
    perturbation: str,
    contexts: str | Sequence[str],
    control: str | AnnData,
    separator: str | None,
    conditions: str | Sequence[str] = (),
    dose: str | None = None,
) -> Keys:
    """The keys of an evaluation; the dose is the last of the conditions where it is not among them."""
    check_type("control", control, (str, AnnData), "the label of control cells, a text, or an AnnData of them")
    named, shared = (((keys,) if isinstance(keys, str) else tuple(keys)) for keys in (conditions, contexts))
    label = control if isinstance(control, str) else None
    extra = () if dose is None or dose in named else (dose,)
    return Keys(Labels(perturbation, label, separator, dose), shared, (*named, *extra))


def find_dose(keys: Keys, obs: pd.DataFrame) -> Keys:
    """The keys with the one of the conditions as dose that holds numbers which can be doses, if there is one."""
    for key in keys.conditions if keys.labels.dose_key is None else ():
        labels = replace(keys.labels, dose_key=key)
        if key in obs and pd.api.types.is_numeric_dtype(obs[key]):
            try:
                labels.read(obs)
            except ValueError:
                continue
            return replace(keys, labels=labels)
    return keys


def group_cells(adata: AnnData, keys: Keys, where: str) -> dict[Condition, NDArray[np.intp]]:
    """Row numbers of the treated cells of every condition, in order of first appearance."""
    dose = keys.labels.dose_key
    others = [key for key in keys.conditions if key != dose]
    check_obs_keys(
        adata, where, perturbation_key=keys.labels.key, context_keys=keys.contexts, condition_keys=others, dose_key=dose
    )
    read = keys.labels.read(adata.obs, f"{where}.obs")
    columns = read_text(adata.obs, [key for key in keys.all[:-1] if key != dose], f"{where}.obs")
    columns[keys.labels.key] = read[PERTURBATION].to_numpy()
    if dose is not None:
        columns[dose] = read[DOSE].to_numpy()
    treated = np.flatnonzero(~keys.labels.is_control(read))
    groups = columns[list(keys.all)].iloc[treated].groupby(list(keys.all), sort=False).indices
    return {name if isinstance(name, tuple) else (name,): treated[rows] for name, rows in groups.items()}


def group_contexts(
    adata: AnnData, keys: Keys, where: str, rows: NDArray[np.intp] | None = None
) -> dict[Condition, NDArray[np.intp]]:
    """Those of `rows` (`None`: all) in every context."""
    check_obs_keys(adata, where, context_keys=keys.contexts)
    rows = np.arange(adata.n_obs) if rows is None else rows
    codes, contexts = read_contexts(adata.obs.iloc[rows], keys.contexts, f"{where}.obs")
    return {context: rows[codes == i] for i, context in enumerate(contexts)}


def read_expression(
    adata: AnnData,
    genes: pd.Index,
    *,
    layer: str | None,
    rows: NDArray[np.integer] | None = None,
    target_sum: float = 1e4,
    where: str = "adata",
    argument: str = "layer_real",
) -> sparse.csr_matrix:
    """Log-normalised expression of `genes` for `rows`, float32 CSR, from counts in `layer` (`None`: X).

    Library sizes are sums over `genes`. Values that are not counts raise a `ValueError`. `where` and `argument` are
    what the user calls the cells, and the argument that names the layer.
    """
    counts = read_genes(adata, genes, layer, rows, where, argument)
    check_counts(counts, matrix_name(layer, where), empty_cells=True, argument=f"{argument}=...")
    return log_normalize(counts, target_sum)


def split_control(
    real: AnnData, control: str | AnnData, keys: Keys
) -> tuple[dict[Condition, NDArray[np.intp]], AnnData, dict[Condition, NDArray[np.intp]]]:
    """Real perturbed cells per condition, the AnnData that holds the controls, and controls per context.

    `control` is the label of the control cells in `real`, or an AnnData of control cells.
    """
    check_cells(real, "real")
    check_obs_keys(real, "real", perturbation_key=keys.labels.key)
    if not isinstance(control, str):
        return group_cells(real, keys, "real"), control, group_contexts(control, keys, "control")
    keys.labels.check_control(real.obs, "real.obs")
    controls = np.flatnonzero(keys.labels.control_cells(real.obs))
    return group_cells(real, keys, "real"), real, group_contexts(real, keys, "real", controls)


def require(wanted: Collection[Condition], known: Collection[Condition], what: str, keys: Keys) -> None:
    """Raise a `ValueError` that lists the conditions (or contexts) of `wanted` that `known` lacks."""
    there = set(known)
    missing = [c for c in wanted if c not in there]
    if missing:
        shown = "; ".join(keys.describe(c) for c in missing[:10]) + ("; ..." if len(missing) > 10 else "")
        near = closest(keys.describe(missing[0]), [keys.describe(c) for c in known])
        hint = f" Nearest to the first: {'; '.join(near)}." if near else ""
        raise ValueError(f"{what} {len(missing)} of {len(wanted)} wanted: {shown}.{hint}")


def require_real(
    conditions: Collection[Condition], treated: Mapping[Condition, Any], controls: Mapping[Condition, Any], keys: Keys
) -> list[Condition]:
    """Raise a `ValueError` unless there are real cells of all conditions and controls of their contexts: these."""
    require(conditions, treated, "real cells lack conditions of pred,", keys)
    contexts = list(dict.fromkeys(keys.context(c) for c in conditions))
    require(contexts, controls, "there are no real control cells for contexts,", keys)
    return contexts


class Projection:
    """Principal components (scikit-learn) of log-normalised expression and an MMD bandwidth, fixed on real cells.

    `cells`, `(n_cells, n_genes)`, are subsampled to `max_cells`; at most one component less than their smaller side is
    used.
    """

    def __init__(self, cells: Any, *, n_pcs: int = 50, max_cells: int = FITTED_CELLS, seed: int = 0) -> None:
        from sklearn.decomposition import PCA

        check_int("n_pcs", n_pcs, 1)
        if min(cells.shape) < 2:
            raise ValueError(f"Principal components need 2 real cells and 2 genes at least, not {cells.shape}.")
        cells = subsample(cells, max_cells, seed)
        if not _differ(cells):
            raise ValueError("Principal components need 2 real cells and 2 genes that differ, and all cells are alike.")
        self.pca = PCA(min(n_pcs, min(cells.shape) - 1), svd_solver="arpack", random_state=seed).fit(cells)
        self.bandwidth = median_bandwidth(self(cells), seed=seed)

    def __call__(self, cells: Any, *, chunk: int = 4096) -> NDArray[np.float64]:
        """Coordinates of `cells`, shape `(n_cells, n_pcs)`."""
        blocks = [self.pca.transform(cells[i : i + chunk]) for i in range(0, cells.shape[0], chunk)]
        return np.concatenate(blocks).astype(np.float64) if blocks else np.empty((0, self.pca.n_components_))


def _differ(cells: Any) -> bool:
    """Whether any gene has two values."""
    low, high = cells.min(axis=0), cells.max(axis=0)
    return bool((low != high).nnz if sparse.issparse(low) else (low != high).any())


@dataclass
class Observed:
    """Real perturbed cells of one condition with their controls, log-normalised CSR; options as for `evaluate`."""

    real: Population
    control: Population
    projection: Projection
    n_top: int = 100
    de_method: Literal["t-test", "wilcoxon"] = "t-test"
    max_cells: int = 2000
    seed: int = 0
    _tests: dict[int, pd.DataFrame] = field(default_factory=dict, repr=False)

    @cached_property
    def pcs(self) -> NDArray[np.float64]:
        """Principal components of the real cells."""
        return self.projection(subsample(self.real.cells, self.max_cells, self.seed))

    def tested(self, n_cells: int) -> pd.DataFrame:
        """Differential expression of `n_cells` of the real cells against the controls."""
        if n_cells not in self._tests:
            self._tests[n_cells] = self.test(self.real, n_cells)
        return self._tests[n_cells]

    def test(self, population: Population, n_cells: int) -> pd.DataFrame:
        """Differential expression of `n_cells` of some cells against the controls."""
        if n_cells < population.cells.shape[0]:
            population = Population(subsample(population.cells, n_cells, self.seed))
        return rank(population, self.control, self.de_method)

    @cached_property
    def top(self) -> NDArray[np.intp]:
        """Positions of the top differentially expressed genes of all the real cells."""
        return top_genes(self.tested(self.real.cells.shape[0]), self.n_top)


class Comparison:
    """Predicted cells of one condition (log-normalised CSR, genes as in `observed`) against `observed` ones."""

    def __init__(self, pred: Any, observed: Observed) -> None:
        self.population, self.observed = Population(pred), observed
        self.pred, self.real, self.control = pred, observed.real.cells, observed.control.cells

    @property
    def top(self) -> NDArray[np.intp]:
        """Top differentially expressed genes of the real cells."""
        return self.observed.top

    @property
    def means(self) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
        """Mean expression of predicted, real and control cells, `(1, n_genes)` each: all that some metrics need."""
        return self.population.mean, self.observed.real.mean, self.observed.control.mean

    @cached_property
    def pcs(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Principal components of predicted and real cells."""
        observed = self.observed
        return observed.projection(subsample(self.pred, observed.max_cells, observed.seed)), observed.pcs

    @cached_property
    def tests(self) -> tuple[pd.DataFrame, pd.DataFrame]:
        """Differential expression of predicted and real cells at the same number of cells."""
        n = min(self.pred.shape[0], self.real.shape[0])
        return self.observed.test(self.population, n), self.observed.tested(n)
