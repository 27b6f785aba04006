"""Names that are wanted, and the rows of a table that have them."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import pandas as pd

from scperturbdiff.arguments import check_choice, check_texts, check_type
from scperturbdiff.data import closest, preview

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

logger = logging.getLogger(__name__)

Missing = Literal["warn", "error"]
"""What is done about names without a row: they are named and left out, or an error."""
SHOWN = 10
"""Names that a message explains, at most."""


@dataclass(frozen=True)
class Wanted:
    """Rows of a table that a user wants.

    Attributes
    ----------
    argument
        What the user names them with.
    names
        Their names; `None`: all rows.
    aliases
        Alias to name.
    missing
        What is done about names without a row.
    """

    argument: str
    names: tuple[str, ...] | None
    aliases: Mapping[str, str]
    missing: Missing

    @classmethod
    def of(cls, argument: str, names: Any, aliases: Mapping[str, str] | pd.Series | None, missing: Missing) -> Wanted:
        """What a user gave, checked."""
        check_choice("missing", missing, ("warn", "error"))
        return cls(argument, None if names is None else check_names(argument, names), check_aliases(aliases), missing)

    def rows(
        self,
        known: Sequence[str],
        *,
        where: str,
        table: str,
        remedy: str,
        lacks: Callable[[str], str] = lambda name: "",
        unfit: Callable[[int], str] = lambda row: "",
    ) -> dict[str, int]:
        """Row of each name that has one, in the order of the names; others are told, see :func:`tell_missing`.

        Parameters
        ----------
        known
            Names of the rows there are.
        where, table, remedy
            Where names are looked up and what has the rows, in messages, and what may be done.
        lacks
            Why a name has no row; empty: the nearest names are told.
        unfit
            Why a row is none to be used; empty: it is one.
        """
        names = self.names or ()
        found = find_rows(names, known, self.aliases, where)
        near = nearest([name for name in names if name not in found], known)
        reasons = {name: lacks(name) or why for name, why in near.items()}
        reasons |= {name: why for name, row in found.items() if (why := unfit(row))}
        tell_missing(reasons, len(names), self.argument, table, self.missing, remedy)
        return {name: row for name, row in found.items() if name not in reasons}


def check_names(argument: str, names: Any) -> tuple[str, ...]:
    """Names as labels are read, without spaces at their ends; repeated, empty or no names raise."""
    found = tuple(text.strip() for text in check_texts(argument, names))
    if isinstance(names, set | frozenset):
        found = tuple(sorted(found))
    index = pd.Index(found, dtype=object)
    if len(repeated := index[index.duplicated()].unique()):
        raise ValueError(f"{argument} has repeated names: {preview(repeated)}. Each is allowed once.")
    if not found or "" in found:
        raise ValueError(f"{argument} has {'an empty name' if found else 'no names'}; give one name or more.")
    return found


def check_aliases(aliases: Mapping[str, str] | pd.Series | None) -> dict[str, str]:
    """Aliases as a dictionary from alias to name; what is no text, or an alias of two names, raises."""
    check_type("aliases", aliases, (Mapping, pd.Series, type(None)), "a mapping from alias to name, or None")
    pairs = [] if aliases is None else [(alias, name) for alias, name in aliases.items()]
    if wrong := [pair for pair in pairs if not all(isinstance(part, str) for part in pair)]:
        raise TypeError(f"aliases must map text to text: {preview(wrong)}.")
    out: dict[str, str] = {}
    for alias, name in pairs:
        key, value = str(alias).strip(), str(name).strip()
        if out.setdefault(key, value) != value:
            raise ValueError(f"aliases has {key!r} twice, for {out[key]!r} and {value!r}. Choose one.")
    return out


def find_rows(wanted: Sequence[str], known: Sequence[str], aliases: Mapping[str, str], where: str) -> dict[str, int]:
    """Rows of `known` that wanted names have: by name, by what they are an alias of, or as aliases of one name.

    Names that are not found are left out; aliases that lead to several rows raise a `ValueError`.
    """
    position: dict[str, int] = {}
    for i, name in enumerate(known):
        position.setdefault(name, i)
    by_meaning: dict[str, list[int]] = {}
    for name, i in position.items():
        if name in aliases:
            by_meaning.setdefault(aliases[name], []).append(i)
    out: dict[str, int] = {}
    for name in wanted:
        meant = aliases.get(name, name)
        rows = by_meaning.get(meant, [])
        if name in position or meant in position:
            out[name] = position[name if name in position else meant]
        elif len(rows) > 1:
            raise ValueError(
                f"{name!r} could be {preview(known[i] for i in rows)} in {where}, all aliases of {meant!r}. "
                f"Choose one: aliases={{{name!r}: ...}}."
            )
        elif rows:
            out[name] = rows[0]
    return out


def tell_missing(
    reasons: Mapping[str, str], n_wanted: int, what: str, where: str, missing: Missing, remedy: str = ""
) -> None:
    """Name what was not found, and why: a warning, or a `KeyError` where `missing` says so or nothing was found.

    Parameters
    ----------
    reasons
        Name to the reason, which may be empty.
    n_wanted, what, where
        How many names were wanted, what they are called (`"genes"`), and where they were looked up.
    missing
        See :data:`Missing`.
    remedy
        What may be done, as a sentence.
    """
    if not reasons:
        return
    named = "; ".join(f"{name!r} ({why})" if why else repr(name) for name, why in list(reasons.items())[:SHOWN])
    more = f"; ... ({len(reasons) - SHOWN} more)" if len(reasons) > SHOWN else ""
    text = f"{len(reasons)} of {n_wanted} {what} have no row in {where}: {named}{more}."
    if missing == "error" or len(reasons) == n_wanted:
        raise KeyError(f"{text} {remedy}".strip())
    logger.warning("%s They are left out. %s", text, remedy)


def nearest(names: Iterable[str], known: Sequence[str]) -> dict[str, str]:
    """Name to the names of `known` that look most like it, as reasons of :func:`tell_missing`.

    Those that a message would cut are not looked up: that takes time where many names are known.
    """
    out = {}
    for i, name in enumerate(names):
        near = closest(name, known) if i < SHOWN else []
        out[name] = f"nearest: {preview(near)}" if near else ""
    return out
