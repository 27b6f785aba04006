"""The forward process: how a population of latent vectors is noised."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from scperturbdiff.arguments import check_int


@dataclass(frozen=True)
class NoiseSchedule:
    """Variance-preserving cosine schedule in continuous time.

    `z_t = alpha(t) z + sigma(t) xi` with `alpha = cos(pi t / 2)` and `sigma = sin(pi t / 2)`, so `t = 0` is data and
    `t = 1` is pure noise, exactly: sampling may start from noise without a gap to the training distribution.
    """

    def alpha(self, t: Tensor) -> Tensor:
        """Signal level at times `t` in [0, 1]."""
        # cos(pi/2) is 6e-17 in floating point; exact zero makes pure noise carry nothing of the data
        return torch.where(t >= 1, torch.zeros_like(t), torch.cos(t * (math.pi / 2)))

    def sigma(self, t: Tensor) -> Tensor:
        """Noise level at times `t` in [0, 1]."""
        return torch.sin(t * (math.pi / 2))

    def noise_like(self, z: Tensor, rng: torch.Generator | None = None) -> Tensor:
        """Standard normal noise for populations `z` of shape `(..., n_cells, n_latent)`, independent for each cell."""
        return torch.randn(z.shape, generator=rng, dtype=z.dtype, device=z.device)

    def add_noise(self, z: Tensor, t: Tensor, noise: Tensor | None = None) -> Tensor:
        """Noised populations; `z` is `(..., n_cells, n_latent)`, `t` broadcasts to `(...)`: one time a population."""
        noise = self.noise_like(z) if noise is None else noise
        return self.alpha(t)[..., None, None] * z + self.sigma(t)[..., None, None] * noise

    def timesteps(self, n_steps: int) -> list[float]:
        """The `n_steps + 1` times visited when sampling, from 1 (noise) down to 0 (data), evenly spaced."""
        check_int("n_steps", n_steps, 1)
        return [1.0 - i / n_steps for i in range(n_steps)] + [0.0]

    def sample_times(self, shape: tuple[int, ...], p_terminal: float, device: torch.device | str) -> Tensor:
        """Training times: `t = 1` with probability `p_terminal`, else uniform on (0, 1)."""
        t = torch.rand(shape, device=device)
        return torch.where(torch.rand(shape, device=device) < p_terminal, torch.ones_like(t), t)
