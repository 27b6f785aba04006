"""What a call of `predict` asks for: populations, each a perturbation for a group of control cells."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from scperturbdiff.data import (
    DOSE,
    FEW_CELLS,
    N_CELLS,
    PERTURBATION,
    ConditionSpace,
    Groups,
    cells_wanted,
    check_obs_key,
    check_plain,
    group_rows,
    look_alikes,
    preview,
    read_numbers,
)

if TYPE_CHECKING:
    from anndata import AnnData


logger = logging.getLogger(__name__)

_LABEL, _DOSE_TEXT = "__label", "__dose_given"


@dataclass(frozen=True)
class ControlGroups:
    """Control cells of a call, grouped by context, covariates and batch.

    Attributes
    ----------
    labels
        One row per group, columns `ConditionSpace.obs_keys`.
    cells
        Rows of the cells of each group in the AnnData, in the order of their names.
    """

    labels: pd.DataFrame
    cells: Groups


@dataclass(frozen=True)
class PopulationRequest:
    """Populations to generate, one a row.

    Attributes
    ----------
    table
        :data:`PERTURBATION`, :data:`DOSE` (canonical) and the condition's own covariates.
    label, dose
        As the user wrote them.
    group
        Number of the control group of each.
    n_cells
        Cells wanted of each.
    repeat
        How often the same was asked for before.
    """

    table: pd.DataFrame
    label: list[str]
    dose: list[Any]
    group: list[int]
    n_cells: list[int]
    repeat: list[int]

    def __len__(self) -> int:
        return len(self.group)


def read_controls(space: ConditionSpace, adata: AnnData, wanted: pd.DataFrame | None = None) -> ControlGroups:
    """Find and group the control cells of `adata`.

    A covariate that the request gives chooses among them, if there are control cells for all that is asked for. Else,
    and where the cells do not have the covariate, they are taken as if they had it.

    Parameters
    ----------
    space
        The model's conditions.
    adata
        Cells. Without the perturbation column all of them are controls; with it, those with the control label.
    wanted
        What :func:`read_wanted` gives, for covariates.

    Raises
    ------
    KeyError
        If a column is missing.
    ValueError
        If there is no control cell.
    """
    asked = [] if wanted is None else [key for key in space.covariate_keys if key in wanted]
    keys = [key for key in space.obs_keys if key not in asked or key in adata.obs]
    for key in keys:
        check_obs_key(adata, key, "predict needs the same columns as setup_anndata:")
    rows = np.arange(adata.n_obs)
    if space.perturbation_key is not None and space.perturbation_key in adata.obs:
        rows = np.flatnonzero(space.labels.control_cells(adata.obs))
        if rows.size == 0:
            values = adata.obs[space.perturbation_key].astype(str).unique()
            raise ValueError(
                f"adata has no control cells: obs[{space.perturbation_key!r}] is never {space.control!r}. "
                f"Values: {preview(values)}."
            )
    if rows.size == 0:
        raise ValueError("adata has no cells.")
    rows = rows[np.argsort(adata.obs_names[rows].to_numpy().astype(str), kind="stable")]
    obs = adata.obs.iloc[rows]
    keys = [key for key in keys if wanted is None or key not in asked or _have_controls(space, obs, wanted, key)]
    check_plain(obs, [key for key in keys if key not in space.continuous_keys])
    for key in keys:
        if obs[key].isna().any():
            raise ValueError(f"obs[{key!r}] is missing (NaN) for {int(obs[key].isna().sum())} control cells.")
    labels, codes = group_rows(obs, keys)
    return ControlGroups(labels, Groups.from_codes(codes, rows, len(labels)))


def _have_controls(space: ConditionSpace, obs: pd.DataFrame, wanted: pd.DataFrame, key: str) -> bool:
    """Whether, for each row that is asked for, there are control cells with this value of a covariate."""
    chosen = [k for k in (*space.context_keys, space.batch_key, key) if k and k in wanted and k in obs]
    there, asked = (pd.MultiIndex.from_arrays([_comparable(space, k, of[k]) for k in chosen]) for of in (obs, wanted))
    lacks = ~asked.isin(there)
    if lacks.any() and not lacks.all():
        text = "No control cells for %s with %s: for all that is asked for, controls are taken as if they had %s."
        named = wanted.loc[lacks, [PERTURBATION, key]].astype(str).agg(", ".join, axis=1)
        logger.warning(text, preview(named), key, key)
    return not lacks.any()


def _comparable(space: ConditionSpace, key: str, values: pd.Series) -> pd.Series:
    """Numbers of continuous covariates, else text."""
    return pd.to_numeric(values, errors="coerce") if key in space.continuous_keys else values.astype(str)


def read_wanted(space: ConditionSpace, perturbations: Any) -> pd.DataFrame:
    """The request as a table: canonical perturbation and dose, and whatever else the user asked for.

    Parameters
    ----------
    space
        The model's conditions.
    perturbations
        Names, or a DataFrame with a column named like the perturbation key (or ``"perturbation"``) and, as wanted, the
        dose key, covariates, context and batch keys (to choose among control cells) and ``n_cells``.
    """
    if isinstance(perturbations, str):
        raise TypeError(
            f"perturbations={perturbations!r} must be a list of names or a DataFrame; pass [{perturbations!r}]."
        )
    if not isinstance(perturbations, pd.DataFrame | Iterable):
        raise TypeError(f"perturbations={perturbations!r} must be a list of names or a DataFrame.")
    if isinstance(perturbations, pd.DataFrame):
        wanted = perturbations.reset_index(drop=True).copy()
    else:
        wanted = pd.DataFrame({str(space.perturbation_key): pd.Series(list(perturbations), dtype=object)})
    name = space.perturbation_key if space.perturbation_key in wanted else "perturbation"
    if name not in wanted:
        raise KeyError(f"perturbations has no column {space.perturbation_key!r}. Columns: {preview(wanted.columns)}.")
    allowed = {name, space.dose_key, N_CELLS, *space.obs_keys}
    extra = [column for column in wanted.columns if column not in allowed]
    if extra:
        raise KeyError(
            f"perturbations has columns the model knows nothing of: {preview(extra)}. "
            f"Allowed: {preview(sorted(filter(None, allowed)))}."
        )
    if len(wanted) == 0:
        raise ValueError("perturbations is empty.")
    if space.dose_key is not None and space.dose_key not in wanted:
        raise ValueError(
            f"The model was set up with dose_key={space.dose_key!r}: give a dose for each perturbation, "
            f"e.g. pd.DataFrame({{{name!r}: [...], {space.dose_key!r}: [...]}})."
        )
    written = wanted.rename(columns={name: str(space.perturbation_key)}).astype({str(space.perturbation_key): object})
    canonical = space.labels.read(written)
    wanted[PERTURBATION], wanted[DOSE] = canonical[PERTURBATION], canonical[DOSE]
    is_list = wanted[name].map(lambda label: isinstance(label, list | tuple | set | np.ndarray))
    wanted[_LABEL] = wanted[name].astype(str).where(~is_list, canonical[PERTURBATION])
    wanted[_DOSE_TEXT] = _one_type(wanted[space.dose_key], canonical[DOSE]) if space.dose_key is not None else ""
    space.encode_perturbations(wanted)  # unknown components raise before anything is computed
    for key in space.continuous_keys:
        if key in wanted:
            read_numbers(wanted[key], key, "rows")
            wanted[key] = pd.to_numeric(wanted[key])  # of a text
    return wanted


def _one_type(doses: pd.Series, read: pd.Series) -> pd.Series:
    """Doses as numbers where all are, also as text, else as text: a column of both cannot be written to a file."""
    is_list = doses.map(lambda dose: isinstance(dose, list | tuple | np.ndarray))
    try:
        return doses.astype(float)
    except (TypeError, ValueError):  # of several components
        return doses.astype(str).where(~is_list, read)


def plan_request(
    space: ConditionSpace, wanted: pd.DataFrame, groups: ControlGroups, n_cells: int | None
) -> PopulationRequest:
    """Cross the wanted perturbations with the control groups.

    `n_cells` counts the cells of one perturbation in one context; batches share them in proportion to their controls.
    """
    chosen_by = [key for key in groups.labels.columns if key in wanted]
    given = [key for key in space.obs_keys if key not in groups.labels.columns]
    comparable, asked = ({k: _comparable(space, k, of[k]) for k in chosen_by} for of in (groups.labels, wanted))
    contexts = space.context_labels(groups.labels).to_numpy() if len(groups.labels) else np.empty(0)
    rows, label, dose, group, number = [], [], [], [], []
    for i in range(len(wanted)):
        row = wanted.iloc[i]
        fits = np.ones(len(groups.cells), bool)
        for key in chosen_by:
            fits &= (comparable[key] == asked[key].iloc[i]).to_numpy()
        if not fits.any():
            named = {key: row[key] for key in chosen_by}
            raise ValueError(
                f"No control cells for {row[_LABEL]!r} with {named}. "
                f"Groups: {preview(groups.labels.astype(str).agg(' / '.join, axis=1))}."
            )
        for context in dict.fromkeys(contexts[fits]):
            members = np.flatnonzero(fits & (contexts == context))
            sizes = groups.cells.count[members]
            total = cells_wanted(row.get(N_CELLS, n_cells), int(sizes.sum()))
            for member, n in zip(members, _share(total, sizes), strict=True):
                if n:
                    # column by column: a row of numbers would be of one type
                    own = {key: row[key] for key in given} | {k: groups.labels[k].iloc[member] for k in groups.labels}
                    rows.append({PERTURBATION: row[PERTURBATION], DOSE: row[DOSE], **own})
                    label.append(row[_LABEL])
                    dose.append(row[_DOSE_TEXT])
                    group.append(int(member))
                    number.append(int(n))
    table = pd.DataFrame(rows)
    keys = [PERTURBATION, DOSE, *space.obs_keys]
    repeat = table[keys].astype(str).groupby(keys, sort=False).cumcount().tolist()
    return PopulationRequest(table, label, dose, group, number, repeat)


def tell_of_request(space: ConditionSpace, request: PopulationRequest, groups: ControlGroups) -> list[str]:
    """Warn of contexts that look like known ones, and of groups of few control cells, whose names are returned."""
    contexts = space.context_labels(request.table).unique()
    if found := look_alikes(contexts, space.contexts):
        named = preview(f"{new} (known: {known})" for new, known in found.items())
        text = "%d contexts are new to the model but for case, spaces or the form of a number: %s."
        logger.warning(text, len(found), named.replace("\\x1f", ", "))
    few = [group for group in sorted(set(request.group)) if groups.cells.count[group] < FEW_CELLS]
    names = [" / ".join(map(str, groups.labels.iloc[group])) or "all" for group in few]
    if names:
        text = "%d groups have fewer than %d control cells, from which little can be told: %s."
        logger.warning(text, len(names), FEW_CELLS, preview(names))
    return names


def _share(total: int, sizes: np.ndarray) -> np.ndarray:
    """Split `total` in proportion to `sizes`, largest remainders first."""
    exact = total * sizes / sizes.sum()
    out = np.floor(exact).astype(int)
    order = np.argsort(-(exact - out), kind="stable")
    out[order[: total - out.sum()]] += 1
    return out
