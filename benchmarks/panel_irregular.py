"""Irregular situations of the panel, drawn at random by their number.

The other situations have complete designs and equally many cells. These have what real studies have: conditions of 8 to
120 cells, contexts of 15 to 150 controls, pairs that are missing, treated samples that were sequenced more deeply than
their controls or less, two context columns at once.
"""

from __future__ import annotations

import zlib
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from other_law import draw, simulated_cells
from panel_situations import TYPES, Situation, irradiated_cells, kang_cells, papalexi_cells, task
from quality import is_control
from scipy import sparse

if TYPE_CHECKING:
    from collections.abc import Iterator

    from anndata import AnnData
    from numpy.typing import NDArray
    from panel_situations import Task

    Rng = np.random.Generator

N_IRREGULAR = 60
SOURCES = ("simulated", "other law", "kang", "papalexi", "irradiated")
"""In turn, by number."""
CELLS, CONTROLS, DEPTH, EFFECT = (8, 120), (15, 150), (200, 5000), (0.25, 1.5)
TRUE, FEWEST_CONTROLS = 20, 8
"""Cells and controls of a condition that is left out, at least."""
ASKED = 12
"""Conditions that are left out, at most."""


def log_uniform(rng: Rng, between: tuple[float, float]) -> float:
    return float(np.exp(rng.uniform(*np.log(between))))


def simulated(rng: Rng, law: Any) -> tuple[AnnData, dict[str, Any]]:
    """A screen of two to eight contexts and up to twelve perturbations."""
    replicates = int(rng.choice([1, 1, 2, 4]))
    cells = law(
        int(rng.integers(2, 9)),
        int(rng.integers(1, 13)),
        mixed=bool(rng.random() < 0.3),
        n_replicates=replicates,
        n_cells=150,
        n_controls=200,
        effect=log_uniform(rng, EFFECT),
        responders=float(rng.choice([1.0, 1.0, 0.7, 0.4])),
        library_size=log_uniform(rng, DEPTH),
        seed=int(rng.integers(2**31)),
    )
    return cells, {"contexts": ["context"], "batch": "replicate" if replicates > 1 else None}


def kang(rng: Rng) -> tuple[AnnData, dict[str, Any]]:
    """Three to seven cell types; types, donors or both are the contexts."""
    cells, types = kang_cells(), rng.choice(TYPES, rng.integers(3, 8), replace=False)
    contexts = [["cell_type"], ["donor"], ["cell_type", "donor"]][rng.integers(3)]
    return cells[cells.obs["cell_type"].isin(types).to_numpy()].copy(), {"contexts": contexts}


def papalexi(rng: Rng) -> tuple[AnnData, dict[str, Any]]:
    """One to twelve targets in three replicates."""
    cells = papalexi_cells()
    size = cells.obs["perturbation"].astype(str).value_counts().drop("NT")
    names = rng.choice(np.sort(size.index[size >= 3 * TRUE].to_numpy(str)), rng.integers(1, 13), replace=False)
    kept = cells.obs["perturbation"].isin([*names, "NT"]).to_numpy()
    return cells[kept].copy(), {"contexts": ["replicate"], "control": "NT"}


def irradiated(rng: Rng) -> tuple[AnnData, dict[str, Any]]:
    """Three to eight lines."""
    cells = irradiated_cells()
    lines = np.sort(cells.obs["cell_type"].astype(str).unique())
    kept = cells.obs["cell_type"].isin(rng.choice(lines, rng.integers(3, 9), replace=False)).to_numpy()
    return cells[kept].copy(), {"contexts": ["cell_type"]}


MAKERS = {
    "simulated": partial(simulated, law=simulated_cells),
    "other law": partial(simulated, law=draw),
    "kang": kang,
    "papalexi": papalexi,
    "irradiated": irradiated,
}


def sequence(cells: AnnData, rows: NDArray[np.bool_], share: float, rng: Rng) -> None:
    """Keep each molecule of some cells with a probability."""
    counts = sparse.csr_matrix(cells.X, copy=True)
    entries = np.repeat(rows, np.diff(counts.indptr))
    counts.data[entries] = rng.binomial(counts.data[entries].astype(np.int64), share)
    counts.eliminate_zeros()
    cells.X = counts


def leave_out(table: pd.DataFrame, rng: Rng) -> pd.Index:
    """Conditions to leave out, of a third of the contexts or single ones; their perturbations stay known."""
    whole = rng.random() < 0.5
    some = rng.permutation(table["place"].unique())
    chosen = (
        table["place"].isin(some[: max(1, len(some) // 3)]) if whole else rng.random(len(table)) < rng.uniform(0.2, 0.5)
    )
    possible = chosen & (table["n"] >= TRUE) & (table["n_controls"] >= FEWEST_CONTROLS)
    held = table.index[possible]
    known = table.loc[table.index.difference(held), "perturbation"]
    held = held[table.loc[held, "perturbation"].isin(known)]
    return pd.Index(rng.permutation(held)[:ASKED])


def irregular(seed: int, number: int) -> Task:
    """The situation of a number; another seed draws another one of the same source."""
    source = SOURCES[number % len(SOURCES)]
    rng = np.random.default_rng([zlib.crc32(source.encode()), number, seed])
    for _ in range(100):
        cells, found = MAKERS[source](rng)
        contexts, control = found["contexts"], found.get("control", "control")
        labels = cells.obs[["perturbation", *contexts]].astype(str)
        is_ctrl, name = is_control(cells, control), labels.agg("|".join, axis=1).to_numpy()
        table = labels[~is_ctrl].drop_duplicates()
        table.index = table.agg("|".join, axis=1)
        table["n"] = pd.Series(name).value_counts()[table.index]
        here = labels[contexts].agg("|".join, axis=1)
        n_controls = here[is_ctrl].value_counts()
        table["place"] = table[contexts].agg("|".join, axis=1)
        table["n_controls"] = table["place"].map(n_controls).fillna(0)
        held = leave_out(table, rng)
        if len(held):
            break
    else:
        raise RuntimeError(f"Nothing can be left out of situation {number}.")
    keep = np.zeros(cells.n_obs, bool)
    asked = set(table.loc[held, "perturbation"])
    missing, order = rng.uniform(0, 0.4), rng.permutation(table.index.difference(held))
    learned: set[str] = set()
    for condition in order:  # one condition of each perturbation that is asked for stays
        perturbation = str(table.loc[condition, "perturbation"])
        if not table.loc[condition, "n_controls"]:
            continue
        if rng.random() < missing and (perturbation in learned or perturbation not in asked):
            continue
        learned.add(perturbation)
        rows = np.flatnonzero(name == condition)
        keep[rng.permutation(rows)[: round(log_uniform(rng, CELLS))]] = True
    for context in here.unique():
        rows = np.flatnonzero(is_ctrl & (here == context).to_numpy())
        keep[rng.permutation(rows)[: round(log_uniform(rng, CONTROLS))]] = True
    keep |= np.isin(name, held)
    cells, is_ctrl, name = cells[keep].copy(), is_ctrl[keep], name[keep]
    if rng.random() < 0.5:
        ratio = np.exp(rng.normal(0, 0.5))
        sequence(cells, is_ctrl if ratio > 1 else ~is_ctrl, min(ratio, 1 / ratio), rng)
    return task(cells, np.isin(name, held), contexts, seed=seed, control=control, batch=found.get("batch"))


def irregular_situations() -> Iterator[Situation]:
    """All of them, by number."""
    for number in range(N_IRREGULAR):
        source = SOURCES[number % len(SOURCES)]
        make = partial(irregular, number=number)
        yield Situation(f"irregular {number:02d} {source}", f"irregular {source}", make, number < len(SOURCES))
