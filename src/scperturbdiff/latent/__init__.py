"""The latent space: scvi-tools' count VAE, its plan and its batches."""

from scperturbdiff.latent._batches import CellDataModule
from scperturbdiff.latent._training import LatentTrainingPlan
from scperturbdiff.latent._vae import LatentVAE

__all__ = ["CellDataModule", "LatentTrainingPlan", "LatentVAE"]
