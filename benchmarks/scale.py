"""Memory and time on a large simulated screen that stays on disk: write, train, predict, each in a process of its own.

    python benchmarks/scale.py --donors 1 --predict 20000     # 100,000 cells x 2,000 genes
    python benchmarks/scale.py --donors 10                    # a million cells; needs about 5 GB of disk
    python benchmarks/scale.py --zarr                         # a zarr store instead of an .h5ad file; --zarr sharded

Prints peak memory (resident set) and seconds of each and adds a line to benchmarks/results/scale.csv. The files are
deleted at the end.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import anndata as ad
import h5py
import numpy as np
import pandas as pd
import zarr
from common import found, parser, save

N_CONTEXTS, N_PERTURBATIONS, POPULATION = 10, 49, 200
CELLS_PER_DONOR = N_CONTEXTS * (N_PERTURBATIONS + 1) * POPULATION
BYTES_PER_CELL = 6000
"""On disk, generously."""
PLAIN = ("cells", "predicted", "network_weight", "network", "commit")
"""What is reported without the name of the phase."""


def write(path: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Simulate donor by donor and append each to the file."""
    from anndata.io import sparse_dataset, write_elem

    # no public name draws a part of a screen: simulate() holds all of its cells in memory
    from scperturbdiff.datasets._cells import draw_cells
    from scperturbdiff.datasets._truth import draw_contexts, draw_genes, draw_perturbations

    rng = np.random.default_rng(0)
    genes = draw_genes(rng, options.genes)
    contexts = draw_contexts(rng, N_CONTEXTS, genes)
    effects = draw_perturbations(rng, contexts, N_PERTURBATIONS, 0, 0.0, 1.0, np.empty(0))
    batch_effect = (0.1 * rng.normal(size=(options.donors, options.genes))).astype(np.float32)
    frames = []
    with ExitStack() as stack:
        store = stack.enter_context(h5py.File(path, "w")) if path.suffix == ".h5ad" else zarr.open_group(path, mode="w")
        store.attrs["encoding-type"], store.attrs["encoding-version"] = "anndata", "0.1.0"
        for donor in range(options.donors):
            product = [range(N_CONTEXTS), range(-1, N_PERTURBATIONS), [np.nan], [donor]]
            table = pd.MultiIndex.from_product(product, names=["context", "label", "dose", "batch"]).to_frame(
                index=False
            )
            table["n_cells"], table["hidden_factor"] = POPULATION, 0.0
            responds = np.repeat(table["label"].to_numpy() >= 0, POPULATION)
            counts = draw_cells(rng, table, genes, contexts, effects, batch_effect, genes.hidden, 1000.0, responds)
            counts.data = counts.data.astype(np.float32)
            frames.append(table.loc[np.repeat(np.arange(len(table)), POPULATION), ["context", "label", "batch"]])
            if donor:
                sparse_dataset(store["X"]).append(counts)
            else:
                counts.indptr = counts.indptr.astype(np.int64)
                with ad.settings.override(auto_shard_zarr_v3=options.zarr == "sharded"):
                    write_elem(store, "X", counts)
        labels = pd.concat(frames, ignore_index=True)
        obs = pd.DataFrame(
            {
                "perturbation": pd.Categorical.from_codes(
                    labels["label"] + 1, ["control", *(f"P{i + 1:02d}" for i in range(N_PERTURBATIONS))]
                ),
                "cell_type": pd.Categorical.from_codes(labels["context"], [f"C{i + 1}" for i in range(N_CONTEXTS)]),
                "donor": pd.Categorical.from_codes(labels["batch"], [f"D{i + 1}" for i in range(options.donors)]),
            }
        )
        obs.index = "cell" + obs.index.astype(str)
        write_elem(store, "obs", obs)
        write_elem(store, "var", pd.DataFrame(index=[f"gene{i + 1:04d}" for i in range(options.genes)]))
        entries = int(store["X/data"].shape[0])
    return {"cells": len(obs), "entries": entries, "gb": gigabytes(path)}


def gigabytes(path: Path) -> float:
    """Size of a file, or of all files of a folder."""
    files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
    return sum(file.stat().st_size for file in files) / 2**30


def train(path: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Both stages, a fixed number of steps of each, from the file."""
    from scperturbdiff import PerturbDiff, open_store  # not before: what one process imports is no other's memory

    times = {}
    start = time.perf_counter()
    cells = open_store(path)
    PerturbDiff.setup_anndata(cells, "perturbation", "control", context_keys=["cell_type"], batch_key="donor")
    times["setup_s"] = time.perf_counter() - start
    model = PerturbDiff(cells)
    common: dict[str, Any] = {"accelerator": "cpu", "enable_progress_bar": False, "seed": 0}
    start = time.perf_counter()
    model.train(max_epochs_vae=1, max_epochs_generator=0, limit_train_batches=options.steps, **common)
    times["vae_s"] = time.perf_counter() - start
    start = time.perf_counter()
    model.train(max_epochs_vae=0, max_epochs_generator=max(1, options.steps // 50), **common)
    times["generator_s"] = time.perf_counter() - start
    model.save(str(path.parent / "model"), overwrite=True)
    return {**times, **found(model)}


def predict(path: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Predict from the controls in the file, streamed to another file."""
    from scperturbdiff import PerturbDiff, open_store

    model = PerturbDiff.load(str(path.parent / "model"), adata=False, accelerator="cpu")
    cells = open_store(path)
    names = [f"P{i + 1:02d}" for i in range(N_PERTURBATIONS)]
    n_cells = -(-options.predict // (N_CONTEXTS * N_PERTURBATIONS))
    out = path.parent / f"predicted{path.suffix}"
    predicted = model.predict(cells, names, n_cells=n_cells, seed=0, progress=False, output=out)
    return {"predicted": predicted.n_obs, "predicted_gb": gigabytes(out)}


PHASES = {"write": write, "train": train, "predict": predict}


def in_process(phase: str, path: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Run a phase in a process of its own and return what it reports."""
    arguments = [f"--{k}={getattr(options, k)}" for k in ("donors", "genes", "steps", "predict", "zarr")]
    command = [sys.executable, __file__, *arguments, "--phase", phase, "--path", str(path)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    report: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    print(phase, report, flush=True)
    return report


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--donors", type=int, default=1, help=f"of {CELLS_PER_DONOR:,} cells each")
    arguments.add_argument("--genes", type=int, default=2000)
    arguments.add_argument("--steps", type=int, default=300, help="training steps of each stage")
    arguments.add_argument("--predict", type=int, default=200_000, help="cells to predict")
    arguments.add_argument(
        "--zarr",
        nargs="?",
        const="plain",
        choices=["", "plain", "sharded"],
        default="",
        help="a zarr store, or a sharded one",
    )
    arguments.add_argument("--folder", type=Path, help="where the files go; default: a temporary folder")
    arguments.add_argument("--phase", choices=list(PHASES), help=argparse.SUPPRESS)
    arguments.add_argument("--path", type=Path, help=argparse.SUPPRESS)
    options = arguments.parse_args()
    if options.phase:
        start = time.perf_counter()
        report = PHASES[options.phase](options.path, options)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        print(json.dumps({**report, "seconds": time.perf_counter() - start, "peak_gb": peak}))
        return
    folder = Path(tempfile.mkdtemp(dir=options.folder))
    needed = BYTES_PER_CELL * (options.donors * CELLS_PER_DONOR + 2 * options.predict)
    free = shutil.disk_usage(folder).free
    try:
        if free < 2 * needed:
            raise SystemExit(f"{folder} has {free / 2**30:.0f} GB free; {2 * needed / 2**30:.0f} GB are wanted.")
        row: dict[str, Any] = {"genes": options.genes, "steps": options.steps}
        for phase in PHASES:
            report = in_process(phase, folder / ("screen.zarr" if options.zarr else "screen.h5ad"), options)
            row |= {key if key in PLAIN else f"{phase}_{key}": value for key, value in report.items()}
    finally:
        shutil.rmtree(folder)
    row["machine"] = f"CPU {platform.machine()}, {os.environ.get('OMP_NUM_THREADS', os.cpu_count())} threads"
    save(pd.DataFrame([row]), "scale", ["cells", "genes", "steps"])


if __name__ == "__main__":
    main()
