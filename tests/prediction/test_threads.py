"""Requests from several threads: the same cells as alone, and nobody's random numbers but one's own."""

from __future__ import annotations

import copy
import random
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from pandas.testing import assert_frame_equal
from tests.helpers import assert_same_cells

if TYPE_CHECKING:
    from anndata import AnnData

    from scperturbdiff import PerturbDiff

REQUESTS: list[dict[str, Any]] = [
    {"perturbations": ["P01"], "seed": 1},
    {"perturbations": ["P02", "P03"], "seed": 2, "n_populations": 2},
    {"perturbations": ["P01"], "seed": 3, "n_cells": 300},
    {"perturbations": ["P04"], "seed": 4, "n_steps": 3},
    {"perturbations": ["P04"], "seed": 4, "n_steps": 3, "sampler": "ddim", "guidance": 2.0},
]


@pytest.fixture(scope="module")
def model(trained_model: PerturbDiff) -> PerturbDiff:
    """One whose network is evaluated."""
    model = copy.deepcopy(trained_model)
    model.module.generator_ema.network_weight.fill_(1)
    return model


def random_states() -> list[Any]:
    numpy = np.random.get_state()[1]  # noqa: NPY002 (that of others)
    return [torch.get_rng_state().tolist(), random.getstate(), numpy.tolist()]


def test_cells_do_not_depend_on_other_threads(model: PerturbDiff, screen: AnnData) -> None:
    controls = screen[(screen.obs["perturbation"] == "control").to_numpy()].copy()

    def predict(request: dict[str, Any]) -> AnnData:
        return model.predict(controls, **request, progress=False)

    alone = [predict(request) for request in REQUESTS]
    with ThreadPoolExecutor(4) as threads:
        together = list(threads.map(predict, REQUESTS * 4))
    for i, cells in enumerate(together):
        assert_same_cells(cells, alone[i % len(REQUESTS)])


def test_responses_and_latent_vectors_do_not_depend_on_other_threads(model: PerturbDiff) -> None:
    def both(seed: int) -> tuple[Any, Any]:
        return model.response(perturbations=["P01"], seed=seed, progress=False), model.get_latent_representation()

    alone = [both(seed) for seed in range(2)]
    with ThreadPoolExecutor(4) as threads:
        together = list(threads.map(both, [0, 1] * 4))
    for i, (table, latent) in enumerate(together):
        assert_frame_equal(table, alone[i % 2][0])
        np.testing.assert_array_equal(latent, alone[i % 2][1])


def test_random_numbers_of_others_are_left_alone(model: PerturbDiff) -> None:
    before = random_states()
    for request in REQUESTS:
        model.predict(**request, progress=False)
    model.response(perturbations=["P01"], seed=0, progress=False)
    model.get_latent_representation()
    model.perturbation_novelty()
    assert random_states() == before


def test_a_module_left_in_training_mode_predicts_as_any_other(model: PerturbDiff) -> None:
    expected = model.predict(**REQUESTS[3], progress=False)
    model.module.train()
    assert_same_cells(model.predict(**REQUESTS[3], progress=False), expected)
    assert not model.module.training
