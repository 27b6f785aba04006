"""Samplers, against diffusers' schedulers and against Gaussian data, where everything is known."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from scperturbdiff.diffusion import NoiseSchedule, guide, sample

MEAN, SD = 1.0, 0.4
"""Of the Gaussian data."""
SCHEDULE = NoiseSchedule()


def posterior(z: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of clean cells given noised ones, for independent cells N(MEAN, SD^2)."""
    alpha, sigma = SCHEDULE.alpha(t)[:, None, None], SCHEDULE.sigma(t)[:, None, None]
    variance = alpha**2 * SD**2 + sigma**2
    return MEAN + alpha * SD**2 / variance * (z - alpha * MEAN), SD * sigma / variance.sqrt()


def posterior_mean(z: Tensor, t: Tensor) -> Tensor:
    return posterior(z, t)[0]


def posterior_sample(z: Tensor, t: Tensor) -> Tensor:
    mean, deviation = posterior(z, t)
    return mean + deviation * torch.randn_like(z)


def bent(z: Tensor, t: Tensor) -> Tensor:
    """A denoiser that is linear in nothing."""
    return torch.tanh(z) + 0.3 * torch.sin(3 * z) * t[:, None, None] + 0.2 * z.mean(1, keepdim=True)


@dataclass(frozen=True)
class SoftSchedule(NoiseSchedule):
    """A schedule with a little signal left at `t = 1`, as diffusers' multistep solver needs it."""

    def alpha(self, t: Tensor) -> Tensor:
        return torch.cos(t * 1.5)

    def sigma(self, t: Tensor) -> Tensor:
        return torch.sin(t * 1.5)


# ---- oracles -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n_steps", [1, 2, 5, 20])
def test_ddim_equals_diffusers(n_steps: int) -> None:
    diffusers = pytest.importorskip("diffusers")
    n_train = 1000
    oracle = diffusers.DDIMScheduler(
        num_train_timesteps=n_train, prediction_type="sample", clip_sample=False, timestep_spacing="trailing"
    )
    times = (torch.arange(n_train, dtype=torch.float64) + 1) / n_train
    oracle.alphas_cumprod = SCHEDULE.alpha(times) ** 2
    oracle.set_timesteps(n_steps)
    noise = torch.randn(2, 6, 3, dtype=torch.float64)
    z = noise
    for step in oracle.timesteps:
        t = torch.full((2,), times[step].item(), dtype=torch.float64)
        z = oracle.step(bent(z, t), step, z).prev_sample
    found = sample(bent, noise, SCHEDULE, n_steps, "ddim")
    torch.testing.assert_close(found, z, rtol=0, atol=1e-9)


@pytest.mark.parametrize("n_steps", [2, 3, 5, 12])
def test_dpm_solver_equals_diffusers(n_steps: int) -> None:
    diffusers = pytest.importorskip("diffusers")
    schedule = SoftSchedule()
    oracle = diffusers.DPMSolverMultistepScheduler(
        solver_order=2, algorithm_type="dpmsolver++", prediction_type="sample", final_sigmas_type="zero"
    )
    oracle.set_timesteps(n_steps)
    times = torch.tensor(schedule.timesteps(n_steps), dtype=torch.float64)
    oracle.sigmas = schedule.sigma(times) / schedule.alpha(times)
    noise = torch.randn(2, 6, 3, dtype=torch.float64)
    z = noise
    for i, step in enumerate(oracle.timesteps):
        z = oracle.step(bent(z, times[i].expand(2)), step, z).prev_sample
    found = sample(bent, noise, schedule, n_steps, "dpm++")
    torch.testing.assert_close(found, z, rtol=0, atol=1e-6)
    if n_steps > 2:
        assert (found - sample(bent, noise, schedule, n_steps, "ddim")).abs().max() > 1e-3


@dataclass(frozen=True)
class PartialPath(SoftSchedule):
    """Visits `t = 0.1` before data, however many steps there are, so that states there can be compared."""

    def timesteps(self, n_steps: int) -> list[float]:
        return [1 - 0.9 * i / (n_steps - 1) for i in range(n_steps)] + [0.0]


def path_error(n_steps: int, sampler) -> float:
    """Error at `t = 0.1`: for Gaussian data the position in units of the standard deviation never changes."""
    schedule, states = PartialPath(), []

    def moments(t: Tensor) -> tuple[Tensor, Tensor]:
        alpha, sigma = schedule.alpha(t)[:, None, None], schedule.sigma(t)[:, None, None]
        return alpha * MEAN, (alpha**2 * SD**2 + sigma**2).sqrt()

    def denoise(z: Tensor, t: Tensor) -> Tensor:
        mean, deviation = moments(t)
        states.append((z - mean) / deviation)
        return MEAN + schedule.alpha(t)[:, None, None] * SD**2 * (z - mean) / deviation**2

    sample(denoise, torch.randn(1, 50, 1, dtype=torch.float64), schedule, n_steps, sampler)
    return (states[-1] - states[0]).abs().max().item()


@pytest.mark.parametrize(("sampler", "order"), [("ddim", 1), ("dpm++", 2)])
def test_order_of_convergence(sampler, order: int) -> None:
    errors = []
    for n_steps in (65, 129, 257, 513):
        torch.manual_seed(0)
        errors.append(path_error(n_steps, sampler))
    for coarse, fine in zip(errors, errors[1:], strict=False):
        assert math.log2(coarse / fine) == pytest.approx(order, abs=0.2)


@pytest.mark.parametrize(("sampler", "error"), [("ddim", 0.03), ("dpm++", 0.003)])
def test_exact_denoisers_end_at_the_exact_population(sampler, error: float) -> None:
    """From pure noise to data the path of the exact denoiser ends at MEAN + SD * noise."""
    noise = torch.randn(1, 50, 1, dtype=torch.float64)
    found = sample(posterior_mean, noise, SCHEDULE, 128, sampler)
    assert (found - MEAN - SD * noise).abs().max().item() < error


# ---- law of the samples --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n_steps", [1, 2, 7])
def test_renoising_samples_the_law_when_each_evaluation_does(n_steps: int) -> None:
    drawn = sample(posterior_sample, torch.randn(1, 40_000, 1), SCHEDULE, n_steps, "renoise").flatten()
    assert drawn.mean().item() == pytest.approx(MEAN, abs=4 * SD / math.sqrt(len(drawn)))
    assert drawn.std().item() == pytest.approx(SD, rel=0.02)
    z = (drawn - MEAN) / SD
    assert (z**3).mean().item() == pytest.approx(0, abs=0.06)
    assert (z**4).mean().item() == pytest.approx(3, abs=0.15)


def test_deterministic_samplers_want_posterior_means() -> None:
    """What each sampler is for: means fed to `renoise` lose spread, samples fed to `dpm++` gain some."""
    noise = torch.randn(1, 20_000, 1)
    spread = {
        (denoise.__name__, sampler): sample(denoise, noise, SCHEDULE, 32, sampler).std().item()
        for denoise in (posterior_mean, posterior_sample)
        for sampler in ("renoise", "dpm++")
    }
    assert spread["posterior_sample", "renoise"] == pytest.approx(SD, rel=0.03)
    assert spread["posterior_mean", "dpm++"] == pytest.approx(SD, rel=0.03)
    assert spread["posterior_mean", "renoise"] < 0.75 * SD
    assert spread["posterior_sample", "dpm++"] > 1.04 * SD


# ---- contract ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sampler", ["renoise", "ddim", "dpm++"])
def test_the_denoiser_is_asked_once_a_step_at_falling_times(sampler) -> None:
    times: list[Tensor] = []

    def listen(z: Tensor, t: Tensor) -> Tensor:
        times.append(t)
        return bent(z, t)

    drawn = sample(listen, torch.randn(3, 5, 2), SCHEDULE, 4, sampler)
    assert drawn.shape == (3, 5, 2) and drawn.isfinite().all()
    assert all(t.shape == (3,) for t in times)
    assert [t[0].item() for t in times] == pytest.approx([1.0, 0.75, 0.5, 0.25])


@pytest.mark.parametrize("sampler", ["renoise", "ddim", "dpm++"])
def test_one_step_is_one_evaluation_at_pure_noise(sampler) -> None:
    noise = torch.randn(2, 4, 3)
    assert torch.equal(sample(bent, noise, SCHEDULE, 1, sampler), bent(noise, torch.ones(2)))


def test_seeds() -> None:
    noise = torch.randn(1, 6, 2)

    def run(seed: int, sampler) -> Tensor:
        torch.manual_seed(seed)
        return sample(bent, noise, SCHEDULE, 3, sampler)

    assert torch.equal(run(1, "renoise"), run(1, "renoise"))
    assert not torch.equal(run(1, "renoise"), run(2, "renoise"))
    for sampler in ("ddim", "dpm++"):  # all their randomness is in the noise they start from
        assert torch.equal(run(1, sampler), run(2, sampler))


def test_bad_arguments_are_named() -> None:
    with pytest.raises(ValueError, match="sampler='euler' must be one of"):
        sample(bent, torch.randn(1, 2, 1), SCHEDULE, 2, "euler")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="n_steps=0"):
        sample(bent, torch.randn(1, 2, 1), SCHEDULE, 0)


def test_guidance_is_linear() -> None:
    conditional, unconditional = torch.tensor([2.0]), torch.tensor([1.0])
    assert guide(conditional, unconditional, 1.0).item() == 2
    assert guide(conditional, unconditional, 0.0).item() == 1
    assert guide(conditional, unconditional, 3.0).item() == 4


def test_renoising_does_not_count_the_start_of_a_cell_twice() -> None:
    """The denoiser adds a cell's own start to what it is given, which is right only where the two are independent."""
    torch.manual_seed(0)
    start = torch.randn(1, 40_000, 1)

    def posterior(z: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        # cells are standard normal: alpha z + sigma (fresh noise), the fresh noise being the cell's start
        return SCHEDULE.alpha(t)[:, None, None] * z + SCHEDULE.sigma(t)[:, None, None] * start

    for n_steps in (1, 2, 4, 8):
        drawn = sample(posterior, torch.randn(1, 40_000, 1), SCHEDULE, n_steps, "renoise")
        assert drawn.std().item() == pytest.approx(1.0, rel=0.02), n_steps
