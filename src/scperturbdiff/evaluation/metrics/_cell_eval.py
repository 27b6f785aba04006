"""Hand predicted and real cells to cell-eval2 (the extra `eval`)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import anndata as ad
import numpy as np
import pandas as pd

from scperturbdiff.evaluation.metrics import _inputs as inputs

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from anndata import AnnData

    from scperturbdiff.evaluation.metrics._inputs import Condition


CONTROL = "control"


def to_cell_eval(
    pred: AnnData,
    real: AnnData,
    control: str | AnnData,
    *,
    perturbation_key: str,
    context_keys: str | Sequence[str] = (),
    separator: str | None = "+",
    layer_pred: str | None = "counts",
    layer_real: str | None = None,
    target_sum: float = 1e4,
) -> dict[Condition, tuple[AnnData, AnnData]]:
    """Predicted and real cells of each context in the form that cell-eval2 reads.

    Parameters
    ----------
    pred, real, control, perturbation_key, context_keys, separator, layer_pred, layer_real, target_sum
        As in :func:`~scperturbdiff.metrics.evaluate`.

    Returns
    -------
    For every context (values of `context_keys`) two AnnData, predicted and real: log-normalised expression of the genes
    of `real` in `X` (float32 CSR), the perturbation in `obs["perturbation"]`. Both have the real control cells of the
    context, labelled `"control"`, and only perturbations that `pred` holds for the context.
    """
    keys = inputs.make_keys(perturbation_key, context_keys, control, separator)
    treated, control_cells, control_rows = inputs.split_control(real, control, keys)
    predicted = inputs.group_cells(pred, keys, "pred")
    if not predicted:
        raise ValueError("pred holds no cells of a perturbation: nothing to score.")
    contexts = inputs.require_real(list(predicted), treated, control_rows, keys)

    def gather(adata: AnnData, layer: str | None, groups: Mapping[Condition, Any], where: str) -> AnnData:
        names = np.repeat([c[-1] for c in groups], [len(rows) for rows in groups.values()])
        rows = np.concatenate(list(groups.values()))
        matrix = inputs.read_expression(
            adata, real.var_names, layer=layer, rows=rows, target_sum=target_sum, where=where
        )
        obs = pd.DataFrame({"perturbation": names}, index=[f"{where}-{i}" for i in range(len(rows))])
        return ad.AnnData(matrix, obs=obs, var=pd.DataFrame(index=real.var_names))

    pairs = {}
    for context in contexts:
        here = [c for c in predicted if keys.context(c) == context]
        controls = gather(control_cells, layer_real, {(CONTROL,): control_rows[context]}, "control")
        sides = (
            gather(pred, layer_pred, {c: predicted[c] for c in here}, "pred"),
            gather(real, layer_real, {c: treated[c] for c in here}, "real"),
        )
        together = [ad.concat([side, controls]) for side in sides]
        for cells in together:
            cells.obs["perturbation"] = cells.obs["perturbation"].astype("category")
        pairs[context] = (together[0], together[1])
    return pairs


def cell_eval(
    pred: AnnData,
    real: AnnData,
    control: str | AnnData,
    *,
    perturbation_key: str,
    context_keys: str | Sequence[str] = (),
    separator: str | None = "+",
    layer_pred: str | None = "counts",
    layer_real: str | None = None,
    target_sum: float = 1e4,
    metrics: str | Iterable[str] = "full",
    **config: Any,
) -> pd.DataFrame:
    """Score predicted cells with cell-eval2, context by context.

    Parameters
    ----------
    pred, real, control, perturbation_key, context_keys, separator, layer_pred, layer_real, target_sum
        As in :func:`~scperturbdiff.metrics.evaluate`.
    metrics
        A profile of cell-eval2 (`"full"`, `"minimal"`, ...) or names of its metrics.
    config
        Further fields of `cell_eval2.EvalConfig`, for instance `target_gene_map` where labels are genes to be left
        out of their own score. By default no label is taken for a gene.

    Returns
    -------
    Tidy table with the columns of `context_keys`, `perturbation_key`, `metric` and `value` under cell-eval2's names.
    """
    try:
        import cell_eval2
    except ImportError as error:
        raise ImportError("cell_eval needs cell-eval2: pip install 'scperturbdiff[eval]'.") from error

    names = (context_keys,) if isinstance(context_keys, str) else tuple(context_keys)
    pairs = to_cell_eval(
        pred, real, control, perturbation_key=perturbation_key, context_keys=names, separator=separator,
        layer_pred=layer_pred, layer_real=layer_real, target_sum=target_sum,
    )  # fmt: skip
    settings = {
        "pert_col": "perturbation",
        "control": CONTROL,
        "input_type": "lognorm",
        "target_sum": target_sum,
        "target_gene_map": {"*": None},
        "metrics": metrics if isinstance(metrics, str) else list(metrics),
        **config,
    }
    tables = []
    for context, (predicted, observed) in pairs.items():
        scores = cell_eval2.compute_metrics(predicted, observed, **settings)
        columns = {perturbation_key: "perturbation", "metric": "metric", "value": "value"}
        table = dict(zip(names, context, strict=True)) | {key: scores[name].to_list() for key, name in columns.items()}
        tables.append(pd.DataFrame(table).astype({"value": np.float64}))
    return pd.concat(tables, ignore_index=True)
