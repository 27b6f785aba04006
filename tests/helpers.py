"""Settings and comparisons that several test modules share."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import lightning.pytorch as pl
import numpy as np
from pandas.testing import assert_frame_equal

from scperturbdiff.diffusion import GeneratorTrainingPlan

if TYPE_CHECKING:
    from collections.abc import Callable

    from anndata import AnnData

TINY: dict[str, Any] = {"n_latent": 4, "n_hidden": 8, "width": 8, "n_layers": 1, "n_heads": 1}
"""Arguments of the smallest model."""

FEW_STEPS: dict[str, Any] = {
    "max_epochs_vae": 1,
    "max_epochs_generator": 1,
    "plan_kwargs": {"steps_per_epoch": 2, "n_populations": 4, "n_cells": 8},
    "enable_progress_bar": False,
    "logger": False,
    "accelerator": "cpu",
}
"""Arguments of the shortest training, for tests that want a trained model and not what training found."""

BRIEF: dict[str, Any] = {
    "max_epochs_vae": 2,
    "max_epochs_generator": 2,
    "plan_kwargs": {"steps_per_epoch": 5},
    "enable_progress_bar": False,
    "accelerator": "cpu",
}
"""Arguments of a short training that keeps its history."""

SETUP: dict[str, Any] = {
    "perturbation_key": "perturbation",
    "control": "control",
    "context_keys": ["cell_type"],
    "batch_key": "donor",
}
"""Keys of simulated screens."""

N_LATENT = 16
"""Latent dimensions of the `trained_model` of the session."""


def assert_same_cells(a: AnnData, b: AnnData) -> None:
    """Assert that two predictions agree bit by bit: annotation, expression, counts, latent vectors."""
    assert_frame_equal(a.obs, b.obs)
    assert a.var_names.equals(b.var_names)
    assert (a.X != b.X).nnz == 0
    assert (a.layers["counts"] != b.layers["counts"]).nnz == 0
    np.testing.assert_array_equal(a.obsm["X_perturbdiff"], b.obsm["X_perturbdiff"])


class FirstStep(pl.Callback):
    """Hands `watch` a step of the second stage, forwards and backwards, before training makes its first one."""

    def __init__(self, watch: Callable[[Callable[[], None]], None]) -> None:
        self.watch = watch

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not isinstance(pl_module, GeneratorTrainingPlan):
            return
        plan: Any = pl_module
        log, plan.log = plan.log, lambda *args, **kwargs: None
        self.watch(lambda: plan.training_step(None, 0).backward())
        plan.zero_grad()
        plan.log = log
