"""What the benchmarks share: the command line, quiet logs, real data, the report of a training, results files."""

from __future__ import annotations

import argparse
import logging
import os
import subprocess
import warnings
from functools import lru_cache
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

import scperturbdiff as spd

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

RESULTS = Path(__file__).parent / "results"
DATA = "SCPERTURBDIFF_DATA"


def parser(description: str | None) -> argparse.ArgumentParser:
    """A parser that prints a script's docstring as it is."""
    return argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)


def quiet() -> None:
    """Only what a benchmark prints itself."""
    import scvi

    warnings.filterwarnings("ignore")
    for name in ("lightning", "lightning.pytorch", "lightning.fabric", "scperturbdiff"):
        logging.getLogger(name).setLevel(logging.ERROR)
    scvi.settings.verbosity = logging.WARNING
    logging.getLogger("scvi.scperturbdiff").setLevel(logging.ERROR)


def data_file(name: str) -> Path:
    """A file of the real data, which are no part of the repository."""
    folder = os.environ.get(DATA)
    if not folder:
        raise SystemExit(f"This benchmark needs real data: set {DATA} to the folder that holds {name}.")
    path = Path(folder) / name
    if not path.is_file():
        raise SystemExit(f"{DATA}={folder} holds no file {name}.")
    return path


@lru_cache
def commit() -> str:
    """Commit of the package that is measured, with a `+` if its files differ from it; "unknown" outside a checkout."""
    folder = Path(spd.__file__).parent

    def git(*arguments: str) -> str:
        done = subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True, check=True)
        return done.stdout.strip()

    try:
        return git("rev-parse", "--short", "HEAD") + ("+" if git("status", "--porcelain", "--", ".") else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def found(model: spd.PerturbDiff) -> dict[str, Any]:
    """What the report of a training says of the network, for a row of a table."""
    report = model.report_
    if report is None:  # only the first stage was trained
        return {"network_weight": np.nan, "network": "", "commit": commit()}
    return {"network_weight": report.network_weight, "network": report.network_reason, "commit": commit()}


def with_report(table: pd.DataFrame, models: Mapping[str, spd.PerturbDiff]) -> pd.DataFrame:
    """Add to long tables what trainings found, as numbers, in the rows of each model, and the commit in all rows.

    `network_weight`, `network_change` (of the criterion on held-out populations) and `explained_<novelty>`, the share
    of the shifts that retrieval explains when training conditions are left out in that way.
    """
    rows = {}
    for name, model in models.items():
        report = model.report_
        if report is not None:
            rows[name] = {
                "network_weight": report.network_weight,
                "network_change": report.network.get("change", np.nan),
                **{f"explained_{way}": share for way, share in report.retrieval.items()},
            }
    columns = pd.DataFrame.from_dict(rows, orient="index").reindex(table["model"]).set_axis(table.index)
    return pd.concat([table, columns], axis=1).assign(commit=commit())


def without_report(table: pd.DataFrame) -> pd.DataFrame:
    """A table without what :func:`with_report` and :func:`found` add."""
    return table.loc[:, ~table.columns.str.match(r"(network|explained_\w+|network_\w+|commit)$")]


def averages(table: pd.DataFrame, by: Sequence[str] = ()) -> pd.DataFrame:
    """Mean of each metric over conditions, models in the order of the table."""
    return table.groupby([*by, "model", "metric"], sort=False)["value"].mean().unstack()


def save(rows: pd.DataFrame, name: str, keys: Sequence[str], folder: Path | None = None) -> None:
    """Merge `rows` into a results file; rows of the same `keys` are replaced, others stay as they are."""
    folder = folder or RESULTS
    folder.mkdir(exist_ok=True, parents=True)
    path = folder / f"{name}.csv"
    if path.is_file():
        old = pd.read_csv(path)
        # as a file would give them back: a dose that is text here and a number there would stay beside itself
        rows = pd.read_csv(StringIO(rows.to_csv(index=False)))
        known = [key for key in keys if key in old]
        replaced = pd.MultiIndex.from_frame(old[known]).isin(pd.MultiIndex.from_frame(rows[known]))
        rows = pd.concat([old[~replaced], rows])
    rows.sort_values(list(keys)).round(4).to_csv(path, index=False)
