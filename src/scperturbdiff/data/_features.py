"""Features of perturbation components."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from scperturbdiff.data._messages import closest, preview

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from anndata import AnnData
    from numpy.typing import NDArray


logger = logging.getLogger(__name__)

ARGUMENT = "perturbation_embeddings"
"""How messages call a table."""


@dataclass(frozen=True)
class FeatureTable:
    """Features of components: `names` and `values` `(len(names), n_features)`, finite."""

    names: tuple[str, ...]
    values: NDArray[np.float32]

    @classmethod
    def parse(cls, table: Any, adata: AnnData | None = None, what: str = ARGUMENT) -> FeatureTable:
        """Read a DataFrame (rows are components), a dict of vectors, or a key of `adata.uns` that holds one.

        Raises where the key is not there, names are missing or repeat, lengths differ or values are no finite numbers,
        and lists the names. `adata` are the cells of set-up, at which rows that do not differ are told, too. `what` is
        how messages call the table.
        """
        if isinstance(table, FeatureTable):
            return table
        if isinstance(table, str):
            uns = {} if adata is None else adata.uns
            if table not in uns:
                raise KeyError(f"{what}={table!r} is not in adata.uns. Keys: {preview(uns.keys(), 30)}.")
            table = uns[table]
        if isinstance(table, Mapping):
            table = _stack(table, what)
        if not isinstance(table, pd.DataFrame):
            raise TypeError(
                f"{what} must be a DataFrame (rows are components), a dict of vectors or a key of "
                f"adata.uns, not {type(table).__name__}."
            )
        if table.shape[0] == 0 or table.shape[1] == 0:
            raise ValueError(f"{what} is empty: shape {table.shape}.")
        names = table.index.astype(str).str.strip()  # as labels are read
        unnamed = np.asarray(table.index.isna() | (names == ""))
        if unnamed.any():
            raise ValueError(
                f"{what} has rows without a name, at positions {preview(np.flatnonzero(unnamed).tolist())}."
            )
        if len(repeated := names[names.duplicated()].unique()):
            raise ValueError(f"{what} has duplicated names: {preview(repeated)}.")
        values = _numbers(table, names, what)
        bad = np.asarray(~np.isfinite(values).all(axis=1))
        if bad.any():
            raise ValueError(
                f"{what} has NaN or infinite values for {int(bad.sum())} names: {preview(names[bad])}. "
                "Leave these rows out, or fill them in."
            )
        parsed = cls(tuple(names), values)
        if adata is not None:
            parsed.warn_of_likeness(what)
        return parsed

    def warn_of_likeness(self, what: str = ARGUMENT) -> None:
        """Warn of what tells nothing apart: a single row, rows that are equal, constant columns, rows of zeros.

        Not errors: cells that go on from a trained model may have few components, of which it knows others. Columns of
        zeros are usual, bits of a fingerprint that no molecule has, and do nothing.
        """
        same = (self.values == self.values[0]).all(axis=0)
        if same.all():
            n, names = len(self.names), preview(self.names)
            found = f"the same features for all {n} names: {names}" if n > 1 else f"a single row, {names}"
            text = "%s has %s. What features mean is learned from how components differ, so that these tell nothing."
            logger.warning(text, what, found)
            return
        constant = np.flatnonzero(same & (self.values[0] != 0))
        if len(constant):
            logger.warning(
                "%s has %d columns with the same value, not 0, for all %d names, at positions %s. They make all "
                "components look alike; leave them out unless the rows are few.",
                *(what, len(constant), len(self.names), preview(constant.tolist())),
            )
        nothing = np.flatnonzero(~self.values.any(axis=1))
        if len(nothing):
            zero = preview(self.names[i] for i in nothing)
            logger.warning("%s is 0 throughout for %d names, which are like no other: %s.", what, len(nothing), zero)

    def extended(self, other: FeatureTable) -> FeatureTable:
        """The table with the names of `other` added; raises where widths, or features that both have, differ."""
        if other.values.shape[1] != self.values.shape[1]:
            raise ValueError(
                f"perturbation_embeddings has {other.values.shape[1]} features, the model was set up with "
                f"{self.values.shape[1]}. Make the rows {preview(other.names)} in the same way as those of set-up."
            )
        at = pd.Index(self.names).get_indexer(pd.Index(other.names))
        differs = (at >= 0) & ~np.isclose(self.values[at], other.values, rtol=1e-5, atol=1e-8).all(axis=1)
        if differs.any():
            raise ValueError(
                f"perturbation_embeddings has other features than the model for {int(differs.sum())} names it was set "
                f"up with: {preview(np.array(other.names)[differs].tolist())}. Leave them out, or train again."
            )
        new = np.flatnonzero(at < 0)
        return FeatureTable(
            self.names + tuple(other.names[i] for i in new), np.concatenate([self.values, other.values[new]])
        )

    def rows(self, names: Sequence[str]) -> NDArray[np.float32]:
        """Values of `names`, NaN rows for those not in the table."""
        at = pd.Index(self.names).get_indexer(pd.Index(names))
        out = self.values[at].copy()
        out[at < 0] = np.nan
        return out


def _stack(table: Mapping[Any, Any], what: str) -> pd.DataFrame:
    """Vectors by name as a table."""
    widths = pd.Series({name: np.size(vector) for name, vector in table.items()}, dtype=int)
    if widths.nunique() > 1:
        usual = widths.mode().iloc[0]
        odd = widths[widths != usual]
        shown = pd.concat([widths[widths == usual].iloc[:1], odd.iloc[:10]])
        named = ", ".join(f"{name!r}: {width}" for name, width in shown.items())
        more = f", ... ({len(odd) - 10} more)" if len(odd) > 10 else ""
        raise ValueError(
            f"{what} has vectors of different lengths: {named}{more}. {len(widths) - len(odd)} have {usual} numbers."
        )
    return pd.DataFrame([np.ravel(vector) for vector in table.values()], index=list(table))


def _numbers(table: pd.DataFrame, names: pd.Index, what: str) -> NDArray[np.float32]:
    """Values in single precision, NaN where missing; a `TypeError` names columns and rows that hold none."""
    try:
        with np.errstate(over="ignore"):  # what is too large is told as infinite
            return table.to_numpy(dtype=np.float32)
    except (TypeError, ValueError):
        columns = [pd.to_numeric(table.iloc[:, i], errors="coerce") for i in range(table.shape[1])]
    read = pd.concat(columns, axis=1)
    wrong = (read.isna() & table.notna()).to_numpy()
    if wrong.any():
        rows, at = np.asarray(wrong.any(axis=1)), np.asarray(wrong.any(axis=0))
        example = table.iloc[int(rows.argmax()), int(wrong[rows.argmax()].argmax())]
        raise TypeError(
            f"{what} must hold numbers: columns {preview(table.columns[at])} hold others ({example!r}) for "
            f"{int(rows.sum())} names: {preview(names[rows])}."
        )
    return read.to_numpy(dtype=np.float32, na_value=np.nan)


def explain_unknown(unknown: Iterable[str], known: Iterable[str], has_features: bool) -> str:
    """Message for components without a learned name and without features."""
    known = sorted(known)
    nearest = [(name, closest(name, known)) for name in unknown]
    lines = [f"{name!r}" + (f" (nearest known: {preview(near)})" if near else "") for name, near in nearest]
    source = "a row in" if has_features else "features: set the model up with"
    return (
        f"{len(lines)} perturbation components were never seen in training: {'; '.join(lines[:10])}. "
        f"Known: {preview(known)}. To predict an unseen perturbation give it {source} perturbation_embeddings "
        "(a DataFrame with one row per component), at setup_anndata or in this call."
    )
