"""Rules that learn from other contexts, other perturbations or single components."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, get_args

import numpy as np

from scperturbdiff.data import context_name, preview
from scperturbdiff.evaluation.baselines._base import Baseline, Change, Request

if TYPE_CHECKING:
    import pandas as pd

    from scperturbdiff.evaluation.baselines._profiles import Context, Doses, Floats


Contexts = Literal["mean", "nearest", "own"]


class NoChange(Baseline):
    """Control cells of the context, drawn anew: the perturbation does nothing."""

    def _change(self, request: Request) -> Change | None:
        return None


class _FromContexts(Baseline):
    """A rule that looks a perturbation's change up in training contexts."""

    def __init__(self, contexts: Contexts = "mean") -> None:
        if contexts not in get_args(Contexts):
            raise ValueError(f"contexts={contexts!r} must be one of {preview(get_args(Contexts))}.")
        self.contexts = contexts

    def __repr__(self) -> str:
        return f"{type(self).__name__}(contexts={self.contexts!r})"

    def _looked_up(self, request: Request, label: str, doses: Doses, fold: bool = False) -> Floats:
        """Change of one label at its doses, averaged over the contexts that the rule allows."""
        profiles = self.profiles_
        sources = self._sources(request, profiles.contexts_with(label))
        if not sources:
            of_what = "" if label == request.label else f" (component {label!r})"
            where = f"{of_what} in context {context_name(request.context)!r} with contexts={self.contexts!r}"
            raise self._unknown(request.label, profiles.labels, where)
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


def default_baselines(kind: str = "pairs", features: pd.DataFrame | None = None) -> dict[str, Baseline]:
    """Unfitted baselines that suit what is held out.

    Parameters
    ----------
    kind
        `Split.kind`: `"pairs"`, `"contexts"`, `"batches"`, `"perturbations"` or `"combinations"`.
    features
        One row per single perturbation; adds ridge regression and nearest neighbour for held-out perturbations.

    Returns
    -------
    Names and new instances, weakest first.

    Raises
    ------
    ValueError
        For another `kind`.
    """
    from scperturbdiff.evaluation.baselines._features import FeatureNearest, FeatureRidge

    found: dict[str, Baseline] = {"no_change": NoChange()}
    if kind in ("pairs", "perturbations", "combinations", "batches"):
        found["context_mean_shift"] = ContextMeanShift()
    if kind in ("pairs", "contexts", "batches"):
        found["perturbation_mean_shift"] = PerturbationMeanShift("mean")
        found["nearest_context_shift"] = PerturbationMeanShift("nearest")
        found["mean_fold_change"] = CountFoldChange("mean")
        found["nearest_fold_change"] = CountFoldChange("nearest")
    elif kind == "combinations":
        found["additive"] = Additive()
    elif kind != "perturbations":
        kinds = ("pairs", "contexts", "batches", "perturbations", "combinations")
        raise ValueError(f"kind={kind!r} must be one of {preview(kinds)}.")
    if features is not None and kind == "perturbations":
        found["feature_nearest"] = FeatureNearest(features)
        found["feature_ridge"] = FeatureRidge(features)
    return found
