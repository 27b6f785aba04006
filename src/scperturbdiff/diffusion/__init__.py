"""Functional diffusion: forward process, distances, scores, samplers, network, training."""

from scperturbdiff.diffusion._condition import Condition, PopulationTensors, Prior, StatePrior
from scperturbdiff.diffusion._distances import energy_distance, pairwise_distances
from scperturbdiff.diffusion._generator import Generator
from scperturbdiff.diffusion._network import EncodedControls, PopulationTransformer
from scperturbdiff.diffusion._perturbation import Components, PerturbationEncoder
from scperturbdiff.diffusion._populations import PopulationSampler
from scperturbdiff.diffusion._resume import RepeatableEpochs, restore_module, split_callbacks
from scperturbdiff.diffusion._samplers import Sampler, guide, sample
from scperturbdiff.diffusion._schedule import NoiseSchedule
from scperturbdiff.diffusion._scores import check_objective, functional_energy_score, mean_squared_error, squared_mmd
from scperturbdiff.diffusion._selection import (
    NetworkSelection,
    SelectionResult,
    is_finite,
    is_negative,
    relative_difference,
)
from scperturbdiff.diffusion._training import (
    SELECTION_METRIC,
    VALIDATION_METRIC,
    GeneratorTrainingPlan,
    StepsDataModule,
)

__all__ = [
    "Prior",
    "Components",
    "Condition",
    "EncodedControls",
    "Generator",
    "GeneratorTrainingPlan",
    "NetworkSelection",
    "SelectionResult",
    "SELECTION_METRIC",
    "NoiseSchedule",
    "PerturbationEncoder",
    "PopulationSampler",
    "PopulationTensors",
    "PopulationTransformer",
    "RepeatableEpochs",
    "Sampler",
    "StatePrior",
    "StepsDataModule",
    "VALIDATION_METRIC",
    "check_objective",
    "energy_distance",
    "functional_energy_score",
    "guide",
    "is_finite",
    "is_negative",
    "mean_squared_error",
    "pairwise_distances",
    "relative_difference",
    "restore_module",
    "sample",
    "split_callbacks",
    "squared_mmd",
]
