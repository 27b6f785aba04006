"""The commands train, predict, evaluate and convert."""

from __future__ import annotations

import shlex
import time
from typing import TYPE_CHECKING, Any

from scperturbdiff.cli._figures import draw_conditions
from scperturbdiff.cli._files import (
    check_folder,
    check_format,
    check_free,
    check_model,
    check_outputs,
    check_shared,
    check_wanted,
    own_device,
    read_cells,
    read_table,
    share_of_work,
    write_cells,
    write_figure,
    write_table,
)

if TYPE_CHECKING:
    import argparse

    import pandas as pd
    from anndata import AnnData

MAX_PANELS = 6
"""Conditions shown in a figure."""
KEYS = ("perturbation_key", "control", "context_keys", "dose_key", "separator")
"""Options that say how cells are annotated."""


def run_train(options: argparse.Namespace) -> None:
    """`scperturbdiff train`."""
    if options.resume and options.checkpoint is None:
        raise ValueError("--resume needs --checkpoint DIR, the folder to go on from.")
    check_free([options.out], options.overwrite)
    check_folder(options.out)
    embeddings = _embeddings(options)
    adata = read_cells(options.data)
    print(f"{options.data}: {adata.n_obs:,} cells, {adata.n_vars:,} genes", flush=True)
    import scvi

    from scperturbdiff import PerturbDiff

    scvi.settings.seed = options.seed
    keys = _given(options, *KEYS, "batch_key", "layer")
    PerturbDiff.setup_anndata(adata, perturbation_embeddings=embeddings, **keys)
    model = PerturbDiff(adata)
    started = time.perf_counter()
    how = _given(options, "max_epochs", "accelerator", "resume")
    model.train(**how, checkpoint_dir=options.checkpoint)
    populations = model.populations
    n_populations = 0 if populations is None else len(populations)
    print(f"Trained on {n_populations} populations in {time.perf_counter() - started:.0f} s.\n{model.report_}")
    model.save(options.out, overwrite=options.overwrite, save_anndata=False)
    print(f"Model in {options.out}")


def run_predict(options: argparse.Namespace) -> None:
    """`scperturbdiff predict`."""
    check_format(options.out)
    share = share_of_work()
    if share is None:
        check_outputs([options.out], options.overwrite)
    else:
        check_shared(options.out, share)
    check_model(options.model)
    embeddings = _embeddings(options)
    table = None if options.table is None else read_table(options.table)
    check_wanted(table, options.n_cells, options.n_populations)
    controls = read_cells(options.controls)
    from scperturbdiff import PerturbDiff
    from scperturbdiff.data import N_CELLS

    perturbations: Any = options.perturbations if table is None else table
    if table is not None and N_CELLS in table:
        perturbations = table.astype({N_CELLS: float})
    model = PerturbDiff.load(options.model, adata=False, device=own_device())
    how = _given(options, "n_cells", "n_populations", "n_steps", "layer", "seed")
    output = None if share is None else options.out
    pred = model.predict(controls, perturbations, perturbation_embeddings=embeddings, **how, output=output)
    if share is None:
        write_cells(pred, options.out, options.overwrite)
    if share in (None, 0):
        print(f"{pred.n_obs:,} predicted cells in {options.out}")


def run_convert(options: argparse.Namespace) -> None:
    """`scperturbdiff convert`."""
    check_free([options.out], options.overwrite)
    check_folder(options.out)
    check_model(options.model, options.allow_pickle)
    from scperturbdiff import PerturbDiff

    model = PerturbDiff.load(options.model, adata=False, accelerator="cpu", allow_pickle=options.allow_pickle)
    model.save(options.out, overwrite=options.overwrite)
    print(f"Model in {options.out}")


def run_evaluate(options: argparse.Namespace) -> None:
    """`scperturbdiff evaluate`."""
    names = ["table.csv", "summary.csv", "populations.png", "mean_shift.png", "scores.png"]
    check_folder(options.out)
    check_outputs([options.out / name for name in names], options.overwrite)
    if options.report is not None:
        check_outputs([options.report], options.overwrite)
        from scperturbdiff.reporting import check_path

        check_path(options.report, options.overwrite)
    if options.model is not None:
        check_model(options.model)
    pred, real = read_cells(options.pred), read_cells(options.real)
    train = None if options.train is None else read_cells(options.train)
    from scperturbdiff import evaluate, pl, summarize_evaluation

    keys = _given(options, *KEYS, "condition_keys")
    layers = _layers(options)
    metrics = "all" if options.metrics == ["all"] else options.metrics
    given = _given(options, "normalized", "means", "allow_overlap")
    table = evaluate(pred, real, **keys, **layers, **given, train=train, metrics=metrics, seed=options.seed)
    summary = summarize_evaluation(table, seed=options.seed)
    write_table(table, options.out / "table.csv", options.overwrite)
    write_table(summary, options.out / "summary.csv", options.overwrite)
    wide = summary.pivot(index="metric", columns="model", values="mean")
    print("Mean over conditions:")
    print(wide.loc[summary["metric"].unique(), summary["model"].unique()].to_string(float_format="{:.3f}".format))
    for rule, why in table.attrs.get("left_out", {}).items():
        print(f"No values of the rule {rule}: {why}")
    # A dose is no condition of the controls, which the figures look up by the same columns; means are no cells.
    if not options.condition_keys and options.dose_key is None and not options.means:
        cells = table.loc[table["role"] == "prediction", ["n_pred", "n_real", "n_control"]]
        drawn = table.loc[cells.index[(cells >= 2).all(axis=1)], [*options.context_keys, options.perturbation_key]]
        conditions = drawn.drop_duplicates().head(MAX_PANELS)
        shown = _given(options, "perturbation_key", "separator", "normalized") | layers
        for kind in ("populations", "mean_shift") if len(conditions) else ():
            figure = draw_conditions(kind, (pred, real, options.control), conditions, **shown)
            write_figure(figure, options.out / f"{kind}.png", options.overwrite)
    if summary["normalized"].notna().any():
        write_figure(pl.scores(summary).figure, options.out / "scores.png", options.overwrite)
    print(f"Tables and figures in {options.out}")
    if options.report is not None:
        _write_report(options, pred, real, train, table)


def _write_report(options: argparse.Namespace, pred: AnnData, real: AnnData, train: Any, table: pd.DataFrame) -> None:
    from scperturbdiff import PerturbDiff, report

    model = None if options.model is None else PerturbDiff.load(options.model, adata=False, accelerator="cpu")
    keys = _given(options, *KEYS, "condition_keys", "normalized", "means", "seed", "overwrite")
    made = report(
        pred,
        real,
        model,
        train,
        options.report,
        **keys,
        **_layers(options),
        table=table,
        command=shlex.join(options.words),
    )
    print(f"{made}\nReport in {options.report}")


def _embeddings(options: argparse.Namespace) -> pd.DataFrame | None:
    """Features of perturbations; columns that are constant may not be so in another file."""
    if options.embeddings is None:
        return None
    from scperturbdiff import features

    return features.read(options.embeddings, constant="keep")


def _layers(options: argparse.Namespace) -> dict[str, Any]:
    """Layers of an evaluation as arguments of functions; X is none."""
    return {"layer_pred": None if options.layer_pred == "X" else options.layer_pred, "layer_real": options.layer}


def _given(options: argparse.Namespace, *names: str) -> dict[str, Any]:
    """Options that are arguments of the same name."""
    return {name: getattr(options, name) for name in names}
