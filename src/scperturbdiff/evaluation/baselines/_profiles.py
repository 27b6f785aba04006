"""Mean expression of every (context, perturbation, dose) in the training cells."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from scperturbdiff.data import (
    DOSE,
    PERTURBATION,
    check_layer,
    check_obs_key,
    context_name,
    get_matrix,
    grouped_sums,
    log_normalize,
    member_weights,
    parse_doses,
    preview,
    read_contexts,
)
from scperturbdiff.evaluation.baselines._sampling import PSEUDO, TARGET_SUM

if TYPE_CHECKING:
    from anndata import AnnData
    from numpy.typing import NDArray
    from scipy import sparse

    from scperturbdiff.data import Labels

    Context = tuple[str, ...]
    Doses = tuple[float, ...]
    """One dose a component, in the order of their names; none without a dose column."""
    Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Profiles:
    """Means over cells; row numbers by context, name of the perturbation and doses."""

    log_means: Floats
    """Mean of `log1p(counts per 10,000)`, shape `(n_conditions, n_genes)`."""
    means: Floats
    """Mean of counts per 10,000, shape `(n_conditions, n_genes)`."""
    controls: dict[Context, int]
    """Row of each context's controls."""
    treated: dict[Context, dict[str, dict[Doses, int]]]
    """Row of each treated condition."""

    def shift(self, context: Context, label: str, doses: Doses, *, fold: bool = False) -> Floats:
        """Treated minus control mean of log-normalised expression, or (`fold`) the log ratio of mean expression.

        The doses are the nearest measured ones on the logarithmic scale; those of another number of components count as
        their geometric mean.
        """
        rows = self.treated[context][label]
        row = rows[min(rows, key=lambda measured: _distance(measured, doses)) if len(rows) > 1 else next(iter(rows))]
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


def _distance(measured: Doses, asked: Doses) -> float:
    logs, wanted = np.log(measured), np.log(asked)
    return float(np.linalg.norm(logs - (wanted if len(wanted) == len(logs) else wanted.mean())))


def read_profiles(adata: AnnData, labels: Labels, context_keys: tuple[str, ...], layer: str | None) -> Profiles:
    """Read, check and average the training cells; see :meth:`Baseline.fit`."""
    keys = {"perturbation_key": labels.key} | ({} if labels.dose_key is None else {"dose_key": labels.dose_key})
    for argument, key in [*keys.items(), *(("context_keys", key) for key in context_keys)]:
        check_obs_key(adata, key, argument)
    check_layer(adata, layer)
    labels.check_control(adata.obs)
    table = labels.read(adata.obs)
    table["context"], contexts = read_contexts(adata.obs, context_keys)
    grouped = table.groupby(["context", PERTURBATION, DOSE], sort=True)
    log_means, means = _group_means(adata, layer, grouped.ngroup().to_numpy(), grouped.ngroups)
    controls: dict[Context, int] = {}
    treated: dict[Context, dict[str, dict[Doses, int]]] = {}
    rows = grouped.size().reset_index()
    each = zip(rows["context"], rows[PERTURBATION], rows[DOSE], labels.is_control(rows), strict=True)
    for row, (code, label, doses, is_control) in enumerate(each):
        if is_control:
            controls[contexts[code]] = row
        else:
            treated.setdefault(contexts[code], {}).setdefault(label, {})[parse_doses(doses)] = row
    bare = sorted(context_name(context) for context in treated if context not in controls)
    if bare:
        raise ValueError(f"{len(bare)} contexts have treated cells but no control cell: {preview(bare)}.")
    return Profiles(log_means, means, controls, treated)


def _group_means(adata: AnnData, layer: str | None, group: NDArray[np.integer], n_groups: int) -> tuple[Floats, Floats]:
    def both(counts: sparse.csr_matrix, rows: NDArray[np.intp]) -> tuple[sparse.csr_matrix, sparse.csr_matrix]:
        logged = log_normalize(counts, TARGET_SUM)
        return logged, logged.expm1()

    weights = member_weights(group, np.arange(adata.n_obs), (n_groups, adata.n_obs))
    log_sum, total = grouped_sums(get_matrix(adata, layer), weights, both)
    size = np.bincount(group, minlength=n_groups)[:, None]
    return log_sum / size, total / size
