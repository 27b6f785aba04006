"""Where the cells of a population go, decoded, and the counts they get."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from scperturbdiff.counts import Decoded, respond
from scperturbdiff.prediction._encoded import may_be_kept

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor

    from scperturbdiff.module import PerturbDiffModule
    from scperturbdiff.prediction._pieces import ControlGroup


class Destinations:
    """Decodes the cells of one population, and draws their counts.

    Parameters
    ----------
    module
        The trained module.
    group
        Controls that cells start from.
    batch
        Batch code to decode with.
    residual
        Log ratio of expected counts to decoded ones, `(n_genes,)`.
    together
        Cells that start from the same control go to the same place: each is decoded once, if there is room.
    """

    def __init__(
        self, module: PerturbDiffModule, group: ControlGroup, batch: int, residual: Tensor | None, together: bool
    ) -> None:
        self.module, self.group, self.batch, self.residual = module, group, batch, residual
        self._together = together and may_be_kept(*group.counts.shape)
        self._done, self._kept = np.zeros(len(group.rows), bool), Decoded(torch.empty(0), torch.empty(0))

    def respond(
        self,
        controls: NDArray[np.intp],
        latent: Tensor,
        library_ratio: float,
        repeated: Tensor,
        rng: torch.Generator,
        strength: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Latent vectors, not standardised, and counts of cells `(n,)` that start from these controls.

        Parameters
        ----------
        controls
            Positions in the group, `(n,)`.
        latent
            Where cells go, not standardised, `(n, n_latent)`.
        library_ratio, repeated, rng
            See :func:`~scperturbdiff.counts.respond`.
        strength
            How strongly each cell responds, relative to what `latent` says, `(n,)`; `None`: as it says.
        """
        after, uneven = self.decode(controls, latent), None
        if strength is not None:
            start = self.module.unstandardize(self.group.latent[self._put(controls)])
            latent = start + strength[:, None] * (latent - start)
            uneven = strength, self._decode(latent)
        counts = torch.as_tensor(self.group.counts[controls].toarray(), device=latent.device)
        return latent, respond(counts, self._before(controls), after, library_ratio, repeated, rng, uneven)

    def decode(self, controls: NDArray[np.intp], latent: Tensor) -> Decoded:
        """What is decoded of cells that start from these controls."""
        if not self._together:
            return self._decode(latent)
        rows, first = np.unique(controls, return_index=True)
        if not self._done[rows].all():
            missing = ~self._done[rows]
            self._keep(rows[missing], self._decode(latent[self._put(first[missing])]))
        return self._kept.take(self._put(controls))

    def _keep(self, controls: NDArray[np.intp], decoded: Decoded) -> None:
        if not self._done.any():
            n, share, dispersion = len(self._done), decoded.share, decoded.dispersion
            each = dispersion if dispersion.ndim == 1 else dispersion.new_empty(n, dispersion.shape[1])
            self._kept = Decoded(share.new_empty(n, share.shape[1]), each)
        at = self._put(controls)
        self._kept.share[at], self._done[controls] = decoded.share, True
        if decoded.dispersion.ndim > 1:
            self._kept.dispersion[at] = decoded.dispersion

    def _decode(self, latent: Tensor) -> Decoded:
        return self.module.decode(latent, self._codes(len(latent), self.batch), self.residual)

    def _before(self, controls: NDArray[np.intp]) -> Tensor:
        """Expected shares of genes in the counts of controls; of an unknown batch, as of the population's."""
        at, group = self._put(controls), self.group
        if group.shares is not None:
            return group.shares[at]
        batch = self.batch if group.batch < 0 else group.batch
        return self.module.shares(group.latent[at], self._codes(len(at), batch))

    def _codes(self, n: int, batch: int) -> Tensor:
        return torch.full((n,), batch, device=self.group.latent.device)

    def _put(self, positions: NDArray[np.intp]) -> Tensor:
        return torch.as_tensor(positions, device=self.group.latent.device)
