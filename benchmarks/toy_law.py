"""Toy screens whose law of populations is known, run through the package from setup to prediction.

Every treated population of a condition lies elsewhere: its cells are `shift of the condition + h * direction + 0.5 *
normal`, with one unrecorded `h` per population: of two modes (-1.5 or 1.5), Gaussian (standard deviation 1.5) or 0.
Nothing that the model is given tells `h`, so populations drawn for a condition should spread as the true ones do.

Cells are points of a space of 8 dimensions. They are stored as fixed-point "counts", with one more gene that fills all
cells up to the same number, and :class:`FixedPoint` takes the place of the first stage, so that whatever is measured is
the second stage's doing and no part of it is copied here.
`benchmarks/populations.py` measures; this file is its subject.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch
from anndata import AnnData
from torch import Tensor, nn

import scperturbdiff as spd

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Floats = NDArray[np.float64]

N_LATENT, WITHIN, BETWEEN = 8, 0.5, 1.5
LAWS = ("two modes", "gaussian", "none")
OFFSET, SCALE = 128.0, 1024.0
TOTAL = (N_LATENT + 64) * OFFSET
"""What all coordinates of a cell sum up to, offsets included: far more than they are, so that distances between the
log-normalised counts are those between the points."""
CONTROL, SETUP = "control", {"batch_key": "donor", "control_match_keys": ["donor"]}


class FixedPoint(nn.Module):
    """A first stage that loses nothing: counts are coordinates in fixed point."""

    n_input = N_LATENT + 1

    def encode(self, counts: Tensor) -> Tensor:
        """Coordinates `(n_cells, N_LATENT)`."""
        return counts[:, :N_LATENT] / SCALE - OFFSET

    def decode_frequencies(self, latent: Tensor, *_: Any) -> Tensor:
        """Share of each gene in a cell's counts, `(n_cells, N_LATENT + 1)`."""
        moved = latent + OFFSET
        return torch.cat([moved, TOTAL - moved.sum(-1, keepdim=True)], dim=-1) / TOTAL

    def counterfactual_counts(self, latent: Tensor, *_: Any) -> Tensor:
        """The fixed-point numbers of `latent`."""
        moved = ((latent + OFFSET) * SCALE).round()
        return torch.cat([moved, SCALE * TOTAL - moved.sum(-1, keepdim=True)], dim=-1)

    def generative(self, z: Tensor, library: Tensor, **_: Any) -> dict[str, Any]:
        """Mean counts at a log library size, with next to no dispersion."""
        mean = library.exp() * self.decode_frequencies(z)
        return {"px": SimpleNamespace(mu=mean, scale=self.decode_frequencies(z), theta=torch.full_like(mean, 1e6))}


@dataclass(frozen=True)
class Screen:
    """A law over populations, with `n_conditions` perturbations.

    Attributes
    ----------
    law
        One of `LAWS`.
    shifts
        Mean shift of each condition, `(n_conditions, N_LATENT)`.
    direction
        Unit vector along which the hidden factor moves populations.
    """

    law: str
    shifts: Floats
    direction: Floats

    @classmethod
    def make(cls, law: str, n_conditions: int = 6, seed: int = 0) -> Screen:
        """Draw the conditions of a screen."""
        if law not in LAWS:
            raise ValueError(f"law={law!r} is not one of {LAWS}.")
        rng = np.random.default_rng([seed, 1])
        direction = rng.normal(size=N_LATENT)
        return cls(law, rng.normal(size=(n_conditions, N_LATENT)), direction / np.linalg.norm(direction))

    @property
    def names(self) -> list[str]:
        """Names of the conditions."""
        return [f"P{i + 1:02d}" for i in range(len(self.shifts))]

    def hidden(self, rng: np.random.Generator, n: int) -> Floats:
        """Values of the hidden factor, `(n,)`."""
        if self.law == "two modes":
            return BETWEEN * rng.choice([-1.0, 1.0], n)
        return BETWEEN * rng.normal(size=n) * (self.law == "gaussian")

    def populations(self, rng: np.random.Generator, condition: int, n: int, n_cells: int) -> Floats:
        """Fresh populations `(n, n_cells, N_LATENT)` of a condition."""
        centre = self.shifts[condition] + self.hidden(rng, n)[:, None] * self.direction
        return centre[:, None, :] + WITHIN * rng.normal(size=(n, n_cells, N_LATENT))

    def training_cells(self, n_replicates: int, n_cells: int, seed: int) -> AnnData:
        """A screen of `n_replicates` donors, each with controls and one population of every condition."""
        rng = np.random.default_rng([seed, 2])
        donors = [f"D{i:02d}" for i in range(n_replicates)]
        blocks = [controls(rng, n_replicates * n_cells)]
        labels = [CONTROL] * n_replicates
        for condition, name in enumerate(self.names):
            blocks.append(self.populations(rng, condition, n_replicates, n_cells).reshape(-1, N_LATENT))
            labels += [name] * n_replicates
        obs = {"perturbation": np.repeat(labels, n_cells), "donor": np.repeat(donors * (len(self.names) + 1), n_cells)}
        return as_cells(np.concatenate(blocks), obs)


def controls(rng: np.random.Generator, n: int) -> Floats:
    """Control cells `(n, N_LATENT)`."""
    return WITHIN * rng.normal(size=(n, N_LATENT))


def as_cells(points: Floats, obs: dict[str, Any]) -> AnnData:
    """Points as an AnnData of fixed-point counts."""
    counts = FixedPoint().counterfactual_counts(torch.as_tensor(points))
    return AnnData(
        counts.numpy().astype(np.float32), obs=pd.DataFrame(obs, index=[f"c{i}" for i in range(len(points))])
    )


def fit(
    cells: AnnData,
    objective: str = "energy_score",
    *,
    epochs: int = 30,
    seed: int = 0,
    validation_size: float | None = None,
    plan: dict[str, Any] | None = None,
    **options: Any,
) -> spd.PerturbDiff:
    """Train the second stage on a toy screen; `options` go to the model, `plan` to the training plan."""
    spd.PerturbDiff.setup_anndata(cells, "perturbation", CONTROL, **SETUP)
    torch.manual_seed(seed)
    model = spd.PerturbDiff(cells, n_latent=N_LATENT, **options)
    model.module.vae = FixedPoint()
    model.train(
        max_epochs_vae=0,
        max_epochs_generator=epochs,
        validation_size=validation_size,
        seed=seed,
        accelerator="cpu",
        enable_progress_bar=False,
        plan_kwargs={"objective": objective, **(plan or {})},
    )
    return model


def draw(
    model: spd.PerturbDiff, names: list[str], n_draws: int, n_cells: int, n_steps: int = 1, seed: int = 0
) -> tuple[Floats, Floats]:
    """Draw populations of a donor never seen from 256 controls of it.

    Returns
    -------
    Populations `(n_conditions, n_draws, n_cells, N_LATENT)` and the mean of the controls they started from
    `(n_conditions, n_draws, N_LATENT)`.
    """
    points = controls(np.random.default_rng([seed, 3]), 256)
    cells = as_cells(points, {"perturbation": [CONTROL] * 256, "donor": ["new"] * 256})
    predicted = model.predict(
        cells,
        names,
        n_cells=n_cells,
        n_populations=n_draws,
        n_steps=n_steps,
        transform_batch="D00",
        seed=seed,
        progress=False,
    )
    shape = (len(names), n_draws, n_cells, N_LATENT)
    at = cells.obs_names.get_indexer(predicted.obs["control_cell"])
    return predicted.obsm["X_perturbdiff"].astype(float).reshape(shape), points[at].reshape(shape).mean(2)
