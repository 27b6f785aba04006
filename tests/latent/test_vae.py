"""The latent VAE: likelihood, encoding, decoded counts."""

from __future__ import annotations

import pytest
import torch
from scvi.distributions import NegativeBinomial
from torch import Tensor

from scperturbdiff.latent import LatentVAE
from scperturbdiff.latent._likelihood import negative_binomial_log_prob

D = 4
"""Latent dimensions."""


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
