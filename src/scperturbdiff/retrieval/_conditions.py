"""Conditions as retrieval compares them, and how one can be new to the others."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from scperturbdiff.retrieval._groups import Groups

Novelty = Literal["seen", "replicate", "pair", "context", "perturbation"]
"""How a condition is new: not at all; this population; the perturbation in this context; the context; a component."""
Floats = NDArray[np.float64]
SITES = 64
"""More than the number of states there can be."""


@dataclass(frozen=True)
class Conditions:
    """What the kernel compares: `n` populations, or the states of cells in them, one row each.

    Attributes
    ----------
    control_mean
        Mean of the matched controls in the standardised latent space, `(n, n_latent)`.
    component
        Rows of the component table, `(n, c)`, -1 for none.
    dose
        Log-scaled dose of each component, `(n, c)`.
    context
        Label of the context, `(n,)`.
    noise
        Sampling variance of the mean shift per dimension, about `1 / n_treated + 1 / n_controls`, `(n,)`.
    population
        Number of the population that a row belongs to, `(n,)`. Default: each row is one.
    state
        State of cells that a row is about, `(n,)`. Default: 0, all cells.
    mass
        Share of the population's control cells in that state, `(n,)`. Default: 1.
    control_noise
        The part of `noise` that comes from the controls, `(n,)`: conditions with the same controls share it. Default:
        0, each has its own.
    """

    control_mean: Floats
    component: NDArray[np.int64]
    dose: Floats
    context: NDArray[np.int64]
    noise: Floats
    population: NDArray[np.int64] = None  # type: ignore[assignment]
    state: NDArray[np.int64] = None  # type: ignore[assignment]
    mass: Floats = None  # type: ignore[assignment]
    control_noise: Floats = None  # type: ignore[assignment]

    def __post_init__(self) -> None:
        n = len(self.context)
        for name, default in (
            ("population", np.arange(n)),
            ("state", np.zeros(n, np.int64)),
            ("mass", np.ones(n)),
            ("control_noise", np.zeros(n)),
        ):
            if getattr(self, name) is None:
                object.__setattr__(self, name, default)

    def __len__(self) -> int:
        return len(self.context)

    @property
    def site(self) -> NDArray[np.int64]:
        """Number of the (context, state) of each row, `(n,)`: where a response is measured."""
        return self.context * SITES + self.state

    @property
    def treated_noise(self) -> Floats:
        """The part of `noise` that is each condition's own, `(n,)`."""
        return self.noise - self.control_noise

    @cached_property
    def treatment_groups(self) -> Groups:
        """Rows with the same components and doses."""
        return Groups.of(self.component, self.dose)

    @cached_property
    def place_groups(self) -> Groups:
        """Rows of the same context and state with the same controls."""
        return Groups.of(self.control_mean, self.context, self.state)

    @cached_property
    def control_groups(self) -> Groups:
        """Rows of the same state with the same controls."""
        return Groups.of(self.control_mean, self.state)

    def take(self, rows: NDArray[np.integer] | slice) -> Conditions:
        """The conditions of `rows`."""
        return Conditions(*(getattr(self, name)[rows] for name in self.__dataclass_fields__))

    def same_perturbation(self, other: Conditions) -> NDArray[np.bool_]:
        """Where the sets of components and doses agree, `(len(self), len(other))`."""
        width = max(self.component.shape[1], other.component.shape[1])
        mine, theirs = (np.sort(_tokens(c, width), axis=1) for c in (self, other))
        return (mine[:, None, :] == theirs[None, :, :]).all(-1)

    def same_condition(self, other: Conditions) -> NDArray[np.bool_]:
        """Where contexts, states, components and doses agree, `(len(self), len(other))`."""
        same = (self.context[:, None] == other.context) & (self.state[:, None] == other.state)
        return np.asarray(same & self.same_perturbation(other))

    @cached_property
    def has_replicates(self) -> bool:
        """Whether a condition has several populations."""
        codes = self.pair_codes()[np.unique(self.population, return_index=True)[1]]
        return len(np.unique(codes)) < len(codes)

    def share_component(self, other: Conditions) -> NDArray[np.bool_]:
        """Where at least one component is common, `(len(self), len(other))`."""
        a, b = self.component[:, None, :, None], other.component[None, :, None, :]
        return ((a == b) & (a >= 0)).any((-1, -2))

    def barred(self, other: Conditions, novelty: Novelty) -> NDArray[np.bool_]:
        """Which of `other` may not be used for conditions left out: those :meth:`excluded` and their own population."""
        return self.excluded(other, novelty) | (self.population[:, None] == other.population[None, :])

    def excluded(self, other: Conditions, novelty: Novelty) -> NDArray[np.bool_]:
        """Which of `other` may not be used for conditions that are new in the way of `novelty`."""
        if novelty in ("seen", "replicate"):
            return np.zeros((len(self), len(other)), bool)
        same_context = self.context[:, None] == other.context[None, :]
        if novelty == "context":
            return same_context
        if novelty == "pair":
            return same_context & self.same_perturbation(other)
        return self.share_component(other)

    def site_means(self) -> Floats:
        """Mean of the control means of each site, in the order of sorted labels, `(n_sites, n_latent)`."""
        label, site = np.unique(self.site, return_inverse=True)
        sums = np.zeros((len(label), self.control_mean.shape[1]))
        np.add.at(sums, site.reshape(-1), self.control_mean)
        return sums / np.bincount(site.reshape(-1))[:, None]

    def pair_codes(self) -> NDArray[np.int64]:
        """Number of the (context, perturbation, dose) of each population, `(n,)`."""
        keys = np.column_stack([self.context, np.sort(_tokens(self, self.component.shape[1]), axis=1)])
        return np.unique(keys, axis=0, return_inverse=True)[1].reshape(-1)


def novelty_of(asked: Conditions, known: Conditions) -> list[Novelty]:
    """In which way each of `asked` is new to the `known` conditions."""
    same_context = asked.context[:, None] == known.context[None, :]
    measured = (same_context & asked.same_perturbation(known)).any(axis=1)
    names = np.isin(asked.component, np.append(np.unique(known.component), -1)).all(axis=1)
    out: list[Novelty] = []
    for has_names, has_context, is_measured in zip(
        np.atleast_1d(names), same_context.any(axis=1), measured, strict=True
    ):
        if not has_names:
            out.append("perturbation")
        elif not has_context:
            out.append("context")
        else:
            out.append("seen" if is_measured else "pair")
    return out


def _tokens(conditions: Conditions, width: int) -> Floats:
    """One number for each component with its dose, `(n, width)`; equal where both agree, -1 where there is none."""
    tokens = np.where(conditions.component >= 0, conditions.component + np.arctan(conditions.dose) / np.pi, -1.0)
    return np.pad(tokens, ((0, 0), (0, width - tokens.shape[1])), constant_values=-1.0)


def n_components(*conditions: Conditions) -> int:
    """One more than the highest component in use."""
    return 1 + max(int(c.component.max(initial=0)) for c in conditions)
