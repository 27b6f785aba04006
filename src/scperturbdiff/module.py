"""The module: what a saved model holds, that is VAE, scale of its latent space, retrieval, generator."""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from scvi.module.base import BaseModuleClass, LossOutput
from torch import Tensor

from scperturbdiff.counts import EPS, Decoded, MovedMeans, scale_response
from scperturbdiff.diffusion import Generator
from scperturbdiff.latent import LatentVAE
from scperturbdiff.retrieval import Retrieval, RetrievalSettings, StateRetrieval

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from numpy.typing import NDArray


@dataclass(frozen=True)
class ControlSample:
    """Some control cells: their mean expression, and what moves it.

    Attributes
    ----------
    latent
        Standardised latent vectors, `(n, n_latent)`.
    library
        Their counts in total, `(n, 1)`.
    unmoved
        Mean counts where they stay, as of the first batch.
    """

    latent: Tensor
    library: Tensor
    unmoved: MovedMeans


class PerturbDiffModule(BaseModuleClass):
    """Everything a saved model needs to generate cells.

    The first stage trains :attr:`vae` itself. The second fits :attr:`retrieval` and trains :attr:`generator`, whose
    moving average :attr:`generator_ema` is what predicts. The forward pass that scvi-tools asks of every module is the
    VAE's.

    Parameters
    ----------
    n_genes, n_batches
        Genes, and batches that the decoder tells apart.
    n_latent, n_hidden, n_vae_layers, vae_dropout
        Size of the VAE.
    n_names
        Components seen in training.
    features
        Feature table of components, `(n_components, n_features)`, NaN rows where unknown.
    n_categories, n_numbers
        Categories of each categorical covariate; number of continuous ones.
    retrieval_kwargs
        Fields of :class:`~scperturbdiff.retrieval.RetrievalSettings`.
    generator_kwargs
        Passed to :class:`~scperturbdiff.diffusion.Generator`.
    """

    def __init__(
        self,
        n_genes: int,
        n_batches: int,
        n_latent: int,
        n_names: int,
        features: NDArray[np.floating] | None = None,
        n_categories: Sequence[int] = (),
        n_numbers: int = 0,
        *,
        n_hidden: int = 256,
        n_vae_layers: int = 1,
        vae_dropout: float = 0.1,
        vae_kwargs: Mapping[str, Any] | None = None,
        retrieval_kwargs: Mapping[str, Any] | None = None,
        generator_kwargs: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self._make_vae = partial(
            LatentVAE,
            n_genes,
            n_batch=n_batches,
            n_latent=n_latent,
            n_hidden=n_hidden,
            n_layers=n_vae_layers,
            dropout_rate=vae_dropout,
            gene_likelihood="nb",
            # the running statistics of batch normalisation lag behind in short runs: decoded controls were off
            **{"use_batch_norm": "none", "use_layer_norm": "both", **(vae_kwargs or {})},
        )
        self.vae = self._make_vae()
        self.generator = Generator(
            n_latent,
            n_names,
            0 if features is None else features.shape[1],
            n_categories,
            n_numbers,
            **(generator_kwargs or {}),
        )
        self.generator_ema = copy.deepcopy(self.generator).requires_grad_(False)
        self.retrieval: Retrieval | None = None
        self.by_state: StateRetrieval | None = None
        self.retrieval_settings = RetrievalSettings(**(retrieval_kwargs or {}))
        self.register_buffer("latent_mean", torch.zeros(n_latent))
        self.register_buffer("latent_scale", torch.ones(n_latent))
        self.register_buffer("feature_scale", torch.ones(()))
        if features is not None:
            given = torch.as_tensor(features, device="cpu")  # also where the module is made without memory, for loading
            known = given.isfinite().all(dim=1)
            self.feature_scale.copy_(given[known].square().mean().sqrt().clamp_min(1e-8))
        table, has = self.scale_features(features)
        self.register_buffer("features", table)
        self.register_buffer("has_features", has)

    latent_mean: Tensor
    latent_scale: Tensor
    feature_scale: Tensor
    features: Tensor | None
    has_features: Tensor | None

    @property
    def device(self) -> torch.device:
        """Where the module is, by one of its tensors: scvi-tools asks them all, each time."""
        return self.latent_mean.device

    def set_latent_scale(self, latent: Tensor) -> None:
        """Standardise each latent dimension by the mean and deviation of the training cells `(n_cells, n_latent)`."""
        self.latent_mean.copy_(latent.mean(0))
        self.latent_scale.copy_(latent.std(0).clamp_min(1e-4))

    def standardize(self, latent: Tensor) -> Tensor:
        """From the VAE's latent space to the generator's."""
        return (latent - self.latent_mean) / self.latent_scale

    def with_new_vae(self) -> PerturbDiffModule:
        """A module that differs in its VAE, which has learned nothing, and has no retrieval; the rest is shared."""
        other = copy.copy(self)
        other._modules, other._buffers = dict(self._modules), dict(self._buffers)
        other.latent_mean, other.latent_scale = torch.zeros_like(self.latent_mean), torch.ones_like(self.latent_scale)
        other.vae = self._make_vae().to(self.device)
        other.retrieval = other.by_state = None
        return other

    def get_extra_state(self) -> dict[str, Any]:
        """What is saved beside weights: the state of retrieval."""
        parts = {"retrieval": self.retrieval, "by_state": self.by_state}
        return {name: part.state() for name, part in parts.items() if part is not None}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Restore what :meth:`get_extra_state` gave."""
        n_latent, n_genes = len(self.latent_mean), self.vae.n_input
        found = state.get("retrieval"), state.get("by_state")
        self.retrieval = None if found[0] is None else Retrieval.from_state(found[0], n_latent, n_genes)
        self.by_state = None if found[1] is None else StateRetrieval.from_state(found[1], n_latent)

    @torch.no_grad()
    def encode(self, blocks: Iterable[Any]) -> Tensor:
        """Latent vectors `(n_cells, n_latent)`, not standardised, of blocks of counts, dense or sparse."""
        return torch.cat([self.vae.encode(dense(block, self.device)) for block in blocks])

    @torch.no_grad()
    def shares(self, latent: Tensor, batch: Tensor) -> Tensor:
        """Expected share of each gene in a cell's counts `(n, n_genes)`, of standardised latent vectors."""
        return self.vae.decode_frequencies(self.unstandardize(latent), batch)

    @torch.no_grad()
    def control_sample(self, counts: Tensor, latent: Tensor) -> ControlSample:
        """Control cells, their counts `(n_cells, n_genes)` and standardised latent vectors `(n_cells, n_latent)`."""
        batch, library = torch.zeros(len(latent), dtype=torch.long, device=latent.device), counts.sum(-1, keepdim=True)
        decoded = self.decode(self.unstandardize(latent), batch)
        before = library * decoded.share
        return ControlSample(latent, library, MovedMeans.of(counts, before, before, decoded.dispersion))

    @torch.no_grad()
    def moved_means(self, sample: ControlSample, moved: Tensor, residual: Tensor) -> MovedMeans:
        """Mean counts of control cells that move, as of the first batch.

        Parameters
        ----------
        sample
            The cells.
        moved
            Where they go in the latent space, standardised, `(..., n_cells, n_latent)`.
        residual
            Log ratio of expected counts to decoded ones, `(n_genes,)`.
        """
        flat = self.unstandardize(moved).flatten(0, -2)
        batch = torch.zeros(len(flat), dtype=torch.long, device=moved.device)
        share = self.decode(flat, batch, residual).share.unflatten(0, moved.shape[:-1])
        return replace(sample.unmoved, after=(sample.library.clamp(min=1) * share).mean(-2))

    @torch.no_grad()
    def decode(self, latent: Tensor, batch: Tensor, residual: Tensor | None = None) -> Decoded:
        """What to expect of the counts of cells.

        Parameters
        ----------
        latent
            Latent vectors, `(n_cells, n_latent)`, not standardised.
        batch
            Batch codes to decode with, `(n_cells,)`.
        residual
            Log ratio of expected counts to decoded ones, `(n_genes,)`; cells keep their expected library size.
        """
        none = torch.zeros(len(latent), 1, device=latent.device)
        px = self.vae.generative(z=latent, library=none, batch_index=batch[:, None].long())["px"]
        if residual is None:
            return Decoded(px.scale, px.theta)
        share = px.scale * residual.exp()
        return Decoded(share.div_(share.sum(-1, keepdim=True).clamp(min=EPS)), px.theta)

    @torch.no_grad()
    def expression(self, latent: Tensor, target_sum: float = 1e4) -> Tensor:
        """Expected log-normalised expression `(..., n_genes)` of standardised latent vectors, as of the first batch."""
        flat = self.unstandardize(latent.flatten(0, -2).to(self.device))
        batch = torch.zeros(len(flat), dtype=torch.long, device=flat.device)
        decoded: Tensor = (target_sum * self.vae.decode_frequencies(flat, batch)).log1p()
        return decoded.unflatten(0, latent.shape[:-1])

    @torch.no_grad()
    def uneven_expression(self, start: Tensor, moved: Tensor, factor: Tensor, target_sum: float = 1e4) -> Tensor:
        """:meth:`expression` of cells `(n_cells, n_latent)` that respond `factor` `(n_cells,)` times as strongly."""
        start, moved, factor = (x.to(self.device) for x in (start, moved, factor[:, None]))
        batch = torch.zeros(len(start), dtype=torch.long, device=start.device)
        before, after, further = (self.shares(z, batch) for z in (start, moved, start + factor * (moved - start)))
        rates = scale_response(before, after, further, factor)
        return (target_sum * rates / rates.sum(-1, keepdim=True)).log1p()

    def unstandardize(self, latent: Tensor) -> Tensor:
        """From the generator's latent space to the VAE's."""
        return latent * self.latent_scale + self.latent_mean

    def scale_features(self, features: NDArray[np.floating] | None) -> tuple[Tensor | None, Tensor | None]:
        """Feature table at the scale the network was trained with, zeros in unknown rows; and which rows are known."""
        if features is None:
            return None, None
        table = torch.as_tensor(features, dtype=torch.float32, device=self.feature_scale.device)
        known = table.isfinite().all(dim=1)
        return torch.where(known[:, None], table, torch.zeros_like(table)) / self.feature_scale, known

    @torch.no_grad()
    def update_ema(self, decay: float) -> None:
        """Move the averaged generator towards the trained one."""
        averaged: list[Tensor] = list(self.generator_ema.parameters())
        trained: list[Tensor] = list(self.generator.parameters())
        torch._foreach_lerp_(averaged, trained, 1 - decay)

    # ---- what scvi-tools asks of every module: the forward pass of the VAE ----------------------------------------

    def _get_inference_input(self, tensors: dict[str, Tensor], **kwargs: Any) -> dict[str, Any]:
        return self.vae._get_inference_input(tensors, **kwargs)

    def _get_generative_input(
        self, tensors: dict[str, Tensor], inference_outputs: dict[str, Any], **kwargs: Any
    ) -> dict[str, Any]:
        return self.vae._get_generative_input(tensors, inference_outputs, **kwargs)

    def inference(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Encode; see :class:`scvi.module.VAE`."""
        return self.vae.inference(*args, **kwargs)

    def generative(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Decode; see :class:`scvi.module.VAE`."""
        return self.vae.generative(*args, **kwargs)

    def loss(self, *args: Any, **kwargs: Any) -> LossOutput:
        """Evidence lower bound of the first stage."""
        return self.vae.loss(*args, **kwargs)

    def sample(self, *args: Any, **kwargs: Any) -> Tensor:
        """Posterior predictive counts of the first stage; populations come from :meth:`PerturbDiff.predict`."""
        return self.vae.sample(*args, **kwargs)


def dense(block: Any, device: torch.device) -> Tensor:
    """Counts `(n_cells, n_genes)`, dense or sparse, as a tensor."""
    values = block.toarray() if hasattr(block, "toarray") else np.asarray(block)
    return torch.as_tensor(values, dtype=torch.float32, device=device)
