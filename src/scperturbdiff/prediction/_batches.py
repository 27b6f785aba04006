"""Which batch cells are decoded as."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from scperturbdiff.data import preview

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from numpy.typing import NDArray


def batch_codes(
    n: int,
    own: Callable[[], pd.Series],
    batches: Sequence[str],
    batch_key: str | None,
    transform_batch: str | int | None,
) -> NDArray[np.int64]:
    """Codes of the batches that cells, or populations, are decoded as: their own, or one for all.

    Parameters
    ----------
    n
        How many.
    own
        Gives the batch of each, where it is asked for.
    batches
        Batch names the decoder knows, in order of their codes.
    batch_key
        Column of `obs` that names them; `None`: the model has no batches.
    transform_batch
        Decode all as if they came from this batch.

    Raises
    ------
    ValueError
        If a batch is not known.
    """
    if batch_key is None:
        if transform_batch is not None:
            raise ValueError(f"transform_batch={transform_batch!r}, but the model was set up without batch_key.")
        return np.zeros(n, np.int64)
    known = pd.Index(batches)
    if transform_batch is not None:
        if str(transform_batch) not in known:
            raise ValueError(f"transform_batch={transform_batch!r} is not one of the training batches {list(batches)}.")
        return np.full(n, known.get_loc(str(transform_batch)), np.int64)
    names = pd.Index(own().astype(str))
    codes: NDArray[np.int64] = known.get_indexer(names)
    if (codes < 0).any():
        raise ValueError(
            f"obs[{batch_key!r}] has batches never seen in training: {preview(names[codes < 0].unique())}. Known: "
            f"{preview(batches)}. Pass transform_batch=... to decode as one of these, or adapt the model with "
            "load_query_data."
        )
    return codes
