"""The generator: control cells, moved as retrieval says, plus what a network adds to the shape of populations."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from scperturbdiff.diffusion._condition import Condition, Prior, Randomness
from scperturbdiff.diffusion._network import EncodedControls, PopulationTransformer
from scperturbdiff.diffusion._perturbation import PerturbationEncoder
from scperturbdiff.diffusion._samplers import Sampler, guide, sample
from scperturbdiff.diffusion._schedule import NoiseSchedule

if TYPE_CHECKING:
    from collections.abc import Sequence


class Generator(nn.Module):
    r"""Denoiser of latent populations.

    For a noised population :math:`z_t` whose cells start from control cells :math:`c_j` of mean :math:`\bar c`, with
    retrieved shift :math:`a` and log ratio of spreads :math:`r`,

    .. math::
        \hat z_j = \alpha_t z_{t,j} + \sigma_t^2 (\bar c + e^r (c_j - \bar c) + a) + w f_\theta(z_t, c, \dots)_j .

    The first two terms are the posterior mean when a treated cell is its control cell, moved as retrieval says, plus
    unit Gaussian noise; the network :math:`f_\theta` adds what that leaves out, with the weight :math:`w` in [0, 1]
    that held-out populations support. At pure noise, where nothing tells yet which population is drawn, :math:`a` also
    has a random offset :math:`L \varepsilon`, one for each population: `L` holds the directions along which replicates
    of a condition differ (``replicate_factors``), :math:`\varepsilon` is the population's noise, which the network
    sees. "No effect" is the zero of the network, an unseen context carries its own state and the shape of its
    populations, and which control a cell starts from is part of the noise: no treated cell is ever paired with a
    control.

    The network shapes populations: the mean of its correction over the cells of a population is taken off, and it sees
    noise of a population only along the directions of `L`. Where a population lies is said by retrieval, which a few
    conditions suffice for, and how far apart replicates lie by their law; a network that is free to move
    populations learns those of training by heart and scatters others over what it does not know.

    Parameters
    ----------
    n_latent
        Dimension of a cell.
    n_names, n_features
        Perturbation components with a learned vector of their own, and dimension of the feature table (0 without one).
    n_categories
        Number of categories of each categorical covariate.
    n_numbers
        Number of continuous covariates.
    width, n_layers, n_heads, dropout
        Size of the transformer.
    n_population_noise, n_cell_noise
        Dimensions of the extra noise.
    """

    def __init__(
        self,
        n_latent: int,
        n_names: int,
        n_features: int = 0,
        n_categories: Sequence[int] = (),
        n_numbers: int = 0,
        *,
        width: int = 64,
        n_layers: int = 2,
        n_heads: int = 4,
        dropout: float = 0.0,
        n_population_noise: int = 16,
        n_cell_noise: int = 8,
    ) -> None:
        super().__init__()
        self.n_latent = n_latent
        self.n_population_noise, self.n_cell_noise = n_population_noise, n_cell_noise
        self.schedule = NoiseSchedule()
        self.perturbation = PerturbationEncoder(n_names, n_features, width)
        self.categorical = nn.ModuleList(nn.Embedding(n, width) for n in n_categories)
        self.continuous = nn.Linear(n_numbers, width) if n_numbers else None
        self.prior = nn.Sequential(nn.Linear(n_latent + 2, width), nn.SiLU(), nn.Linear(width, width))
        self.population_noise = nn.Linear(n_population_noise, width)
        self.hidden = nn.Parameter(torch.zeros(width))
        self.register_buffer("replicate_factors", torch.zeros(n_latent, n_population_noise))
        self.register_buffer("network_weight", torch.zeros(()))
        self.transformer = PopulationTransformer(
            n_latent, 2 * n_latent + n_cell_noise, width=width, n_layers=n_layers, n_heads=n_heads, dropout=dropout
        )

    replicate_factors: Tensor
    network_weight: Tensor

    @torch.no_grad()
    def set_replicates(self, factors: Tensor) -> None:
        """Set the directions `(n_latent, n_factors)` along which replicates differ, as long as their s.d."""
        self.replicate_factors.zero_()
        self.replicate_factors[:, : factors.shape[1]] = factors

    def replicate_offset(self, noise: Tensor) -> Tensor:
        """Where a replicate lies, seen from the mean of its condition `(..., n_latent)`, from its noise."""
        return noise @ self.replicate_factors.T

    def n_evaluations(self, n_steps: int) -> int:
        """Evaluations of the network when `n_steps` are asked for: none where its weight is zero."""
        return n_steps if self.network_weight else 0

    def may_separate(self, n_steps: int, mixture: bool) -> bool:
        """Whether cells that start from the same control may go to different places."""
        return self.n_evaluations(n_steps) > 0 or (mixture and bool(self.replicate_factors.any()))

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
        offset: Tensor | None = None,
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
        prior
            Retrieved responses.
        controls
            Output of :meth:`encode_controls`.
        randomness
            Extra noise.
        mask
            Which cells there are, `(b, n_cells)`.
        offset
            Offset at pure noise, `(b, 1 or n_cells, n_latent)`. `None`: that of the population's noise.
        """
        cells = torch.cat([z_t, start, randomness.cell], dim=-1)
        visible = randomness.population * self.replicate_factors.any(0)
        correction = self.transformer(cells, t, condition + self.population_noise(visible), controls, mask)
        correction = correction - _mean_of_cells(correction, mask)
        alpha, variance = self.schedule.alpha(t)[:, None, None], self.schedule.sigma(t)[:, None, None].square()
        if offset is None:
            offset = self.replicate_offset(randomness.population)[:, None]
        moved = prior.move(start) + (t >= 1)[:, None, None] * offset
        return alpha * z_t + variance * moved + self.network_weight * correction

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
        mixture: bool = False,
        rng: torch.Generator | None = None,
    ) -> Tensor:
        """Draw populations `(b, n_cells, n_latent)`.

        Where the network has no weight a population is its control cells, moved, with the offset of a replicate.

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
            drawn in pieces. `None` draws it. Populations without a perturbation are no replicates of a response, and
            get none.
        n_steps, sampler
            See :func:`scperturbdiff.diffusion.sample` and :meth:`n_evaluations`; with no step the network is left out.
        guidance
            Weight of classifier-free guidance; 1 is off.
        mixture
            Give each cell the offset of a replicate of its own: the mixture over draws, which is the best single guess
            under the energy distance.
        rng
            What is drawn from, on the device of the cells; `None`: torch's global generator.
        """
        b, m, _ = start.shape
        drawn: dict[str, Any] = {"generator": rng, "device": start.device}
        if population_noise is None:
            population_noise = torch.randn(b, self.n_population_noise, **drawn)
        treated = condition.components.mask.any(-1, keepdim=True)
        population_noise = population_noise * treated
        offset = self.replicate_offset(population_noise)[:, None]
        apart = torch.zeros_like(offset)  # of each cell from its population: added last, as samplers reorder cells
        if mixture:
            noise = torch.randn(b, m, self.n_population_noise, **drawn)
            offset, apart = apart, self.replicate_offset(noise * treated[:, None])
        if not self.n_evaluations(n_steps):
            return condition.prior.move(start) + offset + apart
        embedded = self.embed(condition, features, has_features)
        unconditional = self.embed(condition.hidden(), features, has_features) if guidance != 1.0 else None

        def denoise(z: Tensor, t: Tensor) -> Tensor:
            randomness = Randomness(population_noise, torch.randn(b, m, self.n_cell_noise, **drawn))
            estimate = self(z, t, start, embedded, condition.prior, controls, randomness, offset=offset)
            if unconditional is not None:
                blind = self(z, t, start, unconditional, condition.prior, controls, randomness, offset=offset)
                estimate = guide(estimate, blind, guidance)
            # where a draw lies was decided at pure noise, and the network does not bring it back
            return estimate + ((t < 1) * self.schedule.sigma(t).square())[:, None, None] * offset

        return sample(denoise, self.schedule.noise_like(start, rng), self.schedule, n_steps, sampler, rng) + apart


def _mean_of_cells(values: Tensor, mask: Tensor | None) -> Tensor:
    """Mean over the cells of each population, `(b, n_cells, d) -> (b, 1, d)`."""
    if mask is None:
        return values.mean(1, keepdim=True)
    weight = mask[..., None].to(values.dtype)
    return (values * weight).sum(1, keepdim=True) / weight.sum(1, keepdim=True).clamp(min=1)
