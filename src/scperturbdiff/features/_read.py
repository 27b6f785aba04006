"""Tables of features made elsewhere."""

from __future__ import annotations

import zipfile
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pandas as pd

from scperturbdiff.arguments import check_choice
from scperturbdiff.data import FeatureTable, preview
from scperturbdiff.features._files import check_file
from scperturbdiff.features._names import Missing, Wanted
from scperturbdiff.memory import check_memory

if TYPE_CHECKING:
    import os
    from collections.abc import Mapping, Sequence
    from pathlib import Path

SEPARATORS = {".csv": ",", ".tsv": "\t", ".txt": "\t"}
SUFFIXES = (*SEPARATORS, *(f"{suffix}.gz" for suffix in SEPARATORS), ".parquet", ".npz")
"""Names of files that are read."""
MARK = "="
"""Stands before names while they are read."""


def read(
    path: str | os.PathLike[str],
    names: Sequence[str] | None = None,
    *,
    aliases: Mapping[str, str] | None = None,
    missing: Missing = "warn",
    constant: Literal["error", "drop", "keep"] = "error",
) -> pd.DataFrame:
    """Read features made elsewhere, embeddings of a language model for example, and align them by name.

    Parameters
    ----------
    path
        By its ending: `.csv` (commas), `.tsv` or `.txt` (tabs), also `.gz` of these, with a header line and names in
        the first column; `.parquet` (needs pyarrow), with names in the index or else the first column; `.npz`, with
        either one vector for each name, or `names`, shape `(n,)`, and `values`, shape `(n, n_features)`. No file is
        unpickled.
    names
        Names of the rows wanted. Default: all.
    aliases
        Other names, alias to name; either may be the one in the file: `{"7157": "TP53"}`.
    missing
        What is done about `names` that the file lacks: `"warn"` names them, with the nearest names, and leaves them
        out, `"error"` raises.
    constant
        What is done about columns with one value in all rows of the *file*, which tell nothing apart: `"error"`,
        `"drop"` them, or `"keep"`. Keep them where a later file must have the same columns. They are not looked for in
        a file of one row.

    Returns
    -------
    Values as they are in the file, float32, shape `(n_names, n_features)`: one row a name in the order of `names` (else
    of the file).

    Raises
    ------
    FileNotFoundError
        If there is no such file.
    ImportError
        For parquet without pyarrow.
    KeyError
        If the file has none of `names`, or with `missing="error"` lacks one.
    ValueError
        If rows that are wanted repeat or have values that are not finite, if columns are constant, or if the file is
        damaged or of another format.
    TypeError
        If the file holds text where numbers are needed; columns and rows are named.
    """
    wanted = Wanted.of("names", names, aliases, missing)
    check_choice("constant", constant, ("error", "drop", "keep"))
    file = check_file("path", path)
    table = _read_file(file)
    table.index = pd.Index(np.where(table.index.isna(), "", table.index.astype(str).str.strip()), dtype=object)
    where = repr(file.name)
    table = _without_constant(table, constant, where)
    index = list(table.index)
    if wanted.names is not None:
        remedy = "Other names of the same thing go into aliases."
        found = wanted.rows(index, where=where, table=where, remedy=remedy)
        taken = [index[i] for i in found.values()]
        repeated = table.index[table.index.duplicated()].unique().intersection(pd.Index(taken))
        if len(repeated):
            raise ValueError(f"{where} has duplicated names: {preview(repeated)}. Keep one row of each.")
        table = table.iloc[list(found.values())].set_axis(list(found))
    parsed = FeatureTable.parse(table, what=where)
    return pd.DataFrame(parsed.values, pd.Index(parsed.names, name="component"), table.columns.astype(str))


def _read_file(path: Path) -> pd.DataFrame:
    """The table in a file, names in its index; what libraries say of a damaged one becomes a `ValueError`."""
    if not path.name.lower().endswith(SUFFIXES):
        raise ValueError(f"path={str(path)!r} must end in one of {', '.join(SUFFIXES)}.")
    suffix = next(suffix for suffix in SUFFIXES if path.name.lower().endswith(suffix))
    try:
        if suffix == ".npz":
            return _read_npz(path)
        if suffix == ".parquet":
            return _read_parquet(path)
        separator = SEPARATORS[suffix.removesuffix(".gz")]
        # names are text whatever they look like, and so no index yet: a gene may be called NAN. pandas 3 takes that for
        # missing, even where a converter returns it
        table = pd.read_csv(path, sep=separator, converters={0: MARK.__add__}, low_memory=False)
        if not isinstance(table.index, pd.RangeIndex):
            raise ValueError("rows have more columns than the header. Give the column of names a title, too.")
        names = table.pop(table.columns[0]).str.removeprefix(MARK)
        return table.set_index(names)
    except (ImportError, TypeError, MemoryError):
        raise
    except Exception as error:  # of a damaged file libraries say anything
        raise ValueError(f"{str(path)!r} cannot be read as {suffix}: {error}") from error


def _read_parquet(path: Path) -> pd.DataFrame:
    try:
        import pyarrow  # noqa: F401
    except ImportError as error:
        raise ImportError(f"Reading {path.name!r} needs pyarrow: pip install 'scperturbdiff[parquet]'") from error
    table = pd.read_parquet(path, engine="pyarrow")
    named = table.index.dtype == object or isinstance(table.index.dtype, pd.StringDtype)
    return table if named or not len(table.columns) else table.set_index(table.columns[0])


def _read_npz(path: Path) -> pd.DataFrame:
    """Vectors by name, or arrays `names` and `values`; arrays of Python objects, which are pickles, are refused."""
    with zipfile.ZipFile(path) as packed:
        size = sum(entry.file_size for entry in packed.infolist())
    check_memory(2 * size, f"the arrays of {path.name}", "Write a file with the rows needed only.")
    with np.load(path, allow_pickle=False) as arrays:
        held: dict[str, Any] = {}
        for key in arrays.files:
            try:
                held[key] = arrays[key]
            except ValueError as error:
                raise ValueError(
                    f"array {key!r}: {error} Save names as text: np.savez(path, names=np.array(names, dtype=str), ...)."
                ) from None
    if set(held) == {"names", "values"}:
        names, values = held["names"], held["values"]
        if names.ndim != 1 or names.dtype.kind not in "US" or values.ndim != 2 or len(names) != len(values):
            raise ValueError(
                f"names {names.shape} of type {names.dtype} and values {values.shape} do not fit: allowed are names "
                "(n,) as text and values (n, n_features)."
            )
        return pd.DataFrame(values, index=pd.Index(np.char.decode(names) if names.dtype.kind == "S" else names))
    widths = {
        key: value.size if value.size == max(value.shape, default=1) else value.shape for key, value in held.items()
    }
    usual = max(set(widths.values()), key=list(widths.values()).count, default=0)
    if odd := {key: held[key].shape for key, width in widths.items() if width != usual or isinstance(width, tuple)}:
        shown = ", ".join(f"{key!r} {shape}" for key, shape in list(odd.items())[:10])
        raise ValueError(f"{len(odd)} of {len(held)} arrays are no vectors of one length ({usual}): {shown}.")
    return pd.DataFrame([value.ravel() for value in held.values()], index=list(held))


def _without_constant(table: pd.DataFrame, constant: str, where: str) -> pd.DataFrame:
    """The table, without columns of one value where these are to be dropped."""
    if len(table) < 2 or not len(table.columns) or constant == "keep":
        return table
    same = (table == table.iloc[0]).all(axis=0).to_numpy()
    if same.any() and constant == "error":
        raise ValueError(
            f"{where} has {int(same.sum())} columns with one value in all {len(table)} rows: "
            f"{preview(table.columns[same])}. Pass constant='drop' to leave them out, or 'keep'."
        )
    if same.all():
        raise ValueError(f"{where} has no column that differs between rows: {preview(table.index)} are all equal.")
    return table.loc[:, ~same]
