"""How replicates of a condition differ: found where they do, not invented where chance alone sets them apart."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from scperturbdiff import PerturbDiff, datasets
from scperturbdiff.data import Ragged
from scperturbdiff.diffusion import NOISE_GRID, Anchor, Components, Condition, Generator
from scperturbdiff.responses import largest_noise_eigenvalue, replicate_law, smooth_quantiles, spike

D, WITHIN = 6, 0.7
AXIS = np.ones(D) / D**0.5


def screen(
    hidden: np.ndarray, n_cells: int = 40, shared_controls: bool = False, seed: int = 0, axis: np.ndarray = AXIS
):
    """Populations whose hidden factor is `hidden` `(n_conditions, n_replicates)`, each with controls of its own."""
    rng = np.random.default_rng(seed)
    n_conditions, n_replicates = hidden.shape
    n = hidden.size
    centre = rng.normal(size=(n_conditions, D))[:, None] + hidden[..., None] * axis
    treated = centre.reshape(n, 1, D) + WITHIN * rng.normal(size=(n, n_cells, D))
    n_pools = 1 if shared_controls else n
    controls = WITHIN * rng.normal(size=(n_pools, n_cells, D))
    latent = torch.as_tensor(np.concatenate([treated.reshape(-1, D), controls.reshape(-1, D)]))
    rows = np.arange(len(latent)).reshape(-1, n_cells)
    table = SimpleNamespace(
        condition=np.repeat(np.arange(n_conditions), n_replicates),
        cells=Ragged.from_lists(list(rows[:n])),
        match=SimpleNamespace(
            pools=Ragged.from_lists(list(rows[n:])), pool=np.zeros(n, int) if shared_controls else np.arange(n)
        ),
    )
    return table, latent


@pytest.mark.parametrize("shared_controls", [False, True])
@pytest.mark.parametrize("n_cells", [5, 40])
def test_replicates_that_differ_by_chance_alone_have_no_factors(shared_controls: bool, n_cells: int) -> None:
    found = [
        replicate_law(*screen(np.zeros((6, 5)), n_cells, shared_controls, seed), 4).factors.shape[1]
        for seed in range(100)
    ]
    assert np.mean(np.array(found) > 0) <= 0.06  # at the 99 % quantile, of few degrees of freedom


@pytest.mark.parametrize("shared_controls", [False, True])
def test_a_hidden_factor_is_found_with_its_direction_and_strength(shared_controls: bool) -> None:
    hidden = 1.5 * np.random.default_rng(1).normal(size=(8, 25))
    law = replicate_law(*screen(hidden, shared_controls=shared_controls), 4)
    assert law.factors.shape == (D, 1)
    measured = np.sqrt((hidden - hidden.mean(1, keepdims=True)).var(axis=1, ddof=1).mean())
    assert np.linalg.norm(law.factors) == pytest.approx(measured, rel=0.02)
    assert abs(law.factors[:, 0] @ AXIS) == pytest.approx(measured, rel=0.02)


def test_strength_does_not_grow_with_the_noise_of_few_cells() -> None:
    hidden = 0.5 * np.random.default_rng(1).normal(size=(10, 20))
    few, many = (np.linalg.norm(replicate_law(*screen(hidden, n), 4).factors) for n in (4, 200))
    assert few == pytest.approx(many, rel=0.15)


def test_two_modes_are_told_from_a_cloud() -> None:
    rng = np.random.default_rng(0)
    modes, cloud = (
        replicate_law(*screen(1.5 * h), 4).quantiles[0]
        for h in (rng.choice([-1.0, 1.0], (10, 20)), rng.normal(size=(10, 20)))
    )
    normal = np.exp(-0.5 * np.square(NOISE_GRID))

    def central(quantiles: np.ndarray) -> float:
        return float(normal[np.abs(quantiles) < 0.4].sum() / normal.sum())

    assert central(modes) < 0.15 < 0.25 < central(cloud)


def test_few_replicates_are_taken_for_gaussian() -> None:
    hidden = 1.5 * np.random.default_rng(0).choice([-1.0, 1.0], (10, 3))
    np.testing.assert_array_equal(replicate_law(*screen(hidden), 4).quantiles, [NOISE_GRID])


def test_only_the_strongest_factors_are_kept() -> None:
    rng = np.random.default_rng(0)
    table, latent = screen(2 * rng.normal(size=(10, 10)))
    other = np.where(np.arange(D) == 0, 1.0, 0.0) - AXIS[0] * AXIS
    move = 0.8 * rng.normal(size=len(table.condition))
    for population, amount in enumerate(move):
        latent[table.cells[population]] += amount * torch.as_tensor(other)
    assert replicate_law(table, latent, 4).factors.shape[1] == 2
    assert abs(replicate_law(table, latent, 1).factors[:, 0] @ AXIS) > 1.5


@pytest.mark.parametrize("n_replicates", [1, 2])
def test_hardly_any_replicates(n_replicates: int) -> None:
    law = replicate_law(*screen(np.ones((1, n_replicates))), 4)
    assert law.factors.shape == (D, 0) and law.quantiles.shape == (0, len(NOISE_GRID))


@pytest.mark.parametrize("n_cells", [1, 2])
def test_populations_of_one_or_two_cells(n_cells: int) -> None:
    law = replicate_law(*screen(np.zeros((2, 5)), n_cells), 4)
    assert np.isfinite(law.factors).all() and (n_cells > 1 or law.factors.shape == (D, 0))


def test_largest_eigenvalue_of_noise() -> None:
    rng = np.random.default_rng(0)
    for dimensions, freedom, noise_freedom in ((8, 100, 10**9), (32, 60, 10**9), (8, 40, 100)):
        noise = rng.normal(size=(400, freedom, dimensions))
        covariance = np.swapaxes(noise, 1, 2) @ noise / freedom
        if noise_freedom < 10**9:
            other = rng.normal(size=(400, noise_freedom, dimensions))
            covariance = np.linalg.solve(np.swapaxes(other, 1, 2) @ other / noise_freedom, covariance)
        largest = np.linalg.eigvals(covariance).real.max(1)
        assert 0.96 < (largest < largest_noise_eigenvalue(dimensions, freedom, noise_freedom)).mean() <= 1


@given(strength=st.floats(3.0, 50.0), ratio=st.floats(0.05, 1.5))
@settings(max_examples=30, deadline=None)
def test_inflation_by_noise_is_taken_back(strength: float, ratio: float) -> None:
    inflated = strength * (1 + ratio / (strength - 1))  # where the eigenvalue lies in the limit
    assert spike(np.array([inflated]), ratio)[0] == pytest.approx(strength, rel=1e-6)


@given(st.integers(0, 1000), st.integers(30, 200))
@settings(max_examples=20, deadline=None)
def test_quantiles_rise_and_are_standardised(seed: int, n: int) -> None:
    quantiles = smooth_quantiles(np.random.default_rng(seed).exponential(size=(n, 2)))
    assert (np.diff(quantiles) >= 0).all()
    weight = np.exp(-0.5 * np.square(NOISE_GRID))
    weight /= weight.sum()
    assert np.abs(quantiles @ weight).max() < 0.05
    np.testing.assert_allclose(np.square(quantiles) @ weight, 1, atol=0.12)


# ---- the generator ---------------------------------------------------------------------------------------------------


@pytest.fixture
def generator() -> Generator:
    torch.manual_seed(0)
    return Generator(D, n_names=2, width=16, n_layers=1, n_heads=2, n_population_noise=4).eval()


def draw(generator: Generator, noise: torch.Tensor, n_steps: int = 1) -> torch.Tensor:
    b = len(noise)
    start = torch.randn(1, 9, D).expand(b, -1, -1)
    condition = Condition(
        Components(torch.zeros(b, 1, dtype=torch.long), torch.zeros(b, 1)),
        Anchor.none(b, D),
        torch.zeros(b, 0, dtype=torch.long),
        torch.zeros(b, 0),
        torch.ones(b),
    )
    return (
        generator.sample(start, condition, generator.encode_controls(start), population_noise=noise, n_steps=n_steps)
        - start
    )


def test_an_untrained_generator_spreads_as_replicates_do(generator: Generator) -> None:
    factors = torch.randn(D, 2)
    noise = torch.randn(5, 4)
    assert draw(generator, noise).abs().max() < 1e-5
    generator.set_replicates(factors, torch.tensor([NOISE_GRID] * 2))
    moved = draw(generator, noise)
    torch.testing.assert_close(moved, (noise[:, :2] @ factors.T)[:, None].expand_as(moved), atol=1e-4, rtol=1e-4)
    generator.set_replicates(torch.zeros(D, 0), torch.zeros(0, len(NOISE_GRID)))
    assert draw(generator, noise).abs().max() < 1e-5


def test_noise_beyond_the_grid_goes_on(generator: Generator) -> None:
    generator.set_replicates(torch.eye(D)[:, :1], torch.tensor([NOISE_GRID]))
    noise = torch.zeros(6, 4)
    noise[:, 0] = torch.tensor([-4.0, -3.0, -0.05, 0.0, 3.0, 5.5])
    torch.testing.assert_close(generator.replicate_shift(noise)[:, 0], noise[:, 0])


def test_replicates_are_saved_with_the_weights(generator: Generator) -> None:
    generator.set_replicates(torch.randn(D, 3), torch.tensor([NOISE_GRID] * 3) ** 3)
    other = Generator(D, n_names=2, width=16, n_layers=1, n_heads=2, n_population_noise=4).eval()
    other.load_state_dict(generator.state_dict())
    noise = torch.randn(4, 4)
    assert torch.equal(other.replicate_shift(noise), generator.replicate_shift(noise))


def test_an_objective_without_variation_takes_back_that_of_replicates() -> None:
    """Also when a model is trained further with another objective."""
    cells = datasets.simulate(
        n_contexts=2, n_perturbations=4, n_cells_per_population=20, n_genes=60, n_batches=6, hidden_factor="gaussian"
    )
    PerturbDiff.setup_anndata(cells, "perturbation", "control", context_keys=["cell_type"], batch_key="donor")
    model = PerturbDiff(cells, n_latent=8)
    brief = {"max_epochs_generator": 1, "enable_progress_bar": False}
    model.train(max_epochs_vae=5, plan_kwargs={"steps_per_epoch": 2}, **brief)
    assert model.module.generator_ema.replicate_factors.any()
    model.train(plan_kwargs={"steps_per_epoch": 2, "objective": "mmd"}, **brief)
    assert not model.module.generator_ema.replicate_factors.any()
    assert not model.module.generator.replicate_factors.any()
