"""What a model keeps in scvi-tools' registry, which is saved with it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from scperturbdiff.data.conditions import ConditionSpace
from scperturbdiff.data.counts import check_layer, check_unique_names, preview
from scperturbdiff.data.learn import learn_conditions
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


def stored_layer(registry: Mapping[str, Any]) -> str | None:
    """Layer with the counts at setup, `None` for X."""
    arguments = registry["setup_args"]
    layer: str | None = arguments.get("layer", arguments.get("rna_layer"))
    return layer


def read_space(adata: AnnData, layer: str | None, source: Mapping[str, Any] | None, **keys: Any) -> ConditionSpace:
    """Check counts and names, then take the conditions of a saved model or learn them from `adata`.

    Parameters
    ----------
    adata
        Cells to set up.
    layer
        Layer with counts.
    source
        Registry of a saved model, if one is loaded.
    **keys
        See :func:`scperturbdiff.data.learn.learn_conditions`.
    """
    check_unique_names(adata)
    check_layer(adata, layer)
    if source is None:
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
