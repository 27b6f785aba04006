"""The situations of the panel: what is trained on, predicted from, asked for and true; see benchmarks/panel.py."""

from __future__ import annotations

import zlib
from dataclasses import dataclass, field
from functools import lru_cache, partial
from itertools import chain
from typing import TYPE_CHECKING, Any

import numpy as np
import other_law
import pandas as pd
import scanpy as sc
from common import data_file
from quality import is_control, variable_genes

import scperturbdiff as spd

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from anndata import AnnData

MAX_GENES = 1000
PREDICTED = (100, 200)
"""Cells to predict in a condition: as many as are true, within these bounds, and no more than there are controls."""
MAX_TRUE = 300
NEW = 2
"""Contexts of a simulated screen that have no treated cells in training."""
SHARES = {"strong": 1.0, "weak": 0.35, "none": 0.0}


@dataclass(frozen=True)
class Task:
    """Cells and labels of one situation.

    Attributes
    ----------
    train
        Cells to train on, with all controls.
    controls
        Control cells to predict from.
    truth
        Real treated cells of the conditions that are asked for.
    setup
        Arguments of :meth:`scperturbdiff.PerturbDiff.setup_anndata`.
    request
        One row a condition: perturbation, contexts, `n_cells`.
    """

    train: AnnData
    controls: AnnData
    truth: AnnData
    setup: dict[str, Any]
    request: pd.DataFrame

    @property
    def keys(self) -> dict[str, Any]:
        """The part of the set-up that rules and scores share."""
        return {name: self.setup[name] for name in ("perturbation_key", "control", "context_keys")}


@dataclass(frozen=True)
class Situation:
    """A named task; `make` draws it from a seed. `quick`: in the fixed subset of ``--quick``."""

    name: str
    group: str
    make: Callable[[int], Task] = field(repr=False)
    quick: bool = False


def thin(adata: AnnData, keys: Sequence[str], n: int, rng: np.random.Generator) -> AnnData:
    """At most `n` random cells of every group of cells that agree in `keys`."""
    order = rng.permutation(adata.n_obs)
    labels = adata.obs[list(keys)].astype(str).iloc[order]
    kept = order[(labels.groupby(list(keys)).cumcount() < n).to_numpy()]
    return adata[np.sort(kept)].copy()


def task(
    cells: AnnData,
    held: np.ndarray,
    contexts: Sequence[str],
    *,
    seed: int,
    control: str = "control",
    batch: str | None = None,
    n_train: int | None = None,
    unseen: np.ndarray | None = None,
) -> Task:
    """Leave the treated cells `held` out of `cells`; they are the truth.

    Controls of all contexts are in training, except those that are `unseen`; these are predicted from instead.
    `n_train` limits the treated cells of a (context, perturbation, batch) in training.
    """
    rng = np.random.default_rng([seed, 3])
    is_ctrl = is_control(cells, control)
    labels = ["perturbation", *contexts]
    truth = thin(cells[held & ~is_ctrl], labels, MAX_TRUE, rng)
    train = cells[~held].copy()
    if n_train is not None:
        ctrl = is_control(train, control)
        groups = [*labels, *([] if batch is None else [batch])]
        few = thin(train[~ctrl], groups, n_train, rng)
        train = train[ctrl | train.obs_names.isin(few.obs_names)].copy()
    source = is_ctrl if unseen is None else unseen
    if contexts:
        known = pd.MultiIndex.from_frame(cells.obs[list(contexts)].astype(str))
        source = source & known.isin(pd.MultiIndex.from_frame(truth.obs[list(contexts)].astype(str)))
    controls = cells[source].copy()
    if train.n_vars > MAX_GENES:
        genes = variable_genes(train.copy(), MAX_GENES).var_names
        train, controls, truth = (part[:, genes].copy() for part in (train, controls, truth))
    wanted = truth.obs[labels].astype(str).value_counts(sort=False).sort_index().rename("n_cells").reset_index()
    available = np.full(len(wanted), controls.n_obs)
    if contexts:
        sizes = controls.obs[list(contexts)].astype(str).value_counts()
        available = sizes.reindex(pd.MultiIndex.from_frame(wanted[list(contexts)])).to_numpy()
    wanted["n_cells"] = np.minimum(wanted["n_cells"].clip(*PREDICTED), available).astype(int)
    setup = {"perturbation_key": "perturbation", "control": control, "context_keys": list(contexts)}
    if batch is not None:
        setup["batch_key"] = batch
    return Task(train, controls, truth, setup, wanted)


# ---- real data -------------------------------------------------------------------------------------------------------

TYPES = ("B", "CD14+Mono", "CD4T", "CD8T", "Dendritic", "FCGR3A+Mono", "NK")
POOLS = {
    "CD4T": "lymphoid", "CD8T": "lymphoid", "NK": "lymphoid", "B": "B",
    "CD14+Mono": "myeloid", "FCGR3A+Mono": "myeloid", "Dendritic": "myeloid",
}  # fmt: skip
TWO = (
    ("CD4T", "B"), ("CD4T", "CD14+Mono"), ("CD4T", "CD8T"), ("CD14+Mono", "FCGR3A+Mono"),
    ("B", "FCGR3A+Mono"), ("NK", "Dendritic"), ("CD8T", "Dendritic"), ("NK", "CD14+Mono"),
)  # fmt: skip
THREE = (
    ("CD4T", "B", "CD14+Mono"), ("CD4T", "CD8T", "NK"), ("CD14+Mono", "FCGR3A+Mono", "Dendritic"),
    ("B", "NK", "FCGR3A+Mono"), ("CD8T", "B", "Dendritic"), ("CD4T", "NK", "CD14+Mono"),
    ("CD8T", "FCGR3A+Mono", "CD4T"), ("B", "Dendritic", "NK"),
)  # fmt: skip
LINES_LEARNED = {2: ((0, 1), (2, 5), (4, 7)), 4: ((0, 1, 2, 3), (4, 5, 6, 7), (0, 2, 4, 6)), 7: (0, 3, 6)}


@lru_cache
def kang_cells() -> AnnData:
    """Kang's cells, their pool as a column."""
    cells = sc.read_h5ad(data_file("kang2018_scgen_valid.h5ad"))
    for key in ("perturbation", "cell_type", "donor"):
        cells.obs[key] = cells.obs[key].astype(str)
    cells.obs["pool"] = cells.obs["cell_type"].map(POOLS)
    return cells


def kang(seed: int, learned: Sequence[str], key: str = "cell_type", wanted: Sequence[str] = ()) -> Task:
    """Train on treated cells of the `learned` values of `key`; predict those of all the others, or of `wanted`."""
    cells = kang_cells()
    treated, of = ~is_control(cells), cells.obs[key]
    held = treated & ~of.isin(list(learned)).to_numpy()
    if wanted:
        cells = cells[~held | of.isin(list(wanted)).to_numpy()]
        held = held[~held | of.isin(list(wanted)).to_numpy()]
    return task(cells.copy(), held, [key], seed=seed)


def situations_kang() -> Iterator[Situation]:
    """One, two and three treated cell types; all the others are predicted."""
    quick = {("CD4T",), ("CD14+Mono",), ("CD4T", "B"), ("CD4T", "B", "CD14+Mono")}
    for learned in chain(((name,) for name in TYPES), TWO, THREE):
        name = f"kang {len(learned)} {' '.join(learned)}"
        yield Situation(name, f"kang {len(learned)}", partial(kang, learned=learned), learned in quick)


@lru_cache
def irradiated_cells() -> AnnData:
    return sc.read_h5ad(data_file("hnscc_radiation_8lines_32proteins.h5ad"))


def irradiated(seed: int, learned: Sequence[int]) -> Task:
    """Lines of which irradiated cells are trained on, by number; those of the other lines are predicted."""
    cells = thin(irradiated_cells(), ["perturbation", "cell_type"], 200, np.random.default_rng([seed, 5]))
    lines = np.array(sorted(cells.obs["cell_type"].astype(str).unique()))
    held = ~is_control(cells) & ~cells.obs["cell_type"].isin(lines[list(learned)]).to_numpy()
    return task(cells, held, ["cell_type"], seed=seed)


def situations_irradiated() -> Iterator[Situation]:
    """Two and four lines to learn from, all the others predicted; seven, and one predicted."""
    for n, choices in LINES_LEARNED.items():
        for i, choice in enumerate(choices):
            learned = choice if n < 7 else [k for k in range(8) if k != choice]
            name = f"lines {n} {'without ' if n == 7 else ''}{choice if n == 7 else ' '.join(map(str, choice))}"
            yield Situation(name, "irradiated", partial(irradiated, learned=tuple(learned)), i == 0)


# ---- simulated screens -----------------------------------------------------------------------------------------------


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
QUICK_SCREENS = {0, 3, 5, 7, 9, 12}


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
) -> AnnData:
    """:func:`scperturbdiff.datasets.simulate` as :func:`other_law.draw` has it; mixed samples are pooled from types."""
    n_types = 4
    per = {name: -(-n // n_replicates) for name, n in (("cells", n_cells), ("controls", n_controls))}
    cells = spd.datasets.simulate(
        n_contexts=n_types if mixed else n_contexts,
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
    mixture = rng.dirichlet(np.ones(n_types), n_contexts)
    kept = []
    for (label, donor), rows in obs.groupby(["perturbation", "donor"]).indices.items():
        share = mixture[(int(donor[1:]) - 1) // n_replicates]
        number = rng.multinomial(per["controls" if label == "control" else "cells"], share)
        kind = obs["cell_type"].to_numpy()[rows]
        kept += [rng.permutation(rows[kind == f"C{k + 1}"])[:n] for k, n in enumerate(number)]
    return cells[np.sort(np.concatenate(kept))].copy()


def screen_task(seed: int, screen: Screen, draw: Callable[..., AnnData]) -> Task:
    """Draw a screen and leave its new contexts, or every fourth pair, out."""
    cells = draw(
        screen.learned + (0 if screen.pairs else NEW),
        screen.perturbations,
        mixed=screen.mixed,
        n_replicates=screen.replicates,
        n_cells=120,
        n_controls=150,
        effect=SHARES[screen.effect],
        responders=screen.responders,
        library_size=2000.0 if screen.deep else 300.0,
        seed=zlib.crc32(f"{screen} {seed}".encode()) % 2**31,
    )
    context = cells.obs["context"].str[1:].astype(int).to_numpy() - 1
    treated = ~is_control(cells)
    held = treated & (context >= screen.learned)
    if screen.pairs:
        number = cells.obs["perturbation"].where(treated, "P00").str[1:].astype(int).to_numpy()
        held = treated & ((context + number) % 4 == 0)
    batch = None if screen.replicates == 1 else "replicate"
    n_train = -(-(40 if screen.perturbations > 3 else 60) // screen.replicates)
    return task(cells, held, ["context"], seed=seed, batch=batch, n_train=n_train)


def situations_simulated() -> Iterator[Situation]:
    """The design, in both laws."""
    for group, draw in (("simulated", simulated_cells), ("other law", other_law.draw)):
        for i, screen in enumerate(DESIGN):
            make = partial(screen_task, screen=screen, draw=draw)
            yield Situation(f"{group} {screen}", group, make, i in QUICK_SCREENS)


def all_situations() -> dict[str, Situation]:
    """Every situation by name."""
    found = chain(situations_kang(), situations_irradiated(), situations_simulated())
    return {situation.name: situation for situation in found}
