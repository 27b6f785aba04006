"""The mathematics of functional diffusion, on plain tensors: forward process, distances, scores, samplers."""

from scperturbdiff.diffusion.distances import energy_distance, pairwise_distances
from scperturbdiff.diffusion.samplers import guide, sample
from scperturbdiff.diffusion.schedule import NoiseSchedule
from scperturbdiff.diffusion.scores import functional_energy_score, mean_squared_error, squared_mmd

__all__ = [
    "NoiseSchedule",
    "energy_distance",
    "functional_energy_score",
    "guide",
    "mean_squared_error",
    "pairwise_distances",
    "sample",
    "squared_mmd",
]
