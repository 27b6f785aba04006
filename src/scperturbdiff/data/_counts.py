"""Reading, checking, aligning and normalising expression matrices."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from scipy import sparse

from scperturbdiff.data._messages import check_text, preview

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from anndata import AnnData
    from numpy.typing import NDArray


CHUNK_ROWS = 16_384
"""Rows read at a time, so that a backed or sparse matrix is never dense as a whole."""
CHECKED_ENTRIES = 2**25
"""Entries, zeros included, that are checked at a time."""
SAME_TOTAL = 1e-3
"""Relative range of totals of cells that are the same but for rounding."""
LARGEST_COUNT = 2**24
"""Counts up to this one are exact in single precision, in which cells are encoded and decoded."""


def get_matrix(adata: AnnData, layer: str | None = None, where: str = "adata", argument: str = "layer") -> Any:
    """The matrix in `adata.X` or `adata.layers[layer]`, as stored (dense, sparse or backed).

    `where` and `argument` are what the user calls the cells, and the argument that names the layer.
    """
    if layer is None:
        if adata.X is None:
            raise ValueError(f"{where}.X is empty. Pass {argument}=... to name the layer that holds the counts.")
        return adata.X
    if layer not in adata.layers:
        names = [name for name in adata.layers if name is not None]  # since anndata 0.13 None stands for X
        raise KeyError(f"{argument}={layer!r} is not in {where}.layers. Layers: {preview(names, 30)}.")
    return adata.layers[layer]


def iter_rows(
    matrix: Any, rows: NDArray[np.integer] | None = None, chunk: int = CHUNK_ROWS, where: str = "The matrix"
) -> Iterator[Any]:
    """Yield consecutive blocks of rows in memory, in the order of `rows` (repeats allowed).

    Sparse blocks are sorted and have one entry a place, the sum of duplicates; the matrix itself is not changed. One
    whose arrays do not fit together raises a `ValueError`; `where` is how its message names the matrix.

    Backed matrices want sorted, unique row numbers; that is undone here, so that the rows come out as asked.
    """
    n = matrix.shape[0] if rows is None else len(rows)
    if sparse.issparse(matrix):
        matrix = matrix if matrix.format in COMPRESSED else matrix.tocsr()
        _check_structure(matrix, where, entries=matrix.format == "csc")
    in_memory = isinstance(matrix, np.ndarray) or sparse.issparse(matrix)
    for start in range(0, n, chunk):
        stop = min(start + chunk, n)
        if rows is None:
            block = matrix[start:stop]
        elif in_memory:
            block = matrix[rows[start:stop]]
        else:
            wanted, back = np.unique(rows[start:stop], return_inverse=True)
            block = _canonical(matrix[wanted], where)[back]
        yield _canonical(block, where)


COMPRESSED = ("csr", "csc")
"""Sparse formats of which rows can be taken."""


def _canonical(block: Any, where: str) -> Any:
    """A sparse block, checked, its entries sorted and those of the same place summed; a dense one as it is."""
    if not sparse.issparse(block):
        return block
    _check_structure(block, where)
    if not block.has_canonical_format:
        block = block.copy()
        block.sum_duplicates()
    return block


def _check_structure(matrix: Any, where: str, entries: bool = True) -> None:
    """Raise where the arrays of a CSR or CSC matrix do not fit together: SciPy would read and write beyond them.

    `entries` says whether to look at all entries, too, or at the borders of rows (of columns) only.
    """
    (n, width), start = matrix.shape if matrix.format == "csr" else matrix.shape[::-1], matrix.indptr
    n_entries = min(len(matrix.indices), len(matrix.data))
    if len(start) != n + 1 or start[0] != 0 or (start[1:] < start[:-1]).any():
        wrong = f"indptr must rise from 0 in {n + 1} steps"
    elif start[-1] > n_entries:
        wrong = f"indptr ends at {start[-1]}, beyond the {n_entries} entries"
    elif len(matrix.indices) != len(matrix.data):
        wrong = f"{len(matrix.indices)} indices for {len(matrix.data)} entries"
    elif entries and start[-1] and not 0 <= (used := matrix.indices[: start[-1]]).min() <= used.max() < width:
        wrong = f"indices lie between {used.min()} and {used.max()}, not between 0 and {width - 1}"
    else:
        return
    raise ValueError(f"{where} is a damaged {matrix.format.upper()} matrix: {wrong}. Build or download it again.")


def check_not_empty(matrix: Any, where: str) -> None:
    """Raise a `ValueError` where a matrix has no cells or no genes."""
    if matrix.shape[0] == 0 or matrix.shape[1] == 0:
        raise ValueError(f"{where} is empty: {matrix.shape[0]} cells x {matrix.shape[1]} genes.")


def check_layer(
    adata: AnnData, layer: str | None = None, rows: NDArray[np.integer] | None = None, where: str = "adata"
) -> NDArray[np.float64]:
    """Totals of cells; raise unless a layer of `adata` (`None`: X) holds counts; see :func:`check_counts`."""
    return check_counts(get_matrix(adata, layer, where), matrix_name(layer, where), rows)


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
) -> NDArray[np.float64]:
    """Raise a `ValueError` unless every entry is an integer from 0 to `LARGEST_COUNT` and every cell has a count.

    What cells add up to is returned, `(n_cells,)`, as the matrix is read anyway.

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
    if isinstance(matrix, np.ma.MaskedArray):
        raise ValueError(f"{where} is a masked array. Say what masked entries are, e.g. {where} = {where}.filled(0).")
    bad = dict.fromkeys(NO_COUNTS, 0)
    totals = [np.empty(0)]
    for block in iter_rows(matrix, rows, max(1, CHECKED_ENTRIES // matrix.shape[1]), where):
        values = block.data if sparse.issparse(block) else np.asarray(block)
        for what, number in _no_counts(values, where).items():
            bad[what] += number
        totals.append(np.asarray(block.sum(axis=1)).ravel())
    remedy = f"Pass {argument} to name the layer that holds raw counts; log-normalised values are not counts."
    total = np.concatenate(totals)
    if bad[FRACTIONAL] and len(total) > 1 and are_equal_totals(total):
        remedy = f"Its cells all add up to about {total.mean():,.0f}: they seem to be normalised. {remedy}"
    for what, number in bad.items():
        if number:
            raise ValueError(f"{where} must hold raw counts, but {number} entries are {what}. {remedy}")
    empty = np.flatnonzero(total == 0)
    no_counts = empty if rows is None else np.asarray(rows)[empty]
    if no_counts.size and not empty_cells:
        raise ValueError(
            f"{where}: {no_counts.size} cells have no counts at all (rows {preview(no_counts.tolist())}). "
            "Remove them first, e.g. sc.pp.filter_cells(adata, min_counts=1)."
        )
    return total


def are_equal_totals(totals: NDArray[Any]) -> bool:
    """Whether cells add up to the same, as those of no sequencer do: they were normalised."""
    return bool(np.ptp(totals) < SAME_TOTAL * totals.mean())


FRACTIONAL = "non-integer"
NO_COUNTS = ("NaN or infinite", "negative", FRACTIONAL, f"larger than {LARGEST_COUNT:,}")
"""What entries that are no counts are called, the worst first."""


def _no_counts(values: NDArray[Any], where: str) -> dict[str, int]:
    """How many of the values are what of :data:`NO_COUNTS`."""
    if values.dtype.kind not in "biuf":
        raise ValueError(f"{where} must hold raw counts, but its entries are of type {values.dtype}.")
    not_finite = fractional = 0
    if values.dtype.kind == "f":
        finite = np.isfinite(values)
        not_finite = int(values.size - np.count_nonzero(finite))
        values = values[finite] if not_finite else values
        fractional = int(np.count_nonzero(values != np.floor(values)))
    negative, large = int(np.count_nonzero(values < 0)), int(np.count_nonzero(values > LARGEST_COUNT))
    return dict(zip(NO_COUNTS, (not_finite, negative, fractional, large), strict=True))


def read_indices(indices: Any, n: int) -> NDArray[np.int64]:
    """Row numbers, given as such (from the end, where they are negative) or as a mask of `n` rows."""
    given = np.asarray(indices)
    if given.dtype == bool and given.shape == (n,):
        return np.flatnonzero(given)
    if given.ndim != 1 or (given.size and given.dtype.kind not in "iu"):
        raise TypeError(
            f"indices must be whole numbers or a mask of {n} rows, not {given.dtype} of shape {given.shape}."
        )
    if given.size and not -n <= given.min() <= given.max() < n:
        raise ValueError(f"indices lie between {given.min()} and {given.max()}, but there are {n} cells.")
    return given.astype(np.int64) % n


def check_unique_names(adata: AnnData) -> None:
    """Raise a `ValueError` that lists `obs_names` or `var_names` that repeat or that no file can hold."""
    for names, what, remedy in (
        (adata.var_names, "var_names", "adata.var_names_make_unique()"),
        (adata.obs_names, "obs_names", "adata.obs_names_make_unique()"),
    ):
        if not names.is_unique:
            repeated = names[names.duplicated()].unique()
            raise ValueError(f"adata.{what} has {len(repeated)} duplicated names: {preview(repeated)}. Call {remedy}.")
        check_text(names, f"adata.{what}")


def gene_positions(var_names: pd.Index, genes: Sequence[str] | pd.Index, where: str = "adata") -> NDArray[np.intp]:
    """Where each of `genes` stands in `var_names`, those of `where`; raises a `ValueError` listing the missing ones."""
    genes = pd.Index(genes)
    if not var_names.is_unique:
        repeated = var_names[var_names.duplicated()].unique()
        raise ValueError(f"{where}.var_names has {len(repeated)} duplicated names: {preview(repeated)}.")
    positions = var_names.get_indexer(genes)
    missing = genes[positions < 0]
    if len(missing):
        raise ValueError(
            f"{len(missing)} of the {len(genes)} genes wanted are missing from {where}.var_names: {preview(missing)}. "
            "Genes are matched by name."
        )
    return positions


def read_genes(
    adata: AnnData,
    genes: Sequence[str] | pd.Index | None = None,
    layer: str | None = None,
    rows: NDArray[np.integer] | None = None,
    where: str = "adata",
    argument: str = "layer",
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
    where, argument
        What messages call the cells, and the argument that names the layer.
    """
    columns = np.arange(adata.n_vars) if genes is None else gene_positions(adata.var_names, genes, where)
    as_stored = np.array_equal(columns, np.arange(adata.n_vars))
    blocks = []
    for block in iter_rows(get_matrix(adata, layer, where, argument), rows):
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
    matrix.sum_duplicates()
    totals = np.asarray(matrix.sum(axis=1)).ravel()
    scale = np.divide(target_sum, totals, out=np.zeros_like(totals), where=totals > 0)
    matrix.data = np.log1p(matrix.data * np.repeat(scale, np.diff(matrix.indptr)))
    return matrix
