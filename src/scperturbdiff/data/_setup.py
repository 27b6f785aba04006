"""What set-up reads from the annotation of training cells, and what the registry of a saved model keeps of it."""

from __future__ import annotations

import logging
import re
from dataclasses import replace
from types import NoneType
from typing import TYPE_CHECKING, Any

import numpy as np
from anndata.abc import CSCDataset
from scipy import sparse

from scperturbdiff.arguments import check_texts, check_type
from scperturbdiff.data._advice import other_separator, warn_of_cells, warn_of_few_controls
from scperturbdiff.data._annotation import check_few_values, check_plain, check_roles, look_alikes
from scperturbdiff.data._conditions import ConditionSpace, read_numbers
from scperturbdiff.data._counts import check_layer, check_unique_names, get_matrix, matrix_name
from scperturbdiff.data._features import FeatureTable
from scperturbdiff.data._labels import DOSE, PERTURBATION, Labels, check_not_missing, parse_doses
from scperturbdiff.data._messages import check_obs_keys, check_text, preview
from scperturbdiff.data._mudata import check_cells

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import pandas as pd
    from anndata import AnnData


logger = logging.getLogger(__name__)


def learn_conditions(
    adata: AnnData,
    *,
    perturbation_key: str | None,
    control: str | None,
    context_keys: Sequence[str] | str | None,
    batch_key: str | None,
    dose_key: str | None,
    categorical_covariate_keys: Sequence[str] | None,
    continuous_covariate_keys: Sequence[str] | None,
    perturbation_embeddings: Any,
    control_match_keys: Sequence[str] | None,
    separator: str | None,
) -> ConditionSpace:
    """Check the annotation of `adata` and read the space of conditions from it; messages name what is wrong."""
    for name, value in (
        ("perturbation_key", perturbation_key),
        ("batch_key", batch_key),
        ("dose_key", dose_key),
        ("separator", separator),
    ):
        check_type(name, value, (str, NoneType), "a text or None")
    check_type("control", control, (str, int, float, np.generic, NoneType), "the label of control cells")
    contexts = check_texts("context_keys", context_keys)
    categorical = check_texts("categorical_covariate_keys", categorical_covariate_keys)
    continuous = check_texts("continuous_covariate_keys", continuous_covariate_keys)
    check_obs_keys(
        adata,
        perturbation_key=perturbation_key,
        context_keys=contexts,
        batch_key=batch_key,
        dose_key=dose_key,
        categorical_covariate_keys=categorical,
        continuous_covariate_keys=continuous,
        control_match_keys=check_texts("control_match_keys", control_match_keys),
    )
    if perturbation_key is None and dose_key is not None:
        raise ValueError(f"dose_key={dose_key!r} needs a perturbation_key.")
    if perturbation_key is not None and control is None:
        raise ValueError("control=... is needed: the value of the perturbation column that marks control cells.")
    check_roles(perturbation_key, dose_key, contexts, categorical, continuous, batch_key)
    space = ConditionSpace(
        perturbation_key,
        None if control is None else str(control),
        separator,
        contexts,
        batch_key,
        dose_key,
        categorical,
        continuous,
        (),
        features=None if perturbation_embeddings is None else FeatureTable.parse(perturbation_embeddings, adata),
        scales={key: _scale(adata.obs[key], key) for key in continuous},
    )
    match = space.obs_keys if control_match_keys is None else check_texts("control_match_keys", control_match_keys)
    space = replace(space, control_match_keys=match)
    if stray := [key for key in space.control_match_keys if key not in space.obs_keys]:
        raise ValueError(
            f"control_match_keys has {preview(stray)}, on which the cells of a population may differ. Allowed: "
            f"contexts, covariates and batch ({preview(space.obs_keys)})."
        )
    for key in space.obs_keys:
        check_not_missing(adata.obs[key], key)
    categories = {key: tuple(sorted(adata.obs[key].astype(str).unique())) for key in categorical}
    space = replace(space, categories=categories)
    check_plain(adata.obs, [key for key in space.obs_keys if key not in continuous])
    if perturbation_key is not None:
        space.labels.check_control(adata.obs)
        _tell_of_combinations(space.labels, adata.obs)
    labels = space.read_labels(adata.obs)
    check_few_values(labels.loc[~space.is_control(labels)], space.obs_keys)
    space = _learn_perturbations(space, labels)
    _warn_of_look_alikes(space)
    if perturbation_key is not None:
        warn_of_few_controls(space, labels)
    return space


def _warn_of_look_alikes(space: ConditionSpace) -> None:
    """Names that are probably meant to be the same."""
    perturbations = look_alikes(space.components, [str(space.control)])
    contexts = {name: other for name in space.contexts for other in look_alikes(space.contexts, [name]) if name < other}
    for found, what in ((perturbations, "perturbations differ from the control"), (contexts, "contexts differ")):
        if found:
            named = "; ".join(preview(pair) for pair in found.items())
            logger.warning("%d %s by case, spaces or the form of a number: %s.", len(found), what, named)


def _scale(column: pd.Series, key: str) -> tuple[float, float]:
    values = read_numbers(column, key, "cells")
    return float(values.mean()), float(values.std()) or 1.0


def _tell_of_combinations(labels: Labels, obs: pd.DataFrame) -> None:
    """Log how many labels are combinations, and what looks as if a name had been taken for one."""
    found = {label: labels.components(label) for label in labels.parse(obs[labels.key])[1]}
    check_text((part for parts in found.values() for part in parts), f"obs[{labels.key!r}]")
    combined = {label: parts for label, parts in found.items() if len(parts) > 1}
    if not combined:
        other = None if labels.separator is None else other_separator(found, str(labels.control), labels.separator)
        if other is not None:
            text = "No label has separator=%r, but %d would be combinations of others with separator=%r: %s."
            logger.warning(text, labels.separator, len(other[1]), other[0], preview(other[1]))
        return
    joined, remedy = "lists of names", ""
    if labels.separator and any(isinstance(label, str) for label in combined):
        joined = f"joined by {labels.separator!r}"
        remedy = f" Where names hold {labels.separator!r}, pass separator=None, another one, or lists of names."
    n = sum(parts != () for parts in found.values())
    logger.info("%d of %d labels of obs[%r] were read as combinations, %s.", len(combined), n, labels.key, joined)
    alone = {parts[0] for parts in found.values() if len(parts) == 1}
    if never := sorted({part for parts in combined.values() for part in parts} - alone):
        logger.warning("%d components occur only in combinations: %s.%s", len(never), preview(never), remedy)
    if cut := [label for label in combined if isinstance(label, str) and _looks_cut(label, str(labels.separator))]:
        logger.warning("%d labels look cut at %r: %s.%s", len(cut), labels.separator, preview(cut), remedy)


def _looks_cut(label: str, separator: str) -> bool:
    """Whether parts have open brackets, begin or end with punctuation, or have a space at one side of the separator."""
    parts = label.split(separator)
    if any(left.endswith(" ") != right.startswith(" ") for left, right in zip(parts, parts[1:], strict=False)):
        return True
    odd = re.compile(r"^[^\w(\[]|[^\w)\]]$")
    return any(
        odd.search(part) or any(part.count(a) != part.count(b) for a, b in ("()", "[]"))
        for part in map(str.strip, parts)
    )


def _learn_perturbations(space: ConditionSpace, labels: pd.DataFrame) -> ConditionSpace:
    shown = labels.loc[~space.is_control(labels)]
    contexts = tuple(sorted(space.context_labels(shown[list(space.context_keys)].drop_duplicates()).unique()))
    treated = shown[[PERTURBATION, DOSE]].drop_duplicates()
    parts = [space.labels.components(label) for label in treated[PERTURBATION]]
    names = {name for components in parts for name in components}
    doses: dict[str, list[float]] = {}
    for components, text in zip(parts, treated[DOSE], strict=True):
        for name, dose in zip(components, parse_doses(text), strict=bool(text)):
            doses.setdefault(name, []).append(dose)
    ranges = {name: (min(given), max(given)) for name, given in doses.items()}
    reference = float(np.median(np.concatenate(list(doses.values())))) if doses else 1.0
    if space.features is not None and names and names.isdisjoint(space.features.names):
        raise ValueError(
            f"perturbation_embeddings has no row for any perturbation in training ({preview(sorted(names))}), so "
            f"nothing could be learned from it. Its rows: {preview(space.features.names)}."
        )
    return replace(
        space, components=tuple(sorted(names)), contexts=contexts, dose_reference=reference, dose_range=ranges
    )


CONDITIONS = "scperturbdiff_conditions"
"""Key of the registry with the condition space, as plain dictionaries and arrays."""


def stored_space(registry: Mapping[str, Any]) -> ConditionSpace:
    """The condition space kept in a registry."""
    stored = dict(registry[CONDITIONS])
    if stored["features"] is not None:
        stored["features"] = FeatureTable(**stored["features"])
    return ConditionSpace(**stored)


def stored_batches(registry: Mapping[str, Any]) -> list[str]:
    """Names of the batches the decoder tells apart, in the order of their codes."""
    state = registry["field_registries"]["batch"]["state_registry"]
    return [str(name) for name in state["categorical_mapping"]]


def stored_genes(registry: Mapping[str, Any]) -> list[str]:
    """Names of the genes, in order."""
    return [str(name) for name in registry["field_registries"]["X"]["state_registry"]["column_names"]]


def stored_layer(registry: Mapping[str, Any]) -> str | None:
    """Layer with the counts at setup, `None` for X."""
    arguments = registry["setup_args"]
    layer: str | None = arguments.get("layer", arguments.get("rna_layer"))
    return layer


def read_space(adata: AnnData, layer: str | None, source: Mapping[str, Any] | None, **keys: Any) -> ConditionSpace:
    """Check counts in `layer` and names, then take the conditions of a saved model or learn them from `adata`.

    Of cells on disk some are checked, as all are when they are read.
    `source` is the registry of the saved model, if one is loaded; `keys` are those of :func:`learn_conditions`.
    """
    check_cells(adata)
    check_unique_names(adata)
    matrix, name = get_matrix(adata, layer), matrix_name(layer)
    if isinstance(matrix, CSCDataset):
        raise TypeError(
            f"{name} is on disk gene by gene (CSC), so that each cell would need all of it. Store it cell by cell: "
            f"{name} = {name}.to_memory().tocsr(), then write it anew."
        )
    totals = check_layer(adata, layer, sample=True)
    if isinstance(matrix, sparse.sparray):
        raise TypeError(f"scvi-tools does not read sparse arrays: {name} = scipy.sparse.csr_matrix({name}).")
    if source is None:
        warn_of_cells(adata, layer, totals)
        return learn_conditions(adata, **keys)
    check_genes(adata, source)
    return stored_space(source)


def check_genes(adata: AnnData, registry: Mapping[str, Any]) -> None:
    """Raise a `ValueError` unless `adata` has the genes of the registry in the same order.

    scvi-tools itself checks the number only and would read permuted genes as if they were in order.
    """
    genes = stored_genes(registry)
    names = adata.var_names.astype(str).tolist()
    if names == genes:
        return
    missing, extra = sorted(set(genes) - set(names)), sorted(set(names) - set(genes))
    if missing:
        raise ValueError(
            f"{len(missing)} of the model's {len(genes)} genes are missing from adata.var_names: {preview(missing)}."
        )
    what = "the model's genes in another order"
    if extra:
        what = f"{len(extra)} genes the model does not have ({preview(extra)})"
    first = next((i for i, (a, b) in enumerate(zip(names, genes, strict=False)) if a != b), np.nan)
    raise ValueError(
        f"adata has {what} (first difference at position {first}). Attach it as adata[:, "
        "model.get_var_names()].copy(), or load the model with adata=False: "
        "predict and get_latent_representation find genes by name."
    )
