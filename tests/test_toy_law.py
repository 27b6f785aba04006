"""One evaluation of the network samples the law of populations: the toy of `benchmarks/toy_law.py`, in little."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch

SCRIPT = Path(__file__).resolve().parents[1] / "benchmarks" / "toy_law.py"
N_STEPS = 220


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Matrices this small are slower on several threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def toy() -> ModuleType:
    if not SCRIPT.is_file():
        pytest.skip("benchmarks/toy_law.py is not here (only a clone of the repository has it)")
    spec = importlib.util.spec_from_file_location("toy_law", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["toy_law"] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def trained(toy: ModuleType) -> torch.nn.Module:
    return toy.train("two modes", "functional energy score", N_STEPS, seed=0)


def test_truth_is_what_it_says(toy: ModuleType) -> None:
    spread = toy.measure(toy.draw_truth("two modes", 2000))
    assert spread.between == pytest.approx((1.5**2 + 4 * 0.25 / 32) ** 0.5, rel=0.02)
    assert spread.within == pytest.approx(0.5, rel=0.02) and spread.far == 1
    assert toy.measure(toy.draw_truth("none", 2000)).between == pytest.approx(0.177, rel=0.05)


def test_one_evaluation_samples_the_law_of_populations(toy: ModuleType, trained) -> None:
    truth, drawn = (toy.measure(p) for p in (toy.draw_truth("two modes", 500), toy.draw(trained, 500)))
    assert drawn.between == pytest.approx(truth.between, rel=0.25)
    assert drawn.within == pytest.approx(truth.within, rel=0.25)
    assert drawn.far > 0.75  # two modes, not a cloud between them


def test_both_modes_are_drawn_equally_often(toy: ModuleType, trained) -> None:
    side = (toy.draw(trained, 500).sum((1, 2)) > 0).float().mean().item()
    assert 0.3 < side < 0.7


def test_more_evaluations_keep_the_modes(toy: ModuleType, trained) -> None:
    drawn = toy.measure(toy.draw(trained, 300, n_steps=4))
    assert drawn.between == pytest.approx(1.51, rel=0.25) and drawn.far > 0.75


def test_squared_distance_collapses_it(toy: ModuleType) -> None:
    """The paper's main term: populations lie in the middle, as wide as all responses together."""
    drawn = toy.measure(toy.draw(toy.train("two modes", "squared MMD", 150, seed=0), 500))
    assert drawn.between < 0.4 * 1.51
    assert drawn.within > 1.4 * 0.5
    assert drawn.far < 0.1
