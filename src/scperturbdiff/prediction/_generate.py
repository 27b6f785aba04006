"""Generating the cells of requested populations."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from scipy import sparse
from scvi.utils import track

from scperturbdiff.counts import positions
from scperturbdiff.data import DOSE, PERTURBATION, choose_controls, preview, resample_controls
from scperturbdiff.diffusion import Components, Condition
from scperturbdiff.prediction._batches import batch_codes
from scperturbdiff.prediction._destinations import Destinations
from scperturbdiff.prediction._encoded import EncodedGroups
from scperturbdiff.prediction._finite import check_finite, check_weights
from scperturbdiff.prediction._gene_factors import GeneFactors
from scperturbdiff.prediction._pieces import Piece
from scperturbdiff.priors import make_prior
from scperturbdiff.progress import shows_progress
from scperturbdiff.retrieval import Conditions, Retrieved, draw_factors
from scperturbdiff.seeds import derive_seed, stream

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    import pandas as pd
    from anndata import AnnData
    from numpy.typing import NDArray
    from torch import Tensor

    from scperturbdiff.data import ConditionSpace
    from scperturbdiff.module import PerturbDiffModule
    from scperturbdiff.prediction._pieces import ControlGroup, Settings
    from scperturbdiff.prediction._request import ControlGroups, PopulationRequest


logger = logging.getLogger(__name__)

PIECES = 64
"""Pieces of a population that are handed on together."""
NO_CHANGE = 1e-3
"""Moves of latent vectors, in their standard deviations, and log fold changes that are no effect."""
LARGEST = 2**31 - 2**7
"""The largest 32-bit integer that is a number of single precision, too."""


class PopulationGenerator:
    """Draws requested populations from the controls of an AnnData.

    Everything random is seeded by what it is for, and every network call has shapes that depend only on the
    population at hand: a prediction does not depend on what else is in the call, to the last bit.

    Parameters
    ----------
    module
        The trained module; it is put into evaluation mode.
    space
        The model's conditions (with the features of this call).
    adata, genes, layer
        Where control counts are.
    batches
        Batch names the decoder knows, in order of their codes.
    groups
        Control groups of `adata`.
    settings
        How to draw.
    transform_batch
        Decode every cell as if it came from this batch.
    """

    def __init__(
        self,
        module: PerturbDiffModule,
        space: ConditionSpace,
        adata: AnnData,
        genes: pd.Index,
        layer: str | None,
        batches: list[str],
        groups: ControlGroups,
        settings: Settings,
        transform_batch: str | int | None = None,
    ) -> None:
        self.transform_batch = transform_batch
        check_weights(module)
        self.module, self.space, self.settings = module.eval(), space, settings
        self.evidence: dict[int, tuple[str, float]] = {}
        """How each population is new, and the share of the variance of its mean shift that training leaves open: near 0
        where it says what happens, near 1 where it says nothing; NaN without retrieval."""
        self.unchanged: dict[int, str] = {}
        """Populations that are predicted as their controls: what training measured is within the noise of sampling."""
        self.layer, self.batches, self.groups = layer, batches, groups
        self._encoded = EncodedGroups(module, adata, genes, layer, batches, space.batch_key, groups, settings)
        features = space.feature_matrix()
        self._features, self._has_features = module.scale_features(features)
        self._own_genes = space.target_genes(genes)
        self._retrieval = None if module.retrieval is None else module.retrieval.with_features(features)
        self._by_state = None if module.by_state is None else module.by_state.with_features(features)

    def generate(
        self, request: PopulationRequest, progress: bool = True, only: Sequence[int] | None = None
    ) -> Iterator[Piece]:
        """Yield the populations of `request`, each draw on its own, in order; `only` some where others do the rest."""
        component, dose = self.space.encode_perturbations(request.table)
        codes, numbers = self.space.encode_covariates(request.table)
        context = self.space.context_codes(request.table)
        key = self.space.batch_key
        batch = batch_codes(len(request), lambda: request.table[key], self.batches, key, self.transform_batch)
        wanted = range(len(request)) if only is None else only
        within = 1.0 if self._retrieval is None else self._retrieval.responses.within
        for i in track(wanted, description="Generating populations", disable=not (progress and shows_progress())):
            group = self._encoded[request.group[i]]
            noise = np.full(1, within / len(group.rows))  # as that of the same controls in training
            asked = Conditions(
                group.mean[None], component[i : i + 1], dose[i : i + 1], context[i : i + 1], noise, control_noise=noise
            )
            found, self.evidence[i] = self._retrieve(asked)
            condition = self._condition(asked, found, group.latent, codes[i : i + 1], numbers[i : i + 1])
            factors = self._gene_factors(group, asked, condition, found)
            names = [request.table[column].iloc[i] for column in (PERTURBATION, DOSE, *self.space.obs_keys)]
            if (component[i] >= 0).any() and self._stays(group, condition, found, factors):
                self.unchanged[i] = ", ".join(str(name) for name in names if name != "")
            n_draws = self.settings.n_populations or 1
            first = request.repeat[i] * n_draws  # what is asked for again are further draws
            for draw in range(first, first + n_draws):
                seed = derive_seed(self.settings.seed, *names, draw)
                yield from self._draw(request, i, group, condition, found, factors, batch[i], draw, seed)
        if only is None:
            self.tell_of_unchanged(request)

    def tell_of_unchanged(self, request: PopulationRequest) -> None:
        """Warn of populations that are predicted as their controls."""
        if self.unchanged:
            text = "%d of %d populations are predicted as their controls, no effect beyond the noise of sampling: %s."
            logger.warning(text, len(self.unchanged), len(request), preview(self.unchanged.values()))

    def _retrieve(self, asked: Conditions) -> tuple[Retrieved, tuple[str, float]]:
        """What training says of one population, and its entry of `evidence`."""
        treated = bool((asked.component >= 0).any())
        if self._retrieval is None or not treated:
            nothing = Retrieved.nothing(*asked.control_mean.shape)
            return nothing, ("unknown", float("nan")) if treated else ("control", 0.0)
        found = self._retrieval.predict(asked)
        values = found.shift, found.spread, found.library, found.residual, found.fold, found.variance
        check_finite(self._put(np.concatenate([np.ravel(part) for part in values])), "Retrieved responses")
        return found, (found.novelty[0], float(found.variance[0] / found.prior_variance[0]))

    def _put(self, values: NDArray, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.as_tensor(values, dtype=dtype, device=self.module.device)

    def _condition(
        self,
        asked: Conditions,
        found: Retrieved,
        latent: Tensor,
        codes: NDArray[np.int64],
        numbers: NDArray[np.float64],
    ) -> Condition:
        put, of_states = self._put, None
        if self._by_state is not None and (asked.component >= 0).any():
            of_states = self._by_state.states, *self._by_state.predict(asked, latent.cpu().numpy())
        return Condition(
            Components(put(asked.component, torch.long), put(asked.dose)),
            make_prior(found, asked, of_states, self.module.device),
            put(codes, torch.long),
            put(numbers),
            put(np.ones(1)),
        )

    def _gene_factors(
        self, group: ControlGroup, asked: Conditions, condition: Condition, found: Retrieved
    ) -> GeneFactors | None:
        """Log factors on the decoded counts of a population."""
        if self._retrieval is None or not found.residual.size:
            return None
        residual, weight = self._put(found.residual[0]), self._retrieval.fold_weight(asked, found.novelty[0])
        columns = self._own_genes[self._retrieval.unseen_targets(asked)]
        own = self._put(columns[columns >= 0], torch.long)
        evidence, nothing = self._retrieval.evidence_of_folds(found.novelty[0]), torch.zeros_like(residual)
        if self.settings.n_populations is None or (evidence is not None and evidence.exact):
            evidence = None
        if not weight and not len(own) and evidence is None:
            return GeneFactors(residual, nothing)
        sample = group.sample()
        moved = condition.prior.move(sample.latent[None])[0]
        means = self.module.moved_means(sample, moved, residual)
        factor = means.towards_fold(self._put(found.fold[0]), weight) if weight else nothing
        if len(own):
            factor = means.at_least(factor, own, self._retrieval.own_gene.fold)
        return GeneFactors(residual, factor, means, evidence)

    def _stays(self, group: ControlGroup, condition: Condition, found: Retrieved, factors: GeneFactors | None) -> bool:
        """Whether a population is predicted to be its controls, cell for cell but for rounding, in all draws."""
        generator, draws = self.module.generator_ema, self.settings.n_populations is not None
        if (
            generator.n_evaluations(self._n_steps(condition, found))
            or (draws and generator.replicate_factors.any())
            or self._miss(found, 0) is not None
            or (factors is not None and factors.evidence is not None)
        ):
            return False
        some = group.sample().latent[None]
        moves = bool((condition.prior.move(some) - some).abs().max() > NO_CHANGE)
        # a factor that all genes have in common is none: library sizes are kept
        genes = factors is not None and bool(factors.expected.max() - factors.expected.min() > NO_CHANGE)
        return not (moves or genes)

    def _n_steps(self, condition: Condition, found: Retrieved) -> int:
        """Evaluations of the network: none for what it was not trained to refine."""
        if self._retrieval is None:
            return self.settings.n_steps
        treated = bool((condition.components.index >= 0).any())
        return self.settings.n_steps if treated and self._retrieval.rehearsed(found.novelty[0]) else 0

    def _miss(self, found: Retrieved, seed: int) -> Tensor | None:
        """By how much a draw of something new misses what is retrieved, `(1, n_latent)`; `None` where replicates vary.

        Populations that were left out were off as replicates are, too.
        """
        factors = None if self._retrieval is None else self._retrieval.doubt.get(found.novelty[0])
        if factors is None or self.settings.n_populations is None:
            return None
        noise = np.random.default_rng(derive_seed(seed, "doubt")).normal(size=factors.shape[1])
        return self._put(np.sqrt(found.variance[:1]) * (factors @ noise))[None]

    def _responsiveness(self, found: Retrieved, n: int, seed: int) -> Tensor | None:
        """How strongly each of `n` cells responds, `(n,)`; `None` where all respond alike, or a network says how."""
        laws = {} if self._retrieval is None else self._retrieval.responsiveness
        if (law := laws.get(found.novelty[0])) is None:
            return None
        return self._put(draw_factors(law, n, np.random.default_rng(derive_seed(seed, "responsiveness"))))

    def _draw(
        self,
        request: PopulationRequest,
        i: int,
        group: ControlGroup,
        condition: Condition,
        found: Retrieved,
        factors: GeneFactors | None,
        batch: int,
        draw: int,
        seed: int,
    ) -> Iterator[Piece]:
        generator, settings = self.module.generator_ema, self.settings
        device = group.latent.device
        chance, rng = np.random.default_rng(seed), stream(seed, device)
        # the best single guess starts from every control equally often; draws vary as replicates and their controls do
        guess = settings.n_populations is None
        chosen = (choose_controls if guess else resample_controls)(len(group.rows), request.n_cells[i], chance)
        if (miss := self._miss(found, seed)) is not None:
            condition = replace(condition, prior=condition.prior.shifted(miss))
        factor = self._responsiveness(found, len(chosen), seed)
        at = torch.as_tensor(chosen, device=device)
        repeated = torch.ones_like(at, dtype=torch.bool)
        repeated[np.unique(chosen, return_index=True)[1]] = False
        shared = torch.randn(1, generator.n_population_noise, generator=rng, device=device)
        if miss is not None:
            shared = torch.zeros_like(shared)
        # pieces of equal size: a last piece of a few cells would be a population of its own to the network
        n_pieces = -(-len(chosen) // settings.piece)
        ends = np.cumsum([0, *map(len, np.array_split(np.arange(len(chosen)), n_pieces))])
        n_steps = self._n_steps(condition, found)
        together = bool(repeated.any()) and not generator.may_separate(n_steps, mixture=guess)
        places = Destinations(self.module, group, batch, None if factors is None else factors.draw(seed), together)
        library = float(np.exp(found.library[0]))
        latents, counts, first = [], [], 0
        for number, part in enumerate(map(slice, ends[:-1], ends[1:]), 1):
            piece = at[part]
            z = generator.sample(
                group.latent[piece][None],
                condition,
                group.controls,
                features=self._features,
                has_features=self._has_features,
                population_noise=shared,
                n_steps=n_steps,
                sampler=settings.sampler,
                guidance=settings.guidance,
                mixture=guess,
                rng=rng,
            )[0]
            latent = check_finite(self.module.unstandardize(z), "Predicted latent vectors")
            strength = None if factor is None else factor[part]
            latent, sampled = places.respond(chosen[part], latent, library, repeated[part], rng, strength)
            latents.append(latent.cpu().numpy())
            counts.append(as_csr(sampled))
            if number % PIECES == 0 or number == n_pieces:
                taken = chosen[first : part.stop]
                states = None if group.states is None else group.states[taken]
                matrix = sparse.vstack(counts, format="csr")
                yield Piece(i, draw, group.rows[taken], matrix, np.concatenate(latents), states)
                latents, counts, first = [], [], part.stop


def as_csr(dense: Tensor) -> sparse.csr_matrix:
    """Counts `(n, m)` most of which are 0 as a sparse matrix; several times faster than SciPy's conversion.

    Larger ones than files and layers hold, which are 32-bit integers, become the largest of these.
    """
    there = positions(dense != 0)
    found = check_finite(dense.take(there), "Predicted counts")
    values, position = found.clamp(max=LARGEST).cpu().numpy(), there.cpu().numpy()
    n, m = dense.shape
    start = np.searchsorted(position, np.arange(n + 1) * m)
    return sparse.csr_matrix((values, (position % m).astype(np.int32), start.astype(np.int32)), shape=(n, m))
