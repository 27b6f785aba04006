"""Control groups, encoded once for all that is asked of them."""

from __future__ import annotations

from functools import cache, partial
from typing import TYPE_CHECKING

import numpy as np
import torch

from scperturbdiff.data import read_genes
from scperturbdiff.prediction._encode import encode_rows
from scperturbdiff.prediction._pieces import ControlGroup
from scperturbdiff.seeds import derive_seed

if TYPE_CHECKING:
    import pandas as pd
    from anndata import AnnData
    from scipy import sparse
    from torch import Tensor

    from scperturbdiff.module import ControlSample, PerturbDiffModule
    from scperturbdiff.prediction._pieces import Settings
    from scperturbdiff.prediction._request import ControlGroups

KEPT_ENTRIES = 2**28
"""Counts of control cells that are kept to be used again, at most: 2 GB."""
KEPT_SHARES = 2**24
"""Expected shares of genes in the control cells of a group, or where these go, that are kept, at most: 64 MB."""


def may_be_kept(n_cells: int, n_genes: int) -> bool:
    """Whether there is room for expected shares of so many cells and genes."""
    return n_cells * n_genes <= KEPT_SHARES


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
        if batch >= 0 and may_be_kept(len(rows), len(self.genes)):
            shares = module.shares(latent, torch.full((len(rows),), batch, device=latent.device))
        sample = cache(partial(self._sample, latent, counts))
        mean = latent.double().mean(0).cpu().numpy()
        return ControlGroup(rows, latent, mean, counts, batch, encoded, states, sample, shares)

    def _sample(self, latent: Tensor, counts: sparse.csr_matrix) -> ControlSample:
        """Some cells of a control group, evenly spaced, with their mean expression."""
        at = np.linspace(0, len(latent) - 1, min(len(latent), self.settings.shown_controls)).astype(np.int64)
        some = latent[torch.as_tensor(at, device=latent.device)]
        dense = torch.as_tensor(counts[at].toarray(), dtype=torch.float32, device=latent.device)
        return self.module.control_sample(dense, some)
