"""Whether cells that are scored were trained on."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from scipy import sparse

from scperturbdiff.data import gene_positions, get_matrix, iter_rows, preview
from scperturbdiff.evaluation.splits import code_weights, row_codes

if TYPE_CHECKING:
    from collections.abc import Mapping

    from anndata import AnnData
    from numpy.typing import NDArray

    from scperturbdiff.evaluation.metrics._inputs import Condition, Keys

ENOUGH = 50
"""Counts of a cell from which on equal counts of two cells are no chance; below, their names must agree, too."""


def check_overlap(
    train: AnnData, real: AnnData, scored: Mapping[Condition, NDArray[np.intp]], keys: Keys, layer: str | None
) -> None:
    """Raise a `ValueError` if real cells that are scored are among the treated cells of `train`.

    Cells are the same where their counts agree gene by gene, and their names do or they have 50 counts at least.
    Control cells may be in both: every prediction starts from them.
    """
    rows = np.unique(np.concatenate(list(scored.values())))
    known, columns = np.arange(train.n_obs), {keys.labels.key, keys.labels.dose_key or keys.labels.key}
    if columns <= set(train.obs) and keys.labels.control is not None:
        known = np.flatnonzero(~keys.labels.control_cells(train.obs))
    if not known.size:
        return
    codes, totals = _codes(real, rows, np.arange(real.n_vars), layer)
    train_codes, _ = _codes(train, known, gene_positions(train.var_names, real.var_names, "train"), layer)
    twin = np.isin(codes, train_codes)
    if not twin.any():
        return
    named = real.obs_names[rows].isin(train.obs_names[known])
    same = rows[twin & (named | (totals >= ENOUGH))]
    if same.size:
        raise ValueError(
            f"{same.size} of the {rows.size} real cells to score are among the treated cells of train "
            f"({preview(real.obs_names[same], 5)}): rules and models have seen the answer. Hold cells out first, e.g. "
            "split = spd.splits.hold_out_pairs(...), and pass train=adata[split.train]; or allow_overlap=True where "
            "the fit to training cells is what is asked."
        )


def _codes(
    adata: AnnData, rows: NDArray[np.intp], columns: NDArray[np.intp], layer: str | None
) -> tuple[NDArray[np.uint64], NDArray[Any]]:
    """A number for the counts of each row, and their sum."""
    weights = code_weights(len(columns))
    codes, totals = [], []
    for stored in iter_rows(get_matrix(adata, layer), rows):
        block = sparse.csr_matrix(stored)[:, columns]
        totals.append(np.asarray(block.sum(axis=1)).ravel())
        codes.append(row_codes(block, weights))
    return np.concatenate(codes), np.concatenate(totals)
