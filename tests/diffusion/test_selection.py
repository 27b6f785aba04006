"""Held-out selection: which weights are kept, and whether the network is used, from scores that are given."""

from __future__ import annotations

import copy
import math
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from torch import Tensor

from scperturbdiff.diffusion import Generator, NetworkSelection, SelectionResult
from scperturbdiff.diffusion._selection import WEIGHTS, is_negative

if TYPE_CHECKING:
    from collections.abc import Iterable

N = 6
"""Held-out populations."""
BASE = torch.linspace(1.0, 2.0, N)
"""A tenth of their energy distances without the network."""


def distances(change: float | Tensor) -> Tensor:
    """Energy distances of four draws that the network changes by so much, relatively."""
    return (10 * BASE * (1 + change))[:, None].expand(-1, 4)


class Run:
    """A training whose validation scores are given: each goes with weights that are all equal to its number.

    `in_part` is what the best scores at weights of the network below 1; at others it does harm.
    """

    def __init__(
        self, in_part: dict[float, Tensor] | None = None, of_law: float | Tensor | None = None, **options: Any
    ) -> None:
        self.in_part, self.of_law, self.tried = in_part or {}, of_law, list[float]()
        self.asked_for_law = 0
        self.generator = Generator(2, 1, width=4, n_layers=1, n_heads=1)
        self.generator.network_weight.fill_(1)
        self.selection = NetworkSelection(law=self._law, **options)
        self.trainer: Any = SimpleNamespace(sanity_checking=False)
        self.plan: Any = SimpleNamespace(
            validation=object(),
            scored=torch.arange(N),
            last_distances=None,
            module=SimpleNamespace(generator=copy.deepcopy(self.generator), generator_ema=self.generator),
            validation_scores=self._scores,
        )

    def _scores(self, strength: Any = None) -> tuple[Tensor, Tensor]:
        weight = float(self.generator.network_weight)
        if strength is not None:
            assert weight == 0 and self.of_law is not None and strength(0, 3).tolist() == [1.0] * 3
            return BASE, distances(self.of_law)
        assert weight < 1
        self.tried.append(weight)
        return BASE, self.in_part.get(weight, distances(9.0 if weight else 0.0))

    def _law(self) -> Any:
        self.asked_for_law += 1
        return None if self.of_law is None else lambda number, n: np.ones(n)

    def fill(self, value: float) -> None:
        with torch.no_grad():
            for parameter in self.generator.parameters():
                parameter.fill_(value)

    def __call__(self, found: Iterable[Tensor]) -> SelectionResult:
        self.fill(0.0)  # an untrained network is not scored
        self.selection.on_train_start(self.trainer, self.plan)
        assert self.generator.network_weight == 1
        for number, self.plan.last_distances in enumerate(found, 1):
            self.fill(number)
            self.selection.on_validation_end(self.trainer, self.plan)
        self.fill(math.nan)  # what training ends with is not what is kept
        self.selection.on_train_end(self.trainer, self.plan)
        return self.selection.result

    @property
    def kept(self) -> float:
        values = torch.cat([p.detach().flatten() for p in self.generator.parameters()]).unique()
        assert len(values) == 1
        return float(values)


def test_differences_are_negative_only_beyond_chance() -> None:
    noise = torch.tensor([1.0, -1.0] * 4)
    assert not is_negative(torch.zeros(8))
    assert not is_negative(noise - 0.5)  # by 1.3 standard errors: one in nine by chance
    assert is_negative(noise - 0.8)
    assert not is_negative(noise[:2] - 3)  # of two values, hardly anything is beyond chance
    assert not is_negative(noise + 0.5)
    assert is_negative(torch.tensor([-0.1])) and not is_negative(torch.tensor([0.1]))


@pytest.mark.parametrize(("change", "used"), [(-0.06, True), (-0.04, False), (0.0, False), (0.06, False)])
def test_the_network_must_bring_more_than_the_margin(change: float, used: bool) -> None:
    """Of five per cent, with nothing left to chance."""
    run = Run()
    found = run([distances(change)])
    assert found.weight == run.generator.network_weight == float(used)
    assert run.kept == (1.0 if used else 0.0)
    assert found.change == pytest.approx(change, abs=1e-6) and found.n_held_out == N
    assert f"energy distance of {N} held-out conditions {change:+.1%}" in found.reason
    assert found.without_network == pytest.approx(15) and found.with_network == pytest.approx(15 * (1 + change))


@pytest.mark.parametrize(("margin", "used"), [(0.03, True), (0.05, False)])
def test_the_margin_can_be_chosen(margin: float, used: bool) -> None:
    assert Run(margin=margin)([distances(-0.04)]).weight == float(used)


def test_what_helps_some_and_harms_others_by_chance_is_not_used() -> None:
    change = torch.tensor([-0.9, 0.5, -0.9, 0.5, -0.5, 0.5])
    run = Run()
    found = run([distances(change)])
    assert found.change < -0.05 and found.weight == 0 and run.kept == 0
    assert "not better by 5% beyond chance" in found.reason


def test_the_best_weights_are_kept_wherever_training_ends() -> None:
    run = Run()
    found = run([distances(-0.2), distances(-0.5), distances(-0.4), distances(-0.1)])
    assert run.kept == 2 and found.weight == 1 and found.change == pytest.approx(-0.5)


@pytest.mark.parametrize(
    ("in_part", "weight", "change"),
    [
        ({0.5: distances(-0.4), 0.25: distances(-0.3)}, 0.5, -0.4),
        ({0.75: distances(-0.205)}, 1.0, -0.2),  # hardly better
        ({0.5: distances(math.nan)}, 1.0, -0.2),
        ({0.25: distances(0.1)}, 1.0, -0.2),
    ],
)
def test_the_best_network_is_used_in_part_where_that_is_better(in_part: Any, weight: float, change: float) -> None:
    run = Run(in_part=in_part)
    found = run([distances(-0.1), distances(-0.2)])
    assert run.tried == [0.0, *WEIGHTS] and run.kept == 2
    assert found.weight == run.generator.network_weight == weight
    assert found.change == pytest.approx(change, abs=1e-6)


def test_a_network_that_helps_only_in_part_is_used_in_part() -> None:
    run = Run(in_part={0.25: distances(-0.06)})
    assert run([distances(0.5)]).weight == 0.25 and run.kept == 1


def test_changes_are_relative_so_that_all_populations_count() -> None:
    """The mean distance falls because of the most distant population; most are made worse."""
    change = torch.where(BASE == BASE.max(), -0.25, 0.06)
    assert distances(change).mean() < 10 * BASE.mean() and change.mean() > 0
    run = Run()
    found = run([distances(change)])
    assert found.change == pytest.approx(float(change.mean()), abs=1e-6) and found.weight == 0


def test_tiny_distances_do_not_rule() -> None:
    """A population that is met exactly without the network would make any change endless."""
    run = Run()
    exact = BASE.clone()
    exact[0] = 0.0
    run.selection.without = exact[:, None]
    found = run.selection.change(exact[:, None] + 0.1)
    assert found[0] == pytest.approx(0.1 / (0.25 * float(exact.mean())), rel=1e-5)
    assert found[1:].tolist() == pytest.approx((0.1 / exact[1:]).tolist(), rel=1e-5)


def test_replicates_of_a_condition_are_one_piece_of_evidence() -> None:
    """Six populations of two conditions say as much as two conditions."""
    condition = np.array([7, 7, 3, 3, 3, 7])
    change = torch.tensor([-0.6, -0.5, -0.4, -0.5, -0.6, -0.4])
    assert Run()([distances(change)]).weight == 1
    run = Run(condition=condition)
    found = run([distances(change)])
    assert found.weight == 0 and found.n_held_out == 2 and "2, less than 5 conditions" in found.reason
    base, better = (10 * BASE * (1 + x) for x in (0.0, change))
    means = [[float(values[condition == c].mean()) for c in (3, 7)] for values in (better, base)]
    wanted = [x / y - 1 for x, y in zip(*means, strict=True)]
    assert run.selection.change(distances(change)).tolist() == pytest.approx(wanted, rel=1e-5)
    assert Run(condition=np.arange(N)[::-1].copy())([distances(change)]).weight == 1  # each has its own


def test_only_conditions_that_were_scored_count() -> None:
    run = Run(condition=np.array([5, 9, 0, 0, 1, 2, 3, 4]))
    run.plan.scored = torch.tensor([2, 3, 4, 5, 6, 7])  # of eight held-out populations
    assert run([distances(-0.5)]).n_held_out == 5


def test_the_best_of_many_weights_must_be_what_others_would_choose() -> None:
    """Networks that change distances by chance only: the best of twenty looks better three times as often."""
    rng = torch.Generator().manual_seed(0)
    looks_better, used = 0, 0
    for _ in range(100):
        tried = 0.3 * torch.randn(20, N, generator=rng)
        looks_better += is_negative(tried[tried.mean(1).argmin()] + 0.05)
        run = Run()
        used += run([distances(change) for change in tried]).weight > 0
    assert looks_better > 30 and 3 * used < looks_better
    each = [tried[(tried.sum(1) - tried[:, i]).argmin(), i] for i in range(N)]
    run.selection.tried = list(tried)
    assert run.selection.cross_selected().tolist() == [float(x) for x in each]


@pytest.mark.parametrize(("of_law", "used"), [(None, True), (0.0, True), (-0.2, True), (-0.27, False), (-0.4, False)])
def test_a_network_must_be_clearly_better_than_a_law_of_responses(of_law: float | None, used: bool) -> None:
    run = Run(of_law=of_law)
    found = run([distances(-0.3)])
    assert found.weight == run.generator.network_weight == float(used) and run.kept == float(used)
    assert ("a law of how strongly cells respond" in found.reason) == (not used) and run.asked_for_law == 1
    assert found.change == pytest.approx(-0.3, abs=1e-6)


def test_no_law_is_asked_for_where_the_network_does_not_help() -> None:
    run = Run(of_law=0.0)
    assert run([distances(-0.01)]).weight == 0 and run.asked_for_law == 0


def test_what_is_compared() -> None:
    selection = NetworkSelection()
    selection.without = torch.tensor([[3.0, 5.0], [7.0, 9.0]])
    nearer, further = torch.tensor([[1.0, 3.0], [7.0, 9.0]]), torch.tensor([[3.0, 5.0], [7.0, 13.0]])
    assert [selection.change(found).tolist() for found in (nearer, further)] == [[-0.5, 0.0], [0.0, 0.25]]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_distances_that_are_not_finite_are_never_chosen(bad: float) -> None:
    broken = distances(-0.9).clone()
    broken[2] = bad
    run = Run()
    assert run([broken, distances(-0.2), broken]).weight == 1 and run.kept == 2
    run = Run()
    found = run([broken])
    assert found.weight == run.generator.network_weight == 0 and run.kept == 0  # finite: those training started from
    assert found.reason == "Training brought no finite weights (lower lr)." and math.isnan(found.change)


def test_weights_of_an_earlier_training_count() -> None:
    """Training goes on from weights that are scored, too, before the first step."""
    run = Run()
    with torch.no_grad():
        for parameter in run.generator.parameters():
            parameter.fill_(7.0)
    told = iter([distances(0.0), distances(-0.4), *[distances(-0.1)] * len(WEIGHTS)])
    run.plan.validation_scores = lambda: (BASE, next(told))
    run.selection.on_train_start(run.trainer, run.plan)
    run.plan.last_scores = distances(-0.3)
    run.fill(1.0)
    run.selection.on_validation_end(run.trainer, run.plan)
    run.selection.on_train_end(run.trainer, run.plan)
    assert run.kept == 7 and run.selection.result.change == pytest.approx(-0.4)


def test_without_held_out_populations_the_network_is_used_untested() -> None:
    run = Run()
    run.plan.validation = None
    run.selection.on_train_start(run.trainer, run.plan)
    run.selection.on_validation_end(run.trainer, run.plan)
    run.fill(3.0)
    run.selection.on_train_end(run.trainer, run.plan)
    assert run.kept == 3 and run.selection.result.weight == run.generator.network_weight == 1
    assert "untested" in run.selection.result.reason and run.selection.result.n_held_out == 0


def test_scores_of_a_sanity_check_are_not_looked_at() -> None:
    run = Run()
    run.trainer.sanity_checking = True
    assert run([distances(-0.9)]).weight == 0


def test_a_selection_goes_on_from_its_state() -> None:
    first, second = Run(), Run()
    first([distances(-0.2), distances(-0.5)])
    second.selection.load_state_dict(first.selection.state_dict())
    assert second([distances(-0.3)]).weight == 1  # not scored again, and no better than before
    assert second.kept == 2 and second.selection.result.change == pytest.approx(-0.5)


def test_a_change_needs_something_to_compare_with() -> None:
    with pytest.raises(RuntimeError, match="not scored without the network"):
        NetworkSelection().change(distances(0.0))


@pytest.mark.parametrize("draws_differ", [0.05, 0.2])
def test_distances_of_about_zero_are_no_evidence(draws_differ: float) -> None:
    """Of distances that are 0 on average, as of populations generated as well as can be, no share can be taken."""
    draws = draws_differ * torch.tensor([-1.0, 1.0, -1.0, 1.0]).expand(N, -1)
    selection = NetworkSelection()
    selection.without = draws
    better = draws - 0.02 * draws_differ
    assert selection.change(better).mean().item() == pytest.approx(-0.02 / (4 / 3) ** 0.5, rel=1e-3)


@pytest.mark.parametrize("held_out", [True, False])
def test_weights_that_are_not_finite_stay_nowhere(held_out: bool) -> None:
    """Those of the trained network become those that are used, which are those of before where none else are finite."""
    run = Run()
    module = run.plan.module
    if held_out:
        torch.nn.init.constant_(module.generator.transformer.out.weight, math.nan)
        found = run([distances(-0.5), distances(math.nan)])
        assert found.weight == 1 and run.kept == 1 and "Later its training diverged" in found.reason
    else:
        run.plan.validation = None
        run.fill(5.0)
        run.selection.on_train_start(run.trainer, run.plan)
        run.fill(math.nan)
        run.selection.on_train_end(run.trainer, run.plan)
        assert run.selection.result.weight == run.generator.network_weight == 0 and run.kept == 5
        assert "diverged (lower lr)" in run.selection.result.reason
    assert run.selection.decided
    for ours, theirs in zip(module.generator.parameters(), run.generator.parameters(), strict=True):
        assert ours.isfinite().all() and (not held_out or torch.equal(ours, theirs))
