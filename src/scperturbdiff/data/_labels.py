"""Reading labels of perturbations: components, doses, controls."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

if TYPE_CHECKING:
    from collections.abc import Iterable

    from numpy.typing import NDArray


from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

    from numpy.typing import NDArray


def split_label(label: object, separator: str) -> tuple[str, ...]:
    """Components of a label such as ``"A+B"``, or of a list of names."""
    if isinstance(label, list | tuple | set | np.ndarray):
        return tuple(str(part) for part in label)
    return tuple(part.strip() for part in str(label).split(separator) if part.strip())


def canonical_label(components: Iterable[str], separator: str) -> str:
    """The label with its components sorted, so that ``"B+A"`` and ``"A+B"`` are one perturbation."""
    return separator.join(sorted(components))


def split_dose(dose: object, n: int, separator: str) -> tuple[float, ...]:
    """Doses of `n` components from a number (the same for all) or text such as ``"1.0+0.5"``."""
    if isinstance(dose, str):
        parts = tuple(float(p) for p in dose.split(separator))
    elif isinstance(dose, list | tuple | np.ndarray):
        parts = tuple(float(p) for p in dose)
    else:
        parts = (float(dose),)  # type: ignore[arg-type]
    if len(parts) == 1:
        parts *= max(n, 1)
    if n and len(parts) != n:
        raise ValueError(f"dose {dose!r} has {len(parts)} values for {n} components.")
    return parts


def scale_dose(dose: NDArray[np.floating], reference: float) -> NDArray[np.float64]:
    """Doses on the scale the model uses: `log2(dose / reference)`, 0 at the reference (the median training dose)."""
    return np.log2(np.maximum(np.asarray(dose, np.float64), 1e-12) / reference)


PERTURBATION, DOSE = "__perturbation", "__dose"
"""Columns of the tables of this package (the user's own keys may be anything)."""


def hashable(column: pd.Series) -> pd.Series:
    """Labels as text, lists of names as tuples."""
    if column.dtype != object or not column.map(lambda v: isinstance(v, list | tuple | set | np.ndarray)).any():
        return column.astype(str)
    return column.map(lambda v: tuple(map(str, v)) if isinstance(v, list | tuple | set | np.ndarray) else str(v))
