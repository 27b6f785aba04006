"""The training objectives: the functional energy score is proper for laws of populations, squared distance is not."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from scipy.spatial.distance import cdist
from torch import Tensor

from scperturbdiff.diffusion import functional_energy_score, mean_squared_error, squared_mmd


def embedding_distance(x: np.ndarray, y: np.ndarray) -> float:
    """Distance of the kernel mean embeddings of two empirical measures."""
    return math.sqrt(max(2 * cdist(x, y).mean() - cdist(x, x).mean() - cdist(y, y).mean(), 0))


def score_from_scratch(draws: np.ndarray, target: np.ndarray) -> float:
    n = len(draws)
    to_target = sum(embedding_distance(draw, target) for draw in draws) / n
    apart = sum(embedding_distance(draws[k], draws[j]) for k in range(n) for j in range(n) if k != j)
    return to_target - apart / (2 * n * (n - 1))


def test_hand_computed_score() -> None:
    """Single cells: D(a, b) = sqrt(2 |a - b|), so 1/2 (sqrt 2 + sqrt 2) - 1/4 (2 + 2)."""
    draws, target = torch.tensor([[[0.0]], [[2.0]]]), torch.tensor([[1.0]])
    assert functional_energy_score(draws, target).item() == pytest.approx(math.sqrt(2) - 1, abs=1e-5)


@pytest.mark.parametrize("n_draws", [2, 3, 5])
@pytest.mark.parametrize(("n_cells", "n_target"), [(6, 6), (4, 9), (1, 3)])
def test_score_equals_its_formula(n_draws: int, n_cells: int, n_target: int) -> None:
    draws, target = torch.randn(2, n_draws, n_cells, 3), torch.randn(2, n_target, 3) + 1
    found = functional_energy_score(draws, target)
    expected = [score_from_scratch(d.numpy(), t.numpy()) for d, t in zip(draws, target, strict=True)]
    assert found.tolist() == pytest.approx(expected, rel=1e-4)


def test_squared_mmd_equals_its_formula() -> None:
    draws, target = torch.randn(3, 5, 2), torch.randn(7, 2) + 1
    within = [torch.pdist(draw).mean() for draw in draws]
    expected = torch.stack(
        [2 * torch.cdist(d, target).mean() - w - torch.pdist(target).mean() for d, w in zip(draws, within, strict=True)]
    ).mean()
    torch.testing.assert_close(squared_mmd(draws, target), expected, rtol=1e-5, atol=1e-5)


def test_squared_error_is_cell_by_cell() -> None:
    clean = torch.zeros(1, 3, 2)
    draws = torch.tensor([[[[1.0, 1.0], [2.0, 2.0], [9.0, 9.0]], [[1.0, 3.0], [0.0, 0.0], [9.0, 9.0]]]])
    assert mean_squared_error(draws, clean, torch.tensor([[True, True, False]])).item() == pytest.approx(2.5)
    assert mean_squared_error(draws, clean).item() == pytest.approx((2.5 * 2 + 81) / 3)


# ---- propriety -----------------------------------------------------------------------------------------------------


def expected_over(objective, law: dict[int, float], truth: dict[int, float], populations: list[Tensor]) -> float:
    """Expected objective of two independent draws from `law` against a target from `truth`, exactly."""
    total = 0.0
    for (i, p), (j, q), (k, r) in itertools.product(law.items(), law.items(), truth.items()):
        draws = torch.stack([populations[i], populations[j]])
        total += p * q * r * objective(draws, populations[k]).item()
    return total


@pytest.fixture
def two_modes() -> list[Tensor]:
    """Two populations that an experiment may give, and their mixture (3 of 10 cells from the first)."""
    first, second = torch.randn(40, 2), torch.randn(40, 2) + 4
    return [first, second, torch.cat([first[:12], second[12:]])]


def test_score_finds_a_law_of_two_populations(two_modes: list[Tensor]) -> None:
    truth = {0: 0.3, 1: 0.7}
    shares = [round(0.1 * i, 1) for i in range(11)]
    scores = [expected_over(functional_energy_score, {0: q, 1: 1 - q}, truth, two_modes) for q in shares]
    assert shares[int(np.argmin(scores))] == 0.3
    assert np.all(np.diff(scores[:4]) < 0) and np.all(np.diff(scores[3:]) > 0)
    assert expected_over(functional_energy_score, {2: 1.0}, truth, two_modes) > min(scores) + 0.1


def test_squared_distance_prefers_the_mixture(two_modes: list[Tensor]) -> None:
    """The same law, scored with the squared distance: the mixture of both populations beats every law over the two."""
    truth = {0: 0.3, 1: 0.7}
    laws = [{0: q, 1: 1 - q} for q in (0.0, 0.3, 0.5, 1.0)]
    mixture = expected_over(squared_mmd, {2: 1.0}, truth, two_modes)
    assert mixture < min(expected_over(squared_mmd, law, truth, two_modes) for law in laws) - 0.1


@pytest.fixture(scope="module")
def normals() -> dict[str, Tensor]:
    """Common random numbers for populations of 16 cells: shift and cells, of 2 draws and of a target."""
    generator = torch.Generator().manual_seed(3)
    return {
        "draw_shift": torch.randn(1000, 2, 1, 1, generator=generator),
        "draw_cells": torch.randn(1000, 2, 16, 1, generator=generator),
        "shift": torch.randn(1000, 1, 1, generator=generator),
        "cells": torch.randn(1000, 16, 1, generator=generator),
    }


def expected_of(objective, normals: dict[str, Tensor], between: float, within: float) -> float:
    """Expected objective of populations N(s, within^2), s ~ N(0, between^2), where truth is between 1, within 0.5."""
    draws = between * normals["draw_shift"] + within * normals["draw_cells"]
    return objective(draws, normals["shift"] + 0.5 * normals["cells"]).mean().item()


def test_score_finds_a_gaussian_law_of_shifts(normals: dict[str, Tensor]) -> None:
    laws = list(itertools.product((0.0, 0.5, 1.0, 1.5), (0.25, 0.5, 0.75, 1.12)))
    best = min(laws, key=lambda law: expected_of(functional_energy_score, normals, *law))
    assert best == (1.0, 0.5)


def test_squared_distance_collapses_a_gaussian_law_of_shifts(normals: dict[str, Tensor]) -> None:
    laws = list(itertools.product((0.0, 0.5, 1.0, 1.5), (0.25, 0.5, 0.75, 1.12)))
    best = min(laws, key=lambda law: expected_of(squared_mmd, normals, *law))
    assert best == (0.0, 1.12)  # no spread between populations, all of it (1 + 0.25) within


# ---- masks, gradients, errors --------------------------------------------------------------------------------------


@pytest.mark.parametrize("objective", [functional_energy_score, squared_mmd])
def test_short_populations(objective) -> None:
    draws, target = torch.randn(3, 2, 6, 4), torch.randn(3, 5, 4)
    n, m = [6, 2, 1], [5, 3, 1]
    mask = torch.arange(6) < torch.tensor(n)[:, None]
    target_mask = torch.arange(5) < torch.tensor(m)[:, None]
    found = objective(draws, target, mask, target_mask)
    for i in range(3):
        cut = objective(draws[i, :, : n[i]], target[i, : m[i]])
        torch.testing.assert_close(found[i], cut, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("objective", [functional_energy_score, squared_mmd])
def test_masked_cells_are_not_trained(objective) -> None:
    draws = torch.randn(1, 2, 6, 4, requires_grad=True)
    mask = torch.tensor([[True, True, True, False, False, False]])
    objective(draws, torch.randn(1, 6, 4), mask, mask).sum().backward()
    assert draws.grad is not None
    assert (draws.grad[:, :, 3:] == 0).all() and (draws.grad[:, :, :3] != 0).all()


@pytest.mark.parametrize("objective", [functional_energy_score, squared_mmd])
@pytest.mark.parametrize("n_cells", [1, 2, 8])
def test_gradients_are_finite_where_everything_coincides(objective, n_cells: int) -> None:
    draws = torch.ones(2, 3, n_cells, 4, requires_grad=True)
    value = objective(draws, torch.ones(2, n_cells, 4)).sum()
    value.backward()
    assert value.isfinite() and draws.grad is not None and draws.grad.isfinite().all()


def test_gradient_pulls_to_the_target_and_apart() -> None:
    """Two equal-side draws of one cell: the score drops when they move to the target and when they part."""
    draws = torch.tensor([[[-1.0]], [[0.5]]], requires_grad=True)
    functional_energy_score(draws, torch.tensor([[3.0]])).backward()
    assert draws.grad is not None and draws.grad[1].item() < 0
    step = draws.detach() - 0.01 * draws.grad
    before = functional_energy_score(draws.detach(), torch.tensor([[3.0]]))
    assert functional_energy_score(step, torch.tensor([[3.0]])) < before


def test_bfloat16_draws_are_scored_in_float32() -> None:
    draws, target = torch.randn(2, 8, 4).bfloat16(), torch.randn(8, 4).bfloat16()
    found = functional_energy_score(draws, target)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, functional_energy_score(draws.float(), target.float()))


def test_one_draw_is_refused() -> None:
    with pytest.raises(ValueError, match="at least 2 draws, got 1"):
        functional_energy_score(torch.randn(1, 4, 2), torch.randn(4, 2))
