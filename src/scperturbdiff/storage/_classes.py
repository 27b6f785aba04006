"""Dataclasses as dictionaries and back, by the names of classes that the reader allows."""

from __future__ import annotations

import re
from dataclasses import fields, is_dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

if TYPE_CHECKING:
    from collections.abc import Mapping

KIND = "kind"
"""Key with the name of the class that a dictionary stands for."""


def to_state(value: Any) -> Any:
    """A dataclass as a dictionary, arrays as tensors, containers by their elements; the rest as it is."""
    if is_dataclass(value) and not isinstance(value, type):
        parts = {f.name: to_state(getattr(value, f.name)) for f in fields(value)}
        return {KIND: type(value).__name__, **parts}
    if isinstance(value, np.ndarray):
        return torch.as_tensor(value)
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, dict):
        return {name: to_state(part) for name, part in value.items()}
    if isinstance(value, tuple | list):
        return tuple(to_state(part) for part in value)
    return value


def from_state(
    state: Any,
    kinds: Mapping[str, type],
    shapes: Mapping[str, Mapping[str, str]] | None = None,
    sizes: dict[str, int] | None = None,
) -> Any:
    """What :func:`to_state` was given.

    Parameters
    ----------
    state
        Nested dictionaries.
    kinds
        Classes it may hold, by name.
    shapes
        Shapes of arrays by class and field, a letter a dimension. A capital letter is the same number everywhere, a
        small one within an object.
    sizes
        What is known of capital letters; the others are added.

    Raises
    ------
    ValueError
        If there is another class, or a field that the class does not have, or of another type or shape.
    """
    sizes = {} if sizes is None else sizes
    if isinstance(state, torch.Tensor):
        return np.asarray(state.cpu())
    if isinstance(state, tuple | list):
        return tuple(from_state(part, kinds, shapes, sizes) for part in state)
    if not isinstance(state, dict):
        return state
    parts = {name: from_state(part, kinds, shapes, sizes) for name, part in state.items() if name != KIND}
    if KIND not in state:
        return parts
    if state[KIND] not in kinds:
        raise ValueError(f"The state holds a {str(state[KIND])[:40]!r}. Known: {sorted(kinds)}.")
    _check_shapes(state[KIND], parts, (shapes or {}).get(state[KIND], {}), sizes)
    return build(kinds[state[KIND]], parts)


def _check_shapes(kind: str, parts: Mapping[str, Any], shapes: Mapping[str, str], sizes: dict[str, int]) -> None:
    own: dict[str, int] = {}
    for name, letters in shapes.items():
        value = parts.get(name)
        for array in value.values() if isinstance(value, dict) else () if value is None else (value,):
            shape = getattr(array, "shape", ())
            known = own if not isinstance(value, dict) else {}
            fits = len(shape) == len(letters) and all(
                (sizes if letter.isupper() else known).setdefault(letter, n) == n
                for letter, n in zip(letters, shape, strict=True)
            )
            if not fits:
                raise ValueError(f"{kind}.{name} has shape {shape}, where {letters} is {sizes | known}.")


def build(kind: type, values: Mapping[str, Any]) -> Any:
    """An instance of a dataclass from its fields, whose names and types are checked.

    Types are checked as they are written: an array, a number, a text, a mapping, a sequence, a class of ours.

    Raises
    ------
    ValueError
        If a field is missing, unknown, or of another type.
    """
    known = {f.name: f for f in fields(kind)}
    if unknown := sorted(set(values) ^ set(known)):
        raise ValueError(f"{kind.__name__} has other fields than what was saved: {unknown[:5]}.")
    for name, value in values.items():
        written = known[name].type if isinstance(known[name].type, str) else getattr(known[name].type, "__name__", "")
        if not _fits(value, str(written)):
            raise ValueError(f"{kind.__name__}.{name} must be {written}, not {type(value).__name__}.")
    return kind(**values)


def _fits(value: Any, written: str) -> bool:
    """Whether a value is of a type as it is written: `"Floats | None"`, `"Mapping[Novelty, Widths]"`."""
    for part in written.split(" | "):
        base, inner = re.fullmatch(r"([\w.]+)(?:\[(.*)\])?", part.strip(), re.DOTALL).groups()  # type: ignore[union-attr]
        if base == "Any" or (base == "None" and value is None):
            return True
        known = isinstance(value, _TYPES.get(base, ())) and (base == "bool" or not isinstance(value, bool))
        if (known and _parts_fit(value, inner)) or (base not in _TYPES and base == type(value).__name__):
            return True
    return False


def _parts_fit(value: Any, inner: str | None) -> bool:
    """Whether the elements of a container are of the types in its brackets."""
    if inner is None or not isinstance(value, dict | tuple | list):
        return True
    if isinstance(value, dict):
        key, of = inner.split(", ", 1)
        return all(_fits(k, key) and _fits(v, of) for k, v in value.items())
    each = inner.split(", ")
    if len(each) == 1 or each[-1] == "...":
        each = each[:1] * len(value)
    return len(each) == len(value) and all(map(_fits, value, each))


_TYPES: dict[str, Any] = {
    "bool": bool,
    "int": int,
    "float": (int, float),
    "str": str,
    "Novelty": str,
    "NDArray": np.ndarray,
    "Floats": np.ndarray,
    "Mapping": dict,
    "dict": dict,
    "tuple": tuple,
    "Sequence": (tuple, list),
}
