"""Tables made elsewhere: every format, names and aliases, and what is wrong with a file."""

from __future__ import annotations

import logging
import os
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scperturbdiff import features

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

TABLE = pd.DataFrame([[1.5, -2.0], [0.25, 4.0], [3.0, 0.5]], index=["TP53", "STAT1", "NAN"], columns=["e1", "e2"])


def write_csv(table: pd.DataFrame, path: Path) -> Path:
    table.to_csv(path.with_suffix(".csv"))
    return path.with_suffix(".csv")


def write_tsv(table: pd.DataFrame, path: Path) -> Path:
    table.to_csv(path.with_suffix(".tsv.gz"), sep="\t")
    return path.with_suffix(".tsv.gz")


def write_vectors(table: pd.DataFrame, path: Path) -> Path:
    np.savez(path.with_suffix(".npz"), **{str(name): row.to_numpy() for name, row in table.iterrows()})
    return path.with_suffix(".npz")


def write_arrays(table: pd.DataFrame, path: Path) -> Path:
    np.savez_compressed(path.with_suffix(".npz"), names=np.array(table.index, dtype=str), values=table.to_numpy())
    return path.with_suffix(".npz")


def write_parquet(table: pd.DataFrame, path: Path) -> Path:
    pytest.importorskip("pyarrow", reason="parquet needs pyarrow")
    table.to_parquet(path.with_suffix(".parquet"))
    return path.with_suffix(".parquet")


def write_parquet_column(table: pd.DataFrame, path: Path) -> Path:
    pytest.importorskip("pyarrow", reason="parquet needs pyarrow")
    table.rename_axis("gene").reset_index().to_parquet(path.with_suffix(".parquet"))
    return path.with_suffix(".parquet")


WRITERS = [write_csv, write_tsv, write_vectors, write_arrays, write_parquet, write_parquet_column]


@pytest.mark.parametrize("write", WRITERS)
def test_every_format_gives_the_same_table(tmp_path: Path, write: Callable[[pd.DataFrame, Path], Path]) -> None:
    path = write(TABLE, tmp_path / "table")
    whole = features.read(path)
    np.testing.assert_array_equal(whole, TABLE.to_numpy(np.float32))
    assert whole.index.tolist() == TABLE.index.tolist() and whole.dtypes.eq(np.float32).all()
    some = features.read(str(path), ["NAN", "TP53"])
    np.testing.assert_array_equal(some, TABLE.loc[["NAN", "TP53"]].to_numpy(np.float32))


@settings(max_examples=25, deadline=None)
@given(
    st.lists(
        st.text(st.characters(codec="utf-8", exclude_categories=["C", "Z"]), min_size=1, max_size=8),
        min_size=2,
        max_size=6,
        unique=True,
    ),
    st.integers(0, 2**32 - 1),
)
def test_names_are_read_as_they_are_written(
    tmp_path_factory: pytest.TempPathFactory, names: list[str], seed: int
) -> None:
    """Whatever they look like: numbers, dates, missing values, quotes."""
    values = np.random.default_rng(seed).normal(size=(len(names), 2)).astype(np.float32)
    path = tmp_path_factory.mktemp("any") / "table.csv"
    pd.DataFrame(values, index=names).to_csv(path)
    found = features.read(path, names[::-1])
    assert found.index.tolist() == names[::-1]
    np.testing.assert_allclose(found, values[::-1], rtol=1e-6)


@pytest.mark.parametrize("name", ["NA", "nan", "1", "007", "1e5", "MARCH1", "TRUE", "None"])
def test_names_that_look_like_something_else(tmp_path: Path, name: str) -> None:
    path = write_csv(pd.DataFrame({"f": [1.0, 2.0]}, index=[name, "other"]), tmp_path / "t")
    assert features.read(path).index.tolist() == [name, "other"]


def test_aliases_lead_either_way(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = write_csv(TABLE, tmp_path / "t")
    for aliases in ({"p53": "TP53"}, {"TP53": "p53"}, pd.Series({"p53": "TP53"}), {"p53": "X", "TP53": "X"}):
        assert features.read(path, ["p53"], aliases=aliases).loc["p53"].tolist() == [1.5, -2.0]
    both = features.read(path, ["TP53", "p53"], aliases={"p53": "TP53"})
    assert both.index.tolist() == ["TP53", "p53"]
    # a name that the file has is that row, whatever else it is called
    assert features.read(path, ["STAT1"], aliases={"STAT1": "TP53"}).loc["STAT1"].tolist() == [0.25, 4.0]
    with pytest.raises(ValueError, match="'gene' could be 'TP53', 'STAT1'.*all aliases of 'gene'"):
        features.read(path, ["gene"], aliases={"TP53": "gene", "STAT1": "gene"})
    with caplog.at_level(logging.WARNING, logger="scperturbdiff"):
        assert features.read(path, ["TP53", "STAT2"]).index.tolist() == ["TP53"]
    assert "1 of 2 names have no row in 't.csv': 'STAT2' (nearest: 'STAT1'" in caplog.text
    with pytest.raises(KeyError, match="STAT2"):
        features.read(path, ["TP53", "STAT2"], missing="error")


@pytest.mark.parametrize(
    ("text", "error", "message"),
    [
        ("g,a\nA,1\nB,2\nA,3\n", ValueError, "'t.csv' has duplicated names: 'A'"),
        ("g,a\nA,1\nB,\nC,inf\n", ValueError, "'t.csv' has NaN or infinite values for 2 names: 'B', 'C'"),
        ("g,a\n,1\nB,2\n", ValueError, "'t.csv' has rows without a name, at positions 0"),
        ("g,a,b\nA,1,x\nB,2,y\n", TypeError, r"'t.csv' must hold numbers: columns 'b' hold others \('x'\).*'A', 'B'"),
        ("g,a\nA,1\nB,2;5\n", TypeError, "columns 'a' hold others .'2;5'. for 1 names: 'B'"),
        ("g,a,b\nA,1,7\nB,2,7\n", ValueError, "'t.csv' has 1 columns with one value in all 2 rows: 'b'"),
        ("a,b\nA,1,3\nB,2,5\n", ValueError, "rows have more columns than the header"),
        ("g,a\nA,1\nB,2,3,4\n", ValueError, "cannot be read as .csv"),
        ("", ValueError, "cannot be read as .csv"),
        ("g,a\n", ValueError, "empty"),
        ("g\nA\nB\n", ValueError, "empty"),
    ],
)
def test_what_is_wrong_with_a_table_is_named(tmp_path: Path, text: str, error: type[Exception], message: str) -> None:
    path = tmp_path / "t.csv"
    path.write_text(text)
    with pytest.raises(error, match=message):
        features.read(path)


def test_only_rows_that_are_wanted_must_be_right(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    path.write_text("g,a\nA,1\nB,\nC,3\nC,4\n")
    assert features.read(path, ["A"]).loc["A"].tolist() == [1]
    with pytest.raises(ValueError, match="for 1 names: 'B'"):
        features.read(path, ["A", "B"])
    with pytest.raises(ValueError, match="duplicated names: 'C'"):
        features.read(path, ["C"])


def test_constant_columns_are_those_of_the_file(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    path.write_text("g,a,b,c\nA,1,7,5\nB,2,7,5\nC,3,7,6\n")
    assert features.read(path, ["A", "B"], constant="drop").columns.tolist() == ["a", "c"]
    assert features.read(path, constant="keep").shape == (3, 3)
    path.write_text("g,a\nA,7\nB,7\n")
    with pytest.raises(ValueError, match="no column that differs between rows: 'A', 'B'"):
        features.read(path, constant="drop")
    path.write_text("g,a\nA,7\n")
    assert features.read(path).shape == (1, 1)
    with pytest.raises(ValueError, match="constant='ignore'"):
        features.read(path, constant="ignore")  # type: ignore[arg-type]


class Bad:
    """What runs code when it is unpickled."""

    def __reduce__(self) -> Any:
        return os.mkdir, ("unpickled",)


@pytest.mark.parametrize("key", ["A", "names"])
def test_pickles_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, key: str) -> None:
    monkeypatch.chdir(tmp_path)
    np.savez(tmp_path / "t.npz", **{key: np.array([Bad(), Bad()], dtype=object), "values": np.ones((2, 2))})
    with pytest.raises(ValueError, match=f"array '{key}': .*Save names as text"):
        features.read(tmp_path / "t.npz")
    assert not (tmp_path / "unpickled").exists()


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        (
            {"A": np.ones(3), "B": np.zeros(3), "C": np.ones((4, 3))},
            r"1 of 3 arrays are no vectors of one length \(3\): 'C'",
        ),
        ({"A": np.ones(3), "B": np.zeros(3), "C": np.ones(2)}, "'C' .2,."),
        ({"names": np.array(["A"]), "values": np.ones((2, 3))}, r"names \(1,\).*values \(2, 3\) do not fit"),
        ({"names": np.array([1, 2]), "values": np.ones((2, 3))}, "do not fit"),
        ({}, "empty"),
    ],
)
def test_arrays_that_do_not_fit_are_named(tmp_path: Path, arrays: dict[str, Any], message: str) -> None:
    np.savez(tmp_path / "t.npz", **arrays)
    with pytest.raises(ValueError, match=message):
        features.read(tmp_path / "t.npz")


def test_other_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"absent\.csv"):
        features.read(tmp_path / "absent.csv")
    (tmp_path / "t.pkl").write_bytes(b"x")
    with pytest.raises(ValueError, match=r"must end in one of \.csv"):
        features.read(tmp_path / "t.pkl")
    (tmp_path / "t.npz").write_bytes(b"no archive")
    with pytest.raises(ValueError, match=r"cannot be read as \.npz"):
        features.read(tmp_path / "t.npz")


def test_a_table_of_real_targets(data_dir: Path) -> None:
    """The annotation of the targets of two screens, in which one has none."""
    path = data_dir / "gene_go_svd64_targets.csv"
    with pytest.raises(KeyError, match="'IER5L'"):
        features.read(path, ["STAT1", "IER5L"], missing="error")
    table = features.read(path, ["IFNGR1", "IFNGR2", "JAK2", "SMAD4", "MYC"])
    assert table.shape == (5, 64)
    unit = features.join(go=table)
    assert (unit @ unit.loc["IFNGR1"]).drop("IFNGR1").idxmax() == "IFNGR2"
