"""Sums over groups of rows, read in blocks."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import anndata as ad
import numpy as np
import pytest
from scipy import sparse

from scperturbdiff.data import grouped_sums, member_weights

if TYPE_CHECKING:
    from pathlib import Path


@pytest.mark.parametrize("form", ["dense", "csr", "csc", "backed"])
@pytest.mark.parametrize("chunk", [1, 4, 100])
def test_sums_by_hand(form: str, chunk: int, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    values = rng.poisson(1.0, (23, 7)).astype(np.float32)
    matrix: Any = {"dense": values, "csr": sparse.csr_matrix(values), "csc": sparse.csc_matrix(values)}.get(form)
    if matrix is None:
        ad.AnnData(sparse.csr_matrix(values)).write_h5ad(tmp_path / "cells.h5ad")
        matrix = ad.read_h5ad(tmp_path / "cells.h5ad", backed="r").X
    group, rows = rng.integers(0, 4, 40), rng.integers(0, 20, 40)  # repeats; rows 20 to 22 are in no group
    weights = sparse.diags([1.0, 0.5, 2.0, 3.0, 1.0]) @ member_weights(group, rows, (5, 23))
    columns = np.array([6, 0, 3])
    seen: list[int] = []

    def transform(block: sparse.csr_matrix, at: np.ndarray) -> list[Any]:
        np.testing.assert_array_equal(block.toarray(), values[at][:, columns])
        seen.extend(at)
        return [block, block.toarray() ** 2 + at[:, None]]

    first, second = grouped_sums(matrix, sparse.csr_matrix(weights), transform, columns=columns, chunk=chunk)
    dense = weights.toarray()
    np.testing.assert_allclose(first, dense @ values[:, columns])
    np.testing.assert_allclose(second, dense @ (values[:, columns] ** 2 + np.arange(23)[:, None]))
    assert seen == sorted(set(rows))  # each row once, and only those with a weight
    assert (first[4] == 0).all()


def test_without_any_row_sums_are_zero() -> None:
    nothing = sparse.csr_matrix((2, 5))
    (found,) = grouped_sums(np.ones((5, 3)), nothing, lambda block, rows: [block.power(2)])
    np.testing.assert_array_equal(found, np.zeros((2, 3)))
