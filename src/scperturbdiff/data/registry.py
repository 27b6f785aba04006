"""What a model keeps in scvi-tools' registry, which is saved with it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from scperturbdiff.data.conditions import ConditionSpace
from scperturbdiff.data.counts import preview
from scperturbdiff.data.perturbations import FeatureTable

if TYPE_CHECKING:
    from collections.abc import Mapping

    from anndata import AnnData

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
    what = (
        f"{len(extra)} genes the model does not have ({preview(extra)})"
        if extra
        else "the model's genes in another order"
    )
    first = next((i for i, (a, b) in enumerate(zip(names, genes, strict=False)) if a != b), np.nan)
    raise ValueError(
        f"adata has {what} (first difference at position {first}). Attach it as adata[:, "
        "model.get_var_names()].copy(), or load the model with adata=False: "
        "predict and get_latent_representation find genes by name."
    )
