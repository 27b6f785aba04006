"""A training step of the second stage asks the device for no value: on a GPU that would wait for all that is queued."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from tests.helpers import FEW_STEPS, SETUP, TINY, FirstStep
from torch.utils._python_dispatch import TorchDispatchMode

from scperturbdiff import PerturbDiff

if TYPE_CHECKING:
    from collections.abc import Callable

    from anndata import AnnData

ASKING = {"_local_scalar_dense", "nonzero", "masked_select", "_unique2", "unique_dim", "equal", "is_nonzero"}
"""Operations whose result, or its size, the host has to know."""


class Asked(TorchDispatchMode):
    """Notes operations that ask."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.removeprefix("aten::")
        by_mask = name == "index" and any(part is not None and part.dtype == torch.bool for part in args[1])
        # repeats that differ by element decide on the size of the result
        if name in ASKING or by_mask or str(func) == "aten.repeat_interleave.Tensor":
            self.found.append(name)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("objective", ["energy_score", "mmd+mse"])
def test_a_step_does_not_wait_for_the_device(screen: AnnData, objective: str) -> None:
    adata, asked = screen.copy(), Asked()

    def watched(step: Callable[[], None]) -> None:
        with asked:
            step()

    PerturbDiff.setup_anndata(adata, **SETUP)
    model = PerturbDiff(adata, **TINY)
    plan = FEW_STEPS["plan_kwargs"] | {"objective": objective}
    model.train(**FEW_STEPS | {"plan_kwargs": plan, "callbacks": [FirstStep(watched)], "validation_size": 0.0})
    assert asked.found == []


def test_what_asks_is_seen() -> None:
    with Asked() as asked:
        values = torch.arange(3.0)
        float(values.sum())
        values[values > 1]
        values.repeat_interleave(torch.tensor([1, 2, 3]))
    assert asked.found == ["_local_scalar_dense", "index", "repeat_interleave"]
