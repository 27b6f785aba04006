"""What generation works on and gives: encoded control groups, how to draw, pieces of populations."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, get_args

from scperturbdiff.arguments import check_choice, check_int, check_number
from scperturbdiff.diffusion import Sampler
from scperturbdiff.seeds import check_seed

if TYPE_CHECKING:
    from collections.abc import Callable

    import numpy as np
    from numpy.typing import NDArray
    from scipy import sparse
    from torch import Tensor

    from scperturbdiff.diffusion import EncodedControls
    from scperturbdiff.module import ControlSample


@dataclass(frozen=True)
class ControlGroup:
    """A control group, encoded once for all that is asked of it.

    Attributes
    ----------
    rows
        Rows in the AnnData.
    latent
        Standardised latent vectors, `(n, n_latent)`.
    mean
        Their mean, `(n_latent,)`.
    counts
        Their counts, `(n, n_genes)`.
    batch
        Code of their batch, -1 for one the decoder does not know.
    controls
        What the network sees of them.
    states
        Their states, `(n,)`; `None` where there is one.
    sample
        Some of them, evenly spaced, found when it is first asked for.
    shares
        Expected share of each gene in their counts, `(n, n_genes)`; `None` where that is too much to keep, or depends
        on the batch of the population.
    """

    rows: NDArray[np.int64]
    latent: Tensor
    mean: NDArray[np.float64]
    counts: sparse.csr_matrix
    batch: int
    controls: EncodedControls
    states: NDArray[np.int64] | None
    sample: Callable[[], ControlSample]
    shares: Tensor | None = None

    @property
    def entries(self) -> int:
        """Numbers that are kept, about."""
        return int(self.counts.nnz) + (0 if self.shares is None else self.shares.numel() // 2)


@dataclass(frozen=True)
class Settings:
    """How populations are drawn; see :meth:`scperturbdiff.PerturbDiff.predict`.

    Attributes
    ----------
    seed, n_steps, sampler, guidance
        Arguments of :meth:`~scperturbdiff.PerturbDiff.predict`.
    n_populations
        Independent draws; `None`: the best single guess.
    piece
        Cells that attend to each other at most; larger populations are drawn in pieces with the same population noise.
    shown_controls
        Control cells shown to the network, at most.
    """

    seed: int
    n_populations: int | None = None
    n_steps: int = 1
    sampler: Sampler = "renoise"
    guidance: float = 1.0
    piece: int = 256
    shown_controls: int = 256

    def __post_init__(self) -> None:
        if self.n_populations is not None:
            object.__setattr__(self, "n_populations", check_int("n_populations", self.n_populations, 1, 10**6))
        object.__setattr__(self, "seed", check_seed(self.seed))
        object.__setattr__(self, "n_steps", check_int("n_steps", self.n_steps, 0, 10**4))
        object.__setattr__(self, "guidance", check_number("guidance", self.guidance))
        check_choice("sampler", self.sampler, get_args(Sampler))


@dataclass(frozen=True)
class Piece:
    """Generated cells of one draw of one population, or of a part of it.

    Attributes
    ----------
    population
        Row of the request.
    draw
        Number of the draw.
    rows
        Row of the control cell that each cell started from, `(n_cells,)`.
    counts
        Sampled counts, `(n_cells, n_genes)`.
    latent
        Latent vectors, not standardised, `(n_cells, n_latent)`.
    state
        State of that control cell, `(n_cells,)`; `None` where there is one.
    """

    population: int
    draw: int
    rows: NDArray[np.int64]
    counts: sparse.csr_matrix
    latent: NDArray[np.float32]
    state: NDArray[np.int64] | None = None
