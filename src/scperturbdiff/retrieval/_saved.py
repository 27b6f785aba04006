"""What a saved retrieval may hold."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from scperturbdiff.storage import from_state

if TYPE_CHECKING:
    from collections.abc import Mapping

VERSION = 1  # of the saved state

SHAPES: dict[str, dict[str, str]] = {
    "Conditions": {"control_mean": "NM", "component": "Nc", "dose": "Nc"}
    | dict.fromkeys(("context", "noise", "population", "state", "mass", "control_noise"), "N"),
    "Responses": {"shift": "ND", "spread": "N", "library": "N", "residual": "NG", "fold": "NG"},
    "Retrieval": {"features": "PF", "doubt": "Df", "responsiveness": "q"},
    "FeatureMoments": {"centre": "F", "inverse": "F"},
    "DoseStrength": {"doses": "n", "strength": "n"},
    "Lengths": {"rows": "n", "explained": "n", "predicted": "n"},
    "LearnedSimilarity": {"fold": "N"},
    "ResponseSimilarity": {"contexts": "n", "context_covariance": "nn", "factors": "pf", "own": "p"},
    "FoldEvidence": {"distance": "n", "agrees": "n", "difference": "n"},
    "States": {"centres": "sM"},
}
"""Shapes of arrays: populations `N`, latent dimensions `D` of shifts and `M` of cells, genes `G`, components `P`,
features `F`."""


def from_saved(state: Mapping[str, Any], kinds: Mapping[str, type], n_latent: int | None, n_genes: int | None) -> Any:
    """What was saved, of the classes `kinds` and for so many latent dimensions and genes, if these are known.

    Raises
    ------
    ValueError
        If the state has another version, or does not fit.
    """
    if (version := state.get("version")) != VERSION:
        raise ValueError(f"The saved retrieval has format {version!r}; this version reads {VERSION}.")
    known = {letter: n for letter, n in (("D", n_latent), ("M", n_latent), ("G", n_genes)) if n is not None}
    return from_state(state["retrieval"], kinds, SHAPES, known)
