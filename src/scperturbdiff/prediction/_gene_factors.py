"""Log factors on decoded counts of a population: what the decoder misses, fold changes, and how far off they are."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from scperturbdiff.seeds import derive_seed

if TYPE_CHECKING:
    from torch import Tensor

    from scperturbdiff.counts import MovedMeans
    from scperturbdiff.retrieval import FoldEvidence


@dataclass(frozen=True)
class GeneFactors:
    """Log factors of the genes of a population.

    Attributes
    ----------
    residual
        Of what the decoder misses, `(n_genes,)`.
    further
        On top of it: towards fold changes, and of the target's own gene, `(n_genes,)`.
    means
        Mean counts of some of its cells, moved and with the residual; `None` where nothing else asks for them.
    evidence
        How far fold changes may be off; `None` where draws do not differ in it.
    """

    residual: Tensor
    further: Tensor
    means: MovedMeans | None = None
    evidence: FoldEvidence | None = None

    @property
    def expected(self) -> Tensor:
        """The best single guess, `(n_genes,)`."""
        return self.residual + self.further

    def draw(self, seed: int) -> Tensor:
        """Those of a draw, which is off as populations were that were left out, `(n_genes,)`."""
        if self.means is None or self.evidence is None:
            return self.expected
        rng = np.random.default_rng(derive_seed(seed, "genes"))
        error = self.evidence.errors(self.means.fold(self.further).cpu().numpy(), rng)
        off = torch.as_tensor(error, dtype=self.further.dtype, device=self.further.device)
        return self.residual + self.means.off_by(self.further, off)
