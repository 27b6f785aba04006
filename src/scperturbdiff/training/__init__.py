"""Training: two stages, each built from the module and the cells; the model runs them."""

from scperturbdiff.training._checkpoints import Checkpoints
from scperturbdiff.training._fingerprint import fingerprint
from scperturbdiff.training._latent import Stage, default_vae_epochs, latent_stage, plan_epochs
from scperturbdiff.training._parallel import Processes
from scperturbdiff.training._populations import (
    check_shared,
    count_replicates,
    have_features,
    rehearsed_priors,
    split_populations,
)
from scperturbdiff.training._safe import all_or_nothing, check_finite, finite_vae
from scperturbdiff.training._settings import SETTINGS, TrainingSettings
from scperturbdiff.training._stages import PopulationTraining
from scperturbdiff.training._unseen import ShortTraining

__all__ = [
    "SETTINGS",
    "Checkpoints",
    "PopulationTraining",
    "Processes",
    "ShortTraining",
    "Stage",
    "TrainingSettings",
    "all_or_nothing",
    "check_finite",
    "check_shared",
    "count_replicates",
    "default_vae_epochs",
    "fingerprint",
    "finite_vae",
    "latent_stage",
    "plan_epochs",
    "rehearsed_priors",
    "split_populations",
    "have_features",
]
