"""The latent VAE and the joint module: likelihood, counts, moving average, state."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from scvi.distributions import NegativeBinomial
from torch import Tensor, nn

from scperturbdiff.retrieval import Conditions
from scperturbdiff.latent import LatentVAE
from scperturbdiff.module import PerturbDiffModule
from scperturbdiff.latent._likelihood import negative_binomial_log_prob

D = 4
"""Latent dimensions."""


def randomize(module: nn.Module, scale: float = 0.2) -> None:
    """Give every weight a value: an untrained network ignores much of its input by design."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(0, scale)


# ---- VAE -----------------------------------------------------------------------------------------------------------


def test_sparse_likelihood_equals_scvi() -> None:
    counts = torch.poisson(torch.rand(6, 30, dtype=torch.float64))
    counts[0] = 0
    counts[1, :3] = torch.tensor([1.0, 50.0, 4000.0])
    mean = (torch.rand(6, 30, dtype=torch.float64) + 0.01).requires_grad_()
    dispersion = (5 * torch.rand(30, dtype=torch.float64) + 0.01).requires_grad_()
    ours = negative_binomial_log_prob(counts, mean, dispersion)
    theirs = NegativeBinomial(mu=mean, theta=dispersion).log_prob(counts).sum(-1)
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)
    weights = torch.arange(1.0, 7.0, dtype=torch.float64)  # cells must not be mixed up
    for found, expected in zip(
        torch.autograd.grad((ours * weights).sum(), (mean, dispersion)),
        torch.autograd.grad((theirs * weights).sum(), (mean, dispersion)),
        strict=True,
    ):
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-8)


def test_likelihood_with_a_dispersion_for_each_cell() -> None:
    counts = torch.poisson(torch.full((5, 8), 2.0))
    mean, dispersion = torch.rand(5, 8) + 0.5, torch.rand(5, 8) + 0.5
    theirs = NegativeBinomial(mu=mean, theta=dispersion).log_prob(counts).sum(-1)
    torch.testing.assert_close(negative_binomial_log_prob(counts, mean, dispersion), theirs, rtol=1e-4, atol=1e-4)


@pytest.fixture
def vae() -> LatentVAE:
    return LatentVAE(20, n_batch=2, n_latent=D, n_hidden=16, n_layers=1, gene_likelihood="nb").eval()


def test_encoding_is_deterministic_and_cell_by_cell(vae: LatentVAE) -> None:
    counts = torch.poisson(torch.full((6, 20), 3.0))
    latent = vae.encode(counts)
    assert latent.shape == (6, D)
    assert torch.equal(latent, vae.encode(counts))
    torch.testing.assert_close(latent[2:3], vae.encode(counts[2:3]), rtol=1e-5, atol=1e-6)
    assert (latent[0] - latent[1]).abs().max() > 0


def test_decoded_counts_have_the_library_size_asked_for(vae: LatentVAE) -> None:
    library = torch.tensor([500.0, 5000.0]).repeat(200)
    counts = vae.decode_counts(torch.randn(1, D).expand(400, -1), library, torch.zeros(400))
    assert (counts == counts.round()).all() and (counts >= 0).all()
    for size in (500, 5000):
        assert counts[library == size].sum(1).mean().item() == pytest.approx(size, rel=0.1)


def test_decoding_follows_the_seed_and_the_batch(vae: LatentVAE) -> None:
    latent, library = torch.randn(8, D), torch.full((8,), 1000.0)

    def decode(seed: int) -> Tensor:
        torch.manual_seed(seed)
        return vae.decode_counts(latent, library, torch.zeros(8))

    assert torch.equal(decode(1), decode(1)) and not torch.equal(decode(1), decode(2))
    first, second = (vae.decode_frequencies(latent, torch.full((8,), float(b))) for b in (0, 1))
    torch.testing.assert_close(first.sum(1), torch.ones(8))
    assert (first - second).abs().max() > 1e-4


# ---- joint module --------------------------------------------------------------------------------------------------


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
    module.anchor.fit(conditions, rng.normal(size=(6, D)), table.astype(float))
    file = io.BytesIO()
    torch.save(module.state_dict(), file)
    file.seek(0)
    other = joint(np.zeros_like(table))
    other.load_state_dict(torch.load(file, weights_only=False))
    for name, value in module.state_dict().items():
        if isinstance(value, Tensor):
            assert torch.equal(value, other.state_dict()[name]), name
    asked = conditions.take(np.array([4, 1]))
    features = table.astype(float)
    for novelty in ("seen", "pair", "context", "perturbation"):
        ours, theirs = (m.anchor.predict(asked, novelty, features) for m in (module, other))
        assert np.array_equal(ours.mean, theirs.mean) and np.array_equal(ours.variance, theirs.variance)
