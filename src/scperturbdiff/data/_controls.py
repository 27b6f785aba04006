"""Which control cells predicted cells start from."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from scperturbdiff.arguments import check_int

if TYPE_CHECKING:
    from numpy.typing import NDArray


N_CELLS = "n_cells"
"""Column of a table of wanted perturbations: cells per context and perturbation."""


MOST_CELLS = 10**9
"""Cells of one population in one context, at most."""


def cells_wanted(n: Any, default: int) -> int:
    """A number of cells as given in an argument or in a table, where it may be a whole float; missing: `default`."""
    if n is None or n is pd.NA or (isinstance(n, float) and np.isnan(n)):
        return default
    return check_int("n_cells", int(n) if isinstance(n, float) and n.is_integer() else n, 1, MOST_CELLS)


def choose_controls(n_controls: int, n_cells: int, rng: np.random.Generator) -> NDArray[np.intp]:
    """Positions of `n_cells` cells: every control equally often, the rest a random subset, all in random order."""
    rounds = [rng.permutation(n_controls) for _ in range(-(-n_cells // n_controls))]
    return np.concatenate(rounds)[:n_cells]


def resample_controls(n_controls: int, n_cells: int, rng: np.random.Generator) -> NDArray[np.intp]:
    """Positions of `n_cells` cells drawn with replacement from controls that are drawn with replacement themselves.

    So do cells of one experiment and controls of another differ. Else the means of populations would differ by less
    than those of replicates do from the controls at hand.
    """
    another = rng.integers(n_controls, size=n_controls)
    return another[rng.integers(n_controls, size=n_cells)]
