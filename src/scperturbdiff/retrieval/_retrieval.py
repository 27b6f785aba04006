"""Retrieval: where the training populations say a perturbed population should lie.

Gaussian-process regression (kriging) of latent responses over conditions. Its kernel multiplies the similarity of
perturbations (shared components, features, doses, responses) with the similarity of contexts (distance between
control means, responses), so one rule serves a pair never seen together, a context or a perturbation never seen,
and a combination; the rules it replaces (mean shift, nearest context's shift, ridge on features, additive combination)
are limits of it. Its parameters are chosen, for each way in which a condition can be new, by leaving out training
conditions in that way.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from scperturbdiff.retrieval._conditions import Conditions, Novelty, n_components, novelty_of
from scperturbdiff.retrieval._covariance import squared_distances
from scperturbdiff.retrieval._doses import DoseStrength
from scperturbdiff.retrieval._folds import FoldEvidence
from scperturbdiff.retrieval._kernel import GRID, RESPONSE_SHARES, FeatureMoments, ResponseKernel, Widths
from scperturbdiff.retrieval._kriging import choose_widths, neighborhoods
from scperturbdiff.retrieval._lengths import Lengths
from scperturbdiff.retrieval._responses import Responses, Retrieved
from scperturbdiff.retrieval._settings import RetrievalSettings
from scperturbdiff.retrieval._similarity import LearnedSimilarity, ResponseSimilarity, can_learn, learn_similarity
from scperturbdiff.retrieval._state import from_state, to_state

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray

    from scperturbdiff.retrieval._conditions import Floats

VERSION = 1  # of the saved state
LEFT_OUT: tuple[Novelty, ...] = ("replicate", "pair", "context", "perturbation")


@dataclass(frozen=True)
class Retrieval:
    """Kriging of measured responses; see the module's docstring. An immutable value: :meth:`fit` makes one.

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
        Of the features of training components.
    strength
        How strongly doses act.
    widths
        Parameters of the kernel for each way of being new.
    similarity
        What responses themselves say about similarity; `None` where too little is measured.
    lengths
        Of predictions for contexts that were left out.
    folds
        What speaks for following fold changes of genes rather than the decoded shift, in each way of being new; not
        found by :meth:`fit`.
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
    similarity: LearnedSimilarity | None = None
    lengths: Lengths | None = None
    folds: Mapping[Novelty, FoldEvidence] = field(default_factory=dict)
    explained: Mapping[Novelty, float] = field(default_factory=dict)

    # ---- fitting ------------------------------------------------------------------------------------------------

    @classmethod
    def fit(
        cls,
        responses: Responses,
        features: Floats | None = None,
        settings: RetrievalSettings | None = None,
        seed: int = 0,
    ) -> Retrieval:
        """Choose the kernel's parameters by leaving training conditions out.

        Parameters
        ----------
        responses
            Measured responses of the training populations, one at least.
        features
            Feature table of components, `(n_components, n_features)`, NaN rows where unknown.
        settings
            Constants; `None`: defaults.
        seed
            Chooses the conditions that are left out, where there are many, and the folds.
        """
        settings = settings or RetrievalSettings()
        conditions, shift = responses.conditions, responses.shift
        means = conditions.site_means()
        found = cls(
            responses,
            features,
            settings,
            median_distance=_median_distance(means),
            signal=max(float((shift**2).mean() - conditions.noise.mean()), 1e-3),
            moments=None if features is None else FeatureMoments.of(features, conditions),
            strength=DoseStrength.of(conditions, shift, settings),
        )
        tried = _whole_populations(conditions, settings.n_left_out, seed)
        found = replace(found, widths=found._choose_widths(tried))
        found = found._learn_similarity(means, tried, seed)
        found = replace(found, lengths=found._measure_lengths(tried))
        return replace(found, explained={novelty: found._explain(novelty, tried) for novelty in LEFT_OUT})

    def _choose_widths(self, tried: NDArray[np.int64]) -> dict[Novelty, Widths]:
        conditions = self.responses.conditions
        has_doses = np.unique(conditions.dose[conditions.component >= 0]).size > 1
        names = [n for n in GRID if self.features is not None or not n.startswith("feature")]
        names = [n for n in names if has_doses or not n.startswith("dose")]
        start = Widths(feature_share=0.0 if self.features is None else 0.5)
        part, targets = conditions.take(tried), self.responses.shift[tried]
        widths = {w: choose_widths(part, targets, self.signal, w, start, names, self._kernel) for w in LEFT_OUT}
        if len(np.unique(conditions.context)) < 3:  # what is left has one context: every width predicts the same
            widths["context"] = start
        return {**widths, "seen": widths["replicate"]}

    def _learn_similarity(self, means: Floats, tried: NDArray[np.int64], seed: int) -> Retrieval:
        """Learn similarities from responses and use them for new pairs as far as they help.

        How far is decided on pairs that the similarities were learned without.
        """
        known, shift, n = self.responses.conditions, self.responses.shift, n_components(self.responses.conditions)
        if not can_learn(known, self.settings.max_contexts):
            return self
        prior = replace(self._kernel(self.widths["pair"]), mean_variance=1.0).contexts(means, means)
        pair = known.pair_codes()
        fold = (np.random.default_rng(seed).permutation(pair.max() + 1) % self.settings.n_folds)[pair]
        parts = [np.flatnonzero(fold != number) for number in range(self.settings.n_folds)]
        if any(len(np.unique(known.site[part])) < len(means) for part in parts):
            return self  # a context whose every condition lies in one fold cannot be left out
        learned = [
            learn_similarity(known.take(part), shift[part], prior, self.signal, n, self.settings, seed)
            for part in [*parts, np.arange(len(known))]
        ]
        base = self.widths["pair"]
        best, best_error = self, self._error("pair", tried)
        similar = replace(self, similarity=LearnedSimilarity(learned[-1], tuple(learned[:-1]), fold))
        for share, nugget in itertools.product(RESPONSE_SHARES, {base.nugget, min(GRID["nugget"])}):
            pairs = replace(base, response_share=share, nugget=nugget)
            candidate = replace(similar, widths={**self.widths, "pair": pairs})
            error = candidate._error("pair", tried)
            if error < best_error * (1 - 1e-3):
                best, best_error = candidate, error
        return replace(best, similarity=similar.similarity)

    def _error(self, novelty: Novelty, rows: NDArray[np.int64]) -> float:
        """Mean squared error of the shifts of training conditions that are left out."""
        error = ((self.leave_out(novelty, rows).shift - self.responses.shift[rows]) ** 2).mean(1)
        return float(np.average(error, weights=self.responses.conditions.mass[rows]))

    def _measure_lengths(self, tried: NDArray[np.int64]) -> Lengths:
        left_out = self.leave_out("context", tried).shift
        mass = self.responses.conditions.mass[tried]
        explained = (left_out * self.responses.shift[tried]).sum(1)
        return Lengths(tried, mass * explained, mass * (left_out**2).sum(1))

    def _explain(self, novelty: Novelty, rows: NDArray[np.int64]) -> float:
        known = self.responses.conditions
        left = ~known.take(rows).excluded(known, novelty)
        left &= known.population[rows][:, None] != known.population[None, :]
        if novelty == "replicate":  # another population of the same condition must be there
            left &= known.pair_codes()[rows][:, None] == known.pair_codes()[None, :]
        if novelty == "perturbation" and self.features is None:
            left[:] = False
        rows = rows[left.any(axis=1)]
        shift, mass = self.responses.shift[rows], known.mass[rows]
        noise = (mass * known.noise[rows]).sum() * self._n_latent
        size = mass @ (shift**2).sum(1) - noise
        if size <= 0:
            return float("nan")
        error = mass @ ((self.leave_out(novelty, rows).shift - shift) ** 2).sum(1) - noise
        return float(1 - max(error, 0) / size)

    @property
    def notes(self) -> tuple[str, ...]:
        """What was done or left out because of the data, in sentences."""
        n_contexts = len(np.unique(self.responses.conditions.context))
        if n_contexts > self.settings.max_contexts:
            return (
                f"Similarities were not learned from responses: {n_contexts} contexts, more than "
                f"{self.settings.max_contexts}.",
            )
        if self.similarity is None:
            return ("Similarities were not learned from responses: too few conditions.",)
        share = self.widths["pair"].response_share
        if not share:
            return ("Similarities learned from responses did not help for pairs that were left out, and are not used.",)
        return (f"For new pairs {share:.0%} of the similarity is learned from responses.",)

    # ---- predicting ---------------------------------------------------------------------------------------------

    def with_features(self, features: Floats | None) -> Retrieval:
        """The same with the feature table of further components."""
        return replace(self, features=features)

    def predict(self, conditions: Conditions, novelty: Novelty | None = None) -> Retrieved:
        """Responses to expect of new conditions.

        Parameters
        ----------
        conditions
            `n` conditions.
        novelty
            In which way they are new: training conditions that would not be there then are not used. `None`: as they
            are.

        Returns
        -------
        One response a condition; it does not depend on the other conditions, to the last bit.
        """
        kinds = novelty_of(conditions, self.responses.conditions) if novelty is None else [novelty] * len(conditions)
        n_genes = self._n_genes
        out = Retrieved.nothing(len(conditions), self._n_latent, n_genes)
        for kind in dict.fromkeys(kinds):
            rows = np.flatnonzero([k == kind for k in kinds])
            kernel, among = self._system(kind)
            out.put(rows, self._krige(conditions.take(rows), kind, kernel, n_genes, among=among, chunk=1))
        return out

    def leave_out(
        self, novelty: Novelty, rows: NDArray[np.int64] | None = None, *, with_genes: bool = False
    ) -> Retrieved:
        """Responses of the training conditions `rows` (default: all) as if each were new in the way of `novelty`."""
        known = self.responses.conditions
        rows = np.arange(len(known)) if rows is None else rows
        widths, alone = self.widths[novelty], novelty != "seen"
        n_genes = self._n_genes if with_genes else 0
        if not widths.response_share or self.similarity is None:
            return self._krige(known.take(rows), novelty, self._kernel(widths), n_genes, leave=alone)
        out = Retrieved.nothing(len(rows), self._n_latent, n_genes, novelty)
        for fold, similarity in enumerate(self.similarity.folds):  # must not know the response that is left out
            at = np.flatnonzero(self.similarity.fold[rows] == fold)
            if len(at):
                kernel = self._kernel(widths, similarity)
                out.put(at, self._krige(known.take(rows[at]), novelty, kernel, n_genes, leave=alone))
        return out

    def nearest(self, conditions: Conditions, novelty: Novelty) -> Floats:
        """Distance of the controls of `conditions`, new in the way of `novelty`, to the nearest that is used, `(n,)`."""
        known = self.responses.conditions
        squared = np.maximum(squared_distances(conditions.control_mean, known.control_mean), 0)
        squared = np.where(conditions.excluded(known, novelty), np.inf, squared)
        nearest = np.sqrt(squared.min(1))
        return np.where(np.isfinite(nearest), nearest, 0.0)

    def fold_weight(self, conditions: Conditions, novelty: Novelty) -> float:
        """How far one condition follows fold changes, in [0, 1]; 1 where nothing could be left out."""
        evidence = self.folds.get("replicate" if novelty == "seen" else novelty)
        if evidence is None:
            return 1.0
        return evidence.weight(float(self.nearest(conditions, novelty)[0]), self.settings)

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
            self.features,
            self.moments,
            similarity,
            self.strength,
            self.settings.mean_variance,
        )

    @cached_property
    def _systems(self) -> dict[Novelty, tuple[ResponseKernel, Floats | None]]:
        return {}

    def _system(self, novelty: Novelty) -> tuple[ResponseKernel, Floats | None]:
        """The kernel and, if every prediction uses them all, its values among training conditions; made once."""
        if novelty not in self._systems:
            known = self.responses.conditions
            whole = None if self.similarity is None else self.similarity.whole
            kernel = self._kernel(self.widths[novelty], whole)
            among = kernel(known, known) if len(known) <= self.settings.n_neighbors else None
            self._systems[novelty] = kernel, among
        return self._systems[novelty]

    def _krige(
        self,
        asked: Conditions,
        novelty: Novelty,
        kernel: ResponseKernel,
        n_genes: int = 0,
        leave: bool = False,
        among: Floats | None = None,
        chunk: int = 128,
    ) -> Retrieved:
        measured, nugget = self.responses, kernel.widths.nugget
        known = measured.conditions
        out = Retrieved.nothing(len(asked), self._n_latent, n_genes, novelty)
        noise = nugget + known.noise / self.signal
        n = self.settings.n_neighbors
        for around in neighborhoods(kernel, known, noise, asked, novelty, leave, n, chunk, among):
            rows, near, weights = around.rows, around.near, around.weights()
            shift = np.einsum("qk,qkd->qd", weights, measured.shift[near])
            real = _real_share(shift, (weights**2 * known.noise[near]).sum(1))
            length = self._length(novelty, around.over_all(np.abs(weights), len(known)))
            out.shift[rows] = (length * real)[:, None] * shift
            out.spread[rows] = real * (weights * measured.spread[near]).sum(1)
            out.library[rows] = real * (weights * measured.library[near]).sum(1)
            if n_genes:
                for name in ("residual", "fold"):
                    of_genes = getattr(measured, name)
                    getattr(out, name)[rows] = [
                        r * (w @ of_genes[k].astype(np.float32)) for r, w, k in zip(real, weights, near, strict=True)
                    ]
            part = asked.take(rows)
            prior = kernel.diagonal(part) + nugget
            out.prior_variance[rows] = self.signal * (replace(kernel, mean_variance=1.0).diagonal(part) + nugget)
            out.variance[rows] = np.maximum(self.signal * (prior - (weights * around.to_known).sum(1)), 0)
        return out

    def _length(self, novelty: Novelty, used: Floats) -> Floats:
        """Factor on the length of predictions that use the training conditions with these weights, `(q,)`."""
        n_contexts = len(np.unique(self.responses.conditions.context))
        if novelty != "context" or self.lengths is None or n_contexts < self.settings.min_contexts_for_length:
            return np.ones(len(used))
        return self.lengths.factor(used, self._n_latent * self.responses.conditions.noise, self.settings.length_bounds)

    # ---- saving -------------------------------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        """Tensors, numbers and text for saving, with the version of their format."""
        return {"version": VERSION, "retrieval": to_state(self)}

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> Retrieval:
        """What :meth:`state` gave.

        Raises
        ------
        ValueError
            If the state has another version.
        """
        found: Retrieval = from_saved(state, {})
        return found


def from_saved(state: Mapping[str, Any], kinds: Mapping[str, type]) -> Any:
    """What was saved, of the classes that make up a :class:`Retrieval` and `kinds`."""
    if (version := state.get("version")) != VERSION:
        raise ValueError(f"The saved retrieval has format {version!r}; this version reads {VERSION}.")
    return from_state(state["retrieval"], {**_KINDS, **kinds})


def _whole_populations(conditions: Conditions, n_rows: int, seed: int) -> NDArray[np.int64]:
    """Rows of a random choice of populations, about `n_rows` at most."""
    number = np.unique(conditions.population, return_inverse=True)[1].reshape(-1)
    n = int(number.max()) + 1
    n_chosen = max(1, n_rows * n // len(conditions))
    chosen = np.random.default_rng(seed).permutation(n)[:n_chosen]
    return np.flatnonzero(np.isin(number, chosen))


def _real_share(shift: Floats, noise: Floats) -> Floats:
    """How far shifts `(q, n_latent)` are kept, `(q,)`: whole, unless sampling noise may be more than half of them.

    `noise` is their variance per dimension, `(q,)`. The share that is not noise (positive-part James-Stein) is doubled:
    noise lies in all dimensions, a response in few, which should not be made shorter for it.
    """
    share: Floats = 1 - noise / np.maximum((shift**2).mean(1), 1e-12)
    return np.clip(2 * share, 0, 1)


def _median_distance(means: Floats) -> float:
    """Median distance between sites; that of unrelated points of unit variance where they are not apart."""
    between = np.sqrt(np.maximum(squared_distances(means, means), 0))[np.triu_indices(len(means), 1)]
    apart = between[between > 1e-6]
    return float(np.median(apart)) if apart.size else float(np.sqrt(2 * means.shape[1]))


_KINDS: dict[str, type] = {
    kind.__name__: kind
    for kind in (
        Conditions,
        DoseStrength,
        FeatureMoments,
        FoldEvidence,
        LearnedSimilarity,
        Lengths,
        ResponseSimilarity,
        Responses,
        Retrieval,
        RetrievalSettings,
        Widths,
    )
}
