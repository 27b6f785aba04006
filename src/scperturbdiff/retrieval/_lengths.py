"""Lengths of shifts: averages of shifts that point in different directions are too short."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from scperturbdiff.retrieval._conditions import Floats


@dataclass(frozen=True)
class Lengths:
    """How long shifts predicted for left-out training conditions were, and how long they should have been.

    Attributes
    ----------
    rows
        Training conditions, `(n,)`.
    explained
        Products of predicted and measured shift, `(n,)`.
    predicted
        Squares of the predicted shift, `(n,)`.
    """

    rows: NDArray[np.int64]
    explained: Floats
    predicted: Floats

    def factor(self, near: NDArray[np.int64], weights: Floats, noise: Floats, bounds: tuple[float, float]) -> Floats:
        """Factor on the length of predictions, `(q,)`.

        Parameters
        ----------
        near, weights
            Training conditions in each prediction and their absolute weights, `(q, k)`.
        noise
            Squared length of the sampling noise of each training shift, `(n_train,)`: decides how much evidence there
            must be.
        bounds
            Least and largest factor.
        """
        order = np.argsort(self.rows)
        at = order[np.minimum(np.searchsorted(self.rows, near, sorter=order), len(order) - 1)]
        weight = np.zeros((len(near), len(order)))
        np.add.at(weight, (np.arange(len(near))[:, None], at), np.where(self.rows[at] == near, weights, 0.0))
        doubt = weight @ noise[self.rows] + 1e-12
        return np.clip((weight @ self.explained + doubt) / (weight @ self.predicted + doubt), *bounds)


def real_share(shift: Floats, noise: Floats) -> Floats:
    """How far shifts `(q, n_latent)` are kept, `(q,)`: whole, unless sampling noise may be more than half of them.

    `noise` is their variance per dimension, `(q,)`. The share that is not noise (positive-part James-Stein) is doubled:
    noise lies in all dimensions, a response in few, which should not be made shorter for it.
    """
    share: Floats = 1 - noise / np.maximum((shift**2).mean(1), 1e-12)
    return np.clip(2 * share, 0, 1)
