"""Priors: where control cells go, as a whole or state by state."""

from __future__ import annotations

from dataclasses import replace

import torch

from scperturbdiff.diffusion import Prior, StatePrior

B, M, K, D = 3, 7, 2, 4
CENTRES = torch.tensor([[20.0] * D, [-20.0] * D])
"""Two states that no cell can be between."""


def some_prior(k: int | None = None) -> Prior:
    prior = Prior(torch.randn(B, D), torch.rand(B), 0.3 * torch.randn(B), torch.randn(B, D))
    if k is None:
        return prior
    states = StatePrior(torch.randn(B, k, D), 0.3 * torch.randn(B, k), torch.randn(B, k, D), CENTRES[:k], 1.0)
    return replace(prior, states=states)


def test_one_state_moves_as_all_cells_do() -> None:
    whole, start = some_prior(), torch.randn(B, M, D)
    one = StatePrior(whole.shift[:, None], whole.spread[:, None], whole.centre[:, None], CENTRES[:1], 1.0)
    torch.testing.assert_close(replace(whole, states=one).move(start), whole.move(start))


def test_cells_move_as_the_state_that_they_are_in() -> None:
    prior = some_prior(K)
    states, start = prior.states, torch.randn(B, M, D)
    assert states is not None
    for k in range(K):
        alone = Prior(states.shift[:, k], prior.variance, states.spread[:, k], states.centre[:, k])
        torch.testing.assert_close(prior.move(CENTRES[k] + start), alone.move(CENTRES[k] + start))


def test_states_that_respond_alike_are_one() -> None:
    """Without a change of spread."""
    prior, start = some_prior(K), 15 * torch.randn(B, M, D)
    assert prior.states is not None
    shift = prior.shift[:, None].expand(-1, K, -1)
    alike = replace(prior, states=replace(prior.states, shift=shift, spread=torch.zeros(B, K)))
    torch.testing.assert_close(alike.move(start), start + prior.shift[:, None], rtol=1e-4, atol=1e-4)


def test_an_offset_shifts_every_cell() -> None:
    offset, start = torch.randn(B, D), 10 * torch.randn(B, M, D)
    for prior in (some_prior(), some_prior(K)):
        moved = prior.shifted(offset)
        torch.testing.assert_close(moved.move(start), prior.move(start) + offset[:, None], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(moved.shift, prior.shift + offset)


def test_priors_are_taken_apart_and_put_together() -> None:
    first, second, start = some_prior(K), some_prior(K), torch.randn(B, M, D)
    stacked = Prior.stack([first, second])
    for number, prior in enumerate((first, second)):
        again = stacked.map(lambda x, number=number: x[number])
        torch.testing.assert_close(again.move(start), prior.move(start), rtol=0, atol=0)
    for i in range(B):
        torch.testing.assert_close(first.at(i).move(start[i : i + 1]), first.move(start)[i : i + 1])
    twice = first.repeat(2).move(start.repeat_interleave(2, 0))
    torch.testing.assert_close(twice[1::2], first.move(start))
