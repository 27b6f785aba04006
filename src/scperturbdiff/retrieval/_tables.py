"""The kernel of many training conditions, put together from small tables, and systems of neighbours solved together."""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from scipy.linalg.lapack import dposv

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

    from scperturbdiff.retrieval._conditions import Conditions, Floats
    from scperturbdiff.retrieval._groups import Groups
    from scperturbdiff.retrieval._kernel import ResponseKernel

    Codes = NDArray[np.int64]
    Parts = tuple[Floats | None, ...]

WHOLE = 2048
"""Tables of so many treatments or places are made once; of more, those of the neighbours at hand."""
BARRED = 1e12
"""Variance of the noise of what may not be used."""


class Near(NamedTuple):
    """The `k` nearest of `q` conditions.

    Which were asked and their variance without the flat prior `(q,)`; the numbers of the nearest, their covariance with
    those asked, the part of it that comes from the flat prior, and which may not be used, `(q, k)` each.
    """

    asked: Codes
    variance: Floats
    near: Codes
    covariance: Floats
    from_flat: Floats
    barred: NDArray[np.bool_]

    def take(self, rows: slice) -> Near:
        return Near._make(field[rows] for field in self)

    @classmethod
    def join(cls, parts: list[Near]) -> Near:
        return cls._make(np.concatenate(fields) for fields in zip(*parts, strict=True))


class Kriged(NamedTuple):
    """Which were asked, `(q,)`, their neighbours and weights, `(q, k)`, variance before and after, `(q,)`."""

    rows: Codes | slice
    near: Codes
    weights: Floats
    prior: Floats
    variance: Floats


class Tables:
    """Covariances of treatments and of places (see :meth:`ResponseKernel.parts`).

    Parameters
    ----------
    kernel
        Covariance of responses.
    known
        Training conditions.
    noise
        Variance of their measurements in units of the kernel, the nugget included, `(n,)`.
    device
        Where systems are solved.
    """

    def __init__(self, kernel: ResponseKernel, known: Conditions, noise: Floats, device: torch.device) -> None:
        self.kernel, self.known, self.noise, self.device = kernel, known, noise, device
        self.treatments, self.places = known.treatment_groups, known.place_groups
        self.treatment, self.place = known.take(self.treatments.first), known.take(self.places.first)
        self.controls, self.shared = known.control_groups.code, known.control_noise / kernel.signal
        self.own = kernel.widths.own_share
        self.condition = self.treatments.code * (int(known.site.max(initial=0)) + 1) + known.site

    def of_treatments(self, groups: Codes, others: Codes | slice) -> tuple[Floats, Floats, Floats | None]:
        """What depends on treatments alone, `(len(groups), len(others))` each."""
        return self.kernel.parts(self.treatment.take(groups), self.treatment.take(others))

    def of_places(self, groups: Codes, others: Codes | slice) -> tuple[Floats, Floats | None]:
        """Similarity of places, more than 0, and the learned covariance of their contexts."""
        if len(self.places) <= WHOLE:
            similar, learned = self._all_places
            rows = np.asarray(groups)
            return similar[rows][:, others], None if learned is None else learned[rows][:, others]
        return self._between_places(self.place.take(groups), self.place.take(others))

    def _between_places(self, a: Conditions, b: Conditions) -> tuple[Floats, Floats | None]:
        learned = self.kernel.learned if self.kernel.widths.response_share else None
        similar = self.kernel.contexts(a.control_mean, b.control_mean) - self.kernel.flat
        return similar, None if learned is None else learned.of_contexts(a.site, b.site)

    @property
    def most_similar(self) -> float:
        """Similarity of places, at most."""
        return 1 + self.kernel.widths.context_share

    @cached_property
    def most_learned(self) -> float:
        """Learned covariance of contexts in size, at most."""
        learned = self.kernel.learned
        return 0.0 if learned is None else float(np.abs(learned.context_covariance).max())

    @cached_property
    def _all_places(self) -> tuple[Floats, Floats | None]:
        return self._between_places(self.place, self.place)

    @cached_property
    def _all(self) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """Whole tables of treatments and of places on the device, where they are small."""
        many = [len(groups) > WHOLE for groups in (self.treatments, self.places)]
        every = np.arange(len(self.treatments))
        return (
            [] if many[0] else self._put(self.of_treatments(every, slice(None))),
            [] if many[1] else self._put(self._all_places),
        )

    def _put(self, tables: Parts) -> list[torch.Tensor]:
        return [torch.as_tensor(table, device=self.device) for table in tables if table is not None]

    def _among(
        self, groups: Groups, near: Codes, whole: list[torch.Tensor], some: Callable[[Codes, Codes], Parts]
    ) -> list[torch.Tensor]:
        """Covariances of the groups of each condition's neighbours, `(q, k, k)` each."""
        code, tables = groups.code[near], whole
        if not whole:
            used, code = np.unique(code, return_inverse=True)
            tables = self._put(some(used, used))
        at = torch.as_tensor(code.reshape(near.shape), dtype=torch.int32, device=self.device)
        flat = (at[:, :, None] * len(tables[0]) + at[:, None, :]).view(-1)
        return [table.reshape(-1).index_select(0, flat).view(*near.shape, near.shape[1]) for table in tables]

    def solve(self, found: Near) -> Kriged:
        """Weights of the neighbours, and variances."""
        near = found.near
        treatments, places = self._all
        mean, usual, *learned = self._among(self.treatments, near, treatments, self.of_treatments)
        similar, *contexts = self._among(self.places, near, places, self.of_places)
        usual.mul_(similar)  # where the prior is flat, its variance says nothing
        if learned:
            usual.addcmul_(learned[0], contexts[0])
        if self.shared.any():
            controls, shared = (torch.as_tensor(x[near], device=self.device) for x in (self.controls, self.shared))
            usual.add_((controls[:, :, None] == controls[:, None, :]) * shared[:, :, None])
        if self.own:
            condition = torch.as_tensor(self.condition[near], device=self.device)
            usual.add_(condition[:, :, None] == condition[:, None, :], alpha=self.own)
        system = mean.mul_(self.kernel.flat).add_(usual)
        endless = torch.as_tensor(found.barred, dtype=torch.float64, device=self.device) * BARRED
        system.diagonal(dim1=1, dim2=2).add_(torch.as_tensor(self.noise[near], device=self.device)).add_(endless)
        solve = solve_each if self.device.type == "cpu" else solve_together
        weights = solve(system, torch.as_tensor(found.covariance, device=self.device)[..., None])
        among = (weights.mT @ usual @ weights).view(-1).cpu().numpy()
        weight = weights[..., 0].cpu().numpy()
        explained = 2 * (weight * (found.covariance - found.from_flat)).sum(1) - among
        prior = found.variance + self.kernel.widths.nugget
        variance = np.clip(prior - explained + (weight**2 * self.noise[near]).sum(1), 0, prior)
        return Kriged(found.asked, near, weight, prior, variance)


def solve_together(system: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """Solutions of symmetric systems `(q, k, k)` for `(q, k, 1)`, by their Cholesky factors."""
    root, failed = torch.linalg.cholesky_ex(system)
    if failed.any():  # not positive to the last digits
        return torch.linalg.solve(system, right)
    half = torch.linalg.solve_triangular(root, right, upper=False)
    return torch.linalg.solve_triangular(root.mT, half, upper=True)


def solve_each(system: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """The same one by one, for a CPU, where torch takes twice as long; `system` is overwritten."""
    out = np.empty(right.shape)
    for row, (matrix, one) in enumerate(zip(system.numpy(), right.numpy(), strict=True)):
        diagonal = matrix.diagonal().copy()
        _, out[row], failed = dposv(matrix.T, one, overwrite_a=True)  # the upper triangle stays
        if failed:
            above = np.triu(matrix, 1)
            out[row] = np.linalg.solve(above + above.T + np.diag(diagonal), one)
    return torch.as_tensor(out)
