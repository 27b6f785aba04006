"""Expression of predictions, whatever they are given as: counts, log-normalised cells, or means of conditions."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from scperturbdiff.arguments import refusal
from scperturbdiff.data import COUNTS, matrix_name, read_genes
from scperturbdiff.evaluation.metrics._inputs import group_cells, read_expression, require
from scperturbdiff.evaluation.metrics._shifts import gene_moments

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    import pandas as pd
    from anndata import AnnData
    from numpy.typing import NDArray
    from scipy import sparse

    from scperturbdiff.evaluation.metrics._inputs import Condition, Keys
    from scperturbdiff.evaluation.metrics._shifts import Population

    Kind = Literal["counts", "normalized", "means"]

logger = logging.getLogger(__name__)

ABOVE = 2.0
"""How far above `log1p(target_sum)` a value may be: models overshoot a little, values without logarithm a lot."""
BELOW = 0.25
"""Share that negative values may have of the sum of all: models undershoot a little, centred values by a half."""
REFUSED, DOUBTFUL = 2.0, 1.25
"""Factors between predicted and control means, over all genes, that are refused and that are warned of."""


def kinds_of(models: Iterable[str], rules: Iterable[str], normalized: Any, means: Any) -> dict[str, Kind]:
    """What the matrix of each model and rule holds.

    `normalized` and `means` are flags for all models, or the names of models and rules.
    """
    models = list(models)
    known = [*models, *rules]
    kinds: dict[str, Kind] = dict.fromkeys(known, "counts")
    options: tuple[tuple[str, Any, Kind], ...] = (("normalized", normalized, "normalized"), ("means", means, "means"))
    for argument, value, kind in options:
        if isinstance(value, bool | np.bool_):
            named = models if value else []
        elif isinstance(value, str | list | tuple | set):
            named = [value] if isinstance(value, str) else list(value)
        else:
            raise refusal(argument, value, "True, False or names of models", TypeError)
        if [name for name in named if name not in kinds]:
            raise refusal(argument, value, f"True, False or names among {known}")
        kinds |= dict.fromkeys(named, kind)
    return kinds


def read_predicted(
    adata: AnnData,
    genes: pd.Index,
    kind: Kind,
    *,
    layer: str | None,
    target_sum: float,
    where: str,
    rows: NDArray[np.integer] | None = None,
) -> sparse.csr_matrix:
    """Log-normalised expression of `genes`, float32 CSR.

    Parameters
    ----------
    adata
        Cells, or with `kind="means"` conditions.
    genes
        Names wanted, in order.
    kind
        `"counts"` are normalised here. What is normalised already is taken as it is, if it looks like it.
    layer
        Layer with the matrix, `None` for X. What is no counts is looked for in X rather than in the layer `"counts"`.
    target_sum
        Counts per cell, over `genes`, of the normalisation.
    where
        What messages call the prediction.
    rows
        Row numbers wanted; `None`: all.
    """
    if kind == "counts":
        return read_expression(
            adata, genes, layer=layer, rows=rows, target_sum=target_sum, where=where, argument="layer_pred"
        )
    layer = None if layer == COUNTS else layer
    matrix = read_genes(adata, genes, layer, rows, where, "layer_pred")
    _check_normalized(matrix.data, matrix_name(layer, where), kind, target_sum)
    return matrix


def read_conditions(
    adata: AnnData,
    genes: pd.Index,
    kind: Kind,
    conditions: Sequence[Condition],
    controls: Mapping[Condition, Population],
    keys: Keys,
    *,
    layer: str | None,
    target_sum: float,
    where: str,
) -> tuple[sparse.csr_matrix, dict[Condition, NDArray[np.intp]]]:
    """The same of all cells, and the rows of each condition, which must have all of `conditions`.

    `controls` are log-normalised real control cells of each context, whose scale what is normalised already must have.
    """
    matrix = read_predicted(adata, genes, kind, layer=layer, target_sum=target_sum, where=where)
    rows = group_cells(adata, keys, where)
    require(conditions, list(rows), f"{where} lacks conditions,", keys)
    if kind != "counts":
        check_scale(matrix, rows, controls, keys, where, target_sum)
    if kind == "means":
        check_one_row(rows, keys, where)
    return matrix, rows


def _check_normalized(values: NDArray[np.float32], where: str, kind: Kind, target_sum: float) -> None:
    """Raise a `ValueError` where values cannot be log-normalised expression, and say what they look like."""
    argument = "normalized=True" if kind == "normalized" else "means=True"
    wanted = f"{where} must hold log-normalised expression with {argument}, but"
    n_bad = int(values.size - np.count_nonzero(np.isfinite(values)))
    if n_bad:
        raise ValueError(f"{wanted} {n_bad} values are NaN or infinite.")
    if not values.any():
        raise ValueError(f"{wanted} all values are 0.")
    if not (values % 1).any():
        raise ValueError(f"{wanted} all values are whole numbers: these look like counts. Leave {argument} out.")
    total = float(np.abs(values).sum(dtype=np.float64))
    negative = float(-values[values < 0].sum(dtype=np.float64))
    if negative > BELOW * total:
        raise ValueError(
            f"{wanted} negative values have {negative / total:.0%} of the sum: they seem to be centred or scaled. "
            "Undo that, or pass the layer from before it."
        )
    highest, limit = float(values.max()), float(np.log1p(target_sum)) + ABOVE
    if highest > limit:
        raise ValueError(
            f"{wanted} the largest value is {highest:.4g}, and log1p({target_sum:g}) is {np.log1p(target_sum):.3g}: "
            "there seems to be no logarithm, or another target_sum. Take log1p, or pass target_sum=... of yours."
        )


def check_scale(
    predicted: sparse.csr_matrix,
    rows: Mapping[Condition, NDArray[np.intp]],
    controls: Mapping[Condition, Population],
    keys: Keys,
    name: str,
    target_sum: float,
) -> None:
    """Raise a `ValueError` where predicted means and those of controls differ by one factor throughout the genes.

    That is what another number of counts per cell, or other genes to sum over, look like. Smaller factors are warned
    of.
    """
    asked: dict[Condition, list[NDArray[np.intp]]] = {}
    for condition, found in rows.items():
        asked.setdefault(keys.context(condition), []).append(found)
    mean = [gene_moments(predicted[np.concatenate(found)])[0] for found in asked.values()]
    base = [controls[context].moments[0] for context in asked]
    p, c = np.concatenate(mean), np.concatenate(base)
    factor = float(p @ c) / max(float(c @ c), 1e-12)
    totals = np.asarray(predicted.expm1().sum(axis=1)).ravel()
    told = (
        f"{name}: predicted expression is {factor:.2f} times that of the control cells, over all genes; without its "
        f"logarithm a row adds up to about {np.median(totals):,.0f}. Real cells are normalised to {target_sum:,.0f} "
        f"counts over the {predicted.shape[1]} genes of real: normalise in the same way, over these genes, or pass "
        "target_sum=... of yours."
    )
    if not 1 / REFUSED <= factor <= REFUSED:
        raise ValueError(told)
    if not 1 / DOUBTFUL <= factor <= DOUBTFUL:
        logger.warning("%s", told)


def check_one_row(rows: Mapping[Condition, NDArray[np.intp]], keys: Keys, name: str) -> None:
    """Raise a `ValueError` where a condition has several rows of means."""
    for condition, found in rows.items():
        if len(found) > 1:
            raise ValueError(
                f"{name} has {len(found)} rows for {keys.describe(condition)}; with means=True there is one a "
                "condition. Cells are scored with normalized=True."
            )
