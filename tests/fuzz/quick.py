"""Constants of training that bound its length, small for cases of a few cells."""

from __future__ import annotations

from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING
from unittest.mock import patch

from scperturbdiff.training import SETTINGS

if TYPE_CHECKING:
    from collections.abc import Iterator

MODULES = ("_fold_errors", "_folds", "_latent", "_left_out", "_populations", "_stages", "_states", "_unseen")
FEW = {
    "fold_populations": 3,
    "fold_cells": 8,
    "unseen_least": 8,
    "state_populations": 4,
    "state_cells_scored": 10,
    "min_held_out": 2,
    "held_out": 3,
}


@contextmanager
def quick_constants() -> Iterator[None]:
    """Leave out fewer populations, and use a network that fewer of them have tested."""
    quick = replace(SETTINGS, **FEW)
    with ExitStack() as stack:
        for module in MODULES:
            stack.enter_context(patch(f"scperturbdiff.training.{module}.SETTINGS", quick))
        yield
