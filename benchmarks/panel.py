"""A panel of many small situations: is the model, with defaults, ever worse than the best simple rule?

    python benchmarks/panel.py --quick                     # a fixed subset spread over all groups
    python benchmarks/panel.py --seeds 0 1 2 --jobs 4      # everything
    python benchmarks/panel.py --only "kang 2" --again     # names that a regular expression matches, anew
    python benchmarks/panel.py --list

In every situation the model is trained with defaults, asked for conditions that were left out, and scored beside the
rules of :func:`scperturbdiff.baselines.default_baselines` that can predict all of them, fitted on the same cells with
the same labels. One line is printed and one row written for every situation and seed. Rows that are in the file with
the same commit are skipped, unless they are errors or files were not committed (`+`; --commit gives a name instead).
Real data: see benchmarks/quality.py.

*Energy distances* are means over conditions, in 50 principal components. The *best rule* is the best by hindsight; no
change is one of the rules.

*Standard error* of the difference between model and best rule: that from the sampling of cells, or that over conditions
where there are three or more and it is larger. The former adds up the squared first-order influence on the difference
(U-statistics) of every real cell and of every control cell, through all cells that were made of it, and twice the
squared noise of every condition.

*Noise*: the standard deviation of the energy distance between random halves of the real cells, halved, as the halves
have half of the cells. In a mean over conditions half of its variance is that of the controls: the same in a context.

*Verdict*: `lost` if the model's energy distance is above the best rule's by more than 5 % of no change's, more than two
standard errors and more than twice the noise; `won` if it is below by as much; else `tied`. The noise counts where
nothing has an effect.

*Ratio* to the best rule: both energy distances are raised to a floor first, the larger of 2 % of no change's and the
noise.

*Pearson and DE overlap* are compared with the rule that is best in each, where perturbations have an effect: no
change's energy distance is above three times the noise.
"""

from __future__ import annotations

import contextlib
import io
import multiprocessing
import os
import re
import time
import traceback
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import TYPE_CHECKING, Any

import anndata as ad
import numpy as np
import pandas as pd
import scvi
import torch
from common import RESULTS, averages, commit, parser, quiet
from conditions import without_network
from panel_irregular import irregular_situations
from panel_situations import all_situations
from scipy.spatial.distance import cdist
from sklearn.decomposition import PCA

import scperturbdiff as spd
from scperturbdiff.data import log_normalize
from scperturbdiff.evaluation.baselines import default_baselines

if TYPE_CHECKING:
    import argparse
    from collections.abc import Iterator

    from anndata import AnnData
    from numpy.typing import NDArray
    from panel_situations import Situation, Task

    Job = tuple[str, int, str]
    Places = NDArray[np.float64]

METRICS = ["energy_distance", "pearson_delta", "de_overlap"]
MODEL, RETRIEVAL, NO_CHANGE, CEILING = "model", "retrieval", "no_change", "ceiling"
MARGIN, FLOOR, BELOW = 0.05, 0.02, 0.02
"""Of no change's energy distance: what makes a verdict, what ratios are floored at. Tolerated in other metrics."""
N_HALVES = 20
UNSURE = r".*\+$|unknown$"
"""Commits that do not say which code was measured, unless given by name."""


def by_name() -> dict[str, Situation]:
    """Every situation."""
    return all_situations() | {situation.name: situation for situation in irregular_situations()}


def rule_cells(task: Task, seed: int) -> dict[str, AnnData]:
    """Cells of every default rule that can predict all conditions, by name."""
    contexts = task.setup["context_keys"]
    here = pd.MultiIndex.from_frame(task.controls.obs[contexts].astype(str)) if contexts else None
    found = {}
    for name, rule in (default_baselines("pairs") | default_baselines("combinations")).items():
        try:
            rule.fit(task.train, **task.keys)
            groups = task.request.groupby(contexts, sort=False) if contexts else [((), task.request)]
            parts = []
            for context, wanted in groups:
                cells = task.controls if here is None else task.controls[here.isin([context])]
                parts.append(rule.predict(cells.copy(), wanted[["perturbation", "n_cells"]], seed=seed))
        except ValueError:  # the rule has nothing to go by
            continue
        found[name] = ad.concat(parts, index_unique="-", merge="same")
    return found


def fit(task: Task, seed: int) -> spd.PerturbDiff:
    """Set up and train with defaults, on the CPU."""
    scvi.settings.seed = seed
    spd.PerturbDiff.setup_anndata(task.train, **task.setup)
    model = spd.PerturbDiff(task.train)
    model.train(accelerator="cpu", enable_progress_bar=False, seed=seed)
    return model


def influences(x: Places, y: Places) -> tuple[Places, Places]:
    """First-order influence of the cells of `x` on the energy distance, and of those of `y` less what `y` has alone."""
    between = cdist(x, y)
    of_x, of_y = 2 * (between.mean(1) - cdist(x, x).sum(1) / (len(x) - 1)), 2 * between.mean(0)
    return (of_x - of_x.mean()) / len(x), (of_y - of_y.mean()) / len(y)


def noise_of(real: Places, seed: int) -> float:
    """Standard deviation of the energy distance between two populations of this law and size."""
    rng = np.random.default_rng([seed, 13])
    orders, middle = [rng.permutation(len(real)) for _ in range(N_HALVES)], len(real) // 2
    found = [spd.metrics.energy_distance(real[order[:middle]], real[order[middle:]]) for order in orders]
    return 0.5 * float(np.std(found, ddof=1))


def cell_errors(task: Task, model: AnnData, rule: AnnData, seed: int) -> tuple[float, float]:
    """Standard error of the mean difference by the sampling of cells, and the noise of a mean distance of 0."""
    train = log_normalize(task.train.X)
    pca = PCA(min(50, min(train.shape) - 1), svd_solver="arpack", random_state=seed).fit(train)
    keys = ["perturbation", *task.setup["context_keys"]]

    def groups(adata: AnnData, layer: str | None) -> dict[Any, Any]:
        counts = adata[:, task.train.var_names].layers[layer] if layer else adata.X
        places = pca.transform(log_normalize(counts)).astype(np.float64)
        rows = adata.obs[keys].astype(str).groupby(keys).indices
        return {c: (places[at], adata.obs.get("control_cell", adata.obs_names)[at]) for c, at in rows.items()}

    real, predicted, ruled = groups(task.truth, None), groups(model, "counts"), groups(rule, "counts")
    of_controls, of_real, noises = [], 0.0, []
    for condition, (truth, _) in real.items():
        (x, of), (z, of_z) = predicted[condition], ruled[condition]
        (of_model, real_model), (of_rule, real_rule) = influences(x, truth), influences(z, truth)
        of_controls += [pd.Series(of_model, np.asarray(of)), pd.Series(-of_rule, np.asarray(of_z))]
        noises.append(noise_of(truth, seed))
        of_real += float(((real_model - real_rule) ** 2).sum()) + 2 * noises[-1] ** 2
    controls = pd.concat(of_controls)
    error = np.sqrt((controls.groupby(controls.index).sum() ** 2).sum() + of_real) / len(real)
    contexts = np.array(["|".join(c[1:]) if isinstance(c, tuple) else "" for c in real])
    noise = pd.Series(noises).groupby(contexts).agg(lambda n: ((n**2).sum() + n.sum() ** 2) / 2).sum()
    return float(error), float(np.sqrt(noise)) / len(real)


def judge(difference: float, no_change: float, error: float, noise: float) -> str:
    """Verdict on the difference of energy distances, model less best rule."""
    margin = max(MARGIN * no_change, 2 * error, 2 * noise)
    return "lost" if difference > margin else "won" if difference < -margin else "tied"


def compare(table: pd.DataFrame, metric: str, rules: list[str], lower: bool = False) -> dict[str, Any]:
    """Mean over conditions of the model and of the rule that is best in `metric`, and what they differ by."""
    wide = table[table["metric"] == metric].pivot(index="condition", columns="model", values="value")
    means = wide[rules].mean() if lower else -wide[rules].mean()
    best = str(means.idxmin()) if means.notna().any() else NO_CHANGE
    difference = (wide[MODEL] - wide[best]).dropna()
    n = len(difference)
    return {
        "model": wide[MODEL].mean(),
        "best": wide[best].mean(),
        "rule": best,
        "difference": difference.mean() if n else np.nan,
        "error": difference.std(ddof=1) / np.sqrt(n) if n > 1 else np.nan,
    }


def evaluated(task: Task, cells: dict[str, AnnData], rules: dict[str, AnnData], seed: int) -> pd.DataFrame:
    """The tidy table of predictions beside rules and ceiling."""
    return spd.evaluate(
        cells,
        ad.concat([task.controls, task.truth]),
        **task.keys,
        train=task.train,
        baselines=rules,
        metrics=METRICS,
        n_top=min(100, task.train.n_vars // 3),
        seed=seed,
    )


def score(task: Task, model: spd.PerturbDiff, seed: int) -> dict[str, Any]:
    """Predict, score beside rules and ceiling; the numbers of a row."""
    weight = 0.0 if model.report_ is None else float(model.report_.network_weight)
    models = {MODEL: model} | ({RETRIEVAL: without_network(model)} if weight > 0 else {})
    cells = {n: m.predict(task.controls, task.request, seed=seed, progress=False) for n, m in models.items()}
    rules = rule_cells(task, seed)
    table = evaluated(task, cells, rules, seed)
    keys = ["perturbation", *task.setup["context_keys"]]
    table["condition"] = table[keys].astype(str).agg("|".join, axis=1)
    distance = averages(table)["energy_distance"]
    found = compare(table, "energy_distance", list(rules), lower=True)
    se_cells, noise = cell_errors(task, cells[MODEL], rules[found["rule"]], seed)
    error = max(se_cells, found["error"]) if len(task.request) > 2 else se_cells
    floor = max(FLOOR * distance[NO_CHANGE], noise)
    pearson, overlap = (compare(table, metric, list(rules)) for metric in METRICS[1:])
    return {
        "verdict": judge(found["difference"], distance[NO_CHANGE], error, noise),
        "ratio": max(found["model"], floor) / max(found["best"], floor),
        MODEL: found["model"],
        RETRIEVAL: distance.get(RETRIEVAL, found["model"]),
        "best": found["best"],
        "best_rule": found["rule"],
        NO_CHANGE: distance[NO_CHANGE],
        CEILING: distance[CEILING],
        "se": error,
        "se_conditions": found["error"],
        "se_cells": se_cells,
        "noise": noise,
        "effect": bool(distance[NO_CHANGE] > 3 * noise),
        **{f"rule_{name}": distance[name] for name in rules if name != NO_CHANGE},
        **{f"pearson_{k}": v for k, v in pearson.items()},
        **{f"overlap_{k}": v for k, v in overlap.items()},
        "network_weight": weight,
    }


def run(job: Job) -> dict[str, Any]:
    """One situation and seed: a row of the table. What goes wrong is a row, too."""
    name, seed, version = job
    quiet()
    torch.set_num_threads(1)
    situation = by_name()[name]
    row: dict[str, Any] = {"situation": name, "group": situation.group, "seed": seed, "commit": version}
    start = time.perf_counter()
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # scvi-tools prints why it stops
            task = situation.make(seed)
            row |= {"n_conditions": len(task.request), "n_train": task.train.n_obs, "n_genes": task.train.n_vars}
            began = time.perf_counter()
            model = fit(task, seed)
            row["seconds"] = time.perf_counter() - began
            row |= score(task, model, seed)
    except (Exception, SystemExit) as error:  # noqa: BLE001 - a panel goes on
        at = traceback.extract_tb(error.__traceback__)[-1]
        where = f"{Path(at.filename).name}:{at.lineno}"
        row |= {"verdict": "error", "error": f"{type(error).__name__} in {where}: {error}"}
    return row | {"total_seconds": time.perf_counter() - start}


def run_all(jobs: list[Job], n: int) -> Iterator[dict[str, Any]]:
    """Rows as they are finished, by `n` processes; where one of these dies, what ran then is an error."""
    left = dict.fromkeys(jobs)
    while left:
        with ProcessPoolExecutor(n, mp_context=multiprocessing.get_context("spawn")) as pool:
            futures = {pool.submit(run, job): job for job in left}
            with contextlib.suppress(BrokenProcessPool):
                for future in as_completed(futures):
                    yield future.result()
                    del left[futures[future]]
                return
        for name, seed, version in list(left)[:n]:
            del left[name, seed, version]
            row = {"situation": name, "group": by_name()[name].group, "seed": seed, "commit": version}
            yield row | {"verdict": "error", "error": "the process was killed"}


def line(row: dict[str, Any]) -> str:
    """One printed line of a row."""
    if row["verdict"] == "error":
        return f"{row['situation']:<42} {row['seed']} error {row['error'][:150]}"
    return (
        f"{row['situation']:<42} {row['seed']} {row['verdict']:<5}{row['ratio']:5.2f}  model {row[MODEL]:.3f} "
        f"retrieval {row[RETRIEVAL]:.3f} best {row['best']:.3f} ({row['best_rule']}) no change {row[NO_CHANGE]:.3f} "
        f"ceiling {row[CEILING]:.3f} se {row['se']:.3f}  pearson {row['pearson_model']:.2f}/{row['pearson_best']:.2f} "
        f"overlap {row['overlap_model']:.2f}/{row['overlap_best']:.2f}  w {row['network_weight']:g} "
        f"{row['seconds']:.0f}+{row['total_seconds'] - row['seconds']:.0f} s"
    )


def summarize(rows: pd.DataFrame) -> pd.DataFrame:
    """Numbers of verdicts, geometric mean of ratios, shares of Pearson and overlap that hold, by group and in all."""
    found = []
    for group, part in [*rows.groupby("group", sort=False), ("all", rows)]:
        verdicts = part["verdict"].value_counts()
        scored = part[part["verdict"] != "error"]
        acting = scored[scored["effect"].astype(bool)] if len(scored) else scored
        entry = {"group": group, "n": len(part), **{v: verdicts.get(v, 0) for v in ("lost", "tied", "won", "error")}}
        if len(scored):
            entry["ratio"] = np.exp(np.log(scored["ratio"].astype(float)).mean())
            for metric in ("pearson", "overlap"):
                known = acting[f"{metric}_difference"].dropna()
                entry[f"{metric}_holds"] = (known >= -BELOW).mean()
            entry["seconds"] = scored["seconds"].mean()
        found.append(entry)
    return pd.DataFrame(found)


def append(row: dict[str, Any], path: Path) -> None:
    """Put a row into the file, in place of one of the same situation, seed and commit."""
    path.parent.mkdir(exist_ok=True, parents=True)
    table = pd.DataFrame([row])
    if path.is_file():
        old = pd.read_csv(path, dtype={"commit": str})
        same = (old["situation"] == row["situation"]) & (old["seed"] == row["seed"]) & (old["commit"] == row["commit"])
        table = pd.concat([old[~same], table], ignore_index=True)
    partial = path.with_name(path.name + ".part")
    table.round(5).to_csv(partial, index=False)
    partial.replace(path)


def jobs_of(options: argparse.Namespace) -> list[Job]:
    """Situations and seeds that are asked for."""
    version, known = options.commit or commit(), by_name().values()
    chosen = [s.name for s in known if (s.quick or not options.quick) and re.search(options.only, s.name)]
    return [(name, seed, version) for seed in options.seeds for name in chosen]


def main() -> None:
    """Run what is asked for and not there yet; print lines and the summary."""
    arguments = parser(__doc__)
    arguments.add_argument("--seeds", nargs="+", type=int, default=[0])
    arguments.add_argument("--only", default="", help="regular expression for names of situations")
    arguments.add_argument("--quick", action="store_true", help="a fixed subset of every group")
    arguments.add_argument("--jobs", type=int, default=1, help="processes, of one thread each")
    arguments.add_argument("--out", type=Path, default=RESULTS / "panel.csv", help="rows; the summary is put beside it")
    arguments.add_argument("--again", action="store_true", help="run what is in the file, too")
    arguments.add_argument("--commit", help="name of the version that is measured; default: as git says")
    arguments.add_argument("--list", action="store_true", help="print names only")
    options = arguments.parse_args()
    jobs = jobs_of(options)
    if not jobs:
        raise SystemExit(f"No situation has a name that matches {options.only!r}.")
    if options.list:
        print("\n".join(dict.fromkeys(name for name, *_ in jobs)))
        return
    wanted = pd.MultiIndex.from_tuples(jobs, names=["situation", "seed", "commit"])
    if options.out.is_file() and not options.again:
        old = pd.read_csv(options.out, dtype={"commit": str})
        old = old[(old["verdict"] != "error") & (bool(options.commit) | ~old["commit"].str.match(UNSURE))]
        done = set(old[["situation", "seed", "commit"]].itertuples(index=False, name=None))
        jobs = [job for job in jobs if job not in done]
    for name in ("OMP_NUM_THREADS", "NUMBA_NUM_THREADS"):
        os.environ.setdefault(name, "1")  # of the processes started below
    for row in run_all(jobs, options.jobs):
        print(line(row), flush=True)
        append(row, options.out)
    rows = pd.read_csv(options.out, dtype={"commit": str})
    rows = rows[pd.MultiIndex.from_frame(rows[list(wanted.names)]).isin(wanted)]
    summary = summarize(rows)
    summary.to_csv(options.out.with_name(f"{options.out.stem}_summary.csv"), index=False)
    print(f"\n{summary.round(2).to_string(index=False)}")


if __name__ == "__main__":
    main()
