"""How far predicted counts follow fold changes of genes rather than the decoded shift."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from scperturbdiff.counts import respond
from scperturbdiff.data import iter_rows, log_normalize
from scperturbdiff.module import dense
from scperturbdiff.retrieval import FoldEvidence
from scperturbdiff.seeds import derive_seed, stream
from scperturbdiff.training._fold_errors import LeftOut, fold_noise, with_fold_errors
from scperturbdiff.training._populations import count_replicates, left_out_prior, useful_novelties
from scperturbdiff.training._settings import SETTINGS

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from scperturbdiff.module import PerturbDiffModule
    from scperturbdiff.responses import MeasuredPopulations
    from scperturbdiff.retrieval import Novelty, Retrieval


def fold_evidence(
    populations: MeasuredPopulations, module: PerturbDiffModule, retrieval: Retrieval, matrix: Any, seed: int
) -> dict[Novelty, FoldEvidence]:
    """What training conditions that are left out say of fold changes, for each way of being new.

    Cells of each are generated with the decoded shift alone and with the fold changes alone. By how much of their
    difference in mean log-normalised expression the measured cells are nearer to the latter is the evidence.

    Parameters
    ----------
    populations
        Populations.
    module
        Decodes; its ``by_state`` is used.
    retrieval
        Retrieval of `populations`.
    matrix
        Counts, `(n_cells, n_genes)`.
    seed
        Of all choices.
    """
    table, rng = populations.table, np.random.default_rng(seed)
    rows = np.sort(rng.permutation(len(table))[: SETTINGS.fold_populations])

    def some(cells: NDArray[np.int64]) -> NDArray[np.int64]:
        return np.sort(rng.permutation(cells)[: SETTINGS.fold_cells])

    def read(cells: NDArray[np.int64]) -> torch.Tensor:
        return torch.cat([dense(part, module.device) for part in iter_rows(matrix, cells)])

    chosen = [(some(table.match.groups[table.match.group[row]]), some(table.cells[row])) for row in rows]
    counts_of = [read(of_controls) for of_controls, _ in chosen]
    samples = [
        module.control_sample(counts, torch.as_tensor(populations.latent[of_controls], device=module.device))
        for counts, (of_controls, _) in zip(counts_of, chosen, strict=True)
    ]
    treated_counts = [read(treated) for _, treated in chosen]
    measured = [_mean_expression(counts) for counts in treated_counts]
    n_treated, n_controls = table.cells.count[rows], table.match.groups.count[table.match.group[rows]]
    noise = [
        fold_noise(treated, int(n)) + fold_noise(counts, int(m))
        for treated, n, counts, m in zip(treated_counts, n_treated, counts_of, n_controls, strict=True)
    ]
    n_replicates = count_replicates(table)[rows]
    out: dict[Novelty, FoldEvidence] = {}
    for novelty in useful_novelties(table, retrieval):
        found = retrieval.leave_out(novelty, rows, with_genes=True)
        prior = left_out_prior(populations, retrieval, module.by_state, novelty, rows, module.device)
        agrees, difference = np.zeros(len(rows)), np.zeros(len(rows))
        for i, (counts, sample, real) in enumerate(zip(counts_of, samples, measured, strict=True)):
            residual, fold = (
                torch.as_tensor(part[i], dtype=torch.float32, device=module.device)
                for part in (found.residual, found.fold)
            )
            start, library = sample.latent, float(np.exp(found.library[i]))
            moved = prior.at(i).move(start[None])[0]
            followed = residual + module.moved_means(sample, moved, residual).towards_fold(fold, 1.0)
            (shifted, folded), (other_shifted, other_folded) = (
                [
                    _mean_expression(_draw(module, counts, start, moved, library, factors, derived))
                    for factors in (residual, followed)
                ]
                # products of one draw with itself would hold the noise of its counts
                for derived in (derive_seed(seed, "fold", i, draw) for draw in range(2))
            )
            agrees[i] = (folded - shifted) @ (real - other_shifted)
            difference[i] = max(float((folded - shifted) @ (other_folded - other_shifted)), 0.0)
        asked = retrieval.responses.conditions.take(rows)
        distance = retrieval.nearest(asked, asked.barred(retrieval.responses.conditions, novelty))
        evidence = FoldEvidence(distance, agrees, difference)
        left_out = LeftOut(novelty, rows, samples, noise, n_replicates, found, prior)
        out[novelty] = with_fold_errors(evidence, left_out, module, retrieval, seed)
    return out


def _draw(
    module: PerturbDiffModule,
    counts: torch.Tensor,
    start: torch.Tensor,
    moved: torch.Tensor,
    library: float,
    factors: torch.Tensor,
    seed: int,
) -> torch.Tensor:
    """Counts of control cells that are `moved`, as of the first batch, `(n_cells, n_genes)`."""
    batch = torch.zeros(len(start), dtype=torch.long, device=start.device)
    after = module.decode(module.unstandardize(moved), batch, factors)
    return respond(counts, module.shares(start, batch), after, library, rng=stream(seed, start.device))


def _mean_expression(counts: torch.Tensor) -> NDArray[np.float64]:
    return np.asarray(log_normalize(counts.cpu().numpy()).mean(0), np.float64).ravel()
