"""Mean expression of every (context, perturbation, dose) in the training cells."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
from scipy import sparse

from scperturbdiff.data import (
    CHUNK_ROWS,
    canonical_label,
    check_layer,
    check_obs_key,
    closest,
    log_normalize,
    preview,
    read_genes,
    split_label,
)
from scperturbdiff.evaluation.baselines._sampling import PSEUDO, TARGET_SUM

if TYPE_CHECKING:
    from collections.abc import Sequence

    from anndata import AnnData
    from numpy.typing import NDArray

    Context = tuple[str, ...]
    Floats = NDArray[np.float64]


NO_DOSE = 0.0
"""Dose of everything when no dose column is used."""


@dataclass(frozen=True)
class Profiles:
    """Means over cells; row numbers by context, canonical perturbation and dose."""

    log_means: Floats
    """Mean of `log1p(counts per 10,000)`, shape `(n_conditions, n_genes)`."""
    means: Floats
    """Mean of counts per 10,000, shape `(n_conditions, n_genes)`."""
    controls: dict[Context, int]
    """Row of each context's controls."""
    treated: dict[Context, dict[str, dict[float, int]]]
    """Row of each treated condition."""

    def shift(self, context: Context, label: str, dose: float, *, fold: bool = False) -> Floats:
        """Treated minus control mean of log-normalised expression, or (`fold`) the log ratio of mean expression.

        The dose is the nearest measured one on the logarithmic scale.
        """
        doses = self.treated[context][label]
        if len(doses) == 1:
            (row,) = doses.values()
        else:
            row = doses[min(doses, key=lambda measured: abs(np.log(measured) - np.log(dose)))]
        control = self.controls[context]
        if fold:
            return np.log(self.means[row] + PSEUDO) - np.log(self.means[control] + PSEUDO)
        return self.log_means[row] - self.log_means[control]

    def contexts_with(self, label: str) -> list[Context]:
        """Contexts in which a perturbation was measured."""
        return [context for context, labels in self.treated.items() if label in labels]

    @property
    def labels(self) -> list[str]:
        """Perturbations measured in any context."""
        return sorted({label for labels in self.treated.values() for label in labels})


def read_contexts(obs: pd.DataFrame, keys: Sequence[str]) -> tuple[NDArray[np.intp], list[Context]]:
    """Number of every cell's context, and the contexts as tuples of text, sorted."""
    if not keys:
        return np.zeros(len(obs), dtype=np.intp), [()]
    for key in keys:
        missing = int(obs[key].isna().sum())
        if missing:
            raise ValueError(f"obs[{key!r}] is missing in {missing} of {len(obs)} cells. Remove or label them.")
    columns = [pd.factorize(obs[key].astype(str), sort=True) for key in keys]
    code = np.ravel_multi_index([codes for codes, _ in columns], [len(names) for _, names in columns])
    found, number = np.unique(code, return_inverse=True)
    parts = np.unravel_index(found, [len(names) for _, names in columns])
    named = [[str(names[i]) for i in part] for part, (_, names) in zip(parts, columns, strict=True)]
    return number, list(zip(*named, strict=True))


def read_profiles(
    adata: AnnData,
    perturbation_key: str,
    control: str,
    context_keys: Sequence[str],
    dose_key: str | None,
    layer: str | None,
    separator: str,
) -> Profiles:
    """Check the training cells and average them, in blocks of rows."""
    for key, argument in ((perturbation_key, "perturbation_key"), (dose_key, "dose_key")):
        if key is not None:
            check_obs_key(adata, key, argument)
    for key in context_keys:
        check_obs_key(adata, key, "context_keys")
    check_layer(adata, layer)
    obs = adata.obs
    missing = int(obs[perturbation_key].isna().sum())
    if missing:
        raise ValueError(f"adata.obs[{perturbation_key!r}] is missing in {missing} of {adata.n_obs} cells.")
    names = obs[perturbation_key].astype(str)
    if not (names == control).any():
        near = closest(control, names.unique())
        hint = f" Did you mean {preview(near)}?" if near else ""
        raise ValueError(
            f"control={control!r} does not occur in adata.obs[{perturbation_key!r}].{hint} "
            f"Values: {preview(sorted(names.unique()), 30)}."
        )
    canonical = {name: canonical_label(split_label(name, separator), separator) for name in names.unique()}
    canonical[control] = control
    doses = _read_doses(obs, dose_key, (names == control).to_numpy())
    context_code, contexts = read_contexts(obs, context_keys)
    labels = names.map(canonical).to_numpy()
    table = pd.DataFrame({"context": context_code, "label": labels, "dose": doses})
    grouped = table.groupby(["context", "label", "dose"], sort=True)
    log_means, means = _group_means(adata, layer, grouped.ngroup().to_numpy(), grouped.ngroups)
    controls: dict[Context, int] = {}
    treated: dict[Context, dict[str, dict[float, int]]] = {}
    rows = grouped.size().reset_index()
    for row, (code, label, dose) in enumerate(zip(rows["context"], rows["label"], rows["dose"], strict=True)):
        context = contexts[code]
        if label == control:
            controls[context] = row
        else:
            treated.setdefault(context, {}).setdefault(label, {})[float(dose)] = row
    bare = sorted(", ".join(context) for context in treated if context not in controls)
    if bare:
        raise ValueError(f"{len(bare)} contexts have treated cells but no control cell: {preview(bare)}.")
    return Profiles(log_means, means, controls, treated)


def _read_doses(obs: pd.DataFrame, dose_key: str | None, is_control: NDArray[np.bool_]) -> Floats:
    if dose_key is None:
        return np.full(len(obs), NO_DOSE)
    doses = np.where(is_control, NO_DOSE, pd.to_numeric(obs[dose_key], errors="coerce").to_numpy(dtype=float))
    bad = ~is_control & ~((doses > 0) & np.isfinite(doses))
    if bad.any():
        raise ValueError(f"obs[{dose_key!r}] must be a positive number in treated cells; {int(bad.sum())} are not.")
    return doses


def _group_means(adata: AnnData, layer: str | None, group: NDArray[np.integer], n_groups: int) -> tuple[Floats, Floats]:
    log_sum = np.zeros((n_groups, adata.n_vars))
    total = np.zeros((n_groups, adata.n_vars))
    for start in range(0, adata.n_obs, CHUNK_ROWS):
        rows = np.arange(start, min(start + CHUNK_ROWS, adata.n_obs))
        logged = log_normalize(read_genes(adata, None, layer, rows), TARGET_SUM)
        member = sparse.csr_matrix((np.ones(rows.size), (group[rows], np.arange(rows.size))), (n_groups, rows.size))
        log_sum += (member @ logged).toarray()
        logged.data = np.expm1(logged.data)
        total += (member @ logged).toarray()
    size = np.bincount(group, minlength=n_groups)[:, None]
    return log_sum / size, total / size
