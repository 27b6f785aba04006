"""Stage 1: scvi-tools' count VAE, read and decoded the way the second stage needs it."""

from __future__ import annotations

from typing import Any

import torch
from scvi import REGISTRY_KEYS
from scvi.module import VAE
from scvi.module.base import LossOutput
from torch import Tensor
from torch.distributions import kl_divergence

EPS = 1e-8
"""As in scvi-tools' own negative binomial."""
LARGE_MEAN = 4.0
"""Counts of a larger mean are drawn as a gamma-Poisson mixture."""


def negative_binomial_log_prob(counts: Tensor, mean: Tensor, dispersion: Tensor) -> Tensor:
    """Log probability of counts, summed over genes, `(n_cells, n_genes) -> (n_cells,)`.

    Equal to :class:`scvi.distributions.NegativeBinomial`, but the gamma functions, which are nearly all of its cost
    on a CPU, are evaluated only where a count is not zero: elsewhere they cancel.
    """
    log_total = torch.log(dispersion + mean + EPS)
    dense = dispersion * (torch.log(dispersion + EPS) - log_total) + counts * (torch.log(mean + EPS) - log_total)
    cell, gene = counts.nonzero(as_tuple=True)
    count, theta = counts[cell, gene], dispersion.expand_as(counts)[cell, gene]
    gammas = torch.lgamma(count + theta) - torch.lgamma(theta) - torch.lgamma(count + 1)
    return dense.sum(-1).index_add(0, cell, gammas)


def sample_negative_binomial(mean: Tensor, shape: Tensor) -> Tensor:
    """Negative binomial counts of the given means and shapes (variance = mean + mean^2 / shape), any common size.

    On a CPU gamma and Poisson numbers are nearly all of the cost of prediction, while most counts are 0. There one
    uniform number decides which are; small counts are found by inverting the distribution function, large ones drawn
    as a gamma-Poisson mixture.
    """
    if mean.device.type != "cpu":
        return torch.poisson(mean / shape * torch._standard_gamma(shape))
    uniform = torch.rand_like(mean)
    large = mean > LARGE_MEAN
    out = torch.zeros_like(mean)
    at = ((uniform > torch.exp(-shape * torch.log1p(mean / shape))) & ~large).nonzero(as_tuple=True)
    out[at] = _invert(uniform[at].double(), mean[at].double(), shape[at].double()).to(mean.dtype)
    at = large.nonzero(as_tuple=True)
    out[at] = torch.poisson(mean[at] / shape[at] * torch._standard_gamma(shape[at]))
    return out


def move_counts(
    counts: Tensor, before: Tensor, after: Tensor, dispersion: Tensor, again: Tensor | None = None
) -> Tensor:
    r"""Counts of cells if their negative binomial means had been others, all `(n_cells, n_genes)`.

    A negative binomial count is Poisson with rate :math:`\mu w`, `w` Gamma with mean 1 and shape :math:`\theta`. What
    cells show of both `w` and their Poisson noise is kept; only the rate changes, by :math:`r = \mu' / \mu`. Where it
    falls, each molecule stays with probability `r`. Where it rises, counts of mean :math:`(\mu' - \mu) w` are added,
    :math:`w \mid x \sim \mathrm{Gamma}(\theta + x, \theta + \mu)`. Counts of law :math:`\mu, \theta` become counts
    of law :math:`\mu', \theta`, and stay as they are where :math:`\mu' = \mu`.

    Parameters
    ----------
    counts
        Counts as they are.
    before, after
        Their means, and those they would have had.
    dispersion
        :math:`\theta`: variance = mean + mean^2 / dispersion.
    again
        Cells that are the copy of another one, `(n_cells,)`; `None` for none. They keep `w`, and get Poisson noise of
        their own.
    """
    shape = dispersion + counts
    expected = shape / (dispersion + before)  # of w, given the counts
    out = _thin(counts, after / before) + sample_negative_binomial((after - before).clamp(min=0) * expected, shape)
    if again is not None and again.any():
        out[again] = sample_negative_binomial((after * expected)[again], shape[again])
    return out


def _thin(counts: Tensor, probability: Tensor) -> Tensor:
    """Counts of which each molecule stays with a probability (1 where it is larger)."""
    out = counts.clone()
    at = ((counts > 0) & (probability < 1)).nonzero(as_tuple=True)
    out[at] = torch.binomial(counts[at], probability[at])
    return out


def _invert(uniform: Tensor, mean: Tensor, shape: Tensor) -> Tensor:
    """Quantiles of negative binomial laws of small mean, none of them 0, by summing probabilities upwards."""
    odds = mean / (shape + mean)
    mass = (1 - odds) ** shape
    left = uniform - mass
    out, active = torch.ones_like(mean), torch.arange(len(mean))
    count = 0
    while True:
        mass = mass * odds * (shape + count) / (count + 1)
        left = left - mass
        count += 1
        more = left > 0
        if not more.any():
            return out
        active, mass, odds, shape, left = active[more], mass[more], odds[more], shape[more], left[more]
        out[active] = count + 1


class LatentVAE(VAE):
    """scvi-tools' negative binomial VAE with deterministic encoding and seeded decoding of counts.

    The dispersions start at one value: scvi-tools starts them at random, and in short runs the random start remains,
    which adds noise to generated counts.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.dispersion == "gene":
            torch.nn.init.constant_(self.px_r, 1.0)

    def loss(
        self,
        tensors: dict[str, Tensor],
        inference_outputs: dict[str, Any],
        generative_outputs: dict[str, Any],
        kl_weight: Tensor | float = 1.0,
    ) -> LossOutput:
        """Negative evidence lower bound, as scvi-tools computes it for a negative binomial."""
        px = generative_outputs["px"]
        reconstruction = -negative_binomial_log_prob(tensors[REGISTRY_KEYS.X_KEY], px.mu, px.theta)
        kl = kl_divergence(inference_outputs["qz"], generative_outputs["pz"]).sum(-1)
        return LossOutput(
            loss=torch.mean(reconstruction + kl_weight * kl),
            reconstruction_loss=reconstruction,
            kl_local={"kl_divergence_z": kl},
        )

    @torch.no_grad()
    def encode(self, counts: Tensor) -> Tensor:
        """Posterior means `(n_cells, n_latent)` of counts `(n_cells, n_genes)`."""
        batch = torch.zeros(len(counts), 1, device=counts.device)  # the encoder does not see the batch
        outputs = self.inference(x=counts, batch_index=batch)
        mean: Tensor = outputs["qz"].loc
        return mean

    @torch.no_grad()
    def decode_counts(self, latent: Tensor, library_size: Tensor, batch: Tensor) -> Tensor:
        """Sample counts `(n_cells, n_genes)`.

        Parameters
        ----------
        latent
            `(n_cells, n_latent)`, not standardised.
        library_size
            Counts per cell, `(n_cells,)`.
        batch
            Batch codes, `(n_cells,)`.
        """
        outputs = self.generative(z=latent, library=library_size.log()[:, None], batch_index=batch[:, None].long())
        sampled: Tensor = outputs["px"].sample()
        return sampled

    @torch.no_grad()
    def counterfactual_counts(
        self,
        latent: Tensor,
        batch: Tensor,
        start_counts: Tensor,
        start_latent: Tensor,
        start_batch: Tensor,
        library_ratio: float = 1.0,
        residual: Tensor | None = None,
        again: Tensor | None = None,
    ) -> Tensor:
        r"""Sample counts of cells as if the control cells they started from had moved in the latent space.

        The mean of gene `g` is :math:`\ell h_g(z)`, :math:`\ell` the cell's library size. What a control cell shows,
        given its counts, of what the decoder cannot know is kept (:func:`move_counts`): where the VAE is right, counts
        have its negative binomial law; where it is not, generated cells keep what it cannot reconstruct of real ones.

        Parameters
        ----------
        latent
            Where the cells go, `(n_cells, n_latent)`, not standardised.
        batch
            Batch codes to decode with, `(n_cells,)`.
        start_counts, start_latent, start_batch
            Counts `(n_cells, n_genes)`, latent vectors and batch codes of the control cells.
        library_ratio
            Expected library sizes relative to those of the control cells.
        residual
            Log ratio of expected counts to decoded ones, `(n_genes,)`; cells keep their expected library size.
        again
            Cells whose control cell another one has already started from, `(n_cells,)`; see :func:`move_counts`.

        Returns
        -------
        Counts `(n_cells, n_genes)`.
        """
        library = start_counts.sum(-1, keepdim=True)
        target = (library_ratio * library).log()
        px = self.generative(z=latent, library=target, batch_index=batch[:, None].long())["px"]
        before = library * self.decode_frequencies(start_latent, start_batch)
        after = px.mu
        if residual is not None:
            after = after * residual.exp()
            after = after * (px.mu.sum(-1, keepdim=True) / after.sum(-1, keepdim=True).clamp(min=EPS))
        return move_counts(start_counts, before, after, px.theta.expand_as(before), again)

    def decode_frequencies(self, latent: Tensor, batch: Tensor) -> Tensor:
        """Expected share of each gene in a cell's counts `(n_cells, n_genes)`; differentiable."""
        library = torch.zeros(len(latent), 1, device=latent.device)
        outputs = self.generative(z=latent, library=library, batch_index=batch[:, None].long())
        scale: Tensor = outputs["px"].scale
        return scale
