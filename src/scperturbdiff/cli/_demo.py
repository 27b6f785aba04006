"""The demo: a simulated screen from counts to scored predictions."""

from __future__ import annotations

import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from scperturbdiff.cli._figures import draw_conditions
from scperturbdiff.cli._files import check_folder, check_outputs, write_cells, write_figure, write_table

if TYPE_CHECKING:
    import argparse

    import pandas as pd
    from anndata import AnnData
    from matplotlib.figure import Figure

    from scperturbdiff.evaluation.splits import Split

FOLDER = Path("scperturbdiff-demo")
"""Where the demo writes unless told otherwise."""
KEYS: dict[str, Any] = {"perturbation_key": "perturbation", "control": "control", "context_keys": ["cell_type"]}
MODEL = "PerturbDiff"
COLUMNS = {"energy_distance": "energy distance", "pearson_delta": "delta correlation"}
N_PANELS = 6
SCREEN = {"n_contexts": 3, "n_perturbations": 4, "n_genes": 100, "n_cells_per_population": 10, "n_batches": 2}
TRAINING = {"max_epochs_vae": 2, "max_epochs_generator": 2, "plan_kwargs": {"steps_per_epoch": 5}}
"""Screen and training with `--quick`."""

say = partial(print, flush=True)


def run_demo(options: argparse.Namespace) -> None:
    """`scperturbdiff demo`."""
    check_folder(options.out)
    files = [options.out / name for name in ("predicted.h5ad", "populations.png", "table.csv")]
    check_outputs(files, options.overwrite)
    screen: dict[str, Any] = SCREEN if options.quick else {}
    training = TRAINING if options.quick else {}
    import scvi

    from scperturbdiff import datasets, evaluate, splits

    scvi.settings.seed = options.seed
    started = time.perf_counter()
    adata = datasets.simulate(**screen, seed=options.seed)
    split = splits.hold_out_pairs(adata, **KEYS, seed=options.seed)
    say(f"Simulated {adata.n_obs:,} cells, {adata.n_vars} genes. {split.description}")
    pred = _train_and_predict(adata[split.train].copy(), adata[split.controls].copy(), split, training, options.seed)
    say(f"Predicted {pred.n_obs:,} cells of held-out populations from control cells alone. Scoring ...")
    real = adata[split.test | split.controls].copy()
    train = adata[split.train].copy()
    table = evaluate({MODEL: pred}, real, **KEYS, train=train, metrics=list(COLUMNS), seed=options.seed)
    write_cells(pred, files[0], options.overwrite)
    write_figure(_draw(pred, real, table), files[1], options.overwrite)
    write_table(table, files[2], options.overwrite)
    say(f"\nMean over {len(split.held_out)} held-out (cell type, perturbation) conditions:\n")
    print(_means(table).to_string(float_format="{:.3f}".format))
    print("\nEnergy distance: 0 is best. Delta correlation: 1 is best.", end=" ")
    print("Ceiling: one half of the real cells against the rest.")
    if options.quick:
        print("--quick: the model is hardly trained, its figures mean nothing.")
    print(f"{time.perf_counter() - started:.0f} s. Written: {', '.join(map(str, files))}")


def _train_and_predict(train: AnnData, controls: AnnData, split: Split, training: Any, seed: int) -> AnnData:
    from scperturbdiff import PerturbDiff

    PerturbDiff.setup_anndata(train, **KEYS, batch_key="donor")
    model = PerturbDiff(train)
    started = time.perf_counter()
    say("Training: first the latent space of cells, then the generator of populations.")
    model.train(**training)
    say(f"Trained in {time.perf_counter() - started:.0f} s.\n{model.report_}")
    # without the column, nothing but counts, cell type and donor of control cells can be used
    del controls.obs[KEYS["perturbation_key"]]
    wanted = split.held_out[[KEYS["perturbation_key"], *KEYS["context_keys"], "n_cells"]]
    return model.predict(controls, wanted, seed=seed)


def _means(table: pd.DataFrame) -> pd.DataFrame:
    """Mean of each metric over conditions, models in the order of the table."""
    wide = table.pivot_table(index="model", columns="metric", values="value", aggfunc="mean", dropna=False)
    wide = wide.loc[table["model"].unique(), list(COLUMNS)].rename_axis(index=None, columns=None)
    names = {name: name.replace("_", " ") for name in wide.index} | {"ceiling": "ceiling (split-half)"}
    return wide.rename(index=names, columns=COLUMNS)


def _draw(pred: AnnData, real: AnnData, table: pd.DataFrame) -> Figure:
    """Panels of the held-out conditions with the strongest real response, with what the model scored there."""
    keys = [*KEYS["context_keys"], KEYS["perturbation_key"]]
    scores = table[table["metric"] == "energy_distance"].pivot(index=keys, columns="model", values="value")
    scores = scores.sort_values("no_change", ascending=False).head(N_PANELS)
    notes = [f"energy distance {m:.2f} (no change {n:.2f})" for m, n in scores[[MODEL, "no_change"]].to_numpy()]
    cells, shown = (pred, real, KEYS["control"]), scores.index.to_frame(index=False)
    return draw_conditions("populations", cells, shown, perturbation_key=KEYS["perturbation_key"], notes=notes)
