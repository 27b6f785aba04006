"""What messages and errors share: names that look alike, lists cut short, missing columns, what is no text."""

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


def did_you_mean(name: object, known: Iterable[object]) -> str:
    """The hint of an error at the names of `known` that look most like `name`; empty where none does."""
    near = closest(name, known)
    return f" Did you mean {preview(near)}?" if near else ""


def check_obs_keys(adata: AnnData, where: str = "adata", /, **keys: str | Iterable[str] | None) -> None:
    """:func:`check_obs_key` for the columns, if any, that each of several arguments names."""
    for argument, given in keys.items():
        for key in (given,) if isinstance(given, str) else given or ():
            check_obs_key(adata, key, argument, where)


def check_obs_key(adata: AnnData, key: str, argument: str, where: str = "adata") -> None:
    """Raise a `KeyError` that names `key` and the columns there are, unless `adata.obs` has it.

    `where` is what the user calls the cells.
    """
    if key not in adata.obs:
        raise KeyError(
            f"{argument}={key!r} is not a column of {where}.obs.{did_you_mean(key, adata.obs.columns)} "
            f"Columns: {preview(adata.obs.columns, 30)}."
        )


def check_text(names: Iterable[str], what: str) -> None:
    """Raise a `ValueError` for names that no file can hold."""
    names = list(map(str, names))
    if _is_text("".join(names)):
        return
    bad = [name for name in names if not _is_text(name)]
    raise ValueError(
        f"{what} has {len(bad)} names with NUL or half characters, which no file can hold: {preview(bad)}."
    )


def _is_text(text: str) -> bool:
    try:
        return b"\x00" not in text.encode()
    except UnicodeEncodeError:
        return False
