"""Small tables of conditions and responses that tests of retrieval share."""

from __future__ import annotations

import itertools

import numpy as np

from scperturbdiff.retrieval import Conditions, Responses

D = 3
"""Latent dimensions."""


def screen(
    n_contexts: int = 4, n_perturbations: int = 3, n_batches: int = 2, noise: float = 0.05, seed: int = 0
) -> Conditions:
    """Conditions of every perturbation in every context and batch, a context's controls lying together."""
    rng = np.random.default_rng(seed)
    context, perturbation, _ = np.array(
        list(itertools.product(range(n_contexts), range(n_perturbations), range(n_batches)))
    ).T
    centre = 3 * rng.normal(size=(n_contexts, D))
    return Conditions(
        centre[context] + 0.05 * rng.normal(size=(len(context), D)),
        perturbation[:, None],
        np.zeros((len(context), 1)),
        context,
        np.full(len(context), noise),
    )


def responses(
    conditions: Conditions,
    shift: np.ndarray,
    spread: np.ndarray | None = None,
    library: np.ndarray | None = None,
    residual: np.ndarray | None = None,
) -> Responses:
    """Measured responses; what is not given is zero, and there are no genes."""
    n = len(conditions)
    return Responses(
        conditions,
        shift,
        np.zeros(n) if spread is None else spread,
        np.zeros(n) if library is None else library,
        np.zeros((n, 0), np.float16) if residual is None else residual,
    )


def matrix_normal(
    seed: int, structured: bool, n_contexts: int = 7, n_perturbations: int = 18, n_latent: int = 12
) -> tuple[Conditions, np.ndarray, np.ndarray]:
    """Responses with covariances of contexts and perturbations that controls do not show; a quarter held out."""
    rng = np.random.default_rng(seed)
    contexts = rng.normal(size=(n_contexts, 2)) if structured else 2 * np.eye(n_contexts)
    perturbations = rng.normal(size=(n_perturbations, 3)) if structured else 2 * np.eye(n_perturbations)
    core = rng.normal(size=(contexts.shape[1], perturbations.shape[1], n_latent))
    response = np.einsum("ci,pj,ijd->cpd", contexts, perturbations, core) + 0.1 * rng.normal(
        size=(n_contexts, n_perturbations, n_latent)
    )
    context, component = np.indices((n_contexts, n_perturbations)).reshape(2, -1)
    place = rng.normal(size=(n_contexts, n_latent))
    conditions = Conditions(
        place[context], component[:, None], np.zeros((len(context), 1)), context, np.full(len(context), 0.01)
    )
    test = rng.permutation(len(context)) % 4 == 0
    return conditions, response.reshape(-1, n_latent), test
