"""Expression of cells as the VAE decodes it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import numpy as np
import pandas as pd
import torch

from scperturbdiff.arguments import check_int, check_number
from scperturbdiff.data import check_layer, check_obs_key, gene_positions, read_genes
from scperturbdiff.prediction._batches import batch_codes
from scperturbdiff.seeds import seeded, stream

if TYPE_CHECKING:
    from collections.abc import Sequence

    from anndata import AnnData
    from numpy.typing import NDArray

    from scperturbdiff.module import PerturbDiffModule


def decode_cells(
    module: PerturbDiffModule,
    cells: AnnData,
    genes: Sequence[str],
    layer: str | None,
    rows: NDArray[np.int64],
    *,
    wanted: Sequence[str] | None,
    batches: Sequence[str],
    batch_key: str | None,
    transform_batch: str | int | None,
    library_size: float | Literal["latent"],
    n_samples: int,
    return_mean: bool,
    batch_size: int,
    seed: int,
) -> tuple[NDArray[np.float32], pd.Index]:
    """Decoded shares of genes in the counts of `rows` of `cells`, times a library size, read in blocks.

    Parameters
    ----------
    genes, wanted
        The model's genes, in order, and those that are returned; `None`: all.
    batches, batch_key, transform_batch
        Batches that the decoder knows, in order of their codes; the column of `obs` that names them; what to decode all
        cells as.
    library_size, n_samples, return_mean, batch_size, seed
        See :meth:`~scperturbdiff.PerturbDiff.get_normalized_expression`.

    Returns
    -------
    Values `(n_samples, n_cells, n_genes)`, a single sample where they are averaged, and the names of the genes.
    """
    check_int("n_samples", n_samples, 1)
    if library_size != "latent":
        check_number("library_size", library_size, "(0, inf)")
    check_int("batch_size", batch_size, 1)
    known = pd.Index(genes)
    names = known if wanted is None else pd.Index(wanted)
    columns = gene_positions(known, names, "model")
    check_layer(cells, layer, rows)

    def own() -> pd.Series:
        check_obs_key(cells, str(batch_key), "batch_key")
        return cells.obs[batch_key].iloc[rows]

    batch = batch_codes(len(rows), own, batches, batch_key, transform_batch)
    noise = torch.randn(n_samples, len(rows), len(module.latent_mean), generator=stream(seed))
    vae, device = module.eval().vae, module.device
    found = [np.empty((1 if return_mean else n_samples, 0, len(names)), np.float32)]
    with torch.no_grad(), seeded(seed, device):  # the encoder draws as well, of which nothing is used
        for i in range(0, len(rows), batch_size):
            counts = torch.as_tensor(read_genes(cells, known, layer, rows[i : i + batch_size]).toarray(), device=device)
            codes = torch.as_tensor(batch[i : i + batch_size], device=device)
            posterior = vae.inference(counts, codes[:, None])["qz"]
            latent = posterior.loc + posterior.scale * noise[:, i : i + batch_size].to(device)
            shares = vae.decode_frequencies(latent.flatten(0, 1), codes.repeat(n_samples))
            scale = counts.sum(1, keepdim=True) if library_size == "latent" else float(library_size)
            values = (shares.unflatten(0, latent.shape[:2])[..., columns] * scale).cpu().numpy()
            found.append(values.mean(0, keepdims=True) if return_mean else values)
    return np.concatenate(found, axis=1), names
