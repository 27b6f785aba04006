"""The joint module: moving average, latent scale, features, state."""

from __future__ import annotations

import io
from typing import get_args

import numpy as np
import pytest
import torch
from tests.retrieval.screens import responses
from torch import Tensor, nn

from scperturbdiff.module import PerturbDiffModule
from scperturbdiff.retrieval import Conditions, Novelty, Retrieval

D = 4
"""Latent dimensions."""


def randomize(module: nn.Module, scale: float = 0.2) -> None:
    """Give every weight a value: an untrained network ignores much of its input by design."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(0, scale)


def joint(features: np.ndarray | None = None) -> PerturbDiffModule:
    return PerturbDiffModule(
        20, 2, D, 3, features, n_hidden=16, generator_kwargs={"width": 16, "n_layers": 1, "n_heads": 2}
    )


def weights(module: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in module.parameters()]


def test_moving_average_of_the_weights() -> None:
    module = joint()
    assert all(torch.equal(a, b) for a, b in zip(weights(module.generator_ema), weights(module.generator), strict=True))
    assert not any(p.requires_grad for p in module.generator_ema.parameters())
    before = weights(module.generator_ema)
    randomize(module.generator, 1.0)
    trained = weights(module.generator)
    module.update_ema(0.9)
    for old, new, target in zip(before, weights(module.generator_ema), trained, strict=True):
        torch.testing.assert_close(new, 0.9 * old + 0.1 * target, rtol=1e-5, atol=1e-6)
    assert all(torch.equal(a, b) for a, b in zip(weights(module.generator), trained, strict=True))
    module.update_ema(0.0)
    for new, target in zip(weights(module.generator_ema), trained, strict=True):
        torch.testing.assert_close(new, target)


def test_latent_scale() -> None:
    module, latent = joint(), torch.randn(500, D) * torch.tensor([1.0, 5.0, 0.1, 0.0]) + 3
    module.set_latent_scale(latent)
    scaled = module.standardize(latent)
    torch.testing.assert_close(scaled.mean(0), torch.zeros(D), rtol=0, atol=1e-2)
    torch.testing.assert_close(scaled[:, :3].std(0), torch.ones(3), rtol=1e-3, atol=0)
    assert scaled.isfinite().all()
    torch.testing.assert_close(module.unstandardize(scaled), latent, rtol=1e-4, atol=1e-4)


def test_features_are_scaled_as_in_training() -> None:
    table = np.array([[3.0, 4.0], [np.nan, np.nan], [0.0, 10.0]], np.float32)
    module = joint(table)
    assert module.has_features is not None and module.features is not None
    assert module.has_features.tolist() == [True, False, True]
    assert (module.features[1] == 0).all()
    assert module.features[[0, 2]].square().mean().item() == pytest.approx(1, rel=1e-5)
    more, known = module.scale_features(np.array([[6.0, 8.0]], np.float32))
    assert more is not None and known is not None
    torch.testing.assert_close(more[0], 2 * module.features[0])
    assert joint().features is None


def test_state_holds_everything() -> None:
    table = np.random.default_rng(0).normal(size=(4, 2)).astype(np.float32)
    module = joint(table)
    randomize(module.generator)
    module.update_ema(0.5)
    module.set_latent_scale(3 * torch.randn(50, D) + 1)
    rng = np.random.default_rng(1)
    conditions = Conditions(
        rng.normal(size=(6, D)), np.arange(6)[:, None] % 3, np.zeros((6, 1)), np.arange(6) // 3, np.full(6, 0.1)
    )
    module.retrieval = Retrieval.fit(
        responses(conditions, rng.normal(size=(6, D)), residual=np.zeros((6, module.vae.n_input), np.float16)),
        table.astype(float),
    )
    file = io.BytesIO()
    torch.save(module.state_dict(), file)
    file.seek(0)
    other = joint(np.zeros_like(table))
    assert other.retrieval is None
    other.load_state_dict(torch.load(file, weights_only=True))
    assert other.retrieval is not None
    for name, value in module.state_dict().items():
        if isinstance(value, Tensor):
            assert torch.equal(value, other.state_dict()[name]), name
    asked = conditions.take(np.array([4, 1]))
    for novelty in get_args(Novelty):
        ours, theirs = (m.retrieval.predict(asked, novelty) for m in (module, other))
        assert np.array_equal(ours.shift, theirs.shift) and np.array_equal(ours.variance, theirs.variance)
