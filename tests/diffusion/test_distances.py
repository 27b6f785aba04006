"""The forward process and the distances between populations."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from scperturbdiff.diffusion import NoiseSchedule, energy_distance, pairwise_distances

SETTINGS = settings(max_examples=40, deadline=None, derandomize=True)


def by_cdist(x: Tensor, y: Tensor, *, unbiased: bool) -> Tensor:
    """Energy distance of two single populations from its definition, in float64."""
    x, y = x.double(), y.double()
    n, m = len(x), len(y)
    between = torch.cdist(x, y, compute_mode="donot_use_mm_for_euclid_dist").sum() / (n * m)
    x_pairs, y_pairs = (n * (n - 1), m * (m - 1)) if unbiased else (n * n, m * m)
    within_x = torch.cdist(x, x, compute_mode="donot_use_mm_for_euclid_dist").sum() / x_pairs
    within_y = torch.cdist(y, y, compute_mode="donot_use_mm_for_euclid_dist").sum() / y_pairs
    return 2 * between - within_x - within_y


# ---- schedule ------------------------------------------------------------------------------------------------------


def test_noise_and_signal_levels_are_a_rotation() -> None:
    t = torch.linspace(0, 1, 1001, dtype=torch.float64)
    alpha, sigma = NoiseSchedule().alpha(t), NoiseSchedule().sigma(t)
    torch.testing.assert_close(alpha**2 + sigma**2, torch.ones_like(t), rtol=0, atol=1e-12)
    assert (alpha.diff() < 0).all() and (sigma.diff() > 0).all()
    assert alpha[0] == 1 and sigma[0] == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_time_one_is_pure_noise_exactly(dtype: torch.dtype) -> None:
    schedule, one = NoiseSchedule(), torch.ones(2, dtype=dtype)
    assert (schedule.alpha(one) == 0).all() and (schedule.sigma(one) == 1).all()
    noise = torch.randn(2, 5, 3, dtype=dtype)
    assert torch.equal(schedule.add_noise(torch.full_like(noise, 1e30), one, noise), noise)


def test_time_zero_is_data_exactly() -> None:
    z = torch.randn(2, 5, 3)
    assert torch.equal(NoiseSchedule().add_noise(z, torch.zeros(2)), z)


def test_one_time_for_each_population() -> None:
    schedule, z, noise = NoiseSchedule(), torch.randn(2, 3, 5, 4), torch.randn(2, 3, 5, 4)
    t = torch.tensor([[0.3], [0.8]])
    noised = schedule.add_noise(z, t, noise)
    for b, time in enumerate((0.3, 0.8)):
        expected = math.cos(math.pi * time / 2) * z[b] + math.sin(math.pi * time / 2) * noise[b]
        torch.testing.assert_close(noised[b], expected)


def test_noise_is_independent_for_each_cell() -> None:
    noise = NoiseSchedule().noise_like(torch.empty(40_000, 3, 2)).flatten(1)  # columns: cell x dimension
    torch.testing.assert_close(torch.cov(noise.T), torch.eye(6), rtol=0, atol=0.03)


def test_timesteps_run_from_noise_to_data() -> None:
    assert NoiseSchedule().timesteps(1) == [1.0, 0.0]
    assert NoiseSchedule().timesteps(4) == pytest.approx([1.0, 0.75, 0.5, 0.25, 0.0])
    with pytest.raises(ValueError, match="n_steps=0"):
        NoiseSchedule().timesteps(0)


def test_training_times_have_an_atom_at_pure_noise() -> None:
    t = NoiseSchedule().sample_times((20_000,), 0.25, "cpu")
    terminal = t == 1
    assert terminal.float().mean().item() == pytest.approx(0.25, abs=0.02)
    rest = t[~terminal]
    quantiles = torch.quantile(rest, torch.tensor([0.25, 0.5, 0.75]))
    torch.testing.assert_close(quantiles, torch.tensor([0.25, 0.5, 0.75]), rtol=0, atol=0.02)
    assert (NoiseSchedule().sample_times((100,), 1.0, "cpu") == 1).all()
    assert (NoiseSchedule().sample_times((100,), 0.0, "cpu") < 1).all()


# ---- distances -----------------------------------------------------------------------------------------------------


def test_pairwise_distances_equal_cdist() -> None:
    x, y = torch.randn(3, 7, 4), torch.randn(3, 9, 4) + 2
    torch.testing.assert_close(pairwise_distances(x, y), torch.cdist(x, y), rtol=1e-5, atol=1e-5)


def test_distances_keep_their_digits_far_from_the_origin() -> None:
    x, y = torch.randn(64, 8) + 3000, torch.randn(64, 8) + 3000
    for unbiased in (True, False):
        found = energy_distance(x, y, unbiased=unbiased).double()
        torch.testing.assert_close(found, by_cdist(x, y, unbiased=unbiased), rtol=0, atol=1e-4)


@pytest.mark.parametrize("unbiased", [True, False])
def test_energy_distance_equals_its_definition(unbiased: bool) -> None:
    x, y = torch.randn(4, 12, 5), 1.5 * torch.randn(4, 17, 5) + 1
    found = energy_distance(x, y, unbiased=unbiased)
    expected = torch.stack([by_cdist(a, b, unbiased=unbiased) for a, b in zip(x, y, strict=True)])
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)


def test_energy_distance_equals_geomloss_in_value_and_gradient() -> None:
    geomloss = pytest.importorskip("geomloss")
    x, y = torch.randn(20, 6, requires_grad=True), torch.randn(25, 6) + 1
    oracle = 2 * geomloss.SamplesLoss("energy", backend="tensorized")(x, y)
    (expected,) = torch.autograd.grad(oracle, x)
    ours = energy_distance(x, y, unbiased=False)
    (gradient,) = torch.autograd.grad(ours, x)
    torch.testing.assert_close(ours, oracle, rtol=0, atol=1e-4)  # geomloss puts a cell 1e-4 from itself
    torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-5)


def test_energy_distance_of_two_points_is_twice_their_distance() -> None:
    x, y = torch.tensor([[0.0, 0.0]]), torch.tensor([[3.0, 4.0]])
    for unbiased in (True, False):
        assert energy_distance(x, y, unbiased=unbiased).item() == pytest.approx(10, rel=1e-6)


@pytest.mark.parametrize("shift", [0.5, 2.0])
def test_energy_distance_of_normal_laws(shift: float) -> None:
    """Closed form: |X - Y| of two normals is a folded normal."""
    x, y = torch.randn(3000, 1), torch.randn(3000, 1) + shift
    folded = 2 / math.sqrt(math.pi) * math.exp(-(shift**2) / 4) + shift * math.erf(shift / 2)
    expected = 2 * folded - 4 / math.sqrt(math.pi)
    assert energy_distance(x, y).item() == pytest.approx(expected, rel=0.12)


def test_u_statistic_is_unbiased_and_v_statistic_is_not() -> None:
    x, y = torch.randn(3000, 16, 8), torch.randn(3000, 16, 8)
    u, v = energy_distance(x, y), energy_distance(x, y, unbiased=False)
    error = (u.std() / math.sqrt(len(u))).item()
    assert abs(u.mean().item()) < 4 * error
    assert (u < 0).float().mean() > 0.3  # an unbiased estimate of zero has to go below it
    # the bias of the V-statistic is the mean distance over m, once for each population
    assert v.mean().item() == pytest.approx(2 * torch.cdist(x[:, :1], y[:, :1]).mean().item() / 16, rel=0.05)


@st.composite
def two_populations(draw: st.DrawFn) -> tuple[Tensor, Tensor]:
    dimension = draw(st.integers(1, 4))
    numbers = st.floats(-20, 20, width=32)
    # few distinct values, so that cells coincide within and between populations
    values = draw(st.lists(st.lists(numbers, min_size=dimension, max_size=dimension), min_size=2, max_size=5))
    cells = st.lists(st.sampled_from(values), min_size=1, max_size=8)
    return torch.tensor(draw(cells)), torch.tensor(draw(cells))


@SETTINGS
@given(two_populations())
def test_v_statistic_is_a_squared_distance(populations: tuple[Tensor, Tensor]) -> None:
    x, y = populations
    tolerance = 1e-3 * (1 + max(x.abs().max().item(), y.abs().max().item()))
    there, back = energy_distance(x, y, unbiased=False), energy_distance(y, x, unbiased=False)
    assert there.item() >= -tolerance
    assert there.item() == pytest.approx(back.item(), abs=tolerance)
    assert there.item() == pytest.approx(by_cdist(x, y, unbiased=False).item(), abs=tolerance)
    assert abs(energy_distance(x, x.flip(0), unbiased=False).item()) < tolerance


@SETTINGS
@given(st.integers(1, 6), st.integers(1, 6), st.booleans(), st.integers(0, 2**31))
def test_a_mask_cuts_the_population(n: int, m: int, unbiased: bool, seed: int) -> None:
    torch.manual_seed(seed)
    x, y = 3 * torch.randn(6, 3), 3 * torch.randn(6, 3) + 1
    cells = torch.arange(6)
    masked = energy_distance(x, y, cells < n, cells < m, unbiased=unbiased)
    torch.testing.assert_close(masked, energy_distance(x[:n], y[:m], unbiased=unbiased), rtol=1e-4, atol=1e-4)


def test_masked_cells_receive_no_gradient() -> None:
    x = torch.randn(2, 6, 3, requires_grad=True)
    mask = torch.arange(6) < torch.tensor([[4], [6]])
    energy_distance(x, torch.randn(2, 5, 3), mask).sum().backward()
    assert x.grad is not None
    assert (x.grad[0, 4:] == 0).all() and (x.grad[0, :4] != 0).all() and (x.grad[1] != 0).all()


def test_order_of_cells_does_not_matter() -> None:
    x, y = torch.randn(30, 4), torch.randn(20, 4) + 1
    again = energy_distance(x[torch.randperm(30)], y[torch.randperm(20)])
    torch.testing.assert_close(energy_distance(x, y), again, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("unbiased", [True, False])
@pytest.mark.parametrize("n", [1, 2, 5])
def test_duplicated_cells_have_finite_gradients(unbiased: bool, n: int) -> None:
    x = torch.ones(n, 3, requires_grad=True)
    distance = energy_distance(x, torch.ones(n, 3), unbiased=unbiased)
    distance.backward()
    assert distance.item() == pytest.approx(0, abs=1e-3)
    assert x.grad is not None and x.grad.isfinite().all()


def test_two_cells() -> None:
    x, y = torch.tensor([[0.0], [2.0]]), torch.tensor([[1.0], [1.0]])
    assert energy_distance(x, y, unbiased=True).item() == pytest.approx(2 * 1 - 2 - 0, abs=1e-3)
    assert energy_distance(x, y, unbiased=False).item() == pytest.approx(2 * 1 - 1 - 0, abs=1e-3)


def test_bfloat16_is_computed_in_float32() -> None:
    x, y = torch.randn(64, 8).bfloat16(), (torch.randn(64, 8) + 0.2).bfloat16()
    found = energy_distance(x, y)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, energy_distance(x.float(), y.float()), rtol=1e-6, atol=1e-7)
    assert energy_distance(x.double(), y).dtype == torch.float64


def test_autocast_does_not_reach_the_distances() -> None:
    x, y = torch.randn(64, 8), torch.randn(64, 8)
    with torch.autocast("cpu", torch.bfloat16):
        inside = energy_distance(x, y)
    assert torch.equal(inside, energy_distance(x, y))
