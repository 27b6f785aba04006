"""The retrieved anchor: where the training populations say a perturbed population should lie.

Gaussian-process regression (kriging) of latent responses over conditions. Its kernel multiplies the similarity of
perturbations (shared components, features, doses, like responses) with the similarity of contexts (distance between
control means, like responses), so one rule serves a pair never seen together, a context or a perturbation never seen,
and a combination; the rules it replaces (mean shift, nearest context's shift, ridge on features, additive combination)
are limits of it. Its widths are chosen, for each way in which a condition can be new, by leaving out training
conditions in that way.
"""

from __future__ import annotations

import itertools
from dataclasses import asdict, dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from scperturbdiff.retrieval._conditions import Conditions, Floats, Novelty, n_components
from scperturbdiff.retrieval._covariance import response_alike, squared_distances
from scperturbdiff.retrieval._doses import DoseStrength
from scperturbdiff.retrieval._kernel import GRID, RESPONSE_SHARES, FeatureMoments, ResponseKernel, Widths
from scperturbdiff.retrieval._kriging import neighborhoods
from scperturbdiff.retrieval._selection import choose_widths
from scperturbdiff.retrieval._similarity import ResponseSimilarity, can_learn, learn_similarity

LEFT_OUT: tuple[Novelty, ...] = ("replicate", "pair", "context", "perturbation")
N_FOLDS = 5
GAIN_BOUNDS = (0.5, 1.5)
LIBRARY_VARIATION = 0.3
"""Coefficient of variation of library sizes between cells of a population, about."""
RESIDUAL_NUGGET = 0.3
"""What adds to the variance of a residual of the counts of one gene, which is known less well than the shift is."""


class AnchorPrediction(NamedTuple):
    """Retrieved response, standardised latent space.

    Mean shift `(n, n_latent)`, its variance per dimension `(n,)`, the log ratios of the spread of cells (standard
    deviation over all dimensions) and of their library sizes to those of the controls `(n,)`, and the log ratio per
    gene of what the decoder misses of the response `(n, n_genes)`, without genes where nothing is known of it or
    training conditions are left out.
    """

    mean: Floats
    variance: Floats
    spread: Floats
    library: Floats
    residual: Floats

    @classmethod
    def none(cls, n: int, n_latent: int, n_genes: int = 0) -> AnchorPrediction:
        """No response of `n` conditions."""
        return cls(np.zeros((n, n_latent)), np.zeros(n), np.zeros(n), np.zeros(n), np.zeros((n, n_genes)))


@dataclass(frozen=True)
class Calibration:
    """How predictions of left-out training conditions compare with what was measured.

    Attributes
    ----------
    rows
        Training conditions, `(n,)`.
    explained
        Products of predicted and measured shift, `(n,)`.
    predicted
        Squares of the predicted shift, `(n,)`.
    """

    rows: NDArray[np.int64]
    explained: Floats
    predicted: Floats


class ResponseAnchor(nn.Module):
    """Kriging of latent responses; see the module's docstring.

    Each prediction solves a system of the `n_neighbors` most correlated training conditions, so the cost grows linearly
    with their number. Averages of shifts that point in different directions are too short, and some contexts respond
    more strongly than others: the length of a prediction for a new context is corrected by what it should have been for
    similar contexts when those were left out. (Where the context is known, its own responses tell; correcting there
    made predictions worse.)

    It holds data, not weights: the state is saved with the module's through `get_extra_state`.
    """

    def __init__(self, n_neighbors: int = 192) -> None:
        super().__init__()
        self.n_neighbors = n_neighbors
        self._clear()

    def _clear(self) -> None:
        self.train_conditions: Conditions | None = None
        self.shifts: Floats | None = None
        self.spreads: Floats | None = None
        self.libraries: Floats | None = None
        self.library_slopes: dict[str, float] = {}
        self.residuals: NDArray[np.float16] | None = None
        self.median_distance = 1.0
        self.signal = 1.0
        self.moments: FeatureMoments | None = None
        self.widths: dict[str, Widths] = {}
        self.gains: dict[str, Calibration] = {}
        self.learned: ResponseSimilarity | None = None
        self.alike: Floats | None = None
        self.strength = DoseStrength()
        self._folds: list[ResponseSimilarity] = []
        self._fold: NDArray[np.int64] = np.empty(0, np.int64)

    def get_extra_state(self) -> dict[str, Any]:
        """State for saving: tensors and numbers, which torch loads without running code."""
        if self.train_conditions is None:
            return {}
        known = self.train_conditions
        return {
            "conditions": {k: torch.as_tensor(getattr(known, k)) for k in known.__dataclass_fields__},
            "shifts": torch.as_tensor(self.shifts),
            "spreads": torch.as_tensor(self.spreads),
            "libraries": _tensor(self.libraries),
            "library_slopes": self.library_slopes,
            "residuals": _tensor(self.residuals),
            "median_distance": self.median_distance,
            "signal": self.signal,
            "moments": None if self.moments is None else (torch.as_tensor(self.moments.centre), self.moments.size),
            "widths": {novelty: asdict(widths) for novelty, widths in self.widths.items()},
            "gains": {
                novelty: {k: torch.as_tensor(v) for k, v in vars(gain).items()} for novelty, gain in self.gains.items()
            },
            "learned": [similarity.state() for similarity in ([self.learned, *self._folds] if self.learned else [])],
            "fold": torch.as_tensor(self._fold),
            "alike": _tensor(self.alike),
            "strength": self.strength.state(),
        }

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Restore a saved state."""
        self._clear()
        if state:
            self.train_conditions = Conditions(**{k: np.asarray(v.cpu()) for k, v in state["conditions"].items()})
            self.shifts, self.spreads = np.asarray(state["shifts"].cpu()), np.asarray(state["spreads"].cpu())
            self.libraries, self.residuals = _array(state["libraries"]), _array(state["residuals"])
            self.library_slopes = dict(state["library_slopes"])
            self.median_distance, self.signal = state["median_distance"], state["signal"]
            if (moments := state["moments"]) is not None:
                self.moments = FeatureMoments(np.asarray(moments[0].cpu()), moments[1])
            self.widths = {novelty: Widths(**widths) for novelty, widths in state["widths"].items()}
            self.gains = {
                novelty: Calibration(**{k: np.asarray(v.cpu()) for k, v in gain.items()})
                for novelty, gain in state["gains"].items()
            }
            similarities = [ResponseSimilarity.from_state(s) for s in state["learned"]]
            self.learned, self._folds = (similarities[0], similarities[1:]) if similarities else (None, [])
            self._fold = np.asarray(state["fold"].cpu())
            self.alike = _array(state["alike"])
            self.strength = DoseStrength.from_state(state["strength"])

    @property
    def is_fitted(self) -> bool:
        """Whether there are training conditions to retrieve from."""
        return self.train_conditions is not None

    def fit(
        self,
        conditions: Conditions,
        shifts: Floats,
        features: Floats | None,
        spreads: Floats | None = None,
        n_tried: int = 256,
        seed: int = 0,
    ) -> None:
        """Keep the training conditions with their responses and choose the kernel's widths.

        Parameters
        ----------
        conditions
            Training populations.
        shifts
            Mean of the treated minus mean of the control cells, `(n, n_latent)`, standardised latent space.
        features
            Feature table of components, `(n_components, n_features)`, NaN rows where unknown.
        spreads
            Log ratio of the spread of treated to that of control cells, `(n,)`. Default: 0.
        n_tried
            Training conditions that are left out in turn when widths are chosen, at most.
        seed
            Chooses them.
        """
        self._clear()
        self.train_conditions, self.shifts = conditions, np.asarray(shifts, np.float64)
        self.spreads = np.zeros(len(conditions)) if spreads is None else np.asarray(spreads, np.float64)
        contexts = np.unique(conditions.context, return_index=True)[1]
        means = np.stack(
            [conditions.control_mean[conditions.context == c].mean(0) for c in conditions.context[contexts]]
        )
        between = np.sqrt(np.maximum(squared_distances(means, means), 0))[np.triu_indices(len(means), 1)]
        self.median_distance = float(np.median(between)) if between.size else 1.0
        self.signal = max(float((self.shifts**2).mean() - conditions.noise.mean()), 1e-3)
        tried = _tried(len(conditions), n_tried, seed)
        part, targets = conditions.take(tried), self.shifts[tried]
        self.moments = None if features is None else FeatureMoments.of(features, conditions)
        self.strength = DoseStrength.of(conditions, self.shifts)
        has_doses = np.unique(conditions.dose[conditions.component >= 0]).size > 1
        names = [n for n in GRID if features is not None or not n.startswith("feature")]
        names = [n for n in names if has_doses or not n.startswith("dose")]
        self.alike = response_alike(conditions, self.shifts)
        for novelty in LEFT_OUT:
            # what a new component does alone, hence what it is like, is not known
            unfit = self.alike is None or novelty == "perturbation"
            tunable = [n for n in names if not (unfit and n == "interaction")]
            start = Widths(feature_share=0.0 if features is None else 0.5)
            self.widths[novelty] = choose_widths(
                part, targets, self.signal, novelty, start, tunable, lambda widths: self._kernel(widths, features)
            )
        if can_learn(conditions):
            self._learn(means, tried, features, seed)
        left_out = self.leave_out("context", features, tried).mean
        self.gains["context"] = Calibration(tried, (left_out * targets).sum(1), (left_out**2).sum(1))
        self.widths["seen"] = self.widths["replicate"]

    def keep_counts(
        self,
        libraries: Floats,
        residuals: NDArray[np.float16],
        features: Floats | None = None,
        n_tried: int = 256,
        seed: int = 0,
    ) -> None:
        """Keep how the counts of the training conditions respond beside their latent vectors.

        Library sizes differ by sequencing depth, too, which does not carry over: their ratios are used as far as they
        predict those of training conditions left out (slope between 0 and 1, 1 without evidence).

        Parameters
        ----------
        libraries
            Log ratio of mean library sizes to those of the controls, `(n,)`.
        residuals
            Log ratio per gene of what the decoder misses of the response, `(n, n_genes)`.
        features, n_tried, seed
            See :meth:`fit`.
        """
        assert self.train_conditions is not None
        self.libraries, self.library_slopes = libraries, {}
        rows = _tried(len(libraries), n_tried, seed)
        weight = 1 / self.train_conditions.noise[rows]
        for novelty in LEFT_OUT:
            found = self.leave_out(novelty, features, rows).library
            # their own sampling noise decides how much evidence there must be
            doubt = LIBRARY_VARIATION**2 * len(rows)
            slope = ((weight * found * libraries[rows]).sum() + doubt) / ((weight * found**2).sum() + doubt)
            self.library_slopes[novelty] = float(np.clip(slope, 0, 1))
        self.residuals = residuals

    def _learn(self, means: Floats, tried: NDArray[np.int64], features: Floats | None, seed: int) -> None:
        """Learn similarities from responses and use them for new pairs as far as they help.

        How far is decided on pairs that the similarities were learned without.
        """
        assert self.train_conditions is not None and self.shifts is not None
        known, shifts, n = self.train_conditions, self.shifts, n_components(self.train_conditions)
        prior = self._kernel(self.widths["pair"], features).contexts(means, means)
        pair = known.pair_codes()
        self._fold = (np.random.default_rng(seed).permutation(pair.max() + 1) % N_FOLDS)[pair]
        folds = []
        for fold in range(N_FOLDS):
            kept = known.take(np.flatnonzero(self._fold != fold))
            if len(np.unique(kept.context)) < len(means):
                return  # a context whose every condition lies in one fold cannot be judged
            folds.append(learn_similarity(kept, shifts[self._fold != fold], prior, self.signal, n, seed))
        base = self.widths["pair"]
        best_error = ((self.leave_out("pair", features, tried).mean - shifts[tried]) ** 2).mean()
        self._folds, self.learned = folds, learn_similarity(known, shifts, prior, self.signal, n, seed)
        best = base
        for share, nugget in itertools.product(RESPONSE_SHARES, {base.nugget, min(GRID["nugget"])}):
            self.widths["pair"] = replace(base, response_share=share, nugget=nugget)
            error = ((self.leave_out("pair", features, tried).mean - shifts[tried]) ** 2).mean()
            if error < best_error * (1 - 1e-3):
                best, best_error = self.widths["pair"], error
        self.widths["pair"] = best

    def predict(self, conditions: Conditions, novelty: Novelty, features: Floats | None = None) -> AnchorPrediction:
        """Responses of new conditions, each using every training condition that `novelty` allows."""
        kernel = self._kernel(self.widths[novelty], features, self.learned)
        return self._predict(conditions, novelty, kernel, self._n_genes)

    def prior_variance(self, conditions: Conditions, novelty: Novelty, features: Floats | None = None) -> Floats:
        """Variance per dimension of the shifts before any training condition is looked at, `(n,)`."""
        kernel = self._kernel(self.widths[novelty], features, self.learned)
        return self.signal * (kernel.diagonal(conditions) + kernel.widths.nugget)

    def leave_out(
        self, novelty: Novelty, features: Floats | None = None, rows: NDArray[np.int64] | None = None
    ) -> AnchorPrediction:
        """Responses of the training conditions `rows` (default: all) as if each were new in the way of `novelty`."""
        assert self.train_conditions is not None
        rows = np.arange(len(self.train_conditions)) if rows is None else rows
        widths, own = self.widths[novelty], None if novelty == "seen" else rows
        if not widths.response_share:
            kernel = self._kernel(widths, features)
            return self._predict(self.train_conditions.take(rows), novelty, kernel, leave=own)
        out = AnchorPrediction.none(len(rows), self._n_latent)
        for fold, learned in enumerate(self._folds):  # similarities must not know the response that is left out
            at = np.flatnonzero(self._fold[rows] == fold)
            if len(at):
                part = self.train_conditions.take(rows[at])
                kernel = self._kernel(widths, features, learned)
                found = self._predict(part, novelty, kernel, leave=rows[at])
                for whole, piece in zip(out, found, strict=True):
                    whole[at] = piece
        return out

    def novelty(self, conditions: Conditions) -> list[Novelty]:
        """In which way each of `conditions` is new to the training conditions."""
        assert self.train_conditions is not None
        known = self.train_conditions
        out: list[Novelty] = []
        seen_components = np.unique(known.component)
        for i in range(len(conditions)):
            one = conditions.take(slice(i, i + 1))
            same_context = known.context == one.context[0]
            if not np.isin(one.component[0], np.append(seen_components, -1)).all():
                out.append("perturbation")
            elif not same_context.any():
                out.append("context")
            elif not (same_context & one.same_perturbation(known)[0]).any():
                out.append("pair")
            else:
                out.append("seen")
        return out

    @property
    def _n_latent(self) -> int:
        assert self.shifts is not None
        return self.shifts.shape[1]

    @property
    def _n_genes(self) -> int:
        return 0 if self.residuals is None else self.residuals.shape[1]

    def _kernel(
        self, widths: Widths, features: Floats | None, learned: ResponseSimilarity | None = None
    ) -> ResponseKernel:
        return ResponseKernel(widths, self.median_distance, features, self.moments, learned, self.alike, self.strength)

    def _predict(
        self,
        queries: Conditions,
        novelty: Novelty,
        kernel: ResponseKernel,
        n_genes: int = 0,
        leave: NDArray[np.int64] | None = None,
    ) -> AnchorPrediction:
        assert self.train_conditions is not None and self.shifts is not None and self.spreads is not None
        known, nugget = self.train_conditions, kernel.widths.nugget
        out = AnchorPrediction.none(len(queries), self._n_latent, n_genes)
        noise = nugget + known.noise / self.signal
        for around in neighborhoods(kernel, known, noise, queries, novelty, leave, self.n_neighbors):
            rows, near, weights = around.rows, around.near, around.weights()
            gain = self._gain(novelty, around.over_all(np.abs(weights), len(known)))
            out.mean[rows] = gain[:, None] * np.einsum("qk,qkd->qd", weights, self.shifts[near])
            out.spread[rows] = (weights * self.spreads[near]).sum(1)
            if self.libraries is not None:
                slope = self.library_slopes.get(novelty, 1.0)  # all of it where the condition itself was measured
                out.library[rows] = slope * (weights * self.libraries[near]).sum(1)
            if n_genes and self.residuals is not None:
                smoother = around.weights(RESIDUAL_NUGGET)
                out.residual[rows] = [
                    w @ self.residuals[n].astype(np.float32) for w, n in zip(smoother, near, strict=True)
                ]
            left = kernel.diagonal(queries.take(rows)) + nugget - (weights * around.to_known).sum(1)
            out.variance[rows] = np.maximum(self.signal * left, 0)
        return out

    def _gain(self, novelty: Novelty, used: Floats) -> Floats:
        """Factor on the length of predictions that use the training conditions with these weights, `(q,)`."""
        if novelty not in self.gains:
            return np.ones(len(used))
        assert self.train_conditions is not None
        found = self.gains[novelty]
        weight = used[:, found.rows]
        # sampling noise of the shifts decides how much evidence there must be
        doubt = weight @ (self._n_latent * self.train_conditions.noise[found.rows]) + 1e-12
        gain = (weight @ found.explained + doubt) / (weight @ found.predicted + doubt)
        return np.clip(gain, *GAIN_BOUNDS)


def _tried(n: int, n_tried: int, seed: int) -> NDArray[np.int64]:
    """Training conditions that are left out in turn: all `n`, or a sample of `n_tried`, in order."""
    return np.sort(np.random.default_rng(seed).permutation(n)[:n_tried])


def _tensor(values: NDArray[Any] | None) -> torch.Tensor | None:
    return None if values is None else torch.as_tensor(values)


def _array(values: torch.Tensor | None) -> NDArray[Any] | None:
    return None if values is None else np.asarray(values.cpu())
