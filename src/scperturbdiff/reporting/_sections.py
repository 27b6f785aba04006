"""The parts of a report: sentences, data, overview, conditions, warnings, and how it was made."""

from __future__ import annotations

import platform
from dataclasses import replace
from importlib import metadata
from typing import TYPE_CHECKING, Any

import numpy as np

from scperturbdiff.data import FEW_CELLS, preview
from scperturbdiff.reporting._blocks import Code, Items, Table, Text
from scperturbdiff.reporting._conditions import condition_fold
from scperturbdiff.reporting._scores import heat_map, number
from scperturbdiff.reporting._subject import WAYS

if TYPE_CHECKING:
    from collections.abc import Sequence

    from anndata import AnnData

    from scperturbdiff.reporting._blocks import Block
    from scperturbdiff.reporting._scores import Scores
    from scperturbdiff.reporting._subject import Condition, Subject

    Doubts = dict[Condition, tuple[str, ...]]

PACKAGES = ("scperturbdiff", "scvi-tools", "anndata", "scanpy", "torch", "numpy", "pandas", "scikit-learn")
"""What results depend on."""
NAMED = 5
"""Conditions that a sentence names."""
LISTED = 60
"""Conditions in the heat map, at most."""


def second_sentence(subject: Subject) -> str:
    """What retrieval, states and network did."""
    found = subject.training
    if "baseline" in subject.made_by:
        return f"The prediction was made by a simple rule, {subject.made_by['baseline']}."
    if not found:
        return "How the prediction was made is not known here: no model was given, and none is noted with the cells."
    # what was seen is judged by leaving out replicates of it
    ways = {"replicate" if known.novelty == "seen" else known.novelty for known in subject.evidence.values()}
    ways = ways or set(found["retrieval_explained"])
    explained = {
        way: share for way, share in found["retrieval_explained"].items() if np.isfinite(share) and way in ways
    }
    retrieval = "Retrieval could not be tried on conditions left out for the ways in which these are new"
    if explained:
        told = " and ".join(f"{share:.0%} of the shifts of {WAYS.get(way, way)}" for way, share in explained.items())
        retrieval = f"Retrieval explains {told}, as conditions left out of training show"
    n, weight = int(found["n_states"]), float(found["network_weight"])
    states = "cells are taken to be of one state" if n == 1 else f"cells are taken to be of {n} states"
    if hardly := [share for way, share in found.get("hardly_respond", {}).items() if way in (*ways, "seen")]:
        states += f" that respond unevenly, {max(hardly):.0%} of them hardly"
    network = f"the network has weight {weight:g}" if weight > 0 else "the network is not used"
    return f"{retrieval}; {states}; {network}."


def third_sentence(subject: Subject, doubts: Doubts) -> str:
    """Which conditions not to trust."""
    found = {c: why for c, why in doubts.items() if why}
    if not found:
        return f"Nothing speaks against any of the {len(doubts)} conditions."
    shown = [f"{subject.name(c)} ({why[0]})" for c, why in list(found.items())[:NAMED]]
    more = f"; and {len(found) - NAMED} more" if len(found) > NAMED else ""
    return f"Do not trust {len(found)} of {len(doubts)} conditions: {'; '.join(shown)}{more}."


def data_blocks(subject: Subject, model: Any, train: AnnData | None) -> tuple[Block, ...]:
    keys, conditions = subject.keys, subject.conditions
    contexts = list(dict.fromkeys(keys.context(c) for c in conditions))
    names = list(dict.fromkeys(c[-1] for c in conditions))
    n_pred = sum(map(len, subject.rows.values()))
    rows = [
        ("predicted", f"{n_pred:,} {'means' if subject.means else 'cells'} of {len(conditions)} conditions"),
        ("perturbations", f"{len(names)}: {', '.join(names[:20])}{', ...' if len(names) > 20 else ''}"),
    ]
    if keys.contexts:
        shown = [" / ".join(context) for context in contexts]
        rows.append((f"contexts ({', '.join(keys.contexts)})", f"{len(shown)}: {', '.join(shown[:20])}"))
    if subject.real is not None:
        n_real = sum(len(subject.real_rows[c]) for c in conditions if c in subject.real_rows)
        rows.append(("real perturbed cells of these conditions", number(n_real)))
    matched = [subject.n_controls(c) for c in conditions]
    sizes = [n for n in matched if n is not None]
    if sizes:
        low, high = min(sizes), max(sizes)
        each = f"{low:,}" if low == high else f"{low:,} to {high:,}"
        rows.append((f"control cells, {_same(keys.contexts)}", f"{each} a condition"))
    rows.append(("genes", number(len(subject.genes))))
    if train is not None:
        rows.append(("training cells", number(train.n_obs)))
    populations = getattr(model, "populations", None)
    if populations is not None and "exact_match" in populations:
        exact = int(populations["exact_match"].sum())
        rows.append(
            ("training populations", f"{len(populations)}, of which {exact} have controls that match on every key")
        )
    return (Table(("what", "how many"), tuple(rows)),)


def _same(contexts: Sequence[str]) -> str:
    return f"of the same {' and '.join(contexts)}" if contexts else "all of them"


def overview_blocks(subject: Subject, scores: Scores | None, doubts: Doubts) -> tuple[Block, ...]:
    """Conditions x metrics, or without scores contexts x perturbations."""
    conditions = _most_doubtful(doubts, LISTED)
    cut = (
        () if len(conditions) == len(doubts) else (Text(f"The {LISTED} of {len(doubts)} conditions with most doubts."),)
    )
    if scores is not None:
        told = Text(
            "Values of the prediction. Blue: better than the best simple rule of this metric, orange: worse; the "
            "stronger, the larger the difference among the conditions."
        )
        return (*cut, told, heat_map(scores, conditions, [subject.name(c) for c in conditions]))
    if not subject.evidence:
        return (Text("Without real cells and without evidence of training there is nothing to compare conditions by."),)
    left = {c: known.unexplained for c, known in subject.evidence.items()}
    columns = list(dict.fromkeys(c[-1] for c in conditions))
    lines = list(dict.fromkeys(c[:-1] for c in conditions))
    found = [[left.get((*line, name), np.nan) for name in columns] for line in lines]
    rows = tuple((" / ".join(line) or "all", *map(number, row)) for line, row in zip(lines, found, strict=True))
    colors = tuple(tuple(None if np.isnan(v) else float(1 - 2 * np.clip(v, 0, 1)) for v in row) for row in found)
    told = Text("Share of the variance of the response that training leaves open. Blue: little, orange: much.")
    return (*cut, told, Table((" / ".join(subject.keys.all[:-1]) or "context", *columns), rows, colors))


def _most_doubtful(doubts: Doubts, n: int) -> list[Condition]:
    """In order, those with most doubts where there are too many."""
    kept = set(sorted(doubts, key=lambda c: -len(doubts[c]))[:n])
    return [c for c in doubts if c in kept]


def fold_blocks(
    subject: Subject, scores: Scores | None, doubts: Doubts, model: Any, n: int,
    n_genes: int, seed: int,
) -> tuple[Block, ...]:  # fmt: skip
    shown = _most_doubtful(doubts, n)
    states = getattr(model, "states_", None)
    folds = [condition_fold(subject, scores, c, doubts[c], states, n_genes, seed) for c in shown]
    cut = () if len(shown) == len(doubts) else (Text(f"{len(shown)} of {len(doubts)} conditions, with most doubts."),)
    return (*cut, *(replace(fold, is_open=True) for fold in folds[:1]), *folds[1:])


def warning_blocks(subject: Subject, model: Any, told: list[str]) -> tuple[Block, ...]:
    """What was warned of: now, in prediction and in training."""
    found = list(dict.fromkeys(told))
    for key, text in (
        ("few_controls", f"Fewer than {FEW_CELLS} control cells when predicting"),
        ("predicted_as_controls", "Predicted as their controls, no effect beyond the noise of sampling"),
        ("doses_outside_training", "Doses outside those of training"),
    ):
        names = [str(name) for name in subject.made_by.get(key, ())]
        if names:
            found.append(f"{text}: {preview(names, 20)}.")
    trained = getattr(model, "report_", None)
    if trained is not None:
        found += list(trained.notes)
        if trained.little_evidence:
            found.append(f"Training conditions with little evidence: {preview(trained.little_evidence, 20)}.")
    return (Items(tuple(found)),) if found else (Text("None."),)


def provenance_blocks(subject: Subject, arguments: dict[str, Any], command: str) -> tuple[Block, ...]:
    versions = [("Python", platform.python_version())]
    for name in PACKAGES:
        try:
            versions.append((name, metadata.version(name)))
        except metadata.PackageNotFoundError:  # not every way of installing leaves its name
            continue
    made = [(str(k), str(v)) for k, v in subject.made_by.items() if isinstance(v, str | int | float | np.generic)]
    blocks: list[Block] = [
        Code(command),
        Table(("argument", "value"), tuple((k, repr(v)) for k, v in arguments.items())),
    ]
    if made:
        blocks.append(Table(("prediction", "value"), tuple(made)))
    if subject.training:
        blocks.append(Text(str(subject.training.get("network_reason", ""))))
    return (*blocks, Table(("package", "version"), tuple(versions)))
