"""Leaving out training conditions where there are many: linear in their number, in bounded memory.

The covariance of two conditions depends on what was done (the *treatment*: components and doses) and on where (the
*place*: mean of the controls, context, state), and both repeat: a screen of 100,000 populations has a thousand of each.
So it is put together from small tables, and neighbours are searched among those that can be near.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from scperturbdiff.retrieval._search import Search
from scperturbdiff.retrieval._tables import Kriged, Near, Tables

if TYPE_CHECKING:
    from collections.abc import Iterator

    import numpy as np
    from numpy.typing import NDArray

    from scperturbdiff.retrieval._conditions import Conditions, Floats, Novelty
    from scperturbdiff.retrieval._kernel import ResponseKernel

BATCH = {"cpu": 16, "cuda": 1024}
"""Systems that are solved together: what fits into the cache, and what fills a GPU (2 GB)."""


def leave_out_many(
    kernel: ResponseKernel,
    known: Conditions,
    noise: Floats,
    rows: NDArray[np.int64],
    novelty: Novelty,
    leave: bool,
    n_neighbors: int,
    device: torch.device | str = "cpu",
) -> Iterator[Kriged]:
    """Training conditions `rows` as if each were new, some at a time, in no order; their neighbours and weights.

    Those of a search among all, to rounding; which of conditions that are equally near are taken may differ.

    Parameters
    ----------
    kernel
        Covariance of responses.
    known
        Training conditions.
    noise
        Variance of their measurements in units of the kernel, the nugget included, `(n,)`.
    rows
        Which of them are left out in turn, `(q,)`.
    novelty
        In which way they are new: what they may not use, see :meth:`Conditions.excluded`.
    leave
        Whether they may not use their own population either.
    n_neighbors
        Training conditions that each uses at most.
    device
        Where systems are solved, in double precision; the CPU for devices without it.
    """
    there = torch.device(device)
    there = there if there.type in BATCH else torch.device("cpu")
    tables, batch = Tables(kernel, known, noise, there), BATCH[there.type]
    waiting: list[Near] = []
    for found in Search(tables, novelty, leave, min(n_neighbors, len(known))).of(rows):
        waiting.append(found)
        if sum(len(part.asked) for part in waiting) >= batch:
            whole = Near.join(waiting)
            ready = len(whole.asked) // batch * batch
            for start in range(0, ready, batch):
                yield tables.solve(whole.take(slice(start, start + batch)))
            waiting = [whole.take(slice(ready, None))]
    if sum(len(part.asked) for part in waiting):
        yield tables.solve(Near.join(waiting))
