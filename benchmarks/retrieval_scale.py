"""Seconds and memory of retrieval with growing numbers of populations: fitting, and predicting each as if it were new.

    python benchmarks/retrieval_scale.py                           # both screens, 1,000 to 100,000 populations
    python benchmarks/retrieval_scale.py --screens cytokines --sizes 4000 10000

Responses are simulated, no cells: 32 latent dimensions, 8 genes. *drugs*: up to 50 contexts, each with the same drugs
at three doses (after Tahoe-100M); *cytokines*: 12 donors of up to 18 cell types, up to 90 perturbations (after Parse's
10 million cells); *genes*: 8 contexts, perturbations with 64 features. More populations than conditions are replicates
in further batches. A context has controls of its own in each batch. Each row is a process of its own; "rehearsed" is
every population as if it, its pair or its context had not been measured (and its perturbation, with features). Prints a
table and writes benchmarks/results/retrieval_scale.csv.
"""

from __future__ import annotations

import itertools
import json
import resource
import subprocess
import sys
import time
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from common import RESULTS, commit, parser, quiet

from scperturbdiff.retrieval import Conditions, Responses, Retrieval

if TYPE_CHECKING:
    from numpy.typing import NDArray

N_LATENT, N_GENES, N_FEATURES = 32, 8, 64
DOSES = (-1.0, 0.0, 1.0)
WAYS = ("replicate", "pair", "context")


def size_of(name: str, n: int) -> tuple[int, int, int]:
    """Contexts, perturbations (with doses) and batches that make about `n` populations."""
    if name == "drugs":
        contexts = 10 if n < 4000 else 25 if n < 20000 else 50
        perturbations = min(1100, n // contexts) // len(DOSES) * len(DOSES)
    elif name == "cytokines":
        contexts = 12 * min(18, max(1, n // (12 * 90)))
        perturbations = min(90, n // contexts)
    else:
        contexts, perturbations = 8, n // 8
    return contexts, perturbations, max(1, round(n / (contexts * perturbations)))


def simulate(name: str, n: int, seed: int = 0) -> tuple[Responses, NDArray[np.float64] | None]:
    """Responses that depend on perturbation, context and both, with sampling noise; features of components."""
    rng = np.random.default_rng(seed)
    contexts, perturbations, batches = size_of(name, n)
    context, number, batch = np.array(list(itertools.product(range(contexts), range(perturbations), range(batches)))).T
    doses = DOSES if name == "drugs" else (0.0,)
    component, dose = number // len(doses), np.array(doses)[number % len(doses)]
    centre = 2 * rng.normal(size=(contexts, N_LATENT))
    means = centre[:, None] + 0.1 * rng.normal(size=(contexts, batches, N_LATENT))
    known = rng.normal(size=(component.max() + 1, N_FEATURES))
    effect = known @ rng.normal(size=(N_FEATURES, N_LATENT)) / np.sqrt(N_FEATURES)
    effect += 0.5 * rng.normal(size=effect.shape) + rng.normal(size=N_LATENT)
    field = rng.normal(size=(N_LATENT, N_LATENT)) / N_LATENT
    shift = effect[component] * (1 + 0.3 * dose[:, None]) * (1 + np.tanh(centre[context] @ field))
    noise = np.full(len(context), 0.02)
    shift = shift + np.sqrt(noise)[:, None] * rng.normal(size=shift.shape)
    shared = np.full(len(context), 0.005)
    conditions = Conditions(
        means[context, batch], component[:, None], dose[:, None], context, noise, control_noise=shared
    )
    genes = np.zeros((len(context), N_GENES), np.float16)
    responses = Responses(conditions, shift, np.zeros(len(context)), np.zeros(len(context)), genes)
    return responses, known if name == "genes" else None


def memory() -> float:
    """GB that the process held at most."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def measure(name: str, n: int, rehearsed: int | None, device: str) -> dict[str, Any]:
    """One row of the table."""
    responses, features = simulate(name, n)
    before, start, cpu = memory(), time.perf_counter(), time.process_time()
    found = Retrieval.fit(responses, features)
    row: dict[str, Any] = {"screen": name, "populations": len(responses), "fit_s": time.perf_counter() - start}
    rows = None if rehearsed is None else np.random.default_rng(0).permutation(len(responses))[:rehearsed]
    ways = WAYS if features is None else (*WAYS, "perturbation")
    digest = 0.0
    for way in ways:
        start = time.perf_counter()
        left_out = found.leave_out(way, rows, **({} if device == "cpu" else {"device": device}))  # type: ignore[arg-type]
        row[f"{way}_s"] = time.perf_counter() - start
        digest += float(np.abs(left_out.shift).mean())
    row["rehearsed"] = len(responses) if rows is None else len(rows)
    row["rehearsed_s"] = sum(row[f"{way}_s"] for way in ways)
    row["all_s"], row["all_cpu_s"] = row["fit_s"] + row["rehearsed_s"], time.process_time() - cpu
    start = time.perf_counter()
    found.predict(responses.conditions.take(slice(0, 20)), "pair")
    row["predict_ms"] = 1e3 * (time.perf_counter() - start) / 20
    return {**row, "memory_gb": memory(), "memory_before_gb": before, "check": digest, "commit": commit()}


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument(
        "--screens", nargs="+", default=["drugs", "cytokines"], choices=["drugs", "cytokines", "genes"]
    )
    arguments.add_argument("--sizes", nargs="+", type=int, default=[1000, 4000, 10000, 40000, 100000])
    arguments.add_argument("--rehearsed", type=int, default=None, help="populations rehearsed; default: all")
    arguments.add_argument("--device", default="cpu", help="where systems are solved")
    arguments.add_argument("--out", default="retrieval_scale.csv", help="name of the table in benchmarks/results")
    arguments.add_argument("--one", action="store_true", help="measure one screen of one size here and print JSON")
    options = arguments.parse_args()
    quiet()
    if options.one:
        print(json.dumps(measure(options.screens[0], options.sizes[0], options.rehearsed, options.device)))
        return
    rows = []
    for name, n in itertools.product(options.screens, options.sizes):
        command = [sys.executable, __file__, "--one", "--screens", name, "--sizes", str(n), "--device", options.device]
        if options.rehearsed is not None:
            command += ["--rehearsed", str(options.rehearsed)]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        rows.append(json.loads(done.stdout.splitlines()[-1]))
        print(pd.DataFrame(rows[-1:]).round(2).to_string(index=False), flush=True)
    table = pd.DataFrame(rows)
    RESULTS.mkdir(exist_ok=True)
    table.to_csv(RESULTS / options.out, index=False)
    print(table.round(2).to_string(index=False))


if __name__ == "__main__":
    main()
