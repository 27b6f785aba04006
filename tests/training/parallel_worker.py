"""What each of two processes does in the tests of training in parallel.

    torchrun --nproc-per-node 2 -m tests.training.parallel_worker FOLDER trained
    torchrun --nproc-per-node 2 -m tests.training.parallel_worker FOLDER resumed
    python -m tests.training.parallel_worker FOLDER launched      # Lightning starts the second process

Each process leaves what it saw in ``rank<number>.pt`` of the folder.
"""

from __future__ import annotations

import os
import sys
from dataclasses import asdict, is_dataclass
from hashlib import blake2b
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lightning.pytorch as pl
import numpy as np
import pandas as pd
import torch
from tests.helpers import TINY
from tests.screens import screen
from torch.overrides import TorchFunctionMode

import scperturbdiff as spd
from scperturbdiff.diffusion import GeneratorTrainingPlan, PopulationSampler
from scperturbdiff.latent._batches import RowBatches
from scperturbdiff.storage import SavedModel
from scperturbdiff.training import Processes, _checkpoints

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from anndata import AnnData

    from scperturbdiff.diffusion._populations import PopulationBatch

QUIET: dict[str, Any] = {"enable_progress_bar": False, "accelerator": "cpu", "seed": 5}
STAGES: dict[str, dict[str, Any]] = {
    "vae": {"max_epochs_vae": 2, "max_epochs_generator": 0, "batch_size": 40},
    "network": {
        "max_epochs_vae": 0,
        "max_epochs_generator": 2,
        "validation_size": 0.0,
        "plan_kwargs": {"steps_per_epoch": 3, "n_populations": 6, "n_cells": 4, "warmup_steps": 2},
    },
}
"""Six steps of each stage, which one process can repeat: nothing is held out."""
ODD: dict[str, Any] = QUIET | {
    "max_epochs_vae": 2,
    "max_epochs_generator": 4,
    "validation_size": 0.45,
    "batch_size": 33,
    "train_size": 0.9,
    "check_val_every_n_epoch": 1,
    "plan_kwargs": {"steps_per_epoch": 3, "n_populations": 5, "n_cells": 7},
}
"""A training with no size that two processes can share evenly."""
TWO: dict[str, Any] = {"devices": 2, "strategy": "ddp"}
PREDICT: dict[str, Any] = {"perturbations": ["P0", "P3"], "n_cells": 6, "seed": 1, "progress": False}


def model_of(adata: AnnData, seed: int) -> spd.PerturbDiff:
    """A small model without dropout."""
    torch.manual_seed(seed)
    return spd.PerturbDiff(adata, **TINY, vae_dropout=0.0)


def cells() -> AnnData:
    """151 cells of 24 populations."""
    adata = screen(contexts=3)[:-4].copy()
    spd.PerturbDiff.setup_anndata(adata, "perturbation", "control", context_keys=["cell_type"], batch_key="donor")
    return adata


def digest(value: Any) -> str:
    """One text for all that is in a value, bit for bit."""
    found = blake2b(digest_size=16)

    def add(part: Any) -> None:
        if isinstance(part, torch.Tensor):
            part = part.detach().cpu().numpy()
        if is_dataclass(part) and not isinstance(part, type):
            part = asdict(part)
        if isinstance(part, pd.DataFrame | pd.Series):
            part = part.reset_index().to_dict("list")
        if isinstance(part, dict):
            part = [x for pair in part.items() for x in pair]
        if isinstance(part, np.ndarray) and part.dtype != object:
            found.update(f"{part.dtype} {part.shape}".encode() + np.ascontiguousarray(part).tobytes())
        elif isinstance(part, list | tuple | np.ndarray):
            found.update(f"[{len(part)}".encode())
            for item in part:
                add(item)
        else:
            found.update(f"{part!r};".encode())

    add(value)
    return found.hexdigest()


def of_model(model: spd.PerturbDiff) -> dict[str, str]:
    """Digests of all that training leaves."""
    state = model.module.state_dict()
    parts = {
        "weights": {name: v for name, v in state.items() if isinstance(v, torch.Tensor)},
        "retrieval": state["_extra_state"],
        "report": model.report_,
        "populations": model.populations_,
    }
    return {name: digest(part) for name, part in parts.items()}


def of_prediction(model: spd.PerturbDiff) -> str:
    """Digest of predicted cells."""
    cells = model.predict(**PREDICT)
    return digest([cells.obs, cells.X.toarray(), cells.layers["counts"].toarray(), cells.obsm["X_perturbdiff"]])


class Randomness(TorchFunctionMode):
    """Keeps the random numbers that are drawn, or gives those that were kept."""

    DRAWS = (torch.rand, torch.randn, torch.randint, torch.Tensor.normal_)

    def __init__(self, kept: list[torch.Tensor] | None = None) -> None:
        super().__init__()
        self.kept, self.given = kept, list[torch.Tensor]()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func not in self.DRAWS:
            return func(*args, **(kwargs or {}))
        if self.kept is not None:
            drawn = func(*args, **(kwargs or {}))
            kept = self.kept.pop(0)
            assert drawn.shape == kept.shape and drawn.dtype == kept.dtype
            self.given.append(kept)
            return kept
        self.given.append(func(*args, **(kwargs or {})))
        return self.given[-1].clone()


class Watch(pl.Callback):
    """Notes the gradients and the random numbers of every step."""

    def __init__(self, kept: list[list[torch.Tensor]] | None = None) -> None:
        self.kept, self.numbers, self.gradients = kept, list[list[torch.Tensor]](), list[dict[str, torch.Tensor]]()
        self.mode: Randomness | None = None

    def on_train_batch_start(self, *args: Any) -> None:
        self.mode = Randomness(None if self.kept is None else self.kept.pop(0))
        self.mode.__enter__()

    def on_before_optimizer_step(self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Any) -> None:
        found = ((name, p.grad) for name, p in pl_module.named_parameters())
        self.gradients.append({name: grad.clone() for name, grad in found if grad is not None})

    def on_train_batch_end(self, *args: Any) -> None:
        assert self.mode is not None
        self.mode.__exit__(None, None, None)
        self.numbers.append(self.mode.given)


class Seen:
    """Rows of cells and populations that one process is given, from now on."""

    def __init__(self, watch: Watch | None = None) -> None:
        self.rows, self.drawn = list[list[int]](), list["PopulationBatch"]()
        self.before = RowBatches.__iter__, PopulationSampler.draw
        batches, draw = self.before

        def rows(batches_of: RowBatches) -> Iterator[list[int]]:
            for batch in batches(batches_of):
                self.rows.append(batch)
                yield batch

        def drawn(sampler: PopulationSampler, *args: int) -> PopulationBatch:
            mode = None if watch is None else watch.mode
            n = 0 if mode is None else len(mode.given)
            self.drawn.append(draw(sampler, *args))
            if mode is not None:
                del mode.given[n:]  # populations are kept as they are
            return self.drawn[-1]

        RowBatches.__iter__ = rows  # type: ignore[method-assign]
        PopulationSampler.draw = drawn  # type: ignore[method-assign]

    def stop(self) -> None:
        """Watch no longer."""
        RowBatches.__iter__, PopulationSampler.draw = self.before  # type: ignore[method-assign]


class Cut(pl.Callback):
    """Ends the second stage with an error in an epoch."""

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if isinstance(pl_module, GeneratorTrainingPlan) and trainer.current_epoch == 2:
            raise RuntimeError("cut off")


def error_of(call: Callable[[], Any]) -> str:
    """The text of the error of a call."""
    try:
        call()
    except (ValueError, RuntimeError, OSError) as error:
        return str(error)
    return "no error"


def count_writes() -> list[str]:
    """Names of what this process writes of checkpoints, from now on."""
    written, atomic, write = list[str](), _checkpoints.atomic_file, SavedModel.write

    def file(path: Path, *args: Any, **kwargs: Any) -> Any:
        written.append(path.name)
        return atomic(path, *args, **kwargs)

    def model(saved: SavedModel, folder: Path, prefix: str) -> Any:
        written.append(prefix)
        return write(saved, folder, prefix)

    _checkpoints.atomic_file, SavedModel.write = file, model  # type: ignore[assignment,method-assign]
    return written


def trained(folder: Path, rank: int) -> dict[str, Any]:
    """Two trainings, and what cannot be trained; the processes start from different weights."""
    out: dict[str, Any] = {}
    adata = cells()

    for stage, options in STAGES.items():
        watch = Watch()
        seen = Seen(watch)
        model = model_of(adata, rank)
        model.train(**QUIET, **options, **TWO, callbacks=[watch])
        seen.stop()
        weights = {name: v for name, v in model.module.state_dict().items() if isinstance(v, torch.Tensor)}
        out[stage] = {"rows": seen.rows, "drawn": seen.drawn, "weights": weights}
        out[stage] |= {"numbers": watch.numbers, "gradients": watch.gradients}

    before, share = list[dict[str, str]](), Processes.share

    def shared(processes: Processes, model: Any) -> None:
        before.append(of_model(model))
        share(processes, model)

    Processes.share = shared  # type: ignore[method-assign]
    seen = Seen()
    model = model_of(adata, rank)
    model.train(**ODD, **TWO)
    seen.stop()
    out["odd"] = {"model": of_model(model), "before": before, "history": digest(model.history_)}
    out["odd"] |= {"cells": of_prediction(model), "rows": seen.rows, "drawn": [draw.group for draw in seen.drawn]}

    one, other = screen(contexts=1, donors=1, perturbations=1), screen(n_cells=5 + rank)
    out["too many"] = error_of(lambda: model_of(one, 0).train(**QUIET, max_epochs_generator=1, **TWO))
    out["differ"] = error_of(lambda: model_of(other, 0).train(**QUIET, **TWO))
    return out


def resumed(folder: Path, rank: int) -> dict[str, Any]:
    """A training without checkpoints, and one that is cut off and gone on with."""
    adata, written = cells(), count_writes()
    model = model_of(adata, rank)
    model.train(**ODD, **TWO)
    out: dict[str, Any] = {"whole": [of_model(model), digest(model.history_), of_prediction(model)]}
    kept = {"checkpoint_dir": folder / f"checkpoints{rank}"}  # the second one is never made
    model = model_of(adata, rank)
    cut = error_of(lambda: model.train(**ODD, **TWO, **kept, callbacks=[Cut()]))
    again = error_of(lambda: model.train(**ODD, **TWO, **kept))
    other = error_of(lambda: model.train(**{**ODD, "seed": 6}, **TWO, **kept, resume=True))
    model = model_of(adata, rank + 2)
    model.train(**ODD, **TWO, **kept, resume=True)
    out["resumed"] = [of_model(model), digest(model.history_), of_prediction(model)]
    return out | {"written": written, "errors": [cut, again, other]}


def launched(folder: Path, rank: int) -> dict[str, Any]:
    """Two trainings, the second of one process, as scripts may have them; no strategy is asked for."""
    model = model_of(cells(), rank)
    model.train(**ODD, devices=2)
    out = {"model": of_model(model), "history": digest(model.history_), "cells": of_prediction(model)}
    alone = model_of(cells(), 0)
    alone.train(**ODD)
    return out | {"alone": of_model(alone)}


if __name__ == "__main__":
    where, number = Path(sys.argv[1]), int(os.environ.get("LOCAL_RANK", 0))
    result = {"trained": trained, "resumed": resumed, "launched": launched}[sys.argv[2]](where, number)
    torch.save(result, where / f"rank{number}.pt")
