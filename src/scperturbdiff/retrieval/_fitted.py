"""Kriging of responses with parameters that were chosen: what it says of new conditions, and of those it knows."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Self

import numpy as np
import torch

from scperturbdiff.retrieval._conditions import novelty_of
from scperturbdiff.retrieval._covariance import squared_distances
from scperturbdiff.retrieval._doses import DoseStrength
from scperturbdiff.retrieval._evidence import FeatureEvidence
from scperturbdiff.retrieval._folds import usual_weight
from scperturbdiff.retrieval._kernel import ResponseKernel, ScaledFeatures
from scperturbdiff.retrieval._kriging import BATCHED, System, error_variance, neighborhoods
from scperturbdiff.retrieval._lengths import real_share
from scperturbdiff.retrieval._many import leave_out_many
from scperturbdiff.retrieval._own_gene import OwnGene
from scperturbdiff.retrieval._responses import Retrieved
from scperturbdiff.retrieval._responsiveness import HARDLY
from scperturbdiff.retrieval._settings import RetrievalSettings

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray

    from scperturbdiff.retrieval._conditions import Conditions, Floats, Novelty
    from scperturbdiff.retrieval._folds import FoldEvidence
    from scperturbdiff.retrieval._kernel import FeatureMoments, Widths
    from scperturbdiff.retrieval._lengths import Lengths
    from scperturbdiff.retrieval._responses import Responses
    from scperturbdiff.retrieval._similarity import LearnedSimilarity, ResponseSimilarity


@dataclass(frozen=True)
class FittedRetrieval:
    """Kriging of measured responses, with parameters that were chosen; an immutable value.

    Each prediction solves a system of the most correlated training conditions, so the cost grows linearly. Averages of
    shifts that point in different directions are too short: the length of a prediction for a new context is corrected
    by what it should have been when similar contexts were left out.

    Attributes
    ----------
    responses
        Measured responses of the training populations.
    features
        Feature table of components, `(n_components, n_features)`, NaN rows where unknown; `None` without features.
    settings
        Constants.
    median_distance
        Median distance between the control means of contexts.
    signal
        Variance of shifts per dimension, less sampling noise: the unit of the kernel.
    moments
        Of the features of training components; `None` without features, or where these do not differ.
    strength
        How strongly doses act.
    widths
        Parameters of the kernel for each way of being new.
    evidence
        What features told of perturbations that were left out.
    similarity
        What responses themselves say about similarity; `None` where too little is measured.
    lengths
        Of predictions for contexts that were left out.
    doubt
        Directions `(n_latent, n_factors)` in which predictions are off, in each way of being new; see
        :func:`~scperturbdiff.retrieval._doubt.error_factors`. Missing where too little can be left out.
    folds
        What speaks for following fold changes of genes rather than the decoded shift, in each way of being new; not
        found by :meth:`fit`.
    responsiveness
        Laws of how strongly cells of a population respond, relative to what is predicted for all of them, quantiles
        `(n_quantiles,)` in each way of being new; missing where all respond alike; not found by :meth:`fit`.
    own_gene
        By how much the gene changes that a perturbation is named after; not found by :meth:`fit`.
    explained
        Share of the shifts that is predicted for conditions left out in each way of being new, sampling noise taken off
        both; NaN where nothing can be left out.
    """

    responses: Responses
    features: Floats | None = None
    settings: RetrievalSettings = field(default_factory=RetrievalSettings)
    median_distance: float = 1.0
    signal: float = 1.0
    moments: FeatureMoments | None = None
    strength: DoseStrength = field(default_factory=DoseStrength)
    widths: Mapping[Novelty, Widths] = field(default_factory=dict)
    evidence: FeatureEvidence = field(default_factory=FeatureEvidence)
    similarity: LearnedSimilarity | None = None
    lengths: Lengths | None = None
    doubt: Mapping[Novelty, Floats] = field(default_factory=dict)
    folds: Mapping[Novelty, FoldEvidence] = field(default_factory=dict)
    responsiveness: Mapping[Novelty, Floats] = field(default_factory=dict)
    own_gene: OwnGene = field(default_factory=OwnGene)
    explained: Mapping[Novelty, float] = field(default_factory=dict)

    def with_features(self, features: Floats | None) -> Self:
        """The same with the feature table of further components."""
        same = features is self.features or (
            features is not None and self.features is not None and np.array_equal(features, self.features, True)
        )
        return self if same else replace(self, features=features)

    def hardly_respond(self) -> dict[str, float]:
        """Share of cells that hardly respond, for ways of being new in which cells respond unevenly."""
        return {str(way): float((law < HARDLY).mean()) for way, law in self.responsiveness.items()}

    def predict(self, conditions: Conditions, novelty: Novelty | None = None) -> Retrieved:
        """Responses to expect of new conditions.

        Parameters
        ----------
        conditions
            `n` conditions.
        novelty
            In which way they are new: training conditions that would not be there then are not used. `None`: as they
            are, and all are used.

        Returns
        -------
        One response a condition; it does not depend on the other conditions, to the last bit.
        """
        known = self.responses.conditions
        kinds = novelty_of(conditions, known) if novelty is None else [novelty] * len(conditions)
        out = Retrieved.nothing(len(conditions), self._n_latent, self._n_genes)
        for kind in dict.fromkeys(kinds):
            rows = np.flatnonzero([k == kind for k in kinds])
            part = conditions.take(rows)
            barred = None if novelty is None else part.excluded(known, novelty)
            out.put(rows, self._krige(part, kind, self._system(kind), self._n_genes, barred, chunk=1))
        return out

    def leave_out(
        self,
        novelty: Novelty,
        rows: NDArray[np.int64] | None = None,
        *,
        with_genes: bool = False,
        with_variance: bool = True,
        device: torch.device | str = "cpu",
    ) -> Retrieved:
        """Responses of the training conditions `rows` (default: all) as if each were new in the way of `novelty`.

        With more than 768 training conditions systems are solved in batches on the `device`, in double precision.
        """
        known = self.responses.conditions
        rows = np.arange(len(known)) if rows is None else rows
        widths, alone = self.widths[novelty], novelty != "seen"
        n_genes = self._n_genes if with_genes else 0

        def krige(some: NDArray[np.int64], kernel: ResponseKernel) -> Retrieved:
            if len(known) > BATCHED:
                return self._krige_many(some, novelty, kernel, n_genes, alone, device)
            asked = known.take(some)
            barred = (asked.barred if alone else asked.excluded)(known, novelty)
            return self._krige(asked, novelty, System.of(kernel, known, with_variance), n_genes, barred, with_variance)

        if not widths.response_share or self.similarity is None:
            return krige(rows, self._kernel(widths))
        out = Retrieved.nothing(len(rows), self._n_latent, n_genes, novelty)
        for fold, similarity in enumerate(self.similarity.folds):  # must not know the response that is left out
            at = np.flatnonzero(self.similarity.fold[rows] == fold)
            if len(at):
                out.put(at, krige(rows[at], self._kernel(widths, similarity)))
        return out

    def rehearsed(self, novelty: Novelty) -> bool:
        """Whether training could leave out conditions that are new in this way."""
        if novelty == "perturbation":
            return self.features is not None
        return novelty != "context" or self._n_contexts > 1

    def unexplained(self, conditions: Conditions, novelty: Novelty) -> Floats:
        """Share of the variance of the responses of `conditions` that training leaves open, `(n,)`."""
        barred = conditions.excluded(self.responses.conditions, novelty)
        found = self._krige(conditions, novelty, self._system(novelty), 0, barred)
        return np.asarray(found.variance / found.prior_variance)

    def nearest(self, conditions: Conditions, barred: NDArray[np.bool_] | None = None) -> Floats:
        """Distance of the controls of `conditions` to the nearest of training that are not `barred`, `(n,)`."""
        squared = np.maximum(squared_distances(conditions.control_mean, self.responses.conditions.control_mean), 0)
        squared = squared if barred is None else np.where(barred, np.inf, squared)
        nearest = np.sqrt(squared.min(1))
        return np.where(np.isfinite(nearest), nearest, 0.0)

    def evidence_of_folds(self, novelty: Novelty) -> FoldEvidence | None:
        """What left-out conditions say of fold changes."""
        return self.folds.get("replicate" if novelty == "seen" else novelty)

    def fold_weight(self, conditions: Conditions, novelty: Novelty) -> float:
        """How far one condition follows fold changes, in [0, 1]."""
        evidence, distance = self.evidence_of_folds(novelty), float(self.nearest(conditions)[0])
        return (usual_weight if evidence is None else evidence.weight)(distance, self.settings)

    def unseen_targets(self, conditions: Conditions) -> NDArray[np.int64]:
        """Components of one condition that training never saw and whose own gene is expected to change, `(n,)`."""
        asked = conditions.component[conditions.component >= 0]
        return asked[~np.isin(asked, self.responses.conditions.component)] if self.own_gene.used else asked[:0]

    def fold_weights(self) -> dict[Novelty, float]:
        """The same as far from what is known as conditions left out were, in each way of being new."""
        return {
            novelty: evidence.weight(float(np.median(evidence.distance)), self.settings)
            for novelty, evidence in self.folds.items()
        }

    @property
    def _n_genes(self) -> int:
        return self.responses.residual.shape[1]

    @property
    def _n_latent(self) -> int:
        return self.responses.shift.shape[1]

    def _kernel(self, widths: Widths, similarity: ResponseSimilarity | None = None) -> ResponseKernel:
        return ResponseKernel(
            widths,
            self.median_distance,
            self._scaled_features,
            similarity,
            self.strength,
            self.settings.mean_variance,
            self.signal,
        )

    @cached_property
    def _scaled_features(self) -> ScaledFeatures | None:
        if self.features is None or self.moments is None:
            return None
        return ScaledFeatures.of(self.features, self.moments)

    @cached_property
    def _systems(self) -> dict[Novelty, System]:
        return {}

    def _system(self, novelty: Novelty) -> System:
        """The kernel of what is new in this way, made once."""
        if novelty not in self._systems:
            whole = None if self.similarity is None else self.similarity.whole
            self._systems[novelty] = System.of(self._kernel(self.widths[novelty], whole), self.responses.conditions)
        return self._systems[novelty]

    def _krige(
        self,
        asked: Conditions,
        novelty: Novelty,
        system: System,
        n_genes: int,
        barred: NDArray[np.bool_] | None,
        variance: bool = True,
        chunk: int = 128,
    ) -> Retrieved:
        """Responses of `asked`, new in the way of `novelty`, without the training conditions that are `barred`."""
        known, kernel, usual = self.responses.conditions, system.kernel, system.usual
        out = Retrieved.nothing(len(asked), self._n_latent, n_genes, novelty)
        nugget, n = kernel.widths.nugget, self.settings.n_neighbors
        noise = nugget + known.treated_noise / self.signal
        for around in neighborhoods(kernel, known, noise, asked, barred, n, chunk, system.among):
            weights, part = around.weights(), asked.take(around.rows)
            shared = np.take_along_axis(kernel.of_controls(part, known), around.near, 1)
            self._combine(out, around.rows, around.near, weights, self.signal * shared)
            if not variance:
                continue
            prior = usual.diagonal(part) + nugget
            after = error_variance(usual, known, noise, part, around, weights, nugget, system.usual_among)
            self._put_variances(out, around.rows, part, prior, after, (weights * (shared > 0)).sum(1))
        return out

    def _krige_many(
        self,
        rows: NDArray[np.int64],
        novelty: Novelty,
        kernel: ResponseKernel,
        n_genes: int,
        leave: bool,
        device: torch.device | str,
    ) -> Retrieved:
        """The same of training conditions `rows`, where there are many."""
        known, out = self.responses.conditions, Retrieved.nothing(len(rows), self._n_latent, n_genes, novelty)
        noise, n = kernel.widths.nugget + known.treated_noise / self.signal, self.settings.n_neighbors
        controls = known.control_groups.code
        for part in leave_out_many(kernel, known, noise, rows, novelty, leave, n, device):
            same = controls[rows[part.rows]][:, None] == controls[part.near]
            self._combine(out, part.rows, part.near, part.weights, same * known.control_noise[part.near])
            asked = known.take(rows[part.rows])
            self._put_variances(out, part.rows, asked, part.prior, part.variance, (part.weights * same).sum(1))
        return out

    def _put_variances(
        self,
        out: Retrieved,
        rows: slice | NDArray[np.int64],
        asked: Conditions,
        prior: Floats,
        after: Floats,
        same: Floats,
    ) -> None:
        """Put variances of responses into `rows` of `out`, from those of responses and errors of the controls' means.

        Weights of conditions with the same controls add up to `same`, `(q,)`: what is left of that error.
        """
        out.prior_variance[rows] = self.signal * prior - asked.control_noise
        left = self.signal * after - (1 - same) ** 2 * asked.control_noise
        out.variance[rows] = np.clip(left, 0, out.prior_variance[rows])

    def _combine(
        self, out: Retrieved, rows: slice | NDArray[np.int64], near: NDArray[np.int64], weights: Floats, shared: Floats
    ) -> None:
        """Put weighted responses of the neighbours `(q, k)` into `rows` of `out`.

        `shared` is the part of their noise `(q, k)` that is to be predicted, as new conditions have it, too.
        """
        measured, novelty = self.responses, out.novelty[0]
        shift = np.einsum("qk,qkd->qd", weights, measured.shift[near])
        real = real_share(shift, (weights**2 * (measured.conditions.noise[near] - shared)).sum(1))
        length = self._length(novelty, near, np.abs(weights))
        out.shift[rows] = (length * real)[:, None] * shift
        out.spread[rows] = real * (weights * measured.spread[near]).sum(1)
        out.library[rows] = real * (weights * measured.library[near]).sum(1)
        if out.residual.shape[1]:
            for name in ("residual", "fold"):
                of_genes = torch.from_numpy(getattr(measured, name))  # which reads half precision faster than NumPy
                getattr(out, name)[rows] = [
                    r * (w @ of_genes[k].float().numpy()) for r, w, k in zip(real, weights, near, strict=True)
                ]

    @cached_property
    def _n_contexts(self) -> int:
        return len(np.unique(self.responses.conditions.context))

    def _corrects_lengths(self, novelty: Novelty) -> bool:
        enough = self._n_contexts >= self.settings.min_contexts_for_length
        return novelty == "context" and self.lengths is not None and enough

    def _length(self, novelty: Novelty, near: NDArray[np.int64], weights: Floats) -> Floats:
        """Factor on the length of predictions that use the conditions `near` with these absolute weights, `(q,)`."""
        if self.lengths is None or not self._corrects_lengths(novelty):
            return np.ones(len(near))
        noise = self._n_latent * self.responses.conditions.noise * self.responses.conditions.mass
        return self.lengths.factor(near, weights, noise, self.settings.length_bounds)
