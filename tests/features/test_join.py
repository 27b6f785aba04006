"""Blocks of features side by side."""

from __future__ import annotations

import logging
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.testing import assert_allclose

from scperturbdiff import features

GO = pd.DataFrame([[3.0, 4.0], [0.0, 2.0], [1.0, 0.0]], index=["A", "B", "C"], columns=["x", "y"])
ESM = {"B": [1e3, 0.0, 0.0], "C": [0.0, 5e3, 0.0]}


def cosine(table: pd.DataFrame) -> np.ndarray:
    values = table.to_numpy(np.float64)
    norm = np.maximum(np.linalg.norm(values, axis=1, keepdims=True), 1e-12)
    return (values / norm) @ (values / norm).T


def test_blocks_are_side_by_side_under_their_names(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="scperturbdiff"):
        table = features.join(go=GO, esm=ESM)
    assert table.columns.tolist() == ["go:x", "go:y", "esm:1", "esm:2", "esm:3"]
    assert_allclose(table, [[0.6, 0.8, 0, 0, 0], [0, 1, 1, 0, 0], [1, 0, 0, 1, 0]], rtol=1e-6)
    assert table.dtypes.eq(np.float32).all()
    assert "block 'esm' lacks 1 ('A')" in caplog.text and "set to zero" in caplog.text


def test_names_that_a_block_lacks(caplog: pytest.LogCaptureFixture) -> None:
    assert features.join(go=GO, esm=ESM, missing="drop").index.tolist() == ["B", "C"]
    assert "left out" in caplog.text
    with pytest.raises(KeyError, match="block 'esm' lacks 1 .'A'."):
        features.join(go=GO, esm=ESM, missing="error")
    with pytest.raises(ValueError, match="No name is in every block"):
        features.join(go=GO, esm={"Z": [1.0]}, missing="drop")


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32 - 1), st.floats(0.01, 100), st.floats(1e-6, 1e6))
def test_cosines_are_the_weighted_mean_of_those_of_blocks(seed: int, weight: float, unit: float) -> None:
    """Whatever the unit of a block is, and for each row by itself."""
    rng = np.random.default_rng(seed)
    a, b = (pd.DataFrame(rng.normal(size=(5, k)), index=list("ABCDE")) for k in (3, 7))
    joined = features.join(a=a, b=b * unit, weights={"b": weight})
    assert_allclose(cosine(joined), (cosine(a) + weight * cosine(b)) / (1 + weight), atol=1e-5)
    some = features.join(a=a.iloc[[3, 1]], b=b.iloc[1:4] * unit, weights={"b": weight}, missing="drop")
    assert_allclose(some, joined.loc[["D", "B"]], rtol=1e-5)


def test_blocks_as_they_are() -> None:
    table = features.join(go=GO, esm={"A": [7.0], "B": [8.0], "C": [9.0]}, normalize=False, weights={"esm": 4.0})
    assert_allclose(table, np.column_stack([GO, [14, 16, 18]]))


@pytest.mark.parametrize(
    ("given_", "error", "message"),
    [
        ({}, ValueError, "one table or more"),
        ({"go": GO.to_numpy()}, TypeError, r"join\(go=...\) must be a DataFrame"),
        ({"go": GO.assign(z=np.nan)}, ValueError, r"join\(go=...\) has NaN or infinite values for 3 names: 'A'"),
        ({"go": pd.concat([GO, GO])}, ValueError, "duplicated names: 'A', 'B', 'C'"),
        ({"go": GO, "weights": {"esm": 1.0}}, KeyError, "weights names 'esm', which are no blocks. Blocks: 'go'"),
        ({"go": GO, "weights": {"go": 0}}, ValueError, r"weights\['go'\]=0 must be a number in \(0, inf\)"),
        ({"go": GO, "missing": "mean"}, ValueError, "missing='mean'"),
        ({"go": GO, "normalize": "l2"}, TypeError, "normalize='l2'"),
    ],
)
def test_wrong_arguments_are_named(given_: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        features.join(**given_)
