"""States of retrieval for saving: nested dictionaries of tensors and plain values, which load without running code."""

from __future__ import annotations

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


def from_state(state: Any, kinds: Mapping[str, type]) -> Any:
    """What :func:`to_state` was given; `kinds` are the classes it may hold."""
    if isinstance(state, torch.Tensor):
        return np.asarray(state.cpu())
    if isinstance(state, tuple | list):
        return tuple(from_state(part, kinds) for part in state)
    if not isinstance(state, dict):
        return state
    parts = {name: from_state(part, kinds) for name, part in state.items() if name != KIND}
    if KIND not in state:
        return parts
    if state[KIND] not in kinds:
        raise ValueError(f"The state holds a {state[KIND]!r}. Known: {sorted(kinds)}.")
    return kinds[state[KIND]](**parts)
