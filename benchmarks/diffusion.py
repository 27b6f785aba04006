"""What the network and the law of responses add to retrieval, by the number of training populations.

    python benchmarks/diffusion.py                                       # both laws, all cells and half of them respond
    python benchmarks/diffusion.py --populations 24 84 --responders 0.2 0.5 0.8 --laws other --seeds 0 1 2
    python benchmarks/diffusion.py --figure docs/_static/network_gain.png  # of the rows that are there

A screen has every perturbation in every context, 60 cells of a population; 12 (context, perturbation) are left out and
predicted, scored against 200 cells. The laws are :func:`scperturbdiff.datasets.simulate` ("package") and
benchmarks/other_law.py ("other"), whose effects are gated by a factor of the cell. A row holds the energy distance of
the model with defaults, of its retrieval alone (no network, all cells of a population respond alike), of the best
simple rule (by hindsight) and of no change, the ceiling, and, where a network is used, what more evaluations of it
make. Rows go to benchmarks/results/diffusion.csv.
"""

from __future__ import annotations

import itertools
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from common import RESULTS, averages, commit, parser, quiet, save
from conditions import without_network
from other_law import draw, simulated_cells
from panel import CEILING, MODEL, NO_CHANGE, RETRIEVAL, evaluated, fit, rule_cells
from panel_situations import task
from quality import is_control

if TYPE_CHECKING:
    from collections.abc import Iterable

    from panel_situations import Task

    import scperturbdiff as spd

SIZES = {24: (4, 6), 84: (6, 14), 240: (8, 30), 480: (10, 48), 960: (12, 80)}
"""Contexts and perturbations, by the number of populations."""
LAWS = {"package": simulated_cells, "other": draw}
N_LEFT_OUT, N_TRAIN, N_TRUE = 12, 60, 200
STEPS = (2, 4, 8, 50)
KEYS = ["law", "populations", "responders", "seed"]


def screen(law: str, populations: int, responders: float, seed: int) -> Task:
    """A screen of which twelve populations are left out, or a quarter of a small one."""
    contexts, perturbations = SIZES[populations]
    cells = LAWS[law](
        contexts,
        perturbations,
        mixed=False,
        n_replicates=1,
        n_cells=N_TRUE,
        n_controls=N_TRUE,
        effect=1.0,
        responders=responders,
        library_size=2000.0,
        seed=seed,
    )
    pairs = cells.obs[["context", "perturbation"]].astype(str).agg("|".join, axis=1)
    treated = ~is_control(cells)
    known, rng = np.unique(pairs[treated]), np.random.default_rng([seed, 17])
    held = rng.choice(known, min(N_LEFT_OUT, len(known) // 4), replace=False)
    return task(cells, (pairs.isin(held) & treated).to_numpy(), ["context"], seed=seed, n_train=N_TRAIN)


def retrieval_alone(model: spd.PerturbDiff) -> spd.PerturbDiff:
    """The model without its network, and with one response for all cells of a population."""
    bare = without_network(model)
    assert bare.module.retrieval is not None
    bare.module.retrieval = replace(bare.module.retrieval, responsiveness={})
    return bare


def measure(law: str, populations: int, responders: float, seed: int) -> dict[str, Any]:
    """Train with defaults and score; a row."""
    this = screen(law, populations, responders, seed)
    start = time.perf_counter()
    model = fit(this, seed)
    seconds = time.perf_counter() - start
    report = model.report_
    weight = 0.0 if report is None else float(report.network_weight)
    ways: dict[str, tuple[spd.PerturbDiff, int | None]] = {MODEL: (model, None)}
    uneven = {} if report is None else report.hardly_respond
    if weight > 0 or uneven:
        ways[RETRIEVAL] = retrieval_alone(model), None
    if weight > 0:
        ways |= {f"{n} evaluations": (model, n) for n in STEPS}
    cells = {
        name: m.predict(this.controls, this.request, n_steps=n or 1, seed=seed, progress=False)
        for name, (m, n) in ways.items()
    }
    rules = rule_cells(this, seed)
    means = averages(evaluated(this, cells, rules, seed))
    distance = means["energy_distance"]
    best = str(distance[list(rules)].idxmin())
    row = dict(zip(KEYS, (law, populations, responders, seed), strict=True))
    row |= {name: distance[name] for name in (MODEL, NO_CHANGE, CEILING)}
    row |= {RETRIEVAL: distance.get(RETRIEVAL, distance[MODEL]), "best": distance[best], "best_rule": best}
    for metric in ("pearson_delta", "de_overlap"):
        row |= {f"{metric}_{name}": means[metric].get(name, means[metric][MODEL]) for name in (MODEL, RETRIEVAL)}
    row |= {f"steps_{n}": distance.get(f"{n} evaluations", np.nan) for n in STEPS}
    reason = "" if report is None else report.network_reason
    row |= {"hardly_respond": uneven.get("pair", np.nan), "network_weight": weight, "network": reason}
    return row | {"seconds": seconds, "commit": commit()}


def show(rows: pd.DataFrame) -> None:
    """Print the table and what the network changes."""
    shown = rows.assign(gain=rows[MODEL] / rows[RETRIEVAL]).drop(columns=["network", "commit"])
    print(shown.round(3).to_string(index=False), flush=True)


def figure(rows: pd.DataFrame, path: Path) -> None:
    """Energy distance relative to retrieval alone against the number of populations, a panel for each law."""
    import matplotlib.pyplot as plt

    laws = list(dict.fromkeys(rows["law"]))
    fig, axes = plt.subplots(1, len(laws), figsize=(4.2 * len(laws), 3.4), sharey=True, squeeze=False, layout="tight")
    for ax, law in zip(axes[0], laws, strict=True):
        for share, part in rows[rows["law"] == law].groupby("responders"):
            ratio = (part[MODEL] / part[RETRIEVAL]).groupby(part["populations"])
            low, mean, high = ratio.min(), ratio.mean(), ratio.max()
            ax.errorbar(mean.index, mean, yerr=[mean - low, high - mean], marker="o", capsize=3, label=f"{share:.0%}")
        ax.axhline(1, color="0.7", lw=1, zorder=0)
        ax.set(xscale="log", xlabel="training populations", title=f"law: {law}")
        ax.set_xticks(sorted(rows["populations"].unique()), labels=sorted(rows["populations"].unique()))
        ax.minorticks_off()
        ax.legend(title="cells that respond", frameon=False)
    axes[0, 0].set_ylabel("energy distance, relative to retrieval")
    fig.savefig(path, dpi=150)


def run(jobs: Iterable[tuple[str, int, float, int]]) -> None:
    """Measure one after the other; a row is written as soon as it is there."""
    for job in jobs:
        row = pd.DataFrame([measure(*job)])
        show(row)
        save(row, "diffusion", KEYS)


def main() -> None:
    """Measure what is asked for, or draw the figure."""
    arguments = parser(__doc__)
    arguments.add_argument("--laws", nargs="+", choices=LAWS, default=list(LAWS))
    arguments.add_argument("--populations", nargs="+", type=int, choices=SIZES, default=[24, 84, 240, 480])
    arguments.add_argument("--responders", nargs="+", type=float, default=[1.0, 0.5])
    arguments.add_argument("--seeds", nargs="+", type=int, default=[0])
    arguments.add_argument("--figure", type=Path, help="draw what the results hold, measure nothing")
    options = arguments.parse_args()
    quiet()
    if options.figure:
        figure(pd.read_csv(RESULTS / "diffusion.csv"), options.figure)
        return
    run(itertools.product(options.laws, options.populations, options.responders, options.seeds))
    show(pd.read_csv(RESULTS / "diffusion.csv"))


if __name__ == "__main__":
    main()
