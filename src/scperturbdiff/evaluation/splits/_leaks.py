"""Look for what would let a model see the answer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from scipy import sparse

from scperturbdiff.data import get_matrix, iter_rows, preview
from scperturbdiff.evaluation.splits._split import Screen, Split, pair_name

if TYPE_CHECKING:
    from anndata import AnnData
    from numpy.typing import NDArray


def leak_report(split: Split, adata: AnnData, *, layer: str | None = None) -> pd.DataFrame:
    """State, check by check, whether training cells give the held-out cells away.

    Parameters
    ----------
    split
        Return value of a `hold_out_*` function, or the same with changed masks.
    adata
        The cells the split was made for, in the same order; another number of cells raises a `ValueError`.
    layer
        Layer with counts; `None` for X. Read in blocks of rows.

    Returns
    -------
    One row per check: `n` (what was found), `leak` (whether training gives test cells away), `detail`. Checks:

    * `shared_cells`: cells in both parts.
    * `held_out_condition_trained`: held-out conditions that have treated cells in training.
    * `held_out_label_trained`: held-out contexts, batches, components or combinations with treated cells in training.
    * `duplicated_names`: `obs_names` that occur in both parts.
    * `identical_counts`: test cells with the counts of a training cell; a few may be chance where cells are shallow.
    * `unseen_perturbations`, `unseen_contexts`, `no_controls`: no leaks, but what a model must cope with: components of
      test perturbations, and test contexts, without any training cell; test contexts without control cells.
    """
    if adata.n_obs != split.train.size:
        raise ValueError(f"adata has {adata.n_obs} cells, but the split was made for {split.train.size}.")
    screen = Screen(adata, split.perturbation_key, split.control, split.context_keys, split.batch_key, split.separator)
    train, test = split.train, split.test
    trained = train & ~screen.is_control
    both = screen.table[trained].drop_duplicates().merge(screen.table[test].drop_duplicates())
    shared = set(adata.obs_names[train & ~test]) & set(adata.obs_names[test])
    twins = _identical_rows(get_matrix(adata, layer), train, test)
    unseen = screen.components_of(test) - screen.components_of(trained)
    contexts, trained_contexts, with_controls = map(screen.contexts_of, (test, train, screen.is_control))
    rows = [
        ("shared_cells", np.flatnonzero(train & test).tolist(), True),
        ("held_out_condition_trained", sorted(map(", ".join, both.itertuples(index=False, name=None))), True),
        ("held_out_label_trained", _trained_labels(split, screen, trained), True),
        ("duplicated_names", sorted(shared), True),
        ("identical_counts", adata.obs_names[twins].tolist(), True),
        ("unseen_perturbations", sorted(unseen), False),
        ("unseen_contexts", sorted(contexts - trained_contexts), False),
        ("no_controls", sorted(contexts - with_controls), False),
    ]
    return pd.DataFrame(
        [(len(found), bool(found) and is_leak, preview(found)) for _, found, is_leak in rows],
        columns=["n", "leak", "detail"],
        index=pd.Index([name for name, _, _ in rows], name="check"),
    )


def _trained_labels(split: Split, screen: Screen, trained: NDArray[np.bool_]) -> list[str]:
    labels = set(split.labels)
    if split.kind == "contexts":
        present = screen.contexts_of(trained)
    elif split.kind == "batches":
        present = set(screen.table.loc[trained, screen.batch_key])
    elif split.kind == "perturbations":
        present = screen.components_of(trained)
    elif split.kind == "combinations":
        labels, present = set(map(screen.labels.canonical, labels)), set(screen.perturbation[trained])
    else:
        codes = set(screen.condition_code[trained])
        present = {pair_name(pair) for pair, code in screen.conditions.items() if code in codes}
    return sorted(labels & present)


def _identical_rows(matrix: Any, train: NDArray[np.bool_], test: NDArray[np.bool_]) -> NDArray[np.intp]:
    """Row numbers of test cells with the same entries as some training cell other than themselves."""
    weights = code_weights(matrix.shape[1])
    codes = np.concatenate([row_codes(sparse.csr_matrix(block), weights) for block in iter_rows(matrix)])
    tested = np.flatnonzero(test)
    return tested[np.isin(codes[tested], codes[train & ~test])]


def code_weights(n_genes: int) -> NDArray[np.uint64]:
    """One random number a gene for :func:`row_codes`, always the same ones."""
    return np.random.default_rng(0).integers(0, 2**63, n_genes, dtype=np.uint64)


def row_codes(block: sparse.csr_matrix, weights: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """One 64-bit number per row that does not depend on the order of its entries (sum of mixed entries)."""
    block.sum_duplicates()
    block.eliminate_zeros()
    mixed = block.data.astype(np.float64).view(np.uint64) ^ weights[block.indices]
    # The finalisation of splitmix64 (Steele et al. 2014, doi:10.1145/2660193.2660195).
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed ^= mixed >> np.uint64(31)
    total = np.concatenate([np.zeros(1, dtype=np.uint64), np.cumsum(mixed, dtype=np.uint64)])
    return total[block.indptr[1:]] - total[block.indptr[:-1]]
