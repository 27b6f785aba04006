"""Stage 1: scvi-tools' count VAE, read and decoded the way the second stage needs it."""

from __future__ import annotations

from typing import Any

import torch
from scvi import REGISTRY_KEYS
from scvi.module import VAE
from scvi.module.base import LossOutput
from torch import Tensor
from torch.distributions import kl_divergence

from scperturbdiff.arguments import check_number
from scperturbdiff.counts import thin
from scperturbdiff.latent._likelihood import negative_binomial_log_prob

ENCODED = "encoded"
"""Where the counts that the encoder sees are, beside those that the decoder predicts."""


class LatentVAE(VAE):
    """scvi-tools' negative binomial VAE with deterministic encoding and seeded decoding of counts.

    It can be trained on molecules that it has not seen: the encoder is given a random share of each cell's, the decoder
    predicts the others (data thinning, :cite:t:`neufeld2024`; molecular cross-validation, :cite:t:`batson2019`). With
    few cells, a VAE that encodes what it decodes also learns their Poisson noise, and decoded cells differ too much.

    The dispersions start at one value: scvi-tools starts them at random, and in short runs the random start remains,
    which adds noise to generated counts.

    Parameters
    ----------
    *args, **kwargs
        Passed to :class:`scvi.module.VAE`.
    encoded_share
        Share of the molecules that the encoder is given in training, above 0 and at most 1. With 1 both see all of
        them, as in scvi-tools.
    """

    def __init__(self, *args: Any, encoded_share: float = 1.0, **kwargs: Any) -> None:
        check_number("encoded_share", encoded_share, "(0, 1]")
        if kwargs.get("encode_covariates"):
            raise ValueError("encode_covariates=True is not possible: cells are encoded without their batch.")
        if kwargs.get("latent_distribution", "normal") != "normal":
            raise ValueError("latent_distribution must be 'normal': populations are moved in the space of its means.")
        if not kwargs.get("use_observed_lib_size", True) or kwargs.get("use_size_factor_key"):
            raise ValueError(
                "use_observed_lib_size=False and use_size_factor_key=True are not possible: counts are decoded with "
                "library sizes of the control cells."
            )
        super().__init__(*args, **kwargs)
        self.encoded_share = float(encoded_share)
        if self.dispersion == "gene":
            torch.nn.init.constant_(self.px_r, 1.0)
        # a negative binomial has no zero inflation: half of the decoder's outputs that nobody would read
        self.decoder.px_dropout_decoder = torch.nn.Identity()
        # what the chosen law of counts never reads: several processes would wait for its gradients
        unread = [self.l_encoder, *([self.decoder.px_r_decoder] if self.dispersion != "gene-cell" else [])]
        for part in unread:
            part.requires_grad_(False)

    @property
    def device(self) -> torch.device:
        """Where the VAE is, by one of its tensors: scvi-tools asks them all at every call."""
        return next(self.parameters()).device

    def forward(self, tensors: dict[str, Tensor], *args: Any, **kwargs: Any) -> Any:
        """As in scvi-tools, with counts divided between encoder and decoder."""
        if self.encoded_share < 1:
            counts = tensors[REGISTRY_KEYS.X_KEY]
            seen = thin(counts, self.encoded_share)
            tensors = {**tensors, REGISTRY_KEYS.X_KEY: counts - seen, ENCODED: seen / self.encoded_share}
        return super().forward(tensors, *args, **kwargs)

    def _get_inference_input(self, tensors: dict[str, Tensor], *args: Any, **kwargs: Any) -> dict[str, Any]:
        if ENCODED in tensors:
            tensors = {**tensors, REGISTRY_KEYS.X_KEY: tensors[ENCODED]}
        inputs: dict[str, Any] = super()._get_inference_input(tensors, *args, **kwargs)
        return inputs

    def _get_generative_input(self, tensors: dict[str, Tensor], *args: Any, **kwargs: Any) -> dict[str, Any]:
        """The library size is that of the counts to predict."""
        inputs: dict[str, Any] = super()._get_generative_input(tensors, *args, **kwargs)
        if ENCODED in tensors:  # of few molecules, none may be left
            inputs["library"] = tensors[REGISTRY_KEYS.X_KEY].sum(1, keepdim=True).clamp(min=1).log()
        return inputs

    def loss(
        self,
        tensors: dict[str, Tensor],
        inference_outputs: dict[str, Any],
        generative_outputs: dict[str, Any],
        kl_weight: Tensor | float = 1.0,
    ) -> LossOutput:
        """Negative evidence lower bound, as scvi-tools computes it for a negative binomial.

        The likelihood of part of a cell's counts is taken as many times as makes it that of all.
        """
        px = generative_outputs["px"]
        reconstruction = -negative_binomial_log_prob(tensors[REGISTRY_KEYS.X_KEY], px.mu, px.theta)
        if ENCODED in tensors:
            reconstruction = reconstruction / (1 - self.encoded_share)
        kl = kl_divergence(inference_outputs["qz"], generative_outputs["pz"]).sum(-1)
        return LossOutput(
            loss=torch.mean(reconstruction + kl_weight * kl),
            reconstruction_loss=reconstruction,
            kl_local={"kl_divergence_z": kl},
        )

    @torch.no_grad()
    def encode(self, counts: Tensor) -> Tensor:
        """Posterior means `(n_cells, n_latent)` of counts `(n_cells, n_genes)`."""
        # not `inference`: it draws a latent vector as well, from the generator that all threads share
        mean: Tensor = self.z_encoder.mean_encoder(
            self.z_encoder.encoder(counts.log1p() if self.log_variational else counts)
        )
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

    def decode_frequencies(self, latent: Tensor, batch: Tensor) -> Tensor:
        """Expected share of each gene in a cell's counts `(n_cells, n_genes)`; differentiable."""
        library = torch.zeros(len(latent), 1, device=latent.device)
        outputs = self.generative(z=latent, library=library, batch_index=batch[:, None].long())
        scale: Tensor = outputs["px"].scale
        return scale
