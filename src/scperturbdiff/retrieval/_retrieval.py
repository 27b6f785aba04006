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
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from scperturbdiff.retrieval._conditions import Conditions, Novelty, n_components
from scperturbdiff.retrieval._covariance import squared_distances
from scperturbdiff.retrieval._doses import DoseStrength
from scperturbdiff.retrieval._doubt import error_factors
from scperturbdiff.retrieval._evidence import FeatureEvidence, average_widths
from scperturbdiff.retrieval._fitted import FittedRetrieval
from scperturbdiff.retrieval._folds import FoldEvidence
from scperturbdiff.retrieval._kernel import GRID, RESPONSE_SHARES, FeatureMoments, Widths
from scperturbdiff.retrieval._kriging import choose_widths
from scperturbdiff.retrieval._lengths import Lengths
from scperturbdiff.retrieval._own_gene import OwnGene
from scperturbdiff.retrieval._responses import Responses
from scperturbdiff.retrieval._saved import VERSION, from_saved
from scperturbdiff.retrieval._settings import RetrievalSettings
from scperturbdiff.retrieval._similarity import LearnedSimilarity, ResponseSimilarity, can_learn, learn_similarity
from scperturbdiff.storage import to_state

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray

    from scperturbdiff.retrieval._conditions import Floats

LEFT_OUT: tuple[Novelty, ...] = ("replicate", "pair", "context", "perturbation")
NEW: tuple[Novelty, ...] = ("pair", "context", "perturbation")
"""Ways of being new in which more than a replicate is."""
FEWEST = 4
"""Perturbations, and contexts, of which parameters of the kernel are chosen, at least."""


@dataclass(frozen=True)
class Retrieval(FittedRetrieval):
    """Kriging of measured responses; see the module's docstring. An immutable value: :meth:`fit` makes one.

    Attributes are those of :class:`~scperturbdiff.retrieval._fitted.FittedRetrieval`.
    """

    @classmethod
    def fit(
        cls,
        responses: Responses,
        features: Floats | None = None,
        settings: RetrievalSettings | None = None,
        seed: int = 0,
        *,
        draft: bool = False,
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
        draft
            Find out only what predicts new contexts.
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
        found = replace(found, widths=found._choose_widths(tried, seed, ("context",) if draft else LEFT_OUT))
        if not draft and found.moments is not None:
            found = found._trust_features(tried)
        if draft:
            return replace(found, lengths=found._measure_lengths(tried))
        found = found._learn_similarity(means, tried, seed)
        found = replace(found, lengths=found._measure_lengths(tried))
        left_out = {novelty: found._explain(novelty, tried) for novelty in LEFT_OUT}
        doubt = {novelty: factors for novelty, (_, factors) in left_out.items() if factors is not None}
        return replace(found, explained={novelty: share for novelty, (share, _) in left_out.items()}, doubt=doubt)

    def _choose_widths(self, tried: NDArray[np.int64], seed: int, ways: tuple[Novelty, ...]) -> dict[Novelty, Widths]:
        conditions, shift = self.responses.conditions, self.responses.shift
        has_doses = np.unique(conditions.dose[conditions.component >= 0]).size > 1
        names = [n for n in GRID if self.features is not None or not n.startswith("feature")]
        names = [n for n in names if has_doses or not n.startswith("dose")]
        start = Widths(feature_share=0.0 if self.features is None else 0.5)
        whole = whole_perturbations(conditions, self.settings.n_left_out, seed)
        # features need many perturbations, all else whole ones, which is what will be at hand
        rows = {w: tried if w == "perturbation" else whole for w in ways}
        widths = dict[Novelty, Widths]()
        for w, at in rows.items():
            own = w == "replicate" and conditions.has_replicates
            chosen = [n for n in names if own or n != "own_share"]
            widths[w] = choose_widths(conditions.take(at), shift[at], self.signal, w, start, chosen, self._kernel)
        if self._n_contexts < 3:  # what is left has one context: every width predicts the same
            widths["context"] = start
        if (seen := widths.get("replicate")) is not None:
            if not conditions.has_replicates:  # what nothing else explains is a condition's own response, not noise
                seen = replace(seen, own_share=seen.nugget, nugget=0.0)
            widths["seen"] = seen
        return widths

    def _trust_features(self, tried: NDArray[np.int64]) -> Retrieval:
        """Use features for new perturbations as far as those that act and are left out speak for them."""
        part, targets = self.responses.conditions.take(tried), self.responses.shift[tried]
        start = self.widths["perturbation"]
        widths, evidence = average_widths(
            part, targets, self.signal, start, self._kernel, self.settings.feature_min_act
        )
        return replace(self, widths={**self.widths, "perturbation": widths}, evidence=evidence)

    def _learn_similarity(self, means: Floats, tried: NDArray[np.int64], seed: int) -> Retrieval:
        """Learn similarities from responses and use them for new pairs as far as they help.

        How far is decided on pairs that the similarities were learned without.
        """
        known, shift, n = self.responses.conditions, self.responses.shift, n_components(self.responses.conditions)
        if not can_learn(known, self.settings.max_contexts):
            return self
        # a prior of full rank: from contexts that are all alike none could be learned to be unlike
        widths = replace(
            self.widths["pair"], context_share=max(self.widths["pair"].context_share, self.settings.prior_context_share)
        )
        prior = replace(self._kernel(widths), mean_variance=1.0).contexts(means, means)
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
        error = ((self.leave_out(novelty, rows, with_variance=False).shift - self.responses.shift[rows]) ** 2).mean(1)
        return float(np.average(error, weights=self.responses.conditions.mass[rows]))

    def _measure_lengths(self, tried: NDArray[np.int64]) -> Lengths:
        left_out = self.leave_out("context", tried, with_variance=False).shift
        mass = self.responses.conditions.mass[tried]
        explained = (left_out * self.responses.shift[tried]).sum(1)
        return Lengths(tried, mass * explained, mass * (left_out**2).sum(1))

    def _can_be_left_out(
        self, novelty: Novelty, rows: NDArray[np.int64]
    ) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
        """Those of `rows` of which something is known without them, and whether something with the same controls is."""
        known = self.responses.conditions
        if not self.rehearsed(novelty):
            return rows[:0], np.zeros(0, bool)
        left = ~known.take(rows).barred(known, novelty)
        with_same_controls = self._agree(known.control_groups.code, rows, left)
        kept: NDArray[np.bool_] = np.asarray(left.any(axis=1))
        if novelty == "replicate":  # another population of the same condition must be there
            kept = self._agree(known.pair_codes(), rows, left)
        return rows[kept], with_same_controls[kept]

    @staticmethod
    def _agree(codes: NDArray[np.int64], rows: NDArray[np.int64], left: NDArray[np.bool_]) -> NDArray[np.bool_]:
        """Which of `rows` have the code of something that is `left`, `(len(rows), n)`."""
        return np.asarray((left & (codes[rows][:, None] == codes)).any(axis=1))

    def _explain(self, novelty: Novelty, tried: NDArray[np.int64]) -> tuple[float, Floats | None]:
        """Share of the shifts that is predicted without them, and directions of the errors; none of too few."""
        rows, with_same_controls = self._can_be_left_out(novelty, tried)
        conditions, shift = self.responses.conditions.take(rows), self.responses.shift[rows]
        n = len(np.unique(conditions.context if novelty == "context" else conditions.population))
        noise = np.where(with_same_controls, conditions.treated_noise, conditions.noise)
        found, factors = self.leave_out(novelty, rows, with_variance=novelty in NEW), None
        if novelty in NEW and n >= self.settings.doubt_min:
            factors = error_factors(shift - found.shift, shift, noise, found.variance, n, self.settings)
        mass = conditions.mass
        size = mass @ ((shift**2).sum(1) - self._n_latent * conditions.noise)
        error = mass @ (((found.shift - shift) ** 2).sum(1) - self._n_latent * noise)
        return float("nan") if size <= 0 else float(1 - max(error, 0) / size), factors

    @property
    def notes(self) -> tuple[str, ...]:
        """What was done or left out because of the data, in sentences."""
        return tuple(filter(None, (*self._of_similarity, self._of_features, str(self.own_gene))))

    @property
    def _of_features(self) -> str:
        if self.features is None or self.moments is not None:
            return str(self.evidence)
        return (
            "Features are not used: fewer than two training perturbations have features, or these do not differ. For a "
            "new perturbation the mean of the others is used."
        )

    @property
    def _of_similarity(self) -> tuple[str, ...]:
        if self._n_contexts > self.settings.max_contexts:
            return (
                f"Similarities were not learned from responses: {self._n_contexts} contexts, more than "
                f"{self.settings.max_contexts}.",
            )
        if self.similarity is None:
            return ("Similarities were not learned from responses: too few conditions.",)
        share = self.widths["pair"].response_share
        if not share:
            return ("Similarities learned from responses did not help for pairs that were left out, and are not used.",)
        return (f"For new pairs {share:.0%} of the similarity is learned from responses.",)

    # ---- saving -------------------------------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        """Tensors, numbers and text for saving, with the version of their format."""
        return {"version": VERSION, "retrieval": to_state(self)}

    @classmethod
    def from_state(cls, state: Mapping[str, Any], n_latent: int | None = None, n_genes: int | None = None) -> Retrieval:
        """What :meth:`state` gave.

        Raises
        ------
        ValueError
            If the state has another version, or is not that of a retrieval for so many latent dimensions and genes.
        """
        found: Retrieval = from_saved(state, KINDS, n_latent, n_genes)
        return found


def _whole_populations(conditions: Conditions, n_rows: int, seed: int) -> NDArray[np.int64]:
    """Rows of a random choice of populations, about `n_rows` at most."""
    number = np.unique(conditions.population, return_inverse=True)[1].reshape(-1)
    n = int(number.max()) + 1
    n_chosen = max(1, n_rows * n // len(conditions))
    chosen = np.random.default_rng(seed).permutation(n)[:n_chosen]
    return np.flatnonzero(np.isin(number, chosen))


def whole_perturbations(conditions: Conditions, n_rows: int, seed: int) -> NDArray[np.int64]:
    """Rows of all conditions of a random choice of components, about `n_rows`.

    A random choice of populations would leave few of each perturbation, which say nothing of how alike contexts are.
    With many contexts, of a few components in some of the contexts.
    """
    rng, n = np.random.default_rng(seed), n_components(conditions)
    component = np.where(conditions.component < 0, n, conditions.component)  # of none: chosen at once
    last = np.append(rng.permutation(n), -1)[component].max(axis=1)
    names, counts = np.unique(last, return_counts=True)
    n_names = max(int(np.searchsorted(np.cumsum(counts), n_rows, "right")), min(FEWEST, len(names)))
    chosen = last <= names[n_names - 1]
    if chosen.sum() > n_rows:
        contexts, context = np.unique(conditions.context, return_inverse=True)
        order = rng.permutation(len(contexts))[context.reshape(-1)]
        size = np.cumsum(np.bincount(order[chosen], minlength=len(contexts)))
        chosen &= order < max(int(np.searchsorted(size, n_rows, "right")), min(FEWEST, len(contexts)))
    return np.flatnonzero(chosen)


def _median_distance(means: Floats) -> float:
    """Median distance between sites; that of unrelated points of unit variance where they are not apart."""
    between = np.sqrt(np.maximum(squared_distances(means, means), 0))[np.triu_indices(len(means), 1)]
    apart = between[between > 1e-6]
    return float(np.median(apart)) if apart.size else float(np.sqrt(2 * means.shape[1]))


KINDS: dict[str, type] = {
    kind.__name__: kind
    for kind in (
        Conditions,
        DoseStrength,
        FeatureEvidence,
        FeatureMoments,
        FoldEvidence,
        LearnedSimilarity,
        Lengths,
        OwnGene,
        ResponseSimilarity,
        Responses,
        Retrieval,
        RetrievalSettings,
        Widths,
    )
}
"""Classes of which a saved retrieval is made."""
