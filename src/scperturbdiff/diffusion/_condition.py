"""What the generator is told of the populations it draws: retrieved response, condition, noise."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from scperturbdiff.diffusion._perturbation import Components


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
    """

    shift: Tensor
    variance: Tensor
    spread: Tensor
    centre: Tensor

    @classmethod
    def none(cls, n: int, n_latent: int, device: torch.device | str = "cpu") -> Prior:
        """No response, for `n` populations."""
        zeros, zero = torch.zeros(n, n_latent, device=device), torch.zeros(n, device=device)
        return cls(zeros, zero, zero, zeros)

    def move(self, start: Tensor) -> Tensor:
        """Where control cells `(b, n_cells, n_latent)` go: spread about their centre, and shifted."""
        centre, scale = self.centre[:, None], self.spread.exp()[:, None, None]
        return centre + scale * (start - centre) + self.shift[:, None]

    def summary(self) -> Tensor:
        """What the network sees of it, `(b, n_latent + 2)`."""
        return torch.cat([self.shift, self.variance[:, None].log1p(), self.spread[:, None]], dim=-1)

    def repeat(self, times: int) -> Prior:
        """Each population `times` times, next to each other."""
        return Prior(*(x.repeat_interleave(times, 0) for x in (self.shift, self.variance, self.spread, self.centre)))


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
            Prior(*(x[novelty, group] for x in vars(self.prior).values())),
            self.categories[group],
            self.numbers[group],
            keep,
        )
