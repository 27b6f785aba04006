"""What columns of annotation may be called, which parts they may play, and what they may hold."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pandas as pd

from scperturbdiff.data._messages import check_text
from scperturbdiff.data._output import CONTROL_CELL, POPULATION

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

RESERVED = frozenset({
    CONTROL_CELL, POPULATION, "_index", "n_cells", "n_controls", "exact_match", "held_out", "novelty",
    "unexplained_variance", "control_mean", "predicted_mean", "log2_fold_change", "observed_mean",
    "observed_log2_fold_change", "n_observed", "n_draws", "spread", "far_from_training", "mean_shift", "lower", "upper",
})  # fmt: skip
"""Columns of predictions and of tables, which a column of the user's would replace."""
INTERNAL = ("__", "_scvi")
"""How names begin that this package and scvi-tools use inside."""
PLAIN_KINDS = ("string", "integer", "floating", "boolean", "empty")
"""Kinds of values, as pandas names them, that are the same as text in every table and can be written to files."""


def check_roles(
    perturbation: str | None,
    dose: str | None,
    contexts: Sequence[str],
    categorical: Sequence[str],
    continuous: Sequence[str],
    batch: str | None,
) -> None:
    """Raise a `ValueError` where a column has a name of ours, or plays two parts; a batch may be a context, too."""
    of_cells = {"context_keys": contexts, "categorical_covariate_keys": categorical}
    several = of_cells | {"continuous_covariate_keys": continuous}
    single = {"perturbation_key": perturbation, "dose_key": dose}
    parts = [(argument, key) for argument, key in single.items() if key is not None]
    parts += [(argument, key) for argument, keys in several.items() for key in keys]
    parts += [] if batch is None or any(batch in keys for keys in of_cells.values()) else [("batch_key", batch)]
    seen: dict[str, str] = {}
    for argument, key in parts:
        if key in seen:
            raise ValueError(
                f"obs[{key!r}] is named by {seen[key]} and by {argument}, but a column plays one part. Leave it out of "
                "one of them."
            )
        if key in RESERVED or key.startswith(INTERNAL) or (argument not in single and key in ("perturbation", "dose")):
            raise ValueError(
                f"{argument}={key!r} is a name that predictions and tables of the model use. Copy the column under "
                f"another one: adata.obs['my_{key.strip('_')}'] = adata.obs[{key!r}]."
            )
        seen[key] = argument


def check_plain(obs: pd.DataFrame, keys: Iterable[str], where: str = "obs") -> None:
    """Raise a `ValueError` for columns of dates, of numbers and text, or of anything else that is neither."""
    for key in keys:
        column = obs[key]
        values = column.cat.categories if isinstance(column.dtype, pd.CategoricalDtype) else pd.unique(column.dropna())
        kind = pd.api.types.infer_dtype(values, skipna=True)
        if kind not in PLAIN_KINDS:
            raise ValueError(
                f"{where}[{key!r}] holds values of kind {kind!r}, which are not the same in every table. Make text of "
                f"them: adata.obs[{key!r}] = adata.obs[{key!r}].astype(str)."
            )
        if kind == "string":
            check_text(values, f"{where}[{key!r}]")


def check_few_values(obs: pd.DataFrame, keys: Iterable[str], cells: int = 100, share: float = 0.9) -> None:
    """Raise a `ValueError` for a column that is different in nearly all of more than `cells` treated cells."""
    for key in keys:
        n = obs[key].nunique()
        if len(obs) > cells and n > share * len(obs):
            raise ValueError(
                f"obs[{key!r}] has {n} different values in {len(obs)} treated cells: nearly each would be a population "
                "of its own. Round it, bin it with pandas.cut(...).astype(str), or leave it out."
            )


def look_alikes(names: Iterable[str], known: Iterable[str]) -> dict[str, str]:
    """Those of `names` that differ from one of `known` by case, outer spaces or the form of a number, and that one."""
    known = list(known)
    plain = {_plain(name): name for name in known}
    return {name: plain[_plain(name)] for name in sorted(set(names) - set(known)) if _plain(name) in plain}


def _plain(name: str) -> str:
    parts = [part.strip().casefold() for part in name.split("\x1f")]
    return "\x1f".join(part.removesuffix(".0") if part.removesuffix(".0").isdigit() else part for part in parts)
