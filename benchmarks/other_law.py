"""Screens of another law than :func:`scperturbdiff.datasets.simulate`: Poisson-lognormal counts, gated effects.

The log rate of a gene in a cell is a sum of

* its own level, the profile of the cell's type and a small effect of the donor;
* a few factors on which cells of a type vary continuously;
* the effect of the perturbation in log rates, gated by a sigmoid of one of the cell's factors, modulated by type (as a
  whole and gene by gene) and by a lognormal strength of the donor;
* normal noise whose standard deviation is the gene's own (lognormal overdispersion).

The counts are Poisson, with a lognormal library size shared out by the rates. A context is a cell type, or a sample of
cells of several types, in a composition of its own.
"""

from __future__ import annotations

import anndata as ad
import numpy as np
import pandas as pd
from scipy import sparse

N_FACTORS, N_AXES = 5, 3
N_TYPES = 4
"""In mixed samples."""
GATE_SLOPE = 2.0


def sparse_normal(rng: np.random.Generator, shape: tuple[int, ...], share: float, scale: float) -> np.ndarray:
    """Normal numbers of standard deviation `scale` at a random `share` of the places, else 0."""
    return rng.normal(0.0, scale, shape) * (rng.random(shape) < share)


def draw(
    n_contexts: int,
    n_perturbations: int,
    *,
    mixed: bool = False,
    n_replicates: int = 1,
    n_cells: int = 100,
    n_controls: int = 150,
    n_genes: int = 400,
    effect: float = 1.0,
    responders: float = 1.0,
    library_size: float = 2000.0,
    seed: int = 0,
) -> ad.AnnData:
    """Draw a screen in which every context has every perturbation.

    Parameters
    ----------
    n_contexts, n_perturbations
        Contexts `"C01"` and so on, perturbations `"P01"` and so on.
    mixed
        Contexts are samples of four types; else every context is one type.
    n_replicates
        Donors of a context; they are the same ones in all contexts unless `mixed`.
    n_cells, n_controls
        Treated cells of each (context, perturbation) and controls of each context, over all replicates.
    n_genes
        Number of genes.
    effect
        Factor on all effects; 0: none has any.
    responders
        Share of the treated cells that respond at all.
    library_size
        Median counts per cell.
    seed
        The same seed gives the same cells.

    Returns
    -------
    AnnData with counts in `X` and, in `obs`, `perturbation` (`"control"` for controls), `context`, `replicate`, `type`.
    """
    laws, cells = (np.random.default_rng(s) for s in np.random.SeedSequence([seed, 7]).spawn(2))
    n_types = N_TYPES if mixed else n_contexts
    place = laws.normal(size=(n_types, N_AXES))
    profile = laws.normal(0.0, 1.6, n_genes) + place @ sparse_normal(laws, (N_AXES, n_genes), 0.3, 0.5)
    profile += sparse_normal(laws, (n_types, n_genes), 0.1, 0.8)
    loadings = sparse_normal(laws, (N_FACTORS, n_genes), 0.25, 0.4)
    centre = 0.5 * place @ laws.normal(size=(N_AXES, N_FACTORS))
    change = effect * sparse_normal(laws, (n_perturbations, n_genes), 0.15, 1.0)
    gate = laws.integers(N_FACTORS, size=n_perturbations)
    by_type = np.exp(laws.normal(0.0, 0.25, (n_perturbations, n_types)))
    by_gene = 1.0 + laws.normal(0.0, 0.3, (n_types, n_genes))
    spread = np.exp(laws.normal(-0.9, 0.4, n_genes))
    n_donors = n_contexts * n_replicates if mixed else n_replicates
    strength = np.exp(laws.normal(0.0, 0.25, n_donors))
    donor_effect = laws.normal(0.0, 0.1, (n_donors, n_genes))
    mixture = laws.dirichlet(np.ones(n_types), n_contexts) if mixed else np.eye(n_types)

    counts, tables = [], []
    for context in range(n_contexts):
        for replicate in range(n_replicates):
            donor = context * n_replicates + replicate if mixed else replicate
            share = 0.85 * mixture[context] + 0.15 * laws.dirichlet(np.ones(n_types)) if mixed else mixture[context]
            for p in range(-1, n_perturbations):
                n = -(-(n_controls if p < 0 else n_cells) // n_replicates)
                kind = cells.choice(n_types, n, p=share)
                score = centre[kind] + cells.normal(size=(n, N_FACTORS))
                log_rate = profile[kind] + donor_effect[donor] + score @ loadings
                if p >= 0:
                    size = strength[donor] * by_type[p, kind] / (1 + np.exp(-GATE_SLOPE * score[:, gate[p]]))
                    size *= cells.random(n) < responders
                    log_rate += 1.5 * size[:, None] * by_gene[kind] * change[p]
                log_rate += spread * cells.normal(size=(n, n_genes))
                rate = np.exp(log_rate - log_rate.max(axis=1, keepdims=True))
                library = library_size * np.exp(cells.normal(0.0, 0.4, n))
                counts.append(sparse.csr_matrix(cells.poisson(rate * (library / rate.sum(axis=1))[:, None])))
                label = "control" if p < 0 else f"P{p + 1:02d}"
                tables.append(
                    pd.DataFrame(
                        {
                            "perturbation": label,
                            "context": f"C{context + 1:02d}",
                            "replicate": f"D{donor + 1:02d}",
                            "type": [f"T{k + 1}" for k in kind],
                        }
                    )
                )
    obs = pd.concat(tables, ignore_index=True)
    obs.index = "cell" + obs.index.astype(str)
    var = pd.DataFrame(index=[f"gene{i + 1:04d}" for i in range(n_genes)])
    return ad.AnnData(sparse.vstack(counts, format="csr").astype(np.float32), obs=obs, var=var)
