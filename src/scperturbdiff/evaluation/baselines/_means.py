"""Mean expression of training cells, and from control counts and wanted mean expression to counts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from scipy import sparse

from scperturbdiff.data import (
    DOSE,
    PERTURBATION,
    check_layer,
    check_obs_keys,
    context_name,
    get_matrix,
    grouped_sums,
    log_normalize,
    member_weights,
    parse_doses,
    preview,
    read_contexts,
)

if TYPE_CHECKING:
    from anndata import AnnData
    from numpy.typing import NDArray

    from scperturbdiff.data import Labels

    Context = tuple[str, ...]
    Doses = tuple[float, ...]
    """One dose a component, in the order of their names; none without a dose column."""
    Floats = NDArray[np.float64]


TARGET_SUM = 1e4
PSEUDO = 1.0
"""Added to means (counts per 10,000) before a ratio is taken: without it, genes seen in a few cells explode."""
MAX_CELLS = 500
"""Cells used to find the shares that give a wanted mean of log-normalised expression."""
ROUNDS = 12
STEP = 0.4
"""Power of a correction. Mean log expression answers more than in proportion where controls are overdispersed, so
that whole corrections (1) swing from side to side."""


@dataclass(frozen=True)
class Profiles:
    """Means over cells; row numbers by context, name of the perturbation and doses."""

    log_means: Floats
    """Mean of `log1p(counts per 10,000)`, shape `(n_conditions, n_genes)`."""
    means: Floats
    """Mean of counts per 10,000, shape `(n_conditions, n_genes)`."""
    controls: dict[Context, int]
    """Row of each context's controls."""
    treated: dict[Context, dict[str, dict[Doses, int]]]
    """Row of each treated condition."""

    def shift(self, context: Context, label: str, doses: Doses, *, fold: bool = False) -> Floats:
        """Treated minus control mean of log-normalised expression, or (`fold`) the log ratio of mean expression.

        The doses are the nearest measured ones on the logarithmic scale; those of another number of components count as
        their geometric mean.
        """
        rows = self.treated[context][label]
        row = rows[min(rows, key=lambda measured: _distance(measured, doses)) if len(rows) > 1 else next(iter(rows))]
        control = self.controls[context]
        if fold:
            return np.log(self.means[row] + PSEUDO) - np.log(self.means[control] + PSEUDO)
        return self.log_means[row] - self.log_means[control]

    def contexts_with(self, label: str) -> list[Context]:
        """Contexts in which a perturbation was measured."""
        return [context for context, labels in self.treated.items() if label in labels]

    @property
    def labels(self) -> list[str]:
        """Perturbations measured in any context."""
        return sorted({label for labels in self.treated.values() for label in labels})


def _distance(measured: Doses, asked: Doses) -> float:
    logs, wanted = np.log(measured), np.log(asked)
    return float(np.linalg.norm(logs - (wanted if len(wanted) == len(logs) else wanted.mean())))


def read_profiles(adata: AnnData, labels: Labels, context_keys: tuple[str, ...], layer: str | None) -> Profiles:
    """Read, check and average the training cells; see :meth:`Baseline.fit`."""
    check_obs_keys(adata, perturbation_key=labels.key, dose_key=labels.dose_key, context_keys=context_keys)
    check_layer(adata, layer)
    labels.check_control(adata.obs)
    table = labels.read(adata.obs)
    table["context"], contexts = read_contexts(adata.obs, context_keys)
    grouped = table.groupby(["context", PERTURBATION, DOSE], sort=True)
    log_means, means = _group_means(adata, layer, grouped.ngroup().to_numpy(), grouped.ngroups)
    controls: dict[Context, int] = {}
    treated: dict[Context, dict[str, dict[Doses, int]]] = {}
    rows = grouped.size().reset_index()
    each = zip(rows["context"], rows[PERTURBATION], rows[DOSE], labels.is_control(rows), strict=True)
    for row, (code, label, doses, is_control) in enumerate(each):
        if is_control:
            controls[contexts[code]] = row
        else:
            treated.setdefault(contexts[code], {}).setdefault(label, {})[parse_doses(doses)] = row
    bare = sorted(context_name(context) for context in treated if context not in controls)
    if bare:
        raise ValueError(f"{len(bare)} contexts have treated cells but no control cell: {preview(bare)}.")
    return Profiles(log_means, means, controls, treated)


def _group_means(adata: AnnData, layer: str | None, group: NDArray[np.integer], n_groups: int) -> tuple[Floats, Floats]:
    def both(counts: sparse.csr_matrix, rows: NDArray[np.intp]) -> tuple[sparse.csr_matrix, sparse.csr_matrix]:
        logged = log_normalize(counts, TARGET_SUM)
        return logged, logged.expm1()

    weights = member_weights(group, np.arange(adata.n_obs), (n_groups, adata.n_obs))
    log_sum, total = grouped_sums(get_matrix(adata, layer), weights, both)
    size = np.bincount(group, minlength=n_groups)[:, None]
    return log_sum / size, total / size


def mean_rows(matrix: sparse.csr_matrix) -> Floats:
    """Mean over cells, shape `(n_genes,)`."""
    return np.asarray(matrix.mean(axis=0), dtype=np.float64).ravel()


def mean_share(counts: sparse.csr_matrix) -> Floats:
    """Mean over cells of a gene's share of the cell's counts, shape `(n_genes,)`; sums up to 1."""
    totals = np.maximum(np.asarray(counts.sum(axis=1), dtype=np.float64).ravel(), 1.0)
    return np.asarray(counts.T @ (1.0 / totals), dtype=np.float64) / counts.shape[0]


def resample(counts: sparse.csr_matrix, before: Floats, after: Floats, rng: np.random.Generator) -> sparse.csr_matrix:
    """Change counts so that the mean share of each gene goes from `before` to `after`.

    A gene that goes down keeps each of its counts with probability `after / before` (binomial thinning); a gene that
    goes up gains a Poisson number of counts with mean `library size * (after - before)` in every cell. Equal shares
    leave the counts as they are: control counts carry their own sampling noise, and drawing around them again would add
    a second layer. The expected library size of a cell stays what it was as long as both shares add up to 1 (exactly so
    for a cell with the mean composition). Shapes are `(n_cells, n_genes)` and `(n_genes,)`.
    """
    keep = np.divide(after, before, out=np.ones_like(after), where=before > after)
    thinned = counts.astype(np.int64)
    thinned.data = rng.binomial(thinned.data, keep[thinned.indices])
    library = np.asarray(counts.sum(axis=1), dtype=np.float64).ravel()
    # A Poisson total per cell, dealt out to genes by what they gain, is an independent Poisson number for every gene.
    gain = np.cumsum(np.maximum(after - before, 0.0))
    number = rng.poisson(library * gain[-1])
    gene = np.searchsorted(gain, rng.random(number.sum()) * gain[-1], side="right").clip(max=len(gain) - 1)
    indptr = np.concatenate([[0], np.cumsum(number)])
    gained = sparse.csr_matrix((np.ones(gene.size, dtype=np.int64), gene, indptr), shape=counts.shape)
    gained.sum_duplicates()
    out = sparse.csr_matrix(thinned + gained)
    out.eliminate_zeros()
    out.sort_indices()
    return out


def shares_for_log_means(counts: sparse.csr_matrix, wanted: Floats, rng: np.random.Generator) -> Floats:
    """Shares, adding up to 1, for which resampled counts have `wanted` means of `log1p(counts per 10,000)`.

    Because E[log1p(x)] is not log1p(E[x]), the shares are found by trial: resample, compare, correct, twelve times, on
    at most 500 of the control cells. Counts normalised per cell add up to the same number, so means that do not fit
    together (a shift that takes the largest gene away and gives its counts to nobody) are reached up to a common factor
    only; negative ones count as 0.
    """
    before = mean_share(counts)
    if counts.shape[0] > MAX_CELLS:
        counts = counts[np.sort(rng.choice(counts.shape[0], MAX_CELLS, replace=False))]
    here = mean_share(counts)
    goal = np.expm1(np.maximum(wanted, 0.0))
    current = np.expm1(mean_rows(log_normalize(counts)))
    floor = 1e-3
    change = (goal + floor) / (current + floor)
    share = np.where(here > 0, here * change, goal / TARGET_SUM)
    for _ in range(ROUNDS):
        share /= share.sum()
        found = np.expm1(mean_rows(log_normalize(resample(counts, here, share, rng))))
        share = share * np.clip((goal + floor) / (found + floor), 0.25, 4.0) ** STEP
    share /= share.sum()
    # Corrections were found on `counts`; carry them over to the mean shares of all cells.
    share = np.where(here > 0, before * share / np.where(here > 0, here, 1.0), share)
    return share / share.sum()
