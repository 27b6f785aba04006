"""What PerturbDiff predicts beyond pairs of a known perturbation and a known context, default settings throughout.

    python benchmarks/conditions.py combinations           # held-out pairs, interactions on and off
    python benchmarks/conditions.py doses                  # doses left out between and beyond the measured ones
    python benchmarks/conditions.py features               # unseen perturbations, informative and random features
    python benchmarks/conditions.py context                # contexts known by their controls only
    python benchmarks/conditions.py responders             # populations of which half of the cells respond
    python benchmarks/conditions.py pretraining            # 5 % of the perturbed cells, with and without pretraining
    python benchmarks/conditions.py norman                 # real pairs (Norman et al. 2019)
    python benchmarks/conditions.py papalexi-unseen        # real held-out targets, from Gene Ontology features

The first six are simulated screens whose truth is known: training sees 40 cells of a population (100 for doses),
predictions are scored against 250 (1,000) fresh cells of the same law. --retrieval-only leaves the network out, which
takes a third of the time. Prints tables and merges them into benchmarks/results/conditions_*.csv. Real data: see
benchmarks/quality.py.
"""

from __future__ import annotations

import copy
import time
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import scanpy as sc
import scvi
from common import averages, data_file, parser, quiet, save, with_report
from quality import Case, fit, is_control, mean_expression, round_trip, score
from quality import papalexi_unseen as unseen_targets

import scperturbdiff as spd
from scperturbdiff.evaluation.baselines import FeatureRidge, NoChange, PerturbationMeanShift, default_baselines

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from anndata import AnnData

CELLS, FRESH = 40, 250
METRICS = ("energy_distance", "pearson_delta", "pearson_delta_top", "mse_mean")
KEYS: dict[str, Any] = {"perturbation_key": "perturbation", "control": "control", "context_keys": ["cell_type"]}
TARGETS = ("IFNGR2", "JAK2")
VALUES = r"(value|role|n_pred|n_real|n_control|network_\w+|explained_\w+|commit)$"
"""Columns of a table that do not name its rows."""


def screens(cells: int = CELLS, fresh_cells: int = FRESH, **arguments: Any) -> tuple[AnnData, AnnData]:
    """A screen to train on, and many more cells of the same laws to score against."""
    small = {"n_cells_per_population": cells, "n_control_cells": 5 * cells}
    large = {"n_cells_per_population": fresh_cells, "n_control_cells": 2 * fresh_cells}
    train, fresh = (spd.datasets.simulate(n_genes=400, n_batches=1, **arguments, **size) for size in (small, large))
    assert np.array_equal(train.uns["truth"]["programme"], fresh.uns["truth"]["programme"])
    return train, fresh


def held_out_case(name: str, screen: AnnData, fresh: AnnData, split: spd.splits.Split, **options: Any) -> Case:
    """Train on what the split leaves, score against fresh cells of the conditions it holds out."""
    names = ["perturbation", "cell_type"]
    held = pd.MultiIndex.from_frame(split.held_out[names].astype(str))
    wanted = pd.MultiIndex.from_frame(fresh.obs[names].astype(str)).isin(held)
    contexts = fresh.obs["cell_type"].isin(split.held_out["cell_type"].unique()).to_numpy()
    real = fresh[wanted | (contexts & is_control(fresh))].copy()
    options.setdefault("rules", default_baselines(split.kind))
    return Case(name, screen[split.train].copy(), real, n_cells=FRESH, **options)


def combinations(seed: int) -> Iterator[Case]:
    """Pairs whose parts are seen alone and in other pairs; a fifth of 40 pairs held out."""
    for name, interaction in (("interactions on", 1.0), ("interactions off", 0.0)):
        arguments = {"n_contexts": 2, "n_perturbations": 12, "combinations": 40, "interaction": interaction}
        screen, fresh = screens(**arguments, seed=seed)
        split = spd.splits.hold_out_combinations(screen, **KEYS, fraction=0.2, seed=seed)
        yield held_out_case(name, screen, fresh, split)


def doses(seed: int) -> Iterator[Case]:
    """Six doses; one between the others and the highest held out in every context. A dose needs more cells."""
    levels, held = (0.1, 0.3, 1.0, 3.0, 10.0, 30.0), {1.0: "between", 30.0: "beyond"}
    screen, fresh = screens(200, 2000, n_contexts=3, n_perturbations=6, doses=levels, seed=seed)
    train = screen[~screen.obs["dose"].isin(held).to_numpy()].copy()
    for dose, name in held.items():
        real = fresh[is_control(fresh) | (fresh.obs["dose"] == dose).to_numpy()].copy()
        nearest = {"no_change": NoChange(), "nearest_dose": PerturbationMeanShift("own")}
        yield Case(name, train, real, setup={"dose_key": "dose"}, n_cells=2000, rules=nearest)


def features(seed: int) -> Iterator[Case]:
    """A fifth of 30 perturbations never seen; features that tell how they act, and features that tell nothing."""
    for name in ("informative", "random"):
        arguments = {"n_contexts": 3, "n_perturbations": 30, "n_features": 16, "features": name}
        screen, fresh = screens(**arguments, seed=seed)
        split = spd.splits.hold_out_perturbations(screen, **KEYS, fraction=0.2, seed=seed)
        table = screen.uns["perturbation_embedding"]
        rules = default_baselines("perturbations", table) | {"feature_ridge_0.1": FeatureRidge(table, alpha=0.1)}
        setup = {"perturbation_embeddings": "perturbation_embedding"}
        yield held_out_case(name, screen, fresh, split, setup=setup, rules=rules)


def context(seed: int) -> Iterator[Case]:
    """Two of ten contexts known by their controls only."""
    screen, fresh = screens(n_contexts=10, n_perturbations=10, seed=seed)
    split = spd.splits.hold_out_contexts(screen, **KEYS, fraction=0.2, seed=seed)
    yield held_out_case("controls only", screen, fresh, split)


def responders(seed: int) -> Iterator[Case]:
    """A fifth of 60 pairs held out, where all cells respond and where half of them do."""
    for name, share in (("all respond", 1.0), ("half respond", 0.5)):
        arguments = {"n_contexts": 6, "n_perturbations": 10, "effect_scale": 1.5, "responders": share}
        screen, fresh = screens(60, FRESH, **arguments, seed=seed)
        split = spd.splits.hold_out_pairs(screen, **KEYS, fraction=0.2, seed=seed)
        yield held_out_case(name, screen, fresh, split)


def pretraining(seed: int) -> Iterator[Case]:
    """A twentieth of a screen to train on, an atlas of unperturbed cells to start from, the rest to score against."""
    arguments = {"n_contexts": 6, "n_perturbations": 10, "n_genes": 400, "n_batches": 1}
    screen = spd.datasets.simulate(**arguments, n_cells_per_population=120, n_control_cells=600, seed=seed)
    twentieth = np.random.default_rng(seed).random(screen.n_obs) < 0.05
    small, rest = screen[twentieth].copy(), screen[~twentieth].copy()
    atlas = rest[is_control(rest)].copy()
    trainers: dict[str, Callable[[Case, int], spd.PerturbDiff]] = {
        "pretrained": partial(train_pretrained, atlas=atlas),
        "from scratch": fit,
        "from scratch, atlas as controls": partial(train_together, atlas=atlas),
    }
    rules = default_baselines("pairs")
    yield Case("5 % of the cells", small, rest, n_cells=FRESH, rules=rules, trainers=trainers)


def norman(seed: int) -> Iterator[Case]:
    """A third of the real pairs, whose parts are seen alone; as many cells are predicted as there are controls, 100."""
    adata = sc.read_h5ad(data_file("norman2019_perturbench_500g.h5ad"))
    split = spd.splits.hold_out_combinations(adata, **{**KEYS, "context_keys": []}, fraction=1 / 3, seed=seed)
    real, rules = adata[split.test | is_control(adata)].copy(), default_baselines("combinations")
    yield Case("Norman", adata[split.train].copy(), real, (), rules=rules)


def papalexi_unseen(seed: int) -> Iterator[Case]:
    """Two real targets held out in turn, as in quality.py."""
    yield from unseen_targets(TARGETS)


CASES = {
    "combinations": combinations,
    "doses": doses,
    "features": features,
    "context": context,
    "responders": responders,
    "pretraining": pretraining,
    "norman": norman,
    "papalexi-unseen": papalexi_unseen,
}


def train_pretrained(case: Case, seed: int, atlas: AnnData) -> spd.PerturbDiff:
    """Train on unperturbed cells, which need no perturbation key, then adapt to the experiment."""
    scvi.settings.seed = seed
    atlas, adata = atlas.copy(), case.train.copy()
    spd.PerturbDiff.setup_anndata(atlas, context_keys=list(case.context_keys))
    reference = spd.PerturbDiff(atlas)
    reference.train(enable_progress_bar=False)
    spd.PerturbDiff.setup_anndata(adata, **case.keys, **case.setup)
    model = spd.PerturbDiff.load_query_data(adata, reference)
    model.train(enable_progress_bar=False)
    return model


def train_together(case: Case, seed: int, atlas: AnnData) -> spd.PerturbDiff:
    """Train once on the experiment and the atlas, whose cells serve as controls."""
    return fit(case, seed, sc.concat([case.train, atlas]))


def without_network(model: spd.PerturbDiff) -> spd.PerturbDiff:
    """The model whose network adds nothing: every control cell is moved as retrieval says."""
    bare = copy.copy(model)
    bare.module = copy.deepcopy(model.module)
    bare.module.generator_ema.network_weight.fill_(0)
    bare.report_ = None if model.report_ is None else replace(model.report_, network_weight=0.0)
    return bare


def pooled(cells: dict[str, AnnData], case: Case, seed: int) -> pd.DataFrame:
    """Pearson correlation of mean shifts over all genes of all conditions at once: weak perturbations count for less.

    The ceiling compares one half of the real cells of each condition with the other.
    """
    real = case.treated
    half = np.random.default_rng(seed).random(real.n_obs) < 0.5
    controls = mean_expression(case.controls, case.context_keys)
    keys = [*case.context_keys, "perturbation", *case.condition_keys]

    def shifts(adata: AnnData) -> pd.DataFrame:
        means = mean_expression(adata, keys)
        return means - controls.loc[means.index.get_level_values(0)].to_numpy()

    pairs = {name: (shifts(adata), shifts(real)) for name, adata in cells.items()}
    pairs["ceiling"] = shifts(real[half]), shifts(real[~half])
    values = {
        name: np.corrcoef(a.loc[b.index].to_numpy().ravel(), b.to_numpy().ravel())[0, 1]
        for name, (a, b) in pairs.items()
    }
    return pd.DataFrame({"model": list(values), "metric": "pearson_pooled", "value": list(values.values())})


def evaluated(case: Case, trained: dict[str, spd.PerturbDiff], seed: int) -> pd.DataFrame:
    """The tidy table of every model, of its retrieval alone, and of what the VAE makes of the real cells."""
    models = trained | {f"{name}: retrieval alone": without_network(model) for name, model in trained.items()}
    predicted = {n: m.predict(case.controls, case.wanted, seed=seed, progress=False) for n, m in models.items()}
    predicted |= {f"{name}: VAE round trip": round_trip(m, case.treated, seed) for name, m in trained.items()}
    table = score(case, predicted, seed, METRICS)
    if case.condition_keys:
        wanted = case.wanted.drop(columns="n_cells")
        rules = {name: rule.predict(case.controls, wanted, seed=seed) for name, rule in (case.rules or {}).items()}
        table = pd.concat([table, pooled(predicted | rules, case, seed)], ignore_index=True)
    return with_report(table.assign(kind=case.name, seed=seed), models)


def run(name: str, seed: int, retrieval_only: bool = False) -> pd.DataFrame:
    """All cases of one sub-command and seed; with `retrieval_only` the network is hardly trained and not scored."""
    tables: list[pd.DataFrame] = []
    kept: tuple[AnnData, dict[str, spd.PerturbDiff]] | None = None
    for case in CASES[name](seed):
        start = time.perf_counter()
        if kept is None or kept[0] is not case.train:
            trainers = case.trainers or {"PerturbDiff": fit}
            if retrieval_only:
                trainers = {"PerturbDiff": partial(fit, max_epochs_generator=1)}
            kept = case.train, {label: trainer(case, seed) for label, trainer in trainers.items()}
        table = evaluated(case, kept[1], seed)
        table = table[~(retrieval_only & table["model"].eq("PerturbDiff"))]
        print(f"\n{case.name}, seed {seed}, {case.train.n_obs} cells, {time.perf_counter() - start:.0f} s")
        for label, model in kept[1].items():
            print(f"{label}: {model.report_}")
        print(averages(table).round(3).to_string(), flush=True)
        tables.append(table)
    return pd.concat(tables, ignore_index=True)


def main() -> None:
    """Run one sub-command and write its table."""
    arguments = parser(__doc__)
    arguments.add_argument("what", choices=CASES)
    arguments.add_argument("--seeds", nargs="*", type=int, default=[0, 1, 2])
    arguments.add_argument("--retrieval-only", action="store_true", help="leave the network out: quick")
    options = arguments.parse_args()
    quiet()
    tables = [run(options.what, seed, options.retrieval_only) for seed in options.seeds]
    everything = pd.concat(tables, ignore_index=True)
    print(f"\nmean over conditions and seeds {options.seeds}")
    print(averages(everything, ("kind",)).round(3).to_string())
    suffix = "_retrieval" if options.retrieval_only else ""
    keys = everything.columns[~everything.columns.str.match(VALUES)]
    save(everything, f"conditions_{options.what}{suffix}", list(keys))


if __name__ == "__main__":
    main()
