"""The training conditions that are most correlated with others, without looking at all of them."""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from scperturbdiff.retrieval._tables import Near

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

    from scperturbdiff.retrieval._conditions import Floats, Novelty
    from scperturbdiff.retrieval._tables import Tables

    Codes = NDArray[np.int64]

LOOKED_AT, ENOUGH = 1024, 4
"""Conditions that are looked at first in either order, and how many times the neighbours wanted, at least."""
TREATMENTS, ASKED = 64, 128
"""Treatments, and conditions of one, that are searched at a time."""
CACHED = 256
"""Places whose surroundings are kept."""


class Surroundings(NamedTuple):
    """Conditions at the places most like one `(m,)`; the largest covariances of the others.

    By similarity, learned, and of the errors of the same controls.
    """

    rows: Codes
    similar: float
    learned: float
    shared: float


class _Treatment(NamedTuple):
    """A treatment against all: flat and other covariance, the learned one, which it equals, which may not be used."""

    code: int
    flat: Floats
    differs: Floats
    learned: Floats
    same: NDArray[np.bool_]
    closed: NDArray[np.bool_]

    def reach(self, similar: float, learned: float, of: NDArray[np.bool_] | slice = slice(None)) -> Floats:
        """Covariance in size, at most, with treatments at places of this similarity and learned covariance."""
        flat, differs, also = (np.abs(field[of]) for field in (self.flat, self.differs, self.learned))
        out: Floats = flat + differs * similar + also * learned
        return out


class Search:
    """Searches neighbours of training conditions that are left out.

    The covariance of treatments `g` with the one asked is :math:`a_g + b_g c + d_g l` at a place of similarity `c` and
    learned covariance `l`. Looked at are the treatments for which it can be largest, everywhere, and the places most
    like the one asked, with every treatment. It cannot be larger elsewhere than with the largest `c` and `l` that are
    left: if as many as wanted are larger, these are the nearest. Else more are looked at, in the end all.

    Parameters
    ----------
    tables
        The kernel, taken apart.
    novelty, leave
        What may not be used; see :meth:`Conditions.excluded` and :meth:`Conditions.barred`.
    k
        Neighbours of each.
    """

    def __init__(self, tables: Tables, novelty: Novelty, leave: bool, k: int) -> None:
        self.tables, self.novelty, self.leave, self.k = tables, novelty, leave, k
        self.known, self.treatments, self.places = tables.known, tables.treatments, tables.places
        self.context, self.controls = tables.place.context, tables.controls[tables.places.first]
        self.site = tables.place.site
        self._surroundings = lru_cache(CACHED)(self._look_around)

    def of(self, rows: Codes) -> Iterator[Near]:
        """Neighbours of the training conditions `rows`, some at a time, those of one treatment together."""
        code = self.treatments.code[rows]
        order = np.argsort(code, kind="stable")
        groups, start = np.unique(code[order], return_index=True)
        members = np.split(order, start[1:])
        for at in range(0, len(groups), TREATMENTS):
            block = groups[at : at + TREATMENTS]
            mine = self.tables.treatment.take(block)
            flat, differs, learned = self.tables.of_treatments(block, slice(None))
            same = mine.same_perturbation(self.tables.treatment)
            shares = self.novelty == "perturbation"
            closed = mine.share_component(self.tables.treatment) if shares else np.zeros_like(same)
            for i in range(len(block)):
                none = np.zeros_like(flat[i])
                treatment = _Treatment(
                    int(block[i]),
                    self.tables.kernel.flat * flat[i],
                    differs[i],
                    none if learned is None else learned[i],
                    same[i],
                    closed[i],
                )
                asked = members[at + i]
                for part in range(0, len(asked), ASKED):
                    yield from self._nearest(asked[part : part + ASKED], rows, treatment)

    def _nearest(self, asked: Codes, rows: Codes, treatment: _Treatment) -> Iterator[Near]:
        """Of conditions with one treatment."""
        looked_at, n = max(LOOKED_AT, ENOUGH * self.k), len(self.known)
        reach = treatment.reach(self.tables.most_similar, self.tables.most_learned)
        reach[treatment.code] += self.tables.own
        order = np.argsort(-np.where(treatment.closed, -1.0, reach), kind="stable")
        upto = np.cumsum(self.treatments.count[order])
        while len(asked):
            first = order[: np.searchsorted(upto, looked_at) + 1]
            found, sure = self._among(asked, rows[asked], treatment, first, looked_at)
            sure |= looked_at >= n
            yield Near._make(field[sure] for field in found)
            asked, looked_at = asked[~sure], 4 * looked_at

    def _among(
        self, asked: Codes, rows: Codes, treatment: _Treatment, first: Codes, looked_at: int
    ) -> tuple[Near, NDArray[np.bool_]]:
        """The nearest among all conditions with the treatments `first` and those at the most similar places."""
        there = treatment.closed.copy()
        there[first] = True
        places, at = np.unique(self.places.code[rows], return_inverse=True)
        around = [self._surroundings(int(place), looked_at) for place in places]
        others = [part.rows[~there[self.treatments.code[part.rows]]] for part in around]
        common = self.treatments.members(first)
        seen = np.full((len(places), len(common) + max(map(len, others))), -1)
        seen[:, : len(common)] = common
        for row, other in zip(seen, others, strict=True):
            row[len(common) : len(common) + len(other)] = other
        if seen.shape[1] < self.k:
            seen = np.pad(seen, ((0, 0), (0, self.k - seen.shape[1])), constant_values=-1)
        missing, seen = seen < 0, np.maximum(seen, 0)
        treated, where = self.treatments.code[seen], self.places.code[seen]
        similar, learned = self.tables.of_places(places, slice(None))
        covariance = treatment.flat[treated] + treatment.differs[treated] * np.take_along_axis(similar, where, 1)
        if learned is not None:
            covariance += treatment.learned[treated] * np.take_along_axis(learned, where, 1)
        shared = self.tables.shared[self.places.first]
        covariance += np.where(self.controls[where] == self.controls[places][:, None], shared[where], 0.0)
        own = self.tables.own * (treated == treatment.code) * (self.site[where] == self.site[places][:, None])
        covariance += own
        barred = missing | treatment.closed[treated]
        if self.novelty in ("context", "pair"):
            own = self.context[where] == self.context[places][:, None]
            barred |= own if self.novelty == "context" else own & treatment.same[treated]
        size, barred, seen = (table[at] for table in (np.where(barred, -1.0, np.abs(covariance)), barred, seen))
        if self.leave:
            own = self.known.population[seen] == self.known.population[rows][:, None]
            size[own], barred = -1.0, barred | own
        near = np.sort(np.argpartition(-size, self.k - 1, axis=1)[:, : self.k], axis=1)  # those of a treatment together
        worst = np.take_along_axis(size, near, 1).min(1)
        none = [part.similar < 0 for part in around]  # no place is left
        most = [treatment.reach(part.similar, part.learned, ~there).max(initial=0.0) + part.shared for part in around]
        sure = (worst >= np.array(most)[at] * (1 - 1e-12)) | np.array(none)[at]

        def of_near(values: NDArray) -> NDArray:
            return np.take_along_axis(values, near, axis=1)

        not_used, chosen = of_near(barred), of_near(seen)
        flat = treatment.flat[self.treatments.code[chosen]]
        used, flat = (np.where(not_used, 0.0, values) for values in (of_near(covariance[at]), flat))
        variance = treatment.differs[treatment.code] * similar[np.arange(len(places)), places]
        if learned is not None:
            variance += treatment.learned[treatment.code] * learned[np.arange(len(places)), places]
        variance += shared[places] + self.tables.own
        return Near(asked, variance[at], chosen, used, flat, not_used), sure

    def _look_around(self, place: int, looked_at: int) -> Surroundings:
        similar, learned = self.tables.of_places(np.array([place]), slice(None))
        size = np.zeros_like(similar[0]) if learned is None else np.abs(learned[0])
        share = self.tables.kernel.widths.response_share
        same = self.controls == self.controls[place]
        nearness = np.where(same, np.inf, (1 - share) * similar[0] + share * size)
        order = np.argsort(-nearness, kind="stable")
        if self.novelty == "context":
            order = order[self.context[order] != self.context[place]]
        n = int(np.searchsorted(np.cumsum(self.places.count[order]), looked_at)) + 1
        rest = order[n:]
        shared = self.tables.shared[self.places.first][rest] * same[rest]
        return Surroundings(
            self.places.members(order[:n]),
            similar[0, rest].max(initial=-1.0),
            size[rest].max(initial=0.0),
            shared.max(initial=0.0),
        )
