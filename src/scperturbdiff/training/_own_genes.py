"""How much the gene changes that a training perturbation is named after."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from scperturbdiff.data import grouped_sums, member_weights
from scperturbdiff.retrieval import OwnGene, RetrievalSettings
from scperturbdiff.training._settings import SETTINGS

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from scipy import sparse

    from scperturbdiff.data import PopulationTable

    Floats = NDArray[np.float64]

HALF = 0.5
"""Counts that are added to those of a gene before a ratio is taken."""


def own_gene(
    table: PopulationTable, matrix: Any, genes: NDArray[np.int64], seed: int, settings: RetrievalSettings
) -> OwnGene:
    """What training says of the gene that a perturbation is named after; nothing where no component is a gene.

    Parameters
    ----------
    table
        Training populations; those of a single component are used.
    matrix
        Counts, `(n_cells, n_genes)`, in memory or backed.
    genes
        Column of the gene with the name of each component, `(n_components,)`, -1 where there is none.
    seed
        Chooses the targets where there are many.
    settings
        How many must agree.
    """
    single = (table.component >= 0).sum(1) == 1
    target = np.where(single, table.component.max(1, initial=-1), -1)
    target[np.append(genes, -1)[target] < 0] = -1  # of names that are no genes, and of combinations
    known = np.unique(target[target >= 0])
    chosen = np.sort(np.random.default_rng(seed).permutation(known)[: SETTINGS.own_gene_targets])
    if not len(chosen):
        return OwnGene()
    return OwnGene.of(*_folds(table, matrix, target, chosen, genes[chosen]), settings)


def _folds(
    table: PopulationTable,
    matrix: Any,
    target: NDArray[np.int64],
    chosen: NDArray[np.int64],
    columns: NDArray[np.int64],
) -> tuple[Floats, Floats]:
    """Log fold change of the genes `columns` of the targets `chosen` and its standard error, `(n_chosen,)` each.

    Counts of a gene per count of all genes, pooled over the populations of a target and over their controls. Errors
    come from the variance between cells. Populations of a target have the weight of their cells, and so have their
    controls.
    """
    rows = np.flatnonzero(np.isin(target, chosen))
    at = np.searchsorted(chosen, target[rows])
    pools, pool = np.unique(table.match.group[rows], return_inverse=True)
    sizes = table.cells.count[rows], table.match.groups.count[pools]
    cells = [table.cells[int(row)] for row in rows] + [table.match.groups[int(group)] for group in pools]
    group = np.repeat(np.arange(len(cells)), np.concatenate(sizes))
    members = member_weights(group, np.concatenate(cells), (len(cells), matrix.shape[0]))

    def moments(counts: sparse.csr_matrix, _: NDArray[np.intp]) -> tuple[Any, Any, Any]:
        own = counts[:, columns].astype(np.float64)
        return own, own.multiply(own).tocsr(), np.asarray(counts.sum(axis=1), np.float64).reshape(-1, 1)

    total, square, library = grouped_sums(matrix, members, moments)
    n, treated, control = len(rows), np.arange(len(rows)), len(rows) + pool
    ones = np.ones(n)
    # controls that populations of a target share are the same cells, once
    _, first, pair = np.unique(np.column_stack([at, pool]), axis=0, return_index=True, return_inverse=True)
    matched = np.bincount(pair.reshape(-1), sizes[0] / sizes[1][pool])
    folds, variances = [], []
    for part, of, weight, size in (
        (treated, at, ones, sizes[0]),
        (control[first], at[first], matched, sizes[1][pool][first]),
    ):
        count, all_counts = total[part, of], library[part, 0]
        # no less than that of counting, for genes of which few cells have any
        variance = np.maximum(square[part, of] - count**2 / size, count + HALF)
        count, all_counts, variance = (
            np.bincount(of, value, minlength=len(chosen))
            for value in (weight * count, weight * all_counts, weight**2 * variance)
        )
        folds.append(np.log((count + HALF) / np.maximum(all_counts, 1)))
        variances.append(variance / (count + HALF) ** 2)
    return folds[0] - folds[1], np.sqrt(variances[0] + variances[1])
