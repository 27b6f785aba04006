"""Callbacks of the second stage."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import lightning.pytorch as pl
import torch
from scipy.stats import t as student_t

if TYPE_CHECKING:
    from torch import Tensor

    from scperturbdiff.train.plan import GeneratorTrainingPlan


MARGIN = 0.05
"""Share of the anchor's score that a network must take off: the best of many epochs is better by chance."""


class KeepBestGenerator(pl.Callback):
    """Keeps the averaged weights that scored best on held-out populations, and puts them back when training ends.

    Validation scores the averaged weights, so the weights a model is left with are weights that were scored.
    (Lightning's own weight averaging together with scvi-tools' checkpoints stores the raw weights instead.)

    A silent network predicts the anchor. It is a candidate too, and the one to beat: weights are kept only if they are
    better on average over held-out populations by more than chance explains (one-sided t-test, 95 %). Else the best of
    many candidates would be better by chance alone where few or small populations are held out.

    Where conditions were measured in several replicates (`replicated`) better means a lower functional energy score.
    Where each was measured once nothing shows how replicates vary: better then means a lower energy distance of the
    draws. Either must be lower by more than :data:`MARGIN`, as a share of the anchor's, so that all held-out
    populations count and not the most distant ones only.

    Parameters
    ----------
    replicated
        Whether any training condition has several populations.
    """

    _KEPT = ("best_score", "best_weights", "best_scores", "silent_scores")

    def __init__(self, replicated: bool = True) -> None:
        self.replicated = replicated
        self.best_score = math.inf
        self.best_weights: dict[str, Tensor] | None = None
        self.best_scores: Tensor | None = None
        self.silent_scores: Tensor | None = None

    def state_dict(self) -> dict[str, Any]:
        """State for resuming."""
        return {name: getattr(self, name) for name in self._KEPT}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Resume."""
        for name in self._KEPT:
            setattr(self, name, state_dict[name])

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Score the silent network and the weights training starts from."""
        plan: GeneratorTrainingPlan = pl_module  # type: ignore[assignment]
        if plan.validation is None or self.best_weights is not None:
            return
        generator = plan.module.generator_ema
        scores = self._judge(plan.validation_scores())
        self._keep(scores, plan)
        if not generator.is_silent:
            generator.silence()
            scores = self._judge(plan.validation_scores())
            generator.load_state_dict(self.best_weights)  # type: ignore[arg-type]
        self.silent_scores = scores

    def _judge(self, found: tuple[Tensor, Tensor]) -> Tensor:
        scores, distances = found
        return scores if self.replicated else distances.mean(1)

    def _keep(self, scores: Tensor, plan: GeneratorTrainingPlan) -> None:
        self.best_score, self.best_scores = float(scores.mean()), scores
        self.best_weights = {k: v.detach().clone() for k, v in plan.module.generator_ema.state_dict().items()}

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Keep a copy of the averaged weights if they are the best so far."""
        plan: GeneratorTrainingPlan = pl_module  # type: ignore[assignment]
        if plan.last_scores is None or trainer.sanity_checking:
            return
        scores = self._judge(plan.last_scores)
        if float(scores.mean()) < self.best_score:
            self._keep(scores, plan)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Put the best weights back, or silence the network if they are no better than that."""
        plan: GeneratorTrainingPlan = pl_module  # type: ignore[assignment]
        if self.best_weights is None or self.best_scores is None or self.silent_scores is None:
            return
        plan.module.generator_ema.load_state_dict(self.best_weights)
        unit = relative_unit(self.silent_scores)
        if not is_lower(self.best_scores / unit, self.silent_scores / unit - MARGIN):
            plan.module.generator_ema.silence()


def relative_unit(scores: Tensor) -> Tensor:
    """What differences of scores `(n,)` are measured in: each score, a quarter of their mean at least."""
    return scores.clamp(min=max(0.25 * float(scores.mean()), 1e-12))


def is_lower(scores: Tensor, reference: Tensor) -> bool:
    """Whether paired scores `(n,)` are lower than those of a reference at the 95 % level of a one-sided t-test."""
    difference = (scores - reference).double()
    n = len(difference)
    if n < 2:
        return bool(difference.mean() < 0)
    margin = float(student_t.ppf(0.95, n - 1)) * difference.std() / math.sqrt(n)
    return bool(difference.mean() < -margin)


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
