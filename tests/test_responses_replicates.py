"""How replicates of a condition differ: found where they do, not invented where chance alone sets them apart."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from scperturbdiff.data import Groups
from scperturbdiff.diffusion import Components, Condition, Generator, Prior
from scperturbdiff.responses import (
    MeasuredPopulations,
    largest_noise_eigenvalue,
    measure_populations,
    replicate_factors,
    spike,
)

D, WITHIN = 6, 0.7
AXIS = np.ones(D) / D**0.5


def screen(
    hidden: np.ndarray, n_cells: int = 40, shared_controls: bool = False, seed: int = 0, axis: np.ndarray = AXIS
) -> MeasuredPopulations:
    """Populations whose hidden factor is `hidden` `(n_conditions, n_replicates)`, each with controls of its own."""
    rng = np.random.default_rng(seed)
    n_conditions, n_replicates = hidden.shape
    n = hidden.size
    centre = rng.normal(size=(n_conditions, D))[:, None] + hidden[..., None] * axis
    treated = centre.reshape(n, 1, D) + WITHIN * rng.normal(size=(n, n_cells, D))
    n_pools = 1 if shared_controls else n
    controls = WITHIN * rng.normal(size=(n_pools, n_cells, D))
    return measured(
        np.concatenate([treated.reshape(-1, D), controls.reshape(-1, D)]), n_conditions, n_replicates, n_pools
    )


def measured(latent: np.ndarray, n_conditions: int, n_replicates: int, n_pools: int) -> MeasuredPopulations:
    """Populations of equal size, then pools of controls, cells in order."""
    n = n_conditions * n_replicates
    n_cells = len(latent) // (n + n_pools)
    rows = np.arange(len(latent)).reshape(-1, n_cells)
    condition = np.repeat(np.arange(n_conditions), n_replicates)
    table: Any = SimpleNamespace(
        condition=condition,
        component=condition[:, None],
        dose=np.zeros((n, 1)),
        context=np.zeros(n, np.int64),
        cells=Groups.from_lists(list(rows[:n])),
        match=SimpleNamespace(
            groups=Groups.from_lists(list(rows[n:])), group=np.zeros(n, int) if n_pools == 1 else np.arange(n)
        ),
    )
    counts = np.ones((len(latent), 1), np.float32)
    batch = np.zeros(len(latent), np.int64)
    return measure_populations(table, torch.as_tensor(latent), counts, batch, lambda z, _: torch.ones(len(z), 1))


@pytest.mark.parametrize("shared_controls", [False, True])
@pytest.mark.parametrize("n_cells", [5, 40])
def test_replicates_that_differ_by_chance_alone_have_no_factors(shared_controls: bool, n_cells: int) -> None:
    found = [
        replicate_factors(screen(np.zeros((6, 5)), n_cells, shared_controls, seed), 4).shape[1] for seed in range(100)
    ]
    assert np.mean(np.array(found) > 0) <= 0.06  # at the 99 % quantile, of few degrees of freedom


@pytest.mark.parametrize("shared_controls", [False, True])
def test_a_hidden_factor_is_found_with_its_direction_and_strength(shared_controls: bool) -> None:
    hidden = 1.5 * np.random.default_rng(1).normal(size=(8, 25))
    factors = replicate_factors(screen(hidden, shared_controls=shared_controls), 4)
    assert factors.shape == (D, 1)
    measured = np.sqrt((hidden - hidden.mean(1, keepdims=True)).var(axis=1, ddof=1).mean())
    assert np.linalg.norm(factors) == pytest.approx(measured, rel=0.02)
    assert abs(factors[:, 0] @ AXIS) == pytest.approx(measured, rel=0.02)


def test_strength_does_not_grow_with_the_noise_of_few_cells() -> None:
    hidden = 0.5 * np.random.default_rng(1).normal(size=(10, 20))
    few, many = (np.linalg.norm(replicate_factors(screen(hidden, n), 4)) for n in (4, 200))
    assert few == pytest.approx(many, rel=0.15)


def test_only_the_strongest_factors_are_kept() -> None:
    rng = np.random.default_rng(0)
    populations = screen(2 * rng.normal(size=(10, 10)))
    other = np.where(np.arange(D) == 0, 1.0, 0.0) - AXIS[0] * AXIS
    latent = populations.latent.copy()
    for cells in populations.table.cells.rows.reshape(100, -1):
        latent[cells] += 0.8 * rng.normal() * other
    populations = measured(latent, 10, 10, 100)
    assert replicate_factors(populations, 4).shape[1] == 2
    assert abs(replicate_factors(populations, 1)[:, 0] @ AXIS) > 1.5
    assert replicate_factors(populations, 0).shape == (D, 0)


def test_the_law_is_that_of_the_populations_at_hand() -> None:
    """Taken from some of the populations, it does not see the others."""
    hidden = np.zeros((8, 20))
    hidden[4:] = 2 * np.random.default_rng(0).normal(size=(4, 20))
    populations = screen(hidden)
    table = populations.table
    quiet, loud = np.flatnonzero(table.condition < 4), np.flatnonzero(table.condition >= 4)

    def factors(rows: np.ndarray) -> np.ndarray:
        cells = np.concatenate([*(table.cells[i] for i in rows), *(table.match.groups[i] for i in rows)])
        return replicate_factors(measured(populations.latent[cells], 4, 20, 80), 4)

    assert factors(quiet).shape == (D, 0)
    strong, all_of_them = np.linalg.norm(factors(loud)), np.linalg.norm(replicate_factors(populations, 4))
    assert all_of_them == pytest.approx(strong / 2**0.5, rel=0.05)  # pooled over conditions


@pytest.mark.parametrize("n_replicates", [1, 2])
def test_hardly_any_replicates(n_replicates: int) -> None:
    assert replicate_factors(screen(np.ones((1, n_replicates))), 4).shape == (D, 0)


@pytest.mark.parametrize("n_cells", [1, 2])
def test_populations_of_one_or_two_cells(n_cells: int) -> None:
    factors = replicate_factors(screen(np.zeros((2, 5)), n_cells), 4)
    assert np.isfinite(factors).all() and (n_cells > 1 or factors.shape == (D, 0))


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
        Prior.none(b, D),
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
    generator.set_replicates(factors)
    moved = draw(generator, noise)
    torch.testing.assert_close(moved, (noise[:, :2] @ factors.T)[:, None].expand_as(moved), atol=1e-4, rtol=1e-4)
    generator.set_replicates(torch.zeros(D, 0))
    assert draw(generator, noise).abs().max() < 1e-5


def test_replicates_are_saved_with_the_weights(generator: Generator) -> None:
    generator.set_replicates(torch.randn(D, 3))
    other = Generator(D, n_names=2, width=16, n_layers=1, n_heads=2, n_population_noise=4).eval()
    other.load_state_dict(generator.state_dict())
    noise = torch.randn(4, 4)
    assert torch.equal(other.replicate_offset(noise), generator.replicate_offset(noise))
    assert other.replicate_offset(noise).any()
