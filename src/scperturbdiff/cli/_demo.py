"""The demo: a simulated screen from counts to scored predictions."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from scperturbdiff.cli._files import check_folder, check_free, write_cells

if TYPE_CHECKING:
    import argparse

    import pandas as pd
    from anndata import AnnData

    from scperturbdiff.evaluation.splits import Split

FOLDER = Path("scperturbdiff-demo")
"""Where the demo writes unless told otherwise; files there are its own and are replaced."""
KEYS: dict[str, Any] = {"perturbation_key": "perturbation", "control": "control", "context_keys": ["cell_type"]}
MODEL = "PerturbDiff"
COLUMNS = {"energy_distance": "energy distance", "pearson_delta": "delta correlation"}
CAPTION = (
    "Energy distance: 0 is best. Delta correlation: 1 is best. Ceiling: one half of the real cells against the rest."
)
N_PANELS = 6


class Size(NamedTuple):
    """How large the screen is and how long the model is trained."""

    screen: dict[str, Any]
    training: dict[str, Any]


FULL = Size({}, {})
QUICK = Size(
    {"n_contexts": 3, "n_perturbations": 4, "n_genes": 100, "n_cells_per_population": 10, "n_batches": 2},
    {"max_epochs_vae": 2, "max_epochs_generator": 2, "plan_kwargs": {"steps_per_epoch": 5}},
)


def run_demo(options: argparse.Namespace) -> None:
    """`scperturbdiff demo`."""
    out = options.out or FOLDER
    check_folder(out)
    files = [out / name for name in ("predicted.h5ad", "populations.png", "table.csv")]
    check_free(files, options.overwrite or options.out is None)
    size = QUICK if options.quick else FULL
    import scvi

    from scperturbdiff import datasets, evaluate, splits

    scvi.settings.seed = options.seed
    started = time.perf_counter()
    adata = datasets.simulate(**size.screen, seed=options.seed)
    split = splits.hold_out_pairs(adata, **KEYS, seed=options.seed)
    _say(f"Simulated {adata.n_obs:,} cells, {adata.n_vars} genes. {split.description}")
    pred = _train_and_predict(adata[split.train].copy(), adata[split.controls].copy(), split, size, options.seed)
    _say(f"Predicted {pred.n_obs:,} cells of held-out populations from control cells alone. Scoring ...")
    real = adata[split.test | split.controls].copy()
    train = adata[split.train].copy()
    table = evaluate({MODEL: pred}, real, **KEYS, train=train, metrics=list(COLUMNS), seed=options.seed)
    out.mkdir(parents=True, exist_ok=True)
    write_cells(pred, files[0])
    _draw(pred, real, table, files[1])
    table.to_csv(files[2], index=False)
    _say(f"\nMean over {len(split.held_out)} held-out (cell type, perturbation) conditions:\n")
    print(_means(table).to_string(float_format="{:.3f}".format))
    print(f"\n{CAPTION}")
    if options.quick:
        print("--quick: the model is hardly trained, its figures mean nothing.")
    print(f"{time.perf_counter() - started:.0f} s. Written: {', '.join(map(str, files))}")


def _say(text: str) -> None:
    print(text, flush=True)


def _train_and_predict(train: AnnData, controls: AnnData, split: Split, size: Size, seed: int) -> AnnData:
    from scperturbdiff import PerturbDiff

    PerturbDiff.setup_anndata(train, **KEYS, batch_key="donor")
    model = PerturbDiff(train)
    started = time.perf_counter()
    _say("Training: first the latent space of cells, then the generator of populations.")
    model.train(**size.training)
    _say(f"Trained in {time.perf_counter() - started:.0f} s.\n{model.report_}")
    # without the column, nothing but counts, cell type and donor of control cells can be used
    del controls.obs[KEYS["perturbation_key"]]
    wanted = split.held_out[[KEYS["perturbation_key"], *KEYS["context_keys"], "n_cells"]]
    return model.predict(controls, wanted, seed=seed)


def _means(table: pd.DataFrame) -> pd.DataFrame:
    """Mean of each metric over conditions, models in the order of the table."""
    order = {model: i for i, model in enumerate(table["model"].unique())}
    wide = table.pivot_table(index="model", columns="metric", values="value", aggfunc="mean", dropna=False)
    wide = wide.loc[sorted(wide.index, key=order.__getitem__), list(COLUMNS)].rename(columns=COLUMNS)
    wide = wide.rename_axis(index=None, columns=None)
    return wide.rename(index=lambda name: "ceiling (split-half)" if name == "ceiling" else name.replace("_", " "))


def _draw(pred: AnnData, real: AnnData, table: pd.DataFrame, path: Any) -> None:
    """Panels of the held-out conditions with the strongest real response, with what the model scored there."""
    from scperturbdiff.cli._figures import draw_conditions

    keys = [*KEYS["context_keys"], KEYS["perturbation_key"]]
    scores = table[table["metric"] == "energy_distance"].pivot(index=keys, columns="model", values="value")
    scores = scores.sort_values("no_change", ascending=False).head(N_PANELS)
    notes = [f"energy distance {m:.2f} (no change {n:.2f})" for m, n in scores[[MODEL, "no_change"]].to_numpy()]
    cells, shown = (pred, real, KEYS["control"]), scores.index.to_frame(index=False)
    draw_conditions("populations", cells, shown, path, perturbation_key=KEYS["perturbation_key"], notes=notes)
