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
predictions are scored against 250 (1,000) fresh cells of the same law. --anchor-only leaves the generator out, which
takes a third of the time. Prints tables and merges them into benchmarks/results/conditions_*.csv.
"""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import pandas as pd
import quality
import scanpy as sc
import scvi
from anndata import AnnData
from toy_law import quiet

import scperturbdiff as spd
from scperturbdiff.evaluation.baselines import Baseline, default_baselines
from scperturbdiff.evaluation.baselines._rules import PerturbationMeanShift

CELLS, FRESH = 40, 250
METRICS = ["energy_distance", "pearson_delta", "pearson_delta_top", "mse_mean"]
KEYS: dict[str, Any] = {"perturbation_key": "perturbation", "control": "control", "context_keys": ["cell_type"]}
TARGETS = ["IFNGR2", "JAK2"]


@dataclass(frozen=True)
class Case:
    """What to train on, what to predict, what to compare it with.

    `real` holds treated cells of the wanted conditions and controls; `pretrain` cells to train on first, without their
    labels; `baselines` are not fitted yet. `kind` names rows of the table that belong together.
    """

    kind: str
    train: AnnData
    real: AnnData
    baselines: dict[str, Baseline]
    keys: dict[str, Any] = field(default_factory=lambda: dict(KEYS))
    setup: dict[str, Any] = field(default_factory=dict)
    n_cells: int = FRESH
    trainers: dict[str, Callable[[Case, int], spd.PerturbDiff]] = field(default_factory=dict)

    @property
    def condition_keys(self) -> list[str]:
        """Columns beside the context and the perturbation that name a condition."""
        return [self.setup["dose_key"]] if "dose_key" in self.setup else []


def is_control(adata: AnnData) -> np.ndarray:
    return (adata.obs["perturbation"] == "control").to_numpy()


def screens(cells: int = CELLS, fresh_cells: int = FRESH, **arguments: Any) -> tuple[AnnData, AnnData]:
    """A screen to train on, and many more cells of the same laws to score against."""
    small = {"n_cells_per_population": cells, "n_control_cells": 5 * cells}
    large = {"n_cells_per_population": fresh_cells, "n_control_cells": 2 * fresh_cells}
    train, fresh = (spd.datasets.simulate(n_genes=400, n_batches=1, **arguments, **size) for size in (small, large))
    assert np.array_equal(train.uns["truth"]["programme"], fresh.uns["truth"]["programme"])
    return train, fresh


def held_out_case(
    kind: str, screen: AnnData, fresh: AnnData, split: spd.splits.Split, baselines: dict[str, Baseline], **setup: Any
) -> Case:
    """Train on what the split leaves, score against fresh cells of the conditions it holds out."""
    names = ["perturbation", "cell_type"]
    held = pd.MultiIndex.from_frame(split.held_out[names].astype(str))
    wanted = pd.MultiIndex.from_frame(fresh.obs[names].astype(str)).isin(held)
    contexts = fresh.obs["cell_type"].isin(split.held_out["cell_type"].unique()).to_numpy()
    real = fresh[wanted | (contexts & is_control(fresh))].copy()
    return Case(kind, screen[split.train].copy(), real, baselines, setup=setup)


def combinations(seed: int) -> Iterator[Case]:
    """Pairs whose parts are seen alone and in other pairs; a fifth of 40 pairs held out."""
    for kind, interaction in (("interactions on", 1.0), ("interactions off", 0.0)):
        arguments = {"n_contexts": 2, "n_perturbations": 12, "combinations": 40, "interaction": interaction}
        screen, fresh = screens(**arguments, seed=seed)
        split = spd.splits.hold_out_combinations(screen, **KEYS, fraction=0.2, seed=seed)
        yield held_out_case(kind, screen, fresh, split, default_baselines("combinations"))


def doses(seed: int) -> Iterator[Case]:
    """Six doses; one between the others and the highest held out in every context. A dose needs more cells."""
    levels, held = (0.1, 0.3, 1.0, 3.0, 10.0, 30.0), {1.0: "between", 30.0: "beyond"}
    screen, fresh = screens(200, 2000, n_contexts=3, n_perturbations=6, doses=levels, seed=seed)
    train = screen[~screen.obs["dose"].isin(held).to_numpy()].copy()
    for dose, kind in held.items():
        real = fresh[is_control(fresh) | (fresh.obs["dose"] == dose).to_numpy()].copy()
        nearest = {"no_change": spd.baselines.NoChange(), "nearest_dose": PerturbationMeanShift("own")}
        yield Case(kind, train, real, nearest, setup={"dose_key": "dose"}, n_cells=2000)


def features(seed: int) -> Iterator[Case]:
    """A fifth of 30 perturbations never seen; features that tell how they act, and features that tell nothing."""
    for kind in ("informative", "random"):
        arguments = {"n_contexts": 3, "n_perturbations": 30, "n_features": 16, "features": kind}
        screen, fresh = screens(**arguments, seed=seed)
        split = spd.splits.hold_out_perturbations(screen, **KEYS, fraction=0.2, seed=seed)
        table = screen.uns["perturbation_embedding"]
        rules = default_baselines("perturbations", table)
        rules["feature_ridge_0.1"] = spd.baselines.FeatureRidge(table, alpha=0.1)
        yield held_out_case(kind, screen, fresh, split, rules, perturbation_embeddings="perturbation_embedding")


def context(seed: int) -> Iterator[Case]:
    """Two of ten contexts known by their controls only."""
    screen, fresh = screens(n_contexts=10, n_perturbations=10, seed=seed)
    split = spd.splits.hold_out_contexts(screen, **KEYS, fraction=0.2, seed=seed)
    yield held_out_case("controls only", screen, fresh, split, default_baselines("contexts"))


def responders(seed: int) -> Iterator[Case]:
    """A fifth of 60 pairs held out, where all cells respond and where half of them do."""
    for kind, share in (("all respond", 1.0), ("half respond", 0.5)):
        arguments = {"n_contexts": 6, "n_perturbations": 10, "effect_scale": 1.5, "responders": share}
        screen, fresh = screens(60, FRESH, **arguments, seed=seed)
        split = spd.splits.hold_out_pairs(screen, **KEYS, fraction=0.2, seed=seed)
        yield held_out_case(kind, screen, fresh, split, default_baselines("pairs"))


def pretraining(seed: int) -> Iterator[Case]:
    """A twentieth of a screen to train on, an atlas of unperturbed cells to start from, the rest to score against."""
    arguments = {"n_contexts": 6, "n_perturbations": 10, "n_genes": 400, "n_batches": 1}
    screen = spd.datasets.simulate(**arguments, n_cells_per_population=120, n_control_cells=600, seed=seed)
    twentieth = np.random.default_rng(seed).random(screen.n_obs) < 0.05
    small, rest = screen[twentieth].copy(), screen[~twentieth].copy()
    atlas = rest[is_control(rest)].copy()
    trainers = {
        "pretrained": partial(train_pretrained, atlas=atlas),
        "from scratch": train_model,
        "from scratch, atlas as controls": partial(train_together, atlas=atlas),
    }
    yield Case("5 % of the cells", small, rest, default_baselines("pairs"), trainers=trainers)


def norman(seed: int) -> Iterator[Case]:
    """A third of the real pairs, whose parts are seen alone."""
    adata = sc.read_h5ad(quality.data_dir() / "norman2019_perturbench_500g.h5ad")
    keys = {"perturbation_key": "perturbation", "control": "control", "context_keys": []}
    split = spd.splits.hold_out_combinations(adata, **keys, fraction=1 / 3, seed=seed)
    real = adata[split.test | is_control(adata)].copy()
    yield Case("Norman", adata[split.train].copy(), real, default_baselines("combinations"), keys)


CASES = {
    "combinations": combinations,
    "doses": doses,
    "features": features,
    "context": context,
    "responders": responders,
    "pretraining": pretraining,
    "norman": norman,
}


def train_model(
    case: Case, seed: int, adata: AnnData | None = None, max_epochs_generator: int | None = None
) -> spd.PerturbDiff:
    """Set up and train with defaults."""
    scvi.settings.seed = seed
    adata = case.train.copy() if adata is None else adata
    spd.PerturbDiff.setup_anndata(adata, **case.keys, **case.setup)
    model = spd.PerturbDiff(adata)
    model.train(max_epochs_generator=max_epochs_generator, enable_progress_bar=False, accelerator="cpu")
    return model


def train_pretrained(case: Case, seed: int, atlas: AnnData) -> spd.PerturbDiff:
    """Train on unperturbed cells, which need no perturbation key, then adapt to the experiment."""
    scvi.settings.seed = seed
    atlas, adata = atlas.copy(), case.train.copy()
    spd.PerturbDiff.setup_anndata(atlas, context_keys=case.keys["context_keys"])
    reference = spd.PerturbDiff(atlas)
    reference.train(enable_progress_bar=False, accelerator="cpu")
    spd.PerturbDiff.setup_anndata(adata, **case.keys, **case.setup)
    model = spd.PerturbDiff.load_query_data(adata, reference)
    model.train(enable_progress_bar=False, accelerator="cpu")
    return model


def train_together(case: Case, seed: int, atlas: AnnData) -> spd.PerturbDiff:
    """Train once on the experiment and the atlas, whose cells serve as controls."""
    return train_model(case, seed, sc.concat([case.train, atlas]))


def without_network(model: spd.PerturbDiff) -> spd.PerturbDiff:
    """The model whose network adds nothing: every control cell is moved by the anchor."""
    bare = copy.copy(model)
    bare.module = copy.deepcopy(model.module)
    bare.module.generator_ema.silence()
    return bare


def predictions(case: Case, models: dict[str, spd.PerturbDiff], seed: int) -> dict[str, AnnData]:
    """Predicted cells of every model, of its anchor alone, and what the VAE makes of the real cells."""
    treated = case.real[~is_control(case.real)]
    labels = ["perturbation", *case.keys["context_keys"]]
    wanted = treated.obs[[*labels, *case.condition_keys]].drop_duplicates().astype(dict.fromkeys(labels, str))
    controls = case.real[is_control(case.real)].copy()  # those that every baseline starts from, too
    found: dict[str, AnnData] = {}
    for name, model in models.items():
        first = name if len(models) > 1 else "PerturbDiff"
        for label, of in ((first, model), (f"{first}: anchor alone", without_network(model))):
            found[label] = of.predict(controls, wanted, n_cells=case.n_cells, seed=seed, progress=False)
        found[f"{first}: VAE round trip"] = quality.round_trip(model, treated, seed)
    return found


def pooled(cells: dict[str, AnnData], case: Case, seed: int) -> pd.DataFrame:
    """Pearson correlation of mean shifts over all genes of all conditions at once: weak perturbations count for less.

    The ceiling compares one half of the real cells of each condition with the other.
    """
    real = case.real[~is_control(case.real)]
    half = np.random.default_rng(seed).random(real.n_obs) < 0.5
    controls = quality.mean_expression(case.real[is_control(case.real)], case.keys["context_keys"])
    keys = [*case.keys["context_keys"], "perturbation", *case.condition_keys]

    def shifts(adata: AnnData) -> pd.DataFrame:
        means = quality.mean_expression(adata, keys)
        return means - controls.loc[means.index.get_level_values(0)].to_numpy()

    pairs = {name: (shifts(adata), shifts(real)) for name, adata in cells.items()}
    pairs["ceiling"] = shifts(real[half]), shifts(real[~half])
    rows = [
        {
            "model": name,
            "metric": "pearson_pooled",
            "value": np.corrcoef(a.loc[b.index].to_numpy().ravel(), b.to_numpy().ravel())[0, 1],
        }
        for name, (a, b) in pairs.items()
    ]
    return pd.DataFrame(rows)


def score(case: Case, models: dict[str, spd.PerturbDiff], seed: int) -> pd.DataFrame:
    """The tidy table of the evaluation."""
    dose = {"dose_key": case.setup["dose_key"]} if case.condition_keys else {}
    fitted = {name: rule.fit(case.train, **case.keys, **dose) for name, rule in case.baselines.items()}
    predicted = predictions(case, models, seed)
    table = spd.evaluate(
        predicted,
        case.real,
        "control",
        perturbation_key="perturbation",
        context_keys=case.keys["context_keys"],
        condition_keys=case.condition_keys,
        train=case.train,
        baselines=fitted,
        metrics=METRICS,
        seed=seed,
    )
    if dose:
        controls = case.real[is_control(case.real)].copy()
        wanted = case.real.obs.loc[~is_control(case.real), ["perturbation", "dose"]].drop_duplicates()
        rules = {name: rule.predict(controls, wanted, seed=seed) for name, rule in fitted.items()}
        table = pd.concat([table, pooled(predicted | rules, case, seed)], ignore_index=True)
    return table.assign(kind=case.kind, seed=seed)


def run(name: str, seed: int, anchor_only: bool = False) -> pd.DataFrame:
    """All cases of one sub-command and seed; with `anchor_only` the generator is hardly trained and not scored."""
    tables: list[pd.DataFrame] = []
    kept: tuple[AnnData, dict[str, spd.PerturbDiff]] | None = None
    for case in CASES[name](seed):
        start = time.perf_counter()
        if kept is None or kept[0] is not case.train:
            trainers = case.trainers or {"PerturbDiff": train_model}
            if anchor_only:
                trainers = {"PerturbDiff": partial(train_model, max_epochs_generator=1)}
            kept = case.train, {label: trainer(case, seed) for label, trainer in trainers.items()}
        table = score(case, kept[1], seed)
        table = table[~(anchor_only & table["model"].eq("PerturbDiff"))]
        print(f"\n{case.kind}, seed {seed}, {case.train.n_obs} cells, {time.perf_counter() - start:.0f} s")
        print(averages(table).round(3).to_string(), flush=True)
        tables.append(table)
    return pd.concat(tables, ignore_index=True)


def averages(table: pd.DataFrame, by: tuple[str, ...] = ()) -> pd.DataFrame:
    """Mean over conditions, models in the order of the table."""
    return table.groupby([*by, "model", "metric"], sort=False)["value"].mean().unstack()


def papalexi_unseen(seeds: list[int]) -> pd.DataFrame:
    """Held-out targets of the benchmark in quality.py, with the feature rules it is to be compared with."""
    tables = []
    for case in quality.papalexi_unseen(TARGETS):
        features = case.setup["perturbation_embeddings"]
        keys = {"perturbation_key": "perturbation", "control": case.control, "context_keys": list(case.context_keys)}
        for seed in seeds:
            table, seconds = quality.run(case, seed)
            rules = {k: v.fit(case.train, **keys) for k, v in default_baselines("perturbations", features).items()}
            beside = spd.evaluate(
                {"unused": case.real[(case.real.obs["perturbation"] != case.control).to_numpy()].copy()},
                case.real,
                case.control,
                layer_pred=None,
                perturbation_key="perturbation",
                context_keys=list(case.context_keys),
                train=case.train,
                baselines=rules,
                metrics=METRICS,
                ceiling=False,
                seed=seed,
            )
            beside = beside[(beside["role"] == "baseline") & ~beside["model"].isin(table["model"])]
            table = pd.concat([table, beside.assign(case=case.name, seed=seed)], ignore_index=True)
            table = table[table["metric"].isin(METRICS)].rename(columns={"case": "kind"})
            print(f"\n{case.name}, seed {seed}, trained in {seconds:.0f} s")
            print(averages(table).round(3).to_string(), flush=True)
            tables.append(table)
    return pd.concat(tables, ignore_index=True)


def main() -> None:
    """Run one sub-command and write its table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=[*CASES, "papalexi-unseen"])
    parser.add_argument("--seeds", nargs="*", type=int, default=[0, 1, 2])
    parser.add_argument("--anchor-only", action="store_true", help="leave the generator out: quick, to compare anchors")
    options = parser.parse_args()
    quiet()
    if options.what == "papalexi-unseen":
        everything = papalexi_unseen(options.seeds)
    else:
        everything = pd.concat(
            [run(options.what, seed, options.anchor_only) for seed in options.seeds], ignore_index=True
        )
    print(f"\nmean over conditions and seeds {options.seeds}")
    print(averages(everything, ("kind",)).round(3).to_string())
    suffix = "_anchor" if options.anchor_only else ""
    keys = [c for c in everything if c not in ("value", "role", "n_pred", "n_real", "n_control")]
    quality.save(everything, f"conditions_{options.what}{suffix}", keys)


if __name__ == "__main__":
    main()
