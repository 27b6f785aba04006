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
        Conditions that are held out, at least, but no more than a third of them.
    min_held_out
        Held-out conditions without which the network is not used: fewer say nothing about it.
    many_replicates
        Populations of a condition from which training shows the response retrieved from all of them, not the others'.
    rehearsed
        Populations that the network is trained on, at most: a random choice of more.
    state_cells, state_populations, state_cells_scored, state_splits
        Control cells that states are found among; populations that are left out to choose their number, cells of each
        that are scored, at most, and random halves of each where there is one context.
    cells_per_state
        Control cells there must be for each state.
    state_margin, state_step
        Relative change of the energy distance of left-out populations that states must bring, and more states beside
        fewer.
    fold_populations, fold_cells, fold_draws
        Populations that are left out to tell whether fold changes help, and cells of each, at most; draws of each, to
        tell how far they vary.
    unseen_steps, unseen_folds, unseen_share
        Steps of the VAEs that are trained without some conditions, at most; how many there are for contexts, of which
        each is without up to a third; share of the pairs or perturbations that another one is trained without.
    seen_weight
        How much left-out conditions count that the latent space has seen, beside those that it has not.
    unseen_populations, unseen_cells, unseen_least
        Populations and cells that these are trained on, at most, and cells of each population in any case.
    uneven_populations, uneven_cells, uneven_least, uneven_margin
        Populations that are left out to tell whether cells respond unevenly, and cells of each, at most; populations,
        and cells of each, without which nothing is said; relative change of the energy distance that it must bring.
    own_gene_targets
        Targets from which is learned what happens to the target's own gene, at most.
    """

    latent_passes: int = 15
    latent_min_steps: int = 1250
    latent_max_steps: int = 5000
    network_epochs: int = 30
    steps_per_epoch: int = 50
    held_out: int = 8
    min_held_out: int = 5
    many_replicates: int = 4
    rehearsed: int = 1024
    state_cells: int = 20000
    state_populations: int = 64
    state_cells_scored: int = 200
    state_splits: int = 2
    cells_per_state: int = 20
    state_margin: float = 0.15
    state_step: float = 0.05
    fold_populations: int = 16
    fold_cells: int = 128
    fold_draws: int = 8
    unseen_steps: int = 300
    unseen_folds: int = 2
    unseen_share: float = 0.25
    seen_weight: float = 0.5
    unseen_populations: int = 128
    unseen_cells: int = 16384
    unseen_least: int = 64
    uneven_populations: int = 128
    uneven_cells: int = 64
    uneven_least: int = 8
    uneven_margin: float = 0.05
    own_gene_targets: int = 256


SETTINGS = TrainingSettings()
