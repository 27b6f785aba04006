"""Quality against the number of network evaluations, for the functional energy score and for the paper's loss.

    python benchmarks/steps.py kang --only CD14+Mono B
    python benchmarks/steps.py simulated
    python benchmarks/steps.py papalexi --only rep_3
    python benchmarks/steps.py responders                 # half of the cells respond: a network is kept
    python benchmarks/steps.py simulated --validation 0   # networks kept even where the anchor alone is as good

Both objectives share the first stage; each is trained once and predicts with 1 to 50 evaluations. Prints a table and
merges it into benchmarks/results/steps.csv. The data are those of benchmarks/quality.py. By default a network that does
not beat the anchor on held-out populations is silenced, and all its rows are the same; `--validation 0` holds nothing
out, so that every network speaks.
"""

from __future__ import annotations

import argparse
import time

import numpy as np
from quality import CASES, fit, save, score, treated_cells
from toy_law import quiet

OBJECTIVES = ("energy_score", "mmd+mse")
KEYS = ["data", "case", "objective", "sampler", "n_steps", "metric", "seed", "validation", "moves_mean"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", choices=sorted(CASES))
    parser.add_argument("--only", nargs="*", default=[], help="cell types, targets or screen seeds")
    parser.add_argument("--seeds", nargs="*", type=int, default=[0])
    parser.add_argument("--n-steps", nargs="+", type=int, default=[1, 2, 4, 8, 50])
    parser.add_argument("--first", type=int, help="only so many cases")
    parser.add_argument("--validation", type=float, help="share of the populations held out to judge networks")
    parser.add_argument("--moves-mean", action="store_true", help="let networks move the means of populations")
    options = parser.parse_args()
    quiet()
    for number, case in enumerate(CASES[options.data](options.only)):
        if number == options.first:
            break
        for seed in options.seeds:
            model, _ = fit(case, seed)
            _, wanted = treated_cells(case)
            predicted, seconds = {}, {}
            for objective in OBJECTIVES:
                if objective != OBJECTIVES[0] or options.validation is not None or options.moves_mean:
                    # the weights of another training are no start: a new generator on the same VAE
                    start_weights = model.__class__(case.train).module.generator.state_dict()
                    for module in (model.module.generator, model.module.generator_ema):
                        module.load_state_dict(start_weights)
                        module.moves_mean = options.moves_mean
                    model.train(
                        max_epochs_vae=0,
                        validation_size=options.validation,
                        enable_progress_bar=False,
                        plan_kwargs={"objective": objective},
                        seed=seed,
                    )
                samplers = ("renoise",) if objective == "energy_score" else ("renoise", "ddim")
                for sampler in samplers:
                    for n_steps in options.n_steps:
                        if sampler == "ddim" and n_steps == 1:
                            continue  # the same as renoise
                        start = time.perf_counter()
                        name = f"{objective}|{sampler}|{n_steps}"
                        predicted[name] = model.predict(
                            case.controls, wanted, n_steps=n_steps, sampler=sampler, seed=seed, progress=False
                        )
                        seconds[name] = time.perf_counter() - start
            table = score(case, predicted, seed)
            means = table.groupby(["model", "metric"], sort=False)["value"].mean().reset_index()
            means[["objective", "sampler", "n_steps"]] = [
                name.split("|") if "|" in name else [name, "", 0] for name in means["model"]
            ]
            means["n_steps"] = means["n_steps"].astype(int)
            means["seconds"] = means["model"].map(seconds)
            rows = means.drop(columns="model").assign(data=options.data, case=case.name, seed=seed)
            rows["moves_mean"] = options.moves_mean
            rows["validation"] = np.nan if options.validation is None else options.validation
            save(rows, "steps", KEYS)
            print(f"\n{case.name}, seed {seed}")
            print(means.pivot(index="model", columns="metric", values="value").round(3).to_string(), flush=True)


if __name__ == "__main__":
    main()
