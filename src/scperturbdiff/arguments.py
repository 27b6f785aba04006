"""Checks of single arguments: an error says what was given and what is allowed."""

from __future__ import annotations

from numbers import Integral, Real
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Iterable


LONGEST = 80
"""Letters of a value that a message shows, at most."""


def refusal(name: str, value: Any, allowed: str, kind: type[Exception] = ValueError) -> Exception:
    """The error that all checks raise."""
    shown = repr(value.item() if isinstance(value, np.generic) else value)
    shown = shown if len(shown) <= LONGEST else f"{shown[: LONGEST - 3]}..."
    return kind(f"{name}={shown} must be {allowed}.")


def check_int(name: str, value: Any, low: int, high: int | None = None) -> int:
    """A whole number from `low` to `high`, of Python or NumPy; booleans and floats are none."""
    allowed = f"a whole number, {low:,} or more" if high is None else f"a whole number from {low:,} to {high:,}"
    if isinstance(value, bool) or not isinstance(value, Real):
        raise refusal(name, value, allowed, TypeError)
    if not isinstance(value, Integral) or int(value) < low or (high is not None and int(value) > high):
        raise refusal(name, value, allowed)
    return int(value)


def check_number(name: str, value: Any, allowed: str = "(-inf, inf)") -> float:
    """A number in an interval, which is given as messages show it: `"[0, 1)"`. NaN is in none, booleans are none."""
    if isinstance(value, bool) or not isinstance(value, Real):
        raise refusal(name, value, f"a number in {allowed}", TypeError)
    low, high = map(float, allowed[1:-1].split(","))
    number = float(value)
    ends = (number == low and allowed[0] == "[") or (number == high and allowed[-1] == "]")
    if not (low < number < high or ends):
        raise refusal(name, value, f"a number in {allowed}")
    return number


def check_choice(name: str, value: Any, allowed: Iterable[Any]) -> None:
    """One of several values."""
    allowed = list(allowed)
    if not any(type(value) is type(other) and value == other for other in allowed):
        raise refusal(name, value, f"one of {', '.join(map(repr, allowed))}")


def check_flag(name: str, value: Any) -> None:
    """Yes or no; numbers are neither."""
    if not isinstance(value, bool | np.bool_):
        raise refusal(name, value, "True or False", TypeError)


def check_type(name: str, value: Any, kinds: Any, allowed: str) -> None:
    """An instance of one of the classes, which messages call `allowed`."""
    if not isinstance(value, kinds):
        raise refusal(name, value, allowed, TypeError)


def check_texts(name: str, value: Any) -> tuple[str, ...]:
    """Several texts, or a single one; none where there is `None`."""
    texts = (value,) if isinstance(value, str) else () if value is None else value
    if not isinstance(texts, list | tuple | set | frozenset | dict | np.ndarray) and not hasattr(texts, "to_list"):
        raise refusal(name, value, "a text, several texts, or None", TypeError)
    if not all(isinstance(text, str) for text in texts):
        raise refusal(name, value, "a text, several texts, or None", TypeError)
    return tuple(texts)
