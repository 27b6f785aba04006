"""Features of perturbation components."""

from __future__ import annotations

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


@dataclass(frozen=True)
class FeatureTable:
    """Features of components: `names` and `values` `(len(names), n_features)`, finite."""

    names: tuple[str, ...]
    values: NDArray[np.float32]

    @classmethod
    def parse(cls, table: Any, adata: AnnData | None = None) -> FeatureTable:
        """Read a DataFrame (rows are components), a dict of vectors, or a key of `adata.uns` that holds one.

        Raises where the key is not there, names repeat, lengths differ or values are not finite, and lists the names.
        """
        if isinstance(table, FeatureTable):
            return table
        if isinstance(table, str):
            uns = {} if adata is None else adata.uns
            if table not in uns:
                raise KeyError(
                    f"perturbation_embeddings={table!r} is not in adata.uns. Keys: {preview(uns.keys(), 30)}."
                )
            return cls.parse(uns[table])
        if isinstance(table, Mapping):
            lengths = {str(k): np.size(v) for k, v in table.items()}
            if len(set(lengths.values())) > 1:
                raise ValueError(f"perturbation_embeddings has vectors of different lengths: {lengths}.")
            table = pd.DataFrame([np.ravel(v) for v in table.values()], index=list(table))
        if not isinstance(table, pd.DataFrame):
            raise TypeError(
                f"perturbation_embeddings must be a DataFrame (rows are components), a dict of vectors or a key of "
                f"adata.uns, not {type(table).__name__}."
            )
        names = table.index.astype(str).str.strip()  # as labels are read
        if len(repeated := names[names.duplicated()].unique()):
            raise ValueError(f"perturbation_embeddings has duplicated names: {preview(repeated)}.")
        try:
            values = table.to_numpy(dtype=np.float32)
        except (TypeError, ValueError) as error:
            raise TypeError(f"perturbation_embeddings must hold numbers: {error}.") from None
        if values.shape[0] == 0 or values.shape[1] == 0:
            raise ValueError(f"perturbation_embeddings is empty: shape {values.shape}.")
        bad = ~np.isfinite(values).all(axis=1)
        if bad.any():
            raise ValueError(
                f"perturbation_embeddings has NaN or infinite values for {int(bad.sum())} names: {preview(names[bad])}."
            )
        return cls(tuple(names), values)

    def extended(self, other: FeatureTable) -> FeatureTable:
        """The table with the names of `other` added; raises where widths, or features that both have, differ."""
        if other.values.shape[1] != self.values.shape[1]:
            raise ValueError(
                f"perturbation_embeddings has {other.values.shape[1]} features, the model was set up with "
                f"{self.values.shape[1]}."
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
