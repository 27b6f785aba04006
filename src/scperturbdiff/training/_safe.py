"""What training must not do: lose the model that was there before, or leave numbers that are not finite."""

from __future__ import annotations

import copy
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from lightning.pytorch.utilities.exceptions import SIGTERMException

from scperturbdiff.diffusion import is_finite

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import nn

SIGTERM = 128 + 15
"""Exit code of a process that was told to end."""
MAX_DISPERSION = 1e30
"""Dispersions of Poisson counts grow without bound; products with larger ones are beyond single precision."""

TORCH_REFUSES = "Expected parameter"
"""How torch begins to say that a distribution has parameters that are NaN: weights may be finite, and huge."""


@contextmanager
def all_or_nothing(model: Any, advice: str = "") -> Iterator[None]:
    """Put a model back as it was if the block fails or is interrupted.

    Lightning (2.4 and later) turns Ctrl-C into the end of the process, and a process that is told to end is left with
    exit code 0. Here an interrupt stays one, and the exit code says so.

    Parameters
    ----------
    model
        A model with a `module`; whatever else its attributes hold is replaced in training, not changed.
    advice
        What to say after an interrupt.
    """
    before, module = dict(model.__dict__), model.module
    shared = {id(part): part for part in (module.retrieval, module.by_state)}  # never changed, and may be large
    before["module"] = copy.deepcopy(module, shared)
    try:
        yield
    except BaseException as error:
        model.__dict__.clear()
        model.__dict__.update(before)
        if isinstance(error, KeyboardInterrupt) or isinstance(error.__context__, KeyboardInterrupt):
            text = f"Training was interrupted; the model is as it was before.{advice}"
            raise KeyboardInterrupt(text) from None
        if isinstance(error, SIGTERMException):
            raise SystemExit(SIGTERM) from None
        raise


@contextmanager
def finite_vae(vae: nn.Module, lr: object) -> Iterator[None]:
    """Say clearly that the first stage diverged, whatever error that would lead to.

    Raises
    ------
    ValueError
        If the block leaves weights that are not finite, or dispersions that are next to infinite.
    """
    given = "" if lr is None else f", now {lr}"
    text = f"Training of the VAE diverged: lower its lr (vae_plan_kwargs={{'lr': ...}}{given})."
    try:
        yield
    except (ValueError, RuntimeError) as error:
        if _is_usable(vae) and not str(error).startswith(TORCH_REFUSES):
            raise
        raise ValueError(text) from error
    if not _is_usable(vae):
        raise ValueError(text)


def _is_usable(vae: nn.Module) -> bool:
    """Whether weights are finite, and dispersions such that counts can be drawn."""
    dispersions = (p for name, p in vae.named_parameters() if name.endswith("px_r"))
    return is_finite(vae) and all(bool((p.exp() < MAX_DISPERSION).all()) for p in dispersions)


def check_finite(module: nn.Module) -> None:
    """Raise a `ValueError` that names weights that are not finite."""
    state = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    wrong = [name for name, value in state.items() if not bool(value.isfinite().all())]
    if wrong:
        raise ValueError(f"Training diverged: {', '.join(wrong[:3])} not finite. Lower lr, or look at the counts.")
