"""What the model thinks of perturbations: their representation, and how far new ones are from training."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import torch

from scperturbdiff.arguments import refusal
from scperturbdiff.data import explain_unknown
from scperturbdiff.diffusion import Components
from scperturbdiff.retrieval import Conditions

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from scperturbdiff.data import ConditionSpace
    from scperturbdiff.module import PerturbDiffModule
    from scperturbdiff.retrieval import Novelty


@torch.no_grad()
def perturbation_representation(module: PerturbDiffModule, space: ConditionSpace) -> pd.DataFrame:
    """Vectors of single components; see :meth:`scperturbdiff.PerturbDiff.get_perturbation_representation`."""
    names = space.all_components
    features, known = module.scale_features(space.feature_matrix())
    index = torch.arange(len(names), device=module.device)[:, None]
    encoder = module.generator_ema.perturbation
    vectors = encoder(Components(index, torch.zeros_like(index, dtype=torch.float32)), features, known)
    return pd.DataFrame(vectors.cpu().numpy(), index=pd.Index(names, name="component"))


def perturbation_novelty(module: PerturbDiffModule, space: ConditionSpace, names: Sequence[str] | None) -> pd.DataFrame:
    """How far components are from training; see :meth:`scperturbdiff.PerturbDiff.perturbation_novelty`."""
    everything = space.all_components
    if isinstance(names, str):
        raise TypeError(f"names={names!r} must be several names; pass [{names!r}].")
    if names is not None and not isinstance(names, Iterable):
        raise refusal("names", names, "several names, or None for all", TypeError)
    names = everything if names is None else [str(name) for name in names]
    position = pd.Index(everything).get_indexer(pd.Index(names))
    if unknown := [name for name, at in zip(names, position, strict=True) if at < 0]:
        raise KeyError(explain_unknown(unknown, space.components, space.features is not None))
    out = pd.DataFrame(index=pd.Index(names, name="component"))
    out["in_training"] = position < len(space.components)
    out["has_features"] = False if space.features is None else np.isin(names, space.features.names)
    out["feature_distance"], out["nearest"] = _nearest(space, position)
    out["unexplained_variance"] = _open_variance(module, space, position)
    return out


def _nearest(space: ConditionSpace, position: NDArray[np.int64]) -> tuple[NDArray[np.float64], list[str | None]]:
    """Cosine distance of features to the nearest other training component, and its name."""
    table = space.feature_matrix()
    n = len(space.components)
    if table is None or n == 0:
        return np.full(len(position), np.nan), [None] * len(position)
    known: NDArray[np.bool_] = np.asarray(np.isfinite(table).all(axis=1))
    unit = np.where(known[:, None], table, 0.0)
    unit /= np.maximum(np.linalg.norm(unit, axis=1, keepdims=True), 1e-12)
    distance = 1 - unit[position] @ unit[:n].T
    distance[:, ~known[:n]] = np.inf
    distance[~known[position]] = np.inf
    distance[position[:, None] == np.arange(n)] = np.inf
    best = distance.argmin(axis=1)
    least = distance[np.arange(len(position)), best]
    found = np.isfinite(least)
    return np.where(found, least, np.nan), [
        space.components[b] if f else None for b, f in zip(best, found, strict=True)
    ]


def _open_variance(module: PerturbDiffModule, space: ConditionSpace, position: NDArray[np.int64]) -> NDArray:
    """Share of the variance of the response that training leaves open, averaged over the training contexts."""
    if module.retrieval is None:
        return np.full(len(position), np.nan)
    retrieval = module.retrieval.with_features(space.feature_matrix())
    known = retrieval.responses.conditions
    first = np.unique(known.context, return_index=True)[1]
    out = np.zeros(len(position))
    new = position >= len(space.components)
    ways: tuple[tuple[Novelty, NDArray[np.bool_]], ...] = (("perturbation", new), ("pair", ~new))
    for novelty, chosen in ways:
        component = np.repeat(position[chosen], len(first))[:, None]
        contexts = known.take(np.tile(first, int(chosen.sum())))
        asked = Conditions(
            contexts.control_mean, component, np.zeros(component.shape), contexts.context, contexts.noise
        )
        out[chosen] = retrieval.unexplained(asked, novelty).reshape(-1, len(first)).mean(1)
    return out
