"""The perturbation encoder: sets of components with doses and features."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from scperturbdiff.diffusion import Components, PerturbationEncoder


def randomize(module: nn.Module, scale: float = 0.2) -> None:
    """Give every weight a value: an untrained network ignores much of its input by design."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(0, scale)


@pytest.fixture
def encoder() -> PerturbationEncoder:
    return PerturbationEncoder(n_names=4, n_features=0, width=16).eval()


def components(index: list[list[int]], dose: list[list[float]] | None = None) -> Components:
    at = torch.tensor(index)
    return Components(at, torch.zeros(at.shape) if dose is None else torch.tensor(dose))


@torch.no_grad()
def test_components_have_no_order(encoder: PerturbationEncoder) -> None:
    there = encoder(components([[0, 2, 3]], [[0.5, -1.0, 2.0]]))
    back = encoder(components([[3, 0, 2]], [[2.0, 0.5, -1.0]]))
    swapped = encoder(components([[0, 2, 3]], [[2.0, 0.5, -1.0]]))  # doses belong to components
    torch.testing.assert_close(there, back, rtol=1e-5, atol=1e-6)
    assert (there - swapped).abs().max() > 1e-3


@torch.no_grad()
def test_absent_components_leave_no_trace(encoder: PerturbationEncoder) -> None:
    single = encoder(components([[2]], [[0.7]]))
    padded = encoder(components([[2, -1, -1]], [[0.7, 5.0, -5.0]]))
    torch.testing.assert_close(single, padded, rtol=1e-6, atol=1e-6)


@torch.no_grad()
def test_control_is_the_empty_set(encoder: PerturbationEncoder) -> None:
    control = encoder(components([[-1, -1], [-1, -1]], [[0.0, 0.0], [3.0, -2.0]]))
    assert torch.equal(control[0], control[1])
    assert (encoder(components([[0]])) - control[:1]).abs().max() > 1e-3


@torch.no_grad()
def test_dose_is_continuous(encoder: PerturbationEncoder) -> None:
    doses = torch.linspace(-3, 3, 61)
    codes = encoder(Components(torch.zeros(61, 1, dtype=torch.long), doses[:, None]))
    steps = codes.diff(dim=0).norm(dim=1)
    assert (steps > 0).all() and steps.max() < 0.2 * (codes[0] - codes[-1]).norm()


@torch.no_grad()
def test_a_combination_is_more_than_one_of_its_parts(encoder: PerturbationEncoder) -> None:
    pair, first, second, twice = encoder(components([[0, 1], [0, -1], [1, -1], [0, 0]]))
    assert min((pair - other).abs().max() for other in (first, second, twice)) > 1e-3


@torch.no_grad()
def test_components_known_by_features_only() -> None:
    encoder = PerturbationEncoder(n_names=2, n_features=3, width=16).eval()
    features = torch.randn(5, 3)
    features[4] = features[3]
    known = torch.tensor([True, True, True, True, True])
    named, new, like_new = encoder(components([[1], [3], [4]]), features, known)
    torch.testing.assert_close(new, like_new)
    assert (named - new).abs().max() > 1e-3
    randomize(encoder.name)  # names of others must not leak into a component without a name
    torch.testing.assert_close(encoder(components([[3]]), features, known)[0], new)
    moved = features.clone()
    moved[3] += 1
    assert (encoder(components([[3]]), moved, known)[0] - new).abs().max() > 1e-3


@torch.no_grad()
def test_unknown_features_are_not_read() -> None:
    encoder = PerturbationEncoder(n_names=2, n_features=3, width=16).eval()
    features, known = torch.zeros(2, 3), torch.tensor([False, True])
    before = encoder(components([[0], [1]]), features, known)
    features = features + 7
    after = encoder(components([[0], [1]]), features, known)
    assert torch.equal(before[0], after[0]) and not torch.equal(before[1], after[1])


@torch.no_grad()
def test_names_are_dropped_in_training_only_where_features_remain() -> None:
    encoder = PerturbationEncoder(n_names=2, n_features=3, width=16, p_drop_name=0.5)
    features, known = torch.randn(2, 3), torch.tensor([True, False])
    many = components([[0]] * 400 + [[1]] * 400)
    in_training = encoder.train()(many, features, known)
    in_use = encoder.eval()(many, features, known)
    same = (in_training - in_use).abs().amax(1) < 1e-5
    assert 0.4 < same[:400].float().mean().item() < 0.6
    assert same[400:].all()
