"""Adapting a trained model to new data: which weights are taken over, and how."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from scvi.nn import FCLayers

from scperturbdiff.data import as_anndata, check_genes, preview, stored_batches

if TYPE_CHECKING:
    from collections.abc import Sequence

    from anndata import AnnData
    from mudata import MuData
    from torch import Tensor, nn

    from scperturbdiff.model import PerturbDiff
    from scperturbdiff.module import PerturbDiffModule

    Model = TypeVar("Model", bound=PerturbDiff)


logger = logging.getLogger(__name__)


def adapt(cls: type[Model], adata: AnnData | MuData, reference: Model) -> Model:
    """A model for `adata` with the weights of `reference`; see :meth:`scperturbdiff.PerturbDiff.load_query_data`."""
    if not reference.is_trained_:
        raise ValueError("reference_model is not trained.")
    if cls._get_most_recent_anndata_manager(adata) is None:
        arguments = dict(reference.registry_["setup_args"])
        getattr(cls, reference.registry_["setup_method_name"])(adata, **arguments)
    manager = cls._get_most_recent_anndata_manager(adata, required=True)
    check_genes(as_anndata(adata, manager.registry), reference.registry_)
    given = reference.init_params_["non_kwargs"] | reference.init_params_["kwargs"]
    model = cls(adata, **given)
    fresh = transfer_weights(model, reference)
    if fresh:
        logger.info("Not taken over from the reference: %s.", preview(fresh, 30))
    model.vae_is_adapted_ = True
    return model


@torch.no_grad()
def transfer_weights(model: PerturbDiff, reference: PerturbDiff) -> list[str]:
    """Copy into `model` whatever of `reference` fits; returns the names of what does not."""
    new, old = model.module, reference.module
    ours, theirs = model.conditions, reference.conditions
    fresh = [name for name in _copy_state(new.vae, old.vae) if ".fc_layers." not in name]
    _copy_batches(new.vae, old.vae, stored_batches(model.registry_), stored_batches(reference.registry_))
    new.latent_mean.copy_(old.latent_mean)
    new.latent_scale.copy_(old.latent_scale)
    if new.features is not None and old.features is not None and new.features.shape[1] == old.features.shape[1]:
        _rescale_features(new, old)
    for part in ("generator", "generator_ema"):
        to, of = getattr(new, part), getattr(old, part)
        fresh += [f"{part}.{name}" for name in _copy_state(to, of, skip=("perturbation.name.", "categorical."))]
        _copy_rows(to.perturbation.name.weight, of.perturbation.name.weight, ours.components, theirs.components)
        for i, key in enumerate(ours.categorical_keys):
            if key in theirs.categorical_keys:
                table = of.categorical[theirs.categorical_keys.index(key)]
                values = (ours.categories or {})[key], (theirs.categories or {})[key]
                _copy_rows(to.categorical[i].weight, table.weight, *values)
    fresh += [f"component {name}" for name in ours.components if name not in set(theirs.components)]
    return fresh


def _copy_state(to: nn.Module, of: nn.Module, skip: Sequence[str] = ()) -> list[str]:
    """Copy tensors of equal name and shape; returns the names of the others."""
    source, fresh = of.state_dict(), []
    for name, tensor in to.state_dict().items():
        if name.startswith(tuple(skip)):
            continue
        if name in source and source[name].shape == tensor.shape:
            tensor.copy_(source[name])
        else:
            fresh.append(name)
    return fresh


def _copy_rows(to: Tensor, of: Tensor, names: Sequence[str], known: Sequence[str]) -> None:
    """Copy the rows of the names that both have."""
    position = {name: i for i, name in enumerate(known)}
    for row, name in enumerate(names):
        if name in position:
            to[row] = of[position[name]].to(to.device)


def _copy_batches(to: nn.Module, of: nn.Module, batches: Sequence[str], known: Sequence[str]) -> None:
    """Copy the weights of layers with one-hot columns for the batch; a new batch starts as the mean of the known."""
    layers = dict(of.named_modules())
    for name, ours in to.named_modules():
        if not isinstance(ours, FCLayers):
            continue
        theirs: Any = layers[name]
        n_new, n_old = sum(ours.n_cat_list), sum(theirs.n_cat_list)
        if n_new + n_old == 0:
            continue
        for i, (new, old) in enumerate(zip(ours.fc_layers, theirs.fc_layers, strict=True)):
            if not ours.inject_into_layer(i):
                continue
            to_weight, of_weight = new[0].weight, old[0].weight.to(new[0].weight.device)
            inner = to_weight.shape[1] - n_new
            to_weight[:, :inner] = of_weight[:, :inner]
            new[0].bias.copy_(old[0].bias)
            columns = of_weight[:, inner:]
            mean = columns.mean(1) if n_old else torch.zeros_like(to_weight[:, 0])
            for j, batch in enumerate(batches if n_new else ()):
                to_weight[:, inner + j] = columns[:, known.index(batch)] if n_old and batch in known else mean
            if n_old and not n_new:  # one batch has no column: what it adds goes into the bias
                new[0].bias += columns[:, known.index(batches[0])] if batches[0] in known else mean


def _rescale_features(new: PerturbDiffModule, old: PerturbDiffModule) -> None:
    """Put the features on the scale that the reference learned to read them on."""
    assert new.features is not None
    new.features.mul_(new.feature_scale / old.feature_scale.to(new.feature_scale.device))
    new.feature_scale.copy_(old.feature_scale)
