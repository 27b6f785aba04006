"""Do draws of a population vary as replicates do? Spread, shape and coverage against replicates never seen.

    python benchmarks/populations.py toy --objectives energy_score mmd "mmd+mse" mse --n-steps 1 2 4 10 50
    python benchmarks/populations.py toy --replicates 5 20 50 --cells 32 128 512
    python benchmarks/populations.py screen              # simulated counts from end to end, donors held out
    python benchmarks/populations.py papalexi            # a real replicate held out

Prints tables and merges them into benchmarks/results/populations_*.csv. Real data: see benchmarks/quality.py.
"""

from __future__ import annotations

import itertools
import time
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import scvi
import torch
from common import found, parser, quiet, save
from quality import load_papalexi, mean_expression
from scipy.stats import ks_2samp
from toy_law import LAWS, WITHIN, Screen, draw, fit

import scperturbdiff as spd

if TYPE_CHECKING:
    import argparse

    from anndata import AnnData
    from numpy.typing import NDArray

LEVEL, N_DRAWS, N_TRUE = 0.8, 50, 200
SIZE = {"width": 32, "n_layers": 1, "n_heads": 2}
"""Of the network on toy screens; a training takes half a minute."""
OBJECTIVES = ("energy_score", "mmd", "mmd+mse", "mse")


def covered(drawn: NDArray[np.float64], real: NDArray[np.float64], level: float = LEVEL) -> float:
    """Share of `real` `(n, ...)` inside the central interval of `drawn` `(n_draws, ...)`."""
    lower, upper = np.quantile(drawn, [(1 - level) / 2, (1 + level) / 2], axis=0, method="weibull")
    return float(((real >= lower) & (real <= upper)).mean())


def measure_toy(screen: Screen, drawn: NDArray[np.float64], seed: int) -> dict[str, float]:
    """Compare drawn populations `(n_conditions, n_draws, n_cells, n_latent)` with fresh replicates.

    `sd`: of population means along the hidden direction; `beyond`: the same in the other directions, with the part that
    sampling of cells explains taken off; `bias`: root mean square error of the mean along the hidden direction.
    """
    rng = np.random.default_rng([seed, 4])
    n_cells = drawn.shape[2]
    rows = []
    pooled: tuple[list[Any], list[Any]] = ([], [])
    for condition, populations in enumerate(drawn):
        real = screen.populations(rng, condition, N_TRUE, n_cells).mean(1) - screen.shifts[condition]
        mine = populations.mean(1) - screen.shifts[condition]
        along_mine, along_real = mine @ screen.direction, real @ screen.direction
        pooled[0].append(along_mine)
        pooled[1].append(along_real)
        across = [x - np.outer(x @ screen.direction, screen.direction) for x in (mine, real)]
        expected = WITHIN**2 / n_cells * (screen.shifts.shape[1] - 1)
        rows.append(
            {
                "sd": along_mine.std(ddof=1),
                "sd_true": along_real.std(ddof=1),
                "bias": along_mine.mean() ** 2,
                "beyond": across[0].var(0, ddof=1).sum() - expected,
                "within": populations.var(1, ddof=1).mean() ** 0.5,
                "coverage": covered(along_mine, along_real),
                "coverage_all": covered(mine, real),
            }
        )
    out = pd.DataFrame(rows).mean().to_dict()
    out["bias"], out["beyond"] = out["bias"] ** 0.5, max(out["beyond"], 0.0) ** 0.5
    out["ks"] = float(ks_2samp(np.concatenate(pooled[0]), np.concatenate(pooled[1])).statistic)
    return {**out, "within_true": WITHIN}


def toy(options: argparse.Namespace) -> None:
    """Toy screens: every combination of the options, one training each."""
    torch.set_num_threads(1)  # matrices this small are slower on several threads
    keys = ["law", "objective", "replicates", "cells", "n_steps", "epochs", "validation", "seed"]
    grid = itertools.product(options.laws, options.objectives, options.replicates, options.cells, options.seeds)
    for law, objective, replicates, cells, seed in grid:
        screen = Screen.make(law, seed=seed)
        start = time.perf_counter()
        model = fit(
            screen.training_cells(replicates, cells, seed),
            objective,
            epochs=options.epochs,
            seed=seed,
            validation_size=options.validation,
            plan={"n_cells": 32},
            **SIZE,
        )
        seconds = time.perf_counter() - start
        for n_steps in options.n_steps:
            drawn, _ = draw(model, screen.names, N_DRAWS, cells, n_steps, seed)
            values = (law, objective, replicates, cells, n_steps, options.epochs, options.validation, seed)
            measured = {**measure_toy(screen, drawn, seed), "seconds": seconds, **found(model)}
            row = pd.DataFrame([{**dict(zip(keys, values, strict=True)), **measured}])
            save(row, "populations_toy", keys)
            print(row.round(3).to_csv(index=False, header=n_steps == options.n_steps[0]), end="", flush=True)


def shift_table(adata: AnnData, keys: list[str], control: str) -> pd.DataFrame:
    """Mean log-normalised shift of every treated population against its batch's controls, `(populations, genes)`.

    The first of `keys` is the perturbation; controls agree on the others.
    """
    means = mean_expression(adata, keys)
    baseline = means.xs(control, level=keys[0])
    treated = means[means.index.get_level_values(0) != control]
    others = treated.index.droplevel(keys[0])
    return treated - baseline.reindex(others).to_numpy()


def held_out_coverage(
    adata: AnnData,
    held: list[str],
    context_keys: list[str],
    batch: str,
    control: str,
    seed: int,
    objective: str,
    n_steps: list[int],
    min_cells: int = 20,
) -> pd.DataFrame:
    """Train without some batches, draw populations from their controls, compare with their treated populations."""
    scvi.settings.seed = seed
    is_held = adata.obs[batch].isin(held).to_numpy()
    train, test = adata[~is_held].copy(), adata[is_held].copy()
    setup = {"context_keys": context_keys, "batch_key": batch}
    spd.PerturbDiff.setup_anndata(train, "perturbation", control, **setup)
    model = spd.PerturbDiff(train)
    model.train(enable_progress_bar=False, plan_kwargs={"objective": objective})
    keys = ["perturbation", *context_keys, batch]
    before, real = (shift_table(cells, keys, control) for cells in (train, test))
    sizes = test.obs[keys].astype(str).value_counts()
    first = str(train.obs[batch].astype(str).min())
    rows = []
    for donor, evaluations in itertools.product(held, n_steps):
        here = test[(test.obs[batch] == donor).to_numpy()]
        controls = here[(here.obs["perturbation"] == control).to_numpy()].copy()
        wanted = real.index[real.index.get_level_values(batch) == donor].to_frame(index=False).drop(columns=batch)
        wanted["n_cells"] = [int(sizes[(*row, donor)]) for row in wanted.itertuples(index=False)]
        wanted = wanted[wanted["n_cells"] >= min_cells]
        predicted = model.predict(
            controls,
            wanted,
            n_populations=N_DRAWS,
            n_steps=evaluations,
            transform_batch=first,
            seed=seed,
            progress=False,
        )
        summary = spd.summarize_populations(predicted, controls, level=LEVEL)
        genes = summary.genes.set_index(["perturbation", *context_keys])
        for condition in wanted[["perturbation", *context_keys]].itertuples(index=False):
            mine = genes.loc[tuple(condition) if context_keys else condition[0]]
            observed = real.loc[(*condition, donor)].to_numpy()
            known = before.xs(tuple(condition), level=["perturbation", *context_keys]).to_numpy()
            lower, upper = mine["lower"].to_numpy(), mine["upper"].to_numpy()
            half = 1.2816 * known.std(0, ddof=1) * (1 + 1 / len(known)) ** 0.5 if len(known) > 1 else np.nan
            expressed = known.mean(0) != 0
            inside = (observed >= lower) & (observed <= upper)
            simple = np.abs(observed - known.mean(0)) <= half
            rows.append(
                {
                    **dict(zip(["perturbation", *context_keys], condition, strict=True)),
                    "held_out": donor,
                    "n_steps": evaluations,
                    "coverage": inside[expressed].mean(),
                    "coverage_replicates": simple[expressed].mean(),
                    "width": (upper - lower)[expressed].mean(),
                    "width_replicates": 2 * np.broadcast_to(half, observed.shape)[expressed].mean(),
                    "error": np.sqrt(((mine["mean_shift"].to_numpy() - observed)[expressed] ** 2).mean()),
                    "error_replicates": np.sqrt(((known.mean(0) - observed)[expressed] ** 2).mean()),
                    "n_replicates": len(known),
                }
            )
    return pd.DataFrame(rows).assign(objective=objective, seed=seed, **found(model))


def report(table: pd.DataFrame, name: str, keys: list[str]) -> None:
    """Save and print the mean over conditions."""
    save(table, name, keys)
    columns = [c for c in table if c.startswith(("coverage", "width", "error"))]
    by = [k for k in ("law", "objective", "n_steps") if k in table]
    print(table.groupby(by)[columns].mean().round(3).to_string(), flush=True)


def screen(options: argparse.Namespace) -> None:
    """Simulated counts with a hidden factor, donors held out."""
    laws = {"two modes": "two_modes", "gaussian": "gaussian", "none": "none"}
    for law, seed, objective in itertools.product(options.laws, options.seeds, options.objectives):
        adata = spd.datasets.simulate(
            n_contexts=2,
            n_perturbations=6,
            n_cells_per_population=50,
            n_genes=400,
            n_batches=12,
            hidden_factor=laws[law],
            seed=seed,
        )
        del adata.uns["truth"]
        table = held_out_coverage(
            adata, ["D10", "D11", "D12"], ["cell_type"], "donor", "control", seed, objective, options.n_steps
        )
        keys = ["law", "objective", "n_steps", "seed", "held_out", "cell_type", "perturbation"]
        report(table.assign(law=law), "populations_screen", keys)


def papalexi(options: argparse.Namespace) -> None:
    """A replicate of a real CRISPR screen held out."""
    adata = load_papalexi()
    for seed, objective, held in itertools.product(options.seeds, options.objectives, options.held):
        table = held_out_coverage(adata, [held], [], "replicate", "NT", seed, objective, options.n_steps)
        report(table, "populations_papalexi", ["objective", "n_steps", "seed", "held_out", "perturbation"])


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("what", choices=["toy", "screen", "papalexi"])
    arguments.add_argument("--laws", nargs="+", default=list(LAWS), choices=LAWS)
    arguments.add_argument("--objectives", nargs="+", default=["energy_score"], choices=OBJECTIVES)
    arguments.add_argument("--n-steps", nargs="+", type=int, default=[1])
    arguments.add_argument("--replicates", nargs="+", type=int, default=[20])
    arguments.add_argument("--cells", nargs="+", type=int, default=[64], help="cells of a population")
    arguments.add_argument("--seeds", nargs="+", type=int, default=[0])
    arguments.add_argument("--epochs", type=int, default=24, help="of 50 steps (toy)")
    arguments.add_argument(
        "--validation",
        type=lambda share: None if share == "default" else float(share),
        default=0.0,
        help="share of the populations held out (toy), or 'default'; the default is empty in the results",
    )
    arguments.add_argument("--held", nargs="+", default=["rep_3"], help="replicates held out in turn (papalexi)")
    options = arguments.parse_args()
    quiet()
    {"toy": toy, "screen": screen, "papalexi": papalexi}[options.what](options)


if __name__ == "__main__":
    main()
