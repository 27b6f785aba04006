"""Values as JSON and tensors, and back: reading runs no code of the file."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
import torch

TAG = "$"
"""Key of what JSON has no word for: the name of the kind of value that a dictionary stands for."""


def encode(value: Any, tensors: dict[str, torch.Tensor], name: str) -> Any:
    """What JSON can hold of `value`; arrays of numbers go into `tensors`, under names that begin with `name`.

    Raises
    ------
    TypeError
        If there is a value that cannot be kept; it is named.
    """
    if value is None or type(value) in (bool, int, str):
        return value
    if isinstance(value, float) and not isinstance(value, np.generic):
        return value if np.isfinite(value) else {TAG: "float", "of": str(value)}
    if isinstance(value, list | tuple):
        of = [encode(part, tensors, f"{name}.{i}") for i, part in enumerate(value)]
        return of if isinstance(value, list) else {TAG: "tuple", "of": of}
    if isinstance(value, pd.Series | pd.Index):
        return _encode_array(value.to_numpy(), tensors, name)
    if isinstance(value, Mapping):
        if all(isinstance(key, str) for key in value) and TAG not in value:
            return {key: encode(part, tensors, f"{name}.{key}") for key, part in value.items()}
        pairs = [[encode(key, tensors, f"{name}.{i}k"), encode(part, tensors, f"{name}.{i}")]
                 for i, (key, part) in enumerate(value.items())]  # fmt: skip
        return {TAG: "dict", "of": pairs}
    if isinstance(value, torch.Tensor):
        tensors[name] = value.detach().cpu().clone().contiguous()
        return {TAG: "tensor", "at": name}
    if isinstance(value, np.generic):
        return {TAG: "number", "dtype": value.dtype.str, "of": encode(value.item(), tensors, name)}
    if isinstance(value, np.ndarray):
        return _encode_array(value, tensors, name)
    if isinstance(value, pd.DataFrame):
        columns = [[encode(key, tensors, f"{name}.{i}n"), _encode_column(value.iloc[:, i], tensors, f"{name}.{i}")]
                   for i, key in enumerate(value.columns)]  # fmt: skip
        return {TAG: "table", "columns": columns, "index": _encode_index(value.index, tensors, f"{name}.index"),
                "names": _encode_index(value.columns, tensors, f"{name}.columns")}  # fmt: skip
    raise TypeError(f"{name} holds a {type(value).__name__}, which a saved model cannot keep.")


def decode(value: Any, tensors: Mapping[str, torch.Tensor]) -> Any:
    """What :func:`encode` was given.

    Raises
    ------
    ValueError
        If `value` is not what :func:`encode` gives.
    """
    if isinstance(value, list):
        return [decode(part, tensors) for part in value]
    if not isinstance(value, dict):
        return value
    if TAG not in value:
        return {key: decode(part, tensors) for key, part in value.items()}
    try:
        return _DECODERS[value[TAG]](value, tensors)
    except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
        raise ValueError(f"a value of kind {str(value[TAG])[:40]!r} cannot be read: {str(error)[:200]}") from None


def check_kept(value: Any, name: str) -> None:
    """Raise a `TypeError`, before hours of work, if a value that a saved model needs cannot be kept."""
    encode(value, {}, name)


def _encode_array(value: np.ndarray, tensors: dict[str, torch.Tensor], name: str) -> dict[str, Any]:
    if value.dtype.kind in "biuf":
        tensors[name] = torch.as_tensor(np.array(value, order="C"))
        return {TAG: "array", "at": name}
    if value.dtype.kind not in "OUT":
        raise TypeError(f"{name} holds an array of {value.dtype}, which a saved model cannot keep.")
    of = [encode(part, tensors, f"{name}.{i}") for i, part in enumerate(value.reshape(-1).tolist())]
    return {TAG: "objects", "dtype": "U" if value.dtype.kind == "U" else "O", "shape": list(value.shape), "of": of}


def _encode_column(column: pd.Series, tensors: dict[str, torch.Tensor], name: str) -> dict[str, Any]:
    """A column by the codes of its categories, where it is categorical or has many equal values."""
    if isinstance(column.dtype, pd.CategoricalDtype):
        codes, categories = column.cat.codes.to_numpy(), column.cat.categories.to_numpy()
        of: Any = encode(categories, tensors, f"{name}.of")
        return {TAG: "category", "codes": encode(codes, tensors, name), "of": of, "ordered": bool(column.cat.ordered)}
    values = column.to_numpy()
    if all(type(value) is str for value in values):
        number = {name: i for i, name in enumerate(dict.fromkeys(values))}  # pandas takes "" and "\0" for one
        codes = np.array([number[value] for value in values], dtype=np.int32)
        dtype = "object" if column.dtype == object else "str"
        return {TAG: "text", "codes": encode(codes, tensors, name), "of": list(number),
                "dtype": dtype}  # fmt: skip
    return _encode_array(values, tensors, name)


def _encode_index(index: pd.Index, tensors: dict[str, torch.Tensor], name: str) -> dict[str, Any]:
    label = encode(index.name, tensors, f"{name}.name")
    if isinstance(index, pd.RangeIndex):
        return {"range": [index.start, index.stop, index.step], "name": label}
    return {"of": _encode_column(index.to_series(), tensors, name), "name": label}


def _objects(value: dict[str, Any], tensors: Mapping[str, torch.Tensor]) -> np.ndarray:
    out = np.empty(len(value["of"]), dtype=object)
    out[:] = decode(value["of"], tensors)
    out = out.reshape(value["shape"])
    return out.astype(str) if value["dtype"] == "U" else out


def _number(value: dict[str, Any], tensors: Mapping[str, torch.Tensor]) -> Any:
    dtype = np.dtype(value["dtype"])
    if dtype.kind not in "biuf":
        raise ValueError(f"{dtype} is no number")
    return dtype.type(decode(value["of"], tensors))


def _category(value: dict[str, Any], tensors: Mapping[str, torch.Tensor]) -> pd.Categorical:
    codes, categories = decode(value["codes"], tensors), decode(value["of"], tensors)
    return pd.Categorical.from_codes(codes, categories, ordered=value["ordered"])


def _text(value: dict[str, Any], tensors: Mapping[str, torch.Tensor]) -> Any:
    names = np.array([*value["of"], None], dtype=object)[:-1]
    column = names[decode(value["codes"], tensors)]
    return column if value["dtype"] == "object" else pd.array(column, dtype="str")


def _index(value: dict[str, Any], tensors: Mapping[str, torch.Tensor]) -> pd.Index:
    name = decode(value["name"], tensors)
    if "range" in value:
        start, stop, step = map(int, value["range"])
        return pd.RangeIndex(start, stop, step, name=name)
    return pd.Index(_as_it_was(decode(value["of"], tensors)), name=name)


def _table(value: dict[str, Any], tensors: Mapping[str, torch.Tensor]) -> pd.DataFrame:
    columns = [decode(column, tensors) for _, column in value["columns"]]
    index = _index(value["index"], tensors)
    if lengths := {len(column) for column in columns} - {len(index)}:
        raise ValueError(f"{len(index)} rows, but columns of {min(lengths)}")
    table = pd.DataFrame({i: _as_it_was(column) for i, column in enumerate(columns)}, index=None if columns else index)
    table.index, table.columns = index, _index(value["names"], tensors)
    return table


def _as_it_was(column: Any) -> Any:
    """A column of objects stays one: pandas 3 makes text of an array of them where it can, but not of a series."""
    objects = isinstance(column, np.ndarray) and column.dtype == object
    return pd.Series(column, dtype=object) if objects else column


_DECODERS = {
    "float": lambda value, _: float(value["of"]),
    "tuple": lambda value, tensors: tuple(decode(value["of"], tensors)),
    "dict": lambda value, tensors: {decode(key, tensors): decode(part, tensors) for key, part in value["of"]},
    "tensor": lambda value, tensors: tensors[value["at"]],
    "array": lambda value, tensors: tensors[value["at"]].numpy(),
    "number": _number,
    "objects": _objects,
    "category": _category,
    "text": _text,
    "table": _table,
}
