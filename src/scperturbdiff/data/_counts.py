"""Reading, checking, aligning and normalising expression matrices."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from scipy import sparse

from scperturbdiff.data._messages import preview

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from anndata import AnnData
    from numpy.typing import NDArray


CHUNK_ROWS = 16_384
"""Rows read at a time, so that a backed or sparse matrix is never dense as a whole."""


def get_matrix(adata: AnnData, layer: str | None = None) -> Any:
    """The matrix in `adata.X` or `adata.layers[layer]`, as stored (dense, sparse or backed)."""
    if layer is None:
        if adata.X is None:
            raise ValueError("adata.X is empty. Pass layer=... to name the layer that holds the counts.")
        return adata.X
    if layer not in adata.layers:
        names = [name for name in adata.layers if name is not None]  # since anndata 0.13 None stands for X
        raise KeyError(f"layer={layer!r} is not in adata.layers. Layers: {preview(names, 30)}.")
    return adata.layers[layer]


def iter_rows(matrix: Any, rows: NDArray[np.integer] | None = None, chunk: int = CHUNK_ROWS) -> Iterator[Any]:
    """Yield consecutive blocks of rows in memory, in the order of `rows` (repeats allowed).

    Backed matrices want sorted, unique row numbers; that is undone here, so that the rows come out as asked.
    """
    n = matrix.shape[0] if rows is None else len(rows)
    in_memory = isinstance(matrix, np.ndarray) or sparse.issparse(matrix)
    for start in range(0, n, chunk):
        stop = min(start + chunk, n)
        if rows is None:
            yield matrix[start:stop]
        elif in_memory:
            yield matrix[rows[start:stop]]
        else:
            wanted, back = np.unique(rows[start:stop], return_inverse=True)
            yield matrix[wanted][back]


def check_not_empty(matrix: Any, where: str) -> None:
    """Raise a `ValueError` where a matrix has no cells or no genes."""
    if matrix.shape[0] == 0 or matrix.shape[1] == 0:
        raise ValueError(f"{where} is empty: {matrix.shape[0]} cells x {matrix.shape[1]} genes.")


def check_layer(adata: AnnData, layer: str | None = None, rows: NDArray[np.integer] | None = None) -> None:
    """Raise unless a layer of `adata` (`None`: X) holds counts; see :func:`check_counts`."""
    check_counts(get_matrix(adata, layer), matrix_name(layer), rows)


def matrix_name(layer: str | None, where: str = "adata") -> str:
    """How messages name a layer."""
    return f"{where}.X" if layer is None else f"{where}.layers[{layer!r}]"


def check_counts(
    matrix: Any,
    where: str = "adata.X",
    rows: NDArray[np.integer] | None = None,
    *,
    empty_cells: bool = False,
    argument: str = "layer=...",
) -> None:
    """Raise a `ValueError` unless every entry is a finite, non-negative integer and every cell has a count.

    Parameters
    ----------
    matrix
        Counts, shape `(n_cells, n_genes)`; dense, sparse or backed. Read in blocks of rows.
    where, argument
        How messages name the matrix, and what they say to pass to name another layer.
    rows, empty_cells
        Cells to look at; `None`: all. Whether cells may be without counts.
    """
    check_not_empty(matrix, where)
    not_finite = negative = fractional = 0
    totals = [np.empty(0)]
    for block in iter_rows(matrix, rows):
        values = block.data if sparse.issparse(block) else np.asarray(block)
        if values.dtype.kind not in "iub":
            finite = np.isfinite(values)
            not_finite += int(values.size - finite.sum())
            fractional += int((values[finite] != np.round(values[finite])).sum())
        negative += int((values < 0).sum())
        totals.append(np.asarray(block.sum(axis=1)).ravel())
    remedy = f"Pass {argument} to name the layer that holds raw counts; log-normalised values are not counts."
    for number, what in ((not_finite, "NaN or infinite"), (negative, "negative"), (fractional, "non-integer")):
        if number:
            raise ValueError(f"{where} must hold raw counts, but {number} entries are {what}. {remedy}")
    empty = np.flatnonzero(np.concatenate(totals) == 0)
    no_counts = empty if rows is None else np.asarray(rows)[empty]
    if no_counts.size and not empty_cells:
        raise ValueError(
            f"{where}: {no_counts.size} cells have no counts at all (rows {preview(no_counts.tolist())}). "
            "Remove them first, e.g. sc.pp.filter_cells(adata, min_counts=1)."
        )


def check_unique_names(adata: AnnData) -> None:
    """Raise a `ValueError` that lists duplicated `obs_names` or `var_names`."""
    for names, what, remedy in (
        (adata.var_names, "var_names", "adata.var_names_make_unique()"),
        (adata.obs_names, "obs_names", "adata.obs_names_make_unique()"),
    ):
        if not names.is_unique:
            repeated = names[names.duplicated()].unique()
            raise ValueError(f"adata.{what} has {len(repeated)} duplicated names: {preview(repeated)}. Call {remedy}.")


def gene_positions(var_names: pd.Index, genes: Sequence[str] | pd.Index) -> NDArray[np.intp]:
    """Where each of `genes` stands in `var_names`; raises a `ValueError` listing the missing ones."""
    genes = pd.Index(genes)
    if not var_names.is_unique:
        repeated = var_names[var_names.duplicated()].unique()
        raise ValueError(f"var_names has {len(repeated)} duplicated names: {preview(repeated)}.")
    positions = var_names.get_indexer(genes)
    missing = genes[positions < 0]
    if len(missing):
        raise ValueError(
            f"{len(missing)} of the {len(genes)} genes wanted are missing from adata.var_names: {preview(missing)}. "
            "Genes are matched by name."
        )
    return positions


def read_genes(
    adata: AnnData,
    genes: Sequence[str] | pd.Index | None = None,
    layer: str | None = None,
    rows: NDArray[np.integer] | None = None,
) -> sparse.csr_matrix:
    """Rows of the matrix with its columns in the order of `genes`, as float32 CSR in memory.

    Parameters
    ----------
    adata
        Cells; dense, sparse or backed.
    genes
        Names wanted, in order. Extra genes of `adata` are left out; missing ones raise. `None`: all, as stored.
    layer, rows
        Layer to read; `None` for X. Row numbers wanted, in order, repeats allowed; `None`: all.
    """
    columns = np.arange(adata.n_vars) if genes is None else gene_positions(adata.var_names, genes)
    as_stored = np.array_equal(columns, np.arange(adata.n_vars))
    blocks = []
    for block in iter_rows(get_matrix(adata, layer), rows):
        taken = sparse.csr_matrix(block, dtype=np.float32)
        blocks.append(taken if as_stored else taken[:, columns])
    if not blocks:
        return sparse.csr_matrix((0, len(columns)), dtype=np.float32)
    out = blocks[0] if len(blocks) == 1 else sparse.vstack(blocks, format="csr")
    out.sort_indices()
    return out


def log_normalize(counts: sparse.csr_matrix | NDArray[Any], target_sum: float = 1e4) -> sparse.csr_matrix:
    """`log1p(counts / library size * target_sum)` per cell, as float32 CSR; cells without counts stay 0."""
    matrix = sparse.csr_matrix(counts, dtype=np.float32, copy=True)
    totals = np.asarray(matrix.sum(axis=1)).ravel()
    scale = np.divide(target_sum, totals, out=np.zeros_like(totals), where=totals > 0)
    matrix.data = np.log1p(matrix.data * np.repeat(scale, np.diff(matrix.indptr)))
    return matrix
