"""What two trainings must have in common for the checkpoints of one to be of use to the other."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pandas as pd
import pytest
from tests.screens import screen, table_of, tiny

from scperturbdiff.training import fingerprint
from scperturbdiff.training._fingerprint import differences


def of(model: dict[str, Any] | None = None, training: dict[str, Any] | None = None, **setup: Any) -> dict[str, Any]:
    """As it is read again."""
    adata = screen(**setup)
    found = fingerprint(adata, table_of(adata), tiny(adata).registry_, model or {}, training or {})
    return dict(json.loads(json.dumps(found)))


def test_the_same_is_the_same() -> None:
    values: dict[str, Any] = {
        "pair": (1, 2.5),
        "nothing": np.nan,
        "table": pd.DataFrame({"a": [1.0, np.nan]}, index=["x", "y"]),
        "array": np.array([np.nan, 1.0]),
        "names": np.array(["a", "b"], dtype=object),
        "number": np.float32(0.5),
        "function": np.mean,
        "object": object(),
    }
    again = {**values, "object": object(), "table": values["table"].copy()}
    assert differences(of(values, values, features=True), of(again, again, features=True)) == []


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (pd.DataFrame({"a": [1.0]}), pd.DataFrame({"a": [2.0]})),
        (pd.DataFrame({"a": [1.0]}), pd.DataFrame({"b": [1.0]})),
        (pd.DataFrame({"a": [1.0]}, index=["x"]), pd.DataFrame({"a": [1.0]}, index=["y"])),
        (np.arange(3), np.arange(3)[::-1]),
        (list(range(999)), list(range(998))),
        ({"lr": 0.1}, {"lr": 0.2}),
        (None, 0),
    ],
)
def test_what_differs_is_named(one: Any, other: Any) -> None:
    (said,) = differences(of({}, {"value": one}), of({}, {"value": other}))
    assert said.startswith("train(value) was ") and len(said) < 200


def test_features_of_perturbations_are_looked_at() -> None:
    said = differences(of(features=False), of(features=True))
    assert {text.split(" was ")[0] for text in said} == {"conditions", "setup(perturbation_embeddings)"}


def test_how_training_is_shown_does_not_matter() -> None:
    shown = {"logger": False, "callbacks": [1], "enable_progress_bar": False, "accelerator": "gpu", "devices": 2}
    assert differences(of(), of(training=shown)) == []
