"""Counts of control cells that respond."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from scperturbdiff.counts._move import move_counts, scale_response

if TYPE_CHECKING:
    import torch
    from torch import Tensor

MIN_RATIO = 0.05
"""Smallest ratio of library sizes of a cell that responds strongly."""


@dataclass(frozen=True)
class Decoded:
    """What the decoder expects of the counts of cells.

    Attributes
    ----------
    share
        Share of each gene, `(n_cells, n_genes)`.
    dispersion
        Of the negative binomial, `(n_genes,)` or `(n_cells, n_genes)`.
    """

    share: Tensor
    dispersion: Tensor

    def take(self, rows: Tensor) -> Decoded:
        """The same of some of the cells."""
        return Decoded(self.share[rows], self.dispersion if self.dispersion.ndim == 1 else self.dispersion[rows])


def respond(
    counts: Tensor,
    before: Tensor,
    after: Decoded,
    library_ratio: float = 1.0,
    repeated: Tensor | None = None,
    rng: torch.Generator | None = None,
    uneven: tuple[Tensor, Decoded] | None = None,
) -> Tensor:
    r"""Sample counts `(n_cells, n_genes)` of cells as if the control cells they started from had moved.

    The mean of gene `g` is :math:`\ell h_g(z)`, :math:`\ell` the cell's library size. What a control cell shows, given
    its counts, of what the decoder cannot know is kept (:func:`move_counts`): where the VAE is right, counts have its
    negative binomial law; where it is not, generated cells keep what it cannot reconstruct of real ones.

    Parameters
    ----------
    counts
        Counts of the control cells, `(n_cells, n_genes)`.
    before
        Their expected shares, `(n_cells, n_genes)`.
    after
        What is decoded where they go.
    library_ratio
        Expected library sizes relative to those of the control cells.
    repeated
        Cells whose control cell another one has already started from, `(n_cells,)`.
    rng
        What is drawn from; `None`: torch's global generator.
    uneven
        How strongly each cell responds, relative to what `after` says, `(n_cells,)`, and what is decoded of cells that
        have moved so many times as far. `None`: as `after` says.
    """
    library = counts.sum(-1, keepdim=True)
    start, moved = library * before, library_ratio * library * after.share
    if uneven is not None:
        factor, further = uneven[0][:, None], uneven[1]
        ratio = (1 + factor * (library_ratio - 1)).clamp(min=MIN_RATIO)
        moved = scale_response(start, moved, ratio * library * further.share, factor)
    return move_counts(counts, start, moved, after.dispersion.expand_as(start), repeated, rng)
