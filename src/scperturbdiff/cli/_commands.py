"""The commands train, predict and evaluate."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from scperturbdiff.cli._files import check_folder, check_free, check_model, read_cells, read_table, write_cells

if TYPE_CHECKING:
    import argparse

MAX_PANELS = 6
"""Conditions shown in a figure."""


def run_train(options: argparse.Namespace) -> None:
    """`scperturbdiff train`."""
    check_free([options.out], options.overwrite)
    check_folder(options.out)
    embeddings = _read_embeddings(options)
    adata = read_cells(options.data)
    print(f"{options.data}: {adata.n_obs:,} cells, {adata.n_vars:,} genes", flush=True)
    import scvi

    from scperturbdiff import PerturbDiff

    scvi.settings.seed = options.seed
    PerturbDiff.setup_anndata(
        adata,
        perturbation_key=options.perturbation_key,
        control=options.control,
        layer=options.layer,
        context_keys=options.context_key,
        batch_key=options.batch_key,
        dose_key=options.dose_key,
        perturbation_embeddings=embeddings,
        separator=options.separator,
    )
    model = PerturbDiff(adata)
    started = time.perf_counter()
    model.train(max_epochs=options.max_epochs, accelerator=options.accelerator)
    populations = model.populations
    n_populations = 0 if populations is None else len(populations)
    print(f"Trained on {n_populations} populations in {time.perf_counter() - started:.0f} s.\n{model.report_}")
    model.save(options.out, overwrite=options.overwrite, save_anndata=False)
    print(f"Model in {options.out}")


def run_predict(options: argparse.Namespace) -> None:
    """`scperturbdiff predict`."""
    check_free([options.out], options.overwrite)
    check_model(options.model)
    embeddings = _read_embeddings(options)
    perturbations: Any = options.perturbations
    if options.table is not None:
        perturbations = read_table(options.table)
    controls = read_cells(options.controls)
    from scperturbdiff import PerturbDiff

    model = PerturbDiff.load(options.model, adata=False)
    pred = model.predict(
        controls,
        perturbations,
        n_cells=options.n_cells,
        n_populations=options.n_populations,
        n_steps=options.n_steps,
        layer=options.layer,
        perturbation_embeddings=embeddings,
        seed=options.seed,
    )
    write_cells(pred, options.out)
    print(f"{pred.n_obs:,} predicted cells in {options.out}")


def run_evaluate(options: argparse.Namespace) -> None:
    """`scperturbdiff evaluate`."""
    names = ["table.csv", "summary.csv", "populations.png", "mean_shift.png", "scores.png"]
    check_folder(options.out)
    check_free([options.out / name for name in names], options.overwrite)
    pred, real = read_cells(options.pred), read_cells(options.real)
    train = None if options.train is None else read_cells(options.train)
    from scperturbdiff import evaluate, summarize_evaluation
    from scperturbdiff.cli._figures import draw_conditions, draw_scores

    layer_pred = None if options.layer_pred == "X" else options.layer_pred
    keys = [*options.context_key, *options.condition_key, options.perturbation_key]
    table = evaluate(
        pred,
        real,
        options.control,
        perturbation_key=options.perturbation_key,
        context_keys=options.context_key,
        condition_keys=options.condition_key,
        dose_key=options.dose_key,
        separator=options.separator,
        layer_pred=layer_pred,
        layer_real=options.layer,
        train=train,
        metrics=options.metrics,
        seed=options.seed,
    )
    summary = summarize_evaluation(table, seed=options.seed)
    options.out.mkdir(parents=True, exist_ok=True)
    table.to_csv(options.out / "table.csv", index=False)
    summary.to_csv(options.out / "summary.csv", index=False)
    wide = summary.pivot(index="metric", columns="model", values="mean")
    print("Mean over conditions:")
    print(wide.loc[summary["metric"].unique(), summary["model"].unique()].to_string(float_format="{:.3f}".format))
    # A dose is no condition of the controls, which the figures look up by the same columns.
    if not options.condition_key and options.dose_key is None:
        conditions = table[keys].drop_duplicates().head(MAX_PANELS)
        for kind in ("populations", "mean_shift"):
            draw_conditions(
                kind, pred, real, options.control, conditions, options.out / f"{kind}.png",
                perturbation_key=options.perturbation_key, separator=options.separator, layer_pred=layer_pred,
                layer_real=options.layer,
            )  # fmt: skip
    if summary["normalized"].notna().any():
        draw_scores(summary, options.out / "scores.png")
    print(f"Tables and figures in {options.out}")


def _read_embeddings(options: argparse.Namespace) -> Any:
    return None if options.embeddings is None else read_table(options.embeddings, index_col=0)
