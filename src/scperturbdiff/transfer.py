"""Adapting a trained model to new data: which weights are taken over, and how."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from scvi.nn import FCLayers

from scperturbdiff.data import stored_batches, stored_space

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor, nn

    from scperturbdiff.module import PerturbDiffModule


@torch.no_grad()
def transfer_weights(
    new: PerturbDiffModule, old: PerturbDiffModule, registry: Mapping[str, Any], reference: Mapping[str, Any]
) -> list[str]:
    """Copy into `new` whatever of `old` fits; returns the names of what does not.

    Parameters
    ----------
    new, old
        Modules.
    registry, reference
        Registries of the models they belong to.
    """
    ours, theirs = stored_space(registry), stored_space(reference)
    fresh = [name for name in _copy_state(new.vae, old.vae) if ".fc_layers." not in name]
    _copy_batches(new.vae, old.vae, stored_batches(registry), stored_batches(reference))
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
