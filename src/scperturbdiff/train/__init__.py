"""Training: the two stages, their plans, and what they draw from."""

from scperturbdiff.train.callbacks import KeepBestGenerator
from scperturbdiff.train.plan import GeneratorTrainingPlan
from scperturbdiff.train.vae_plan import LatentTrainingPlan

__all__ = ["GeneratorTrainingPlan", "KeepBestGenerator", "LatentTrainingPlan"]
