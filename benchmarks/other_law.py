"""Simulated screens of the panel: their design; :func:`scperturbdiff.datasets.simulate`'s law; another law.

The other law has Poisson-lognormal counts and gated effects. The log rate of a gene in a cell is a sum of

* its own level, the profile of the cell's type and a small effect of the donor;
* a few factors on which cells of a type vary continuously;
* the effect of the perturbation in log rates, gated by a sigmoid of one of the cell's factors, modulated by type (as a
  whole and gene by gene) and by a lognormal strength of the donor;
* normal noise whose standard deviation is the gene's own (lognormal overdispersion).

The counts are Poisson, with a lognormal library size shared out by the rates. A context is a cell type, or a sample of
cells of several types, in a composition of its own.

The plain law has effects that are the same in log rates of every cell of every type: a mean fold change is all there is
to know. Types differ in every gene, so that a decoder cannot tell what the treated cells of a new one are like.
"""

from __future__ import annotations

from dataclasses import dataclass

import anndata as ad
import numpy as np
import pandas as pd
from scipy import sparse

import scperturbdiff as spd

N_FACTORS, N_AXES = 5, 3
N_TYPES = 4
"""In mixed samples."""
GATE_SLOPE = 2.0


@dataclass(frozen=True)
class Screen:
    """A point of the design: what varies between simulated screens.

    Attributes
    ----------
    learned
        Contexts with treated cells.
    perturbations, replicates
        Numbers of them.
    mixed
        Contexts are samples of several types in compositions of their own; else each is one type.
    effect
        `"strong"`, `"weak"` or `"none"`.
    responders
        Share of the treated cells that respond.
    deep
        Some 2,000 counts per cell; else 300.
    pairs
        Some (context, perturbation) are left out and predicted; else contexts without treated cells.
    """

    learned: int
    perturbations: int
    mixed: bool
    replicates: int
    effect: str
    responders: float
    deep: bool
    pairs: bool = False

    def __str__(self) -> str:
        words = [
            f"{self.learned}x{self.perturbations}",
            *(["mixed"] if self.mixed else []),
            f"r{self.replicates}",
            self.effect,
            *(["half"] if self.responders < 1 else []),
            "deep" if self.deep else "shallow",
            *(["pairs"] if self.pairs else []),
        ]
        return " ".join(words)


DESIGN = (
    Screen(1, 1, False, 1, "strong", 1.0, True),
    Screen(1, 3, False, 5, "weak", 0.5, False),
    Screen(1, 12, False, 1, "strong", 0.5, True),
    Screen(1, 3, True, 1, "strong", 1.0, False),
    Screen(2, 1, True, 1, "weak", 1.0, True),
    Screen(2, 3, False, 1, "strong", 0.5, True),
    Screen(2, 12, False, 5, "weak", 1.0, False),
    Screen(2, 3, True, 5, "none", 1.0, True),
    Screen(4, 1, False, 5, "strong", 0.5, False),
    Screen(4, 3, True, 1, "strong", 0.5, True, pairs=True),
    Screen(4, 12, False, 1, "strong", 1.0, True, pairs=True),
    Screen(4, 3, False, 1, "weak", 1.0, False, pairs=True),
    Screen(8, 1, True, 1, "strong", 1.0, False),
    Screen(8, 3, False, 5, "none", 1.0, False),
    Screen(8, 12, False, 1, "weak", 0.5, True, pairs=True),
    Screen(8, 3, True, 5, "strong", 1.0, True, pairs=True),
)
PLAIN_DESIGN = (
    Screen(1, 3, False, 1, "strong", 1.0, True),
    Screen(2, 6, False, 1, "strong", 1.0, True),
    Screen(3, 3, False, 1, "strong", 1.0, True),
    Screen(4, 3, False, 1, "strong", 1.0, True),
    Screen(4, 3, False, 1, "strong", 1.0, True, pairs=True),
    Screen(4, 3, True, 1, "strong", 1.0, True),
)
"""Of the plain law."""
SHARES = {"strong": 1.0, "weak": 0.35, "none": 0.0}
"""Factors on effects."""
QUICK_SCREENS = {"simulated": {0, 3, 9, 13}, "other law": {4, 5, 10, 12}, "plain law": {2}}
"""Places in the design, by law."""


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
    plain: bool = False,
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
    plain
        Effects are the same in all cells that respond.
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
    if plain:
        profile = laws.normal(0.0, 1.5, n_genes) + laws.normal(0.0, 0.6, (n_types, n_genes))
        loadings, by_gene = np.zeros_like(loadings), np.ones_like(by_gene)
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
                    size = 1.5 * strength[donor] * by_type[p, kind] / (1 + np.exp(-GATE_SLOPE * score[:, gate[p]]))
                    size = (1.0 if plain else size) * (cells.random(n) < responders)
                    log_rate += size[:, None] * by_gene[kind] * change[p]
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


def simulated_cells(
    n_contexts: int,
    n_perturbations: int,
    *,
    mixed: bool,
    n_replicates: int,
    n_cells: int,
    n_controls: int,
    effect: float,
    responders: float,
    library_size: float,
    seed: int,
) -> ad.AnnData:
    """A screen of :func:`scperturbdiff.datasets.simulate`, as :func:`draw` has it; mixed samples are pooled types."""
    per = {name: -(-n // n_replicates) for name, n in (("cells", n_cells), ("controls", n_controls))}
    cells = spd.datasets.simulate(
        n_contexts=N_TYPES if mixed else n_contexts,
        n_perturbations=n_perturbations,
        n_cells_per_population=per["cells"],
        n_control_cells=per["controls"],
        n_genes=400,
        n_batches=n_replicates * (n_contexts if mixed else 1),
        effect_scale=effect,
        responders=responders,
        library_size=library_size,
        seed=seed,
    )
    del cells.uns["truth"]
    obs = cells.obs[["perturbation", "cell_type", "donor"]].astype(str)
    cells.obs = obs.assign(context="C" + obs["cell_type"].str[1:].str.zfill(2), replicate=obs["donor"])
    if not mixed:
        return cells
    rng = np.random.default_rng([seed, 11])
    sample = (obs["donor"].str[1:].astype(int) - 1) // n_replicates
    cells.obs["context"] = "C" + (sample + 1).astype(str).str.zfill(2)
    mixture = rng.dirichlet(np.ones(N_TYPES), n_contexts)
    kept = []
    for (label, donor), rows in obs.groupby(["perturbation", "donor"]).indices.items():
        share = mixture[(int(donor[1:]) - 1) // n_replicates]
        number = rng.multinomial(per["controls" if label == "control" else "cells"], share)
        kind = obs["cell_type"].to_numpy()[rows]
        kept += [rng.permutation(rows[kind == f"C{k + 1}"])[:n] for k, n in enumerate(number)]
    return cells[np.sort(np.concatenate(kept))].copy()
