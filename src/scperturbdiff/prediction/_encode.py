"""Latent vectors of cells."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from scperturbdiff.data import CHUNK_ROWS, iter_rows, read_genes
from scperturbdiff.prediction._finite import check_finite

if TYPE_CHECKING:
    from collections.abc import Sequence

    from anndata import AnnData
    from numpy.typing import NDArray
    from scipy import sparse
    from torch import Tensor

    from scperturbdiff.module import PerturbDiffModule


ENCODE_CHUNK = 2048


def encode_rows(module: PerturbDiffModule, counts: sparse.csr_matrix) -> Tensor:
    """Latent vectors (posterior means, not standardised) of counts `(n_cells, n_genes)`, on the module's device."""
    if not counts.shape[0]:
        return torch.empty(0, len(module.latent_mean), device=module.device)
    return check_finite(module.encode(iter_rows(counts, chunk=ENCODE_CHUNK)), "Latent vectors")


def encode_cells(
    module: PerturbDiffModule,
    adata: AnnData,
    genes: Sequence[str],
    layer: str | None,
    rows: NDArray[np.int64] | None = None,
) -> NDArray[np.float32]:
    """Latent vectors `(n_cells, n_latent)` of rows of an AnnData, read in blocks, in memory of the processor."""
    rows = np.arange(adata.n_obs) if rows is None else rows
    found = [
        encode_rows(module, read_genes(adata, genes, layer, rows[i : i + CHUNK_ROWS], counts=True)).cpu().numpy()
        for i in range(0, max(len(rows), 1), CHUNK_ROWS)
    ]
    return np.concatenate(found)
