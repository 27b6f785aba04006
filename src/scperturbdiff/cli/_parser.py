"""Arguments of the commands."""

from __future__ import annotations

import argparse
from pathlib import Path

from scperturbdiff import __version__
from scperturbdiff.cli._commands import run_convert, run_evaluate, run_predict, run_train
from scperturbdiff.cli._demo import FOLDER, run_demo


def build_parser() -> argparse.ArgumentParser:
    """The parser; the parsed options have the function to call as `run`."""
    parser = argparse.ArgumentParser(
        prog="scperturbdiff", description="Predict how populations of single cells respond to a perturbation."
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, (run, add_arguments, short, long) in COMMANDS.items():
        command = commands.add_parser(name, help=short, description=long)
        add_arguments(command)
        command.add_argument("--overwrite", action="store_true", help="replace files that are there")
        command.add_argument("--traceback", action="store_true", help="show where in the program an error occurred")
        command.set_defaults(run=run)
    return parser


def _demo(command: argparse.ArgumentParser) -> None:
    command.add_argument("--out", type=Path, default=FOLDER, help="folder for the results (default: %(default)s)")
    _add_seed(command)
    command.add_argument(
        "--quick", action="store_true", help="a few steps on a tiny screen: shows that it runs, not how well"
    )


def _train(command: argparse.ArgumentParser) -> None:
    command.add_argument("data", type=Path, metavar="data.h5ad", help="perturbed and control cells, raw counts")
    command.add_argument("--out", type=Path, required=True, help="folder of the model")
    _add_keys(command)
    command.add_argument("--batch-key", metavar="COLUMN", help="column of obs with donors, plates or batches")
    command.add_argument("--layer", help="layer with raw counts (default: X)")
    _add_embeddings(command)
    command.add_argument("--max-epochs", type=_positive, help="upper bound on the epochs of both stages")
    command.add_argument("--accelerator", default="auto", help="auto, cpu, gpu, mps (default: auto)")
    command.add_argument("--checkpoint", type=Path, metavar="DIR", help="folder for what is needed to go on later")
    command.add_argument("--resume", action="store_true", help="go on with the training in the folder of --checkpoint")
    _add_seed(command)


def _predict(command: argparse.ArgumentParser) -> None:
    command.add_argument("model", type=Path, metavar="model_dir", help="folder of a trained model")
    command.add_argument("controls", type=Path, metavar="controls.h5ad", help="control cells, raw counts")
    wanted = command.add_mutually_exclusive_group()
    wanted.add_argument(
        "--perturbations", nargs="+", metavar="NAME", help="names, combinations as A+B (default: all of training)"
    )
    wanted.add_argument(
        "--table", type=Path, metavar="wanted.csv", help="one row a wanted population: perturbation, dose, context ..."
    )
    command.add_argument("--out", type=Path, required=True, metavar="pred.h5ad",
                         help="file of the predicted cells, .h5ad or .zarr")  # fmt: skip
    command.add_argument("--n-cells", type=_positive, help="cells per context and perturbation (default: as controls)")
    command.add_argument("--n-populations", type=_positive, help="independent draws (default: the best single guess)")
    command.add_argument("--n-steps", type=_count, help="network evaluations a population (0: retrieval alone)")
    command.add_argument("--layer", help="layer of the controls with raw counts (default: as in training)")
    _add_embeddings(command)
    _add_seed(command)


def _convert(command: argparse.ArgumentParser) -> None:
    command.add_argument("model", type=Path, metavar="model_dir", help="folder of a trained model")
    command.add_argument("--out", type=Path, required=True, help="folder of the converted model")
    command.add_argument(
        "--allow-pickle", action="store_true", help="read an old model; it can run any code of whoever wrote it"
    )


def _evaluate(command: argparse.ArgumentParser) -> None:
    command.add_argument("pred", type=Path, metavar="pred.h5ad", help="predicted cells")
    command.add_argument("real", type=Path, metavar="real.h5ad", help="real perturbed and control cells")
    command.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder for table and figures")
    _add_keys(command)
    _add_columns(command, "condition", "further columns that define a condition")
    command.add_argument("--train", type=Path, metavar="train.h5ad", help="training cells, for the simple rules")
    command.add_argument("--metrics", nargs="+", metavar="NAME", help="metrics to compute, or all (default: five)")
    command.add_argument("--layer-pred", default="counts", help="layer of pred with counts, X for X (default: counts)")
    command.add_argument("--report", type=Path, metavar="report.html", help="write a page about it all, or a .md card")
    command.add_argument("--model", type=Path, metavar="model_dir", help="the model, for what the report says of it")
    kind = command.add_mutually_exclusive_group()
    kind.add_argument("--normalized", action="store_true", help="pred is log-normalised, in X unless a layer is named")
    kind.add_argument("--means", action="store_true", help="pred has the mean of each condition, log-normalised, in X")
    command.add_argument(
        "--allow-overlap", action="store_true", help="score cells that are among the training cells, too"
    )
    command.add_argument("--layer", help="layer of real and train with counts (default: X)")
    _add_seed(command)


COMMANDS = {
    "demo": (
        run_demo, _demo, "simulate a screen, hold out populations, train, predict them and compare",
        "Simulate a screen, hold out (context, perturbation) pairs, train on the rest, predict the held-out "
        "populations from control cells alone, and compare with the real ones beside simple rules.",
    ),
    "train": (
        run_train, _train, "train a model on an h5ad file",
        "Train a model on an h5ad file with raw counts.",
    ),
    "predict": (
        run_predict, _predict, "predict perturbed cells from the control cells of an h5ad file",
        "Predict cells of each perturbation in each context of the control cells. A model's folder is trusted for its "
        "numbers only: nothing in it is run. Older versions wrote a pickle (model.pt), which can run any code and is "
        "refused: see convert.",
    ),
    "convert": (
        run_convert, _convert, "write a model of an older version anew",
        "Write a model that an older version saved, which was a pickle, in the format that is read without running "
        "code of the file.",
    ),
    "evaluate": (
        run_evaluate, _evaluate, "score predicted cells against real ones",
        "Score predicted cells against real ones, beside a replicate of the real cells and, with --train, beside "
        "simple rules. Writes table.csv (each condition), summary.csv and figures.",
    ),
}  # fmt: skip
"""Command -> function, its arguments, and what the help says, in short and in long."""


def _add_keys(command: argparse.ArgumentParser) -> None:
    command.add_argument("--perturbation-key", required=True, metavar="COLUMN", help="column of obs with perturbations")
    command.add_argument("--control", required=True, metavar="LABEL", help="its value for control cells")
    _add_columns(command, "context", "columns of obs that name the context: cell type, line, patient")
    command.add_argument("--dose-key", metavar="COLUMN", help="column of obs with doses")
    command.add_argument("--separator", type=lambda text: None if text == "none" else text, default="+",
                         help="joins names of a combination; none: no name is one (default: +)")  # fmt: skip


def _add_columns(command: argparse.ArgumentParser, what: str, text: str) -> None:
    command.add_argument(f"--{what}-key", dest=f"{what}_keys", nargs="+", action="extend", default=[], metavar="COLUMN",
                         help=text)  # fmt: skip


def _add_embeddings(command: argparse.ArgumentParser) -> None:
    command.add_argument("--embeddings", type=Path, metavar="FILE",
                         help="features of perturbations: .csv, .tsv, .parquet, .npz, names first")  # fmt: skip


def _add_seed(command: argparse.ArgumentParser) -> None:
    command.add_argument("--seed", type=_seed, default=0, help="the same seed gives the same result (default: 0)")


def _positive(text: str) -> int:
    return _count(text, 1)


def _count(text: str, least: int = 0) -> int:
    number = int(text)
    if number < least:
        raise argparse.ArgumentTypeError(f"{number} must be at least {least}")
    return number


def _seed(text: str) -> int:
    number = int(text)
    if not 0 <= number < 2**32:
        raise argparse.ArgumentTypeError(f"{number} must be from 0 to {2**32 - 1}")
    return number
