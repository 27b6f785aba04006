"""What a second process gains, in training and in prediction, as ratios of one run; cores must have nothing else to do.

    python benchmarks/processes.py --processes 1 2

Training: populations and cells a second in the real training loop, the size of a step in proportion to the processes,
the first epoch left out. Prediction: wall time of the command, of which loading the package and reading control cells
are the same in every process; `--cells` a condition. Writes benchmarks/results/processes.csv.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import pandas as pd
from common import parser, quiet, save
from speed import Watch

import scperturbdiff as spd

BATCH, POPULATIONS = 128, 16


def prepare(options: argparse.Namespace) -> spd.PerturbDiff:
    """A model of the screen, not trained."""
    adata = spd.datasets.simulate(
        n_contexts=6, n_perturbations=10, n_cells_per_population=100, n_genes=options.genes, n_batches=1, seed=0
    )
    spd.PerturbDiff.setup_anndata(adata, "perturbation", "control", context_keys=["cell_type"])
    return spd.PerturbDiff(adata)


def train(options: argparse.Namespace) -> None:
    """One of the processes; the first one prints."""
    quiet()
    n, model, vae, generator = int(os.environ["WORLD_SIZE"]), prepare(options), Watch("cpu", False), Watch("cpu", False)
    common: dict[str, Any] = {"accelerator": "cpu", "enable_progress_bar": False, "seed": 0}
    if n > 1:
        common |= {"devices": n, "strategy": "ddp"}
    model.train(
        max_epochs_vae=3,
        max_epochs_generator=0,
        limit_train_batches=options.steps,
        batch_size=n * BATCH,
        callbacks=[vae],
        **common,
    )
    model.train(
        max_epochs_vae=0,
        max_epochs_generator=3,
        validation_size=0.0,
        callbacks=[generator],
        plan_kwargs={"n_populations": n * POPULATIONS, "steps_per_epoch": options.steps},
        **common,
    )
    if os.environ["RANK"] == "0":
        rates = {"vae_cells_s": n * BATCH / min(vae.steps)}
        rates["network_populations_s"] = n * POPULATIONS / min(generator.steps)
        print(json.dumps(rates), flush=True)
        model.save(str(options.folder / f"model{n}"), overwrite=True)


def torchrun(n: int, *command: str) -> tuple[str, float]:
    """Output and wall time."""
    start = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(n), *command],
        check=True,
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    return done.stdout, time.perf_counter() - start


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--processes", type=int, nargs="+", default=[1, 2])
    arguments.add_argument("--genes", type=int, default=2000)
    arguments.add_argument("--steps", type=int, default=40, help="of an epoch; two of three epochs are timed")
    arguments.add_argument("--cells", type=int, default=2000, help="to predict of each of 60 conditions")
    arguments.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = arguments.parse_args()
    if options.folder:
        train(options)
        return
    quiet()
    with tempfile.TemporaryDirectory() as name:
        folder, rows = Path(name), []
        sizes = [f"--genes={options.genes}", f"--steps={options.steps}", f"--folder={folder}"]
        for n in options.processes:
            said, _ = torchrun(n, __file__, *sizes)
            row: dict[str, Any] = {"processes": n, **json.loads(said.strip().splitlines()[-1])}
            controls = folder / "controls.h5ad"
            if not controls.exists():
                adata = prepare(options).adata
                adata[(adata.obs["perturbation"] == "control").to_numpy()].write_h5ad(controls)
            first = folder / f"model{options.processes[0]}"
            asked = [str(first), str(controls), "--n-cells", str(options.cells), "--seed", "0"]
            out = ["--out", str(folder / f"cells{n}.zarr")]
            _, row["predict_s"] = torchrun(n, "-m", "scperturbdiff", "predict", *asked, *out)
            row["cells"] = 60 * options.cells
            rows.append(row)
            print(row, flush=True)
    table = pd.DataFrame(rows)
    one = table.iloc[0]
    for column in ("vae_cells_s", "network_populations_s"):
        table[f"{column}_ratio"] = table[column] / one[column]
    table["predict_ratio"] = one["predict_s"] / table["predict_s"]
    print(table.round(2).to_string(index=False))
    save(table, "processes", ["processes"])


if __name__ == "__main__":
    main()
