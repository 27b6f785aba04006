"""What a saved model is made of, and what is checked before one is believed."""

from __future__ import annotations

import inspect
import logging
from contextlib import contextmanager
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import anndata
import mudata
import numpy as np
import pandas as pd
import torch

from scperturbdiff.data import CONDITIONS, ConditionSpace, FeatureTable, preview
from scperturbdiff.storage import SavedModel, build, check_h5ad, from_state, to_state
from scperturbdiff.training_report import TrainingReport

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator, Mapping
    from pathlib import Path

    from anndata import AnnData
    from mudata import MuData

    from scperturbdiff.module import PerturbDiffModule

logger = logging.getLogger(__name__)

PACKAGES = ("scperturbdiff", "scvi-tools", "torch", "anndata", "numpy", "pandas")
VALUES = {"registry", "arguments", "attributes", "retrieval"}
"""What is kept beside weights: scvi-tools' registry, arguments of the model, what training found, retrieval."""
_TABLE = pd.DataFrame, type(None)
ATTRIBUTES: dict[str, Any] = {
    "is_trained_": bool,
    "vae_is_adapted_": bool,
    "report_": (TrainingReport, type(None)),
    "populations_": _TABLE,
    "states_": _TABLE,
    "history_": (dict, type(None)),
    "train_indices_": (np.ndarray, type(None)),
    "validation_indices_": (np.ndarray, type(None)),
    "test_indices_": (np.ndarray, type(None)),
    "run_name_": str,
    "run_id_": str,
}
"""Attributes of the model that are kept, and their types."""
NOT_KEPT = {"registry_", "init_params_", "get_normalized_function_name_"}
"""Those that are kept in another way, or are the same in every model."""
MAX_SIZE, MAX_LAYERS = 10**7, 1000
"""Largest number among the arguments of a model that is read, and most layers."""


def pack(module: PerturbDiffModule, attributes: Mapping[str, Any]) -> SavedModel:
    """A model as plain values and tensors.

    Parameters
    ----------
    module
        Its module.
    attributes
        Its attributes whose names end with an underscore.
    """
    weights = {name: value for name, value in module.state_dict().items() if isinstance(value, torch.Tensor)}
    if wrong := [name for name, value in weights.items() if not bool(value.isfinite().all())]:
        raise ValueError(f"The model has weights that are not finite ({preview(wrong)}) and is not saved.")
    if unknown := sorted(set(attributes) - set(ATTRIBUTES) - NOT_KEPT):
        logger.warning("Attributes that are not the model's are not saved: %s.", preview(unknown))
    kept = {name: attributes[name] for name in ATTRIBUTES}
    kept["report_"] = to_state(kept["report_"])
    arguments = attributes["init_params_"]
    values = {
        "registry": _plain(attributes["registry_"]),
        "arguments": {**arguments["non_kwargs"], **arguments["kwargs"]},
        "attributes": kept,
        "retrieval": module.get_extra_state(),
    }
    return SavedModel(weights, values, {name: version(name) for name in PACKAGES})


def _plain(registry: Mapping[str, Any]) -> dict[str, Any]:
    """A registry without default dictionaries."""
    return {key: _plain(value) if isinstance(value, dict) else value for key, value in registry.items()}


def check_saved(
    saved: SavedModel, names: set[str], setup: Mapping[str, Callable[..., Any]], model: Callable[..., Any]
) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """Registry, arguments and attributes of a saved model, if they are those of one.

    Parameters
    ----------
    saved
        What was read.
    names
        Classes of models that are allowed.
    setup
        Methods that may set up data.
    model
        What is called with the arguments.

    Raises
    ------
    ValueError
        If anything is missing, unknown or of another type; it is named.
    """
    values = saved.values
    if set(values) != VALUES:
        raise _damaged(f"its values must be {preview(sorted(VALUES))}")
    for part in VALUES:
        if not isinstance(values[part], dict):
            raise _damaged(f"{part} must be a dictionary")
    _check_registry(values["registry"], names, setup)
    _check_arguments(values["arguments"], model)
    return values["registry"], values["arguments"], _attributes(values["attributes"])


def check_weights(module: torch.nn.Module, weights: Mapping[str, torch.Tensor]) -> None:
    """Raise a `ValueError` unless names, shapes and types of tensors are those of `module`."""
    wanted = {name: value for name, value in module.state_dict().items() if isinstance(value, torch.Tensor)}
    if differ := sorted(set(wanted) ^ set(weights)):
        raise _damaged(f"{len(differ)} tensors are missing or not of this model ({preview(differ, 4)})")
    for name, value in wanted.items():
        found = weights[name]
        if found.shape != value.shape or found.dtype != value.dtype:
            kinds = f"{tuple(found.shape)} {found.dtype}, not {tuple(value.shape)} {value.dtype}"
            raise _damaged(f"tensor {name!r} is {kinds}")


@contextmanager
def believing() -> Iterator[None]:
    """Turn what goes wrong with values of a file into the error that says so."""
    try:
        yield
    except (TypeError, KeyError, AttributeError, IndexError, OverflowError, RuntimeError) as error:
        raise _damaged(" ".join(str(error).split())[:300]) from error


def _damaged(what: str) -> ValueError:
    return ValueError(f"This is not a model that PerturbDiff.save wrote, or it is damaged: {what}.")


def _check_registry(registry: dict[str, Any], names: set[str], setup: Mapping[str, Callable[..., Any]]) -> None:
    if (name := registry.get("model_name")) not in names:
        raise ValueError(f"It is a model of another class, {str(name)[:80]!r}. Allowed: {preview(sorted(names))}.")
    method, arguments = str(registry.get("setup_method_name")), registry.get("setup_args")
    if method not in setup:
        raise _damaged(f"its setup method is {method[:80]!r}. Allowed: {preview(setup)}")
    known = set(inspect.signature(setup[method]).parameters) - {"adata", "mdata", "kwargs"}
    if not isinstance(arguments, dict) or not set(arguments) <= known:
        raise _damaged(f"arguments of {method} must be of {preview(sorted(known), 20)}")
    fields = registry.get("field_registries")
    parts = ("data_registry", "state_registry", "summary_stats")
    for key, wanted, number in (("X", "column_names", "n_vars"), ("batch", "categorical_mapping", "n_batch")):
        field = fields.get(key) if isinstance(fields, dict) else None
        if not isinstance(field, dict) or not all(isinstance(field.get(part), dict) for part in parts):
            raise _damaged(f"its registry has no field {key!r}")
        found, n = field["state_registry"].get(wanted), field["summary_stats"].get(number)
        if not isinstance(found, np.ndarray) or found.ndim != 1 or n != len(found):
            raise _damaged(f"{wanted} of its field {key!r} must be {number} names")
    conditions = registry.get(CONDITIONS)
    if not isinstance(conditions, dict):
        raise _damaged("its registry has no conditions")
    if isinstance(features := conditions.get("features"), dict):
        features = build(FeatureTable, features)
        if features.values.shape[:1] != (len(features.names),) or features.values.ndim != 2:
            raise _damaged(f"features of {len(features.names)} components have shape {features.values.shape}")
    build(ConditionSpace, conditions | {"features": features})


def _check_arguments(arguments: dict[str, Any], model: Callable[..., Any]) -> None:
    known = set(inspect.signature(model).parameters) - {"self", "adata", "registry"}
    if unknown := sorted(set(arguments) - known):
        raise _damaged(f"the model has no arguments {preview(unknown)}")
    nested = [part for part in arguments.values() if isinstance(part, dict)]
    for name, value in ((name, value) for part in (arguments, *nested) for name, value in part.items()):
        most = MAX_LAYERS if "layers" in str(name) else MAX_SIZE
        if isinstance(value, int | float) and not abs(value) <= most:
            raise _damaged(f"{name}={value} is beyond {most}")


def _attributes(kept: dict[str, Any]) -> dict[str, Any]:
    if differ := sorted(set(kept) ^ set(ATTRIBUTES)):
        raise _damaged(f"attributes are missing or unknown ({preview(differ)})")
    kept = kept | {"report_": from_state(kept["report_"], {"TrainingReport": TrainingReport})}
    for name, types in ATTRIBUTES.items():
        if not isinstance(kept[name], types):
            raise _damaged(f"{name} is a {type(kept[name]).__name__}")
    if any(not isinstance(table, pd.DataFrame) for table in (kept["history_"] or {}).values()):
        raise _damaged("history_ must hold tables")
    return kept


CELLS = "adata.h5ad", "mdata.h5mu"
"""Names of the files of cells beside a model: an AnnData, a MuData."""


def set_aside(folder: Path, prefix: str, written: Collection[str]) -> None:
    """Rename cells of a former model in this folder, which are not those that were `written` with this one."""
    for name in (name for name in CELLS if name not in written):
        if (path := folder / f"{prefix}{name}").is_file():
            path.replace(path.with_name(f"{path.name}.former"))
            logger.warning("%s holds cells of a former model and is called %s.former now.", path, path.name)


def saved_cells(folder: Path, prefix: str) -> AnnData | MuData | None:
    """The cells in the folder of a model, or `None` with a warning, as in scvi-tools."""
    for name, read in zip(CELLS, (anndata.read_h5ad, mudata.read_h5mu), strict=True):
        if (path := folder / f"{prefix}{name}").is_file():
            check_h5ad(path)
            cells: AnnData | MuData = read(path)
            return cells
    logger.warning("%s holds no cells, so the model is loaded without: pass adata=..., or False if so meant.", folder)
    return None
