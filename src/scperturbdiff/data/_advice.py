"""What set-up warns of although nothing is wrong: data from which little can be learned, or at a high price."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from scperturbdiff.data._counts import are_equal_totals, matrix_name
from scperturbdiff.data._labels import context_name
from scperturbdiff.data._messages import preview
from scperturbdiff.data._output import FEW_CELLS

if TYPE_CHECKING:
    from collections.abc import Iterable

    from anndata import AnnData
    from numpy.typing import NDArray

    from scperturbdiff.data._conditions import ConditionSpace

logger = logging.getLogger(__name__)

MANY_GENES = 10_000
"""Genes from which on to say how to select some."""
SEPARATORS = ("+", "_", "|", ";", ",", "&", "/", ":", "-", " ")
"""What joins names in public data sets."""


def warn_of_cells(adata: AnnData, layer: str | None, totals: NDArray[np.float64]) -> None:
    """Log warnings of counts that are probably none, as all cells have the same of them in total, and of many genes."""
    if len(totals) > FEW_CELLS and are_equal_totals(totals):
        logger.warning(
            "The cells of %s all add up to about %s: it seems to be normalised and rounded. Pass raw counts, with "
            "layer=... where they are in a layer.",
            matrix_name(layer), f"{totals.mean():,.0f}",
        )  # fmt: skip
    if adata.n_vars > MANY_GENES:
        where = "" if layer is None else f", layer={layer!r}"
        line = f"sc.experimental.pp.highly_variable_genes(adata, n_top_genes=3000{where}, subset=True)"
        logger.warning(
            "adata has %d genes. Time and memory grow with their number, and 2,000 to 5,000 variable ones are enough "
            "as a rule. Before set-up: %s",
            adata.n_vars, line,
        )  # fmt: skip


def warn_of_few_controls(space: ConditionSpace, labels: pd.DataFrame) -> None:
    """Log a warning of contexts with few or no control cells; `labels` are those of the cells, as read."""
    control = space.is_control(labels)
    by = [labels[key].astype(str).to_numpy() for key in space.context_keys] or [np.zeros(len(labels), np.int64)]
    number = pd.DataFrame({"control": control, "treated": ~control}).groupby(by).sum()
    number = number[number["treated"] > 0]
    few = number.loc[number["control"] < FEW_CELLS, "control"]
    if few.empty:
        return
    if not space.context_keys:
        logger.warning("The number of control cells is %d, from which little can be told.", few.iloc[0])
        return
    names = [context_name(name if isinstance(name, tuple) else (name,)) for name in few.index]
    logger.warning(
        "%d of %d contexts have fewer than %d control cells, from which little can be told: %s. Merge contexts, or "
        "leave them out.",
        len(few), len(number), FEW_CELLS, preview(f"{name}: {n}" for name, n in zip(names, few, strict=True)),
    )  # fmt: skip


def other_separator(labels: Iterable[object], control: str, separator: str | None) -> tuple[str, list[str]] | None:
    """A separator with which labels would be combinations of other labels, and these; `None` where there is none.

    `separator` is the one in use, which none of the labels has.
    """
    texts = [label for label in labels if isinstance(label, str)]
    found: dict[str, list[str]] = {}
    for other in SEPARATORS:
        if other == separator:
            continue
        single = {text for text in texts if other not in text} | {control}
        for text in texts:
            parts = {part.strip() for part in text.split(other)}
            if other in text and len(parts) > 1 and parts <= single and parts != {control}:
                found.setdefault(other, []).append(text)
    return max(found.items(), key=lambda item: len(item[1])) if found else None
