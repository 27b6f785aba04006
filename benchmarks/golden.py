"""Freeze predictions of three small cases, or compare with frozen ones bit by bit.

    python benchmarks/golden.py freeze before.npz
    python benchmarks/golden.py check before.npz           # exit code 1 if anything differs

This is how a move of code is shown to change nothing: freeze, move, check. Cases: a simulated screen with doses and
pairs, one with replicates, and Kang's cells with one type held out (left out where SCPERTURBDIFF_DATA is not set), each
with a small model and a few steps of training. What is compared: counts, latent vectors and labels of predicted cells,
responses, novelty, and predictions of a saved model. Bits agree on one machine and with the same versions of libraries
only; frozen files are therefore no part of the repository.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import scanpy as sc
import scvi
import torch
from common import DATA, data_file, parser, quiet

import scperturbdiff as spd

if TYPE_CHECKING:
    from collections.abc import Mapping

    from anndata import AnnData
    from numpy.typing import NDArray

    Arrays = dict[str, NDArray[Any]]

SIZE: dict[str, Any] = {"n_latent": 8, "n_hidden": 32, "width": 16, "n_layers": 1, "n_heads": 2}
TRAINING: dict[str, Any] = {
    "max_epochs_vae": 4,
    "max_epochs_generator": 4,
    "plan_kwargs": {"steps_per_epoch": 8, "n_populations": 6, "n_cells": 16},
    "enable_progress_bar": False,
    "accelerator": "cpu",
    "seed": 0,
}


def train(adata: AnnData, validation_size: float | None = None, **setup: Any) -> spd.PerturbDiff:
    """A small model, trained for a few steps."""
    scvi.settings.seed = 0
    keys = {"perturbation_key": "perturbation", "control": "control", "context_keys": ["cell_type"]}
    spd.PerturbDiff.setup_anndata(adata, **keys, **setup)
    model = spd.PerturbDiff(adata, **SIZE)
    model.train(validation_size=validation_size, **TRAINING)
    return model


def controls_of(adata: AnnData) -> AnnData:
    return adata[(adata.obs["perturbation"] == "control").to_numpy()].copy()


def arrays_of(name: str, cells: AnnData) -> Arrays:
    """All that predicted cells hold."""
    counts = cells.layers["counts"].tocsr()
    counts.sort_indices()
    found = {
        "data": counts.data,
        "idx": counts.indices,
        "ptr": counts.indptr,
        "latent": cells.obsm["X_perturbdiff"],
        "obs": np.array(cells.obs.astype(str).agg("|".join, axis=1).tolist()),
    }
    return {f"{name}/{what}": values for what, values in found.items()}


def doses_and_pairs() -> Arrays:
    """Two doses and four pairs; a dose between them, an unseen pair, several draws and steps."""
    screen = spd.datasets.simulate(3, 5, 12, 80, n_batches=2, combinations=4, interaction=0.5, doses=[0.5, 2.0], seed=1)
    model = train(screen, 0.0, batch_key="donor", dose_key="dose")
    controls = controls_of(screen)
    names = sorted(name for name in screen.obs["perturbation"].unique() if "+" not in name and name != "control")
    labels = [names[0], names[1], f"{names[0]}+{names[3]}"]
    wanted = pd.DataFrame({"perturbation": labels, "dose": [0.5, 1.0, 2.0]})
    options: dict[str, Any] = {"n_cells": 20, "seed": 3, "progress": False}
    out = arrays_of("doses", model.predict(controls, wanted, **options))
    several = model.predict(controls, wanted, n_populations=2, n_steps=3, guidance=1.5, **options)
    out |= arrays_of("doses2", several)
    response = model.response(controls, wanted, **options)
    out["doses/response"] = response[["log2_fold_change", "observed_log2_fold_change"]].to_numpy()
    out["doses/novelty"] = model.perturbation_novelty().select_dtypes("number").to_numpy()
    return out


def replicates() -> Arrays:
    """Six donors that differ by a hidden factor: the law of replicates."""
    screen = spd.datasets.simulate(2, 4, 15, 60, n_batches=6, hidden_factor="gaussian", seed=2)
    model = train(screen, batch_key="donor")
    predicted = model.predict(controls_of(screen), ["P01", "P03"], n_populations=3, seed=5, progress=False)
    return arrays_of("replicates", predicted)


def kang() -> Arrays:
    """B cells predicted from the other types' responses, by the model and by a saved one."""
    cells = sc.read_h5ad(data_file("kang2018_scgen_valid.h5ad"))
    total = np.asarray(cells.X.sum(0)).ravel()
    cells = cells[:, np.sort(np.argsort(-total, kind="stable")[:300])].copy()
    cells = cells[np.asarray(cells.X.sum(1)).ravel() > 0].copy()
    here = (cells.obs["cell_type"] == "B").to_numpy()
    held = here & (cells.obs["perturbation"] == "stimulated").to_numpy()
    model = train(cells[~held].copy(), 0.0)
    with tempfile.TemporaryDirectory() as folder:
        model.save(folder, overwrite=True, save_anndata=False)
        loaded = spd.PerturbDiff.load(folder, adata=False, accelerator="cpu")
    out: Arrays = {}
    for name, of in (("kang", model), ("kang_loaded", loaded)):
        predicted = of.predict(cells[here & ~held].copy(), ["stimulated"], n_cells=60, seed=7, progress=False)
        out |= arrays_of(name, predicted)
    return out


def differences(old: Mapping[str, NDArray[Any]], new: Arrays) -> list[str]:
    """What differs, in words; empty if every bit is the same."""
    out = [
        f"{name}: only {where}" for where, a, b in (("frozen", old, new), ("now", new, old)) for name in set(a) - set(b)
    ]
    for name in sorted(set(old) & set(new)):
        a, b = old[name], new[name]
        if a.shape != b.shape or a.dtype != b.dtype:
            out.append(f"{name}: {a.dtype} {a.shape} was frozen, {b.dtype} {b.shape} now")
        elif not np.array_equal(a, b, equal_nan=a.dtype.kind == "f"):
            by = f", by {np.nanmax(np.abs(a.astype(float) - b)):.3g} at most" if a.dtype.kind in "fi" else ""
            out.append(f"{name}: {(a != b).mean():.1%} of the values differ{by}")
    return sorted(out)


def main() -> None:
    """Freeze or check."""
    arguments = parser(__doc__)
    arguments.add_argument("what", choices=["freeze", "check"])
    arguments.add_argument("file", type=Path, help=".npz file with the frozen predictions")
    options = arguments.parse_args()
    quiet()
    torch.set_num_threads(1)  # sums depend on how they are cut into pieces
    found = doses_and_pairs() | replicates()
    if os.environ.get(DATA):
        found |= kang()
    else:
        print(f"{DATA} is not set: without Kang's cells")
    if options.what == "freeze":
        np.savez(options.file, **found)
        print(f"{len(found)} arrays frozen in {options.file}")
        return
    with np.load(options.file) as frozen:
        differ = differences(dict(frozen), found)
    print(f"{Path(spd.__file__).parent}: " + ("\n  ".join(["differs", *differ]) if differ else "identical"))
    raise SystemExit(bool(differ))


if __name__ == "__main__":
    main()
