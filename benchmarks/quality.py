"""Quality of PerturbDiff with default settings beside baselines and ceilings, on data it did not see.

    python benchmarks/quality.py kang                      # leave one cell type out, all seven types
    python benchmarks/quality.py kang --only CD14+Mono --seeds 0
    python benchmarks/quality.py papalexi                  # six targets held out of one replicate
    python benchmarks/quality.py papalexi-unseen           # held-out target, from its Gene Ontology embedding
    python benchmarks/quality.py simulated                 # held-out (context, perturbation)
    python benchmarks/quality.py responders                # the same where half of the treated cells respond

Prints tables and writes them to benchmarks/results/. Real data are looked for in SCPERTURBDIFF_DATA or ../shared/data.
"""

from __future__ import annotations

import argparse
import os
import resource
import time
from dataclasses import dataclass, field
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import scanpy as sc
import scvi
from scipy import sparse
from toy_law import quiet

import scperturbdiff as spd
from scperturbdiff.data import log_normalize

if TYPE_CHECKING:
    from collections.abc import Iterator

    from anndata import AnnData

RESULTS = Path(__file__).parent / "results"
METRICS = ["energy_distance", "pearson_delta", "pearson_delta_top", "mse_mean", "de_overlap", "sd_ratio"]
INFORMATIVE = ("IFNGR1", "IFNGR2", "JAK2", "STAT1", "SMAD4", "SPI1")
KANG_PUBLISHED = ("B", "CD14+Mono", "CD4T", "FCGR3A+Mono")


@dataclass(frozen=True)
class Case:
    """One split: what to train on, which controls to predict from, which cells to score against."""

    name: str
    train: AnnData
    real: AnnData
    controls: AnnData
    context_keys: tuple[str, ...]
    control: str
    setup: dict[str, Any] = field(default_factory=dict)


def data_dir() -> Path:
    """Folder of the real data."""
    folder = Path(os.environ.get("SCPERTURBDIFF_DATA", Path(__file__).parents[2] / "shared" / "data"))
    if not folder.is_dir():
        raise SystemExit(f"{folder} is not a folder. Set SCPERTURBDIFF_DATA to the folder of the real data.")
    return folder


def variable_genes(adata: AnnData, n: int = 2000) -> AnnData:
    """The `n` most variable genes on log-normalised counts; counts stay in X."""
    adata.layers["lognorm"] = log_normalize(adata.X)
    sc.pp.highly_variable_genes(adata, n_top_genes=n, layer="lognorm")
    del adata.layers["lognorm"]
    return adata[:, adata.var["highly_variable"].to_numpy()].copy()


def kang(only: list[str]) -> Iterator[Case]:
    """Leave one cell type's stimulated cells out."""
    adata = variable_genes(sc.read_h5ad(data_dir() / "kang2018_scgen_valid.h5ad"))
    for cell_type in only or sorted(adata.obs["cell_type"].unique()):
        here = (adata.obs["cell_type"] == cell_type).to_numpy()
        held = here & (adata.obs["perturbation"] == "stimulated").to_numpy()
        yield Case(
            cell_type,
            adata[~held].copy(),
            adata[here].copy(),
            adata[here & ~held].copy(),
            ("cell_type",),
            "control",
        )


def load_papalexi() -> AnnData:
    """Papalexi's cells with one confident guide, their replicate as a column."""
    adata = sc.read_h5ad(data_dir() / "papalexi2021_sceptre_299g.h5ad")
    adata = adata[adata.obs["guide_confident"].to_numpy()].copy()
    adata.obs["replicate"] = adata.obs["batch"].astype(str)
    return adata


def papalexi(only: list[str]) -> Iterator[Case]:
    """Leave the informative targets out of one replicate (at least 20 cells each); replicates are the contexts."""
    adata = load_papalexi()
    target = adata.obs["perturbation"].astype(str)
    control = (target == "NT").to_numpy()
    for replicate in only or sorted(adata.obs["replicate"].unique()):
        here = (adata.obs["replicate"] == replicate).to_numpy()
        count = target[here].value_counts()
        held = here & target.isin([name for name in INFORMATIVE if count.get(name, 0) >= 20]).to_numpy()
        yield Case(
            replicate,
            adata[~held].copy(),
            adata[held | (here & control)].copy(),
            adata[here & control].copy(),
            ("replicate",),
            "NT",
        )


def papalexi_unseen(only: list[str]) -> Iterator[Case]:
    """Leave one target out altogether and predict it from its Gene Ontology embedding."""
    adata = load_papalexi()
    table = pd.read_csv(data_dir() / "gene_go_svd64_targets.csv", index_col=0)
    control = (adata.obs["perturbation"] == "NT").to_numpy()
    for target in only or INFORMATIVE:
        held = (adata.obs["perturbation"] == target).to_numpy()
        yield Case(
            target,
            adata[~held].copy(),
            adata[held | control].copy(),
            adata[control].copy(),
            ("replicate",),
            "NT",
            {"perturbation_embeddings": table},
        )


def simulated(only: list[str]) -> Iterator[Case]:
    """Screens of 8 contexts x 30 perturbations, a fifth of the pairs held out; `only` gives seeds of the screens."""
    yield from held_out_pairs(only, n_contexts=8, n_perturbations=30)


def responders(only: list[str]) -> Iterator[Case]:
    """Screens of 6 contexts x 10 perturbations that act on half of the cells; `only` gives seeds of the screens."""
    sizes = {"n_contexts": 6, "n_perturbations": 10, "n_cells_per_population": 100, "n_genes": 400, "n_batches": 1}
    yield from held_out_pairs(only, **sizes, effect_scale=1.5, responders=0.5)


def held_out_pairs(seeds: list[str], **arguments: Any) -> Iterator[Case]:
    """Simulated screens with a fifth of the pairs held out."""
    for seed in [int(s) for s in seeds] or [0]:
        adata = spd.datasets.simulate(**arguments, seed=seed)
        split = spd.splits.hold_out_pairs(
            adata,
            perturbation_key="perturbation",
            control="control",
            context_keys=["cell_type"],
            fraction=0.2,
            seed=seed,
        )
        control = (adata.obs["perturbation"] == "control").to_numpy()
        yield Case(
            f"screen {seed}",
            adata[split.train].copy(),
            adata[split.test | control].copy(),
            adata[control].copy(),
            ("cell_type",),
            "control",
        )


CASES = {
    "kang": kang,
    "papalexi": papalexi,
    "papalexi-unseen": papalexi_unseen,
    "simulated": simulated,
    "responders": responders,
}


def fit(case: Case, seed: int) -> tuple[spd.PerturbDiff, float]:
    """Train with defaults; returns the model and the seconds it took."""
    scvi.settings.seed = seed
    spd.PerturbDiff.setup_anndata(
        case.train, "perturbation", case.control, context_keys=list(case.context_keys), **case.setup
    )
    model = spd.PerturbDiff(case.train)
    start = time.perf_counter()
    model.train(enable_progress_bar=False)
    return model, time.perf_counter() - start


def treated_cells(case: Case) -> tuple[AnnData, pd.DataFrame]:
    """The real treated cells of a case, and what to ask for: their conditions and numbers of cells."""
    treated = case.real[case.real.obs["perturbation"].to_numpy() != case.control]
    keys = ["perturbation", *case.context_keys]
    return treated, treated.obs[keys].astype(str).value_counts(sort=False).rename("n_cells").reset_index()


def score(case: Case, predicted: dict[str, AnnData], seed: int) -> pd.DataFrame:
    """Tidy table of predictions of a case beside baselines and ceiling."""
    table = spd.evaluate(
        predicted,
        case.real,
        case.control,
        perturbation_key="perturbation",
        context_keys=list(case.context_keys),
        train=case.train,
        metrics=METRICS,
        seed=seed,
    )
    return table.assign(case=case.name, seed=seed)


def run(case: Case, seed: int) -> tuple[pd.DataFrame, float]:
    """Train with defaults, predict and evaluate one case; returns the tidy table and the training time in seconds."""
    model, seconds = fit(case, seed)
    treated, wanted = treated_cells(case)
    predicted = model.predict(case.controls, wanted, seed=seed, progress=False)
    return score(case, {"PerturbDiff": predicted, "VAE round trip": round_trip(model, treated, seed)}, seed), seconds


def mean_expression(adata: AnnData, keys: list[str]) -> pd.DataFrame:
    """Mean log-normalised expression of the groups of cells that agree in `keys`, from counts."""
    counts = adata.layers["counts"] if "counts" in adata.layers else adata.X
    labels = [adata.obs[k].astype(float if k == "dose" else str) for k in keys]
    groups = pd.MultiIndex.from_arrays(labels) if len(keys) > 1 else pd.Index(labels[0])
    code, index = pd.factorize(groups)
    index.names = keys
    member = sparse.csr_matrix((np.ones(len(code)), (code, np.arange(len(code)))))
    means = (member @ sparse.csr_matrix(log_normalize(counts))).toarray() / np.bincount(code)[:, None]
    return pd.DataFrame(means, index=index, columns=adata.var_names)


def round_trip(model: spd.PerturbDiff, cells: AnnData, seed: int) -> AnnData:
    """The real cells encoded and decoded: what the first stage alone loses."""
    import torch

    from scperturbdiff.data import assemble_cells
    from scperturbdiff.seeds import seeded

    latent = model.get_latent_representation(cells)
    with seeded(seed), torch.no_grad():
        counts = model.module.vae.decode_counts(
            torch.as_tensor(latent),
            torch.as_tensor(np.asarray(cells.X.sum(axis=1)).ravel(), dtype=torch.float32),
            torch.zeros(len(latent)),
        ).numpy()
    return assemble_cells(counts, cells.obs, cells.var)


def save(rows: pd.DataFrame, name: str, keys: list[str]) -> None:
    """Merge `rows` into a results file; rows of the same `keys` are replaced."""
    path = RESULTS / f"{name}.csv"
    RESULTS.mkdir(exist_ok=True)
    if path.is_file():
        # as a file would give them back: a dose that is text here and a number there would stay beside itself
        rows = pd.concat([pd.read_csv(path), pd.read_csv(StringIO(rows.to_csv(index=False)))])
    rows.drop_duplicates(keys, keep="last").sort_values(keys).round(4).to_csv(path, index=False)


def main() -> None:
    """Run the cases and write the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", choices=sorted(CASES))
    parser.add_argument("--only", nargs="*", default=[], help="cell types, replicates, targets or screen seeds")
    parser.add_argument("--seeds", nargs="*", type=int, default=[0])
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder to write to")
    options = parser.parse_args()
    quiet()
    tables, seconds = [], []
    for case in CASES[options.data](options.only):
        for seed in options.seeds:
            table, taken = run(case, seed)
            tables.append(table.assign(seconds=taken))
            seconds.append(taken)
            options.results.mkdir(exist_ok=True, parents=True)
            pd.concat(tables).to_csv(options.results / f"{options.data}.csv", index=False)  # long runs may be cut short
            means = table.groupby(["model", "metric"], sort=False)["value"].mean().unstack()
            print(f"\n{case.name}, seed {seed}, trained in {taken:.0f} s\n{means.round(3).to_string()}", flush=True)
    everything = pd.concat(tables, ignore_index=True)
    if options.data == "kang":
        published = everything[everything["cell_type"].isin(KANG_PUBLISHED)]
        print(f"\nmean over {', '.join(KANG_PUBLISHED)}")
        print(published.groupby(["model", "metric"], sort=False)["value"].mean().unstack().round(3).to_string())
    summary = spd.summarize_evaluation(everything)
    summary.to_csv(options.results / f"{options.data}_summary.csv", index=False)
    print(f"\nall cases\n{summary.round(3).to_string()}")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"\ntraining: {np.mean(seconds):.0f} s a case; peak memory of the whole run: {peak:.1f} GB")


if __name__ == "__main__":
    main()
