"""Among many training conditions those left out are predicted as by a search among all."""

from __future__ import annotations

import itertools
from dataclasses import replace
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from tests.retrieval.screens import responses, screen

from scperturbdiff.retrieval import Conditions, Retrieval, RetrievalSettings
from scperturbdiff.retrieval import _fitted as fitted_module
from scperturbdiff.retrieval import _search as search_module
from scperturbdiff.retrieval import _tables as tables_module
from scperturbdiff.retrieval._groups import Groups
from scperturbdiff.retrieval._search import Search
from scperturbdiff.retrieval._tables import Tables, solve_each, solve_together

if TYPE_CHECKING:
    from scperturbdiff.retrieval import Novelty

WAYS: tuple[Novelty, ...] = ("seen", "replicate", "pair", "context", "perturbation")
KINDS = ("plain", "doses", "features", "pairs", "states")
CONTROLS = "controls"
"""A further kind: conditions share controls. Many are equally near, of which any may be used."""
SETTINGS = RetrievalSettings(n_neighbors=12, n_left_out=40)
D = 4


def made(kind: str, apart: float = 0.1) -> tuple[Conditions, np.ndarray, np.ndarray | None]:
    """A screen of 300 populations; `apart`: by how much controls of one context differ between its populations."""
    rng = np.random.default_rng(0)
    shape = (5, 10, 3, 2)
    context, number, level, _ = np.array(list(itertools.product(*map(range, shape)))).T
    n = len(context)
    component = number[:, None]
    if kind == "pairs":
        component = np.column_stack([number, np.where(level == 0, -1, (number + level) % 10)])
    dose = np.zeros(component.shape)
    if kind == "doses":
        dose[:, 0] = level - 1
    centre = rng.normal(size=(shape[0], D))
    noise = rng.uniform(0.01, 0.1, n)
    known = Conditions(centre[context] + apart * rng.normal(size=(n, D)), component, dose, context, noise)
    if kind == "states":
        known = replace(known, population=np.arange(n) // 2, state=np.arange(n) % 2, mass=rng.uniform(0.2, 0.8, n))
    if kind == CONTROLS:  # populations of a context have one of two sets of controls
        place = (centre[:, None] + apart * rng.normal(size=(shape[0], 2, D)))[context, np.arange(n) % 2]
        known = replace(known, control_mean=place, noise=noise + 0.05, control_noise=np.full(n, 0.05))
    effect = rng.normal(size=(10, D)) + rng.normal(size=D)
    there = (component >= 0)[..., None]
    shift = (effect[np.maximum(component, 0)] * there * (1 + 0.3 * dose[..., None])).sum(1)
    shift = shift * (1 + 0.3 * np.tanh(centre[context, :1])) + np.sqrt(noise)[:, None] * rng.normal(size=(n, D))
    features = effect + 0.3 * rng.normal(size=effect.shape) if kind == "features" else None
    return known, shift, features


@lru_cache
def fit(kind: str, apart: float = 0.1) -> Retrieval:
    known, shift, features = made(kind, apart)
    rng = np.random.default_rng(1)
    measured = responses(known, shift, rng.normal(size=len(known)), rng.normal(size=len(known)))
    measured = replace(measured, residual=rng.normal(size=(len(known), 3)).astype(np.float16), fold=np.zeros((0, 0)))
    found = Retrieval.fit(measured, features, SETTINGS)
    # where contexts do not matter all are alike, and which of them are the nearest is arbitrary
    widths = {way: replace(w, context_share=max(w.context_share, 0.3)) for way, w in found.widths.items()}
    return replace(found, widths=widths)


def with_learned(retrieval: Retrieval, share: float) -> Retrieval:
    """Pairs rely on learned similarity by `share`, whether or not it helps here."""
    assert retrieval.similarity is not None
    pair = replace(retrieval.widths["pair"], response_share=share)
    return replace(retrieval, widths={**retrieval.widths, "pair": pair})


def among_many(monkeypatch: pytest.MonkeyPatch, looked_at: int = 16) -> None:
    """Every number of conditions counts as many, and few of them are looked at first."""
    monkeypatch.setattr(fitted_module, "BATCHED", 0)
    monkeypatch.setattr(search_module, "LOOKED_AT", looked_at)
    monkeypatch.setattr(search_module, "ENOUGH", 1)


@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_neighbours_weights_and_variances_are_those_of_a_search_among_all(
    kind: str, whole: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    fitted = fit(kind)
    shares = (0.0, 0.5, 1.0) if fitted.similarity is not None else (0.0,)
    rows = np.random.default_rng(2).permutation(len(fitted.responses))[:80]
    ways = [way for way in WAYS if way != "perturbation" or kind == "features"]
    cases = [(with_learned(fitted, share) if share else fitted, way) for share in shares for way in ways]
    before = [retrieval.leave_out(way, rows, with_genes=True) for retrieval, way in cases]
    among_many(monkeypatch)
    if not whole:
        monkeypatch.setattr(tables_module, "WHOLE", 0)
    for (retrieval, way), one in zip(cases, before, strict=True):
        two = retrieval.leave_out(way, rows, with_genes=True)
        for name in ("shift", "spread", "library", "residual", "fold", "variance", "prior_variance"):
            np.testing.assert_allclose(getattr(two, name), getattr(one, name), atol=1e-7, err_msg=f"{name} {way}")
        assert two.novelty == one.novelty
        assert np.abs(one.shift).max() > 0.5


@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize("n_neighbors", [11, 192])
def test_what_replicates_have_in_common_is_known_there_too(
    whole: bool, n_neighbors: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    known = screen(6, 10, 3)
    shift = np.random.default_rng(0).normal(size=(len(known), D))
    fitted = Retrieval.fit(responses(known, shift), settings=replace(SETTINGS, n_neighbors=n_neighbors))
    widths = replace(fitted.widths["replicate"], own_share=0.7, context_share=0.4)
    fitted = replace(fitted, widths=dict.fromkeys(("replicate", "seen", "pair"), widths))
    before = {way: fitted.leave_out(way) for way in fitted.widths}
    among_many(monkeypatch)
    if not whole:
        monkeypatch.setattr(tables_module, "WHOLE", 0)
    for way, one in before.items():
        two = fitted.leave_out(way)
        for name in ("shift", "variance", "prior_variance"):
            np.testing.assert_allclose(getattr(two, name), getattr(one, name), atol=1e-7, err_msg=f"{name} {way}")


@pytest.mark.parametrize("kind", [*KINDS, CONTROLS])
def test_where_all_are_neighbours(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    fitted = fit(kind)
    fitted = replace(fitted, settings=replace(SETTINGS, n_neighbors=10**6))
    ways: tuple[Novelty, ...] = ("replicate", "pair", "context")
    rows = np.arange(0, len(fitted.responses), 29)
    before = [fitted.leave_out(way, rows) for way in ways]
    among_many(monkeypatch)
    for way, one in zip(ways, before, strict=True):
        two = fitted.leave_out(way, rows)
        np.testing.assert_allclose(two.shift, one.shift, atol=1e-7)
        np.testing.assert_allclose(two.variance, one.variance, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("novelty", ["replicate", "pair", "context", "perturbation"])
@pytest.mark.parametrize("kind", ["plain", "doses", "features", CONTROLS])
def test_none_that_is_left_is_nearer_and_few_are_looked_at(
    kind: str, novelty: Novelty, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where many are equally near, controls of a context being the same."""
    among_many(monkeypatch, looked_at=64)
    fitted = fit(kind, apart=0.0)
    known, kernel = fitted.responses.conditions, fitted._kernel(fitted.widths[novelty])
    tables = Tables(kernel, known, known.noise, torch.device("cpu"))
    looked_at: list[int] = []
    among = Search._among

    def watched(self: Search, asked, rows, treatment, first, n):  # type: ignore[no-untyped-def]
        looked_at.extend([n] * len(asked))
        return among(self, asked, rows, treatment, first, n)

    monkeypatch.setattr(Search, "_among", watched)
    rows, k = np.arange(0, len(known), 7), 12
    barred = known.take(rows).barred(known, novelty)
    size = np.where(barred, -1.0, np.abs(kernel(known.take(rows), known)))
    found = list(Search(tables, novelty, True, k).of(rows))
    assert sorted(np.concatenate([part.asked for part in found])) == list(range(len(rows)))
    for part in found:
        mine = np.take_along_axis(size[part.asked], part.near, axis=1)
        best = -np.sort(-size[part.asked], axis=1)[:, :k]
        np.testing.assert_allclose(-np.sort(-mine, axis=1), best, rtol=1e-9)
        assert not part.barred.any()
        assert all(len(set(near)) == k for near in part.near)
    assert np.mean(looked_at) < len(known)


def test_tables_make_up_the_kernel() -> None:
    for kind in (*KINDS, CONTROLS):
        fitted = fit(kind)
        if fitted.similarity is not None:
            fitted = with_learned(fitted, 0.5)
        learned = None if fitted.similarity is None else fitted.similarity.whole
        kernel, known = fitted._kernel(fitted.widths["pair"], learned), fitted.responses.conditions
        mean, differs, of_pairs = kernel.parts(known, known)
        near = kernel.contexts(known.control_mean, known.control_mean) - kernel.flat
        whole = kernel.flat * mean + differs * near
        if of_pairs is not None and learned is not None:
            whole = whole + of_pairs * learned.of_contexts(known.site, known.site)
        np.testing.assert_allclose(whole + kernel.of_controls(known, known), kernel(known, known), atol=1e-10)


def test_systems_are_solved_together_or_one_by_one() -> None:
    """Also one that is not positive."""
    rng = np.random.default_rng(0)
    root = rng.normal(size=(4, 9, 9))
    system = root @ root.transpose(0, 2, 1) + np.eye(9)
    system[2] -= 5 * np.eye(9)
    assert np.linalg.eigvalsh(system[2]).min() < -1
    right = rng.normal(size=(4, 9, 1))
    wanted = np.linalg.solve(system, right)
    for solve in (solve_each, solve_together):
        found = solve(torch.as_tensor(system.copy()), torch.as_tensor(right)).numpy()
        np.testing.assert_allclose(found, wanted, rtol=1e-8)


def test_groups() -> None:
    labels, numbers = np.array([3, 1, 3, 1, 3]), np.array([[0.5, 1], [2, 2], [0.5, 1], [2, 2], [0.5, 2]])
    groups = Groups.of(labels, numbers)
    members = [groups.members(np.array([group])).tolist() for group in range(len(groups))]
    assert sorted(members) == [[0, 2], [1, 3], [4]]
    assert groups.count.tolist() == [len(rows) for rows in members]
    for group, rows in enumerate(members):
        assert (groups.code[rows] == group).all()
        assert groups.first[group] in rows
    order = np.array([2, 0])
    assert groups.members(order).tolist() == members[2] + members[0]
