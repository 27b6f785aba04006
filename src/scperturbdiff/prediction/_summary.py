"""What several draws of the same populations say together, and how far to trust them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pandas as pd

from scperturbdiff.arguments import check_number
from scperturbdiff.data import (
    CONTROL_CELL,
    FAR,
    N_CELLS,
    POPULATION,
    UNS,
    check_cells,
    check_layer,
    gene_column,
    gene_positions,
    get_matrix,
    grouped_sums,
    log_normalize,
    member_weights,
    preview,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    from anndata import AnnData
    from numpy.typing import NDArray
    from scipy import sparse

    Floats = NDArray[np.float64]


CHUNK = 4096


class PopulationSummary(NamedTuple):
    """Result of :func:`summarize_populations`.

    Attributes
    ----------
    genes
        One row per condition and gene: mean shift over the draws and its interval.
    conditions
        One row per condition: draws, cells, spread between draws, how the condition is new, and a flag.
    """

    genes: pd.DataFrame
    conditions: pd.DataFrame


def summarize_populations(
    pred: AnnData,
    control: AnnData,
    *,
    layer: str | None = None,
    level: float = 0.9,
    far: float = FAR,
) -> PopulationSummary:
    """Summarise the draws of predicted populations as mean shifts with intervals.

    Parameters
    ----------
    pred
        Output of :meth:`scperturbdiff.PerturbDiff.predict` with `n_populations` of 2 or more; in memory or on disk.
    control
        AnnData with the control cells that were given to `predict`, found by name (``pred.obs["control_cell"]``), with
        raw counts.
    layer
        Layer of `control` with the counts; `None` for `X`.
    level
        Probability that one more draw lies in the interval: its ends are quantiles over the draws (Weibull's, whose
        coverage is right for any number of draws), or the smallest and largest draw where there are too few for them.
    far
        Conditions of whose variance training leaves open at least this share are flagged as far from training.

    Returns
    -------
    :class:`PopulationSummary`. Shifts are differences of mean log-normalised expression, predicted cells minus the
    control cells that they started from, in the units of ``pred.X``. Batches are pooled, and their deviations cancel:
    give `predict` the controls of one batch where the variation of single ones is asked. `spread` is the standard
    deviation of the mean expression between draws, root mean square over genes, beyond what the finite numbers of cells
    and controls explain (0 if they explain all of it). It speaks of the variation between populations that the model
    has learned; how far to believe the draws is another question, which `novelty`, `unexplained_variance` (see
    ``pred.uns["scperturbdiff"]["conditions"]``) and `far_from_training` answer.

    Raises
    ------
    KeyError
        If `pred` does not come from `predict`, or control cells are not in `control`; the message names them.
    ValueError
        If there is a single draw, or `level` is not between 0 and 1.
    """
    check_cells(pred, "pred")
    check_cells(control, "control")
    check_number("level", level, "(0, 1)")
    check_number("far", far, "[0, 1]")
    made_by = pred.uns.get(UNS, {})
    if "conditions" not in made_by or POPULATION not in pred.obs:
        raise KeyError("pred must come from PerturbDiff.predict: uns['scperturbdiff']['conditions'] is missing.")
    keys = _condition_keys(made_by["keys"])
    shown, code = _number(pred.obs, keys)
    draws, draw = np.unique(pred.obs[POPULATION].astype(str), return_inverse=True)
    if len(draws) < 2:
        raise ValueError("pred holds a single draw of each population: call predict with n_populations=2 or more.")
    mean, variance, size = _moments(pred, code * len(draws) + draw, len(shown) * len(draws))
    mean, variance = (x.reshape(len(shown), len(draws), -1) for x in (mean, variance))
    size = size.reshape(len(shown), len(draws))
    if not size.all():
        lacking = shown[(size == 0).any(1)].agg(" / ".join, axis=1)
        raise ValueError(
            f"{len(lacking)} conditions do not have all of the {len(draws)} draws of pred.obs[{POPULATION!r}]: "
            f"{preview(lacking)}. Ask for as many draws of each, or summarise them apart."
        )
    baseline = _control_means(pred, control, layer, code, len(shown), made_by["target_sum"])
    shifts = mean - baseline[:, None, :]
    tail = (1 - level) / 2
    values = {
        "mean_shift": shifts.mean(1),
        "lower": np.quantile(shifts, tail, axis=1, method="weibull"),
        "upper": np.quantile(shifts, 1 - tail, axis=1, method="weibull"),
    }
    row = np.repeat(np.arange(len(shown)), pred.n_vars)
    genes = shown.iloc[row].reset_index(drop=True)
    genes[gene_column(keys)] = pd.Categorical.from_codes(np.tile(np.arange(pred.n_vars), len(shown)), pred.var_names)
    for name, table in values.items():
        genes[name] = table.ravel()
    between = mean.var(axis=1, ddof=1)
    # cells are drawn, and so are the controls they are drawn from
    asked = _requested(shown, made_by["conditions"], keys)
    n_controls = asked.groupby("_code")["n_controls"].sum().to_numpy(np.float64)
    drawn = 1 / np.maximum(size, 1) + 1 / n_controls[:, None]
    sampling = (variance * drawn[:, :, None]).mean(1)
    conditions = shown.assign(
        n_draws=len(draws),
        n_cells=size.sum(1).astype(np.int64),
        spread=np.sqrt(np.maximum((between - sampling).mean(1), 0)),
    )
    return PopulationSummary(genes, _with_evidence(conditions, asked, far))


def _condition_keys(keys: dict[str, Any]) -> list[str]:
    named = [keys["perturbation"], *([keys["dose"]] if "dose" in keys else []), *keys["context"], *keys["covariates"]]
    return list(dict.fromkeys(map(str, named)))


def _number(table: pd.DataFrame, keys: Sequence[str]) -> tuple[pd.DataFrame, NDArray[np.int64]]:
    """Conditions in order of appearance, as text, and the number of each row's."""
    text = table[list(keys)].astype(str)
    code, unique = pd.factorize(pd.MultiIndex.from_frame(text))
    return pd.DataFrame(unique.to_list(), columns=list(keys)), code.astype(np.int64)


def _requested(shown: pd.DataFrame, requested: pd.DataFrame, keys: Sequence[str]) -> pd.DataFrame:
    """Rows of the request for the conditions `shown`, once each; `_code` is the number of the condition."""
    requested = requested.drop_duplicates([column for column in requested if column != N_CELLS])
    text = requested[list(keys)].astype(str)
    code = pd.MultiIndex.from_frame(shown[list(keys)]).get_indexer(pd.MultiIndex.from_frame(text))
    return requested.assign(_code=code)[code >= 0]


def _moments(pred: AnnData, code: NDArray[np.int64], n: int) -> tuple[Floats, Floats, Floats]:
    """Mean and variance of `X` `(n, n_genes)` and number of cells `(n,)` of each group of cells."""
    weights = member_weights(code, np.arange(pred.n_obs), (n, pred.n_obs))

    def both(block: sparse.csr_matrix, rows: NDArray[np.intp]) -> tuple[sparse.csr_matrix, sparse.csr_matrix]:
        values = block.astype(np.float64)
        return values, values.power(2)

    total, squares = grouped_sums(pred.X, weights, both, chunk=CHUNK)
    size = np.bincount(code, minlength=n).astype(np.float64)
    mean = total / np.maximum(size, 1)[:, None]
    excess = squares - size[:, None] * mean**2
    return mean, np.maximum(excess, 0) / np.maximum(size - 1, 1)[:, None], size


def _control_means(
    pred: AnnData, control: AnnData, layer: str | None, code: NDArray[np.int64], n: int, target_sum: float
) -> Floats:
    """Mean log-normalised expression of the control cells that the cells of each condition started from."""
    names = pred.obs[CONTROL_CELL].astype(str)
    at = control.obs_names.astype(str).get_indexer(pd.Index(names))
    if (at < 0).any():
        lost = names[at < 0].unique()
        raise KeyError(f"{len(lost)} control cells of pred are not in control.obs_names: {preview(lost)}.")
    weights = member_weights(code, at, (n, control.n_obs))

    def logged(counts: sparse.csr_matrix, rows: NDArray[np.intp]) -> tuple[sparse.csr_matrix]:
        return (log_normalize(counts, target_sum).astype(np.float64),)

    check_layer(control, layer, np.unique(at), "control")
    columns = gene_positions(control.var_names, pred.var_names, "control")
    (total,) = grouped_sums(get_matrix(control, layer), weights, logged, columns=columns, chunk=CHUNK)
    return total / np.asarray(weights.sum(axis=1)).reshape(-1, 1)


def _with_evidence(conditions: pd.DataFrame, asked: pd.DataFrame, far: float) -> pd.DataFrame:
    """Add how each condition is new: over its batches, the one that training says least about."""
    open_share = asked["unexplained_variance"].to_numpy(dtype=np.float64)
    worst = asked.assign(_open=np.nan_to_num(open_share, nan=-1.0)).sort_values("_open").groupby("_code").last()
    variance = worst["unexplained_variance"].to_numpy(dtype=np.float64)
    out = conditions.assign(novelty=worst["novelty"].to_numpy(), unexplained_variance=variance)
    without = np.isnan(variance)
    out["far_from_training"] = np.where(without, worst["novelty"].to_numpy() != "control", variance >= far).astype(bool)
    return out
