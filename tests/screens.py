"""Cells of a screen without any law, for tests of training that choose what is measured themselves."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch
from anndata import AnnData
from scipy import sparse
from tests.helpers import TINY

import scperturbdiff as spd
from scperturbdiff.data import PopulationTable, build_populations

if TYPE_CHECKING:
    import pytest

STAGES = "scperturbdiff.training._stages"


def screen(
    contexts: int = 2, donors: int = 2, perturbations: int = 4, n_cells: int = 5, features: bool = False
) -> AnnData:
    """Cells of every perturbation, context and donor."""
    rng = np.random.default_rng(0)
    names = ["control", *(f"P{i}" for i in range(perturbations))]
    rows = [
        (p, f"C{c}", f"D{d}") for p in names for c in range(contexts) for d in range(donors) for _ in range(n_cells)
    ]
    obs = pd.DataFrame(rows, columns=["perturbation", "cell_type", "donor"], index=[f"c{i}" for i in range(len(rows))])
    counts = sparse.csr_matrix(rng.poisson(3, (len(obs), 12)).astype(np.float32))
    adata = AnnData(counts, obs=obs, var=pd.DataFrame(index=[f"g{i}" for i in range(12)]))
    table = {name: rng.normal(size=2) for name in names[1:]} if features else None
    spd.PerturbDiff.setup_anndata(
        adata, "perturbation", "control", context_keys=["cell_type"], batch_key="donor", perturbation_embeddings=table
    )
    return adata


def tiny(adata: AnnData, seed: int = 0) -> spd.PerturbDiff:
    """The smallest model, from a given start."""
    torch.manual_seed(seed)
    return spd.PerturbDiff(adata, **TINY)


def table_of(adata: AnnData) -> PopulationTable:
    return build_populations(tiny(adata).conditions, adata.obs)


def replicated_latent(table: PopulationTable, n_cells: int, strength: dict[int, float], seed: int = 0) -> torch.Tensor:
    """Latent vectors in which replicates of some conditions differ along one axis, by so much (0: by chance alone)."""
    rng = np.random.default_rng(seed)
    latent = rng.normal(size=(n_cells, 4))
    for i in range(len(table)):
        latent[table.cells[i], 0] += strength.get(i, 0.0) * rng.normal()
    return torch.as_tensor(latent, dtype=torch.float32)


def use_latent(monkeypatch: pytest.MonkeyPatch, latent: torch.Tensor) -> None:
    """Let training find cells at these places, whatever their counts."""

    def encoded(*args: Any, **kwargs: Any) -> torch.Tensor:
        return latent.clone()  # which training standardises in place

    monkeypatch.setattr(f"{STAGES}.encode_cells", encoded)
