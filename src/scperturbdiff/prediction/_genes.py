"""How much each gene responds: fold changes of predicted and observed cells against their matched controls."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
from scipy import sparse

from scperturbdiff.arguments import check_flag, check_number
from scperturbdiff.data import (
    DOSE,
    PERTURBATION,
    check_layer,
    gene_column,
    gene_positions,
    get_matrix,
    group_rows,
    grouped_sums,
    match_controls,
    member_weights,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    from anndata import AnnData
    from numpy.typing import NDArray

    from scperturbdiff.data import ConditionSpace
    from scperturbdiff.prediction._prepared import PreparedRequest

    Floats = NDArray[np.float64]


def normalised_means(
    adata: AnnData, genes: Sequence[str], layer: str | None, weights: sparse.csr_matrix, target_sum: float
) -> Floats:
    """Means of counts per `target_sum`, weighted by `weights` `(n_means, n_cells)`, `(n_means, n_genes)`."""
    columns = gene_positions(adata.var_names, genes)

    def normalised(counts: sparse.csr_matrix, rows: NDArray[np.intp]) -> tuple[sparse.csr_matrix]:
        return (_normalise(counts, target_sum),)

    (total,) = grouped_sums(get_matrix(adata, layer), weights, normalised, columns=columns)
    return total / np.asarray(weights.sum(axis=1)).reshape(-1, 1)


def _normalise(counts: sparse.csr_matrix, target_sum: float) -> sparse.csr_matrix:
    """Counts per `target_sum` of each cell; cells without counts stay 0."""
    library = np.asarray(counts.sum(axis=1)).ravel()
    scale = np.divide(target_sum, library, out=np.zeros_like(library, dtype=np.float64), where=library > 0)
    return sparse.diags(scale) @ counts.astype(np.float64)


def response_table(
    prepared: PreparedRequest,
    *,
    layer: str | None,
    real: AnnData | None,
    real_layer: str | None,
    pseudocount: float,
    target_sum: float,
    progress: bool,
) -> pd.DataFrame:
    """Log2 fold change of every gene in every condition; see :meth:`scperturbdiff.PerturbDiff.response`."""
    check_number("pseudocount", pseudocount, "(0, inf)")
    check_number("target_sum", target_sum, "(0, inf)")
    check_flag("progress", progress)
    prepared.check_room(48, counts=False)  # which control cells they start from
    space, request = prepared.space, prepared.request
    # batches are pooled
    shared = dict.fromkeys((*space.context_keys, *space.covariate_keys))
    keys = [PERTURBATION, DOSE, *shared]
    conditions, code = group_rows(request.table.astype(dict.fromkeys(keys, str)), keys)
    predicted, control = _predicted_means(prepared, code, len(conditions), layer, target_sum, progress)
    first = np.unique(code, return_index=True)[1]
    shown = pd.DataFrame({str(space.perturbation_key): [request.label[i] for i in first]})
    if space.dose_key is not None:
        shown[space.dose_key] = [request.dose[i] for i in first]
    for key in keys[2:]:
        shown[key] = request.table[key].iloc[first].to_numpy()
    values = {
        "control_mean": control,
        "predicted_mean": predicted,
        "log2_fold_change": np.log2((predicted + pseudocount) / (control + pseudocount)),
    }
    n_observed = np.zeros(len(conditions), np.int64)
    observed = observed_control = np.full_like(predicted, np.nan)
    if real is not None:
        observed, observed_control, n_observed = _observed_means(
            space, conditions, keys, real, prepared.genes, real_layer, target_sum
        )
    values["observed_mean"] = observed
    values["observed_log2_fold_change"] = np.log2((observed + pseudocount) / (observed_control + pseudocount))
    return _tidy(shown, prepared.genes, values, n_observed)


def _tidy(shown: pd.DataFrame, genes: Sequence[str], values: dict[str, Floats], n_observed: NDArray) -> pd.DataFrame:
    row = np.repeat(np.arange(len(shown)), len(genes))
    out = shown.iloc[row].reset_index(drop=True)
    out[gene_column(map(str, shown))] = pd.Categorical(
        np.tile(np.asarray(genes, dtype=object), len(shown)), categories=list(genes)
    )
    for name, table in values.items():
        out[name] = table.ravel()
    out["n_observed"] = n_observed[row]
    return out


def _predicted_means(
    prepared: PreparedRequest, code: NDArray[np.int64], n: int, layer: str | None, target_sum: float, progress: bool
) -> tuple[Floats, Floats]:
    """Means of generated cells, and of the control cells that they started from."""
    predicted = np.zeros((n, len(prepared.genes)))
    size = np.zeros(n)
    starts: list[NDArray[np.int64]] = []
    of: list[NDArray[np.int64]] = []
    for piece in prepared.generator.generate(prepared.request, progress):
        condition, cells = code[piece.population], piece.counts.shape[0]
        predicted[condition] += np.ones(cells) @ _normalise(piece.counts, target_sum)
        size[condition] += cells
        starts.append(piece.rows)
        of.append(np.full(cells, condition))
    rows, conditions = np.concatenate(starts), np.concatenate(of)
    weights = member_weights(conditions, rows, (n, prepared.controls.n_obs))
    control = normalised_means(prepared.controls, prepared.genes, layer, weights, target_sum)
    return predicted / size[:, None], control


def _observed_means(
    space: ConditionSpace,
    conditions: pd.DataFrame,
    keys: list[str],
    real: AnnData,
    genes: Sequence[str],
    layer: str | None,
    target_sum: float,
) -> tuple[Floats, Floats, NDArray[np.int64]]:
    """Means of the observed cells of `conditions` and of their matched controls; NaN where there are none."""
    if space.perturbation_key not in real.obs:
        raise KeyError(f"real.obs has no column {space.perturbation_key!r} with the perturbation of each cell.")
    labels = space.read_labels(real.obs)
    is_control = space.is_control(labels)
    text = labels.astype(dict.fromkeys(keys, str))
    number = pd.MultiIndex.from_frame(conditions[keys]).get_indexer(pd.MultiIndex.from_frame(text[keys]))
    treated = np.flatnonzero((number >= 0) & ~is_control)
    nothing = np.full((len(conditions), len(genes)), np.nan)
    if treated.size == 0:
        return nothing, nothing, np.zeros(len(conditions), np.int64)
    if not is_control.any():
        raise ValueError(f"real has no control cells (obs[{space.perturbation_key!r}] == {space.control!r}).")
    table, population = group_rows(labels.iloc[treated], [PERTURBATION, DOSE, *space.obs_keys])
    controls = np.flatnonzero(is_control)
    required = [key for key in space.context_keys if key in space.control_match_keys]
    match = match_controls(table, labels.iloc[controls], controls, space.control_match_keys, required)
    shape = (len(conditions), real.n_obs)
    check_layer(real, layer, np.sort(np.concatenate([treated, controls])), "real")
    cells = member_weights(number[treated], treated, shape)
    n_cells = np.asarray(cells.sum(axis=1)).ravel().astype(np.int64)
    of_population = np.zeros((len(conditions), len(table)))
    np.add.at(of_population, (number[treated], population), 1.0)
    pools = match.groups
    members = member_weights(np.repeat(np.arange(len(pools)), pools.count), pools.rows, (len(pools), real.n_obs))
    matched = sparse.csr_matrix(of_population) @ (sparse.diags(1 / pools.count) @ members)[match.group]
    found = n_cells > 0
    observed, control = nothing.copy(), nothing.copy()
    observed[found] = normalised_means(real, genes, layer, cells[found], target_sum)
    control[found] = normalised_means(real, genes, layer, sparse.csr_matrix(matched)[found], target_sum)
    return observed, control, n_cells
