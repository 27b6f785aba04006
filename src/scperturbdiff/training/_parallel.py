"""Training in several processes: Lightning starts them and averages their gradients; here they agree on the rest."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import lightning.pytorch as pl
import torch
from lightning.fabric import Fabric
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy, StrategyRegistry
from torch.nn.parallel import DistributedDataParallel

from scperturbdiff.seeds import derive_seed
from scperturbdiff.storage import choose_device
from scperturbdiff.training._fingerprint import differences

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

T = TypeVar("T")

STRATEGIES = ("auto", "ddp")
"""Strategies of Lightning that both stages can be trained with."""
FOUND = ("report_", "populations_", "states_", "history_", "is_trained_")
"""Attributes of a model that training sets, beside its module."""
IN_PARALLEL = "populations"
"""Lightning's DDP under another name: where it reads "ddp", scvi-tools switches early stopping off, which it needs not,
and writes a log into the working folder."""
SYNC_BUFFERS = ("forward_sync_buffers", "broadcast_buffers")
"""What torch calls, and called before 2.13, whether buffers are sent before each step: all latent vectors are one."""

if IN_PARALLEL not in StrategyRegistry:
    known = inspect.signature(DistributedDataParallel).parameters
    sent = {next(name for name in SYNC_BUFFERS if name in known): False}
    StrategyRegistry.register(IN_PARALLEL, DDPStrategy, "DDP of both stages of scperturbdiff", **sent)


@dataclass(frozen=True)
class Processes:
    """The processes that train one model together; by default there is one.

    Attributes
    ----------
    rank, n
        Number of this process, from 0, and how many there are.
    fabric
        What talks to the others; `None` where there are none.
    device
        Where one process trains; `None`: left to Lightning.
    """

    rank: int = 0
    n: int = 1
    fabric: Fabric | None = None
    device: torch.device | None = None

    @classmethod
    def launch(cls, trainer: Mapping[str, Any]) -> tuple[Processes, dict[str, Any]]:
        """Start the processes, or join those that torchrun or a scheduler has started.

        Parameters
        ----------
        trainer
            Arguments of Lightning's trainer; `accelerator`, `devices`, `num_nodes` and `strategy` say what to start.

        Returns
        -------
        The processes, and the arguments with which trainers run in them.

        Raises
        ------
        ValueError
            If `strategy` is one that does not train both stages.
        """
        strategy = trainer.get("strategy", "auto")
        where = {name: trainer[name] for name in ("accelerator", "devices", "num_nodes") if name in trainer}
        alone = cls(device=_own_device(**where))
        if isinstance(strategy, SingleDeviceStrategy):
            return cls(), dict(trainer)
        if strategy not in STRATEGIES:
            raise ValueError(
                f"strategy={strategy!r} is not one of {STRATEGIES}, with which both stages can be trained."
            )
        if strategy == "auto" and not _several(**where):
            return alone, dict(trainer)
        fabric = Fabric(**where, strategy="ddp")
        fabric.launch()
        if fabric.world_size == 1:
            return alone, {**trainer, "strategy": "auto"}
        # both stages deal out cells and populations themselves
        options = {**trainer, "strategy": IN_PARALLEL, "use_distributed_sampler": False}
        return cls(fabric.global_rank, fabric.world_size, fabric), options

    def same(self, value: T) -> T:
        """What the first process has, in all."""
        return value if self.fabric is None else self.fabric.broadcast(value)

    def first(self, make: Callable[[], T]) -> T:
        """What the first process makes, in all; so are errors."""
        if self.fabric is None:
            return make()
        made: tuple[T | None, Exception | None] = (None, None)
        if self.rank == 0:
            try:
                made = make(), None
            except Exception as error:  # noqa: BLE001 the others would wait for ever
                made = None, error
        value, wrong = self.same(made)
        if wrong is not None:
            raise wrong
        return value  # type: ignore[return-value]

    def check_same(self, describe: Callable[[], Mapping[str, Any]]) -> None:
        """Raise a `ValueError` that says what is not the same in all processes of what :func:`fingerprint` gives."""
        if self.fabric is None:
            return
        trained, differ = describe(), [list[str]() for _ in range(self.n)]
        torch.distributed.all_gather_object(differ, differences(self.same(trained), trained))
        for rank, of_rank in enumerate(differ):
            if of_rank:
                raise ValueError(
                    f"Process {rank} was given another training than process 0: {'; '.join(of_rank)}. Every process "
                    "must read the same cells and give the same arguments."
                )

    def share(self, model: Any) -> None:
        """Give all the model of the first process: weights, averages, what retrieval knows, what training found."""
        if self.fabric is None:
            return
        state = {name: v.cpu() if isinstance(v, torch.Tensor) else v for name, v in model.module.state_dict().items()}
        state, found = self.same((state, {name: getattr(model, name) for name in FOUND}))
        if self.rank:
            model.module.load_state_dict(state)
            vars(model).update(found)
        self.place(model)

    def place(self, model: Any) -> None:
        """Move a model to the device of this process; scvi-tools moves those of all to the first one."""
        device = self.device if self.fabric is None else self.fabric.device
        if device is not None and device != model.device:
            model.to_device(device)


def _several(devices: int | str | list[int], num_nodes: int = 1, **_: Any) -> bool:
    """Whether Lightning is asked for several devices; what it does not understand is left to it."""
    if num_nodes != 1:
        return True
    if isinstance(devices, list | tuple):
        return len(devices) > 1
    text = str(devices).strip()
    return text == "-1" or "," in text or (text.isdecimal() and int(text) > 1)


def _own_device(accelerator: Any = "auto", devices: Any = "auto", **_: Any) -> torch.device | None:
    """The device of one process; `None` for what only Lightning understands, or refuses."""
    number = devices[0] if isinstance(devices, list | tuple) and len(devices) == 1 else "auto"
    try:
        return choose_device(accelerator, number)
    except (TypeError, ValueError):
        return None


class OwnNoise(pl.Callback):
    """Seeds each process by its number, so that each draws other noise in the first stage."""

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Seed the noise of all steps."""
        torch.manual_seed(derive_seed(self.seed, "noise", trainer.global_rank))
