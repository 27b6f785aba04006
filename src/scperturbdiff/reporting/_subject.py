"""What is reported on: predicted, real and control cells by condition, and what the model says of them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pandas as pd

from scperturbdiff.data import DOSE, PERTURBATION, UNS, check_cells, read_text
from scperturbdiff.evaluation.metrics import (
    find_dose,
    group_cells,
    group_contexts,
    make_keys,
    read_expression,
    read_predicted,
    split_control,
)

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from anndata import AnnData
    from numpy.typing import NDArray

    from scperturbdiff.evaluation.metrics import Keys

    Condition = tuple[str, ...]
    Rows = Mapping[Condition, NDArray[np.intp]]


WAYS = {
    "control": "control cells",
    "seen": "a condition of training",
    "replicate": "a replicate of a condition of training",
    "pair": "a perturbation and a context not seen together",
    "context": "a new context",
    "perturbation": "a new perturbation",
}
"""How a condition can be new, in words."""


class Evidence(NamedTuple):
    """What training knows of a condition."""

    novelty: str
    unexplained: float
    """Share of the variance of the response that training leaves open; NaN where it knows nothing."""
    n_controls: int


@dataclass
class Subject:
    """Cells of a report. Expression is log-normalised CSR over `genes`, read when it is asked for."""

    pred: AnnData
    keys: Keys
    genes: pd.Index
    matrix: Any
    """Of the predicted cells, or means."""
    means: bool
    rows: Rows
    """Of `pred`, by condition."""
    real: AnnData | None
    real_rows: Rows
    controls: AnnData | None
    control_rows: Rows
    """By context."""
    layer_real: str | None
    target_sum: float
    evidence: Mapping[Condition, Evidence]
    """What training knows of each condition; nothing where the prediction does not say."""
    training: dict[str, Any]
    """What training found: :meth:`TrainingReport.summary`; nothing where the model is not known."""
    made_by: Mapping[str, Any]
    """`uns` of the prediction."""
    _read: dict[Condition, Any] = field(default_factory=dict, repr=False)

    @property
    def conditions(self) -> list[Condition]:
        """What was predicted, in order."""
        return list(self.rows)

    def name(self, condition: Condition) -> str:
        """The perturbation first: `"IFNB, cell_type=B"`."""
        rest = zip(self.keys.all[:-1], condition[:-1], strict=True)
        return ", ".join([condition[-1], *(f"{key}={value}" for key, value in rest)])

    def predicted(self, condition: Condition) -> Any:
        """Predicted cells."""
        return self.matrix[self.rows[condition]]

    def observed(self, condition: Condition) -> Any | None:
        """Real cells, if there are any."""
        rows = self.real_rows.get(condition)
        return None if rows is None or self.real is None else self._expression(self.real, rows, "real")

    def control(self, condition: Condition) -> Any | None:
        """Control cells of its context, if there are any."""
        context = self.keys.context(condition)
        if context not in self.control_rows or self.controls is None:
            return None
        if context not in self._read:
            self._read[context] = self._expression(self.controls, self.control_rows[context], "controls")
        return self._read[context]

    def n_controls(self, condition: Condition) -> int | None:
        """Control cells of its context, those that the model had where these are not given."""
        rows = self.control_rows.get(self.keys.context(condition))
        if rows is not None:
            return len(rows)
        return self.evidence[condition].n_controls if condition in self.evidence else None

    def _expression(self, adata: AnnData, rows: NDArray[np.intp], where: str) -> Any:
        return read_expression(
            adata, self.genes, layer=self.layer_real, rows=rows, target_sum=self.target_sum, where=where
        )


def resolve_keys(pred: AnnData, model: Any, given: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments that name columns: as given, else as the prediction or the model says; raises where neither does."""
    said = dict(pred.uns.get(UNS, {}).get("keys", {}))
    space = getattr(model, "conditions", None)
    found = {
        "perturbation_key": said.get("perturbation"),
        "control": said.get("control"),
        # controls agree with treated cells in covariates, too
        "context_keys": [*map(str, said.get("context", ())), *map(str, said.get("covariates", ()))],
        "dose_key": said.get("dose"),
        "separator": "+" if space is None else space.separator,
    }
    keys = {name: found[name] if given[name] is None else given[name] for name in found}
    keys["separator"] = found["separator"] if given["separator"] == "model" else given["separator"]
    if missing := [name for name in ("perturbation_key", "control") if keys[name] is None]:
        raise ValueError(
            f"{' and '.join(f'{name}=...' for name in missing)} must be given: pred does not come from "
            "PerturbDiff.predict, which notes them in uns."
        )
    return keys


def read_subject(
    pred: AnnData,
    real: AnnData | None,
    controls: AnnData | None,
    model: Any,
    keys: Mapping[str, Any],
    condition_keys: str | Sequence[str],
    *,
    layers: tuple[str | None, str | None],
    normalized: bool,
    means: bool,
    target_sum: float,
) -> Subject:
    """Group cells by condition and context; `layers` are those of predicted and of other cells."""
    named = make_keys(
        keys["perturbation_key"], keys["context_keys"], keys["control"], keys["separator"], condition_keys,
        keys["dose_key"],
    )  # fmt: skip
    real_rows: Rows = {}
    control_rows: Rows = {}
    if real is not None:
        named = find_dose(named, real.obs) if named.labels.key in real.obs else named
        real_rows, controls, control_rows = split_control(real, keys["control"], named)
    elif controls is not None:
        check_cells(controls, "controls")
        rows = np.arange(controls.n_obs)
        if named.labels.key in controls.obs:
            rows = np.flatnonzero(named.labels.control_cells(controls.obs))
        control_rows = group_contexts(controls, named, "controls", rows)
    rows_of = group_cells(pred, named, "pred")
    if not rows_of:
        raise ValueError("pred holds no cells of a perturbation: nothing to report.")
    genes = pred.var_names if real is None else real.var_names
    kind: Any = "means" if means else "normalized" if normalized else "counts"
    matrix = read_predicted(pred, genes, kind, layer=layers[0], target_sum=target_sum, where="pred")
    made_by = pred.uns.get(UNS, {})
    trained = getattr(model, "report_", None)
    training = trained.summary() if trained is not None else dict(made_by.get("training", {}))
    return Subject(
        pred, named, genes, matrix, means, rows_of, real, real_rows, controls, control_rows, layers[1], target_sum,
        _evidence(made_by, named), training, made_by,
    )  # fmt: skip


def _evidence(made_by: Mapping[str, Any], keys: Keys) -> dict[Condition, Evidence]:
    """Evidence of each condition: of its populations (of several batches) the one that training says least about."""
    asked = made_by.get("conditions")
    if not isinstance(asked, pd.DataFrame) or not {*keys.all, "novelty", "unexplained_variance"} <= set(asked):
        return {}
    read = keys.labels.read(asked, "pred.uns")
    plain = [key for key in keys.all[:-1] if key != keys.labels.dose_key]
    table = read_text(asked, plain, "pred.uns")
    table[keys.labels.key] = read[PERTURBATION].to_numpy()
    if keys.labels.dose_key is not None:
        table[keys.labels.dose_key] = read[DOSE].to_numpy()
    left = pd.to_numeric(asked["unexplained_variance"], errors="coerce").to_numpy(np.float64)
    out: dict[Condition, Evidence] = {}
    names = map(tuple, table[list(keys.all)].to_numpy(dtype=object))
    for name, novelty, share, n in zip(names, asked["novelty"], left, asked["n_controls"], strict=True):
        known = out.get(name, Evidence(str(novelty), share, 0))
        # NaN counts as nothing known, which nothing is worse than
        worse = known if np.isnan(known.unexplained) or known.unexplained >= share else Evidence(str(novelty), share, 0)
        out[name] = worse._replace(n_controls=known.n_controls + int(n))
    return out
