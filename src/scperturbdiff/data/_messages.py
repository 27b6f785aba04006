"""What messages and errors share: names that look alike, lists cut short, missing columns."""

from __future__ import annotations

from difflib import get_close_matches
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

    from anndata import AnnData


def closest(name: object, known: Iterable[object], n: int = 3) -> list[str]:
    """Names of `known` that look most like `name`, nearest first (for error messages)."""
    return get_close_matches(str(name), [str(k) for k in known], n=n, cutoff=0.4)


def preview(values: Iterable[object], limit: int = 10) -> str:
    """Comma-separated values, cut after `limit`, with the number left out."""
    listed = [repr(v) for v in values]
    more = f", ... ({len(listed) - limit} more)" if len(listed) > limit else ""
    return ", ".join(listed[:limit]) + more


def check_obs_key(adata: AnnData, key: str, argument: str) -> None:
    """Raise a `KeyError` that names `key` and the columns there are, unless `adata.obs` has it."""
    if key not in adata.obs:
        near = closest(key, adata.obs.columns)
        hint = f" Did you mean {preview(near)}?" if near else ""
        raise KeyError(
            f"{argument}={key!r} is not a column of adata.obs.{hint} Columns: {preview(adata.obs.columns, 30)}."
        )
