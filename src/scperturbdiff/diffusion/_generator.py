"""The generator: a denoiser of latent populations anchored to controls and to retrieved responses."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from scperturbdiff.diffusion._condition import Condition, Prior, Randomness
from scperturbdiff.diffusion._network import EncodedControls, PopulationTransformer
from scperturbdiff.diffusion._perturbation import PerturbationEncoder
from scperturbdiff.diffusion._samplers import guide, sample
from scperturbdiff.diffusion._schedule import NoiseSchedule

if TYPE_CHECKING:
    from collections.abc import Sequence

    from scperturbdiff.diffusion._samplers import Sampler


NOISE_GRID: list[float] = [i / 10 for i in range(-30, 31)]
"""Values of a standard normal variable at which :attr:`Generator.replicate_quantiles` are given."""


class Generator(nn.Module):
    r"""Denoiser of latent populations.

    For a noised population :math:`z_t` whose cells start from control cells :math:`c_j` of mean :math:`\bar c`, with
    retrieved shift :math:`a` and log ratio of spreads :math:`\rho`,

    .. math::
        \hat z_j = \alpha_t z_{t,j} + \sigma_t^2 (\bar c + e^\rho (c_j - \bar c) + a) + f_\theta(z_t, c, \dots)_j .

    The first two terms are the posterior mean when a treated cell is its control cell, moved by the anchor, plus unit
    Gaussian noise; the network adds what that leaves out. At pure noise, where nothing tells yet which population is
    drawn, :math:`a` also has a random part :math:`L q(\varepsilon)`, one for each population: `L` holds the directions
    along which replicates of a condition lie apart (``replicate_factors``), `q` gives the standard normal
    :math:`\varepsilon`, the population's noise, which the network sees, the distribution that replicates have along
    each (``replicate_quantiles``). "No effect" is the zero of the network, an unseen context
    carries its own state and the shape of its populations, and which control a cell starts from is part of the noise:
    no treated cell is ever paired with a control.

    The network shapes populations: the mean of its correction over the cells of a population is taken off, and it sees
    noise of a population only along the directions of `L`. Where a population lies is said by the anchor, which a few
    conditions suffice to learn, and how far apart replicates lie by their law; a network that is free to move
    populations learns those of training by heart and scatters others over what it does not know.

    Parameters
    ----------
    n_latent
        Dimension of a cell.
    n_names, n_features
        See :class:`~scperturbdiff.module.PerturbationEncoder`.
    n_categories
        Number of categories of each categorical covariate.
    n_numbers
        Number of continuous covariates.
    width, n_layers, n_heads, dropout
        Size of the transformer.
    n_population_noise, n_cell_noise
        Dimensions of the extra noise.
    moves_mean
        Let the network move the means of populations, too, and see all of their noise.
    """

    def __init__(
        self,
        n_latent: int,
        n_names: int,
        n_features: int = 0,
        n_categories: Sequence[int] = (),
        n_numbers: int = 0,
        *,
        width: int = 128,
        n_layers: int = 3,
        n_heads: int = 4,
        dropout: float = 0.0,
        n_population_noise: int = 16,
        n_cell_noise: int = 8,
        moves_mean: bool = False,
        schedule: NoiseSchedule | None = None,
    ) -> None:
        super().__init__()
        self.n_latent, self.moves_mean = n_latent, moves_mean
        self.n_population_noise, self.n_cell_noise = n_population_noise, n_cell_noise
        self.schedule = schedule or NoiseSchedule()
        self.perturbation = PerturbationEncoder(n_names, n_features, width)
        self.categorical = nn.ModuleList(nn.Embedding(n, width) for n in n_categories)
        self.continuous = nn.Linear(n_numbers, width) if n_numbers else None
        self.prior = nn.Sequential(nn.Linear(n_latent + 2, width), nn.SiLU(), nn.Linear(width, width))
        self.population_noise = nn.Linear(n_population_noise, width)
        self.hidden = nn.Parameter(torch.zeros(width))
        self.register_buffer("replicate_factors", torch.zeros(n_latent, n_population_noise))
        self.register_buffer("replicate_quantiles", torch.tensor(NOISE_GRID).repeat(n_population_noise, 1))
        self.transformer = PopulationTransformer(
            n_latent, 2 * n_latent + n_cell_noise, width=width, n_layers=n_layers, n_heads=n_heads, dropout=dropout
        )

    replicate_factors: Tensor
    replicate_quantiles: Tensor

    @torch.no_grad()
    def set_replicates(self, factors: Tensor, quantiles: Tensor) -> None:
        """Set how replicates lie apart, see :class:`scperturbdiff.train.replicates.ReplicateLaw`."""
        self.replicate_factors.zero_()
        self.replicate_factors[:, : factors.shape[1]] = factors
        self.replicate_quantiles[:] = self.replicate_quantiles.new_tensor(NOISE_GRID)
        self.replicate_quantiles[: len(quantiles)] = quantiles

    def replicate_shift(self, noise: Tensor) -> Tensor:
        """Where a replicate lies, seen from the mean of its condition `(b, n_latent)`, from its noise."""
        first, last = NOISE_GRID[0], NOISE_GRID[-1]
        inside = noise.clamp(first, last)
        position = (inside - first) * ((len(NOISE_GRID) - 1) / (last - first))
        below = position.floor().clamp(max=len(NOISE_GRID) - 2).long()
        factor = torch.arange(noise.shape[1], device=noise.device)
        low, high = (self.replicate_quantiles[factor, at] for at in (below, below + 1))
        return (torch.lerp(low, high, position - below) + noise - inside) @ self.replicate_factors.T

    @torch.no_grad()
    def silence(self) -> None:
        """Make the network's correction zero, as before training.

        Populations then are what the anchor says, and lie apart as replicates do on average.
        """
        for parameter in self.transformer.out.parameters():
            parameter.zero_()

    @property
    def is_silent(self) -> bool:
        """Whether the network's correction is zero."""
        return not any(bool(parameter.any()) for parameter in self.transformer.out.parameters())

    def n_evaluations(self, n_steps: int) -> int:
        """Evaluations when `n_steps` are asked for: one of a silent network.

        That takes noise off at pure noise only; the noise of further steps would stay in the cells.
        """
        return 1 if n_steps > 1 and self.is_silent else n_steps

    def draw_randomness(self, n_populations: int, n_cells: int, device: torch.device | str) -> Randomness:
        """Fresh extra noise."""
        return Randomness(
            torch.randn(n_populations, self.n_population_noise, device=device),
            torch.randn(n_populations, n_cells, self.n_cell_noise, device=device),
        )

    def encode_controls(self, controls: Tensor, mask: Tensor | None = None) -> EncodedControls:
        """Encode control cells `(b, n_controls, n_latent)` once, for all draws and steps."""
        encoded: EncodedControls = self.transformer.control_encoder(controls, mask)
        return encoded

    def embed(self, condition: Condition, features: Tensor | None, has_features: Tensor | None) -> Tensor:
        """Vector of a condition, `(b, width)`."""
        known = condition.keep[:, None]
        out = known * self.perturbation(condition.components, features, has_features) + (1 - known) * self.hidden
        out = out + self.prior(condition.prior.summary())
        for i, table in enumerate(self.categorical):
            code = condition.categories[:, i]
            out = out + table(code.clamp_min(0)) * (code >= 0)[:, None]
        if self.continuous is not None:
            out = out + self.continuous(condition.numbers)
        return out

    def forward(
        self,
        z_t: Tensor,
        t: Tensor,
        start: Tensor,
        condition: Tensor,
        prior: Prior,
        controls: EncodedControls,
        randomness: Randomness,
        mask: Tensor | None = None,
    ) -> Tensor:
        """Estimate clean populations `(b, n_cells, n_latent)`.

        Parameters
        ----------
        z_t
            Noised populations, `(b, n_cells, n_latent)`.
        t
            Times, `(b,)`.
        start
            Control cell that each cell starts from, `(b, n_cells, n_latent)`.
        condition
            Output of :meth:`embed`.
        anchor
            Retrieved responses.
        controls
            Output of :meth:`encode_controls`.
        randomness
            Extra noise.
        mask
            Which cells there are, `(b, n_cells)`.
        """
        cells = torch.cat([z_t, start, randomness.cell], dim=-1)
        seen = randomness.population if self.moves_mean else randomness.population * self.replicate_factors.any(0)
        correction = self.transformer(cells, t, condition + self.population_noise(seen), controls, mask)
        if not self.moves_mean:
            correction = correction - _mean_of_cells(correction, mask)
        alpha, variance = self.schedule.alpha(t)[:, None, None], self.schedule.sigma(t)[:, None, None].square()
        apart = (t >= 1)[:, None] * self.replicate_shift(randomness.population)
        return alpha * z_t + variance * (prior.move(start) + apart[:, None]) + correction

    @torch.no_grad()
    def sample(
        self,
        start: Tensor,
        condition: Condition,
        controls: EncodedControls,
        *,
        features: Tensor | None = None,
        has_features: Tensor | None = None,
        population_noise: Tensor | None = None,
        n_steps: int = 1,
        sampler: Sampler = "renoise",
        guidance: float = 1.0,
    ) -> Tensor:
        """Draw populations `(b, n_cells, n_latent)`.

        Parameters
        ----------
        start
            Control cell that each cell starts from, `(b, n_cells, n_latent)`, standardised.
        condition
            Conditions of the `b` populations.
        controls
            Encoded controls of the `b` populations.
        features, has_features
            Feature table of components.
        population_noise
            Noise shared by the population, `(b, n_population_noise)`; the same for all pieces of a population that is
            drawn in pieces. `None` draws it.
        n_steps, sampler
            See :func:`scperturbdiff.diffusion.sample` and :meth:`n_evaluations`.
        guidance
            Weight of classifier-free guidance; 1 is off.
        """
        b, m, _ = start.shape
        n_steps = self.n_evaluations(n_steps)
        embedded = self.embed(condition, features, has_features)
        unconditional = self.embed(condition.hidden(), features, has_features) if guidance != 1.0 else None
        if population_noise is None:
            population_noise = torch.randn(b, self.n_population_noise, device=start.device)
        apart = self.replicate_shift(population_noise)

        def denoise(z: Tensor, t: Tensor) -> Tensor:
            randomness = Randomness(population_noise, torch.randn(b, m, self.n_cell_noise, device=z.device))
            estimate = self(z, t, start, embedded, condition.prior, controls, randomness)
            if unconditional is not None:
                blind = self(z, t, start, unconditional, condition.prior, controls, randomness)
                estimate = guide(estimate, blind, guidance)
            if self.moves_mean:
                return estimate
            # where a draw lies was decided at pure noise, and the network does not bring it back
            return estimate + ((t < 1) * self.schedule.sigma(t).square())[:, None, None] * apart[:, None]

        return sample(denoise, self.schedule.noise_like(start), self.schedule, n_steps, sampler)


def _mean_of_cells(values: Tensor, mask: Tensor | None) -> Tensor:
    """Mean over the cells of each population, `(b, n_cells, d) -> (b, 1, d)`."""
    if mask is None:
        return values.mean(1, keepdim=True)
    weight = mask[..., None].to(values.dtype)
    return (values * weight).sum(1, keepdim=True) / weight.sum(1, keepdim=True).clamp(min=1)
