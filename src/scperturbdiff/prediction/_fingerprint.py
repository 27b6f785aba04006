"""What decides which cells a prediction gives: parts of a prediction are of use to the same one only."""

from __future__ import annotations

import json
from dataclasses import asdict
from hashlib import blake2b
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch

from scperturbdiff.data import CHUNK_ROWS, read_genes
from scperturbdiff.storage import changed, to_state

if TYPE_CHECKING:
    from collections.abc import Mapping

    from scperturbdiff.prediction._prepared import PreparedRequest


def fingerprint(prepared: PreparedRequest, target_sum: float) -> dict[str, Any]:
    """Plain values, and digests of long ones, by names that a user knows.

    The counts of the control cells that are asked for are read once.
    """
    generator, request = prepared.generator, prepared.request
    groups, settings = generator.groups, asdict(generator.settings)
    used = sorted(set(request.group))
    rows = [groups.cells[group] for group in used]
    obs, var = prepared.controls.obs_names, prepared.controls.var
    labels = groups.labels.iloc[used]
    return {
        "version of scperturbdiff": version("scperturbdiff"),
        "version of torch": version("torch"),
        "device": generator.module.device.type,
        "model": digest(generator.module.state_dict()),
        "set-up and features": digest([to_state(prepared.space), generator.batches]),
        **settings,
        "transform_batch": generator.transform_batch,
        "target_sum": target_sum,
        "number of populations": len(request),
        "number of cells": int(sum(request.n_cells)) * (generator.settings.n_populations or 1),
        "populations": digest([request.table, request.label, request.dose, request.group, request.n_cells]),
        "genes": digest(var.loc[prepared.genes]),
        "number of control cells": int(sum(map(len, rows))),
        "names and labels of control cells": digest([labels, *rows, *(obs[some].tolist() for some in rows)]),
        "counts of control cells": _counts(prepared, np.concatenate(rows)),
    }


def differences(there: Mapping[str, Any], here: Mapping[str, Any]) -> list[str]:
    """What differs between two fingerprints, in words; empty if nothing does."""
    return [f"{name} {json.dumps(before)} and {json.dumps(now)}" for name, before, now in changed(there, here)]


def _counts(prepared: PreparedRequest, rows: np.ndarray) -> str:
    found = blake2b(digest_size=8)
    for start in range(0, len(rows), CHUNK_ROWS):
        some = rows[start : start + CHUNK_ROWS]
        counts = read_genes(prepared.controls, prepared.genes, prepared.generator.layer, some)
        _add(found, [np.diff(counts.indptr).astype(np.int64), counts.indices.astype(np.int64), counts.data])
    return found.hexdigest()


def digest(value: Any) -> str:
    """A short text that differs where values do: numbers, texts, arrays, tensors, tables and containers of these."""
    found = blake2b(digest_size=8)
    _add(found, value)
    return found.hexdigest()


def _add(found: blake2b, value: Any) -> None:
    if isinstance(value, torch.Tensor):
        value = value.detach().cpu().numpy()
    if isinstance(value, pd.DataFrame):
        columns = [(str(name), value[name].astype(str).tolist()) for name in value.columns]
        value = [value.index.astype(str).tolist(), columns]
    if isinstance(value, np.ndarray) and value.dtype.kind in "biuf":
        found.update(f"array {value.dtype.str} {value.shape}".encode())
        found.update(np.ascontiguousarray(value).data)
    elif isinstance(value, np.ndarray | list | tuple):
        value = value.tolist() if isinstance(value, np.ndarray) else value
        found.update(f"list {len(value)}".encode())
        for part in value:
            _add(found, part)
    elif isinstance(value, dict):
        _add(found, sorted(((str(name), part) for name, part in value.items()), key=lambda pair: pair[0]))
    else:
        text = f"{type(value).__name__} {value!r}".encode()
        found.update(f"{len(text)} ".encode() + text)
