"""The latent space: scvi-tools' count VAE, its plan, its batches, and a short training beside."""

from scperturbdiff.latent._batches import CellDataModule
from scperturbdiff.latent._short import train_shortly
from scperturbdiff.latent._training import LatentTrainingPlan
from scperturbdiff.latent._vae import LatentVAE

__all__ = ["CellDataModule", "LatentTrainingPlan", "LatentVAE", "train_shortly"]
