"""Quality against the number of network evaluations, for the functional energy score and for the paper's loss.

    python benchmarks/steps.py kang --only CD14+Mono B
    python benchmarks/steps.py simulated
    python benchmarks/steps.py papalexi --only rep_3
    python benchmarks/steps.py responders                 # half of the cells respond: a network is used
    python benchmarks/steps.py simulated --validation 0   # networks used even where retrieval alone is as good

Both objectives share the first stage; each is trained once and predicts with 1 to 50 evaluations. Prints a table and
merges it into benchmarks/results/steps.csv. The data are those of benchmarks/quality.py. By default a network that is
no better on held-out populations has weight 0, is not evaluated, and all its rows are the same; `--validation 0` holds
nothing out, so that every network is used.
"""

from __future__ import annotations

import itertools
import time
from typing import TYPE_CHECKING, Any

import numpy as np
from common import commit, found, parser, quiet, save
from quality import CASES, fit, score

import scperturbdiff as spd

if TYPE_CHECKING:
    import pandas as pd
    from quality import Case

SAMPLERS = {"energy_score": ("renoise",), "mmd+mse": ("renoise", "ddim")}
"""Samplers of each objective."""
KEYS = ["data", "case", "objective", "sampler", "n_steps", "metric", "seed", "validation"]


def train_again(model: spd.PerturbDiff, case: Case, objective: str, validation: float | None, seed: int) -> None:
    """Train a new generator on the same first stage: the weights of another training are no start."""
    start = spd.PerturbDiff(case.train).module.generator.state_dict()
    for generator in (model.module.generator, model.module.generator_ema):
        generator.load_state_dict(start)
    plan = {"objective": objective}
    model.train(max_epochs_vae=0, validation_size=validation, enable_progress_bar=False, plan_kwargs=plan, seed=seed)


def measure(case: Case, seed: int, all_steps: list[int], validation: float | None) -> pd.DataFrame:
    """Train and score all of one case and seed; one row for each metric and way of predicting."""
    model = fit(case, seed)
    predicted: dict[str, Any] = {}
    about: dict[str, dict[str, Any]] = {}
    for objective, samplers in SAMPLERS.items():
        if objective != "energy_score" or validation is not None:
            train_again(model, case, objective, validation, seed)
        for sampler, n_steps in itertools.product(samplers, all_steps):
            if sampler == "ddim" and n_steps == 1:
                continue  # the same as renoise
            start = time.perf_counter()
            name = f"{objective}|{sampler}|{n_steps}"
            predicted[name] = model.predict(
                case.controls, case.wanted, n_steps=n_steps, sampler=sampler, seed=seed, progress=False
            )
            seconds = time.perf_counter() - start
            about[name] = {"objective": objective, "sampler": sampler, "n_steps": n_steps, "seconds": seconds}
            about[name] |= found(model)
    means = score(case, predicted, seed).groupby(["model", "metric"], sort=False)["value"].mean().reset_index()
    print(f"\n{case.name}, seed {seed}")
    print(means.pivot(index="model", columns="metric", values="value").round(3).to_string(), flush=True)
    for column in ("objective", "sampler", "n_steps", "seconds", "network_weight", "network"):
        other = {"objective": None, "sampler": "", "n_steps": 0, "network": ""}.get(column, np.nan)
        means[column] = [about[name][column] if name in about else other for name in means["model"]]
    means["objective"] = means["objective"].fillna(means["model"])
    return means.drop(columns="model").assign(case=case.name, seed=seed, commit=commit())


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("data", choices=sorted(CASES))
    arguments.add_argument("--only", nargs="*", default=[], help="cell types, lines, targets or screen seeds")
    arguments.add_argument("--seeds", nargs="*", type=int, default=[0])
    arguments.add_argument("--n-steps", nargs="+", type=int, default=[1, 2, 4, 8, 50])
    arguments.add_argument("--first", type=int, help="only so many cases")
    arguments.add_argument("--validation", type=float, help="share of the populations held out to judge networks")
    options = arguments.parse_args()
    quiet()
    for case in itertools.islice(CASES[options.data](options.only), options.first):
        for seed in options.seeds:
            rows = measure(case, seed, options.n_steps, options.validation)
            validation = np.nan if options.validation is None else options.validation
            save(rows.assign(data=options.data, validation=validation), "steps", KEYS)


if __name__ == "__main__":
    main()
