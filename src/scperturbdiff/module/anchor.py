"""The retrieved anchor: where the training populations say a perturbed population should lie.

Gaussian-process regression (kriging) of latent mean shifts over conditions. Its kernel multiplies the similarity of
perturbations (shared components, features, doses) with the similarity of contexts (distance between control means), so
one rule serves a pair never seen together, a context or a perturbation never seen, and a combination; the rules it
replaces (mean shift, nearest context's shift, ridge on features, additive combination) are limits of it. Its widths
are chosen, for each way in which a condition can be new, by leaving out training conditions in that way.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

Novelty = Literal["seen", "replicate", "pair", "context", "perturbation"]
"""How a condition is new: not at all; this population; the perturbation in this context; the context; a component."""
NOVELTIES: tuple[Novelty, ...] = get_args(Novelty)
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Conditions:
    """What the kernel compares: `n` populations.

    Attributes
    ----------
    control_mean
        Mean of the matched controls in the standardised latent space, `(n, n_latent)`.
    component
        Rows of the component table, `(n, c)`, -1 for none.
    dose
        Log-scaled dose of each component, `(n, c)`.
    context
        Label of the context, `(n,)`.
    noise
        Sampling variance of the mean shift per dimension, about `1 / n_treated + 1 / n_controls`, `(n,)`.
    """

    control_mean: Floats
    component: NDArray[np.int64]
    dose: Floats
    context: NDArray[np.int64]
    noise: Floats

    def __len__(self) -> int:
        return len(self.context)

    def take(self, rows: NDArray[np.integer] | slice) -> Conditions:
        """The conditions of `rows`."""
        return Conditions(*(getattr(self, name)[rows] for name in self.__dataclass_fields__))

    def same_perturbation(self, other: Conditions) -> NDArray[np.bool_]:
        """Where the sets of components and doses agree, `(len(self), len(other))`."""
        width = max(self.component.shape[1], other.component.shape[1])
        mine, theirs = (np.sort(_tokens(c, width), axis=1) for c in (self, other))
        return (mine[:, None, :] == theirs[None, :, :]).all(-1)

    def share_component(self, other: Conditions) -> NDArray[np.bool_]:
        """Where at least one component is common, `(len(self), len(other))`."""
        a, b = self.component[:, None, :, None], other.component[None, :, None, :]
        return ((a == b) & (a >= 0)).any((-1, -2))

    def excluded(self, other: Conditions, novelty: Novelty) -> NDArray[np.bool_]:
        """Which of `other` may not be used for conditions that are new in the way of `novelty`."""
        if novelty in ("seen", "replicate"):
            return np.zeros((len(self), len(other)), bool)
        same_context = self.context[:, None] == other.context[None, :]
        if novelty == "context":
            return same_context
        if novelty == "pair":
            return same_context & self.same_perturbation(other)
        return self.share_component(other)


def _tokens(conditions: Conditions, width: int) -> Floats:
    """One number for each component with its dose, `(n, width)`; equal where both agree, -1 where there is none."""
    tokens = np.where(conditions.component >= 0, conditions.component + np.arctan(conditions.dose) / np.pi, -1.0)
    return np.pad(tokens, ((0, 0), (0, width - tokens.shape[1])), constant_values=-1.0)


class AnchorPrediction(NamedTuple):
    """Mean shift `(n, n_latent)` and its variance per dimension `(n,)`, in the standardised latent space."""

    mean: Floats
    variance: Floats


class FeatureMoments(NamedTuple):
    """Mean `(n_features,)` of the features of training components and their mean squared distance from it.

    Of training components only, so that a prediction does not depend on what else is asked for.
    """

    centre: Floats
    size: float

    @classmethod
    def of(cls, features: Floats, conditions: Conditions) -> FeatureMoments | None:
        """Moments of the components of `conditions` that have features; `None` where none has."""
        rows = features[np.unique(conditions.component[conditions.component >= 0])]
        rows = np.asarray(rows[np.isfinite(rows).all(axis=1)], np.float64)
        if not len(rows):
            return None
        centre = rows.mean(axis=0)
        return cls(centre, max(float(((rows - centre) ** 2).sum(axis=1).mean()), 1e-12))


@dataclass(frozen=True)
class Widths:
    """Parameters of the kernel.

    Attributes
    ----------
    context_scale
        Length scale of the similarity of contexts, in units of the median distance between contexts.
    context_share
        Share of a response that depends on the context (the rest is common to all contexts).
    common_share
        Share of a response that all perturbations have in common.
    feature_share
        Share of a component's response that its features explain.
    feature_linear
        Share of that in which responses are linear in features; the rest is alike where features are alike.
    feature_scale
        Length scale of the latter, in units of cosine distance.
    dose_scale
        Length scale of the similarity of doses, in doublings.
    nugget
        Variance between populations that nothing explains, relative to the signal.
    """

    context_scale: float = 0.5
    context_share: float = 0.8
    common_share: float = 0.2
    feature_share: float = 0.0
    feature_linear: float = 0.5
    feature_scale: float = 0.25
    dose_scale: float = 3.0
    nugget: float = 0.05


GRID: dict[str, tuple[float, ...]] = {
    "context_scale": (0.15, 0.25, 0.4, 0.7, 1.2, 3.0),
    "context_share": (0.0, 0.3, 0.6, 0.9, 1.0),
    "common_share": (0.0, 0.1, 0.3, 0.6),
    "feature_share": (0.0, 0.3, 0.6, 0.9, 0.99),
    "feature_linear": (0.0, 0.5, 1.0),
    "feature_scale": (0.1, 0.25, 0.5, 1.0),
    "dose_scale": (1.0, 2.0, 3.0, 5.0, 8.0),
    "nugget": (0.01, 0.05, 0.2, 0.5),
}
"""Values tried for each parameter of the kernel."""


class ResponseAnchor(nn.Module):
    """Kriging of latent mean shifts; see the module's docstring.

    Each prediction solves a system of the `n_neighbors` most correlated training conditions, so the cost grows linearly
    with their number. It holds data, not weights: the state is saved with the module's through `get_extra_state`.
    """

    def __init__(self, n_neighbors: int = 192) -> None:
        super().__init__()
        self.n_neighbors = n_neighbors
        self._clear()

    def _clear(self) -> None:
        self.train_conditions: Conditions | None = None
        self.shifts: Floats | None = None
        self.median_distance = 1.0
        self.signal = 1.0
        self.moments: FeatureMoments | None = None
        self.widths: dict[str, Widths] = {}

    def get_extra_state(self) -> dict[str, Any]:
        """State for saving: tensors and numbers, which torch loads without running code."""
        if self.train_conditions is None:
            return {}
        return {
            "conditions": {
                k: torch.as_tensor(getattr(self.train_conditions, k))
                for k in self.train_conditions.__dataclass_fields__
            },
            "shifts": torch.as_tensor(self.shifts),
            "median_distance": self.median_distance,
            "signal": self.signal,
            "moments": None if self.moments is None else (torch.as_tensor(self.moments.centre), self.moments.size),
            "widths": {novelty: asdict(widths) for novelty, widths in self.widths.items()},
        }

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Restore a saved state."""
        self._clear()
        if state:
            self.train_conditions = Conditions(**{k: np.asarray(v.cpu()) for k, v in state["conditions"].items()})
            self.shifts = np.asarray(state["shifts"].cpu())
            self.median_distance, self.signal = state["median_distance"], state["signal"]
            if (moments := state["moments"]) is not None:
                self.moments = FeatureMoments(np.asarray(moments[0].cpu()), moments[1])
            self.widths = {novelty: Widths(**widths) for novelty, widths in state["widths"].items()}

    @property
    def is_fitted(self) -> bool:
        """Whether there are training conditions to retrieve from."""
        return self.train_conditions is not None

    def fit(
        self, conditions: Conditions, shifts: Floats, features: Floats | None, n_tried: int = 256, seed: int = 0
    ) -> None:
        """Keep the training conditions with their shifts and choose the kernel's widths.

        Parameters
        ----------
        conditions
            Training populations.
        shifts
            Mean of the treated minus mean of the control cells, `(n, n_latent)`, standardised latent space.
        features
            Feature table of components, `(n_components, n_features)`, NaN rows where unknown.
        n_tried
            Training conditions that are left out in turn when widths are chosen, at most.
        seed
            Chooses them.
        """
        self.train_conditions, self.shifts = conditions, np.asarray(shifts, np.float64)
        contexts = np.unique(conditions.context, return_index=True)[1]
        means = np.stack(
            [conditions.control_mean[conditions.context == c].mean(0) for c in conditions.context[contexts]]
        )
        between = np.sqrt(np.maximum(_squared_distances(means, means), 0))[np.triu_indices(len(means), 1)]
        self.median_distance = float(np.median(between)) if between.size else 1.0
        self.signal = max(float((self.shifts**2).mean() - conditions.noise.mean()), 1e-3)
        tried = np.sort(np.random.default_rng(seed).permutation(len(conditions))[:n_tried])
        part, targets = conditions.take(tried), self.shifts[tried]
        self.moments = None if features is None else FeatureMoments.of(features, conditions)
        has_doses = np.unique(conditions.dose[conditions.component >= 0]).size > 1
        names = [n for n in GRID if features is not None or not n.startswith("feature")]
        names = [n for n in names if has_doses or n != "dose_scale"]
        for novelty in ("replicate", "pair", "context", "perturbation"):
            self.widths[novelty] = self._choose(part, targets, novelty, names, features)
        self.widths["seen"] = self.widths["replicate"]

    def _choose(
        self, part: Conditions, targets: Floats, novelty: Novelty, names: list[str], features: Floats | None
    ) -> Widths:
        """Coordinate descent over `GRID` on the error for conditions left out in the way of `novelty`."""
        left_out = part.excluded(part, novelty) | np.eye(len(part), dtype=bool)
        patterns, pattern = np.unique(left_out, axis=0, return_inverse=True)
        best, best_error = Widths(feature_share=0.0 if features is None else 0.5), np.inf
        for _ in range(2):
            for name in names:
                for value in GRID[name]:
                    widths = replace(best, **{name: value})
                    if widths == best and np.isfinite(best_error):
                        continue
                    error = self._left_out_error(part, targets, widths, features, patterns, pattern.reshape(-1))
                    if error < best_error * (1 - 1e-3):
                        best, best_error = widths, error
        return best

    def _left_out_error(
        self,
        part: Conditions,
        targets: Floats,
        widths: Widths,
        features: Floats | None,
        patterns: NDArray[np.bool_],
        pattern: NDArray[np.int64],
    ) -> float:
        """Mean squared error when each condition and what it excludes are left out (closed form, one inverse)."""
        similarity = _component_similarity(features, _n_components(part), widths, self.moments)
        covariance = self._kernel(part, part, similarity, widths)
        covariance[np.diag_indices(len(part))] += widths.nugget + part.noise / self.signal
        precision = np.linalg.inv(covariance)
        weighted = precision @ targets
        error = np.zeros(len(part))
        for number, out in enumerate(patterns):
            members = np.flatnonzero(out)
            residual = np.linalg.solve(precision[np.ix_(members, members)], weighted[members])
            wanted = pattern[members] == number
            error[members[wanted]] = (residual[wanted] ** 2).mean(1)
        return float(error.mean())

    def predict(self, conditions: Conditions, novelty: Novelty, features: Floats | None = None) -> AnchorPrediction:
        """Shifts of new conditions, each using every training condition that `novelty` allows."""
        return self._predict(conditions, novelty, self.widths[novelty], features)

    def prior_variance(self, conditions: Conditions, novelty: Novelty, features: Floats | None = None) -> Floats:
        """Variance per dimension of the shifts before any training condition is looked at, `(n,)`."""
        widths = self.widths[novelty]
        similarity = _component_similarity(features, _n_components(conditions), widths, self.moments)
        parts = (conditions.take(slice(i, i + 1)) for i in range(len(conditions)))
        prior = np.array([self._kernel(part, part, similarity, widths)[0, 0] for part in parts])
        return self.signal * (prior + widths.nugget)

    def leave_out(self, novelty: Novelty, features: Floats | None = None) -> AnchorPrediction:
        """Shifts of the training conditions as if each were new in the way of `novelty`."""
        assert self.train_conditions is not None
        n = len(self.train_conditions)
        own = None if novelty == "seen" else np.arange(n)
        return self._predict(self.train_conditions, novelty, self.widths[novelty], features, leave=own)

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

    def _predict(
        self,
        queries: Conditions,
        novelty: Novelty,
        widths: Widths,
        features: Floats | None,
        leave: NDArray[np.int64] | None = None,
        chunk: int = 128,
    ) -> AnchorPrediction:
        assert self.train_conditions is not None and self.shifts is not None
        known = self.train_conditions
        similarity = _component_similarity(features, _n_components(queries, known), widths, self.moments)
        mean, variance = np.zeros((len(queries), self.shifts.shape[1])), np.zeros(len(queries))
        k = min(self.n_neighbors, len(known))
        shared = self._kernel(known, known, similarity, widths) if k == len(known) else None
        for start in range(0, len(queries), chunk):
            rows = slice(start, min(start + chunk, len(queries)))
            part = queries.take(rows)
            covariance = self._kernel(part, known, similarity, widths)
            forbidden = part.excluded(known, novelty)
            if leave is not None:
                forbidden[np.arange(len(part)), leave[rows]] = True
            covariance = np.where(forbidden, 0.0, covariance)
            near = (
                np.argpartition(-np.abs(covariance), k - 1, axis=1)[:, :k]
                if k < len(known)
                else np.tile(np.arange(k), (len(part), 1))
            )
            to_known = np.take_along_axis(covariance, near, axis=1)
            if shared is not None:
                system = np.repeat(shared[None], len(part), axis=0)
            else:
                system = np.stack([self._kernel(known.take(n), known.take(n), similarity, widths) for n in near])
            # what may not be used gets endless noise, hence no weight
            own_noise = (
                widths.nugget + known.noise[near] / self.signal + 1e9 * np.take_along_axis(forbidden, near, axis=1)
            )
            system[:, np.arange(k), np.arange(k)] += own_noise
            weights = np.linalg.solve(system, to_known[..., None])[..., 0]
            mean[rows] = np.einsum("qk,qkd->qd", weights, self.shifts[near])
            prior = np.array(
                [
                    self._kernel(part.take(slice(i, i + 1)), part.take(slice(i, i + 1)), similarity, widths)[0, 0]
                    for i in range(len(part))
                ]
            )
            variance[rows] = self.signal * (prior + widths.nugget - (weights * to_known).sum(1))
        return AnchorPrediction(mean, np.maximum(variance, 0))

    def _kernel(self, a: Conditions, b: Conditions, similarity: Floats, widths: Widths) -> Floats:
        """Prior covariance of the shifts of `a` and `b`, relative to the signal, `(len(a), len(b))`."""
        squared = np.maximum(_squared_distances(a.control_mean, b.control_mean), 0)
        near = np.exp(-0.5 * squared / (widths.context_scale * self.median_distance) ** 2)
        contexts = (1 - widths.context_share) + widths.context_share * near
        return contexts * _perturbation_kernel(a, b, similarity, widths)


def _squared_distances(a: Floats, b: Floats) -> Floats:
    return (a**2).sum(1)[:, None] + (b**2).sum(1)[None, :] - 2 * a @ b.T


def _n_components(*conditions: Conditions) -> int:
    return 1 + max(int(c.component.max(initial=0)) for c in conditions)


def _component_similarity(features: Floats | None, n: int, widths: Widths, moments: FeatureMoments | None) -> Floats:
    """Prior covariance of the responses to single components, `(n, n)`: its own part and the part features share."""
    names, share = np.eye(n), widths.feature_share
    if features is None or moments is None or share == 0:
        return names
    table = np.asarray(features, np.float64)[:n]
    known: NDArray[np.bool_] = np.asarray(np.isfinite(table).all(axis=1))
    both = known[:, None] & known[None, :]
    unit = np.where(known[:, None], table, 0.0)
    unit = unit / np.maximum(np.linalg.norm(unit, axis=1, keepdims=True), 1e-12)
    alike = np.exp((unit @ unit.T - 1) / widths.feature_scale)
    centred = np.where(known[:, None], table - moments.centre, 0.0)
    linear = centred @ centred.T / moments.size
    similar = np.where(both, widths.feature_linear * linear + (1 - widths.feature_linear) * alike, names)
    return (1 - share) * names + share * similar


def _perturbation_kernel(a: Conditions, b: Conditions, similarity: Floats, widths: Widths) -> Floats:
    """Covariance of the responses to whole perturbations, `(len(a), len(b))`: additive over components."""
    common = widths.common_share
    out = common * _near(_mean_dose(a)[:, None] - _mean_dose(b)[None, :], widths.dose_scale)
    for i in range(a.component.shape[1]):
        for j in range(b.component.shape[1]):
            first, second = a.component[:, i, None], b.component[None, :, j]
            near_dose = _near(a.dose[:, i, None] - b.dose[None, :, j], widths.dose_scale)
            out += (1 - common) * ((first >= 0) & (second >= 0)) * similarity[first, second] * near_dose
    return out


def _near(difference: Floats, scale: float) -> Floats:
    return np.exp(-0.5 * (difference / scale) ** 2)


def _mean_dose(conditions: Conditions) -> Floats:
    there = conditions.component >= 0
    mean: Floats = (conditions.dose * there).sum(1) / np.maximum(there.sum(1), 1)
    return mean
