"""Quality of PerturbDiff with default settings beside baselines and ceilings, on data it did not see.

    python benchmarks/quality.py kang                      # leave one cell type out, all seven types
    python benchmarks/quality.py kang --only CD14+Mono --seeds 0
    python benchmarks/quality.py irradiated                # leave one cancer line out, 32 proteins
    python benchmarks/quality.py papalexi                  # six targets held out of one replicate
    python benchmarks/quality.py papalexi-unseen           # held-out target, from its Gene Ontology embedding
    python benchmarks/quality.py simulated                 # held-out (context, perturbation)
    python benchmarks/quality.py responders                # the same where half of the treated cells respond

Prints tables and writes them to benchmarks/results/. Real data are looked for in SCPERTURBDIFF_DATA.
"""

from __future__ import annotations

import resource
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import scanpy as sc
import scvi
from common import RESULTS, averages, commit, data_file, parser, quiet, with_report, without_report
from scipy import sparse

import scperturbdiff as spd
from scperturbdiff.data import log_normalize

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from anndata import AnnData

METRICS = ("energy_distance", "pearson_delta", "pearson_delta_top", "mse_mean", "de_overlap", "sd_ratio")
INFORMATIVE = ("IFNGR1", "IFNGR2", "JAK2", "STAT1", "SMAD4", "SPI1")
KANG_PUBLISHED = ("B", "CD14+Mono", "CD4T", "FCGR3A+Mono")


@dataclass(frozen=True)
class Case:
    """What to train on, what to predict, what to compare it with.

    Attributes
    ----------
    name
        Names rows of the table that belong together.
    train
        Cells to train on.
    real
        Treated cells of the wanted conditions, and the controls that they are predicted from.
    context_keys, control
        See :meth:`scperturbdiff.PerturbDiff.setup_anndata`; the perturbation key is `"perturbation"`.
    setup
        Its further arguments.
    n_cells
        Cells to predict in each condition; `None`: as many as are real.
    n_top
        Genes that metrics of the most affected ones look at.
    rules
        Baselines, not fitted yet; `None`: the default ones.
    trainers
        What makes models from the case and a seed, by name; empty: :func:`fit`.
    """

    name: str
    train: AnnData
    real: AnnData
    context_keys: tuple[str, ...] = ("cell_type",)
    control: str = "control"
    setup: Mapping[str, Any] = field(default_factory=dict)
    n_cells: int | None = None
    n_top: int = 100
    rules: Mapping[str, spd.baselines.Baseline] | None = None
    trainers: Mapping[str, Callable[[Case, int], spd.PerturbDiff]] = field(default_factory=dict)

    @property
    def keys(self) -> dict[str, Any]:
        """Arguments that say what was done to the cells, the same for the model, the rules and the splits."""
        return {"perturbation_key": "perturbation", "control": self.control, "context_keys": list(self.context_keys)}

    @property
    def condition_keys(self) -> list[str]:
        """Columns beside context and perturbation that name a condition."""
        return [self.setup["dose_key"]] if "dose_key" in self.setup else []

    @property
    def controls(self) -> AnnData:
        """Controls to predict from; every rule starts from them, too."""
        return self.real[is_control(self.real, self.control)].copy()

    @property
    def treated(self) -> AnnData:
        """The real treated cells."""
        return self.real[~is_control(self.real, self.control)].copy()

    @property
    def wanted(self) -> pd.DataFrame:
        """What to ask for: conditions and numbers of cells."""
        labels = ["perturbation", *self.context_keys]
        cells = self.treated.obs[[*labels, *self.condition_keys]].astype(dict.fromkeys(labels, str))
        table = cells.value_counts(sort=False).rename("n_cells").reset_index()
        return table if self.n_cells is None else table.assign(n_cells=self.n_cells)


def is_control(adata: AnnData, control: str = "control") -> np.ndarray:
    return (adata.obs["perturbation"] == control).to_numpy()


def variable_genes(adata: AnnData, n: int = 2000) -> AnnData:
    """The `n` most variable genes on log-normalised counts; counts stay in X."""
    adata.layers["lognorm"] = log_normalize(adata.X)
    sc.pp.highly_variable_genes(adata, n_top_genes=n, layer="lognorm")
    del adata.layers["lognorm"]
    return adata[:, adata.var["highly_variable"].to_numpy()].copy()


def leave_contexts_out(adata: AnnData, only: Sequence[str], **options: Any) -> Iterator[Case]:
    """The treated cells of one context (`cell_type`) left out at a time; `options` go to the cases."""
    for cell_type in only or sorted(adata.obs["cell_type"].unique()):
        here = (adata.obs["cell_type"] == cell_type).to_numpy()
        yield Case(cell_type, adata[~here | is_control(adata)].copy(), adata[here].copy(), **options)


def kang(only: Sequence[str]) -> Iterator[Case]:
    """Leave one cell type's stimulated cells out."""
    yield from leave_contexts_out(variable_genes(sc.read_h5ad(data_file("kang2018_scgen_valid.h5ad"))), only)


def irradiated(only: Sequence[str]) -> Iterator[Case]:
    """Leave one head-and-neck cancer line's irradiated cells out: every line responds, each in its own way."""
    yield from leave_contexts_out(sc.read_h5ad(data_file("hnscc_radiation_8lines_32proteins.h5ad")), only, n_top=10)


def load_papalexi() -> AnnData:
    """Papalexi's cells with one confident guide, their replicate as a column."""
    adata = sc.read_h5ad(data_file("papalexi2021_sceptre_299g.h5ad"))
    adata = adata[adata.obs["guide_confident"].to_numpy()].copy()
    adata.obs["replicate"] = adata.obs["batch"].astype(str)
    return adata


def papalexi(only: Sequence[str]) -> Iterator[Case]:
    """Leave the informative targets out of one replicate (at least 20 cells each); replicates are the contexts."""
    adata = load_papalexi()
    target = adata.obs["perturbation"].astype(str)
    for replicate in only or sorted(adata.obs["replicate"].unique()):
        here = (adata.obs["replicate"] == replicate).to_numpy()
        count = target[here].value_counts()
        held = here & target.isin([name for name in INFORMATIVE if count.get(name, 0) >= 20]).to_numpy()
        real = adata[held | (here & is_control(adata, "NT"))].copy()
        yield Case(replicate, adata[~held].copy(), real, ("replicate",), "NT")


def papalexi_unseen(only: Sequence[str]) -> Iterator[Case]:
    """Leave one target out altogether and predict it from its Gene Ontology embedding."""
    adata = load_papalexi()
    table = pd.read_csv(data_file("gene_go_svd64_targets.csv"), index_col=0)
    rules = spd.baselines.default_baselines("perturbations", table)
    for target in only or INFORMATIVE:
        held = (adata.obs["perturbation"] == target).to_numpy()
        real = adata[held | is_control(adata, "NT")].copy()
        setup = {"perturbation_embeddings": table}
        yield Case(target, adata[~held].copy(), real, ("replicate",), "NT", setup, rules=rules)


def simulated(only: Sequence[str]) -> Iterator[Case]:
    """Screens of 8 contexts x 30 perturbations, a fifth of the pairs held out; `only` gives seeds of the screens."""
    yield from held_out_pairs(only, n_contexts=8, n_perturbations=30)


def responders(only: Sequence[str]) -> Iterator[Case]:
    """Screens of 6 contexts x 10 perturbations that act on half of the cells; `only` gives seeds of the screens."""
    sizes = {"n_contexts": 6, "n_perturbations": 10, "n_cells_per_population": 100, "n_genes": 400, "n_batches": 1}
    yield from held_out_pairs(only, **sizes, effect_scale=1.5, responders=0.5)


def held_out_pairs(seeds: Sequence[str], **arguments: Any) -> Iterator[Case]:
    """Simulated screens with a fifth of the pairs held out."""
    for seed in [int(s) for s in seeds] or [0]:
        adata = spd.datasets.simulate(**arguments, seed=seed)
        keys = {"perturbation_key": "perturbation", "control": "control", "context_keys": ["cell_type"]}
        split = spd.splits.hold_out_pairs(adata, **keys, fraction=0.2, seed=seed)
        yield Case(f"screen {seed}", adata[split.train].copy(), adata[split.test | is_control(adata)].copy())


CASES = {
    "kang": kang,
    "irradiated": irradiated,
    "papalexi": papalexi,
    "papalexi-unseen": papalexi_unseen,
    "simulated": simulated,
    "responders": responders,
}


def fit(case: Case, seed: int, adata: AnnData | None = None, **options: Any) -> spd.PerturbDiff:
    """Set up and train with defaults; `options` go to the training."""
    scvi.settings.seed = seed
    adata = case.train if adata is None else adata
    spd.PerturbDiff.setup_anndata(adata, **case.keys, **case.setup)
    model = spd.PerturbDiff(adata)
    model.train(enable_progress_bar=False, **options)
    return model


def score(
    case: Case, predicted: Mapping[str, AnnData], seed: int, metrics: Sequence[str] = METRICS, **options: Any
) -> pd.DataFrame:
    """Tidy table of predictions of a case beside baselines and ceiling; `options` go to the evaluation."""
    if case.rules is not None:
        keys = case.keys | ({"dose_key": case.setup["dose_key"]} if case.condition_keys else {})
        options["baselines"] = {name: rule.fit(case.train, **keys) for name, rule in case.rules.items()}
    return spd.evaluate(
        dict(predicted),
        case.real,
        case.control,
        perturbation_key="perturbation",
        context_keys=list(case.context_keys),
        condition_keys=case.condition_keys,
        train=case.train,
        metrics=list(metrics),
        n_top=case.n_top,
        seed=seed,
        **options,
    )


def mean_expression(adata: AnnData, keys: Sequence[str]) -> pd.DataFrame:
    """Mean log-normalised expression of the groups of cells that agree in `keys`, from counts."""
    counts = adata.layers["counts"] if "counts" in adata.layers else adata.X
    labels = [adata.obs[k].astype(float if k == "dose" else str) for k in keys]
    groups = pd.MultiIndex.from_arrays(labels) if len(keys) > 1 else pd.Index(labels[0])
    code, index = pd.factorize(groups)
    index.names = list(keys)
    member = sparse.csr_matrix((np.ones(len(code)), (code, np.arange(len(code)))))
    means = (member @ sparse.csr_matrix(log_normalize(counts))).toarray() / np.bincount(code)[:, None]
    return pd.DataFrame(means, index=index, columns=adata.var_names)


def round_trip(model: spd.PerturbDiff, cells: AnnData, seed: int) -> AnnData:
    """The real cells encoded and decoded: what the first stage alone loses."""
    import torch

    from scperturbdiff.data import assemble_cells
    from scperturbdiff.seeds import seeded

    latent = torch.as_tensor(model.get_latent_representation(cells))
    library = torch.as_tensor(np.asarray(cells.X.sum(axis=1)).ravel(), dtype=torch.float32)
    vae, device = model.module.vae, model.module.device
    with seeded(seed, device), torch.no_grad():
        batch = torch.zeros(len(latent), device=device)
        counts = vae.decode_counts(latent.to(device), library.to(device), batch).cpu().numpy()
    return assemble_cells(counts, cells.obs, cells.var)


def run(case: Case, seed: int) -> tuple[pd.DataFrame, float]:
    """Train with defaults, predict and evaluate one case; returns the tidy table and the training time in seconds."""
    start = time.perf_counter()
    model = fit(case, seed)
    seconds = time.perf_counter() - start
    predicted = model.predict(case.controls, case.wanted, seed=seed, progress=False)
    cells = {"PerturbDiff": predicted, "VAE round trip": round_trip(model, case.treated, seed)}
    table = score(case, cells, seed).assign(case=case.name, seed=seed)
    print(f"\n{case.name}, seed {seed}, trained in {seconds:.0f} s\n{model.report_}")
    print(averages(table).round(3).to_string(), flush=True)
    return with_report(table, {"PerturbDiff": model}), seconds


def main() -> None:
    """Run the cases and write the tables."""
    arguments = parser(__doc__)
    arguments.add_argument("data", choices=sorted(CASES))
    arguments.add_argument("--only", nargs="*", default=[], help="cell types, lines, replicates, targets, screen seeds")
    arguments.add_argument("--seeds", nargs="*", type=int, default=[0])
    arguments.add_argument("--results", type=Path, default=RESULTS, help="folder to write to")
    options = arguments.parse_args()
    quiet()
    options.results.mkdir(exist_ok=True, parents=True)
    tables = []
    for case in CASES[options.data](options.only):
        for seed in options.seeds:
            table, seconds = run(case, seed)
            tables.append(table.assign(seconds=seconds))
            pd.concat(tables).to_csv(options.results / f"{options.data}.csv", index=False)  # long runs may be cut short
    everything = pd.concat(tables, ignore_index=True)
    if options.data == "kang":
        published = everything[everything["cell_type"].isin(KANG_PUBLISHED)]
        print(f"\nmean over {', '.join(KANG_PUBLISHED)}\n{averages(published).round(3).to_string()}")
    summary = spd.summarize_evaluation(without_report(everything))
    weight = everything.groupby("model")["network_weight"].mean()
    summary = summary.assign(network_weight=summary["model"].map(weight), commit=commit())
    summary.to_csv(options.results / f"{options.data}_summary.csv", index=False)
    print(f"\nall cases\n{summary.round(3).to_string()}")
    seconds = everything.groupby(["case", "seed"])["seconds"].first().mean()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"\ntraining: {seconds:.0f} s a case; peak memory of the whole run: {peak:.1f} GB")


if __name__ == "__main__":
    main()
