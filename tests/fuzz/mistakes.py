"""One thing wrong: what users write by mistake, and what the error must name."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pandas as pd
from scipy import sparse
from tests.fuzz.cells import AGE, BATCH, CONTROL, DOSE, FEATURES, PERTURBATION, SITE, Screen

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from anndata import AnnData


@dataclass
class Parts:
    """What a case calls the package with; mistakes change it."""

    screen: Screen
    adata: AnnData
    """Cells of the screen; of a request once `predict` is there."""
    setup: dict[str, Any]
    model: dict[str, Any]
    train: dict[str, Any]
    predict: dict[str, Any]
    folder: Path


class Mistake(NamedTuple):
    """A mistake."""

    stage: str
    """Before which stage it is made: `setup`, `model`, `train`, or `predict`."""
    make: Callable[[Parts], str | None]
    """Makes it; returns what the message must hold, `None` where the case has no room for it."""
    is_error: bool
    """Whether it must be refused; else it may work."""


MISTAKES: dict[str, Mistake] = {}


def mistake(stage: str, *, is_error: bool = True) -> Callable[[Callable[[Parts], str | None]], Any]:
    """Add a function to :data:`MISTAKES` under its name."""

    def add(make: Callable[[Parts], str | None]) -> Callable[[Parts], str | None]:
        MISTAKES[f"{stage}: {make.__name__.replace('_', ' ')}"] = Mistake(stage, make, is_error)
        return make

    return add


def argument(stage: str, key: str, *values: Any, names: str | None = None, is_error: bool = True) -> None:
    """Add one mistake for each wrong value of an argument."""
    for value in values:

        def make(parts: Parts, value: Any = value) -> str | None:
            if key in ("n_cells",) and stage == "predict" and isinstance(parts.predict["perturbations"], pd.DataFrame):
                parts.predict["perturbations"] = parts.predict["perturbations"].drop(columns="n_cells", errors="ignore")
            where = getattr(parts, stage)
            group, _, name = key.rpartition(".")
            if group:
                where[group] = {**(where.get(group) or {}), name: value}
            else:
                where[name] = value
            return name if names is None else names

        MISTAKES[f"{stage}: {key}={value!r}"] = Mistake(stage, make, is_error)


# ---- set-up: keys -------------------------------------------------------------------------------------------------

for _key in ("perturbation_key", "batch_key", "dose_key", "layer", "perturbation_embeddings"):
    argument("setup", _key, "no such thing", names="no such thing")
for _key in ("context_keys", "categorical_covariate_keys", "continuous_covariate_keys", "control_match_keys"):
    argument("setup", _key, ["no such thing"], names="no such thing")
argument("setup", "control", None, "no such thing")
argument("setup", "separator", "")
argument("setup", "perturbation_key", 5, names="5")
argument("setup", "continuous_covariate_keys", [PERTURBATION], names=PERTURBATION)
argument(
    "setup", "perturbation_embeddings", 3, np.zeros((2, 2)), {}, {"P1": np.ones(2), "P2": np.ones(3)}, {"P1": [np.nan]}
)
argument("setup", "perturbation_embeddings", pd.DataFrame({"a": ["x"]}, index=["P1"]), {"P1": "text"}, {"P1": None})
argument("setup", "control_match_keys", [PERTURBATION], names=PERTURBATION)
argument("setup", "batch_key", PERTURBATION, names=PERTURBATION, is_error=False)
argument("setup", "context_keys", [PERTURBATION], 5, names="", is_error=False)


@mistake("setup", is_error=False)
def a_context_twice(parts: Parts) -> str | None:
    keys = parts.setup["context_keys"]
    parts.setup["context_keys"] = [*keys, *keys[:1]]
    return keys[0] if keys else None


@mistake("setup", is_error=False)
def a_context_named_as_a_column_of_ours(parts: Parts) -> str | None:
    """Columns that predictions, tables or scvi-tools have themselves."""
    keys = parts.setup["context_keys"]
    if not keys:
        return None
    ours = ("population", "control_cell", "state", "n_cells", "__perturbation", "_scvi_batch", "novelty", "_index")
    new = ours[parts.screen.seed % len(ours)]
    parts.adata.obs = parts.adata.obs.rename(columns={keys[0]: new})
    parts.setup["context_keys"] = [new, *keys[1:]]
    parts.screen = replace(parts.screen, context_names=(new, *parts.screen.context_names[1:]))
    parts.setup["control_match_keys"] = parts.screen.match_keys
    return ""


# ---- set-up: cells ------------------------------------------------------------------------------------------------


def _matrix(parts: Parts) -> np.ndarray:
    layer = parts.setup["layer"]
    stored = parts.adata.X if layer is None else parts.adata.layers[layer]
    return stored.toarray() if sparse.issparse(stored) else np.array(stored)


def _put(parts: Parts, matrix: Any) -> None:
    layer = parts.setup["layer"]
    if layer is None:
        parts.adata.X = matrix
    else:
        parts.adata.layers[layer] = matrix


def _with(parts: Parts, value: float, rows: int = 1) -> None:
    counts = _matrix(parts).astype(np.float64)
    counts[:rows, 0] = value
    _put(parts, sparse.csr_matrix(counts) if parts.screen.seed % 2 else counts)


def _wrong_count(value: float, what: str) -> None:
    def make(parts: Parts) -> str:
        _with(parts, value, 1 + parts.screen.seed % 2)
        return what

    for stage in ("setup", "predict"):
        MISTAKES[f"{stage}: counts of {value}"] = Mistake(stage, make, True)


for _value, _what in ((np.nan, "NaN"), (np.inf, "infinite"), (-1, "negative"), (0.5, "non-integer"), (1e300, "")):
    _wrong_count(_value, _what)


@mistake("setup", is_error=False)
def counts_beyond_32_bits(parts: Parts) -> str:
    _with(parts, 3e9)
    return ""


@mistake("setup")
def an_empty_cell(parts: Parts) -> str:
    counts = _matrix(parts)
    counts[-1] = 0
    _put(parts, counts)
    return "no counts"


@mistake("setup")
def no_cells(parts: Parts) -> str:
    parts.adata = parts.adata[:0].copy()
    return "empty"


@mistake("setup")
def no_genes(parts: Parts) -> str:
    parts.adata = parts.adata[:, :0].copy()
    return "empty"


@mistake("setup")
def matrix_of_text(parts: Parts) -> str:
    _put(parts, _matrix(parts).astype(str).astype(object))
    return ""


@mistake("setup")
def matrix_of_complex_numbers(parts: Parts) -> str:
    _put(parts, _matrix(parts).astype(complex))
    return ""


@mistake("setup", is_error=False)
def matrix_of_booleans(parts: Parts) -> str:
    _put(parts, np.ones(parts.adata.shape, bool))
    return ""


@mistake("setup", is_error=False)
def masked_matrix(parts: Parts) -> str:
    counts = _matrix(parts)
    _put(parts, np.ma.masked_array(counts, mask=counts == 1))
    return ""


@mistake("setup")
def no_matrix(parts: Parts) -> str | None:
    if parts.setup["layer"] is not None:
        return None
    parts.adata.X = None
    return "adata.X"


def _repeated(what: str) -> Callable[[Parts], str | None]:
    def make(parts: Parts) -> str | None:
        names = getattr(parts.adata, what).to_numpy().astype(object)
        if len(names) < 2:
            return None
        names[1] = names[0]
        setattr(parts.adata, what, pd.Index(names))
        return what

    return make


for _what in ("obs_names", "var_names"):
    MISTAKES[f"setup: repeated {_what}"] = Mistake("setup", _repeated(_what), True)
    MISTAKES[f"predict: repeated {_what}"] = Mistake("predict", _repeated(_what), True)


def _missing(key: str) -> Callable[[Parts], str | None]:
    def make(parts: Parts) -> str | None:
        given = parts.predict.get("perturbations")
        if key not in parts.adata.obs or (isinstance(given, pd.DataFrame) and key in given and key != PERTURBATION):
            return None
        column = parts.adata.obs[key].astype(object)
        column.iloc[0] = (None, np.nan, pd.NA)[parts.screen.seed % 3]
        parts.adata.obs[key] = column
        return key

    return make


for _key in (PERTURBATION, "cell_type", BATCH, SITE, AGE):
    MISTAKES[f"setup: a missing {_key}"] = Mistake("setup", _missing(_key), True)
    MISTAKES[f"predict: a missing {_key}"] = Mistake("predict", _missing(_key), True)


def _dose(value: Any) -> Callable[[Parts], str | None]:
    def make(parts: Parts) -> str | None:
        treated = np.flatnonzero([str(label) != CONTROL for label in parts.adata.obs[PERTURBATION]])
        if DOSE not in parts.adata.obs or not treated.size:
            return None
        column = parts.adata.obs[DOSE].astype(object)
        column.iloc[treated[0]] = value
        parts.adata.obs[DOSE] = column
        return DOSE

    return make


for _value in (-1.0, np.nan, np.inf, "much", "1+2+3+4", [1.0] * 4, None, {"P1": 1.0}, ""):
    MISTAKES[f"setup: a dose of {_value!r}"] = Mistake("setup", _dose(_value), True)


def _label(value: Any, is_error: bool = True) -> None:
    def make(parts: Parts) -> str | None:
        column = parts.adata.obs[PERTURBATION].astype(object)
        at = np.flatnonzero([str(label) != CONTROL for label in column])
        if not at.size:
            return None
        column.iloc[at[0]] = value
        parts.adata.obs[PERTURBATION] = column
        return ""

    MISTAKES[f"setup: a label {value!r}"] = Mistake("setup", make, is_error)


_label("")
_label(" ")
_label("a\x00b", False)
_label("\ud800", False)
_label(["P1", "P1"])
_label(["P1", ""])
_label(["P1", 3], False)
_label(b"P1", False)
_label('["P1", "P1"]', False)
_label('["P1"', False)
_label('["P1", ["P2"]]', False)


@mistake("setup")
def doses_for_controls(parts: Parts) -> str | None:
    if DOSE not in parts.adata.obs:
        return None
    column = parts.adata.obs[DOSE].astype(object)
    column.iloc[0] = 5.0  # the first cell of a context is a control
    parts.adata.obs[DOSE] = column
    return DOSE


@mistake("setup")
def no_controls(parts: Parts) -> str | None:
    control = np.array([str(label) == CONTROL for label in parts.adata.obs[PERTURBATION]])
    if control.all():
        return None
    parts.adata = parts.adata[~control].copy()
    return CONTROL


@mistake("setup", is_error=False)
def a_batch_of_dates(parts: Parts) -> str | None:
    if BATCH not in parts.adata.obs:
        return None
    parts.adata.obs[BATCH] = pd.to_datetime(["2024-01-01", "2024-02-01"] * parts.adata.n_obs)[: parts.adata.n_obs]
    return ""


@mistake("setup", is_error=False)
def a_batch_of_numbers_and_text(parts: Parts) -> str | None:
    if BATCH not in parts.adata.obs:
        return None
    parts.adata.obs[BATCH] = pd.Series(
        ([1, "2"] * parts.adata.n_obs)[: parts.adata.n_obs], parts.adata.obs_names, object
    )
    return ""


@mistake("setup", is_error=False)
def a_covariate_different_in_every_cell(parts: Parts) -> str:
    parts.adata.obs[AGE] = np.linspace(0, 1, parts.adata.n_obs)
    parts.setup["continuous_covariate_keys"] = [AGE]
    return ""


@mistake("setup", is_error=False)
def features_far_apart(parts: Parts) -> str | None:
    if parts.screen.features is None:
        return None
    names = dict.fromkeys((*parts.screen.names, *parts.screen.unseen))
    parts.setup["perturbation_embeddings"] = {name: [10.0 ** (30 - i)] for i, name in enumerate(names)}
    parts.adata.uns.pop(FEATURES, None)
    return ""


# ---- sizes --------------------------------------------------------------------------------------------------------

for _key in ("n_latent", "n_hidden", "width", "n_layers", "n_heads"):
    argument("model", _key, 0, -1, 2.5, "4", None)
argument("model", "n_layers", True, is_error=False)
argument("model", "width", 7, names="", is_error=False)
for _key in ("dropout", "vae_dropout"):
    argument("model", _key, -0.1, 2.0, float("nan"), "a")
argument("model", "n_vae_layers", -1, 1.5, "a")
argument("model", "retrieval_kwargs.no_such_thing", 1)
argument("model", "generator_kwargs.no_such_thing", 1)
argument("model", "vae_kwargs.no_such_thing", 1)
argument("model", "retrieval_kwargs.n_states", 2, (0,), (2.5,), "ab")
argument("model", "retrieval_kwargs.n_neighbors", 0, -1, "a", None)
argument("model", "retrieval_kwargs.em_steps", -1, 1.5)
argument("model", "retrieval_kwargs.length_bounds", (1.0,), 1.0, (1.0, -1.0), "ab")
argument("model", "retrieval_kwargs.fold_width", 0, float("nan"), "a")

# ---- training -----------------------------------------------------------------------------------------------------

for _key in ("max_epochs", "max_epochs_vae", "max_epochs_generator"):
    argument("train", _key, -1, 1.5, "3", float("nan"))
argument("train", "validation_size", 1.0, -0.1, float("nan"), "a", 3)
argument("train", "train_size", 0.0, -1.0, 1.5, float("nan"), "a")
argument("train", "batch_size", 0, -1, 2.5, "a")
argument("train", "seed", -1, 2**70, 1.5, "a")
argument("train", "accelerator", "abacus", 5, names="")
argument("train", "devices", 0, -7, "a", names="", is_error=False)
argument("train", "precision", "no such thing", "bf16-true", "16-true", "64-true", names="", is_error=False)
argument("train", "ckpt_path", "no such file")
argument("train", "plan_kwargs.objective", "l2", None)
argument("train", "plan_kwargs.lr", -1.0, float("nan"), "a")
argument("train", "plan_kwargs.lr", 0.0, 1e30, names="", is_error=False)
argument("train", "plan_kwargs.steps_per_epoch", 0, -1, 1.5, "a", names="")
argument("train", "plan_kwargs.n_populations", 0, -1, 1.5, "a", names="")
argument("train", "plan_kwargs.n_cells", 0, -1, 1.5, "a", names="")
argument("train", "plan_kwargs.n_draws", 0, 1, 1.5, "a", names="")
argument("train", "plan_kwargs.no_such_thing", 1)
argument("train", "vae_plan_kwargs.no_such_thing", 1)
argument("train", "vae_plan_kwargs.lr", -1.0, float("nan"), "a")
argument("train", "vae_plan_kwargs.lr", 1e3, 1e30, names="", is_error=False)
argument("train", "no_such_thing", 1)

# ---- prediction ---------------------------------------------------------------------------------------------------

argument("predict", "n_cells", 0, -1, 1.5, "5", float("inf"), float("nan"), True, 10**13)
argument("predict", "n_populations", 0, -1, 2.5, "2", 10**13)
argument("predict", "n_steps", -1, 2.5, "2", None)
argument("predict", "sampler", "euler", None, 3)
argument("predict", "guidance", float("nan"), float("inf"), "a", None)
argument("predict", "target_sum", 0, -5.0, float("nan"), float("inf"), None, "a")
argument("predict", "seed", -1, 2**70, 1.5, "a")
argument("predict", "layer", "no such thing")
argument("predict", "transform_batch", "no such thing")
argument("predict", "perturbations", "P1", [], 5, pd.DataFrame())
argument("predict", "perturbations", [None], {"a": 1}, [["P1", "P1"]], [""], names="perturbation")
argument("predict", "perturbations", pd.DataFrame({PERTURBATION: ["P1"], "no such thing": [1]}), names="")
argument("predict", "perturbations", ["\x00"], ["\ud800"], ["no such thing"], names="", is_error=False)
argument("predict", "perturbation_embeddings", "no such thing", {"new": [np.nan]}, {"new": np.ones(9)})
argument("predict", "output", "cells.csv", "", names="")
argument("predict", "output", "no such folder/cells.h5ad", names="", is_error=False)  # which is made
MISTAKES["predict: n_steps=None"] = MISTAKES["predict: n_steps=None"]._replace(is_error=False)
MISTAKES["predict: n_cells=nan"] = MISTAKES["predict: n_cells=nan"]._replace(is_error=False)


def _table(key: str, value: Any) -> None:
    def make(parts: Parts) -> str | None:
        table = parts.predict["perturbations"]
        if not isinstance(table, pd.DataFrame) or (key != "n_cells" and key not in table):
            return None
        table = table.copy()
        table[key] = pd.Series([value] * len(table), dtype=object)
        parts.predict["perturbations"] = table
        return key

    MISTAKES[f"predict: table with {key} {value!r}"] = Mistake("predict", make, True)


for _value in (0, -1, 2.5, "many", np.inf, [1], 10**13):
    _table("n_cells", _value)
for _value in (-1.0, np.nan, np.inf, "much", [1.0] * 4):
    _table(DOSE, _value)
_table("cell_type", "no such thing")
_table(SITE, "no such thing")
_table(SITE, None)
_table(AGE, "old")
_table(AGE, np.nan)


@mistake("train")
def a_checkpoint_that_is_text(parts: Parts) -> str:
    path = parts.folder / "text.ckpt"
    path.write_text("no checkpoint")
    parts.train["ckpt_path"] = path
    return "text.ckpt"


@mistake("predict")
def an_output_that_is_there(parts: Parts) -> str:
    path = parts.folder / "taken.h5ad"
    path.write_text("mine")
    parts.predict["output"] = path
    return "taken.h5ad"


@mistake("predict")
def missing_genes(parts: Parts) -> str | None:
    if parts.adata.n_vars < 2:
        return None
    parts.adata = parts.adata[:, 1:].copy()
    return "gene"


@mistake("predict")
def other_genes(parts: Parts) -> str:
    parts.adata.var_names = [f"other {i}" for i in range(parts.adata.n_vars)]
    return "gene"


@mistake("predict")
def a_missing_column(parts: Parts) -> str | None:
    keys = parts.screen.obs_keys
    if not keys or isinstance(parts.predict["perturbations"], pd.DataFrame):
        return None
    parts.adata.obs = parts.adata.obs.drop(columns=keys[-1])
    return keys[-1]


@mistake("predict")
def a_batch_never_seen(parts: Parts) -> str | None:
    if not parts.screen.batches or parts.predict.get("transform_batch") is not None:
        return None
    parts.adata.obs[BATCH] = "no such thing"
    return "no such thing"


@mistake("predict")
def a_site_never_seen(parts: Parts) -> str | None:
    if not parts.screen.sites or isinstance(parts.predict["perturbations"], pd.DataFrame):
        return None
    parts.adata.obs[SITE] = "no such thing"
    return "no such thing"


@mistake("predict", is_error=False)
def contexts_never_seen(parts: Parts) -> str:
    for key in parts.screen.context_keys:
        parts.adata.obs[key] = "no such thing"
    return ""


@mistake("predict")
def controls_without_counts(parts: Parts) -> str:
    _put(parts, np.zeros(parts.adata.shape, np.float32))
    return "no counts"


@mistake("predict")
def treated_cells_alone(parts: Parts) -> str:
    parts.adata.obs[PERTURBATION] = "P1"
    if DOSE in parts.adata.obs:
        parts.adata.obs[DOSE] = 1.0
    return "control"


@mistake("predict")
def a_table_for_cells(parts: Parts) -> str:
    parts.predict["adata"] = parts.adata.obs
    return ""
