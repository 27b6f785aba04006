"""One evaluation of the network samples the law of populations: the toy of `benchmarks/toy_law.py`, in little."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch

if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import ModuleType

FOLDER = Path(__file__).resolve().parents[1] / "benchmarks"
CONDITIONS, REPLICATES, CELLS, DRAWS = 3, 16, 32, 60
SIZE = {"width": 32, "n_layers": 1, "n_heads": 2}


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Matrices this small are slower on several threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def toy() -> Iterator[ModuleType]:
    if not (FOLDER / "toy_law.py").is_file():
        pytest.skip("benchmarks/ is not here (only a clone of the repository has it)")
    sys.path.insert(0, str(FOLDER))
    import toy_law

    yield toy_law
    sys.path.remove(str(FOLDER))


def shifts(toy: ModuleType, law: str, objective: str = "energy_score", epochs: int = 8, n_steps: int = 1):
    """Populations drawn after a short training, and their means along the hidden direction, `(conditions, draws)`."""
    screen = toy.Screen.make(law, CONDITIONS)
    plan = {"n_cells": CELLS, "n_populations": 16, "lr": 2e-3}
    model = toy.fit(screen.training_cells(REPLICATES, CELLS, 0), objective, epochs=epochs, plan=plan, **SIZE)
    drawn, _ = toy.draw(model, screen.names, DRAWS, CELLS, n_steps)
    return drawn, (drawn.mean(2) - screen.shifts[:, None]) @ screen.direction


def test_truth_is_what_it_says(toy: ModuleType) -> None:
    screen, rng = toy.Screen.make("two modes", CONDITIONS), np.random.default_rng(0)
    cells = screen.populations(rng, 1, 2000, CELLS)
    along = (cells.mean(1) - screen.shifts[1]) @ screen.direction
    assert along.std() == pytest.approx((1.5**2 + 0.25 / CELLS) ** 0.5, rel=0.02)
    assert cells.std(1, ddof=1).mean() == pytest.approx(0.5, rel=0.02) and (np.abs(along) > 0.75).all()


def test_the_first_stage_of_the_toy_loses_nothing(toy: ModuleType) -> None:
    points = toy.controls(np.random.default_rng(0), 50)
    cells = toy.as_cells(points, {"perturbation": ["control"] * 50})
    stage = toy.FixedPoint()
    latent = stage.encode(torch.as_tensor(cells.X))
    assert np.abs(latent.numpy() - points).max() <= 0.5 / toy.SCALE
    assert torch.equal(stage.counterfactual_counts(latent), torch.as_tensor(cells.X))


@pytest.mark.slow
def test_one_evaluation_samples_populations_as_far_apart_as_they_are(toy: ModuleType) -> None:
    """Their spread and that of their cells; the law is Gaussian, so two modes become one cloud of the same width."""
    drawn, along = shifts(toy, "two modes", epochs=16)
    assert along.std(1, ddof=1).mean() == pytest.approx(1.5, rel=0.25)
    assert drawn.std(2, ddof=1).mean() == pytest.approx(0.5, rel=0.25)


@pytest.mark.slow
def test_draws_agree_where_there_is_no_hidden_factor(toy: ModuleType) -> None:
    """The same short training invents no variation where there is none, and shows it where there is."""
    none, some = (shifts(toy, law)[1].std(1, ddof=1).mean() for law in ("none", "gaussian"))
    assert none < 0.25 < 0.6 < some


@pytest.mark.slow
def test_squared_distance_collapses_it(toy: ModuleType) -> None:
    """The paper's main term: populations lie in the middle, as wide as all responses together."""
    _, along = shifts(toy, "two modes", "mmd")
    assert along.std(1, ddof=1).mean() < 0.4 * 1.5
