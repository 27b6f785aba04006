"""Fold changes of the mean expression of populations, beside what the decoder says of their cells."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

PER_CELL = 1e4
"""Counts per cell to which mean expression is normalised before 1 is added and fold changes are taken."""
LEAST = 1e-4
"""Mean count below which a gene is as good as absent."""


def fold_changed(before: Tensor, fold: Tensor) -> Tensor:
    """Mean shares of genes `(..., n_genes)` after log fold changes `fold` of ``PER_CELL * before + 1``."""
    after = ((PER_CELL * before + 1) * fold.exp() - 1).clamp(min=0)
    return after / after.sum(-1, keepdim=True).clamp(min=LEAST)


@dataclass(frozen=True)
class MovedMeans:
    """Mean counts of genes in a population of cells whose means move, `(n_genes,)` each; `after` may be of several.

    Attributes
    ----------
    start
        Of the control cells, as measured.
    before, after
        As decoded, of the control cells and of where they go.
    gain
        By how much more or less than decoded counts rise, given what the control cells show.
    """

    start: Tensor
    before: Tensor
    after: Tensor
    gain: Tensor

    @classmethod
    def of(cls, counts: Tensor, before: Tensor, after: Tensor, dispersion: Tensor) -> MovedMeans:
        """Means over cells of what :func:`move_counts` is given, all `(n_cells, n_genes)`."""
        gain = ((dispersion + counts) / (dispersion + before)).mean(0)
        return cls(counts.mean(0), before.mean(0), after.mean(0), gain)

    def moved(self) -> Tensor:
        """Mean counts to expect of :func:`move_counts`, `(n_genes,)`."""
        falls = self.start * self.after / self.before.clamp(min=LEAST)
        return torch.where(self.after < self.before, falls, self.start + (self.after - self.before) * self.gain)

    def fold(self, factor: Tensor) -> Tensor:
        """Log fold changes of ``PER_CELL`` times expected shares, plus 1, after log factors on decoded means."""
        of_both = self.start, self._after(factor)
        before, after = (PER_CELL * x / x.sum(-1, keepdim=True).clamp(min=LEAST) for x in of_both)
        return ((after + 1) / (before + 1)).log()

    def off_by(self, factor: Tensor, error: Tensor) -> Tensor:
        """Log factors after which log fold changes are those after `factor`, plus `error`, all `(n_genes,)`."""
        now = self._after(factor)
        return self.factor(self.start.sum() * fold_changed(now / now.sum().clamp(min=LEAST), error))

    def _after(self, factor: Tensor) -> Tensor:
        return replace(self, after=self.after * factor.exp()).moved()

    def factor(self, wanted: Tensor) -> Tensor:
        """Log factors on decoded means after which mean counts are as `wanted`, `(n_genes,)`; 0 without counts."""
        falls = self.before * wanted / self.start.clamp(min=LEAST)
        after = torch.where(wanted < self.start, falls, self.before + (wanted - self.start) / self.gain)
        after = torch.where(torch.maximum(self.start, wanted) < LEAST, self.after, after)
        return ((after + LEAST) / (self.after + LEAST)).log()

    def at_least(self, factor: Tensor, genes: Tensor, fold: float) -> Tensor:
        """Log factors after which the mean counts of `genes` have changed by the log fold change `fold`, or further.

        Parameters
        ----------
        factor
            Log factors on decoded means so far, `(n_genes,)`; those of other genes stay.
        genes
            Columns, `(n,)`.
        fold
            Log fold change of mean counts, negative or positive.
        """
        now, wanted = self._after(factor), self.start * math.exp(fold)
        wanted = torch.minimum(now, wanted) if fold < 0 else torch.maximum(now, wanted)
        return factor.index_copy(0, genes, self.factor(wanted)[genes])

    def towards_fold(self, fold: Tensor, weight: float) -> Tensor:
        """Log factors that take mean counts towards what retrieved fold changes say, as far as `weight`."""
        total = self.start.sum()
        folded = total * fold_changed(self.start / total.clamp(min=LEAST), fold)
        mean = (self.moved() + LEAST) ** (1 - weight) * (folded + LEAST) ** weight - LEAST
        return self.factor(mean.clamp(min=0))
