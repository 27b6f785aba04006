"""Perturbations that training never saw, from features, one left out at a time, beside the simple rules.

    python benchmarks/unseen.py papalexi                   # six targets that act and six that do not; knock-out
    python benchmarks/unseen.py norman                     # singles; activation, weak
    python benchmarks/unseen.py simulated                  # screens whose truth is known, features good and bad
    python benchmarks/unseen.py papalexi --tables go noise --seeds 0 1 2

A target is left out with all of its cells, from everything: the model, the rules, the features of co-expression (which
come from controls). The count VAE alone is trained once a seed, on the cells without all targets that are left out in
turn; retrieval is fitted anew for each. The network is left out: of so few populations it is not used.

Each row of what is printed is a mean over targets: energy distance in 50 principal components, Pearson correlation of
the mean shift, overlap of the 50 most differentially expressed genes, and discrimination, the rank of the right one
among all real targets of the group (1: the nearest, 0.5: chance). Where no model can be better than a rule by more than
chance, on targets that do nothing, only the energy distance means anything.

"without own gene" leaves out what training shows of the target's own gene. Results are merged into
benchmarks/results/unseen_*.csv. Real data: see benchmarks/quality.py.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import anndata as ad
import numpy as np
import pandas as pd
import scanpy as sc
import scvi
import torch
from common import averages, commit, data_file, parser, quiet, save
from conditions import screens, without_network
from quality import INFORMATIVE, load_papalexi

import scperturbdiff as spd
from scperturbdiff.evaluation.baselines import FeatureRidge, default_baselines

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from anndata import AnnData

METRICS = ["energy_distance", "pearson_delta", "de_overlap", "discrimination_l2"]
N_CELLS = 600
"""Cells that are predicted of a target."""
INERT = ("CMTM6", "TNFRSF14", "UBE2L6", "ATF2", "CD86", "ETV7")
"""Targets of Papalexi that do nothing beyond their own gene; that of the first three is measured."""
QUICK: dict[str, Any] = {
    "max_epochs_generator": 1,
    "plan_kwargs": {"steps_per_epoch": 1},
    "validation_size": 0,
    "accelerator": "cpu",
    "enable_progress_bar": False,
}
"""Training that leaves the network as it was."""


@dataclass(frozen=True)
class Screen:
    """Cells, and which perturbations are left out in turn.

    Attributes
    ----------
    name
        Names rows of the table.
    cells
        All cells with raw counts; `obs["perturbation"]`.
    real
        Cells to score against: those of the targets and controls.
    control
        Label of control cells.
    context_keys
        Columns of contexts.
    groups
        Targets that are scored together.
    tables
        Features of components, by name.
    """

    name: str
    cells: AnnData
    real: AnnData
    control: str
    context_keys: tuple[str, ...]
    groups: dict[str, tuple[str, ...]]
    tables: dict[str, pd.DataFrame]

    @property
    def keys(self) -> dict[str, Any]:
        """What was done to the cells, for the model, the rules and the scores."""
        return {"perturbation_key": "perturbation", "control": self.control, "context_keys": list(self.context_keys)}

    @property
    def controls(self) -> AnnData:
        """Controls to predict from."""
        return self.real[(self.real.obs["perturbation"] == self.control).to_numpy()].copy()

    def without(self, targets: Sequence[str]) -> AnnData:
        """Cells that never saw the targets, in combinations neither."""
        parts = self.cells.obs["perturbation"].astype(str).str.split("+")
        return self.cells[~parts.map(lambda p: bool(set(p) & set(targets))).to_numpy()].copy()

    def wanted(self, target: str) -> pd.DataFrame:
        """Request for a target: contexts in the shares of its real cells."""
        labels = ["perturbation", *self.context_keys]
        real = self.real.obs[labels].astype(str)
        share = real[real["perturbation"] == target].value_counts(sort=False, normalize=True)
        table = share.rename("n_cells").reset_index()
        return table.assign(n_cells=np.maximum(np.round(N_CELLS * table["n_cells"]), 1).astype(int))


def papalexi(seed: int) -> Iterator[Screen]:
    """Knock-outs of 25 genes, a few of which act; Gene Ontology, co-expression of nine measured targets, noise."""
    cells = load_papalexi()
    go = pd.read_csv(data_file("gene_go_svd64_targets.csv"), index_col=0)
    targets = sorted(set(cells.obs["perturbation"]) - {"NT"})
    go = go.loc[[name for name in targets if name in go.index]]
    measured = [name for name in targets if name in cells.var_names]
    expressed = spd.features.coexpression(cells, measured, perturbation_key="perturbation", control="NT")
    noise = np.random.default_rng(seed).normal(size=(len(targets), 64))
    tables = {
        "go": go,
        "co-expression": expressed,
        "both": spd.features.join(go=go, coexpression=expressed),
        "noise": pd.DataFrame(noise, index=targets),
    }
    yield Screen("papalexi", cells, cells, "NT", ("replicate",), {"act": INFORMATIVE, "inert": INERT}, tables)


def norman(seed: int) -> Iterator[Screen]:
    """Activations of single genes; their pairs stay in training where no member is left out. All act weakly."""
    cells = sc.read_h5ad(data_file("norman2019_perturbench_500g.h5ad"))
    go = pd.read_csv(data_file("gene_go_svd64_targets.csv"), index_col=0)
    singles = tuple(sorted(p for p in set(cells.obs["perturbation"].astype(str)) if "+" not in p and p in go.index))
    components = sorted({c for p in cells.obs["perturbation"].astype(str) for c in p.split("+")} - {"control"})
    noise = pd.DataFrame(np.random.default_rng(seed).normal(size=(len(components), 64)), index=components)
    tables = {"go": go.loc[[c for c in components if c in go.index]], "noise": noise}
    yield Screen("norman", cells, cells, "control", (), {"singles": singles}, tables)


def simulated(seed: int) -> Iterator[Screen]:
    """Screens of three contexts and 20, 60 or 200 perturbations, eight of which are left out in turn."""
    for n in (20, 60, 200):
        cells, real = screens(40 if n < 200 else 20, n_contexts=3, n_perturbations=n, n_features=16, seed=seed)
        good = cells.uns["perturbation_embedding"]
        rng = np.random.default_rng(seed)
        names = list(good.index)
        held = tuple(sorted(rng.choice(names, 8, replace=False)))
        noise = pd.DataFrame(rng.normal(size=good.shape), names, good.columns)
        others = [name for name in names if name not in held]
        absent = set(rng.choice(others, len(others) // 3, replace=False))
        tables = {
            "informative": good,
            "partly informative": pd.concat([good, good.std().mean() * noise.add_prefix("n")], axis=1),
            "a third missing": good.loc[[name for name in names if name not in absent]],
            "noise": noise,
        }
        yield Screen(f"simulated {n}", cells, real, "control", ("cell_type",), {"held out": held}, tables)


SCREENS = {"papalexi": papalexi, "norman": norman, "simulated": simulated}


def trained_vae(screen: Screen, seed: int) -> dict[str, torch.Tensor]:
    """Weights of a VAE that saw none of the targets."""
    scvi.settings.seed = seed
    cells = screen.without([target for group in screen.groups.values() for target in group])
    spd.PerturbDiff.setup_anndata(cells, **screen.keys)
    model = spd.PerturbDiff(cells)
    model.train(max_epochs_generator=0, accelerator="cpu", enable_progress_bar=False, seed=seed)
    return model.module.vae.state_dict()


def retrieved(
    screen: Screen, train: AnnData, features: pd.DataFrame, vae: dict[str, torch.Tensor], seed: int
) -> spd.PerturbDiff:
    """Model with this VAE whose retrieval knows the training cells, without a network."""
    scvi.settings.seed = seed
    spd.PerturbDiff.setup_anndata(train, **screen.keys, perturbation_embeddings=features)
    model = spd.PerturbDiff(train)
    model.module.vae.load_state_dict(vae)
    model.train(max_epochs_vae=0, seed=seed, **QUICK)
    return without_network(model)


def variants(model: spd.PerturbDiff) -> dict[str, spd.PerturbDiff]:
    """The model, and what it is without a part that is used."""
    retrieval = model.module.retrieval
    assert retrieval is not None
    if not retrieval.own_gene.used:
        return {"PerturbDiff": model}
    bare = without_network(model)
    bare.module.retrieval = replace(retrieval, own_gene=replace(retrieval.own_gene, used=False))
    return {"PerturbDiff": model, "PerturbDiff without own gene": bare}


def predicted(screen: Screen, rule: Any, train: AnnData, wanted: pd.DataFrame, seed: int) -> AnnData:
    """Cells of a rule fitted on the training cells, context by context in the shares of the real ones."""
    rule.fit(train, **screen.keys)
    controls, keys, parts = screen.controls, list(screen.context_keys), []
    for _, row in wanted.iterrows():
        here = controls[(controls.obs[keys].astype(str) == row[keys]).all(axis=1).to_numpy()].copy()
        parts.append(rule.predict(here, [row["perturbation"]], n_cells=row["n_cells"], seed=seed))
    return ad.concat(parts, index_unique="-")


def leave_out(
    screen: Screen, target: str, tables: Sequence[str], vae: dict[str, torch.Tensor], seed: int
) -> dict[tuple[str, str], AnnData]:
    """Predicted cells of one target by every rule and model, by (table, name)."""
    train, wanted = screen.without([target]), screen.wanted(target)
    found = {}
    for label, rule in default_baselines("perturbations").items():
        found["", label] = predicted(screen, rule, train, wanted, seed)
    for name in tables:
        features = screen.tables[name]
        if target not in features.index:
            continue
        rules = default_baselines("perturbations", features) | {"feature_ridge_0.1": FeatureRidge(features, alpha=0.1)}
        for label, rule in rules.items():
            if ("", label) not in found:
                found[name, label] = predicted(screen, rule, train, wanted, seed)
        start = time.perf_counter()
        model = retrieved(screen, train.copy(), features, vae, seed)
        for label, variant in variants(model).items():
            found[name, label] = variant.predict(screen.controls, wanted, seed=seed, progress=False)
        assert model.report_ is not None
        explained = model.report_.retrieval.get("perturbation", np.nan)
        print(f"{target:10} {name:20} explains {explained:.2f} when left out, {time.perf_counter() - start:.0f} s")
        for note in model.report_.notes:
            print(f"    {note}", flush=True)
    return found


def scored(screen: Screen, group: str, cells: dict[str, dict[tuple[str, str], AnnData]], seed: int) -> pd.DataFrame:
    """Tidy table of a group of targets; where a table of features lacks some, everything is scored on the others."""
    targets = screen.groups[group]
    can = {
        key: tuple(t for t in targets if key in cells[t]) for key in dict.fromkeys(k for t in targets for k in cells[t])
    }
    train = screen.without([target for others in screen.groups.values() for target in others])
    tables = []
    for some in dict.fromkeys(can.values()):
        names = {(table, label): f"{table}: {label}" if table else label for table, label in can}
        pooled = {
            names[key]: ad.concat([cells[target][key] for target in some], index_unique="-")
            for key, known in can.items()
            if set(some) <= set(known)
        }
        found = spd.evaluate(
            pooled,
            screen.real[screen.real.obs["perturbation"].isin([*some, screen.control]).to_numpy()].copy(),
            screen.control,
            perturbation_key="perturbation",
            train=train,
            baselines=None,
            metrics=METRICS,
            n_top=50,
            max_cells=N_CELLS,
            seed=seed,
        )
        label = group if some == targets else f"{group}, {len(some)} of {len(targets)}"
        tables.append(found.assign(screen=screen.name, group=label, seed=seed, commit=commit()))
    return pd.concat(tables, ignore_index=True)


def run(screen: Screen, tables: Sequence[str], only: Sequence[str], seed: int) -> pd.DataFrame:
    """All targets of a screen; prints means over targets."""
    groups = {name: tuple(t for t in targets if not only or t in only) for name, targets in screen.groups.items()}
    screen = replace(screen, groups=groups)
    vae = trained_vae(screen, seed)
    targets = [target for group in groups.values() for target in group]
    cells = {target: leave_out(screen, target, tables or list(screen.tables), vae, seed) for target in targets}
    found = pd.concat([scored(screen, name, cells, seed) for name, some in groups.items() if some])
    print(f"\n{screen.name}, seed {seed}")
    print(averages(found, ("group",)).round(3).to_string(), flush=True)
    return found


def main() -> None:
    """Run what is asked for and write the table."""
    arguments = parser(__doc__)
    arguments.add_argument("what", choices=SCREENS)
    arguments.add_argument("--seeds", nargs="*", type=int, default=[0])
    arguments.add_argument("--tables", nargs="*", default=[], help="features; default: all")
    arguments.add_argument("--only", nargs="*", default=[], help="targets; default: all")
    options = arguments.parse_args()
    quiet()
    torch.set_num_threads(1)
    tables = [
        run(screen, [t for t in options.tables if t in screen.tables], options.only, seed)
        for seed in options.seeds
        for screen in SCREENS[options.what](seed)
    ]
    everything = pd.concat(tables, ignore_index=True)
    if len(tables) > 1:
        print(f"\nmean over targets and seeds {options.seeds}")
        print(averages(everything, ("screen", "group")).round(3).to_string())
    save(everything, f"unseen_{options.what}", ["screen", "group", "seed", "model", "perturbation", "metric"])


if __name__ == "__main__":
    main()
