"""From AnnData to populations: counts, labels, conditions, control cells."""

from scperturbdiff.data._conditions import ConditionSpace, read_numbers
from scperturbdiff.data._controls import N_CELLS, ControlPool, cells_wanted
from scperturbdiff.data._counts import (
    CHUNK_ROWS,
    check_counts,
    check_layer,
    check_not_empty,
    check_unique_names,
    gene_positions,
    get_matrix,
    iter_rows,
    log_normalize,
    matrix_name,
    read_genes,
)
from scperturbdiff.data._features import FeatureTable, explain_unknown
from scperturbdiff.data._groups import Ragged, group_rows
from scperturbdiff.data._labels import DOSE, PERTURBATION, canonical_label, split_label
from scperturbdiff.data._messages import check_obs_key, closest, preview
from scperturbdiff.data._mudata import as_anndata, rna_view
from scperturbdiff.data._output import CONTROL_CELL, COUNTS, POPULATION, UNS, assemble_cells
from scperturbdiff.data._populations import PopulationTable, build_populations, match_controls
from scperturbdiff.data._setup import (
    CONDITIONS,
    check_genes,
    read_space,
    stored_batches,
    stored_genes,
    stored_layer,
    stored_space,
)

__all__ = [
    "CHUNK_ROWS",
    "CONDITIONS",
    "CONTROL_CELL",
    "COUNTS",
    "ConditionSpace",
    "ControlPool",
    "DOSE",
    "FeatureTable",
    "N_CELLS",
    "PERTURBATION",
    "POPULATION",
    "PopulationTable",
    "Ragged",
    "UNS",
    "as_anndata",
    "assemble_cells",
    "build_populations",
    "canonical_label",
    "cells_wanted",
    "check_counts",
    "check_genes",
    "check_layer",
    "check_not_empty",
    "check_obs_key",
    "check_unique_names",
    "closest",
    "explain_unknown",
    "gene_positions",
    "get_matrix",
    "group_rows",
    "iter_rows",
    "log_normalize",
    "match_controls",
    "matrix_name",
    "preview",
    "read_genes",
    "read_numbers",
    "read_space",
    "rna_view",
    "split_label",
    "stored_batches",
    "stored_genes",
    "stored_layer",
    "stored_space",
]
