"""The terms of an ontology and what they are part of, from a file in OBO format."""

from __future__ import annotations

import logging
from collections import defaultdict
from dataclasses import dataclass
from graphlib import CycleError, TopologicalSorter
from typing import TYPE_CHECKING

import numpy as np
from scipy import sparse

from scperturbdiff.data import preview
from scperturbdiff.features._files import iter_lines, reading

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

logger = logging.getLogger(__name__)

Stanza = dict[str, list[str]]


@dataclass(frozen=True)
class Ontology:
    """Terms in use and their parents.

    Attributes
    ----------
    terms, namespaces
        Identifier and namespace of each term; the latter is empty where the file gives none.
    parents
        Positions of the terms that each one is a, or is part of.
    position
        Position of a term by its identifier, by an alternative one, or by that of an obsolete term it replaces.
    obsolete
        Obsolete terms that no single term replaces.
    """

    terms: tuple[str, ...]
    namespaces: tuple[str, ...]
    parents: tuple[tuple[int, ...], ...]
    position: Mapping[str, int]
    obsolete: frozenset[str]

    def ancestors(self) -> sparse.csr_matrix:
        """Boolean matrix `(n_terms, n_terms)`: what each term (row) is or is part of, itself included."""
        found: dict[int, set[int]] = {}
        try:
            for term in TopologicalSorter(dict(enumerate(self.parents))).static_order():
                found[term] = {term}.union(*(found[parent] for parent in self.parents[term]))
        except CycleError as error:
            circle = " -> ".join(self.terms[i] for i in error.args[1])
            raise ValueError(f"The ontology has a circle of is_a and part_of: {circle}.") from None
        n = len(self.terms)
        start = np.cumsum([0, *(len(found[i]) for i in range(n))])
        columns = np.fromiter((j for i in range(n) for j in sorted(found[i])), np.int64, int(start[-1]))
        return sparse.csr_matrix((np.ones(len(columns), np.bool_), columns, start), shape=(n, n))


def read_ontology(path: Path) -> Ontology:
    """Read the `[Term]` stanzas of an OBO file; a file without any raises a `ValueError` that names it."""
    with reading(path, "OBO"):
        stanzas = list(_stanzas(path))
    terms: dict[str, Stanza] = {}
    for stanza in stanzas:
        if not (name := _first(stanza, "id")):
            raise ValueError(f"{str(path)!r} has a [Term] without id (name {_first(stanza, 'name')!r}).")
        if name in terms:
            raise ValueError(f"{str(path)!r} has the term {name!r} twice.")
        terms[name] = stanza
    current = [name for name, stanza in terms.items() if _first(stanza, "is_obsolete") != "true"]
    if not current:
        raise ValueError(f"{str(path)!r} holds no [Term] in use. A file in OBO format is needed, go-basic.obo for one.")
    position = {name: i for i, name in enumerate(current)}
    for name in current:
        for other in terms[name].get("alt_id", ()):
            position.setdefault(other, position[name])
    obsolete = set(terms) - set(current)
    for name in sorted(obsolete):
        if (at := _replacement(name, terms, position)) is not None:
            position.setdefault(name, at)
    parents = tuple(_parents(terms[name]) for name in current)
    unknown = sorted({parent for found in parents for parent in found if parent not in position})
    if unknown:
        logger.warning(
            "%d parents are no terms in use of %s and are left out: %s.", len(unknown), path, preview(unknown)
        )
    return Ontology(
        terms=tuple(current),
        namespaces=tuple(_first(terms[name], "namespace") for name in current),
        parents=tuple(tuple(sorted({position[p] for p in found if p in position})) for found in parents),
        position=position,
        obsolete=frozenset(name for name in obsolete if name not in position),
    )


def _stanzas(path: Path) -> Iterator[Stanza]:
    """Tags of each `[Term]` and their values, without comments and modifiers."""
    stanza: Stanza | None = None
    for _, line in iter_lines(path):
        if line.startswith("["):
            if stanza is not None:
                yield stanza
            stanza = defaultdict(list) if line.strip() == "[Term]" else None
        elif stanza is not None and ":" in line:
            tag, _, value = line.partition(":")
            if tag in ("id", "alt_id", "is_a", "namespace", "is_obsolete", "replaced_by"):
                stanza[tag].append(value.split()[0] if value.strip() else "")
            elif tag in ("name", "relationship"):
                stanza[tag].append(value.strip())
    if stanza is not None:
        yield stanza


def _first(stanza: Stanza, tag: str) -> str:
    return next(iter(stanza.get(tag, ())), "")


def _parents(stanza: Stanza) -> tuple[str, ...]:
    related = (value.split() for value in stanza.get("relationship", ()))
    wholes = (words[1] for words in related if len(words) > 1 and words[0] == "part_of")
    return (*stanza.get("is_a", ()), *wholes)


def _replacement(name: str, terms: Mapping[str, Stanza], position: Mapping[str, int]) -> int | None:
    """Position of the term that replaces an obsolete one, over as many steps as there are; `None` if none does."""
    passed: set[str] = set()
    while name not in position:
        replaced = terms[name].get("replaced_by", ()) if name in terms else ()
        if len(replaced) != 1 or name in passed:  # several: nobody can tell which one is meant
            return None
        passed.add(name)
        name = next(iter(replaced))
    return position[name]
