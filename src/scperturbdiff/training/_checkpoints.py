"""Checkpoints of both stages: what a training that was cut off goes on from."""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lightning.pytorch as pl
from scvi import settings

from scperturbdiff.diffusion import is_finite
from scperturbdiff.seeds import resolve_seed
from scperturbdiff.storage import MODEL, SavedModel, atomic_file
from scperturbdiff.training._fingerprint import differences

if TYPE_CHECKING:
    from collections.abc import Callable

    import pandas as pd

    from scperturbdiff.module import PerturbDiffModule
    from scperturbdiff.training._latent import Stage

logger = logging.getLogger("scvi.scperturbdiff")

RUN, PREFIX, NETWORK = "run.json", "start_", "network.ckpt"
"""What was trained; the module that the next stage starts from; the second stage after its newest whole epoch."""


@dataclass
class Checkpoints:
    """The checkpoints of one training, or none.

    Attributes
    ----------
    folder
        Where they are; `None` keeps nothing.
    seed
        Of the training.
    vae_trained
        Whether the first stage is behind.
    history
        What it logged.
    """

    folder: Path | None
    seed: int
    vae_trained: bool = False
    history: dict[str, pd.DataFrame] = field(default_factory=dict)

    @classmethod
    def open(
        cls, folder: str | Path | None, resume: bool, seed: int | None, describe: Callable[[], dict[str, Any]]
    ) -> Checkpoints:
        """Begin a training in a folder, or go on with the one there.

        Parameters
        ----------
        folder
            New, or with the checkpoints of this training. `None` keeps nothing.
        resume
            Whether to go on with the training in the folder, if there is any.
        seed
            As the user gave it; without one, a training goes on with its own.
        describe
            Gives what is trained, see :func:`fingerprint`.

        Raises
        ------
        FileExistsError
            If there are checkpoints, and `resume` was not asked for.
        ValueError
            If the checkpoints are those of another training; what differs is named.
        """
        if folder is None:
            if resume:
                raise ValueError("resume=True needs the checkpoint_dir of the training to go on with.")
            return cls(None, resolve_seed(seed))
        folder, run = Path(folder), describe()
        there = [name for name in (RUN, NETWORK, f"{PREFIX}{MODEL}") if (folder / name).exists()]
        if there and not resume:
            raise FileExistsError(
                f"checkpoint_dir={str(folder)!r} holds checkpoints ({', '.join(there)}): go on from them with "
                "resume=True, or choose another folder."
            )
        if RUN in there:
            return cls(folder, _check_same(folder / RUN, settings.seed if seed is None else seed, run))
        if resume:
            logger.info("%s holds no checkpoints to go on from: training starts at its beginning.", folder)
        out = cls(folder, resolve_seed(seed))
        with atomic_file(folder / RUN, overwrite=False) as path:
            path.write_text(json.dumps({"seed": out.seed, "run": run}, indent=1), encoding="utf-8")
        return out

    @property
    def network(self) -> Path | None:
        """Checkpoint of the second stage, if there is one."""
        path = None if self.folder is None else self.folder / NETWORK
        return path if path is not None and path.exists() else None

    def restore(self, module: PerturbDiffModule) -> Checkpoints:
        """Give the module the state that the next stage starts from; of a new training, keep the state it has."""
        if self.folder is None:
            return self
        if not (self.folder / f"{PREFIX}{MODEL}").exists():
            self._keep(module)
            return self
        saved = SavedModel.read(self.folder, PREFIX)
        module.load_state_dict({**saved.weights, EXTRA: saved.values["retrieval"]})
        self.vae_trained, self.history = saved.values["vae_trained"], saved.values["history"]
        return self

    def keep_vae(self, module: PerturbDiffModule, history: dict[str, pd.DataFrame]) -> None:
        """Keep the module after its first stage, and what that logged."""
        self.vae_trained, self.history = True, history
        self._keep(module)

    def _keep(self, module: PerturbDiffModule) -> None:
        if self.folder is not None:
            state = module.state_dict()
            values = {"retrieval": state.pop(EXTRA), "vae_trained": self.vae_trained, "history": self.history}
            SavedModel(state, values).write(self.folder, PREFIX)

    def keep_epochs(self, stage: Stage) -> Stage:
        """The second stage, with a checkpoint after every epoch."""
        if self.folder is None:
            return stage
        return replace(stage, checkpoints=[*stage.checkpoints, NewestEpoch(self.folder / NETWORK)])


EXTRA = "_extra_state"
"""torch's name of what :meth:`PerturbDiffModule.get_extra_state` gives."""


def _check_same(path: Path, seed: int | None, run: dict[str, Any]) -> int:
    """The seed of the training in a folder, which must be the one that is asked for."""
    try:
        said = json.loads(path.read_text(encoding="utf-8"))
        before, its_seed = dict(said["run"]), int(said["seed"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{str(path)!r} is damaged: {error}") from error
    differ = differences({"seed": its_seed, **before}, {"seed": its_seed if seed is None else seed, **run})
    if differ:
        where = str(path.parent)
        raise ValueError(f"checkpoint_dir={where!r} holds the checkpoints of another training: {'; '.join(differ)}.")
    return its_seed


class NewestEpoch(pl.Callback):
    """Writes a checkpoint after every epoch in place of the one before; never half of one.

    Not after the last epoch: Lightning does not end a training again that had reached its end, and the averaged weights
    are chosen at the end. Not of weights that are not finite.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Write it, after every other callback had its turn."""
        ended = trainer.should_stop or trainer.current_epoch + 1 == trainer.max_epochs
        if ended or trainer.global_step == trainer.max_steps or not is_finite(pl_module):
            return
        if not trainer.is_global_zero:
            trainer.save_checkpoint(self.path, weights_only=False)  # writes nothing
            return
        with atomic_file(self.path, overwrite=True) as path:
            trainer.save_checkpoint(path, weights_only=False)  # the optimizer, too
