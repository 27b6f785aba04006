"""What training and prediction write beside their results."""

from __future__ import annotations

import logging
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from tests.helpers import FEW_STEPS, SETUP, TINY

import scperturbdiff as spd
from scperturbdiff.progress import StageName

if TYPE_CHECKING:
    import pytest

SCRIPT = """
import scperturbdiff as spd
from tests.helpers import FEW_STEPS, SETUP, TINY
cells = spd.datasets.simulate(2, 3, 10, 30, n_batches=2, seed=0)
spd.PerturbDiff.setup_anndata(cells, **SETUP)
model = spd.PerturbDiff(cells, **TINY)
model.train(**{k: v for k, v in FEW_STEPS.items() if k != "enable_progress_bar"}, validation_size=0)
controls = cells[(cells.obs["perturbation"] == "control").to_numpy()]
model.predict(controls, ["P01"], n_cells=5)
"""


def test_nothing_is_alarming_and_no_bar_goes_into_a_pipe() -> None:
    root = Path(__file__).resolve().parents[1]
    done = subprocess.run([sys.executable, "-c", SCRIPT], cwd=root, capture_output=True, text=True, check=True)
    assert "Epoch" not in done.stdout + done.stderr
    assert "Generating" not in done.stdout + done.stderr
    assert "eval mode" not in done.stderr
    assert "across ranks" not in done.stderr


def test_bars_say_which_stage_is_trained(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    said: list[str] = []
    whole = StageName.on_train_batch_start

    def told(self: StageName, trainer: object, *args: object) -> None:
        whole(self, trainer, *args)
        said.append(f"{self.name}: {trainer.progress_bar_callback.main_progress_bar.desc}")  # type: ignore[attr-defined]

    monkeypatch.setattr(StageName, "on_train_batch_start", told)
    caplog.set_level(logging.ERROR)
    cells = spd.datasets.simulate(2, 3, 10, 30, n_batches=2, seed=0)
    spd.PerturbDiff.setup_anndata(cells, **SETUP)
    spd.PerturbDiff(cells, **TINY).train(**(FEW_STEPS | {"enable_progress_bar": True}), validation_size=0)
    assert any(text.startswith("Cells: Cells, epoch 1/1") for text in said)
    assert any(text.startswith("Populations: Populations, epoch 1/1") for text in said)
