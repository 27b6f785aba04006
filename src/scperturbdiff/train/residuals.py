"""What the decoder misses of the training populations."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

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


@torch.no_grad()
def decoder_residuals(
    module: PerturbDiffModule,
    matrix: Any,
    batch: NDArray[np.integer],
    latent: torch.Tensor,
    table: PopulationTable,
) -> NDArray[np.float16]:
    r"""Log ratio of measured to decoded counts of populations, less that of controls, `(n_populations, n_genes)`.

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
    residual: NDArray[np.float16] = (ratio[n_pools:] - ratio[:n_pools][table.match.pool]).astype(np.float16)
    return residual


def _members(groups: Ragged, n_cells: int) -> sparse.csr_matrix:
    """Which cells each group holds, `(n_groups, n_cells)`."""
    row = np.repeat(np.arange(len(groups)), groups.count)
    return sparse.csr_matrix((np.ones(len(row), np.float32), (row, groups.rows)), (len(groups), n_cells))
