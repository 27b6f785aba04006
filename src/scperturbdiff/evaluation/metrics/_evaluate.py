"""Score predicted cells against real ones beside simple baselines and a replicate of the real cells."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pandas as pd
from anndata import AnnData
from scipy import sparse

from scperturbdiff.arguments import check_choice, check_flag, check_int, check_number
from scperturbdiff.data import check_cells, preview
from scperturbdiff.evaluation.metrics import _inputs as inputs
from scperturbdiff.evaluation.metrics import _predicted as predicted
from scperturbdiff.evaluation.metrics._baseline_cells import Cells, Controls, baseline_cells
from scperturbdiff.evaluation.metrics._distances import subsample
from scperturbdiff.evaluation.metrics._expression import DE_METHODS
from scperturbdiff.evaluation.metrics._inputs import Comparison, Observed, Projection
from scperturbdiff.evaluation.metrics._overlap import check_overlap
from scperturbdiff.evaluation.metrics._registry import choose_metrics
from scperturbdiff.evaluation.metrics._shifts import Population
from scperturbdiff.evaluation.metrics._summary import FIXED
from scperturbdiff.evaluation.metrics._table import average_tables, score
from scperturbdiff.seeds import check_seed, derive_seed

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from scperturbdiff.evaluation.metrics._inputs import Condition, Keys


PREDICTION, BASELINE, CEILING = "prediction", "baseline", "ceiling"


def evaluate(
    pred: AnnData | Mapping[str, AnnData],
    real: AnnData,
    control: str | AnnData,
    *,
    perturbation_key: str,
    context_keys: str | Sequence[str] = (),
    condition_keys: str | Sequence[str] = (),
    dose_key: str | None = None,
    separator: str | None = "+",
    layer_pred: str | None = "counts",
    layer_real: str | None = None,
    train: AnnData | None = None,
    baselines: Literal["default"] | Mapping[str, Any] | None = "default",
    metrics: Iterable[str] | Literal["all"] | None = None,
    normalized: bool | Iterable[str] = False,
    means: bool | Iterable[str] = False,
    allow_overlap: bool = False,
    n_pcs: int = 50,
    target_sum: float = 1e4,
    n_top: int = 100,
    de_method: Literal["t-test", "wilcoxon"] = "t-test",
    max_cells: int = 2000,
    ceiling: bool = True,
    n_splits: int = 5,
    seed: int = 0,
) -> pd.DataFrame:
    """Score predicted cells against real ones, beside baselines and a ceiling.

    Every condition (context, perturbation) of `pred` is scored. Both sides are normalised in the same way from counts
    (to `target_sum` per cell over the genes of `real`, then log1p); shifts use the real controls of the same context;
    principal components are fitted on real cells only; differential expression is tested at the same number of
    predicted and real cells. Predictions may also be log-normalised, or means. A value that there is not is NaN, never
    0, and the table says why.

    Parameters
    ----------
    pred
        Predicted cells with counts in `layer_pred` (or what `normalized` and `means` say), or several models' by name.
        The genes of `real` are looked up by name; control cells among them are left out.
    real
        Real perturbed cells of these conditions with counts in `layer_real`; dense, sparse or backed.
    control
        Label of the control cells in `real`, or an AnnData of real control cells with the same genes and layer.
    perturbation_key
        Column of `obs` with the perturbation, in `pred` and `real`, read as by the model: the table names components
        in order, without the control.
    context_keys
        Columns that perturbed cells and their controls share, such as the cell type.
    condition_keys
        Further columns that define a condition but not its controls, such as the dose.
    dose_key
        Column with doses, one of the condition keys; doses are equal where they agree to 12 digits, and the default
        baselines are fitted with them. Default: the first condition key with numbers that are positive in treated cells
        and 0 or missing in controls.
    separator
        Joins the names of a combination; `None`: no label is one.
    layer_pred, layer_real
        Layers with counts; `None` for X.
    train
        The real cells the models were trained on, for the principal components and the default baselines; counts in
        `layer_real`. `None`: components are fitted on `real` and the controls.
    baselines
        `"default"`: the rules of :func:`scperturbdiff.baselines.default_baselines` that can predict any of the
        conditions, fitted on `train` (none without `train`). Where one cannot be fitted or cannot predict, its values
        are NaN and the table says why; rules without any value are also named in a warning and in
        ``attrs["left_out"]`` of the table. Or AnnData of cells as in `pred`, or fitted objects with
        `predict(controls, perturbations, n_cells=..., seed=...)`, by name.
    metrics
        Names from :func:`~scperturbdiff.metrics.metric_table`, or `"all"`. `None`: one of each kind, which are
        `energy_distance`, `pearson_delta`, `mse_mean`, `de_auprc` and `discrimination_l2`.
    normalized
        `True`: `pred` is log-normalised, `log1p` of counts scaled to `target_sum` over the genes of `real`, in X or in
        a layer named by `layer_pred`. Values that look like counts, that have no logarithm, are scaled, or are of
        another size than the controls are refused. Or the names of the models and baselines that are.
    means
        `True`: `pred` has one row a condition, the mean of log-normalised expression over its cells, in X. Metrics that
        need cells are NaN. Or the names of the models and baselines that have.
    allow_overlap
        Whether real cells that are scored may be among the treated cells of `train`. Found by counts and names.
    n_pcs, max_cells
        Distances between populations use this number of principal components and at most this number of cells of each
        (subsampled; the U-statistics stay unbiased).
    target_sum
        Counts per cell after normalisation.
    n_top, de_method
        How many of the genes most differentially expressed in the real cells are "top", and by which test.
    ceiling, n_splits
        Whether to score a replicate: one random half of the real cells of a condition against the other half, with
        half the cells each, averaged over this number of splits.
    seed
        Of every random choice: the same seed gives the same table.

    Returns
    -------
    Tidy table, one row per model, condition and metric, with columns `model` (`"prediction"` or the names given, the
    baselines' names, `"ceiling"`), `role` (`"prediction"`, `"baseline"`, `"ceiling"`), those of `context_keys`,
    `condition_keys` and `perturbation_key`, `metric`, `value`, `status`, `reason`, `n_pred`, `n_real` and `n_control`.

    `status` is `"ok"`, or says why `value` is NaN, and `reason` says more: `"undefined"`, the metric has no value for
    these cells; `"unavailable"`, there is no prediction of this condition, or only its mean; `"not fitted"`, the rule
    could not be fitted on `train`.

    Raises
    ------
    KeyError
        For a column or layer that does not exist.
    TypeError, ValueError
        For what is no AnnData; conditions without real cells or controls; missing genes; values that are not what
        `normalized` and `means` say; cells that are scored and were trained on. Messages name it.
    """
    chosen = choose_metrics(metrics)
    _check_settings(n_pcs, n_top, max_cells, n_splits, target_sum, de_method, ceiling, seed)
    check_flag("allow_overlap", allow_overlap)
    keys = inputs.make_keys(perturbation_key, context_keys, control, separator, condition_keys, dose_key)
    check_cells(real, "real")
    keys = inputs.find_dose(keys, real.obs) if perturbation_key in real.obs else keys
    if taken := sorted({*keys.all} & {*FIXED}):
        raise ValueError(f"Columns of the result have the names {preview(taken)}: copy these of obs to other names.")
    models = dict(pred) if isinstance(pred, Mapping) else {PREDICTION: pred}
    rules = list(baselines) if isinstance(baselines, Mapping) else []
    kinds = predicted.kinds_of(models, rules, normalized, means)
    treated, control_cells, control_rows = inputs.split_control(real, control, keys)
    conditions = _conditions_of(pred, models, keys)
    means_only = models.keys() <= {name for name, kind in kinds.items() if kind == "means"}
    contexts = inputs.require_real(conditions, treated, control_rows, keys)

    def read(adata: AnnData, where: str, rows: Any = None) -> Any:
        genes = real.var_names
        return inputs.read_expression(adata, genes, layer=layer_real, rows=rows, target_sum=target_sum, where=where)

    controls = {c: Population(read(control_cells, "control", control_rows[c])) for c in contexts}
    cells = {c: read(real, "real", treated[c]) for c in conditions}
    if train is None:
        fitted_on = sparse.vstack([*cells.values(), *(c.cells for c in controls.values())], format="csr")
    else:
        fitted_on = read(train, "train", subsample(np.arange(train.n_obs), inputs.FITTED_CELLS, seed))
        if not allow_overlap:
            check_overlap(train, real, {c: treated[c] for c in conditions}, keys, layer_real)
    projection = Projection(fitted_on, n_pcs=n_pcs, seed=seed)

    def observe(cells_of: Any, condition: Condition) -> Observed:
        return Observed(
            Population(cells_of), controls[keys.context(condition)], projection, n_top, de_method, max_cells, seed
        )

    observed = {c: observe(cells[c], c) for c in conditions}
    # metrics of means would charge rules of fewer cells than predictions have for the noise of sampling
    sizes = {c: len(treated[c]) if means_only else n for c, n in conditions.items()}
    floors = baseline_cells(
        baselines, train, Controls(control_cells, control_rows), sizes, keys,
        layers=(layer_pred, layer_real), seed=seed,
    )  # fmt: skip
    if twice := sorted({*models, CEILING} & {*floors} | {*models} & {CEILING}):
        raise ValueError(f"Names of models and baselines must differ, and from 'ceiling': {twice}.")

    def compare(name: str, found: Cells) -> Iterator[tuple[Condition, Comparison]]:
        matrix = sparse.csr_matrix((0, real.n_vars), dtype=np.float32)
        where: Mapping[Condition, Any] = {}
        if found.adata is not None:
            # what the user passed: the table's name of a single model, "prediction", is ours
            called = f"baselines[{name!r}]" if name in floors else _called(pred, name)
            matrix, where = predicted.read_conditions(
                found.adata, real.var_names, kinds.get(name, "counts"),
                [c for c in conditions if c not in found.absent], controls, keys,
                layer=found.layer, target_sum=target_sum, where=called,
            )  # fmt: skip
        return ((c, Comparison(matrix[where.get(c, [])], observed[c])) for c in conditions)

    tables = []
    for role, group in ((PREDICTION, {n: Cells(a, layer_pred) for n, a in models.items()}), (BASELINE, floors)):
        for name, found in group.items():
            tables.append(score(name, role, compare(name, found), chosen, keys, found, kinds.get(name) == "means"))
    if ceiling:
        halves = [score(CEILING, CEILING, _halves(cells, observe, seed, i), chosen, keys) for i in range(n_splits)]
        tables.append(average_tables(halves))
    table = pd.concat(tables, ignore_index=True)
    left_out = {name: found.why_left_out(keys) for name, found in floors.items() if found.adata is None}
    if left_out:
        table.attrs["left_out"] = left_out
    return table


def _check_settings(
    n_pcs: int, n_top: int, max_cells: int, n_splits: int, target_sum: float, de_method: str, ceiling: bool, seed: int
) -> None:
    for name, value, least in (
        ("n_pcs", n_pcs, 1),
        ("n_top", n_top, 1),
        ("max_cells", max_cells, 2),
        ("n_splits", n_splits, 1),
    ):
        check_int(name, value, least)
    check_number("target_sum", target_sum, "(0, inf)")
    check_choice("de_method", de_method, DE_METHODS)
    check_flag("ceiling", ceiling)
    check_seed(seed)


def _called(pred: Any, name: str) -> str:
    """What messages call a model's prediction."""
    return f"pred[{name!r}]" if isinstance(pred, Mapping) else "pred"


def _conditions_of(pred: Any, models: Mapping[str, AnnData], keys: Keys) -> dict[Condition, int]:
    """Conditions to score, the same for all models, and the most cells that one of these has of each."""
    if not models:
        raise ValueError("pred names no model.")
    found: dict[str, dict[Condition, int]] = {}
    for name, adata in models.items():
        if not isinstance(adata, AnnData):
            called = _called(pred, name)
            raise TypeError(f"pred must be an AnnData or a mapping of names to AnnData, but {called} is {type(adata)}.")
        rows = inputs.group_cells(adata, keys, _called(pred, name))
        found[name] = {condition: len(of_it) for condition, of_it in rows.items()}
    wanted: dict[Condition, int] = {}
    for sizes in found.values():
        wanted |= {condition: max(n, wanted.get(condition, 0)) for condition, n in sizes.items()}
    if not wanted:
        raise ValueError("pred holds no cells of a perturbation: nothing to score.")
    for name, sizes in found.items():
        inputs.require(wanted, sizes, f"{_called(pred, name)} lacks conditions that another model predicts,", keys)
    return wanted


def _halves(cells: Mapping[Condition, Any], observe: Any, seed: int, split: int) -> Iterator[tuple[Any, Comparison]]:
    """One half of the real cells of each condition as prediction, the other as truth."""
    for condition, matrix in cells.items():
        order = np.random.default_rng(derive_seed(seed, "half", split, *condition)).permutation(matrix.shape[0])
        middle = len(order) // 2
        yield condition, Comparison(matrix[order[:middle]], observe(matrix[order[middle:]], condition))
