"""How far predicted counts follow fold changes of genes rather than the decoded shift."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from scperturbdiff.counts import respond
from scperturbdiff.data import log_normalize
from scperturbdiff.retrieval import NEW, FoldEvidence
from scperturbdiff.seeds import derive_seed, stream
from scperturbdiff.training._fold_errors import with_fold_errors
from scperturbdiff.training._left_out import LeftOut, SomeCells
from scperturbdiff.training._populations import count_replicates, useful_novelties
from scperturbdiff.training._settings import SETTINGS

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from scperturbdiff.module import PerturbDiffModule
    from scperturbdiff.responses import MeasuredPopulations
    from scperturbdiff.retrieval import Novelty
    from scperturbdiff.training._unseen import UnseenPopulations


def fold_evidence(
    populations: MeasuredPopulations, module: PerturbDiffModule, matrix: Any, unseen: UnseenPopulations, seed: int
) -> dict[Novelty, FoldEvidence]:
    """What training conditions that are left out say of fold changes, for each way of being new.

    Cells of each are generated with the decoded shift alone and with the fold changes alone. By how much of their
    difference in mean log-normalised expression the measured cells are nearer to the latter is the evidence. Where more
    than a replicate is new, some are left out of a latent space as well, and both kinds count: a decoder that has seen
    the cells of a condition places them better than those of a new one, and one that was trained shortly, worse. There
    are more of the former, and they count less.

    Parameters
    ----------
    populations
        Populations.
    module
        Decodes, and retrieves of `populations`.
    matrix
        Counts, `(n_cells, n_genes)`.
    unseen
        Leaves conditions out of latent spaces.
    seed
        Of all choices.
    """
    retrieval = module.retrieval
    assert retrieval is not None  # of populations
    rows = np.sort(np.random.default_rng(seed).permutation(len(populations.table))[: SETTINGS.fold_populations])
    n_replicates = count_replicates(populations.table)[rows]
    cells = SomeCells.read(module, populations.take(rows), matrix, np.random.default_rng(derive_seed(seed, "fold")))
    out: dict[Novelty, FoldEvidence] = {}
    for novelty in useful_novelties(populations.table, retrieval):
        rng = np.random.default_rng(derive_seed(seed, "fold", novelty))
        parts = [LeftOut.of_known(novelty, module, populations, rows, cells)]
        if novelty in NEW:
            n = SETTINGS.fold_populations // unseen.n_spaces(novelty)
            parts += [LeftOut.of_unseen(novelty, space, n, rng) for space in unseen.spaces(novelty)]
        out[novelty] = with_fold_errors(_evidence(parts, seed), parts, n_replicates, retrieval.settings, seed)
    return out


def _evidence(parts: Sequence[LeftOut], seed: int) -> FoldEvidence:
    """What `parts` say; the latent space of the first has seen the cells, and counts less beside others."""
    found = [
        _compare(part, i, derive_seed(seed, "fold", number, i))
        for number, part in enumerate(parts)
        for i in range(len(part))
    ]
    weights = np.ones(len(found))
    if len(parts) > 1:
        weights[: len(parts[0])] = SETTINGS.seen_weight
    agrees, difference = weights * np.array(found).reshape(-1, 2).T
    return FoldEvidence(np.concatenate([part.distance for part in parts]), agrees, difference)


def _compare(part: LeftOut, i: int, seed: int) -> tuple[float, float]:
    """Product of what fold changes change with the error of the decoded shift, and with itself."""
    module, counts, sample = part.module, part.cells.controls[i], part.cells.samples[i]
    residual, fold = (
        torch.as_tensor(values[i], dtype=torch.float32, device=module.device)
        for values in (part.found.residual, part.found.fold)
    )
    start, library = sample.latent, float(np.exp(part.found.library[i]))
    moved, batch = part.prior.at(i).move(start[None])[0], torch.zeros(len(start), dtype=torch.long, device=start.device)
    followed = residual + module.moved_means(sample, moved, residual).towards_fold(fold, 1.0)
    before = module.shares(start, batch)
    after = [module.decode(module.unstandardize(moved), batch, factors) for factors in (residual, followed)]
    (shifted, folded), (other_shifted, other_folded) = (
        [
            _mean_expression(respond(counts, before, decoded, library, rng=stream(derived, start.device)))
            for decoded in after
        ]
        # products of one draw with itself would hold the noise of its counts
        for derived in (derive_seed(seed, draw) for draw in range(2))
    )
    agrees = (folded - shifted) @ (_mean_expression(part.cells.treated[i]) - other_shifted)
    return float(agrees), max(float((folded - shifted) @ (other_folded - other_shifted)), 0.0)


def _mean_expression(counts: torch.Tensor) -> NDArray[np.float64]:
    return np.asarray(log_normalize(counts.cpu().numpy()).mean(0), np.float64).ravel()
