"""Samplers: from noise to a population, in one or a few evaluations of the denoiser.

A denoiser is a function of `(z_t, t)` that returns an estimate of the clean population, of the shape of `z_t`
(`(n_populations, n_cells, n_latent)`), with `t` of shape `(n_populations,)`.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from scperturbdiff.arguments import check_choice

if TYPE_CHECKING:
    from collections.abc import Callable

    from scperturbdiff.diffusion._schedule import NoiseSchedule


Sampler = Literal["renoise", "ddim", "dpm++"]
"""Names of the samplers."""
SAMPLERS: tuple[str, ...] = ("renoise", "ddim", "dpm++")


def sample(
    denoise: Callable[[Tensor, Tensor], Tensor],
    noise: Tensor,
    schedule: NoiseSchedule,
    n_steps: int = 1,
    sampler: Sampler = "renoise",
    rng: torch.Generator | None = None,
) -> Tensor:
    """Run the reverse process from `noise` at `t = 1`.

    Parameters
    ----------
    denoise
        The denoiser.
    noise
        Populations of pure noise, `(n_populations, n_cells, n_latent)`.
    schedule
        The forward process.
    n_steps
        Evaluations of the denoiser.
    sampler
        ``"renoise"`` noises each estimate afresh, its cells in a new order, to the next level: right for a denoiser
        trained with a score of whole populations, each of whose evaluations is a sample. ``"ddim"`` (Song et al. 2021)
        and ``"dpm++"`` (second-order multistep DPM-Solver++, Lu et al. 2022) follow the deterministic path of a
        denoiser trained with squared error, whose evaluations are posterior means.
    rng
        What is drawn from, on the device of `noise`; `None`: torch's global generator.

    Returns
    -------
    Populations, `(n_populations, n_cells, n_latent)`.
    """
    check_choice("sampler", sampler, SAMPLERS)
    times = schedule.timesteps(n_steps)
    levels = torch.tensor(times, dtype=torch.float64)
    alphas, sigmas = schedule.alpha(levels).tolist(), schedule.sigma(levels).tolist()
    z, previous = noise, None
    for i in range(n_steps):
        t = torch.full(z.shape[:1], times[i], device=z.device, dtype=z.dtype)
        estimate = denoise(z, t)
        if i == n_steps - 1:
            return estimate
        if sampler == "renoise":
            # In training a noised cell is independent of the control cell that the denoiser is told it starts from.
            # An estimate came from that control: without a new order (cells are exchangeable) it would count twice.
            estimate = estimate[..., torch.randperm(z.shape[-2], generator=rng, device=z.device), :]
            z = alphas[i + 1] * estimate + sigmas[i + 1] * schedule.noise_like(estimate, rng)
        elif sampler == "ddim":
            z = _ddim_step(z, estimate, (alphas[i], sigmas[i]), (alphas[i + 1], sigmas[i + 1]))
        else:
            used = estimate if previous is None else _extrapolate(estimate, previous, alphas, sigmas, i)
            z = _ddim_step(z, used, (alphas[i], sigmas[i]), (alphas[i + 1], sigmas[i + 1]))
            previous = estimate
    raise AssertionError("unreachable: the last step returns")


def _ddim_step(z: Tensor, estimate: Tensor, now: tuple[float, float], then: tuple[float, float]) -> Tensor:
    """Deterministic step; the same formula is the first-order step of DPM-Solver++."""
    (alpha, sigma), (alpha_next, sigma_next) = now, then
    return alpha_next * estimate + (sigma_next / sigma) * (z - alpha * estimate)


def _extrapolate(estimate: Tensor, previous: Tensor, alphas: list[float], sigmas: list[float], i: int) -> Tensor:
    """Second-order multistep estimate, linear in the log signal-to-noise ratio lambda = log(alpha / sigma)."""
    if alphas[i - 1] == 0:  # lambda is -infinity at pure noise: the correction h_next / (2 h) is zero there
        return estimate
    before, now, after = (math.log(alphas[j] / sigmas[j]) for j in (i - 1, i, i + 1))
    ratio = (after - now) / (now - before)
    return estimate + 0.5 * ratio * (estimate - previous)


def guide(conditional: Tensor, unconditional: Tensor, weight: float) -> Tensor:
    """Classifier-free guidance (Ho & Salimans 2022): `unconditional + weight * (conditional - unconditional)`."""
    return unconditional + weight * (conditional - unconditional)
