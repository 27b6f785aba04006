"""What figures of many conditions share: the cells of all of them, and of the controls of their contexts."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Required, TypedDict

import numpy as np

from scperturbdiff.data import check_cells, preview
from scperturbdiff.evaluation.metrics import (
    gene_moments,
    group_cells,
    make_keys,
    read_expression,
    read_predicted,
    split_control,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    from anndata import AnnData
    from numpy.typing import NDArray

    from scperturbdiff.evaluation.metrics import Keys

    Condition = tuple[str, ...]
    Floats = NDArray[np.float64]


class ShownGroups(TypedDict, total=False):
    """Arguments of figures that show many conditions; see :func:`~scperturbdiff.pl.similarity`."""

    perturbation_key: Required[str]
    context_keys: str | Sequence[str]
    separator: str | None
    layer_pred: str | None
    layer_real: str | None
    target_sum: float
    normalized: bool


@dataclass(frozen=True)
class Group:
    """Moments of the log-normalised expression of some cells."""

    n: int
    mean: Floats
    """`(n_genes,)`."""
    sd: Floats
    """`(n_genes,)`, NaN for one cell."""

    @classmethod
    def of(cls, cells: Any) -> Group:
        """The moments of cells `(n_cells, n_genes)`."""
        return cls(cells.shape[0], *gene_moments(cells))

    def length_of_shift(self, control: Group) -> float:
        """Length of the mean shift from `control`; what two samples of the same cells are apart is taken off."""
        noise = (self.sd**2 / self.n + control.sd**2 / control.n).sum()
        return float(np.sqrt(max(((self.mean - control.mean) ** 2).sum() - noise, 0.0)))


@dataclass(frozen=True)
class Groups:
    """Predicted and real cells of every condition; a condition is named by the values of `keys[...].all`."""

    cells: dict[str, dict[Condition, Group]]
    """`"predicted"` and `"real"` -> condition -> its cells, two at least."""
    controls: dict[Condition, Group]
    keys: dict[str, Keys]

    def control(self, side: str, condition: Condition) -> Group:
        """The control cells of a condition."""
        return self.controls[self.keys[side].context(condition)]


def read_groups(
    pred: AnnData | None,
    real: AnnData,
    control: str | AnnData,
    *,
    perturbation_key: str,
    context_keys: str | Sequence[str] = (),
    separator: str | None = "+",
    layer_pred: str | None = "counts",
    layer_real: str | None = None,
    target_sum: float = 1e4,
    normalized: bool = False,
    dose_key: str | None = None,
    populations: dict[str, str | None] | None = None,
) -> Groups:
    """Group and normalise cells. `populations` are columns that tell those of one condition apart, for each side."""
    keys = make_keys(perturbation_key, context_keys, control, separator, (), dose_key)
    more = {name: [key] if key else [] for name, key in (populations or {}).items()}
    of = {side: replace(keys, conditions=(*more.get(side, ()), *keys.conditions)) for side in ("predicted", "real")}
    treated, source, at = split_control(real, control, of["real"])
    genes = real.var_names
    how: Any = {"target_sum": target_sum}
    controls = {
        context: Group.of(read_expression(source, genes, layer=layer_real, rows=rows, where="control", **how))
        for context, rows in at.items()
        if len(rows) > 1
    }
    cells: dict[str, dict[Condition, Group]] = {"predicted": {}, "real": {}}
    if treated:
        observed = read_expression(real, genes, layer=layer_real, where="real", **how)
        cells["real"] = _groups(observed, treated, of["real"], controls)
    if pred is not None:
        check_cells(pred, "pred")
        kind: Any = "normalized" if normalized else "counts"
        made = read_predicted(pred, genes, kind, layer=layer_pred, where="pred", **how)
        cells["predicted"] = _groups(made, group_cells(pred, of["predicted"], "pred"), of["predicted"], controls)
    return Groups(cells, controls, of)


def _groups(
    matrix: Any, rows: dict[Condition, NDArray[np.intp]], keys: Keys, controls: dict[Condition, Group]
) -> dict[Condition, Group]:
    found = {condition: Group.of(matrix[at]) for condition, at in rows.items() if len(at) > 1}
    lost = [keys.describe(condition) for condition in found if keys.context(condition) not in controls]
    if lost:
        raise ValueError(
            f"There are no two real control cells in the context of {len(lost)} conditions: {preview(lost)}."
        )
    return found
