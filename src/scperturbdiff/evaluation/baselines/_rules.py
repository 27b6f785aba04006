"""Rules that learn from other contexts, other perturbations, single components or features of these."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, get_args

import numpy as np

from scperturbdiff.arguments import check_choice, check_number
from scperturbdiff.data import FeatureTable, context_name, did_you_mean, preview
from scperturbdiff.evaluation.baselines._base import Baseline, Change, Request

if TYPE_CHECKING:
    import pandas as pd

    from scperturbdiff.evaluation.baselines._means import Context, Doses, Floats


Contexts = Literal["mean", "nearest", "own"]


class NoChange(Baseline):
    """Control cells of the context, drawn anew: the perturbation does nothing."""

    def _change(self, request: Request) -> Change | None:
        return None


class _FromContexts(Baseline):
    """A rule that looks a perturbation's change up in training contexts."""

    def __init__(self, contexts: Contexts = "mean") -> None:
        check_choice("contexts", contexts, get_args(Contexts))
        self.contexts = contexts

    def __repr__(self) -> str:
        return f"{type(self).__name__}(contexts={self.contexts!r})"

    def _looked_up(self, request: Request, label: str, doses: Doses, fold: bool = False) -> Floats:
        """Change of one label at its doses, averaged over the contexts that the rule allows."""
        profiles = self.profiles_
        elsewhere = profiles.contexts_with(label)
        sources = self._sources(request, elsewhere)
        if not sources:
            of_what = "" if label == request.label else f" (component {label!r})"
            where = f"{of_what} in context {context_name(request.context)!r} with contexts={self.contexts!r}"
            said = (
                f"{type(self).__name__} cannot predict perturbation {request.label!r}{where}: it has no training cells"
            )
            if label in profiles.labels:
                raise ValueError(f"{said} of it there; there are some in {preview(map(context_name, elsewhere), 30)}.")
            hint = did_you_mean(request.label, profiles.labels)
            raise ValueError(f"{said} to go by.{hint} Known: {preview(profiles.labels, 30)}.")
        return np.mean([profiles.shift(context, label, doses, fold=fold) for context in sources], axis=0)

    def _sources(self, request: Request, measured: list[Context]) -> list[Context]:
        if self.contexts == "own" or not self.context_keys:
            return [context for context in measured if context == request.context]
        others = [context for context in measured if context != request.context]
        if self.contexts == "nearest" and others:
            profiles = self.profiles_
            distance = [np.linalg.norm(profiles.log_means[profiles.controls[c]] - request.profile) for c in others]
            others = [others[int(np.argmin(distance))]]
        return others


class PerturbationMeanShift(_FromContexts):
    """Shift of the mean log-normalised expression that the perturbation has in other contexts.

    Parameters
    ----------
    contexts
        `"mean"`: over all other contexts with the perturbation, each counted once. `"nearest"`: the one whose mean
        log-normalised control profile is nearest (Euclidean) to that of the controls given. The context that is
        predicted is left out even where its treated cells were trained on. `"own"`: only that context.
    """

    def _change(self, request: Request) -> Change | None:
        return Change(self._looked_up(request, request.label, request.doses))


class CountFoldChange(_FromContexts):
    """Fold change of the mean of counts per 10,000 that the perturbation has in other contexts.

    Fold changes are taken after adding 1 to the means, and averaged as logarithms.

    Parameters
    ----------
    contexts
        As for :class:`PerturbationMeanShift`.
    """

    def __init__(self, contexts: Contexts = "nearest") -> None:
        super().__init__(contexts)

    def _change(self, request: Request) -> Change | None:
        return Change(self._looked_up(request, request.label, request.doses, fold=True), fold=True)


class Additive(_FromContexts):
    """Sum of the shifts of the components, each measured alone.

    For a single perturbation it is the shift of that perturbation.

    Parameters
    ----------
    contexts
        Where the components are looked up, as for :class:`PerturbationMeanShift`; the default `"own"` is the context
        that is predicted.
    """

    def __init__(self, contexts: Contexts = "own") -> None:
        super().__init__(contexts)

    def _change(self, request: Request) -> Change | None:
        shifts = [
            self._looked_up(request, self.labels_.name([part]), request.doses[i : i + 1])
            for i, part in enumerate(request.components)
        ]
        return Change(np.sum(shifts, axis=0))


class ContextMeanShift(Baseline):
    """Mean shift over all *other* perturbations within the context: what any perturbation does there."""

    def _change(self, request: Request) -> Change | None:
        profiles = self.profiles_
        others = [label for label in profiles.treated.get(request.context, {}) if label != request.label]
        if not others:
            known = sorted(context_name(context) for context in profiles.treated)
            raise ValueError(
                f"ContextMeanShift cannot predict context {context_name(request.context)!r}: no other perturbation has "
                f"cells there in training. Contexts with treated cells: {preview(known, 30)}."
            )
        return Change(np.mean([profiles.shift(request.context, label, request.doses) for label in others], axis=0))


class _FromFeatures(Baseline):
    """Shift as a function of features, learned within the context, or over all contexts where it has no treated cell.

    A combination has the sum of the features of its components. The perturbation that is predicted is left out of what
    the rule learns from, even where it was trained on.
    """

    def __init__(self, features: pd.DataFrame) -> None:
        self.features = FeatureTable.parse(features)

    def _vector(self, label: str) -> Floats | None:
        rows = self.features.rows(self.labels_.components(label)).astype(np.float64)
        return None if np.isnan(rows).any() else rows.sum(axis=0)

    def _examples(self, request: Request) -> tuple[Floats, Floats, Floats]:
        """Features and shifts of training perturbations and the features asked for; features are standardised."""
        asked = self._vector(request.label)
        if asked is None:
            absent = [part for part in request.components if part not in self.features.names]
            hint = did_you_mean(absent[0], self.features.names)
            raise ValueError(f"{type(self).__name__}: features have no row for {preview(absent)}.{hint}")
        profiles = self.profiles_
        vectors, shifts = [], []
        for label in profiles.labels:
            measured = profiles.contexts_with(label)
            if request.context in profiles.treated:
                measured = [context for context in measured if context == request.context]
            vector = self._vector(label)
            if vector is not None and label != request.label and measured:
                vectors.append(vector)
                shifts.append(np.mean([profiles.shift(context, label, request.doses) for context in measured], axis=0))
        if len(vectors) < 2:
            raise ValueError(
                f"{type(self).__name__} has {len(vectors)} training perturbations with features to learn "
                f"{request.label!r} from; it needs 2. Perturbations in training: {preview(profiles.labels, 30)}."
            )
        x = np.array(vectors)
        centre, spread = x.mean(axis=0), x.std(axis=0)
        scale = np.where(spread > 0, spread, 1.0) * np.sqrt(x.shape[1])
        return (x - centre) / scale, np.array(shifts), (asked - centre) / scale


class FeatureNearest(_FromFeatures):
    """Shift of the training perturbation with the nearest features (Euclidean, standardised).

    Parameters
    ----------
    features
        One row per single perturbation, indexed by name.
    """

    def _change(self, request: Request) -> Change | None:
        x, shifts, asked = self._examples(request)
        return Change(shifts[int(np.argmin(np.linalg.norm(x - asked, axis=1)))])


class FeatureRidge(_FromFeatures):
    """Ridge regression of the shift on standardised features, around the mean shift of the training perturbations.

    Parameters
    ----------
    features
        As for :class:`FeatureNearest`.
    alpha
        Penalty, positive. Features are scaled so that a perturbation's vector has a mean squared length of 1.
    """

    def __init__(self, features: pd.DataFrame, alpha: float = 1.0) -> None:
        super().__init__(features)
        check_number("alpha", alpha, "(0, inf)")
        self.alpha = alpha

    def _change(self, request: Request) -> Change | None:
        x, shifts, asked = self._examples(request)
        mean, weights = shifts.mean(axis=0), np.linalg.solve(x @ x.T + self.alpha * np.eye(len(x)), x @ asked)
        return Change(mean + weights @ (shifts - mean))


def default_baselines(kind: str = "pairs", features: pd.DataFrame | None = None) -> dict[str, Baseline]:
    """Unfitted baselines that suit what is held out: names and new instances, weakest first.

    Parameters
    ----------
    kind
        `Split.kind`: `"pairs"`, `"contexts"`, `"batches"`, `"perturbations"` or `"combinations"`.
    features
        One row per single perturbation; adds ridge regression and nearest neighbour for held-out perturbations.
    """
    kinds = ("pairs", "contexts", "batches", "perturbations", "combinations")
    check_choice("kind", kind, kinds)
    found: dict[str, Baseline] = {"no_change": NoChange()}
    if kind != "contexts":
        found["context_mean_shift"] = ContextMeanShift()
    if kind in ("pairs", "contexts", "batches"):
        found["perturbation_mean_shift"] = PerturbationMeanShift("mean")
        found["nearest_context_shift"] = PerturbationMeanShift("nearest")
        found["mean_fold_change"] = CountFoldChange("mean")
        found["nearest_fold_change"] = CountFoldChange("nearest")
    if kind == "batches":  # what the same context did in others
        found |= {"own_shift": PerturbationMeanShift("own"), "own_fold_change": CountFoldChange("own")}
    if kind == "combinations":
        found["additive"] = Additive()
    if kind == "perturbations" and features is not None:
        found |= {"feature_nearest": FeatureNearest(features), "feature_ridge": FeatureRidge(features)}
    return found
