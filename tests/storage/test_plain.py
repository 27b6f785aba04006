"""Values as JSON and tensors: what goes in comes out, of the same type."""

from __future__ import annotations

import json
from collections import defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from pandas.testing import assert_frame_equal

from scperturbdiff.storage import build, check_kept, from_state, to_state
from scperturbdiff.storage._plain import decode, encode

if TYPE_CHECKING:
    from collections.abc import Mapping

NUMBERS = st.sampled_from([np.float32, np.float64, np.float16, np.int8, np.int64, np.uint8, np.bool_])
LEAVES = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text()
    | NUMBERS.map(lambda kind: kind(1))
    | arrays.arrays(NUMBERS, arrays.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=4))
    | st.lists(st.text(), max_size=3).map(lambda names: np.array(names, dtype=object))
    | st.lists(st.text(alphabet="abc", min_size=1), min_size=1, max_size=3).map(np.array)
)
KEYS = st.text() | st.integers() | st.booleans() | st.none() | st.tuples(st.integers(), st.text())
VALUES = st.recursive(
    LEAVES,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.lists(inner, max_size=3).map(tuple)
        | st.dictionaries(KEYS, inner, max_size=3)
        | st.dictionaries(st.sampled_from(["$", "of", "kind"]), inner, max_size=3)
    ),
    max_leaves=12,
)


def there_and_back(value: Any) -> Any:
    tensors: dict[str, torch.Tensor] = {}
    text = json.dumps(encode(value, tensors, "value"), allow_nan=False)
    return decode(json.loads(text), tensors)


def assert_same(a: Any, b: Any) -> None:
    assert type(a) is type(b)
    if isinstance(a, dict):
        assert [*a] == [*b]
        for x, y in zip(a.values(), b.values(), strict=True):
            assert_same(x, y)
    elif isinstance(a, list | tuple):
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            assert_same(x, y)
    elif isinstance(a, np.ndarray):
        assert (a.dtype.kind, a.shape) == (b.dtype.kind, b.shape)
        np.testing.assert_array_equal(a, b)
    else:
        assert a == b or (a != a and b != b)


@settings(deadline=None, max_examples=40)
@given(VALUES)
def test_values_come_back_as_they_were(value: Any) -> None:
    assert_same(there_and_back(value), value)


@settings(deadline=None, max_examples=40)
@given(
    st.lists(
        st.tuples(st.text(), st.integers(-5, 5), st.floats(allow_nan=False), st.booleans(), st.sampled_from("abc"))
    ),
    st.booleans(),
)
def test_tables_come_back_as_they_were(rows: list[tuple[Any, ...]], named: bool) -> None:
    table = pd.DataFrame(rows, columns=["text", "whole", "number", "flag", "kind"])
    table["kind"] = pd.Categorical(table["kind"], categories=["c", "b", "a"], ordered=named)
    table["mixed"] = pd.Series([None, *range(len(table))][: len(table)], dtype=object)
    if named:
        table.index = pd.Index([f"row {i}" for i in range(len(table))], name="condition")
    assert_frame_equal(there_and_back(table), table)


def test_a_default_dictionary_comes_back_as_a_plain_one() -> None:
    assert there_and_back(defaultdict(dict, {"a": {"b": (1, 2.5)}})) == {"a": {"b": (1, 2.5)}}


def test_tensors_keep_their_type_and_share_no_memory() -> None:
    value = torch.arange(6, dtype=torch.bfloat16).reshape(2, 3).T
    tensors: dict[str, torch.Tensor] = {}
    encode({"a": value, "b": value}, tensors, "x")
    assert [*tensors] == ["x.a", "x.b"]
    assert all(torch.equal(kept, value) and kept.is_contiguous() for kept in tensors.values())
    assert len({kept.data_ptr() for kept in (*tensors.values(), value)}) == 3


@pytest.mark.parametrize(
    "value", [object(), {"a": [print]}, np.array([1j]), {1, 2}, np.array(["2020"], "datetime64[D]")]
)
def test_what_cannot_be_kept_is_named(value: Any) -> None:
    with pytest.raises(TypeError, match=r"^setup.* holds a"):
        check_kept({"key": value}, "setup")


@pytest.mark.parametrize(
    "written",
    [
        {"$": "eval", "of": "1"},
        {"$": "dict", "of": 3},
        {"$": "dict", "of": [[[1], 2]]},
        {"$": "array", "at": "missing"},
        {"$": "number", "dtype": "O", "of": 1},
        {"$": "number", "dtype": "nonsense", "of": 1},
        {"$": "objects", "dtype": "O", "shape": [5], "of": [1]},
        {"$": "objects", "dtype": "O", "shape": [-1, 10**12], "of": [1]},
        {"$": "float", "of": "abc"},
        {"$": ["list"], "of": 1},
        {"$": "table", "columns": [[0, {"$": "float", "of": "1"}]], "index": {"range": [0, 10**12, 1], "name": None},
         "names": {"range": [0, 1, 1], "name": None}},
        {"$": "table", "columns": 1},
        {"$": "text", "codes": {"$": "array", "at": "codes"}, "of": ["a"], "dtype": "object"},
        {"$": "category", "codes": {"$": "array", "at": "codes"}, "of": ["a"], "ordered": False},
    ],
)  # fmt: skip
def test_what_was_not_written_by_us_is_refused(written: Any) -> None:
    with pytest.raises(ValueError, match="cannot be read"):
        decode({"deep": [written]}, {"codes": torch.tensor([7])})


@dataclass(frozen=True)
class Inner:
    values: np.ndarray
    number: float = 1.0


@dataclass(frozen=True)
class Outer:
    inner: Inner | None
    by_name: Mapping[str, Inner]
    pair: tuple[float, float]
    names: tuple[str, ...]
    count: int = 0
    flag: bool = False


Inner.__annotations__["values"] = Inner.__dataclass_fields__["values"].type = "NDArray[np.float64]"
KINDS = {"Inner": Inner, "Outer": Outer}


def outer(**changes: Any) -> Outer:
    inner = Inner(np.ones((2, 3)))
    return Outer(**({"inner": inner, "by_name": {"a": inner}, "pair": (1.0, 2), "names": ("x",)} | changes))


def test_dataclasses_come_back_as_they_were() -> None:
    again = from_state(to_state(outer()), KINDS, {"Inner": {"values": "nD"}}, {"D": 3})
    np.testing.assert_array_equal(again.by_name["a"].values, np.ones((2, 3)))
    assert (again.pair, again.names, again.count) == ((1.0, 2), ("x",), 0)


@pytest.mark.parametrize(
    "changes",
    [
        {"inner": 3},
        {"inner": "text"},
        {"by_name": {"a": 1.0}},
        {"by_name": {1: None}},
        {"by_name": [1]},
        {"pair": (1.0,)},
        {"pair": (1.0, "2")},
        {"names": (1,)},
        {"count": True},
        {"count": 1.5},
        {"flag": 1},
    ],
)
def test_fields_of_another_type_are_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"^Outer\.\w+ must be"):
        from_state(to_state(outer(**changes)), KINDS)


@pytest.mark.parametrize(("sizes", "shape"), [({"D": 4}, (2, 3)), ({}, (2, 3, 1)), ({"D": 3}, (3,))])
def test_arrays_of_another_shape_are_refused(sizes: dict[str, int], shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"Inner\.values has shape"):
        from_state(to_state(outer(inner=Inner(np.ones(shape)))), KINDS, {"Inner": {"values": "nD"}}, sizes)


def test_other_classes_and_fields_are_refused() -> None:
    with pytest.raises(ValueError, match="holds a 'builtins.eval'"):
        from_state({"kind": "builtins.eval"}, KINDS)
    with pytest.raises(ValueError, match="other fields"):
        build(Inner, {"values": np.ones(1), "number": 1.0, "more": 2})
    with pytest.raises(ValueError, match="other fields"):
        build(Inner, {"number": 1.0})
