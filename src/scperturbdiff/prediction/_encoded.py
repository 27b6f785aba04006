"""Control groups, encoded once for all that is asked of them; and where their cells go, decoded once."""

from __future__ import annotations

from functools import cache, partial
from typing import TYPE_CHECKING

import numpy as np
import torch

from scperturbdiff.counts import Decoded
from scperturbdiff.data import read_genes
from scperturbdiff.prediction._encode import encode_rows
from scperturbdiff.prediction._pieces import ControlGroup, ControlSample
from scperturbdiff.seeds import derive_seed

if TYPE_CHECKING:
    import pandas as pd
    from anndata import AnnData
    from numpy.typing import NDArray
    from scipy import sparse
    from torch import Tensor

    from scperturbdiff.module import PerturbDiffModule
    from scperturbdiff.prediction._pieces import Settings
    from scperturbdiff.prediction._request import ControlGroups

KEPT_ENTRIES = 2**28
"""Counts of control cells that are kept to be used again, at most: 2 GB."""
KEPT_SHARES = 2**24
"""Expected shares of genes in the control cells of a group that are kept, at most: 64 MB."""


class EncodedGroups:
    """The control groups of an AnnData, encoded when they are first asked for and kept while there is room.

    Parameters
    ----------
    module
        The trained module.
    adata, genes, layer
        Where control counts are.
    batches
        Batch names the decoder knows, in order of their codes.
    batch_key
        Column of `groups` that names the batch of the controls; `None` without batches.
    groups
        Control groups of `adata`.
    settings
        How to draw.
    """

    def __init__(
        self,
        module: PerturbDiffModule,
        adata: AnnData,
        genes: pd.Index,
        layer: str | None,
        batches: list[str],
        batch_key: str | None,
        groups: ControlGroups,
        settings: Settings,
    ) -> None:
        self.module, self.adata, self.genes, self.layer = module, adata, genes, layer
        self.batches, self.batch_key, self.groups, self.settings = batches, batch_key, groups, settings
        self._kept: dict[int, ControlGroup] = {}

    def __getitem__(self, group: int) -> ControlGroup:
        if group not in self._kept:
            while sum(other.entries for other in self._kept.values()) > KEPT_ENTRIES:
                del self._kept[next(iter(self._kept))]
            self._kept[group] = self._encode(group)
        return self._kept[group]

    def _encode(self, group: int) -> ControlGroup:
        module, rows = self.module, self.groups.cells[group]
        counts = read_genes(self.adata, self.genes, self.layer, rows, counts=True)
        latent = module.standardize(encode_rows(module, counts))
        own = self.groups.labels.iloc[group].get(self.batch_key) if self.batch_key else self.batches[0]
        batch = self.batches.index(str(own)) if str(own) in self.batches else -1
        shown = latent
        if len(rows) > self.settings.shown_controls:
            names = self.groups.labels.iloc[group].astype(str)
            order = np.random.default_rng(derive_seed(self.settings.seed, "controls", *names)).permutation(len(rows))
            shown = latent[torch.as_tensor(order[: self.settings.shown_controls], device=latent.device)]
        encoded, states = module.generator_ema.encode_controls(shown[None]), None
        if module.by_state is not None:
            states = module.by_state.states.shares(latent.cpu().numpy()).argmax(1)
        shares = None
        if batch >= 0 and len(rows) * len(self.genes) <= KEPT_SHARES:
            shares = module.shares(latent, torch.full((len(rows),), batch, device=latent.device))
        sample = cache(partial(self._sample, latent, counts))
        variance, mean = (x.cpu().numpy() for x in torch.var_mean(latent.double(), 0, correction=0))
        noise = float(variance.mean()) / len(rows)
        return ControlGroup(rows, latent, mean, noise, counts, batch, encoded, states, sample, shares)

    def _sample(self, latent: Tensor, counts: sparse.csr_matrix) -> ControlSample:
        """Some cells of a control group, evenly spaced, with their mean expression."""
        at = np.linspace(0, len(latent) - 1, min(len(latent), self.settings.shown_controls)).astype(np.int64)
        some = latent[torch.as_tensor(at, device=latent.device)]
        dense = torch.as_tensor(counts[at].toarray(), dtype=torch.float32, device=latent.device)
        return ControlSample(some, dense.sum(-1, keepdim=True), self.module.unmoved_means(dense, some))


class Destinations:
    """What is decoded where the cells of a population go.

    Parameters
    ----------
    module
        The trained module.
    batch
        Batch code to decode with.
    residual
        Log ratio of expected counts to decoded ones, `(n_genes,)`.
    n_controls
        Control cells that cells start from, where all that start from one go to the same place: each is decoded once.
        `None`: every cell is decoded.
    """

    def __init__(self, module: PerturbDiffModule, batch: int, residual: Tensor | None, n_controls: int | None) -> None:
        self.module, self.batch, self.residual = module, batch, residual
        self._done: NDArray[np.bool_] | None = None
        if n_controls is not None and n_controls * module.vae.n_input <= KEPT_SHARES:
            self._done = np.zeros(n_controls, bool)
            self._share = torch.empty(n_controls, module.vae.n_input, device=module.device)
            self._dispersion = torch.empty(0)

    def decode(self, latent: Tensor) -> Decoded:
        """What is decoded of latent vectors, `(n_cells, n_latent)`, not standardised."""
        codes = torch.full((len(latent),), self.batch, device=latent.device)
        return self.module.decode(latent, codes, self.residual)

    def of_controls(self, controls: NDArray[np.intp], latent: Tensor) -> Decoded:
        """The same of cells that start from these control cells, `(n_cells,)`."""
        if self._done is None:
            return self.decode(latent)
        rows, first = np.unique(controls, return_index=True)
        at, missing = torch.as_tensor(controls, device=latent.device), ~self._done[rows]
        if missing.any():
            new = torch.as_tensor(rows[missing], device=latent.device)
            decoded = self.decode(latent[torch.as_tensor(first[missing], device=latent.device)])
            self._share[new], self._done[rows] = decoded.share, True
            if decoded.dispersion.ndim == 1:
                self._dispersion = decoded.dispersion
            else:
                if not len(self._dispersion):
                    self._dispersion = torch.empty_like(self._share)
                self._dispersion[new] = decoded.dispersion
        return Decoded(self._share[at], self._dispersion if self._dispersion.ndim == 1 else self._dispersion[at])
