"""Draw the cells of a simulated screen, in blocks of rows."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from scipy import sparse

from scperturbdiff.datasets._truth import ACTIVITY_SD, Contexts, Genes, Perturbations, response, saturation

if TYPE_CHECKING:
    import pandas as pd
    from numpy.typing import NDArray

BLOCK_ENTRIES = 1_000_000
"""Entries (cells x genes) that are dense at a time."""

LIBRARY_SD = 0.35
"""Standard deviation of the logarithm of a cell's library size."""
HIGH_MEAN = 4.0
"""Above this mean a count is drawn as gamma-Poisson, below it by inverting the distribution function."""


def draw_cells(
    rng: np.random.Generator,
    table: pd.DataFrame,
    genes: Genes,
    contexts: Contexts,
    effects: Perturbations,
    batch_effect: NDArray[np.float32],
    hidden: NDArray[np.float32],
    library_size: float,
    responds: NDArray[np.bool_],
) -> sparse.csr_matrix:
    """Counts of all cells of the populations in `table`, drawn in blocks of rows so that only a block is ever dense.

    Only cells that respond have the effect of the perturbation.
    """
    population = np.repeat(np.arange(len(table)), table["n_cells"])
    context, label, batch = (table[c].to_numpy()[population] for c in ("context", "label", "batch"))
    dose, factor = (table[c].to_numpy(dtype=np.float32)[population] for c in ("dose", "hidden_factor"))
    n_genes = len(genes.base)
    rows = max(1, BLOCK_ENTRIES // n_genes)
    values, columns = np.empty(0, dtype=np.int32), np.empty(0, dtype=np.int32)
    indptr = np.zeros(len(population) + 1, dtype=np.int64)
    used = 0
    for start in range(0, len(population), rows):
        at = slice(start, start + rows)
        log_rate, activity = _unperturbed(rng, context[at], genes, contexts)
        log_rate += batch_effect[batch[at]]
        if factor[at].any():
            log_rate += factor[at, None] * hidden
        treated = np.flatnonzero(responds[at])
        if treated.size:
            which = (context[at][treated], label[at][treated], dose[at][treated])
            log_rate[treated] += _effect(*which, activity[treated], contexts, effects)
        counts = _sample_counts(rng, log_rate, genes.dispersion, library_size)
        indptr[start + 1 : start + 1 + counts.shape[0]] = used + counts.indptr[1:]
        if used + counts.nnz > values.size:
            # Enough for the rest if blocks go on like this one; growing in place avoids a second copy of everything.
            size = used + int(1.05 * counts.nnz * max(1.0, (len(population) - start) / rows)) + 1
            values.resize(size, refcheck=False)
            columns.resize(size, refcheck=False)
        values[used : used + counts.nnz] = counts.data
        columns[used : used + counts.nnz] = counts.indices
        used += counts.nnz
    values.resize(used, refcheck=False)
    columns.resize(used, refcheck=False)
    if used < np.iinfo(np.int32).max:
        indptr = indptr.astype(np.int32)
    return sparse.csr_matrix((values, columns, indptr), shape=(len(population), n_genes))


def _unperturbed(
    rng: np.random.Generator, context: NDArray[np.int64], genes: Genes, contexts: Contexts
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Log rates of control cells, shape `(n_cells, n_genes)`, and their pathway activities."""
    n = len(context)
    n_states, n_pathways = contexts.usage.shape[1], contexts.activity.shape[1]
    scores = contexts.usage[context] * rng.standard_normal((n, n_states), dtype=np.float32)
    activity = contexts.activity[context] + ACTIVITY_SD * rng.standard_normal((n, n_pathways), dtype=np.float32)
    subtype = (rng.random(n) > contexts.fraction[context]).astype(np.int64)
    log_rate = np.hstack([scores, activity]) @ np.vstack([genes.states, genes.markers])
    log_rate += (contexts.base[:, None, :] + contexts.subtypes)[context, subtype]
    return log_rate, activity


def _effect(
    context: NDArray[np.int64],
    label: NDArray[np.int64],
    dose: NDArray[np.float32],
    activity: NDArray[np.float32],
    contexts: Contexts,
    effects: Perturbations,
) -> NDArray[np.float32]:
    """Change of the log rates of treated cells, shape `(n_cells, n_genes)`."""
    out = np.zeros((len(label), contexts.base.shape[1]), dtype=np.float32)
    pair = label - len(effects.programme)
    paired = np.flatnonzero(pair >= 0)
    components = np.column_stack([label, np.full_like(label, -1)])
    components[paired] = effects.pairs[pair[paired]]
    for part in components.T:
        rows = np.flatnonzero(part >= 0)
        component = part[rows]
        scale = effects.context_scale[context[rows], component]
        if not np.isnan(dose[rows]).any():
            scale = scale * saturation(dose[rows], effects.ec50[component])
        for k in range(effects.programme.shape[1]):
            strength = scale * response(activity[rows, effects.pathway[component, k]])
            out[rows] += strength.astype(np.float32)[:, None] * effects.programme[component, k]
    if effects.interaction.any():
        parts, rows = components[paired], paired
        # The mean strength of the context, not the cell's, so that the true effect has a closed form.
        both = effects.strength[context[rows, None], parts].mean(axis=-1)
        if not np.isnan(dose[rows]).any():
            both = both * saturation(dose[rows, None], effects.ec50[parts])
        out[rows] += np.sqrt(both.prod(axis=1)).astype(np.float32)[:, None] * effects.interaction[pair[rows]]
    out *= contexts.gene_response[context]
    return out


def _sample_counts(
    rng: np.random.Generator,
    log_rate: NDArray[np.float32],
    dispersion: NDArray[np.float32],
    library_size: float,
    library_sd: float = LIBRARY_SD,
) -> sparse.csr_matrix:
    """Negative binomial counts whose mean shares the cell's library size out by the rates."""
    log_rate -= log_rate.max(axis=1, keepdims=True)
    mean = np.exp(log_rate, out=log_rate)
    library = library_size * np.exp(library_sd * rng.standard_normal(len(mean), dtype=np.float32))
    mean *= (library / mean.sum(axis=1))[:, None]
    # Most entries are 0 and need one uniform number, not a gamma and a Poisson number.
    none = np.exp(-dispersion * np.log1p(mean / dispersion))
    uniform = rng.random(mean.shape, dtype=np.float32)
    high = mean > HIGH_MEAN
    at = np.flatnonzero((uniform > none) | high)
    gene = at % mean.shape[1]
    values = np.empty(at.size, dtype=np.int32)
    is_high = high.ravel()[at]
    shape = dispersion[gene[is_high]].astype(np.float64)
    values[is_high] = rng.poisson(mean.ravel()[at[is_high]] * rng.standard_gamma(shape) / shape)
    low = ~is_high
    values[low] = _invert(uniform.ravel()[at[low]], mean.ravel()[at[low]], dispersion[gene[low]])
    indptr = np.searchsorted(at, np.arange(len(mean) + 1) * mean.shape[1])
    counts = sparse.csr_matrix((values, gene.astype(np.int32), indptr.astype(np.int32)), shape=mean.shape)
    counts.eliminate_zeros()
    return counts


def _invert(
    uniform: NDArray[np.float32], mean: NDArray[np.float32], dispersion: NDArray[np.float32]
) -> NDArray[np.int32]:
    """Quantiles of negative binomial laws of small mean, by summing probabilities upwards from 0."""
    size = dispersion.astype(np.float64)
    odds = mean / (size + mean)
    mass = np.power(1.0 - odds, size)
    left = uniform.astype(np.float64) - mass
    out = np.zeros(uniform.size, dtype=np.int32)
    active = np.arange(uniform.size)
    step = 0
    while active.size:
        mass = mass * odds * (size + step) / (step + 1)
        step += 1
        out[active] = step
        left = left - mass
        more = left > 0
        active, mass, odds, size, left = active[more], mass[more], odds[more], size[more], left[more]
    return out
