"""Simple predictors that any model has to beat, with the model's manner of `fit` and `predict`."""

from scperturbdiff.evaluation.baselines._base import Baseline
from scperturbdiff.evaluation.baselines._rules import (
    Additive,
    ContextMeanShift,
    CountFoldChange,
    FeatureNearest,
    FeatureRidge,
    NoChange,
    PerturbationMeanShift,
    default_baselines,
)

__all__ = [
    "Additive",
    "Baseline",
    "ContextMeanShift",
    "CountFoldChange",
    "FeatureNearest",
    "FeatureRidge",
    "NoChange",
    "PerturbationMeanShift",
    "default_baselines",
]
