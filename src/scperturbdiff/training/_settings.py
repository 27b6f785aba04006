"""The constants of training, in one place."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class TrainingSettings:
    """How long the stages are trained and what is held out.

    Attributes
    ----------
    latent_passes, latent_min_steps, latent_max_steps
        Steps of the first stage: so many passes over the cells, within these bounds.
    network_epochs, steps_per_epoch
        Length of the second stage.
    min_populations
        Populations from which on some are held out.
    held_out
        How many at least: five say too little of a network.
    many_replicates
        Populations of a condition from which training shows the response retrieved from all of them, not the others'.
    """

    latent_passes: int = 15
    latent_min_steps: int = 1250
    latent_max_steps: int = 5000
    network_epochs: int = 30
    steps_per_epoch: int = 50
    min_populations: int = 4
    held_out: int = 8
    many_replicates: int = 4


SETTINGS = TrainingSettings()
