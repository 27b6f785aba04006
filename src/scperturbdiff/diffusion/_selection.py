"""Held-out selection: which weights of the network are kept, and whether it is used at all."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import lightning.pytorch as pl
from scipy.stats import t as student_t

if TYPE_CHECKING:
    from torch import Tensor, nn

    from scperturbdiff.diffusion._generator import Generator

    Scores = tuple[Tensor, Tensor]
    """Functional energy scores `(n_populations,)` and energy distances `(n_populations, n_draws)`."""


@dataclass(frozen=True)
class SelectionResult:
    """What held-out populations said of the network.

    Attributes
    ----------
    weight
        Weight with which the network is used, in [0, 1].
    reason
        Why, in a sentence.
    n_held_out
        Populations that were scored.
    criterion
        What was compared: ``"functional energy score"`` or ``"energy distance"``.
    change
        Mean relative change of the criterion by the network, negative where it helps; NaN if it was not scored.
    without_network, with_network
        Mean energy distance of generated to held-out populations, decoded log-normalised expression; NaN if not scored.
    """

    weight: float
    reason: str
    n_held_out: int = 0
    criterion: str = ""
    change: float = math.nan
    without_network: float = math.nan
    with_network: float = math.nan


WEIGHTS = (0.75, 0.5, 0.25)
"""Weights that are tried beside 1 once the network is trained."""
DIVERGED = "its training diverged (lower lr)"


class NetworkSelection(pl.Callback):
    """Keeps the averaged weights that scored best on held-out populations, and uses the network only if it helps.

    Validation scores the averaged weights, so the weights a model is left with are weights that were scored.
    (Lightning's own weight averaging together with scvi-tools' checkpoints stores the raw weights instead.)

    Without the network populations are what retrieval says; the network is used only if it is better on average
    over held-out populations by more than chance explains (one-sided t-test, 95 %). Else the best of many candidates
    would be better by chance alone where few or small populations are held out. The same number, the mean relative
    change that the network brings, decides which weights are kept and when training stops early.

    Where conditions were measured in several replicates it is the change of the functional energy score, unless draws
    come further from the held-out populations: the score alone also falls when draws scatter over what is not known.
    Where each condition was measured once nothing shows how replicates vary, and it is the change of the energy
    distance of draws. Either must fall by more than `margin`. Both are relative, so that all held-out populations count
    and not the most distant ones only.

    Parameters
    ----------
    replicated
        Whether any training condition has several populations.
    margin
        Relative change that the network must bring at least: the best of many epochs is better by chance.
    min_held_out
        Held-out populations without which the network is not used.
    untested
        Whether to use the network where nothing is held out.
    """

    _SAVED = ("without", "best", "start")

    def __init__(
        self, replicated: bool = True, margin: float = 0.05, min_held_out: int = 5, untested: bool = True
    ) -> None:
        self.replicated, self.margin, self.min_held_out = replicated, margin, min_held_out
        self.without: Scores | None = None
        self.best: tuple[Tensor, Scores, dict[str, Tensor]] | None = None
        self.start: dict[str, Tensor] = {}
        self.decided = False
        self.result = SelectionResult(1.0, "No population was held out: the network is used untested.")
        if not untested:
            self.result = SelectionResult(0.0, self._too_few("Less"))

    def state_dict(self) -> dict[str, Any]:
        """State for resuming."""
        return {name: getattr(self, name) for name in self._SAVED}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Resume."""
        for name in self._SAVED:
            setattr(self, name, state_dict[name])

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Score populations without the network, and the weights training starts from."""
        plan: Any = pl_module
        generator: Generator = plan.module.generator_ema
        self.start = self.start or _copy(generator)
        if plan.validation is None or self.without is not None:
            return
        generator.network_weight.fill_(0)
        self.without = plan.validation_scores()
        generator.network_weight.fill_(1)
        if any(bool(p.any()) for p in generator.transformer.out.parameters()):
            self.consider(plan.validation_scores(), generator)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Keep a copy of the averaged weights if they are the best so far."""
        plan: Any = pl_module
        if plan.last_scores is not None and not trainer.sanity_checking:
            self.consider(plan.last_scores, plan.module.generator_ema)

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
        assert self.without is not None
        weight = 1.0
        if self.best is not None:
            generator.load_state_dict(self.best[2])
            weight = self._choose_weight(plan, generator)
        self.result = self._decide(len(self.without[0]), weight)
        generator.load_state_dict(self.start if self.best is None or not self.result.weight else self.best[2])
        generator.network_weight.fill_(self.result.weight)

    def _choose_weight(self, plan: Any, generator: Generator) -> float:
        """The weight with which the best network changes the criterion most, 1 if another is hardly better."""
        assert self.best is not None
        chosen, best = 1.0, self.best
        for weight in WEIGHTS:
            generator.network_weight.fill_(weight)
            found = plan.validation_scores()
            change = self.change(found)
            if bool(change.isfinite().all()) and change.mean() < best[0].mean() - 0.01:
                chosen, best = weight, (change, found, self.best[2])
        self.best = best
        return chosen

    def consider(self, found: Scores, generator: Generator) -> None:
        """Keep the averaged weights, beside what they changed, if that is the best so far."""
        change = self.change(found)
        if not all(part.isfinite().all() for part in (change, *found)):
            return
        if self.best is None or change.mean() < self.best[0].mean():
            self.best = change, found, _copy(generator)

    def change(self, found: Scores) -> Tensor:
        """Relative change of the criterion by the network, of each held-out population `(n,)`; negative is better."""
        return self._compare(found)[1]

    def _compare(self, found: Scores) -> tuple[str, Tensor]:
        """Which criterion counts, and its relative change `(n,)`."""
        if self.without is None:
            raise RuntimeError("Populations were not scored without the network yet.")
        scores, distances = found
        scores_without, distances_without = (part.to(scores.device) for part in self.without)  # checkpoints: on the CPU
        noise = self._noise()
        of_distance = relative_difference(distances.mean(1), distances_without.mean(1), noise)
        if not self.replicated or of_distance.mean() > 0:
            return "energy distance", of_distance
        return "functional energy score", relative_difference(scores, scores_without)

    def _noise(self) -> float:
        """By how much energy distances of draws differ without the network, mean over held-out populations."""
        assert self.without is not None
        return float(self.without[1].std(1).nan_to_num().mean())

    def _too_few(self, how_many: str) -> str:
        few = f"{how_many} than {self.min_held_out} populations could be held out, which say nothing about it"
        return f"The network is not used: {few}."

    def _decide(self, n: int, most: float = 1.0) -> SelectionResult:
        if self.without is None or self.best is None:
            return SelectionResult(0.0, "Training brought no finite weights (lower lr).", n)
        change, found, _ = self.best
        criterion, mean = self._compare(found)[0], float(change.mean())
        text = f"{criterion} of {n} held-out populations {mean:+.1%}"
        if n < self.min_held_out:
            weight, reason = 0.0, self._too_few(f"{n}, less")
        elif float(self.without[1].mean()) <= self._noise():
            weight, reason = (
                0.0,
                "The network is not used: without it draws are as near the held-out ones as can be told.",
            )
        elif is_negative(change + self.margin):
            weight, reason = most, f"The network helps: {text}."
        else:
            weight, reason = 0.0, f"The network is not used: {text}, not better by {self.margin:.0%} beyond chance."
        without, distance = float(self.without[1].mean()), float(found[1].mean())
        return SelectionResult(weight, reason, n, criterion, mean, without, distance)


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


def is_negative(differences: Tensor) -> bool:
    """Whether the mean of differences `(n,)` is negative at the 95 % level of a one-sided t-test."""
    differences = differences.double()
    n = len(differences)
    if n < 2:
        return bool(differences.mean() < 0)
    margin = float(student_t.ppf(0.95, n - 1)) * differences.std() / math.sqrt(n)
    return bool(differences.mean() < -margin)
