"""Held-out selection: which weights of the network are kept, and whether it is used at all."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import lightning.pytorch as pl
import numpy as np
import torch
from scipy.stats import t as student_t
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray
    from torch import nn

    from scperturbdiff.diffusion._generator import Generator

    Strength = Callable[[int, int], NDArray[np.float64]]
    """How strongly so many cells of a held-out population, given by its number, respond."""


@dataclass(frozen=True)
class SelectionResult:
    """What held-out conditions said of the network.

    Attributes
    ----------
    weight
        Weight with which the network is used, in [0, 1].
    reason
        Why, in a sentence.
    n_held_out
        Conditions that were scored.
    change
        Mean relative change of their energy distance by the network, negative where it helps, each by the weights that
        the others choose; NaN if it was not scored.
    without_network, with_network
        Mean energy distance of generated to held-out populations, decoded log-normalised expression; NaN if not scored.
    """

    weight: float
    reason: str
    n_held_out: int = 0
    change: float = math.nan
    without_network: float = math.nan
    with_network: float = math.nan


WEIGHTS = (0.75, 0.5, 0.25)
"""Weights that are tried beside 1 once the network is trained."""
LEVEL = 0.975
"""Of the one-sided test that the network must pass: held-out conditions share contexts and perturbations."""
DIVERGED = "its training diverged (lower lr)"


class NetworkSelection(pl.Callback):
    """Keeps the averaged weights that came nearest to held-out populations, and uses the network only if it helps.

    Validation scores the averaged weights, so the weights a model is left with are weights that were scored.
    (Lightning's own weight averaging together with scvi-tools' checkpoints stores the raw weights instead.)

    Without the network populations are what retrieval says. What counts is the change that the network brings to the
    energy distance between draws and held-out populations: of each condition the mean over its replicates, which are
    no independent evidence, as a share, so that all conditions count and not the most distant ones only. Its mean
    decides when training stops and which weights are kept.

    The best of many weights is better by chance alone. So whether the network is used is told by what each condition
    says of the weights that *the others* would choose: on average the change must be below `-margin` by more than
    chance explains (one-sided t-test, 97.5 %). The network must also be better, by as much, than a law of how strongly
    cells respond, where there is one: that is the simpler way to shape a population.

    Parameters
    ----------
    condition
        Condition of each held-out population, `(n_populations,)`; `None`: each has its own.
    law
        Finds how strongly cells respond without a network, `None` where all do alike; asked only if the network helps.
    margin
        Relative change that the network must bring at least.
    min_held_out
        Held-out conditions without which the network is not used.
    untested
        Whether to use the network where nothing is held out.
    """

    _SAVED = ("without", "best", "start", "tried", "_of")

    def __init__(
        self,
        condition: NDArray[np.int64] | None = None,
        law: Callable[[], Strength | None] | None = None,
        margin: float = 0.05,
        min_held_out: int = 5,
        untested: bool = True,
    ) -> None:
        self.condition, self.law, self.margin, self.min_held_out = condition, law, margin, min_held_out
        self.without: Tensor | None = None
        self.best: tuple[Tensor, Tensor, dict[str, Tensor]] | None = None
        self.tried: list[Tensor] = []
        self.start: dict[str, Tensor] = {}
        self.decided = False
        self._of: Tensor | None = None
        self.result = SelectionResult(1.0, "No population was held out: the network is used untested.")
        if not untested:
            self.result = SelectionResult(0.0, self._too_few("Less"))

    def state_dict(self) -> dict[str, Any]:
        """State for resuming."""
        return {name: getattr(self, name) for name in self._SAVED}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Resume."""
        for name in self._SAVED:
            setattr(self, name, state_dict.get(name))

    def release(self) -> None:
        """Let go of all but the result."""
        self.law, self.best, self.without, self.start, self.tried = None, None, None, {}, []

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Score populations without the network, and the weights training starts from."""
        plan: Any = pl_module
        generator: Generator = plan.module.generator_ema
        self.start = self.start or _copy(generator)
        if plan.validation is None:
            return
        if self.condition is not None:
            number = np.unique(self.condition[plan.scored.cpu().numpy()], return_inverse=True)[1]
            self._of = torch.as_tensor(number)
        if self.without is not None:
            return
        generator.network_weight.fill_(0)
        self.without = plan.validation_scores()[1]
        generator.network_weight.fill_(1)
        if any(bool(p.any()) for p in generator.transformer.out.parameters()):
            self.consider(plan.validation_scores()[1], generator)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Keep a copy of the averaged weights if they are the best so far."""
        plan: Any = pl_module
        if plan.last_distances is not None and not trainer.sanity_checking:
            self.consider(plan.last_distances, plan.module.generator_ema)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Put the best weights back; without evidence for them, those training started from, at weight 0.

        Weights that are not finite stay nowhere: times zero they are not zero.
        """
        plan: Any = pl_module
        generator, trained = plan.module.generator_ema, plan.module.generator
        if self.without is not None:
            self._put_back_best(plan, generator)
        elif not is_finite(generator):
            generator.load_state_dict(self.start)
            generator.network_weight.fill_(0)
            self.result = SelectionResult(0.0, f"The network is not used: {DIVERGED}.")
        if not is_finite(trained):
            trained.load_state_dict(generator.state_dict())
            if self.result.weight:
                self.result = replace(self.result, reason=f"{self.result.reason} Later {DIVERGED}.")
        self.decided = True

    def _put_back_best(self, plan: Any, generator: Generator) -> None:
        """Choose weights and how far they are used by the scores of held-out populations."""
        weight = 1.0
        if self.best is not None:
            generator.load_state_dict(self.best[2])
            weight = self._choose_weight(plan, generator)
        self.result = self._decide(weight)
        if self.result.weight:
            self._compare_with_law(plan, generator)
        generator.load_state_dict(self.start if self.best is None or not self.result.weight else self.best[2])
        generator.network_weight.fill_(self.result.weight)

    def _choose_weight(self, plan: Any, generator: Generator) -> float:
        """The weight with which the best network changes distances most, 1 if another is hardly better."""
        assert self.best is not None
        chosen, best = 1.0, self.best
        for weight in WEIGHTS:
            generator.network_weight.fill_(weight)
            distances = plan.validation_scores()[1]
            change = self.change(distances)
            if bool(change.isfinite().all()) and change.mean() < best[0].mean() - 0.01:
                self.tried.append(change)
                chosen, best = weight, (change, distances, self.best[2])
        self.best = best
        return chosen

    def _compare_with_law(self, plan: Any, generator: Generator) -> None:
        """Leave the network out if it is not clearly better than a law of how strongly cells respond."""
        strength = None if self.law is None else self.law()
        if strength is None:
            return
        assert self.best is not None
        generator.network_weight.fill_(0)
        of_law = plan.validation_scores(strength)[1]
        if not is_negative(self._difference(self.best[1], of_law) + self.margin, LEVEL):
            change = float(self.change(of_law).mean())
            text = f"a law of how strongly cells respond changes energy distances about as much ({change:+.0%})"
            self.result = replace(self.result, weight=0.0, reason=f"The network is not used: {text}.")

    def consider(self, distances: Tensor, generator: Generator) -> None:
        """Keep the averaged weights, beside what they changed, if that is the best so far."""
        change = self.change(distances)
        if not (change.isfinite().all() and distances.isfinite().all()):
            return
        self.tried.append(change)
        if self.best is None or change.mean() < self.best[0].mean():
            self.best = change, distances, _copy(generator)

    def change(self, distances: Tensor) -> Tensor:
        """Relative change by the network of the energy distance to each held-out condition, `(n_conditions,)`.

        Parameters
        ----------
        distances
            Of draws to held-out populations, `(n_populations, n_draws)`.
        """
        if self.without is None:
            raise RuntimeError("Populations were not scored without the network yet.")
        return self._difference(distances, self.without)

    def cross_selected(self) -> Tensor:
        """The change of each held-out condition by the weights that all others would choose, `(n_conditions,)`."""
        tried = torch.stack(self.tried)
        of_others = tried.sum(1, keepdim=True) - tried
        return tried.gather(0, of_others.argmin(0, keepdim=True))[0]

    def _difference(self, distances: Tensor, reference: Tensor) -> Tensor:
        """Relative difference of each condition; as checkpoints are read on the CPU, there."""
        found, without = (self._of_conditions(values.cpu().mean(1)) for values in (distances, reference))
        return relative_difference(found, without, self._noise())

    def _of_conditions(self, values: Tensor) -> Tensor:
        """Means over the populations of each condition, `(n_populations,) -> (n_conditions,)`."""
        if self._of is None:
            return values
        size = torch.bincount(self._of)
        return values.new_zeros(len(size)).index_add_(0, self._of, values) / size

    def _noise(self) -> float:
        """By how much energy distances of draws differ without the network, mean over held-out populations."""
        assert self.without is not None
        return float(self.without.std(1).nan_to_num().mean())

    def _too_few(self, how_many: str) -> str:
        few = f"{how_many} than {self.min_held_out} conditions could be held out, which say nothing about it"
        return f"The network is not used: {few}."

    def _decide(self, most: float) -> SelectionResult:
        assert self.without is not None
        n = len(self._of_conditions(self.without.cpu().mean(1)))
        if self.best is None:
            return SelectionResult(0.0, "Training brought no finite weights (lower lr).", n)
        change = self.cross_selected()
        mean, without = float(change.mean()), float(self.without.mean())
        text = f"energy distance of {n} held-out conditions {mean:+.1%}"
        if n < self.min_held_out:
            weight, reason = 0.0, self._too_few(f"{n}, less")
        elif without <= self._noise():
            known = "without it draws are as near the held-out ones as can be told"
            weight, reason = 0.0, f"The network is not used: {known}."
        elif is_negative(change + self.margin, LEVEL):
            weight, reason = most, f"The network helps: {text}."
        else:
            weight, reason = 0.0, f"The network is not used: {text}, not better by {self.margin:.0%} beyond chance."
        return SelectionResult(weight, reason, n, mean, without, float(self.best[1].mean()))


def is_finite(module: nn.Module) -> bool:
    """Whether all weights are finite."""
    return all(bool(parameter.isfinite().all()) for parameter in module.parameters())


def _copy(generator: Generator) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in generator.state_dict().items()}


def relative_difference(scores: Tensor, reference: Tensor, noise: float = 0.0) -> Tensor:
    """Scores less a reference's, both `(n,)`, as shares of it: of each value, a quarter of their mean at least.

    Where populations are generated as well as can be, distances are about 0 (U-statistics, or less) and shares of them
    mean nothing: they are shares of at least `noise`, by which draws differ.
    """
    return (scores - reference) / reference.clamp(min=max(0.25 * float(reference.mean()), noise, 1e-12))


def is_negative(differences: Tensor, level: float = 0.95) -> bool:
    """Whether the mean of differences `(n,)` is negative at this level of a one-sided t-test."""
    differences = differences.double()
    n = len(differences)
    if n < 2:
        return bool(differences.mean() < 0)
    margin = float(student_t.ppf(level, n - 1)) * differences.std() / math.sqrt(n)
    return bool(differences.mean() < -margin)
