"""How the counts of training populations respond: library sizes, and what the decoder misses of each gene."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from scipy import sparse

from scperturbdiff.data.counts import iter_rows

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from scperturbdiff.data.populations import Ragged
    from scperturbdiff.data.table import PopulationTable
    from scperturbdiff.module.joint import PerturbDiffModule

PRIOR_COUNTS = 5.0
"""Shape and rate of the gamma prior of the ratio of measured to decoded counts of a gene in a population."""
CHUNK = 2048


class CountResponse(NamedTuple):
    """Log ratios of `n` populations to their controls.

    Of mean library sizes `(n,)`, and of measured to decoded counts of each gene `(n, n_genes)`.
    """

    libraries: NDArray[np.float64]
    residuals: NDArray[np.float16]


@torch.no_grad()
def count_response(
    module: PerturbDiffModule,
    matrix: Any,
    batch: NDArray[np.integer],
    latent: torch.Tensor,
    table: PopulationTable,
) -> CountResponse:
    r"""Library sizes and decoder residuals of populations, against those of their controls.

    For a gene of which a population has :math:`o` counts where the decoder expects :math:`e`, the ratio is
    :math:`(o + a) / (e + a)`, its mean under a gamma prior with shape and rate :math:`a` (:data:`PRIOR_COUNTS`).

    Parameters
    ----------
    module
        With the trained VAE, in evaluation mode.
    matrix
        Counts, `(n_cells, n_genes)`, in memory or backed.
    batch
        Batch codes, `(n_cells,)`.
    latent
        Standardised latent vectors, `(n_cells, n_latent)`.
    table
        Populations.
    """
    n_pools = len(table.match.pools)
    groups = sparse.vstack([_members(table.match.pools, len(latent)), _members(table.cells, len(latent))], format="csc")
    measured, decoded = (np.zeros((groups.shape[0], matrix.shape[1]), np.float32) for _ in range(2))
    start = 0
    for block in iter_rows(matrix, chunk=CHUNK):
        counts = np.asarray(block.toarray() if sparse.issparse(block) else block, np.float32)
        rows = slice(start, start + len(counts))
        start += len(counts)
        part = groups[:, rows].tocsr()
        there = np.flatnonzero(np.diff(part.indptr))
        if not len(there):
            continue
        codes = torch.as_tensor(batch[rows], device=latent.device)
        share = module.vae.decode_frequencies(module.unstandardize(latent[rows]), codes).cpu().numpy()
        part = part[there]
        measured[there] += part @ counts
        decoded[there] += part @ (share * counts.sum(1, keepdims=True))
    ratio = np.log((measured + PRIOR_COUNTS) / (decoded + PRIOR_COUNTS))
    size = np.concatenate([table.match.pools.count, table.cells.count])
    library = np.log(np.maximum(measured.sum(1, dtype=np.float64), 1) / np.maximum(size, 1))

    def against_controls(values: NDArray[Any]) -> NDArray[Any]:
        return values[n_pools:] - values[:n_pools][table.match.pool]

    return CountResponse(against_controls(library), against_controls(ratio).astype(np.float16))


def _members(groups: Ragged, n_cells: int) -> sparse.csr_matrix:
    """Which cells each group holds, `(n_groups, n_cells)`."""
    row = np.repeat(np.arange(len(groups)), groups.count)
    return sparse.csr_matrix((np.ones(len(row), np.float32), (row, groups.rows)), (len(groups), n_cells))
