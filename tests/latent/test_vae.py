"""The latent VAE: likelihood, molecules held back in training, encoding, decoded counts."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from scipy import sparse
from scvi import REGISTRY_KEYS
from scvi.distributions import NegativeBinomial
from torch import Tensor

from scperturbdiff.latent import LatentVAE, train_shortly
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


def batch_of(counts: Tensor) -> dict[str, Tensor]:
    code = torch.zeros(len(counts), 1, dtype=torch.long)
    return {REGISTRY_KEYS.X_KEY: counts, REGISTRY_KEYS.BATCH_KEY: code, REGISTRY_KEYS.LABELS_KEY: code}


def heard(vae: LatentVAE, counts: Tensor) -> tuple[Tensor, dict[str, Tensor], Any]:
    """What the encoder is given, what the loss compares with, and the loss."""
    with pytest.MonkeyPatch.context() as patch:
        inference, loss, found = vae.inference, vae.loss, []
        patch.setattr(vae, "inference", lambda x, **kw: (found.append(x), inference(x=x, **kw))[1])
        patch.setattr(vae, "loss", lambda tensors, *args, **kw: (found.append(tensors), loss(tensors, *args, **kw))[1])
        result = vae(batch_of(counts), loss_kwargs={"kl_weight": 0.0})[2]
    return found[0], found[1], result


@pytest.mark.parametrize("share", [0.5, 0.8])
def test_encoder_and_decoder_share_the_molecules_of_a_cell(vae: LatentVAE, share: float) -> None:
    vae.encoded_share = share
    counts = torch.poisson(torch.full((400, 20), 3.0))
    counts[0] = 0
    before = counts.clone()
    given, tensors, result = heard(vae, counts)
    rest = tensors[REGISTRY_KEYS.X_KEY]
    assert torch.equal(counts, before)
    torch.testing.assert_close(given * share + rest, counts)
    assert (rest >= 0).all() and (rest == rest.round()).all()
    # two parts of a Poisson count are independent
    parts = np.corrcoef(given.numpy().ravel(), rest.numpy().ravel())[0, 1]
    assert abs(parts) < 5 / np.sqrt(counts.numel())
    assert result.loss.isfinite()


def test_the_likelihood_of_a_part_stands_for_that_of_the_whole(vae: LatentVAE) -> None:
    counts = torch.poisson(torch.full((2000, 20), 30.0))
    vae.encoded_share = 0.5
    _, tensors, half = heard(vae, counts)
    px = vae.generative(
        torch.zeros(2000, D),
        tensors[REGISTRY_KEYS.X_KEY].sum(1, keepdim=True).log(),
        batch_of(counts)[REGISTRY_KEYS.BATCH_KEY],
    )["px"]
    alone = -negative_binomial_log_prob(tensors[REGISTRY_KEYS.X_KEY], px.mu, px.theta).mean()
    assert half.loss.item() == pytest.approx(2 * alone.item(), rel=0.1)


def test_a_vae_that_is_given_all_molecules_trains_as_in_scvi(vae: LatentVAE) -> None:
    assert vae.encoded_share == 1
    counts = torch.poisson(torch.full((6, 20), 3.0))
    given, tensors, _ = heard(vae, counts)
    assert torch.equal(given, counts) and torch.equal(tensors[REGISTRY_KEYS.X_KEY], counts)


def test_cells_that_differ_by_poisson_noise_are_decoded_alike() -> None:
    """What the VAE is told to predict is not what it was shown: noise cannot be learnt by heart."""
    rng = np.random.default_rng(0)
    rates = rng.gamma(1.0, 1.0, 40)
    counts = sparse.csr_matrix(rng.poisson(rates, (300, 40)).astype(np.float32))

    def spread(share: float) -> float:
        torch.manual_seed(0)
        vae = LatentVAE(40, n_batch=1, n_latent=D, n_hidden=64, n_layers=1, gene_likelihood="nb", encoded_share=share)
        train_shortly(vae, counts, np.zeros(300, np.int64), 300, 100)
        latent = vae.encode(torch.from_numpy(counts.toarray()))
        frequencies = vae.decode_frequencies(latent, torch.zeros(300)).detach()
        return float((frequencies.std(0) / frequencies.mean(0)).median())

    assert spread(0.5) < 0.5 * spread(1.0)


@pytest.mark.parametrize("share", [0, 1.5, float("nan"), "half"])
def test_a_share_that_is_none_is_named(share: Any) -> None:
    with pytest.raises((ValueError, TypeError), match=r"encoded_share=.*must be"):
        LatentVAE(20, n_batch=1, gene_likelihood="nb", encoded_share=share)
