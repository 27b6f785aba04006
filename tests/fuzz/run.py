"""One case from end to end: set up, train, predict, again, save, load; what must hold is asserted on the way."""

from __future__ import annotations

import hashlib
import logging
import warnings
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import anndata as ad
import numpy as np
import pandas as pd
import torch
from mudata import MuData
from scipy import sparse
from tests.fuzz import cells
from tests.fuzz.cells import AGE, BATCH, CONTROL, DOSE, PERTURBATION, SITE
from tests.fuzz.mistakes import MISTAKES, Parts

from scperturbdiff import PerturbDiff, evaluate

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from anndata import AnnData
    from tests.fuzz.strategies import Case

QUIET: dict[str, Any] = {
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "logger": False,
    "accelerator": "cpu",
}
LOGGERS = ("scperturbdiff", "scvi.scperturbdiff")
UNCHANGED = ("control", "no effect", "unchanged", "not used", "diverged")
"""One of these is in what is said where predictions are copies of their controls."""


ENOUGH = 20
"""Cells that are not copies by chance."""


class Refused(Exception):
    """A call of the package that raised."""

    def __init__(self, stage: str, error: Exception) -> None:
        super().__init__(f"{stage}: {type(error).__name__}: {error}")
        self.stage, self.error = stage, error


@dataclass
class Run:
    """A case that runs: what was said, and what must be in the message of a mistake."""

    case: Case
    folder: Path
    said: list[str] = field(default_factory=list)
    named: str | None = None
    """What the message must hold, if the mistake was made."""
    stage: str = ""
    """The stage that runs."""

    @contextmanager
    def call(self, stage: str) -> Iterator[None]:
        """A call of the package; what it raises is :class:`Refused`."""
        self.stage = stage
        try:
            yield
        except Exception as error:
            raise Refused(stage, error) from error

    def blunder(self, stage: str, parts: Parts) -> None:
        """Make the mistake of the case, if it belongs before this stage."""
        name = self.case.mistake
        if name is not None and MISTAKES[name].stage == stage:
            self.named = MISTAKES[name].make(parts)


class Listener(logging.Handler):
    """Keeps what the package says."""

    def __init__(self, said: list[str]) -> None:
        super().__init__(logging.WARNING)
        self.said = said

    def emit(self, record: logging.LogRecord) -> None:
        self.said.append(record.getMessage())


@contextmanager
def listening(said: list[str]) -> Iterator[None]:
    """Keep warnings and what is logged."""
    listener, loggers = Listener(said), [logging.getLogger(name) for name in LOGGERS]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for logger in loggers:
            logger.addHandler(listener)
            logger.setLevel(logging.WARNING)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.removeHandler(listener)
                logger.setLevel(level)
            said.extend(str(warning.message) for warning in caught)


def run_case(case: Case, folder: Path) -> Run:
    """Run a case; raises :class:`Refused` where the package does, `AssertionError` where something does not hold."""
    run = Run(case, folder)
    with listening(run.said):
        trained = train(run)
        ask(run, *trained)
    return run


def train(run: Run) -> tuple[Parts, AnnData | MuData, PerturbDiff]:
    """Set up, construct and train: what the package was called with, the cells as set up, and the model."""
    case, screen = run.case, run.case.screen
    parts = Parts(screen, cells.build(screen), cells.setup_arguments(screen), _sizes(case), _plan(case), {}, run.folder)
    run.blunder("setup", parts)
    run.case = replace(case, screen=parts.screen)
    data = _stored(parts, run.folder)
    before = fingerprint(data)
    with run.call("setup"):
        _set_up(data, parts.setup)
    run.blunder("model", parts)
    torch.manual_seed(case.training.seed)
    with run.call("model"):
        model = PerturbDiff(data, **parts.model)
    run.blunder("train", parts)
    with run.call("train"):
        model.train(**parts.train)
    assert fingerprint(data) == before, "training changed the cells"
    assert all(np.isfinite(p.detach().numpy()).all() for p in model.module.parameters()), "weights are not finite"
    return parts, data, model


def ask(run: Run, parts: Parts, data: AnnData | MuData, model: PerturbDiff) -> None:
    """Predict, again, and after saving and loading; then what else can be called."""
    case = run.case
    parts.adata, parts.predict = _request(case, parts.adata)
    asked, trained_on = parts.predict["adata"], parts.adata.obs.copy()
    run.blunder("predict", parts)
    if parts.predict["adata"] is asked and asked is not None:  # a mistake may have made new ones of the cells
        parts.predict["adata"] = cells.as_mudata(parts.adata) if case.screen.mudata else parts.adata
    before = fingerprint(parts.predict["adata"])
    first = _predict(run, model, parts.predict, "predict")
    assert fingerprint(parts.predict["adata"]) == before, "predict changed the cells"
    check_cells(first, parts.predict, case)
    check_number(first, parts, case, trained_on)
    _check_copies(run, model, first, parts)
    repeatable = parts.predict["seed"] is not None
    if repeatable:
        assert_same(first, _predict(run, model, parts.predict, "predict again"), "predicting again")
    if repeatable and _may_be_stored_otherwise(parts):
        otherwise = {**parts.predict, "adata": _dense(parts.adata)}
        assert_same(first, _predict(run, model, otherwise, "predict, dense"), "storing the counts otherwise")
    with run.call("save"):
        model.save(run.folder / "model", overwrite=True, save_anndata=False)
    with run.call("load"):
        loaded = PerturbDiff.load(run.folder / "model", adata=data if parts.predict["adata"] is None else False)
    if repeatable:
        assert_same(first, _predict(run, loaded, parts.predict, "predict, loaded"), "saving and loading")
    _more(run, model, parts, first)


def _sizes(case: Case) -> dict[str, Any]:
    return {
        "n_latent": case.training.n_latent,
        "n_hidden": 16,
        "width": 8,
        "n_layers": 1,
        "n_heads": 1,
        "retrieval_kwargs": {"n_states": case.training.n_states},
    }


def _plan(case: Case) -> dict[str, Any]:
    training = case.training
    return {
        "max_epochs_vae": training.vae_epochs,
        "max_epochs_generator": training.generator_epochs,
        "validation_size": training.validation_size,
        "train_size": training.train_size,
        "batch_size": training.batch_size,
        "plan_kwargs": {"steps_per_epoch": 2, "n_populations": 4, "n_cells": 8, **dict(training.plan)},
        "seed": training.seed,
        **QUIET,
    }


def _stored(parts: Parts, folder: Path) -> AnnData | MuData:
    """The cells as the screen has them: in memory, on disk, or one of several modalities."""
    if parts.screen.mudata:
        return cells.as_mudata(parts.adata)
    if parts.screen.layout != "backed":
        return parts.adata.copy()
    path = folder / "cells.h5ad"
    path.unlink(missing_ok=True)
    try:
        return cells.on_disk(parts.adata, path)
    except (TypeError, ValueError, UnicodeError, KeyError, OSError):  # what was changed cannot be written
        return parts.adata.copy()


def _set_up(data: AnnData | MuData, arguments: dict[str, Any]) -> None:
    if not isinstance(data, MuData):
        PerturbDiff.setup_anndata(data, **arguments)
        return
    layer = arguments["layer"]
    others = {name: value for name, value in arguments.items() if name != "layer"}
    PerturbDiff.setup_mudata(data, rna_layer=layer, modalities={"rna_layer": "rna"}, **others)


def _request(case: Case, adata: AnnData) -> tuple[AnnData, dict[str, Any]]:
    """Cells of a request, and the arguments of `predict`."""
    request, screen = case.request, case.screen
    if screen.mudata and request.cells != "none":
        return adata, {**_asked(case, adata), "adata": cells.as_mudata(adata)}
    of_control = np.array([str(label) == CONTROL for label in adata.obs[PERTURBATION]])
    chosen = adata[of_control].copy()
    if request.cells == "all" or request.cells == "none":
        chosen = adata.copy()
    if request.cells == "bare":
        del chosen.obs[PERTURBATION]
    if request.cells == "shuffled":
        rng = np.random.default_rng(screen.seed)
        chosen = chosen[rng.permutation(chosen.n_obs), rng.permutation(chosen.n_vars)].copy()
    if request.cells == "more genes":
        chosen = _more_genes(chosen)
    return chosen, {**_asked(case, adata), "adata": None if request.cells == "none" else chosen}


def _more_genes(adata: AnnData) -> AnnData:
    extra = ad.AnnData(
        np.ones((adata.n_obs, 2), np.float32), obs=adata.obs[[]], var=pd.DataFrame(index=["new 0", "new 1"])
    )
    for name in adata.layers:
        if name is not None:
            extra.layers[name] = np.ones((adata.n_obs, 2), np.float32)
    both = ad.concat([extra, adata], axis=1)
    both.obs = adata.obs.copy()
    return both


def _asked(case: Case, adata: AnnData) -> dict[str, Any]:
    request, screen = case.request, case.screen
    return {
        "perturbations": _wanted(case, adata),
        "n_cells": None if request.in_table and request.kind in ("table", "contexts") else request.n_cells,
        "n_populations": request.n_populations,
        "n_steps": request.n_steps,
        "sampler": request.sampler,
        "guidance": request.guidance,
        "transform_batch": str(adata.obs[BATCH].iloc[0]) if request.transform and screen.batches else None,
        "target_sum": request.target_sum,
        "seed": request.seed,
        "progress": False,
        "output": None,
    }


def measured(adata: AnnData) -> list[Any]:
    """Labels of treated cells, in order of first appearance."""
    out: list[Any] = []
    for label in adata.obs[PERTURBATION]:
        if str(label) != CONTROL and label not in out:
            out.append(label)
    return out


def _wanted(case: Case, adata: AnnData) -> Any:
    """Names or a table."""
    request, screen = case.request, case.screen
    known = measured(adata)
    if request.kind == "all" or not known:
        return None
    labels = [known[i % len(known)] for i in request.wanted]
    single = [
        label
        for label in known
        if label in screen.names and (screen.lists or label not in screen.labels[len(screen.single_labels) :])
    ]
    if request.pair and len(single) > 1 and (screen.lists or screen.separator):
        pair = [single[0], single[-1]]
        labels.append(pair if screen.lists else (screen.separator or "").join(pair))
    if request.unseen and screen.features:
        labels.extend(
            [name] if screen.lists and screen.separator and screen.separator in name else name for name in screen.unseen
        )
    if request.kind == "names" and not screen.doses:
        return labels
    table = pd.DataFrame({PERTURBATION: pd.Series(labels, dtype=object)})
    if screen.doses:
        doses = [cells.dose_of(screen, label, screen.doses[0], screen.doses[-1]) for label in labels]
        table[DOSE] = pd.Series(doses, dtype=float if screen.dose_as == "number" else object)
    if request.kind == "contexts":
        for key in screen.context_keys:
            table[key] = [adata.obs[key].iloc[0]] * len(table)
    if request.in_table and request.n_cells is not None and request.kind != "names":
        table["n_cells"] = request.n_cells
    if request.kind == "table":
        for key, values in ((SITE, screen.sites), (AGE, screen.ages)):
            if values:
                table[key] = values[0]
    return table


def _predict(run: Run, model: PerturbDiff, arguments: dict[str, Any], stage: str) -> AnnData:
    """Predict; into a file where the request says so."""
    given = dict(arguments)
    output = given["output"]
    if output is None and run.case.request.output is not None:
        output = run.folder / f"{stage.replace(' ', '_')}{run.case.request.output}"
        given["output"] = output
    elif isinstance(output, str):
        given["output"] = run.folder / output
    with run.call(stage):
        made = model.predict(**given)
    return in_memory(made)


def _may_be_stored_otherwise(parts: Parts) -> bool:
    """Whether the cells of the request are those of a screen, sparse in any way."""
    return parts.predict["adata"] is parts.adata and parts.screen.layout not in ("dense", "backed")


def _dense(adata: AnnData) -> AnnData:
    """The same cells, every matrix dense."""
    out = adata.copy()
    for name in filter(None, list(out.layers)):
        if sparse.issparse(out.layers[name]):
            out.layers[name] = out.layers[name].toarray()
    if sparse.issparse(out.X):
        out.X = out.X.toarray()
    return out


def in_memory(adata: AnnData) -> AnnData:
    """Predicted cells with matrices read from disk."""

    def read(matrix: Any) -> Any:
        return matrix if sparse.issparse(matrix) else matrix[:]

    counts = read(adata.layers["counts"])
    return ad.AnnData(
        read(adata.X),
        obs=adata.obs,
        var=adata.var,
        layers={"counts": counts},
        obsm=dict(adata.obsm),
        uns=dict(adata.uns),
    )


# ---- what must hold -----------------------------------------------------------------------------------------------


def fingerprint(data: Any) -> str:
    """A hash of cells: annotation, matrices, names of what is unstructured; without what scvi-tools adds."""
    digest = hashlib.sha256()
    if isinstance(data, MuData):
        parts, frames = list(data.mod.values()), [data.obs]
    else:
        parts = [data] if isinstance(data, ad.AnnData) else []
        frames = [data] if isinstance(data, pd.DataFrame) else []
    for part in parts:
        frames += [part.obs, part.var]
        digest.update(repr(sorted(key for key in part.uns if not key.startswith("_scvi"))).encode())
        for matrix in (part.X, *(part.layers[name] for name in sorted(filter(None, part.layers)))):
            for array in _arrays(matrix):
                digest.update(f"{array.dtype} {array.shape}".encode())
                digest.update(array.tobytes() if array.dtype != object else repr(array.tolist()).encode())
    for frame in frames:
        kept = frame[[column for column in frame if not str(column).startswith("_scvi")]]
        text = f"{list(kept)} {list(kept.dtypes)} {kept.index.tolist()} {kept.to_numpy().tolist()}"
        digest.update(text.encode(errors="replace"))
    return digest.hexdigest()


def _arrays(matrix: Any) -> list[np.ndarray]:
    """What a matrix is made of, read into memory."""
    if matrix is None:
        return []
    block = matrix if sparse.issparse(matrix) or isinstance(matrix, np.ndarray) else matrix[:]
    return [block.data, block.indices, block.indptr] if sparse.issparse(block) else [np.asarray(block)]


def check_cells(made: AnnData, arguments: dict[str, Any], case: Case) -> None:
    """Counts are counts, nothing is NaN or infinite, the annotation is complete."""
    counts, expression, latent = made.layers["counts"], made.X, made.obsm["X_perturbdiff"]
    assert np.isfinite(latent).all(), "latent vectors are not finite"
    assert latent.shape == (made.n_obs, case.training.n_latent)
    assert np.isfinite(expression.data).all() and (expression.data >= 0).all(), "expression is not finite"
    assert counts.dtype.kind in "iu" and (counts.data >= 0).all(), "counts are negative"
    per_cell = np.expm1(expression.astype(np.float64).toarray()).sum(1)
    filled = np.asarray(counts.sum(1)).ravel() > 0
    np.testing.assert_allclose(per_cell[filled], arguments["target_sum"], rtol=1e-2, err_msg="counts per cell of X")
    assert made.n_vars == case.screen.n_genes
    for key in (PERTURBATION, *case.screen.obs_keys, "control_cell", "population"):
        assert not made.obs[key].isna().any(), f"{key} is missing"
    assert made.obs_names.is_unique


def check_number(made: AnnData, parts: Parts, case: Case, trained_on: pd.DataFrame) -> None:
    """No cell is lost: as many as were asked for, of each. Without cells of the request those `trained_on` are used."""
    wanted, adata, screen = parts.predict["perturbations"], parts.predict["adata"], case.screen
    if wanted is None:
        return
    obs = trained_on if adata is None else parts.adata.obs if isinstance(adata, MuData) else adata.obs
    if PERTURBATION in obs:
        obs = obs[[str(label) == CONTROL for label in obs[PERTURBATION]]]
    rows = wanted if isinstance(wanted, pd.DataFrame) else pd.DataFrame({PERTURBATION: pd.Series(wanted, dtype=object)})
    expected = 0
    keys = [key for key in (*screen.context_keys, BATCH) if key in rows and key in obs]

    def fitting(row: pd.Series, keys: list[str]) -> pd.DataFrame:
        return obs[[all(cell[key] == row[key] for key in keys) for _, cell in obs.iterrows()]]

    for key in (SITE, AGE):  # covariates choose among controls that have what is asked for
        if key in rows and key in obs and all(len(fitting(row, [*keys, key])) for _, row in rows.iterrows()):
            keys = [*keys, key]
    for _, row in rows.iterrows():
        fits = fitting(row, keys)
        n = row.get("n_cells", parts.predict["n_cells"])
        n_contexts = len(fits[screen.context_keys].drop_duplicates()) if screen.context_keys else 1
        expected += len(fits) if n is None or n != n else int(n) * n_contexts
    assert made.n_obs == expected * (parts.predict["n_populations"] or 1), "another number of cells than asked for"


def _check_copies(run: Run, model: PerturbDiff, made: AnnData, parts: Parts) -> None:
    """Where all treated cells are copies of the control cells they started from, something says so."""
    controls = parts.adata
    if isinstance(parts.predict["adata"], MuData) or len(made) < ENOUGH:  # a few may be copies by chance
        return
    rows = controls.obs_names.get_indexer(made.obs["control_cell"].astype(str))
    columns = controls.var_names.get_indexer(made.var_names)
    layer = "counts" if run.case.screen.in_layer else None
    stored = controls.X if layer is None else controls.layers[layer]
    start = (stored.toarray() if sparse.issparse(stored) else np.asarray(stored))[rows][:, columns]
    treated = np.array([str(label) not in (CONTROL, f"['{CONTROL}']") for label in made.obs[PERTURBATION]])
    same = (made.layers["counts"].toarray() == start).all()
    encoded = model.get_latent_representation(controls, layer=layer)[rows]
    if treated.any() and same and np.allclose(encoded, made.obsm["X_perturbdiff"], atol=1e-6):
        heard = " ".join(run.said)
        assert any(word in heard for word in UNCHANGED), f"copies of their controls, and nothing says so: {heard!r}"


def assert_same(a: AnnData, b: AnnData, after: str) -> None:
    """Two predictions agree bit by bit."""
    pd.testing.assert_frame_equal(a.obs, b.obs)
    assert (a.layers["counts"] != b.layers["counts"]).nnz == 0, f"other counts after {after}"
    assert (a.X != b.X).nnz == 0, f"other expression after {after}"
    np.testing.assert_array_equal(a.obsm["X_perturbdiff"], b.obsm["X_perturbdiff"], f"other latents after {after}")


# ---- what else can be called --------------------------------------------------------------------------------------


def _more(run: Run, model: PerturbDiff, parts: Parts, made: AnnData) -> None:
    case, screen, more = run.case, run.case.screen, run.case.more
    adata = parts.adata if PERTURBATION in parts.adata.obs and run.case.request.cells == "none" else None
    if more == "evaluate":
        real = cells.build(screen)
        with run.call("evaluate"):
            table = evaluate(
                made, real, CONTROL, perturbation_key=PERTURBATION, context_keys=screen.context_keys,
                dose_key=DOSE if screen.doses else None, separator=screen.separator,
                layer_real="counts" if screen.in_layer else None, train=real if screen.seed % 2 else None, n_splits=1,
                metrics="all", allow_overlap=True,
            )  # fmt: skip
        assert np.isfinite(table["value"].dropna()).all(), "scores are infinite"
    elif more == "response":
        with run.call("response"):
            found = model.response(
                parts.predict["adata"], parts.predict["perturbations"], n_cells=3, seed=0, progress=False
            )
        assert np.isfinite(found[["control_mean", "predicted_mean", "log2_fold_change"]]).all(axis=None)
    elif more == "describe":
        with run.call("describe"):
            novelty = model.perturbation_novelty()
            vectors = model.get_perturbation_representation()
            latent = model.get_latent_representation(adata)
            text = f"{model.summary_string} {model.report_} {model.populations}"
        assert np.isfinite(vectors.to_numpy()).all() and np.isfinite(latent).all() and text
        assert (novelty["unexplained_variance"].dropna() >= -1e-6).all()
    elif more == "query" and not screen.mudata:
        data = cells.build(screen)
        with run.call("query"):
            adapted = PerturbDiff.load_query_data(data, model)
            adapted.train(**{**_plan(case), "max_epochs_vae": 1})
    elif more == "train again":
        with run.call("train again"):
            model.train(**_plan(case))
