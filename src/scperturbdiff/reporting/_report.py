"""From cells, scores and a model to a report."""

from __future__ import annotations

import logging
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal

from scperturbdiff.arguments import check_flag, check_int, check_number, check_type
from scperturbdiff.data import check_cells, preview
from scperturbdiff.evaluation.metrics import evaluate, summarize_evaluation
from scperturbdiff.reporting._blocks import Section
from scperturbdiff.reporting._conditions import doubts_of
from scperturbdiff.reporting._page import Report, check_path
from scperturbdiff.reporting._scores import Scores, first_sentence, metric_blocks
from scperturbdiff.reporting._sections import (
    data_blocks,
    fold_blocks,
    overview_blocks,
    provenance_blocks,
    second_sentence,
    third_sentence,
    warning_blocks,
)
from scperturbdiff.reporting._subject import read_subject, resolve_keys
from scperturbdiff.seeds import check_seed

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    import pandas as pd
    from anndata import AnnData

    from scperturbdiff.reporting._subject import Subject


def report(
    pred: AnnData,
    real: AnnData | None = None,
    model: Any = None,
    train: AnnData | None = None,
    path: str | Path | None = "report.html",
    *,
    controls: AnnData | None = None,
    perturbation_key: str | None = None,
    control: str | None = None,
    context_keys: str | Sequence[str] | None = None,
    condition_keys: str | Sequence[str] = (),
    dose_key: str | None = None,
    separator: str | Literal["model"] | None = "model",
    layer_pred: str | None = "counts",
    layer_real: str | None = None,
    normalized: bool = False,
    means: bool = False,
    table: pd.DataFrame | None = None,
    title: str = "Predicted responses to perturbations",
    max_conditions: int = 24,
    n_genes: int = 10,
    target_sum: float = 1e4,
    overwrite: bool = False,
    command: str | None = None,
    seed: int = 0,
    **scoring: Any,
) -> Report:
    """Write a prediction, its scores and its evidence as one page.

    The page is a single HTML file: it has no scripts and loads nothing, so that it can be sent by mail and opened
    without a network. It begins with three sentences: how the prediction compares with the best simple rule, what
    retrieval, states of cells and the network did, and which conditions not to trust.

    Parameters
    ----------
    pred
        Predicted cells, of :meth:`scperturbdiff.PerturbDiff.predict` or another tool, as for
        :func:`~scperturbdiff.evaluate`.
    real
        Real perturbed cells of these conditions and control cells, counts in `layer_real`. `None`: a report of what is
        predicted, without scores.
    model
        The :class:`~scperturbdiff.PerturbDiff`, for what training found. Most of it is also kept with its predictions.
    train
        The cells that models were trained on, for the simple rules.
    path
        The file: `.html`, or `.md` for a model card without figures. `None`: none is written.
    controls
        Control cells, where there are no real ones: mean shifts are measured from them. Counts in `layer_real`.
    perturbation_key, control, context_keys, condition_keys, dose_key, separator
        As for :func:`~scperturbdiff.evaluate`, with the label of controls. `None`: as noted in `pred.uns` by
        :meth:`~scperturbdiff.PerturbDiff.predict`, where covariates count as contexts. The separator `"model"` is the
        model's, or `"+"`.
    layer_pred, layer_real, normalized, means, target_sum
        As for :func:`~scperturbdiff.evaluate`.
    table
        Result of :func:`~scperturbdiff.evaluate` for these cells, if there is one. Its first prediction is reported.
    title
        Heading.
    max_conditions, n_genes
        Conditions with a part of their own, those with most doubts where there are more, and genes that are listed in
        each.
    overwrite
        Whether a file that is there is replaced.
    command
        What to run to make the report again; `None`: this call.
    seed
        Of scores and figures.
    scoring
        Further arguments of :func:`~scperturbdiff.evaluate`, such as `metrics`, `baselines` and `allow_overlap`.

    Returns
    -------
    The report, which prints as its three sentences, and can be saved in the other format.

    Raises
    ------
    FileExistsError
        If there is a file at `path`, which is not replaced.
    ValueError
        For a path with another suffix, columns that are neither given nor noted, and what
        :func:`~scperturbdiff.evaluate` refuses.
    """
    check_cells(pred, "pred")
    for name, value in (("overwrite", overwrite), ("normalized", normalized), ("means", means)):
        check_flag(name, value)
    check_type("title", title, str, "a text")
    check_int("max_conditions", max_conditions, 0)
    check_int("n_genes", n_genes, 1)
    check_number("target_sum", target_sum, "(0, inf)")
    check_seed(seed)
    if path is not None:
        check_path(path, overwrite)
    if real is not None and controls is not None:
        raise ValueError("controls=... is for reports without real cells; with real=..., its control cells are used.")
    if scoring and (real is None or table is not None):
        raise ValueError(
            f"{preview(scoring)} are arguments of evaluate(), which is not called without real cells or with a table."
        )
    given = {
        "perturbation_key": perturbation_key, "control": control, "context_keys": context_keys, "dose_key": dose_key,
        "separator": separator,
    }  # fmt: skip
    keys = resolve_keys(pred, model, given)
    if table is not None and dose_key is None and keys["dose_key"] not in table:  # it was made without doses
        keys["dose_key"] = None
    arguments = {
        **keys, "condition_keys": condition_keys, "layer_pred": layer_pred, "layer_real": layer_real,
        "normalized": normalized, "means": means, "target_sum": target_sum, "seed": seed, **scoring,
    }  # fmt: skip
    with _warnings() as told:
        subject = read_subject(
            pred, real, controls, model, keys, condition_keys,
            layers=(layer_pred, layer_real), normalized=normalized, means=means, target_sum=target_sum,
        )  # fmt: skip
        if table is None and real is not None:
            table = evaluate(pred, real, train=train, **arguments)
    scores = None if table is None else _scores(table, subject, seed)
    doubts = doubts_of(subject, scores)
    call = _call(arguments, real, model, train, controls, path) if command is None else command
    parts = {
        "Data": data_blocks(subject, model, train),
        "Metrics": () if scores is None else metric_blocks(scores),
        "Overview": overview_blocks(subject, scores, doubts),
        "Conditions": fold_blocks(subject, scores, doubts, model, max_conditions, n_genes, seed),
        "Warnings": warning_blocks(subject, model, told),
        "How it was made": provenance_blocks(subject, arguments, call),
    }
    sections = tuple(Section(heading, blocks) for heading, blocks in parts.items() if blocks)
    sentences = (
        first_sentence(scores, len(subject.conditions)),
        second_sentence(subject),
        third_sentence(subject, doubts),
    )
    named = {subject.name(c): why for c, why in doubts.items() if why}
    made = Report(title, sentences, sections, named, table, None if scores is None else scores.summary)
    if path is not None:
        made.save(path, overwrite=overwrite)
    return made


@contextmanager
def _warnings() -> Iterator[list[str]]:
    """Collect what is warned of, without keeping it from the terminal."""
    told: list[str] = []

    class Collect(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if record.levelno >= logging.WARNING:
                told.append(record.getMessage())

    handler, root = Collect(), logging.getLogger("scperturbdiff")
    root.addHandler(handler)
    try:
        yield told
    finally:
        root.removeHandler(handler)


def _scores(table: pd.DataFrame, subject: Subject, seed: int) -> Scores:
    keys = subject.keys.all
    needed = {"model", "role", "metric", "value", "status", "reason", *keys}
    if not needed <= set(table):
        raise ValueError(f"table lacks {preview(sorted(needed - set(table)))}; it must be the result of evaluate().")
    predicted = table.loc[table["role"] == "prediction", "model"]
    if predicted.empty:
        raise ValueError("table has no prediction; it must be the result of evaluate().")
    return Scores(table, summarize_evaluation(table, seed=seed), keys, str(predicted.iloc[0]))


def _call(arguments: dict[str, Any], real: Any, model: Any, train: Any, controls: Any, path: Any) -> str:
    """The call as code."""
    names = {"real": real, "model": model, "train": train, "controls": controls}
    words = ["pred", *(f"{name}={name}" for name, value in names.items() if value is not None)]
    words.append(f"path={None if path is None else str(path)!r}")
    simple = {k: v for k, v in arguments.items() if isinstance(v, str | int | float | list | tuple | type(None))}
    words += [f"{name}={value!r}" for name, value in simple.items() if value not in (None, (), [])]
    return f"scperturbdiff.report({', '.join(words)})"
