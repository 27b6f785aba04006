"""From AnnData to the populations that are compared: genes aligned, expression normalised, cells grouped."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from scperturbdiff.data import check_obs_key, closest, log_normalize, preview, read_genes

if TYPE_CHECKING:
    from collections.abc import Sequence

    from anndata import AnnData
    from numpy.typing import NDArray
    from scipy import sparse

    Condition = tuple[str, ...]


@dataclass(frozen=True)
class Keys:
    """Columns of `obs`: the perturbation, the context that controls share, and what else defines a condition."""

    perturbation: str
    contexts: tuple[str, ...] = ()
    conditions: tuple[str, ...] = ()

    @property
    def all(self) -> tuple[str, ...]:
        """Columns whose values name a condition, contexts first, perturbation last."""
        return (*self.contexts, *self.conditions, self.perturbation)

    def context(self, condition: Condition) -> Condition:
        """The part of a condition that its controls share."""
        return condition[: len(self.contexts)]

    def describe(self, condition: Condition) -> str:
        """`"cell_type=B, perturbation=IFNB"`."""
        names = self.all if len(condition) == len(self.all) else self.contexts
        return ", ".join(f"{key}={value}" for key, value in zip(names, condition, strict=True)) or "all cells"


def _as_text(column: pd.Series, key: str, where: str) -> NDArray[np.object_]:
    if column.isna().any():
        raise ValueError(f"{where}.obs[{key!r}] has {int(column.isna().sum())} missing values.")
    if pd.api.types.is_float_dtype(column.dtype):
        # Doses written as float32 and as float64 must meet.
        return np.array([f"{value:.6g}" for value in column], dtype=object)
    return column.astype(str).to_numpy(dtype=object)


def group_cells(adata: AnnData, keys: Sequence[str], where: str) -> dict[Condition, NDArray[np.intp]]:
    """Row numbers of every combination of values of the columns `keys`, in order of first appearance."""
    if not keys:
        return {(): np.arange(adata.n_obs)}
    for key in keys:
        check_obs_key(adata, key, f"{where}: key")
    columns = pd.DataFrame({key: _as_text(adata.obs[key], key, where) for key in keys})
    groups = columns.groupby(list(keys), sort=False).indices
    return {name if isinstance(name, tuple) else (name,): np.asarray(rows) for name, rows in groups.items()}


def read_expression(
    adata: AnnData,
    genes: pd.Index,
    *,
    layer: str | None,
    rows: NDArray[np.integer] | None = None,
    target_sum: float = 1e4,
    where: str = "adata",
) -> sparse.csr_matrix:
    """Log-normalised expression of `genes` for `rows`, float32 CSR, from counts in `layer` (`None`: X).

    Library sizes are sums over `genes`. Values that are not counts raise a `ValueError`.
    """
    try:
        counts = read_genes(adata, genes, layer, rows)
    except (KeyError, ValueError) as error:
        raise type(error)(f"{where}: {error.args[0]}") from error
    values = counts.data
    finite = np.isfinite(values)
    for number, what in (
        ((~finite).sum(), "NaN or infinite"),
        ((values < 0).sum(), "negative"),
        ((values[finite] != np.round(values[finite])).sum(), "non-integer"),
    ):
        if number:
            place = "X" if layer is None else f"layers[{layer!r}]"
            raise ValueError(
                f"{where}.{place} must hold counts, but {number} entries are {what}. Both sides are normalised here "
                "in the same way, so name the layer with the counts (layer_pred, layer_real)."
            )
    return log_normalize(counts, target_sum)


def split_control(
    real: AnnData, control: str | AnnData, keys: Keys
) -> tuple[dict[Condition, NDArray[np.intp]], AnnData, dict[Condition, NDArray[np.intp]]]:
    """Real perturbed cells per condition, the AnnData that holds the controls, and controls per context.

    `control` is the label of the control cells in `real`, or an AnnData of control cells.
    """
    check_obs_key(real, keys.perturbation, "perturbation_key")
    labels = _as_text(real.obs[keys.perturbation], keys.perturbation, "real")
    if not isinstance(control, str):
        return group_cells(real, keys.all, "real"), control, group_cells(control, keys.contexts, "control")
    is_control = labels == control
    if not is_control.any():
        raise ValueError(
            f"control={control!r} is not among the values of real.obs[{keys.perturbation!r}]: "
            f"{preview(pd.unique(labels), 30)}. Name the control label, or pass an AnnData of control cells."
        )
    treated = {c: rows for c, rows in group_cells(real, keys.all, "real").items() if c[-1] != control}
    per_context = {c: rows[is_control[rows]] for c, rows in group_cells(real, keys.contexts, "real").items()}
    return treated, real, {c: rows for c, rows in per_context.items() if len(rows)}


def require(wanted: Sequence[Condition], known: Sequence[Condition], what: str, keys: Keys) -> None:
    """Raise a `ValueError` that lists the conditions (or contexts) of `wanted` that `known` lacks."""
    missing = [c for c in wanted if c not in set(known)]
    if missing:
        shown = "; ".join(keys.describe(c) for c in missing[:10]) + ("; ..." if len(missing) > 10 else "")
        near = closest(keys.describe(missing[0]), [keys.describe(c) for c in known])
        hint = f" Nearest to the first: {'; '.join(near)}." if near else ""
        raise ValueError(f"{what} {len(missing)} of {len(wanted)} wanted: {shown}.{hint}")


def is_anndata(value: Any) -> bool:
    """Whether `value` is an AnnData."""
    from anndata import AnnData

    return isinstance(value, AnnData)
