"""Signs of singular vectors."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray


def fix_signs(vectors: NDArray[np.floating]) -> NDArray[np.floating]:
    """Columns of `vectors`, shape `(n, k)`, with the sign at which their largest entry is positive.

    The sign of a singular vector is arbitrary, and differs between libraries. Entries that agree to six digits count
    as equally large, and the first of them decides.
    """
    size = np.abs(vectors)
    largest = (size >= (1 - 1e-6) * size.max(axis=0, keepdims=True)).argmax(axis=0)
    return np.where(vectors[largest, np.arange(vectors.shape[1])] < 0, -vectors, vectors)
