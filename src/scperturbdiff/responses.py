"""What populations did, measured once: shifts, spreads, library sizes, residuals of genes, the law of replicates."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from scipy import sparse

from scperturbdiff.counts import PER_CELL
from scperturbdiff.data import PopulationTable, add_to_groups, iter_counts, member_weights
from scperturbdiff.retrieval import Conditions, Responses, control_moments, match_states, state_responses

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from numpy.typing import NDArray

    from scperturbdiff.data import Groups
    from scperturbdiff.retrieval import RetrievalSettings, States

    Floats = NDArray[np.float64]

CHUNK = 2048
"""Cells that are decoded at a time."""
ENCODED = 4096
"""Cells that are read and encoded at a time."""
SOME = 2**16
"""Cells of which latent vectors are taken at a time."""


@dataclass(frozen=True)
class ResponseSettings:
    """How responses are measured.

    Attributes
    ----------
    pseudo_cells
        Cells with the controls' spread that are added to each population before spreads are compared.
    prior_counts
        Shape and rate of the gamma prior of the ratio of measured to decoded counts of a gene in a population.
    """

    pseudo_cells: float = 5.0
    prior_counts: float = 5.0


@dataclass(frozen=True)
class MeasuredPopulations:
    """Populations in the latent space, with their responses.

    Attributes
    ----------
    table
        The populations.
    latent
        Standardised latent vectors of all cells, `(n_cells, n_latent)`.
    treated_mean, control_mean
        Means of the treated cells of each population and of the cells of each group of controls.
    responses
        What they did.
    """

    table: PopulationTable
    latent: NDArray[np.float32]
    treated_mean: Floats
    control_mean: Floats
    responses: Responses

    def take(self, rows: NDArray[np.int64]) -> MeasuredPopulations:
        """The populations of `rows`, with all controls."""
        return MeasuredPopulations(
            self.table.take(rows), self.latent, self.treated_mean[rows], self.control_mean, self.responses.take(rows)
        )


class SummedCounts:
    """Counts added up over populations and groups of controls, while they are read for something else.

    Parameters
    ----------
    table
        Populations.
    matrix
        Counts, `(n_cells, n_genes)`, in memory or on disk.
    where
        How messages name the matrix.

    Attributes
    ----------
    library
        Counts of each cell, `(n_cells,)`.
    sums
        Counts of each gene in each group of controls and then in each population, `(n_groups, n_genes)`.
    members
        Which cells these are of, `(n_groups, n_cells)`, by cell.
    size
        Number of cells of each, `(n_groups,)`.
    """

    def __init__(self, table: PopulationTable, matrix: Any, where: str = "adata.X") -> None:
        both = (table.match.groups, table.cells)
        self.matrix, self.where = matrix, where
        self.size = np.concatenate([groups.count for groups in both])
        rows = np.concatenate([groups.rows for groups in both])
        shape = len(self.size), matrix.shape[0]
        members = member_weights(np.repeat(np.arange(shape[0]), self.size), rows, shape)
        self.members = members.astype(np.float32).tocsc()
        self.library, self.sums = np.zeros(shape[1], np.float32), np.zeros((shape[0], matrix.shape[1]), np.float32)
        self._n_read = 0

    def blocks(self) -> Iterator[Any]:
        """The counts in blocks of rows, which are added up."""
        self.library[:], self.sums[:], self._n_read = 0, 0, 0
        for block in iter_counts(self.matrix, chunk=ENCODED, where=self.where):
            counts = sparse.csr_matrix(block, dtype=np.float32)
            rows = np.arange(self._n_read, self._n_read + counts.shape[0])
            self.library[rows] = np.asarray(counts.sum(axis=1)).ravel()
            add_to_groups([self.sums], self.members, rows, [counts])
            yield block
            self._n_read += len(rows)

    def finish(self) -> None:
        """Read the counts, unless :meth:`blocks` was gone through."""
        if self._n_read < len(self.library):
            for _ in self.blocks():
                pass


def measure_populations(
    table: PopulationTable,
    latent: torch.Tensor,
    matrix: Any,
    batch: NDArray[np.integer],
    decode: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    settings: ResponseSettings = ResponseSettings(),
) -> MeasuredPopulations:
    """Measure the responses of populations against their matched controls.

    Parameters
    ----------
    table
        Populations.
    latent
        Standardised latent vectors of all cells, `(n_cells, n_latent)`.
    matrix
        Counts, `(n_cells, n_genes)`, in memory or on disk; or :class:`SummedCounts` of them.
    batch
        Batch codes, `(n_cells,)`.
    decode
        Expected shares of genes `(n, n_genes)` of standardised latent vectors `(n, n_latent)` and batch codes `(n,)`.
    settings
        Constants.
    """
    values = latent.detach().cpu().numpy()
    pools, pool = table.match.groups, table.match.group
    control_mean, treated_mean = group_means(values, pools), group_means(values, table.cells)
    n_controls = pools.count[pool]
    pool_square, square = _squares(values, pools, control_mean), _squares(values, table.cells, treated_mean)
    within = float(pool_square.sum()) / max(int(pools.count.sum()) - len(pools), 1)
    treated_noise, control_noise = (within / np.maximum(n, 1) for n in (table.cells.count, n_controls))
    before = (pool_square / np.maximum(pools.count - 1, 1))[pool]
    before = np.where(before > 0, before, max(within, 1e-12))  # one control cell has no spread of its own
    degrees = np.maximum(table.cells.count - 1, 0)
    after = (square + settings.pseudo_cells * before) / (degrees + settings.pseudo_cells)
    conditions = Conditions(
        control_mean[pool],
        table.component,
        table.dose,
        table.context,
        treated_noise + control_noise,
        control_noise=control_noise,
    )
    counted = matrix if isinstance(matrix, SummedCounts) else SummedCounts(table, matrix)
    of_counts = _count_responses(table, latent, counted, batch, decode, settings.prior_counts)
    shift, spread = treated_mean - control_mean[pool], 0.5 * np.log(after / before)
    return MeasuredPopulations(
        table, values, treated_mean, control_mean, Responses(conditions, shift, spread, *of_counts, within)
    )


def response_of_states(
    populations: MeasuredPopulations,
    states: States,
    retrieval: RetrievalSettings,
    settings: ResponseSettings = ResponseSettings(),
) -> Responses:
    """What each state of cells did in each population: shifts and spreads.

    Parameters
    ----------
    populations
        Measured populations.
    states
        States of cells.
    retrieval
        How treated cells are matched to states.
    settings
        Constants.
    """
    table, latent = populations.table, populations.latent
    groups, cells = table.match.groups, table.cells
    controls = control_moments(states, latent[groups.rows], groups.count).take(table.match.group)
    treated = match_states(states, latent[cells.rows], cells.count, controls, retrieval)
    return state_responses(states, populations.responses.conditions, controls, treated, settings.pseudo_cells)


def group_means(values: NDArray[np.floating], groups: Groups) -> Floats:
    """Mean of the rows `values` `(n_cells, d)` of each group, `(n_groups, d)`."""
    sums = np.zeros((len(groups), values.shape[1]))
    for group, rows in _by_block(groups):
        np.add.at(sums, group, values[rows])
    return sums / np.maximum(groups.count, 1)[:, None]


def _squares(values: NDArray[np.floating], groups: Groups, means: Floats) -> Floats:
    """Sum over cells of the squared deviation from the mean of their group, averaged over dimensions, `(n_groups,)`."""
    sums = np.zeros(len(groups))
    for group, rows in _by_block(groups):
        np.add.at(sums, group, ((values[rows] - means[group]) ** 2).mean(1))
    return sums


def _by_block(groups: Groups, size: int = SOME) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64]]]:
    """Group and row of each cell in turn, so many at a time: all latent vectors at once would be held again."""
    group = np.repeat(np.arange(len(groups)), groups.count)
    for start in range(0, len(group), size):
        yield group[start : start + size], groups.rows[start : start + size]


@torch.no_grad()
def _count_responses(
    table: PopulationTable,
    latent: torch.Tensor,
    counted: SummedCounts,
    batch: NDArray[np.integer],
    decode: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    prior_counts: float,
) -> tuple[Floats, NDArray[np.float16], NDArray[np.float16]]:
    r"""Log ratios to the controls of library sizes `(n,)`, measured to decoded counts and expression `(n, n_genes)`.

    For a gene of which a population has :math:`o` counts where the decoder expects :math:`e`, the ratio is
    :math:`(o + a) / (e + a)`, its mean under a gamma prior with shape and rate :math:`a` (`prior_counts`).
    """
    counted.finish()
    n_pools, measured = len(table.match.groups), counted.sums
    decoded = np.zeros_like(measured)
    used = np.flatnonzero(np.diff(counted.members.indptr))
    for start in range(0, len(used), CHUNK):
        rows = used[start : start + CHUNK]
        at = torch.as_tensor(rows, device=latent.device)
        share = decode(latent[at], torch.as_tensor(batch[rows], device=latent.device)).cpu().numpy()
        add_to_groups([decoded], counted.members, rows, [share * counted.library[rows, None]])
    ratio = np.log((measured + prior_counts) / (decoded + prior_counts))
    library = np.log(np.maximum(measured.sum(1, dtype=np.float64), 1) / np.maximum(counted.size, 1))

    def against_controls(values: NDArray[Any]) -> NDArray[Any]:
        return values[n_pools:] - values[:n_pools][table.match.group]

    fold = np.log1p(PER_CELL * measured / np.maximum(measured.sum(1, keepdims=True), 1))
    return (
        against_controls(library),
        against_controls(ratio).astype(np.float16),
        against_controls(fold).astype(np.float16),
    )


def replicate_factors(populations: MeasuredPopulations, max_factors: int) -> Floats:
    """Directions along which replicates of a condition differ, `(n_latent, n_factors)`, pooled over conditions.

    Each is as long as the standard deviation along it. The outer product of the factors is the covariance of mean
    shifts between replicates of a condition, pooled over conditions, less what the sampling of cells explains.
    Deviations from the mean of a condition are whitened by the covariance of sampling noise. Eigenvalues of their
    covariance beyond the largest that noise has (:func:`largest_noise_eigenvalue`) are factors, and their inflation by
    noise is taken back (Baik & Silverstein 2006). Replicates that differ by chance alone have none.

    Parameters
    ----------
    populations
        Measured populations.
    max_factors
        Number of factors at most; the strongest are kept.
    """
    table, values, shift = populations.table, populations.latent, populations.responses.shift
    n_latent = values.shape[1]
    none = np.zeros((n_latent, 0))
    condition, size = np.unique(table.condition, return_inverse=True, return_counts=True)[1:]
    freedom, noise_freedom = int((size - 1).sum()), int(table.cells.count.sum()) - len(condition)
    if freedom < 2 or noise_freedom <= n_latent:  # too few populations, or cells in them, to tell one from the other
        return none
    pools = table.match.groups
    treated_noise = _within(values, table.cells, populations.treated_mean)
    control_noise = _within(values, pools, populations.control_mean)
    mean = np.zeros((len(size), n_latent))
    np.add.at(mean, condition, shift)
    deviation = shift - (mean / size[:, None])[condition]
    # the noise of controls that replicates share does not set them apart
    low, high = np.full(len(size), len(pools)), np.zeros(len(size), np.int64)
    np.minimum.at(low, condition, table.match.group)
    np.maximum.at(high, condition, table.match.group)
    own = (low < high)[condition]
    weight = 1 - 1 / size[condition]
    noise = (weight / table.cells.count).sum() * treated_noise
    noise = noise + (weight * own / np.maximum(pools.count[table.match.group], 1)).sum() * control_noise
    strength, axes = np.linalg.eigh(noise / freedom)
    if not strength.max() > 0:  # cells that are all alike
        return none
    root = axes * np.sqrt(np.maximum(strength, 1e-9 * strength.max()))
    whitened = deviation @ np.linalg.inv(root).T
    found, directions = np.linalg.eigh(whitened.T @ whitened / freedom)
    keep = np.flatnonzero(found > largest_noise_eigenvalue(n_latent, freedom, noise_freedom))[::-1][:max_factors]
    if not len(keep):
        return none
    spiked = spike(found[keep], n_latent / freedom)
    factors: Floats = (root @ directions[:, keep]) * np.sqrt(np.maximum(spiked - 1, 0))
    return factors


def largest_noise_eigenvalue(n_dimensions: int, freedom: int, noise_freedom: int, quantile: float = 2.02) -> float:
    """99 % quantile of the largest eigenvalue of the covariance of whitened noise.

    Johnstone's (2001) for a known covariance of noise, times how much further the spectrum reaches where that is
    estimated with `noise_freedom > n_dimensions` degrees of freedom (F matrices; Wachter 1980).
    """
    n, p = np.sqrt(freedom), np.sqrt(n_dimensions)
    known = ((n + p) ** 2 + quantile * (n + p) * (1 / n + 1 / p) ** (1 / 3)) / freedom
    a, b = n_dimensions / freedom, n_dimensions / noise_freedom
    further = (1 + np.sqrt(a + b - a * b)) / (1 - b) / (1 + np.sqrt(a))
    return float(known * further**2)


def spike(eigenvalue: Floats, ratio: float) -> Floats:
    """Eigenvalue of the true covariance behind one of the measured covariance (Baik & Silverstein 2006)."""
    shifted = eigenvalue + 1 - ratio
    out: Floats = (shifted + np.sqrt(np.maximum(shifted**2 - 4 * eigenvalue, 0))) / 2
    return out


def _within(values: NDArray[np.floating], groups: Groups, mean: Floats) -> Floats:
    """Covariance of cells within groups of given means, `(d, d)`."""
    squares: Floats = -(mean * groups.count[:, None]).T @ mean
    for _, rows in _by_block(groups, 2**20):
        cells = values[rows].astype(np.float64)
        squares = squares + cells.T @ cells
    return squares / max(len(groups.rows) - len(groups), 1)
