"""Callbacks of the second stage."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import lightning.pytorch as pl
from scipy.stats import t as student_t

if TYPE_CHECKING:
    from torch import Tensor, nn

    from scperturbdiff.diffusion._training import GeneratorTrainingPlan


MARGIN = 0.05
"""Share of the anchor's score that a network must take off: the best of many epochs is better by chance."""


class KeepBestGenerator(pl.Callback):
    """Keeps the averaged weights that scored best on held-out populations, and puts them back when training ends.

    Validation scores the averaged weights, so the weights a model is left with are weights that were scored.
    (Lightning's own weight averaging together with scvi-tools' checkpoints stores the raw weights instead.)

    A silent network predicts the anchor, and is the one to beat: weights are kept only if they are better on average
    over held-out populations by more than chance explains (one-sided t-test, 95 %). Else the best of many candidates
    would be better by chance alone where few or small populations are held out.

    Where conditions were measured in several replicates (`replicated`) better means a lower functional energy score of
    draws that are no further from the held-out populations. The score alone also falls when draws scatter over what the
    anchor does not know. Where each condition was measured once nothing shows how replicates vary: better then means a
    lower energy distance of the draws. Either must be lower by more than :data:`MARGIN`. Both are shares of the
    anchor's, so that all held-out populations count and not the most distant ones only.

    Parameters
    ----------
    replicated
        Whether any training condition has several populations.
    """

    _KEPT = ("silent_scores", "best")

    def __init__(self, replicated: bool = True) -> None:
        self.replicated = replicated
        self.silent_scores: tuple[Tensor, Tensor] | None = None
        self.best: tuple[Tensor, dict[str, Tensor]] | None = None

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
        if plan.validation is None or self.silent_scores is not None:
            return
        generator = plan.module.generator_ema
        weights = _copy(generator)
        generator.silence()
        self.silent_scores = plan.validation_scores()
        generator.load_state_dict(weights)
        if not generator.is_silent:
            self._consider(plan.validation_scores(), plan)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Keep a copy of the averaged weights if they are the best so far."""
        plan: GeneratorTrainingPlan = pl_module  # type: ignore[assignment]
        if plan.last_scores is not None and not trainer.sanity_checking:
            self._consider(plan.last_scores, plan)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Put the best weights back, or silence the network if they are no better than that."""
        plan: GeneratorTrainingPlan = pl_module  # type: ignore[assignment]
        if self.silent_scores is None:
            return
        if self.best is not None and is_negative(self.best[0] + MARGIN):
            plan.module.generator_ema.load_state_dict(self.best[1])
        else:
            plan.module.generator_ema.silence()

    def _consider(self, found: tuple[Tensor, Tensor], plan: GeneratorTrainingPlan) -> None:
        """Keep the averaged weights, beside what they gained, if they gained most so far."""
        gains = self._gains(found)
        if gains is not None and (self.best is None or gains.mean() < self.best[0].mean()):
            self.best = gains, _copy(plan.module.generator_ema)

    def _gains(self, found: tuple[Tensor, Tensor]) -> Tensor | None:
        """What is judged less the same of the silent network, `(n,)`; `None` if draws are further away than its."""
        assert self.silent_scores is not None
        (scores, distances), (silent_scores, silent_distances) = found, self.silent_scores
        nearer = relative_difference(distances.mean(1), silent_distances.mean(1))
        if not self.replicated:
            return nearer
        return relative_difference(scores, silent_scores) if nearer.mean() <= 0 else None


def _copy(generator: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in generator.state_dict().items()}


def relative_difference(scores: Tensor, reference: Tensor) -> Tensor:
    """Scores less a reference's, both `(n,)`, as shares of it: of each value, a quarter of their mean at least."""
    return (scores - reference) / reference.clamp(min=max(0.25 * float(reference.mean()), 1e-12))


def is_negative(differences: Tensor) -> bool:
    """Whether the mean of differences `(n,)` is negative at the 95 % level of a one-sided t-test."""
    differences = differences.double()
    n = len(differences)
    if n < 2:
        return bool(differences.mean() < 0)
    margin = float(student_t.ppf(0.95, n - 1)) * differences.std() / math.sqrt(n)
    return bool(differences.mean() < -margin)
