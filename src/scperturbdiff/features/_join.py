"""Several tables of features as one."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pandas as pd
from sklearn.preprocessing import normalize as unit_rows

from scperturbdiff.arguments import check_choice, check_flag, check_number, check_type
from scperturbdiff.data import FeatureTable, preview

if TYPE_CHECKING:
    from numpy.typing import NDArray

logger = logging.getLogger(__name__)


def join(
    *,
    normalize: bool = True,
    weights: Mapping[str, float] | None = None,
    missing: Literal["zero", "drop", "error"] = "zero",
    **tables: pd.DataFrame | Mapping[str, Any],
) -> pd.DataFrame:
    r"""Join tables of features side by side, each a named block: `join(go=..., coexpression=...)`.

    Similarity of features is mostly read off the cosine of two rows. So that no block counts for more than another
    because of its units or its width, the rows of each are scaled to length 1; the cosine of two joined rows is then
    the (weighted) mean of the cosines in single blocks. Scaling looks at one row at a time: rows do not depend on
    which others are in the table, and a later table joins in the same way.

    Parameters
    ----------
    normalize
        Whether to scale the rows of each block to length 1. Rows of zeros stay as they are.
    weights
        Weight of blocks in the mean of cosines, positive; 1 for those not named. Values of a block are multiplied by
        the square root of its weight.
    missing
        What is done about names that a block lacks; all are named in a warning. `"zero"`: the block is zero for them,
        so that they are like nothing else as far as this block goes, and less like others altogether. `"drop"`: they
        are left out of the joined table. `"error"`: a `KeyError`.
    **tables
        Name of a block to its table: a DataFrame with one row a component, or a dict of vectors. Rows may be in any
        order.

    Returns
    -------
    Values without unit (with `normalize=False`, those of the blocks), float32, shape `(n_names, n_features)`: one row a
    component that any of the blocks has, in the order of first appearance, columns `block:column`. Pass it to
    :meth:`scperturbdiff.PerturbDiff.setup_anndata` as `perturbation_embeddings`.

    Raises
    ------
    ValueError
        If a table has missing or repeated names, or values that are not finite; rows are named. If no block is given,
        or no name is in every block with `missing="drop"`.
    TypeError
        If a table is none or holds text.
    """
    check_flag("normalize", normalize)
    check_choice("missing", missing, ("zero", "drop", "error"))
    if not tables:
        raise ValueError("join needs one table or more, each under the name of its block: join(go=..., esm2=...).")
    scale = _scales(weights, list(tables))
    parsed = {block: FeatureTable.parse(table, what=f"join({block}=...)") for block, table in tables.items()}
    names = list(dict.fromkeys(name for table in parsed.values() for name in table.names))
    lacking = {block: sorted(set(names) - set(table.names)) for block, table in parsed.items()}
    if any(lacking.values()):
        _tell_lacking(lacking, len(names), missing)
    if missing == "drop":
        left_out = {name for found in lacking.values() for name in found}
        names = [name for name in names if name not in left_out]
        if not names:
            raise ValueError(f"No name is in every block ({preview(tables)}), so that nothing is left of them.")
    parts: list[NDArray[np.float32]] = []
    columns: list[str] = []
    for block, table in parsed.items():
        # in double precision: squares of large numbers are infinite in single
        values = np.nan_to_num(table.rows(names)).astype(np.float64)
        values = unit_rows(values) if normalize else values
        parts.append((scale[block] * values).astype(np.float32))
        given = tables[block]
        titles = given.columns if isinstance(given, pd.DataFrame) else range(1, values.shape[1] + 1)
        columns += [f"{block}:{title}" for title in titles]
    return pd.DataFrame(np.hstack(parts), index=pd.Index(names, name="component"), columns=columns)


def _scales(weights: Mapping[str, float] | None, blocks: list[str]) -> dict[str, float]:
    """Factor of each block."""
    check_type("weights", weights, (Mapping, type(None)), "a mapping from blocks to weights, or None")
    given = {} if weights is None else dict(weights)
    if unknown := [block for block in given if block not in blocks]:
        raise KeyError(f"weights names {preview(unknown)}, which are no blocks. Blocks: {preview(blocks)}.")
    checked = {block: check_number(f"weights[{block!r}]", weight, "(0, inf)") for block, weight in given.items()}
    return {block: float(np.sqrt(checked.get(block, 1.0))) for block in blocks}


def _tell_lacking(lacking: Mapping[str, list[str]], n_names: int, missing: str) -> None:
    parts = [f"{block!r} lacks {len(names)} ({preview(names)})" for block, names in lacking.items() if names]
    text = f"Of {n_names} names, block {'; block '.join(parts)}."
    if missing == "error":
        raise KeyError(f"{text} Add the rows, or pass missing='zero' or 'drop'.")
    done = "Their features in it are set to zero" if missing == "zero" else "They are left out"
    logger.warning("%s %s.", text, done)
