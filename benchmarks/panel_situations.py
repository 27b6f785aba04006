"""The situations of the panel: what is trained on, predicted from, asked for and true; see benchmarks/panel.py."""

from __future__ import annotations

import zlib
from dataclasses import dataclass, field
from functools import lru_cache, partial
from itertools import chain
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import scanpy as sc
from common import data_file
from other_law import DESIGN, PLAIN_DESIGN, QUICK_SCREENS, SHARES, Screen, draw, simulated_cells
from quality import INFORMATIVE, is_control, load_papalexi, variable_genes

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

    Controls of all contexts are in training, except those that are `unseen`: these are predicted from instead.
    `n_train` limits the treated cells of a (context, perturbation, batch) in training.
    """
    rng = np.random.default_rng([seed, 3])
    is_ctrl = is_control(cells, control)
    labels = ["perturbation", *contexts]
    truth = thin(cells[held & ~is_ctrl], labels, MAX_TRUE, rng)
    train = cells[~held if unseen is None else ~(held | unseen)].copy()
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
DONORS = ("101", "1015", "107", "unlabelled")
"""Donors with control and stimulated cells; cells of the last may be of any donor."""
FEW_DONORS = (("1015", "101 107"), ("101", "1015 107"), ("1015 107", "101"), ("101 107", "1015"))
POOLED = ("lymphoid", "myeloid", "B", "lymphoid B")
UNLABELLED = {
    "all types": (TYPES, TYPES),
    "controls of all types": (("CD4T", "CD14+Mono", "B"), TYPES),
    "controls of the same types": (("CD4T", "CD14+Mono"), ("CD4T", "CD14+Mono")),
}
"""Types of the treated and of the control cells in training, where no context is known."""
LINES_LEARNED = {2: ((0, 1), (2, 5), (4, 7)), 4: ((0, 1, 2, 3), (4, 5, 6, 7), (0, 2, 4, 6)), 7: ((0,), (3,), (6,))}
"""By number of lines to learn from: which ones (7: all but which one)."""
TARGETS = {2: ("IFNGR1", "SMAD4"), 5: INFORMATIVE[:5], 23: ()}
"""Targets by their number; the last: all with 25 cells in every replicate."""
REPLICATES = ((2, "1"), (2, "12"), (5, "2"), (5, "13"), (23, "3"), (23, "23"), (5, ""), (23, ""))
"""Number of targets and replicates to learn from; none: a third of the pairs is left out."""


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
    held = ~is_control(cells) & ~cells.obs[key].isin(list(learned)).to_numpy()
    if wanted:
        kept = ~held | cells.obs[key].isin(list(wanted)).to_numpy()
        cells, held = cells[kept], held[kept]
    return task(cells.copy(), held, [key], seed=seed)


def kang_without_contexts(seed: int, treated: Sequence[str], controls: Sequence[str]) -> Task:
    """Half of the control cells of some types and the treated cells of some, without labels; predict the others.

    These are the treated cells of all other types, from the other half of their controls. Where all types are treated
    in training: half of the treated cells.
    """
    cells = kang_cells()
    half = np.random.default_rng([seed, 17]).random(cells.n_obs) < 0.5
    kind, is_ctrl = cells.obs["cell_type"], is_control(cells)
    other = half if len(treated) == len(TYPES) else ~kind.isin(list(treated)).to_numpy()
    unseen = is_ctrl & half & other
    used = ~is_ctrl | unseen | (~half & kind.isin(list(controls)).to_numpy())
    return task(cells[used].copy(), (~is_ctrl & other)[used], [], seed=seed, unseen=unseen[used])


def situations_kang() -> Iterator[Situation]:
    """One, two and three treated cell types, all the others predicted; donors, pools of types, or no context."""
    quick = {("CD4T",), ("CD14+Mono",), TWO[0], TWO[5], THREE[0]}
    for learned in chain(((name,) for name in TYPES), TWO, THREE):
        name = f"kang {len(learned)} {' '.join(learned)}"
        yield Situation(name, f"kang {len(learned)}", partial(kang, learned=learned), learned in quick)
    for donor in DONORS:
        others = tuple(name for name in DONORS if name != donor)
        make = partial(kang, learned=others, key="donor", wanted=(donor,))
        yield Situation(f"donor {donor}", "kang donors", make, donor == "1015")
    for learned, wanted in FEW_DONORS:
        make = partial(kang, learned=learned.split(), key="donor", wanted=wanted.split())
        yield Situation(f"donor {wanted} from {learned}", "kang donors", make)
    for learned in POOLED:
        make = partial(kang, learned=learned.split(), key="pool")
        yield Situation(f"pool {learned}", "kang pools", make, learned == "lymphoid")
    for name, (treated, controls) in UNLABELLED.items():
        make = partial(kang_without_contexts, treated=treated, controls=controls)
        yield Situation(f"no context {name}", "kang pools", make, len(controls) == 2)


@lru_cache
def irradiated_cells() -> AnnData:
    return sc.read_h5ad(data_file("hnscc_radiation_8lines_32proteins.h5ad"))


def irradiated(seed: int, learned: Sequence[int]) -> Task:
    """Train on irradiated cells of some lines, given by number; predict those of the other lines."""
    cells = thin(irradiated_cells(), ["perturbation", "cell_type"], 200, np.random.default_rng([seed, 5]))
    lines = np.array(sorted(cells.obs["cell_type"].astype(str).unique()))
    held = ~is_control(cells) & ~cells.obs["cell_type"].isin(lines[list(learned)]).to_numpy()
    return task(cells, held, ["cell_type"], seed=seed)


def situations_irradiated() -> Iterator[Situation]:
    """Two and four lines to learn from, all the others predicted; seven, and one predicted."""
    for n, choices in LINES_LEARNED.items():
        for i, choice in enumerate(choices):
            learned = choice if n < 7 else tuple(k for k in range(8) if k not in choice)
            name = f"lines {n} {'without ' if n == 7 else ''}{' '.join(map(str, choice))}"
            yield Situation(name, "irradiated", partial(irradiated, learned=learned), i == 0 and n != 4)


@lru_cache
def papalexi_cells() -> AnnData:
    return load_papalexi()


def papalexi(seed: int, targets: Sequence[str], learned: str) -> Task:
    """Train on targets in the replicates `learned` (`"13"`: first and third), predict them in the others.

    None to learn from: a third of the pairs of target and replicate is left out.
    """
    cells = papalexi_cells()
    obs = cells.obs[["perturbation", "replicate"]].astype(str)
    sizes = obs.value_counts().unstack(fill_value=0)
    names = sorted(targets or sizes.index[(sizes >= 25).all(axis=1) & (sizes.index != "NT")])
    cells = cells[obs["perturbation"].isin([*names, "NT"]).to_numpy()]
    cells = thin(cells, ["perturbation", "replicate"], 200, np.random.default_rng([seed, 19]))
    number = cells.obs["perturbation"].astype(str).map({name: i for i, name in enumerate(names)}).fillna(0)
    replicate = cells.obs["replicate"].astype(str).str[-1]
    held = ~replicate.isin(list(learned)) if learned else (number + replicate.astype(int)) % 3 == 0
    held = held.to_numpy() & ~is_control(cells, "NT")
    return task(cells, held, ["replicate"], seed=seed, control="NT", n_train=60)


def norman(seed: int, share: float) -> Task:
    """Pairs left out, whose parts are seen alone."""
    cells = sc.read_h5ad(data_file("norman2019_perturbench_500g.h5ad"))
    keys = {"perturbation_key": "perturbation", "control": "control", "context_keys": []}
    split = spd.splits.hold_out_combinations(cells, **keys, fraction=share, seed=seed)
    return task(cells, np.asarray(split.test), [], seed=seed)


def situations_crispr() -> Iterator[Situation]:
    """Targets in other replicates, pairs of target and replicate, pairs of genes."""
    for n, learned in REPLICATES:
        name = f"papalexi {n} targets {'from ' + ' '.join(learned) if learned else 'pairs'}"
        make = partial(papalexi, targets=TARGETS[n], learned=learned)
        yield Situation(name, "papalexi", make, (n, learned) in {(2, "1"), (5, "13")})
    for share in (1 / 3, 1 / 8):
        name = f"norman {share:.0%} of pairs"
        yield Situation(name, "norman", partial(norman, share=share), share > 0.2)


# ---- simulated screens -----------------------------------------------------------------------------------------------


def screen_task(seed: int, screen: Screen, law: Callable[..., AnnData]) -> Task:
    """Draw a screen and leave its new contexts, or every fourth pair, out."""
    cells = law(
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
    """The designs, in all laws."""
    laws: tuple[tuple[str, Callable[..., AnnData], tuple[Screen, ...]], ...] = (
        ("simulated", simulated_cells, DESIGN),
        ("other law", draw, DESIGN),
        ("plain law", partial(draw, plain=True), PLAIN_DESIGN),
    )
    for group, law, design in laws:
        for i, screen in enumerate(design):
            make = partial(screen_task, screen=screen, law=law)
            yield Situation(f"{group} {screen}", group, make, i in QUICK_SCREENS[group])


def all_situations() -> dict[str, Situation]:
    """Situations of complete designs by name; benchmarks/panel_irregular.py has the others."""
    found = chain(situations_kang(), situations_irradiated(), situations_crispr(), situations_simulated())
    return {situation.name: situation for situation in found}
