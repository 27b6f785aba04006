"""Prediction from end to end: request, generation, output."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from scipy import sparse

from scperturbdiff.data.counts import check_counts, check_unique_names, gene_positions, get_matrix
from scperturbdiff.data.output import assemble_cells
from scperturbdiff.prediction.generate import PopulationGenerator, Settings
from scperturbdiff.prediction.request import plan_request, read_controls, read_wanted

if TYPE_CHECKING:
    from collections.abc import Sequence

    from anndata import AnnData

    from scperturbdiff.data.conditions import ConditionSpace
    from scperturbdiff.module import PerturbDiffModule


def predict_cells(
    module: PerturbDiffModule,
    space: ConditionSpace,
    adata: AnnData,
    perturbations: Any,
    *,
    genes: Sequence[str],
    batches: Sequence[str],
    layer: str | None,
    n_cells: int | None,
    settings: Settings,
    transform_batch: str | None,
    target_sum: float,
    progress: bool,
) -> AnnData:
    """Predicted cells; see :meth:`scperturbdiff.PerturbDiff.predict`."""
    check_unique_names(adata)
    gene_positions(adata.var_names, genes)
    check_counts(get_matrix(adata, layer), "adata.X" if layer is None else f"adata.layers[{layer!r}]")
    if settings.n_populations < 1:
        raise ValueError(f"n_populations={settings.n_populations} must be at least 1.")
    if n_cells is not None and n_cells < 1:
        raise ValueError(f"n_cells={n_cells} must be at least 1.")
    wanted = read_wanted(space, perturbations)
    covariates = [key for key in (*space.categorical_keys, *space.continuous_keys) if key in wanted]
    groups = read_controls(space, adata, covariates)
    request = plan_request(space, wanted, groups, n_cells)
    generator = PopulationGenerator(
        module, space, adata, pd.Index(genes), layer, list(batches), groups, settings, transform_batch=transform_batch
    )
    pieces = list(generator.generate(request, progress))
    outside = [
        f"{label} at {dose}"
        for label, dose, row in zip(request.label, request.dose, request.table.itertuples(index=False), strict=True)
        if space.outside_dose_range(row[0], row[1])
    ]
    made_by = {
        "model": "PerturbDiff",
        "seed": settings.seed,
        "n_steps": settings.n_steps,
        "sampler": settings.sampler,
        "guidance": settings.guidance,
        "doses_outside_training": sorted(set(outside)),
    }
    return assemble_cells(
        sparse.vstack([piece.counts for piece in pieces], format="csr"),
        pd.concat([piece.obs for piece in pieces], ignore_index=True),
        adata.var.loc[list(genes)],
        latent=np.concatenate([piece.latent for piece in pieces]),
        target_sum=target_sum,
        made_by=made_by,
    )
