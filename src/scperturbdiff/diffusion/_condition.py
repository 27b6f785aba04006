"""What the generator is told of the populations it draws: retrieved response, condition, noise."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from scperturbdiff.diffusion._perturbation import Components

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence


@dataclass(frozen=True)
class StatePrior:
    """Retrieved response of each of `k` states of cells in `b` populations, standardised latent space.

    Attributes
    ----------
    shift
        Mean shift, `(b, k, n_latent)`.
    spread
        Log ratio of the spread of cells to that of the controls, `(b, k)`.
    centre
        Mean of the controls, `(b, k, n_latent)`.
    states
        Centres of the states, `(k, n_latent)`.
    softness
        Variance with which cells belong to the states around them.
    """

    shift: Tensor
    spread: Tensor
    centre: Tensor
    states: Tensor
    softness: float

    OWN: ClassVar = ("shift", "spread", "centre")

    def move(self, start: Tensor) -> Tensor:
        """Where control cells `(b, n_cells, n_latent)` go: each as the states that it belongs to."""
        square = start.square().sum(-1, keepdim=True) - 2 * start @ self.states.T + self.states.square().sum(-1)
        share = (-square / (2 * self.softness)).softmax(-1)
        centre, scale = share @ self.centre, (share @ self.spread[..., None]).exp()
        return centre + scale * (start - centre) + share @ self.shift

    def map(self, change: Callable[[Tensor], Tensor]) -> StatePrior:
        """The same with what belongs to populations changed."""
        parts: dict[str, Any] = {name: change(getattr(self, name)) for name in self.OWN}
        return replace(self, **parts)


@dataclass(frozen=True)
class Prior:
    """Retrieved response of `b` populations, standardised latent space.

    Attributes
    ----------
    shift
        Mean shift, `(b, n_latent)`.
    variance
        Its variance per dimension, `(b,)`.
    spread
        Log ratio of the spread of cells to that of the controls, `(b,)`.
    centre
        Mean of the controls, `(b, n_latent)`.
    states
        The same for each state of cells; `None` where all cells of a population respond alike.
    """

    shift: Tensor
    variance: Tensor
    spread: Tensor
    centre: Tensor
    states: StatePrior | None = None

    OWN: ClassVar = ("shift", "variance", "spread", "centre")

    @classmethod
    def none(cls, n: int, n_latent: int, device: torch.device | str = "cpu") -> Prior:
        """No response, for `n` populations."""
        zeros, zero = torch.zeros(n, n_latent, device=device), torch.zeros(n, device=device)
        return cls(zeros, zero, zero, zeros)

    def move(self, start: Tensor) -> Tensor:
        """Where control cells `(b, n_cells, n_latent)` go: spread about their centre, and shifted."""
        if self.states is not None:
            return self.states.move(start)
        centre, scale = self.centre[:, None], self.spread.exp()[:, None, None]
        return centre + scale * (start - centre) + self.shift[:, None]

    def summary(self) -> Tensor:
        """What the network sees of it, `(b, n_latent + 2)`."""
        return torch.cat([self.shift, self.variance[:, None].log1p(), self.spread[:, None]], dim=-1)

    def map(self, change: Callable[[Tensor], Tensor]) -> Prior:
        """The same with what belongs to populations changed."""
        parts = {name: change(getattr(self, name)) for name in self.OWN}
        return Prior(**parts, states=None if self.states is None else self.states.map(change))

    def shifted(self, offset: Tensor) -> Prior:
        """The same with other shifts, by `offset` `(b, n_latent)`."""
        states = self.states
        if states is not None:
            states = replace(states, shift=states.shift + offset[:, None])
        return replace(self, shift=self.shift + offset, states=states)

    def at(self, row: int) -> Prior:
        """One population."""
        return self.map(lambda x: x[row : row + 1])

    def repeat(self, times: int) -> Prior:
        """Each population `times` times, next to each other."""
        return self.map(lambda x: x.repeat_interleave(times, 0))

    @classmethod
    def stack(cls, priors: Sequence[Prior]) -> Prior:
        """Several priors of the same populations, along a new first dimension."""
        first = priors[0]

        def stacked(parts: Sequence[Any], names: tuple[str, ...]) -> dict[str, Any]:
            return {name: torch.stack([getattr(part, name) for part in parts]) for name in names}

        states = first.states
        if states is not None:
            states = replace(states, **stacked([prior.states for prior in priors], StatePrior.OWN))
        return cls(**stacked(priors, cls.OWN), states=states)


@dataclass(frozen=True)
class Condition:
    """What is known of `b` populations before they are drawn.

    Attributes
    ----------
    components
        Perturbations.
    prior
        Retrieved response.
    categories
        Codes of the categorical covariates, `(b, n_categorical)`; -1 for a dropped one.
    numbers
        Standardised continuous covariates, `(b, n_continuous)`.
    keep
        1 where the perturbation is shown to the network, 0 where it is hidden (condition dropout), `(b,)`.
    """

    components: Components
    prior: Prior
    categories: Tensor
    numbers: Tensor
    keep: Tensor

    def repeat(self, times: int) -> Condition:
        """Each population `times` times, next to each other."""

        def again(x: Tensor) -> Tensor:
            return x.repeat_interleave(times, 0)

        return Condition(
            Components(again(self.components.index), again(self.components.dose)),
            self.prior.repeat(times),
            again(self.categories),
            again(self.numbers),
            again(self.keep),
        )

    def hidden(self) -> Condition:
        """The same populations with the perturbation hidden from the network."""
        return replace(self, keep=torch.zeros_like(self.keep))


@dataclass(frozen=True)
class Randomness:
    """Noise that makes draws differ given the same noised population.

    Attributes
    ----------
    population
        Shared by all cells of a population, `(b, n_population_noise)`.
    cell
        One for each cell, `(b, n_cells, n_cell_noise)`.
    """

    population: Tensor
    cell: Tensor


@dataclass(frozen=True)
class PopulationTensors:
    """Conditions of populations on the device; the last row stands for control populations.

    Attributes
    ----------
    components, categories, numbers
        See :class:`Condition`.
    prior
        Retrieved responses for each way of being new, :class:`Prior` of `(n_novelties, n_populations + 1, ...)`.
    """

    components: Components
    categories: Tensor
    numbers: Tensor
    prior: Prior

    @property
    def n_novelties(self) -> int:
        """Ways of being new there are retrieved responses for."""
        return len(self.prior.shift)

    def condition(self, group: Tensor, novelty: Tensor, keep: Tensor) -> Condition:
        """Conditions of populations `group` (-1: control), retrieved as if new in the way of `novelty`."""
        return Condition(
            self.components.take(group),
            self.prior.map(lambda x: x[novelty, group]),
            self.categories[group],
            self.numbers[group],
            keep,
        )
