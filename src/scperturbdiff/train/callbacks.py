"""Callbacks of the second stage."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import lightning.pytorch as pl
import torch

from scperturbdiff.train.plan import VALIDATION_METRIC

if TYPE_CHECKING:
    from torch import Tensor

    from scperturbdiff.train.plan import GeneratorTrainingPlan


class KeepBestGenerator(pl.Callback):
    """Keeps the averaged weights that scored best on held-out populations, and puts them back when training ends.

    Validation scores the averaged weights, so the weights a model is left with are weights that were scored.
    (Lightning's own weight averaging together with scvi-tools' checkpoints stores the raw weights instead.)
    """

    def __init__(self) -> None:
        self.best_score = math.inf
        self.best_weights: dict[str, Tensor] | None = None

    def state_dict(self) -> dict[str, Any]:
        """State for resuming."""
        return {"best_score": self.best_score, "best_weights": self.best_weights}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Resume."""
        self.best_score, self.best_weights = state_dict["best_score"], state_dict["best_weights"]

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Score the weights training starts from: untrained, they predict the anchor, which may not be beaten."""
        plan: GeneratorTrainingPlan = pl_module  # type: ignore[assignment]
        if plan.validation is not None and self.best_weights is None:
            self._keep(float(plan.score_validation()[0]), plan)

    def _keep(self, score: float, plan: GeneratorTrainingPlan) -> None:
        self.best_score = score
        self.best_weights = {k: v.detach().clone() for k, v in plan.module.generator_ema.state_dict().items()}

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Keep a copy of the averaged weights if they are the best so far."""
        score = trainer.callback_metrics.get(VALIDATION_METRIC)
        if score is None or not float(score) < self.best_score:
            return
        self._keep(float(score), pl_module)  # type: ignore[arg-type]

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Put the best weights back."""
        if self.best_weights is not None:
            plan: GeneratorTrainingPlan = pl_module  # type: ignore[assignment]
            plan.module.generator_ema.load_state_dict(self.best_weights)


class StepsDataModule(pl.LightningDataModule):
    """Counts training steps: populations are drawn on the device inside the step, no cell passes through a loader."""

    def __init__(self, steps_per_epoch: int, with_validation: bool) -> None:
        super().__init__()
        self.steps_per_epoch, self.with_validation = steps_per_epoch, with_validation

    def train_dataloader(self) -> torch.utils.data.DataLoader:
        """Numbers of the steps of an epoch."""
        return torch.utils.data.DataLoader(range(self.steps_per_epoch), batch_size=None)  # type: ignore[arg-type]

    def val_dataloader(self) -> torch.utils.data.DataLoader | list[Any]:
        """One step: all held-out populations at once."""
        return torch.utils.data.DataLoader(range(1), batch_size=None) if self.with_validation else []  # type: ignore[arg-type]
