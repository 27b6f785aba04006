"""What a training is of: a checkpoint is of use to the same one only."""

from __future__ import annotations

import json
from hashlib import blake2b
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from scperturbdiff.data import CONDITIONS
from scperturbdiff.storage import changed

if TYPE_CHECKING:
    from collections.abc import Mapping

    from anndata import AnnData

    from scperturbdiff.data import PopulationTable

NO_MATTER = (
    "callbacks", "logger", "enable_progress_bar", "progress_bar_refresh_rate", "simple_progress_bar", "profiler",
    "enable_model_summary", "log_every_n_steps", "log_save_dir", "default_root_dir", "accelerator", "devices",
    "num_nodes", "strategy",
)  # fmt: skip
"""Arguments of the trainer that do not decide what is trained, or only by rounding."""
LONG = 1000
"""Letters of a value that is kept as its digest."""


def fingerprint(
    cells: AnnData,
    table: PopulationTable | None,
    registry: Mapping[str, Any],
    model: Mapping[str, Any],
    training: Mapping[str, Any],
) -> dict[str, Any]:
    """What decides what a training leads to, beside its seed: plain values, and digests of long ones.

    Parameters
    ----------
    cells
        Names of cells and genes are looked at, counts are not.
    table
        Populations, if there is a second stage.
    registry
        Of the model.
    model, training
        Arguments of the model and of its training.

    Returns
    -------
    Value of everything by a name that a user knows.
    """
    out: dict[str, Any] = {
        "version of scperturbdiff": version("scperturbdiff"),
        "number of genes": cells.n_vars,
        "number of cells": cells.n_obs,
        "names of genes": _digest(list(cells.var_names)),
        "names of cells": _digest(list(cells.obs_names)),
        "populations": None if table is None else _digest([_plain(table.report), _plain(table.cells.rows)]),
        "conditions": _digest(_plain(registry[CONDITIONS])),
    }
    given = {"setup": registry["setup_args"], "PerturbDiff": model, "train": training}
    out |= {f"{of}({name})": _brief(value) for of, values in given.items() for name, value in values.items()}
    return {name: value for name, value in out.items() if name not in {f"train({x})" for x in NO_MATTER}}


def differences(there: Mapping[str, Any], here: Mapping[str, Any]) -> list[str]:
    """What differs between two fingerprints, in words; empty if nothing does."""
    return [f"{name} was {_short(before)}, is {_short(now)}" for name, before, now in changed(there, here)]


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) < 60 else f"{text[:60]}..."


def _brief(value: Any) -> Any:
    plain = _plain(value)
    return plain if len(json.dumps(plain)) < LONG else _digest(plain)


def _plain(value: Any) -> Any:
    """What JSON can hold, with digests of arrays and tables."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, dict):
        return {str(key): _plain(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(part) for part in value]
    if isinstance(value, pd.DataFrame):
        return _digest([list(map(str, value.columns)), _plain(pd.util.hash_pandas_object(value).to_numpy())])
    if isinstance(value, np.ndarray) and value.dtype != object:
        return blake2b(np.ascontiguousarray(value).tobytes(), digest_size=8).hexdigest()
    if isinstance(value, np.ndarray):
        return _plain(value.tolist())
    return str(value) if isinstance(value, Path) else getattr(value, "__qualname__", type(value).__name__)


def _digest(value: Any) -> str:
    return blake2b(json.dumps(value).encode(), digest_size=8).hexdigest()
