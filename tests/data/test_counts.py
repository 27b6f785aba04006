"""Reading and checking of counts."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import anndata as ad
import h5py
import numpy as np
import pandas as pd
import pytest
import scanpy as sc
from scipy import sparse

from scperturbdiff.data import (
    check_counts,
    check_unique_names,
    gene_positions,
    get_matrix,
    iter_rows,
    log_normalize,
    read_genes,
)

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

COUNTS = np.array([[1, 0, 3], [0, 2, 0], [4, 0, 1]])


@pytest.mark.parametrize("form", [np.asarray, sparse.csr_matrix, sparse.csc_matrix])
@pytest.mark.parametrize("dtype", [np.int32, np.float32, np.uint16])
def test_counts_pass(form, dtype) -> None:
    check_counts(form(COUNTS.astype(dtype)))


@pytest.mark.parametrize("form", [np.asarray, sparse.csr_matrix])
@pytest.mark.parametrize(
    ("value", "message"),
    [
        (np.nan, "1 entries are NaN or infinite"),
        (np.inf, "1 entries are NaN or infinite"),
        (-2.0, "1 entries are negative"),
        (0.5, "1 entries are non-integer.*log-normalised"),
        (2.0**24 + 2, "1 entries are larger than 16,777,216"),
        (1e30, "1 entries are larger than 16,777,216"),
    ],
)
def test_what_is_no_count_is_named(form, value: float, message: str) -> None:
    bad = COUNTS.astype(np.float64)
    bad[2, 1] = value
    with pytest.raises(ValueError, match=f"adata.layers.*{message}"):
        check_counts(form(bad), "adata.layers['x']")


def test_cells_without_counts_are_named() -> None:
    empty = COUNTS.copy()
    empty[[0, 2]] = 0
    with pytest.raises(ValueError, match=r"2 cells have no counts at all \(rows 0, 2\)"):
        check_counts(sparse.csr_matrix(empty))
    with pytest.raises(ValueError, match="adata.X is empty: 0 cells x 3 genes"):
        check_counts(COUNTS[:0])


def test_checks_read_every_block(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("scperturbdiff.data._counts.CHECKED_ENTRIES", 6)
    big = np.tile(COUNTS, (3, 1))
    check_counts(big)
    big[8] = 0
    with pytest.raises(ValueError, match="rows 8"):
        check_counts(big)


def test_duplicated_names_are_listed() -> None:
    adata = ad.AnnData(COUNTS.astype(np.float32))
    check_unique_names(adata)
    adata.var_names = ["g1", "g2", "g1"]
    with pytest.raises(ValueError, match="var_names has 1 duplicated names: 'g1'. Call adata.var_names_make_unique"):
        check_unique_names(adata)
    adata.var_names, adata.obs_names = ["g1", "g2", "g3"], ["a", "b", "b"]
    with pytest.raises(ValueError, match="obs_names has 1 duplicated names: 'b'"):
        check_unique_names(adata)


def test_matrices_are_found_by_name() -> None:
    adata = ad.AnnData(COUNTS.astype(np.float32))
    adata.layers["counts"] = COUNTS
    assert get_matrix(adata, "counts") is adata.layers["counts"]
    with pytest.raises(KeyError, match="layer='count' is not in adata.layers. Layers: 'counts'"):
        get_matrix(adata, "count")
    with pytest.raises(ValueError, match="adata.X is empty"):
        get_matrix(ad.AnnData(obs=pd.DataFrame(index=["a"])))


@pytest.fixture(params=["dense", "csr"])
def backed(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[Any, np.ndarray]]:
    values = np.random.default_rng(0).poisson(1.0, size=(12, 5)).astype(np.float32)
    form = sparse.csr_matrix if request.param == "csr" else np.asarray
    ad.AnnData(form(values)).write_h5ad(tmp_path / "cells.h5ad")
    adata = ad.read_h5ad(tmp_path / "cells.h5ad", backed="r")
    yield adata, values
    adata.file.close()


def dense(blocks: Iterator[Any]) -> np.ndarray:
    return np.concatenate([b.toarray() if sparse.issparse(b) else np.asarray(b) for b in blocks])


@pytest.mark.parametrize("chunk", [1, 4, 100])
def test_rows_come_as_asked_from_a_file(backed, chunk: int) -> None:
    adata, values = backed
    rows = np.array([7, 2, 9, 0, 7, 7, 11, 2])
    np.testing.assert_array_equal(dense(iter_rows(adata.X, rows, chunk)), values[rows])
    np.testing.assert_array_equal(dense(iter_rows(adata.X, None, chunk)), values)
    np.testing.assert_array_equal(dense(iter_rows(values, rows, chunk)), values[rows])
    assert list(iter_rows(adata.X, np.empty(0, int), chunk)) == []


def test_genes_come_as_asked_from_a_file(backed) -> None:
    adata, values = backed
    found = read_genes(adata, ["3", "0"], rows=np.array([5, 5, 1]))
    assert sparse.isspmatrix_csr(found) and found.dtype == np.float32
    np.testing.assert_array_equal(found.toarray(), values[[5, 5, 1]][:, [3, 0]])
    np.testing.assert_array_equal(read_genes(adata).toarray(), values)
    assert read_genes(adata, rows=np.empty(0, int)).shape == (0, 5)


def test_missing_genes_are_listed() -> None:
    names = pd.Index(["a", "b", "c"])
    assert gene_positions(names, ["c", "a"]).tolist() == [2, 0]
    with pytest.raises(ValueError, match="2 of the 3 genes wanted are missing from adata.var_names: 'x', 'y'"):
        gene_positions(names, ["a", "x", "y"])


@pytest.mark.parametrize("target_sum", [1e4, 100.0])
def test_log_normalisation_equals_scanpy(target_sum: float) -> None:
    counts = np.random.default_rng(1).poisson(2.0, size=(20, 8)).astype(np.float32)
    adata = ad.AnnData(counts.copy())
    sc.pp.normalize_total(adata, target_sum=target_sum)
    sc.pp.log1p(adata)
    given = sparse.csr_matrix(counts.astype(np.int32))
    found = log_normalize(given, target_sum)
    np.testing.assert_allclose(found.toarray(), adata.X, rtol=1e-5)
    assert found.dtype == np.float32 and np.array_equal(given.toarray(), counts)


def test_log_normalisation_of_an_empty_cell_is_zero() -> None:
    found = log_normalize(sparse.csr_matrix(np.array([[0, 0], [1, 1]])))
    assert found[0].nnz == 0 and np.isfinite(found.data).all()


def test_counts_of_chosen_cells_only_are_checked() -> None:
    matrix = sparse.csr_matrix(np.array([[1.0, 2.0], [0.5, 1.0], [0.0, 0.0], [3.0, 0.0]], dtype=np.float32))
    check_counts(matrix, rows=np.array([0, 3]))
    with pytest.raises(ValueError, match=r"1 entries are non-integer"):
        check_counts(matrix, rows=np.array([1, 3]))
    with pytest.raises(ValueError, match=r"rows 2\)"):
        check_counts(matrix, rows=np.array([0, 2, 3]))


@pytest.mark.parametrize(
    ("matrix", "message"),
    [
        (np.array([["1", "2"]]), "entries are of type <U1"),
        (np.array([[1, 2]], dtype=object), "entries are of type object"),
        (np.array([[1 + 1j, 2]]), "entries are of type complex128"),
        (np.ma.masked_array([[1, 2]], mask=[[True, False]]), r"masked array.*adata.X = adata.X.filled\(0\)"),
        (np.array([[2**40, 1]]), "1 entries are larger than 16,777,216"),
    ],
)
def test_entries_that_are_no_numbers_are_named(matrix: np.ndarray, message: str) -> None:
    with pytest.raises(ValueError, match=f"adata.X .*{message}"):
        check_counts(matrix)


def damaged(part: str, at: int, value: int, form: type = sparse.csr_matrix) -> Any:
    matrix = form(np.arange(1, 41, dtype=np.float32).reshape(8, 5))
    getattr(matrix, part)[at] = value
    return matrix


DAMAGES = [
    ("indices", 3, 10**6, "indices lie between 0 and 1000000"),
    ("indices", 3, -7, "indices lie between -7 and"),
    ("indptr", 3, 10**7, "indptr must rise from 0"),
    ("indptr", 2, -4, "indptr must rise from 0"),
    ("indptr", 0, 3, "indptr must rise from 0"),
    ("indptr", -1, 10**7, "indptr ends at 10000000, beyond the 40 entries"),
]


@pytest.mark.parametrize("form", [sparse.csr_matrix, sparse.csc_matrix])
@pytest.mark.parametrize(("part", "at", "value", "message"), DAMAGES)
def test_damaged_matrices_are_refused(form: type, part: str, at: int, value: int, message: str) -> None:
    """SciPy reads and writes beyond the ends of their arrays."""
    matrix = damaged(part, at, value, form)
    message = f"damaged {matrix.format.upper()} matrix: {message}.* again"
    with pytest.raises(ValueError, match=f"adata.X is a {message}"):
        check_counts(matrix)
    for rows in (None, np.array([0, 1])):
        with pytest.raises(ValueError, match=message):
            read_genes(ad.AnnData(matrix), rows=rows)


def test_data_that_ends_early_is_refused() -> None:
    matrix = sparse.csr_matrix(np.ones((8, 5), np.float32))
    matrix.data = matrix.data[:-1]
    with pytest.raises(ValueError, match="indptr ends at 40, beyond the 39 entries"):
        check_counts(matrix)


@pytest.mark.parametrize(("value", "message"), [(10**6, "between 0 and 1000000"), (-7, "between -7 and")])
@pytest.mark.parametrize("rows", [None, np.array([4, 0, 0])])
def test_damaged_files_are_refused(tmp_path: Path, rows: np.ndarray | None, value: int, message: str) -> None:
    ad.AnnData(damaged("indices", 3, 3)).write_h5ad(tmp_path / "cells.h5ad")
    with h5py.File(tmp_path / "cells.h5ad", "r+") as file:
        file["X"]["indices"][3] = value
    for backed in (None, "r"):
        adata = ad.read_h5ad(tmp_path / "cells.h5ad", backed=backed)
        with pytest.raises(ValueError, match=f"damaged CSR matrix: indices lie {message}"):
            read_genes(adata, rows=rows)


@pytest.mark.parametrize("form", [sparse.csr_matrix, sparse.csc_matrix])
def test_entries_of_the_same_place_are_added_up(form: type) -> None:
    data, at = np.array([0.5, 2.0, 0.5, 3.0, 1.0, 4.0], np.float32), np.array([1, 0, 1, 2, 0, 0])
    matrix = form((data, at, np.array([0, 3, 4, 6])), shape=(3, 3))
    before = [matrix.data.copy(), matrix.indices.copy(), matrix.indptr.copy()]
    expected = matrix.toarray()
    assert sorted(expected[expected > 0]) == [1, 2, 3, 5]
    check_counts(matrix)
    adata = ad.AnnData(matrix)
    for rows in (None, np.arange(3)):
        found = read_genes(adata, rows=rows)
        assert found.has_canonical_format
        np.testing.assert_array_equal(found.toarray(), expected)
    logged = log_normalize(matrix).toarray()
    np.testing.assert_allclose(logged, log_normalize(expected).toarray(), rtol=1e-6)
    for now, then in zip([matrix.data, matrix.indices, matrix.indptr], before, strict=True):
        np.testing.assert_array_equal(now, then)
