"""Reading, checking, aligning and normalising expression matrices."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from scipy import sparse

from scperturbdiff.data._messages import check_text, preview
from scperturbdiff.data._rows import CHUNK_ROWS, is_on_disk, iter_rows

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from anndata import AnnData
    from numpy.typing import NDArray


CHECKED_ENTRIES = 2**25
"""Entries, zeros included, that are checked at a time."""
SAMPLED_BLOCKS, SAMPLED_ROWS = 8, 2048
"""Blocks of consecutive cells, and cells of each, of a matrix on disk that are checked before it is read."""
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


def check_not_empty(matrix: Any, where: str) -> None:
    """Raise a `ValueError` where a matrix has no cells or no genes."""
    if matrix.shape[0] == 0 or matrix.shape[1] == 0:
        raise ValueError(f"{where} is empty: {matrix.shape[0]} cells x {matrix.shape[1]} genes.")


def check_layer(
    adata: AnnData,
    layer: str | None = None,
    rows: NDArray[np.integer] | None = None,
    where: str = "adata",
    *,
    sample: bool = False,
) -> NDArray[np.float64]:
    """Totals of cells; raise unless a layer of `adata` (`None`: X) holds counts; see :func:`check_counts`."""
    return check_counts(get_matrix(adata, layer, where), matrix_name(layer, where), rows, sample=sample)


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
    sample: bool = False,
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
    sample
        Of a matrix on disk look at some of the cells only: who reads the others does so with :func:`iter_counts`.
    """
    check_not_empty(matrix, where)
    if isinstance(matrix, np.ma.MaskedArray):
        raise ValueError(f"{where} is a masked array. Say what masked entries are, e.g. {where} = {where}.filled(0).")
    if sample and is_on_disk(matrix):
        rows = _some(np.arange(matrix.shape[0]) if rows is None else rows)
    found = _Found(where, argument)
    for block in iter_rows(matrix, rows, max(1, CHECKED_ENTRIES // matrix.shape[1]), where):
        found.add(block)
    return found.check(rows, empty_cells)


def iter_counts(
    matrix: Any, rows: NDArray[np.integer] | None = None, chunk: int = CHUNK_ROWS, where: str = "adata.X"
) -> Iterator[Any]:
    """:func:`iter_rows` of counts, of which those on disk are checked while they are read; see :func:`check_counts`."""
    start, unchecked = 0, is_on_disk(matrix)
    for block in iter_rows(matrix, rows, chunk, where):
        if unchecked:
            found, stop = _Found(where), start + block.shape[0]
            found.add(block)
            found.check(np.arange(start, stop) if rows is None else rows[start:stop])
            start = stop
        yield block


def _some(rows: NDArray[np.integer]) -> NDArray[np.integer]:
    """Blocks of consecutive ones of `rows`, evenly spaced; all, where there are not many."""
    if len(rows) <= SAMPLED_BLOCKS * SAMPLED_ROWS:
        return rows
    start = np.linspace(0, len(rows) - SAMPLED_ROWS, SAMPLED_BLOCKS).astype(np.int64)
    return rows[(start[:, None] + np.arange(SAMPLED_ROWS)).ravel()]


class _Found:
    """What was found in blocks of a matrix that should hold counts."""

    def __init__(self, where: str, argument: str = "layer=...") -> None:
        self.where, self.argument = where, argument
        self.bad, self.totals = dict.fromkeys(NO_COUNTS, 0), [np.empty(0)]

    def add(self, block: Any) -> None:
        """Look at a block."""
        values = block.data if sparse.issparse(block) else np.asarray(block)
        for what, number in _no_counts(values, self.where).items():
            self.bad[what] += number
        self.totals.append(np.asarray(block.sum(axis=1)).ravel())

    def check(self, rows: NDArray[np.integer] | None, empty_cells: bool = False) -> NDArray[np.float64]:
        """Totals of the cells, `rows` of the matrix; a `ValueError` that says what is wrong."""
        remedy = f"Pass {self.argument} to name the layer that holds raw counts; log-normalised values are not counts."
        total = np.concatenate(self.totals)
        if self.bad[FRACTIONAL] and len(total) > 1 and are_equal_totals(total):
            remedy = f"Its cells all add up to about {total.mean():,.0f}: they seem to be normalised. {remedy}"
        for what, number in self.bad.items():
            if number:
                raise ValueError(f"{self.where} must hold raw counts, but {number} entries are {what}. {remedy}")
        empty = np.flatnonzero(total == 0)
        no_counts = empty if rows is None else np.asarray(rows)[empty]
        if no_counts.size and not empty_cells:
            raise ValueError(
                f"{self.where}: {no_counts.size} cells have no counts at all (rows {preview(no_counts.tolist())}). "
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
    if values.dtype.kind == "f" and values.size and values.min() >= 0 and values.max() <= LARGEST_COUNT:
        return {FRACTIONAL: int(np.count_nonzero(values != np.floor(values)))}  # also without NaN: as nearly always
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
    *,
    counts: bool = False,
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
    counts
        Check what is read from disk (:func:`iter_counts`).
    """
    columns = np.arange(adata.n_vars) if genes is None else gene_positions(adata.var_names, genes, where)
    as_stored = np.array_equal(columns, np.arange(adata.n_vars))
    matrix, name = get_matrix(adata, layer, where, argument), matrix_name(layer, where)
    blocks = []
    for block in iter_counts(matrix, rows, where=name) if counts else iter_rows(matrix, rows):
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
