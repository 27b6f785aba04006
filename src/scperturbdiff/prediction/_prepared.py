"""A request that is checked and ready, and what its cells are called."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from scperturbdiff.data import (
    CONTROL_CELL,
    POPULATION,
    STATE,
    cells_wanted,
    check_layer,
    check_not_empty,
    check_unique_names,
    gene_positions,
    get_matrix,
    matrix_name,
    read_genes,
    text_as_categories,
)
from scperturbdiff.memory import check_memory
from scperturbdiff.prediction._generate import PopulationGenerator
from scperturbdiff.prediction._request import plan_request, read_controls, read_wanted, tell_of_request

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from anndata import AnnData

    from scperturbdiff.data import ConditionSpace
    from scperturbdiff.module import PerturbDiffModule
    from scperturbdiff.prediction._pieces import Piece, Settings
    from scperturbdiff.prediction._request import PopulationRequest


BYTES_PER_ENTRY = 28
"""Memory of a count of a predicted cell, with its copies."""
SOME_CONTROLS = 1000
"""Control cells that are looked at to tell how many counts predicted cells will have."""


@dataclass(frozen=True)
class PreparedRequest:
    """A request, checked and ready to be generated.

    Attributes
    ----------
    space
        The model's conditions, with the features of this call.
    controls
        AnnData with the control cells.
    genes
        Names of the model's genes, in order.
    request
        What is wanted.
    generator
        Generates it.
    report
        Summary of what training found.
    few_controls
        Names of groups of few control cells.
    """

    space: ConditionSpace
    controls: AnnData
    genes: list[str]
    request: PopulationRequest
    generator: PopulationGenerator
    report: dict[str, Any]
    few_controls: list[str]

    def annotate(self, pieces: Iterable[Piece]) -> pd.DataFrame:
        """The `obs` of the cells of `pieces`."""
        pieces = list(pieces)
        row = [piece.population for piece in pieces]
        space, request = self.space, self.request
        of_pieces: dict[str, Any] = {str(space.perturbation_key): pd.Series(request.label, dtype=object).iloc[row]}
        if space.dose_key is not None:
            of_pieces[space.dose_key] = pd.Series(request.dose).iloc[row]
        of_pieces |= {key: request.table[key].iloc[row] for key in space.obs_keys}
        of_pieces[POPULATION] = pd.Series([str(piece.draw) for piece in pieces], dtype=object)
        table = text_as_categories(pd.DataFrame({key: column.array for key, column in of_pieces.items()}))
        of_cells = np.repeat(np.arange(len(pieces)), [len(piece.rows) for piece in pieces])
        obs = table.iloc[of_cells].reset_index(drop=True)
        used, code = np.unique(np.concatenate([piece.rows for piece in pieces]), return_inverse=True)
        controls = pd.Series(pd.Categorical(self.controls.obs_names[used]).take(code))
        obs.insert(len(obs.columns) - 1, CONTROL_CELL, controls)
        if STATE not in obs and all(piece.state is not None for piece in pieces):
            found, code = np.unique(np.concatenate([np.asarray(piece.state) for piece in pieces]), return_inverse=True)
            obs[STATE] = pd.Categorical((found + 1).astype(str).astype(object)).take(code)
        return obs

    def asked(self) -> pd.DataFrame:
        """One row per population asked for: what it is."""
        request, space = self.request, self.space
        table = pd.DataFrame({str(space.perturbation_key): request.label})
        if space.dose_key is not None:
            table[space.dose_key] = [str(dose) for dose in request.dose]
        for key in space.obs_keys:
            table[key] = request.table[key].to_numpy()
        return table

    def check_room(self, kept: int, counts: bool) -> None:
        """Raise a `ValueError` where cells would need more memory than there is.

        Parameters
        ----------
        kept
            Bytes that are kept of each cell, at least.
        counts
            Whether its counts and expression are kept, too.
        """
        controls, n_draws = self.generator.groups.cells.rows, self.generator.settings.n_populations or 1
        n_cells = n_draws * sum(self.request.n_cells)
        remedy = "Lower n_cells or n_populations, or ask for fewer at a time."
        if counts:
            some = np.sort(controls[:: -(-len(controls) // SOME_CONTROLS)])
            entries = read_genes(self.controls, self.genes, self.generator.layer, some).nnz / len(some)
            kept += round(BYTES_PER_ENTRY * entries)
            remedy += " Or write them to a file: output=..."
        check_memory(n_cells * kept, f"{n_cells:,} cells", remedy)

    def conditions(self) -> pd.DataFrame:
        """One row per population asked for: what it is, and what training knows of it."""
        request, table = self.request, self.asked()
        table["n_cells"] = request.n_cells
        table["n_controls"] = self.generator.groups.cells.count[request.group]
        evidence = [self.generator.evidence[i] for i in range(len(request))]
        table["novelty"], table["unexplained_variance"] = map(list, zip(*evidence, strict=True))
        table.index = table.index.astype(str)
        return table

    def made_by(self) -> dict[str, Any]:
        """What is kept in `uns` of the cells."""
        settings, space, request = self.generator.settings, self.space, self.request
        outside = {
            f"{label} at {dose}"
            for label, dose, row in zip(request.label, request.dose, request.table.itertuples(index=False), strict=True)
            if space.outside_dose_range(row[0], row[1])
        }
        keys = {
            "perturbation": str(space.perturbation_key),
            "control": str(space.control),
            "context": list(space.context_keys),
            "covariates": list(space.covariate_keys),
        }
        keys |= {k: v for k, v in (("dose", space.dose_key), ("batch", space.batch_key)) if v is not None}
        return {
            "model": "PerturbDiff",
            "seed": settings.seed,
            "n_steps": self.generator.module.generator_ema.n_evaluations(settings.n_steps),
            "sampler": settings.sampler,
            "guidance": settings.guidance,
            "keys": keys,
            "doses_outside_training": sorted(outside),
            "few_controls": self.few_controls,
            "predicted_as_controls": [self.generator.unchanged[i] for i in sorted(self.generator.unchanged)],
            "conditions": self.conditions(),
            "training": self.report,
        }


def prepare(
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
    transform_batch: str | int | None,
    report: dict[str, Any] | None = None,
) -> PreparedRequest:
    """Check a request against the control cells and the model; see :meth:`scperturbdiff.PerturbDiff.predict`."""
    if space.perturbation_key is None:
        raise ValueError(
            "The model was set up without perturbation_key and knows unperturbed cells only. Adapt it to perturbed "
            "cells with PerturbDiff.load_query_data."
        )
    check_unique_names(adata)
    gene_positions(adata.var_names, genes)
    cells_wanted(n_cells, 1)  # raises before anything is read, also where the table has numbers of its own
    wanted = read_wanted(space, perturbations)
    check_not_empty(get_matrix(adata, layer), matrix_name(layer))
    groups = read_controls(space, adata, wanted)
    # of the controls only: they may be few among the cells of a large file
    check_layer(adata, layer, np.sort(groups.cells.rows), sample=True)
    request = plan_request(space, wanted, groups, n_cells)
    few = tell_of_request(space, request, groups)
    generator = PopulationGenerator(
        module, space, adata, pd.Index(genes), layer, list(batches), groups, settings, transform_batch=transform_batch
    )
    return PreparedRequest(space, adata, list(genes), request, generator, report or {}, few)
