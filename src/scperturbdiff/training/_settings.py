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
    held_out
        Populations that are held out, at least, but no more than a third of them.
    min_held_out
        Held-out populations without which the network is not used: fewer say nothing about it.
    many_replicates
        Populations of a condition from which training shows the response retrieved from all of them, not the others'.
    """

    latent_passes: int = 15
    latent_min_steps: int = 1250
    latent_max_steps: int = 5000
    network_epochs: int = 30
    steps_per_epoch: int = 50
    held_out: int = 8
    min_held_out: int = 5
    many_replicates: int = 4


SETTINGS = TrainingSettings()
