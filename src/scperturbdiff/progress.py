"""Progress bars: where somebody sees them, and what they are called."""

from __future__ import annotations

import sys
from typing import Any

from lightning.pytorch import Callback


def shows_progress() -> bool:
    """Whether output goes to a terminal or a notebook: elsewhere bars fill logs."""
    return sys.stdout.isatty() or "ipykernel" in sys.modules


class StageName(Callback):
    """Writes on the progress bar which stage is trained."""

    def __init__(self, name: str) -> None:
        self.name = name

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Name the bar; scvi-tools' own writes its text at the start of an epoch, after other callbacks."""
        bar = getattr(trainer.progress_bar_callback, "main_progress_bar", None)
        if batch_idx == 0 and bar is not None:
            bar.set_description(f"{self.name}, epoch {trainer.current_epoch + 1}/{trainer.max_epochs}")
