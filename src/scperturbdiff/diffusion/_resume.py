"""Going on from a checkpoint of the second stage as if nothing had happened."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Checkpoint
from scvi.train import SaveCheckpoint

from scperturbdiff.seeds import derive_seed

if TYPE_CHECKING:
    from collections.abc import Iterable

    import pandas as pd
    from torch import nn

    from scperturbdiff.diffusion._populations import GroupIndex
    from scperturbdiff.diffusion._training import GeneratorTrainingPlan


KEY = "scperturbdiff"
"""Key of a checkpoint with the state of the random draws."""


class RepeatableEpochs(pl.Callback):
    """Seeds every epoch by its number, and keeps the order of the cells and what was logged in checkpoints.

    The state of torch's generators when a checkpoint is written is not enough: how often Lightning draws from them
    between two epochs depends on whether it has just been restarted.
    """

    def __init__(self, seed: int) -> None:
        self.seed, self.ended = seed, False

    def _seed(self, trainer: pl.Trainer, part: str, *names: object) -> None:
        torch.manual_seed(derive_seed(self.seed, part, trainer.current_epoch, *names))

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Do not go on where training had been stopped early."""
        trainer.should_stop = trainer.should_stop or self.ended

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Seed the order of the cells: the same in all processes, so that one of them can write it down."""
        self._seed(trainer, "order")

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Seed the steps, of each process differently."""
        if batch_idx == 0:
            self._seed(trainer, "steps", *([trainer.global_rank] if trainer.global_rank else []))

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Add the seed, the order of the cells, what was logged, and whether this was the last epoch."""
        rows = [index.rows.cpu() for index in _groups(pl_module)]
        checkpoint[KEY] = {"seed": self.seed, "rows": rows, "logged": _logged(trainer), "ended": trainer.should_stop}

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Restore the order of the cells and what was logged."""
        self.ended = checkpoint[KEY].get("ended", False)
        if trainer.logger is not None and _history(trainer) is not None:
            for name, time, at, value in checkpoint[KEY].get("logged", ()):
                trainer.logger.log_metrics({name: value, time: at}, None)
        for index, rows in zip(_groups(pl_module), checkpoint[KEY]["rows"], strict=True):
            if index.rows.shape != rows.shape:
                raise ValueError(
                    f"The checkpoint was written for groups of {len(rows)} cells, now there are {len(index.rows)}: "
                    "resume with the cells and the validation_size of the interrupted run."
                )
            index.rows = rows.to(index.rows.device)


def _history(trainer: pl.Trainer) -> dict[str, pd.DataFrame] | None:
    """What scvi-tools' logger was told; `None` of any other, and where another process keeps the log."""
    found = getattr(trainer.logger, "history", None)
    return found if isinstance(found, dict) else None


def _logged(trainer: pl.Trainer) -> list[tuple[str, str, int, float]]:
    """Name, name of the time, time and value of all that was logged."""
    measured = trainer.logged_metrics  # means over all processes, each of which must ask for them
    history = _history(trainer)
    if history is None:
        return []
    out = [
        (name, str(table.index.name), int(time), float(value))
        for name, table in history.items()
        for time, value in zip(table.index, table[name], strict=True)
    ]
    # loggers are told what was measured in training after checkpoints are written
    now, by_step = trainer.current_epoch, {name for name, time, _, _ in out if time == "step"}
    told = by_step | {name for name, _, time, _ in out if time == now}
    return out + [(name, "epoch", now, float(x)) for name, x in measured.items() if name not in told]


def _groups(plan: pl.LightningModule) -> tuple[GroupIndex, ...]:
    training: GeneratorTrainingPlan = plan  # type: ignore[assignment]
    sampler = training.sampler
    return sampler.cells, sampler.controls


def restore_module(module: nn.Module, ckpt_path: str | Path) -> int:
    """Load a checkpoint into `module`; returns the seed of the interrupted run.

    Raises
    ------
    ValueError
        If the file is not a checkpoint of the second stage.
    """
    if not Path(ckpt_path).is_file():
        raise FileNotFoundError(f"ckpt_path={str(ckpt_path)!r} is not a file.")
    try:
        checkpoint = torch.load(ckpt_path, map_location=next(module.parameters()).device, weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        text = f"ckpt_path={str(ckpt_path)!r} is no checkpoint, or holds more than numbers and plain values."
        raise ValueError(text) from error
    if KEY not in checkpoint:
        raise ValueError(
            f"ckpt_path={str(ckpt_path)!r} is not a checkpoint of the second stage of PerturbDiff. Write one with "
            "train(..., callbacks=[lightning.pytorch.callbacks.ModelCheckpoint(...)])."
        )
    state = {
        name.removeprefix("module."): value
        for name, value in checkpoint["state_dict"].items()
        if name.startswith("module.")
    }
    module.load_state_dict(state)
    return int(checkpoint[KEY]["seed"])


def split_callbacks(callbacks: Iterable[pl.Callback] | None) -> tuple[list[pl.Callback], list[pl.Callback]]:
    """Lightning's own checkpoints, which scvi-tools' trainer does not take, and the other callbacks."""
    given = list(callbacks or ())
    plain: list[pl.Callback] = [c for c in given if isinstance(c, Checkpoint) and not isinstance(c, SaveCheckpoint)]
    return plain, [c for c in given if not any(c is p for p in plain)]
