"""From AnnData to populations: counts, labels, conditions, control cells."""

from scperturbdiff.data._annotation import check_plain, look_alikes
from scperturbdiff.data._conditions import ConditionSpace, read_numbers
from scperturbdiff.data._controls import N_CELLS, cells_wanted, choose_controls, resample_controls
from scperturbdiff.data._counts import (
    check_counts,
    check_layer,
    check_not_empty,
    check_unique_names,
    gene_positions,
    get_matrix,
    iter_counts,
    log_normalize,
    matrix_name,
    read_genes,
    read_indices,
)
from scperturbdiff.data._features import FeatureTable, explain_unknown
from scperturbdiff.data._groups import Groups, add_to_groups, group_rows, grouped_sums, member_weights
from scperturbdiff.data._labels import (
    DOSE,
    PERTURBATION,
    Labels,
    check_not_missing,
    context_name,
    dose_text,
    match_doses,
    parse_doses,
    read_contexts,
    read_doses,
    read_text,
    value_text,
)
from scperturbdiff.data._messages import check_obs_key, check_obs_keys, closest, did_you_mean, preview
from scperturbdiff.data._mudata import as_anndata, check_cells, rna_view
from scperturbdiff.data._output import (
    CONTROL_CELL,
    COUNTS,
    FAR,
    FEW_CELLS,
    POPULATION,
    STATE,
    UNS,
    assemble_cells,
    gene_column,
    text_as_categories,
)
from scperturbdiff.data._populations import PopulationTable, build_populations, match_controls
from scperturbdiff.data._reader import CountReader
from scperturbdiff.data._rows import CHUNK_ROWS, iter_rows
from scperturbdiff.data._setup import (
    CONDITIONS,
    check_genes,
    read_space,
    stored_batches,
    stored_genes,
    stored_layer,
    stored_space,
)
from scperturbdiff.data._store import open_store

__all__ = [
    "CHUNK_ROWS", "CONDITIONS", "CONTROL_CELL", "COUNTS", "ConditionSpace", "CountReader", "DOSE", "FAR",
    "FEW_CELLS", "FeatureTable", "Groups", "Labels", "N_CELLS", "PERTURBATION", "POPULATION", "PopulationTable",
    "STATE", "UNS", "add_to_groups", "as_anndata", "assemble_cells", "build_populations", "cells_wanted",
    "check_cells", "check_counts", "check_genes", "check_layer", "check_not_empty",
    "check_not_missing", "check_obs_key", "check_obs_keys", "check_plain", "check_unique_names", "choose_controls",
    "closest", "context_name", "did_you_mean", "dose_text", "explain_unknown", "gene_column", "gene_positions",
    "get_matrix", "group_rows", "grouped_sums", "iter_counts", "iter_rows", "log_normalize", "look_alikes",
    "match_controls", "match_doses", "matrix_name", "member_weights", "open_store", "parse_doses", "preview",
    "read_contexts", "read_doses", "read_genes", "read_indices", "read_numbers", "read_space", "read_text",
    "resample_controls", "rna_view", "stored_batches", "stored_genes", "stored_layer", "stored_space",
    "text_as_categories", "value_text",
]  # fmt: skip
