"""From AnnData to the populations that are compared: genes aligned, expression normalised, cells grouped."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from scperturbdiff.data import (
    DOSE,
    PERTURBATION,
    Labels,
    check_counts,
    check_obs_key,
    closest,
    log_normalize,
    matrix_name,
    read_contexts,
    read_genes,
    read_text,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    from anndata import AnnData
    from numpy.typing import NDArray
    from scipy import sparse

    Condition = tuple[str, ...]


@dataclass(frozen=True)
class Keys:
    """Columns of `obs`: the perturbation (and dose), the context that controls share, what else defines a condition."""

    labels: Labels
    contexts: tuple[str, ...] = ()
    conditions: tuple[str, ...] = ()

    @property
    def perturbation(self) -> str:
        """Column of the perturbation."""
        return self.labels.key

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


def make_keys(
    perturbation: str,
    contexts: str | Sequence[str],
    control: str | AnnData,
    separator: str | None,
    conditions: str | Sequence[str] = (),
    dose: str | None = None,
) -> Keys:
    """The keys of an evaluation; the dose is the last of the conditions where it is not among them."""
    named, shared = (((keys,) if isinstance(keys, str) else tuple(keys)) for keys in (conditions, contexts))
    label = control if isinstance(control, str) else None
    extra = () if dose is None or dose in named else (dose,)
    return Keys(Labels(perturbation, label, separator, dose), shared, (*named, *extra))


def find_dose(keys: Keys, obs: pd.DataFrame) -> Keys:
    """The keys with the one of the conditions as dose that holds numbers which can be doses, if there is one."""
    for key in keys.conditions if keys.labels.dose_key is None else ():
        labels = replace(keys.labels, dose_key=key)
        if key in obs and pd.api.types.is_numeric_dtype(obs[key]):
            try:
                labels.read(obs)
            except ValueError:
                continue
            return replace(keys, labels=labels)
    return keys


def group_cells(adata: AnnData, keys: Keys, where: str) -> dict[Condition, NDArray[np.intp]]:
    """Row numbers of the treated cells of every condition, in order of first appearance."""
    for key in keys.all:
        check_obs_key(adata, key, f"{where}: key")
    read, dose = keys.labels.read(adata.obs, f"{where}.obs"), keys.labels.dose_key
    columns = read_text(adata.obs, [key for key in keys.all[:-1] if key != dose], f"{where}.obs")
    columns[keys.perturbation] = read[PERTURBATION].to_numpy()
    if dose is not None:
        columns[dose] = read[DOSE].to_numpy()
    treated = np.flatnonzero(~keys.labels.is_control(read))
    groups = columns[list(keys.all)].iloc[treated].groupby(list(keys.all), sort=False).indices
    return {name if isinstance(name, tuple) else (name,): treated[rows] for name, rows in groups.items()}


def group_contexts(
    adata: AnnData, keys: Keys, where: str, rows: NDArray[np.intp] | None = None
) -> dict[Condition, NDArray[np.intp]]:
    """Those of `rows` (`None`: all) in every context."""
    for key in keys.contexts:
        check_obs_key(adata, key, f"{where}: key")
    rows = np.arange(adata.n_obs) if rows is None else rows
    codes, contexts = read_contexts(adata.obs.iloc[rows], keys.contexts, f"{where}.obs")
    return {context: rows[codes == i] for i, context in enumerate(contexts)}


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
    check_counts(counts, matrix_name(layer, where), empty_cells=True, argument="layer_pred or layer_real")
    return log_normalize(counts, target_sum)


def split_control(
    real: AnnData, control: str | AnnData, keys: Keys
) -> tuple[dict[Condition, NDArray[np.intp]], AnnData, dict[Condition, NDArray[np.intp]]]:
    """Real perturbed cells per condition, the AnnData that holds the controls, and controls per context.

    `control` is the label of the control cells in `real`, or an AnnData of control cells.
    """
    check_obs_key(real, keys.perturbation, "perturbation_key")
    if not isinstance(control, str):
        return group_cells(real, keys, "real"), control, group_contexts(control, keys, "control")
    keys.labels.check_control(real.obs, "real.obs")
    controls = np.flatnonzero(keys.labels.control_cells(real.obs))
    return group_cells(real, keys, "real"), real, group_contexts(real, keys, "real", controls)


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
