"""How often 80 % intervals of draws hold what was measured, for conditions that are new.

    python benchmarks/intervals.py                       # situations of the panel, one seed
    python benchmarks/intervals.py --only "kang 3" --seeds 0 1

For each gene of a condition that was left out: is the measured mean of log-normalised expression inside the central
80 % interval of the means of 30 draws, which have as many cells? Over all genes that are expressed (in a tenth of the
controls or of the treated cells), and over the 50 that truly change most: these are chosen by the answer, which counts
against any prediction. `latent`: draws are off in the latent space only. Means over the conditions of a situation;
`width` is that of the interval, `error` the mean absolute error of the shift, both over expressed genes. Rows go to
benchmarks/results/intervals.csv. Real data: see benchmarks/quality.py.
"""

from __future__ import annotations

import copy
import re
import time
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from common import commit, parser, quiet, save
from panel import by_name, fit

import scperturbdiff as spd
from scperturbdiff.data import log_normalize

if TYPE_CHECKING:
    from collections.abc import Sequence

    from anndata import AnnData
    from numpy.typing import NDArray
    from panel_situations import Task

LEVEL, N_DRAWS, N_TOP, EXPRESSED = 0.8, 30, 50, 0.1
DEFAULT = (
    r"^(kang 3 (CD4T B CD14|B NK FCGR|CD8T B Dend|CD4T CD8T)|donor .* from|lines (4|7)|"
    r"papalexi (5 targets|23 targets pairs)|(simulated|other law) (4x3 mixed r1 strong|4x12|8x12|8x3 mixed))"
)


def measure(task: Task, model: spd.PerturbDiff, seed: int) -> dict[str, Any]:
    """Coverage over the conditions of a situation, with errors of genes and without."""
    retrieval = model.module.retrieval
    assert retrieval is not None
    exact = {way: replace(of, constant=0.0, proportional=0.0) for way, of in retrieval.folds.items()}
    latent = copy.copy(model)
    latent.module = copy.copy(model.module)
    latent.module.retrieval = replace(retrieval, folds=exact)
    found = {f"latent_{name}": value for name, value in covered(task, latent, seed).items()}
    return covered(task, model, seed) | found | {"n_conditions": len(task.request)}


def covered(task: Task, model: spd.PerturbDiff, seed: int) -> dict[str, float]:
    """Means over conditions."""
    drawn = model.predict(task.controls, task.request, n_populations=N_DRAWS, seed=seed, progress=False)
    contexts = task.setup["context_keys"]
    keys = ["perturbation", *contexts]
    genes = spd.summarize_populations(drawn, task.controls, level=LEVEL).genes.set_index(keys)
    rows = []
    for condition in task.request[keys].itertuples(index=False):
        mine = genes.loc[tuple(condition) if contexts else condition[0]]
        controls = _cells(task.controls, contexts, condition[1:])
        real = _cells(task.truth, keys, condition)
        shift = _mean(real) - _mean(controls)
        shown = [np.asarray((cells.X > 0).mean(0)).ravel() for cells in (controls, real)]
        expressed, top = np.maximum(*shown) >= EXPRESSED, np.argsort(-np.abs(shift))[:N_TOP]
        lower, upper = mine["lower"].to_numpy(), mine["upper"].to_numpy()
        inside = (shift >= lower) & (shift <= upper)
        rows.append(
            {
                "coverage": inside[expressed].mean(),
                "coverage_top": inside[top].mean(),
                "width": (upper - lower)[expressed].mean(),
                "error": np.abs(mine["mean_shift"].to_numpy() - shift)[expressed].mean(),
            }
        )
    means: dict[str, float] = pd.DataFrame(rows).mean().to_dict()
    return means


def _cells(adata: AnnData, keys: Sequence[str], values: Sequence[str]) -> AnnData:
    kept = np.ones(adata.n_obs, bool)
    for key, value in zip(keys, values, strict=True):
        kept &= (adata.obs[key].astype(str) == str(value)).to_numpy()
    return adata[kept]


def _mean(cells: AnnData) -> NDArray[np.float64]:
    return np.asarray(log_normalize(cells.X).mean(0), np.float64).ravel()


def main() -> None:
    """One row a situation and seed."""
    arguments = parser(__doc__)
    arguments.add_argument("--only", default=DEFAULT, help="situations whose name this regular expression matches")
    arguments.add_argument("--seeds", nargs="+", type=int, default=[0])
    options = arguments.parse_args()
    quiet()
    for name, situation in by_name().items():
        if not re.search(options.only, name):
            continue
        for seed in options.seeds:
            start, task = time.perf_counter(), situation.make(seed)
            found = measure(task, fit(task, seed), seed)
            row = {"situation": name, "group": situation.group, "seed": seed, "commit": commit()} | found
            row["seconds"] = time.perf_counter() - start
            print({k: round(v, 3) if isinstance(v, float) else v for k, v in row.items()}, flush=True)
            save(pd.DataFrame([row]), "intervals", ["situation", "seed"])


if __name__ == "__main__":
    main()
