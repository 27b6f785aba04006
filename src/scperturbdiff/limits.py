"""What sizes a model may have, and how it may be trained."""

from __future__ import annotations

from collections.abc import Mapping
from types import NoneType
from typing import Any

from scperturbdiff.arguments import check_choice, check_flag, check_int, check_number, check_type, refusal
from scperturbdiff.diffusion import check_objective
from scperturbdiff.seeds import check_seed

LARGEST = {"n_latent": 4096, "n_hidden": 65536, "n_vae_layers": 64, "width": 16384, "n_layers": 64, "n_heads": 256}
"""Sizes of a model, and the largest that is not a slip of the pen."""
PRECISIONS = ("32-true", "32", 32, "16-mixed", "bf16-mixed", 16, "16", "bf16", None)
"""Of training; weights are kept in single precision."""

PLAN = {
    "steps_per_epoch": 1,
    "n_populations": 1,
    "n_cells": 1,
    "n_draws": 1,
    "warmup_steps": 0,
    "validation_populations": 1,
    "validation_cells": 2,
    "validation_draws": 2,
}
"""Whole numbers of `plan_kwargs`, and the least of each."""
PLAN_NUMBERS = {
    "lr": "(0, inf)",
    "weight_decay": "[0, inf)",
    "ema_decay": "[0, 1]",
    "p_terminal": "[0, 1]",
    "p_drop_condition": "[0, 1]",
    "mse_weight": "[0, inf)",
    "gradient_clip_val": "[0, inf)",
}
"""Other numbers of `plan_kwargs`, and the interval of each."""
PLAN_OTHERS = ("objective", "compile")


def check_sizes(arguments: Mapping[str, Any]) -> None:
    """Check the arguments of :class:`scperturbdiff.PerturbDiff` that say how large its networks are."""
    for name, largest in LARGEST.items():
        check_int(name, arguments[name], 1, largest)
    width, n_heads = arguments["width"], arguments["n_heads"]
    if width % 2 or width % n_heads:
        raise refusal("width", width, f"even and a multiple of n_heads={n_heads}")
    for name in ("vae_dropout", "dropout"):
        check_number(name, arguments[name], "[0, 1)")
    for name in ("vae_kwargs", "retrieval_kwargs", "generator_kwargs"):
        check_type(name, arguments[name], (Mapping, NoneType), "a mapping of names of arguments, or None")


def check_training(arguments: Mapping[str, Any]) -> None:
    """Check the arguments of :meth:`scperturbdiff.PerturbDiff.train` that are not passed on."""
    for name in ("max_epochs", "max_epochs_vae", "max_epochs_generator"):
        if arguments[name] is not None:
            check_int(name, arguments[name], 0)
    check_int("batch_size", arguments["batch_size"], 1)
    check_number("train_size", arguments["train_size"], "(0, 1]")
    if arguments["validation_size"] is not None:
        check_number("validation_size", arguments["validation_size"], "[0, 1)")
    check_flag("early_stopping", arguments["early_stopping"])
    if arguments["seed"] is not None:
        check_seed(arguments["seed"])
    for name in ("vae_plan_kwargs", "plan_kwargs"):
        check_type(name, arguments[name], (Mapping, NoneType), "a mapping of names of arguments, or None")
    _check_plan(arguments["plan_kwargs"] or {})
    if (lr := (arguments["vae_plan_kwargs"] or {}).get("lr")) is not None:
        check_number("lr", lr, "(0, inf)")
    check_choice("precision", arguments["trainer_kwargs"].get("precision"), PRECISIONS)


def _check_plan(plan: Mapping[str, Any]) -> None:
    """Check the settings of the second stage before the first is trained."""
    for name, value in plan.items():
        if name in PLAN:
            check_int(f"plan_kwargs[{name!r}]", value, PLAN[name])
        elif name in PLAN_NUMBERS:
            check_number(f"plan_kwargs[{name!r}]", value, PLAN_NUMBERS[name])
        elif name not in PLAN_OTHERS:
            allowed = sorted((*PLAN, *PLAN_NUMBERS, *PLAN_OTHERS))
            raise TypeError(f"plan_kwargs has no {name!r}. Allowed: {', '.join(allowed)}.")
    check_objective(plan.get("objective", "energy_score"), plan.get("n_draws", 2))
