"""Similarities of contexts and of perturbations, learned from the responses themselves.

Two contexts that answer many perturbations alike answer the next one alike; two perturbations that do the same in the
contexts where both were measured do the same elsewhere. With responses modelled as matrix normal (covariance of
contexts times covariance of perturbations, the same for every latent dimension), both covariances are estimated from
the incomplete table of responses: the contexts' by expectation-maximisation, the perturbations' from the completed
table, as a few factors plus what is a perturbation's own.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from scperturbdiff.retrieval._covariance import additive_covariance

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

    from scperturbdiff.retrieval._conditions import Conditions, Floats
    from scperturbdiff.retrieval._settings import RetrievalSettings


ABSENT = 1e9
"""Noise variance that stands for "not measured"."""
EXACT = 1e-6
"""Noise variance, relative to the signal, that stands for "known exactly": of cells that are all alike."""
MAX_SCALE = 1e6
"""Variance of a component's responses relative to the mean over those measured, at most: that of others drifts."""


@dataclass(frozen=True)
class ResponseSimilarity:
    """Covariances of responses.

    Attributes
    ----------
    contexts
        Labels of the contexts, sorted, `(n_contexts,)`.
    context_covariance
        Covariance of the responses of contexts, relative to the signal, `(n_contexts, n_contexts)`.
    factors
        Loadings of components, `(n_components, n_factors)`.
    own
        Variance of a component that factors leave out, `(n_components,)`.
    """

    contexts: NDArray[np.int64]
    context_covariance: Floats
    factors: Floats
    own: Floats

    def __call__(self, a: Conditions, b: Conditions, doses: Callable[[Floats, Floats], Floats]) -> Floats:
        """Covariance of the shifts of `a` and `b`, `(len(a), len(b))`; 0 where a context is unknown."""
        return self.of_contexts(a.site, b.site) * self.of_perturbations(a, b, doses)

    def of_contexts(self, first: NDArray[np.int64], second: NDArray[np.int64]) -> Floats:
        """Covariance of contexts by their labels, `(len(first), len(second))`; 0 where one is unknown."""
        (a, known_a), (b, known_b) = (self._codes(labels) for labels in (first, second))
        return self.context_covariance[np.ix_(a, b)] * np.outer(known_a, known_b)

    def of_perturbations(self, a: Conditions, b: Conditions, doses: Callable[[Floats, Floats], Floats]) -> Floats:
        """Covariance of what was done, `(len(a), len(b))`."""
        return additive_covariance(a, b, self._components, doses)

    def _codes(self, context: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
        codes = np.minimum(np.searchsorted(self.contexts, context), len(self.contexts) - 1)
        return codes, self.contexts[codes] == context

    def _components(self, first: NDArray[np.int64], second: NDArray[np.int64]) -> Floats:
        n = max(int(first.max(initial=0)), int(second.max(initial=0))) + 1
        extra = max(0, n - len(self.own))  # components that came later: unrelated to the others
        factors = np.pad(self.factors, ((0, extra), (0, 0)))
        own = np.pad(self.own, (0, extra), constant_values=1.0)
        products: Floats = (
            factors[first] @ factors[second].T + (first[:, None] == second[None, :]) * own[first][:, None]
        )
        return products


@dataclass(frozen=True)
class LearnedSimilarity:
    """Similarities learned from all responses, and from those outside each fold of pairs.

    Attributes
    ----------
    whole
        From all training conditions.
    folds
        From the training conditions outside each fold.
    fold
        Fold of each training condition, `(n,)`.
    """

    whole: ResponseSimilarity
    folds: tuple[ResponseSimilarity, ...]
    fold: NDArray[np.int64]


def can_learn(conditions: Conditions, max_contexts: int) -> bool:
    """Whether there are single perturbations in several contexts, but not in too many, and several perturbations."""
    single = (conditions.component >= 0).sum(1) == 1
    n_contexts = len(np.unique(conditions.site))
    n_single = len(np.unique(conditions.component[single].max(1))) if single.any() else 0
    return 2 <= n_contexts <= max_contexts and n_single >= 4


def learn_similarity(
    conditions: Conditions,
    shifts: Floats,
    prior: Floats,
    signal: float,
    n_components: int,
    settings: RetrievalSettings,
    seed: int = 0,
) -> ResponseSimilarity:
    """Estimate the covariances from populations with a single perturbation.

    Parameters
    ----------
    conditions, shifts
        Training populations and their mean shifts, `(n, n_latent)`.
    prior
        Covariance of contexts to start from, in the order of their sorted labels, relative to the signal.
    signal
        Mean square of a shift without its sampling noise.
    n_components
        Rows of the component table.
    settings
        Steps, factors, weight of the prior.
    seed
        Chooses the components that contexts are compared on, where there are more than `settings.em_components`.
    """
    table, noise = _response_table(conditions, shifts / np.sqrt(signal), n_components, signal)
    measured = np.flatnonzero((noise < ABSENT).any(1))
    if not measured.size:  # combinations alone: components are unrelated
        return ResponseSimilarity(np.unique(conditions.site), prior, np.zeros((n_components, 0)), np.ones(n_components))
    chosen = np.random.default_rng(seed).permutation(measured)[: settings.em_components]
    covariance, scale = prior, np.ones(n_components)
    for step in range(settings.em_steps + 1):
        rows = chosen if step < settings.em_steps else np.arange(n_components)
        filled, left = _complete(table[rows], noise[rows], covariance, scale[rows])
        # what each component's responses are, in units of the contexts' covariance: weak ones, strong ones
        moment = np.einsum("pcd,ped->pce", filled, filled) / table.shape[2] + left
        inverse = np.linalg.inv(covariance + 1e-6 * np.eye(len(covariance)))
        scale[rows] = np.maximum(np.einsum("ce,pce->p", inverse, moment) / len(covariance), 1e-3)
        if step < settings.em_steps:
            scale = np.minimum(scale / scale[chosen].mean(), MAX_SCALE)
            weighted = (moment / scale[chosen, None, None]).sum(0)
            covariance = (weighted + settings.context_prior_weight * prior) / (
                len(chosen) + settings.context_prior_weight
            )
    n_contexts = len(covariance)
    root = np.linalg.cholesky(covariance + 1e-6 * np.eye(n_contexts))
    white = np.linalg.solve(root, filled).reshape(len(table), -1) / np.sqrt(n_contexts * table.shape[2])
    own = np.einsum("ce,pce->p", np.linalg.inv(root @ root.T), left) / n_contexts
    u, s, _ = np.linalg.svd(white, full_matrices=False)
    factors = u[:, : settings.n_factors] * s[: settings.n_factors]
    own = own + np.maximum((white**2).sum(1) - (factors**2).sum(1), 0)
    return ResponseSimilarity(np.unique(conditions.site), covariance, factors, own)


def _response_table(conditions: Conditions, shifts: Floats, n_components: int, signal: float) -> tuple[Floats, Floats]:
    """Mean shifts `(n_components, n_contexts, n_latent)` and their noise `(n_components, n_contexts)`.

    Populations of one component and context (batches, doses) are averaged with the inverse of their noise.
    """
    single = np.flatnonzero((conditions.component >= 0).sum(1) == 1)
    component = conditions.component[single].max(1)
    contexts, context = np.unique(conditions.site, return_inverse=True)
    weight = signal / np.maximum(conditions.noise[single], EXACT * signal)
    shape = (n_components, len(contexts))
    total, values = np.zeros(shape), np.zeros((*shape, shifts.shape[1]))
    at = (component, context.reshape(-1)[single])
    np.add.at(total, at, weight)
    np.add.at(values, at, weight[:, None] * shifts[single])
    seen = total > 0
    values[seen] /= total[seen, None]
    return values, np.where(seen, 1 / np.where(seen, total, 1.0), ABSENT)


def _complete(table: Floats, noise: Floats, covariance: Floats, scale: Floats) -> tuple[Floats, Floats]:
    """Posterior mean of each component's responses in every context, and its covariance `(p, c, c)`."""
    prior = scale[:, None, None] * covariance[None]
    system = prior + noise[:, :, None] * np.eye(len(covariance))
    gain = np.swapaxes(np.linalg.solve(system, prior), 1, 2)
    return gain @ table, prior - gain @ prior
