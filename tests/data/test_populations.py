"""Populations and their matched controls."""

from __future__ import annotations

import logging
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scperturbdiff.data import (
    ConditionSpace,
    Groups,
    PopulationTable,
    build_populations,
    group_rows,
    match_controls,
)
from scperturbdiff.data._setup import learn_conditions
from scperturbdiff.datasets import simulate
from scperturbdiff.model import DESCRIBED

SETTINGS = settings(max_examples=40, deadline=None, derandomize=True)


def learn(adata: ad.AnnData, **kwargs: Any) -> ConditionSpace:
    arguments: dict[str, Any] = dict.fromkeys(DESCRIBED)
    arguments |= {"perturbation_key": "perturbation", "control": "control", "separator": "+"}
    return learn_conditions(adata, **(arguments | kwargs))


def build(adata: ad.AnnData, **kwargs: Any) -> PopulationTable:
    return build_populations(learn(adata, **kwargs), adata.obs)


def cells(rows: list[tuple[str, ...]], columns: tuple[str, ...] = ("perturbation", "cell_type", "donor")) -> ad.AnnData:
    obs = pd.DataFrame(rows, columns=list(columns), index=[f"c{i}" for i in range(len(rows))])
    return ad.AnnData(np.ones((len(rows), 1), np.float32), obs=obs)


# ---- groups --------------------------------------------------------------------------------------------------------


@SETTINGS
@given(st.lists(st.integers(0, 4), min_size=1, max_size=30))
def test_groups_hold_their_rows(codes: list[int]) -> None:
    at = np.array(codes)
    rows = 100 + np.arange(len(at))
    groups = Groups.from_codes(at, rows, 6)
    assert len(groups) == 6
    for g in range(6):
        assert groups[g].tolist() == rows[at == g].tolist()
    again = Groups.from_lists([groups[g] for g in range(6)])
    for name in ("rows", "start", "count"):
        assert np.array_equal(getattr(again, name), getattr(groups, name))


def test_no_groups() -> None:
    assert len(Groups.from_lists([])) == 0 and Groups.from_lists([]).rows.size == 0


def test_combinations_of_keys_are_sorted_and_numbered() -> None:
    table = pd.DataFrame({"a": ["y", "x", "y", "x"], "b": [1, 2, 1, 1]})
    unique, codes = group_rows(table, ["a", "b"])
    assert unique.to_numpy().tolist() == [["x", 1], ["x", 2], ["y", 1]]
    assert codes.tolist() == [2, 1, 2, 0]
    assert group_rows(table, [])[1].tolist() == [0, 0, 0, 0]


# ---- controls ------------------------------------------------------------------------------------------------------


def frame(rows: list[tuple[str, ...]]) -> pd.DataFrame:
    return pd.DataFrame(rows, columns=["type", "donor", "site"][: len(rows[0])])


def matched(populations: list[tuple[str, ...]], controls: list[tuple[str, ...]], required: tuple[str, ...] = ()):
    p, c = frame(populations), frame(controls)
    match = match_controls(p, c, 10 + np.arange(len(c)), list(p.columns), required)
    return match, [sorted(match.groups[int(g)].tolist()) for g in match.group]


def test_exact_controls_come_first() -> None:
    match, pools = matched([("T", "d1"), ("B", "d2")], [("T", "d1"), ("T", "d2"), ("B", "d2"), ("T", "d1")])
    assert pools == [[10, 13], [12]]
    assert match.exact.tolist() == [True, True]


def test_the_nearest_controls_stand_in() -> None:
    """No T cells of d3: all T controls agree on one key, as does d3's B; the first key decides."""
    match, pools = matched([("T", "d3")], [("T", "d1"), ("T", "d2"), ("B", "d3"), ("B", "d1")])
    assert pools == [[10, 11]]
    assert match.n_agreeing.tolist() == [1] and not match.exact.any()


def test_more_agreement_beats_more_important_keys() -> None:
    _, pools = matched([("T", "d1", "s1")], [("T", "d2", "s2"), ("B", "d1", "s1")])
    assert pools == [[11]]


def test_required_keys_are_not_given_up() -> None:
    controls = [("T", "d2", "s2"), ("B", "d1", "s1")]
    match, pools = matched([("T", "d1", "s1")], controls, ("type",))
    assert pools == [[10]] and match.n_agreeing.tolist() == [1]
    with pytest.raises(ValueError, match=r"1 populations have no control cells.*\['type'\] = 'NK'"):
        matched([("NK", "d1", "s1"), ("T", "d1", "s1")], controls, ("type",))


def test_populations_of_one_pool_share_it() -> None:
    match, _ = matched([("T", "d1"), ("T", "d1"), ("B", "d1")], [("T", "d1"), ("B", "d1")])
    assert len(match.groups) == 2
    assert match.group[0] == match.group[1] != match.group[2]


def test_without_keys_all_controls_match() -> None:
    controls = pd.DataFrame(index=range(3))
    match = match_controls(pd.DataFrame(index=range(2)), controls, np.arange(3), [])
    assert match.exact.all() and [match.groups[int(g)].tolist() for g in match.group] == [[0, 1, 2]] * 2


# ---- the table -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def screen() -> ad.AnnData:
    adata = simulate(
        n_contexts=3, n_perturbations=3, n_cells_per_population=7, n_genes=20, n_batches=2, combinations=1, doses=(1, 4)
    )
    return adata[np.random.default_rng(0).permutation(adata.n_obs)].copy()


@pytest.fixture(scope="module")
def table(screen: ad.AnnData) -> PopulationTable:
    return build(screen, context_keys="cell_type", batch_key="donor", dose_key="dose")


def test_every_treated_cell_is_in_one_population(screen: ad.AnnData, table: PopulationTable) -> None:
    treated = np.flatnonzero(screen.obs["perturbation"] != "control")
    assert sorted(table.cells.rows.tolist()) == treated.tolist()
    keys = ["perturbation", "dose", "cell_type", "donor"]
    assert len(table) == len(screen.obs.iloc[treated][keys].drop_duplicates())


def test_a_population_shares_everything_and_its_controls_fit(screen: ad.AnnData, table: PopulationTable) -> None:
    for g in range(len(table)):
        label, obs = table.labels.iloc[g], screen.obs.iloc[table.cells[g]]
        assert (obs["cell_type"] == label["cell_type"]).all() and (obs["donor"] == label["donor"]).all()
        assert obs["perturbation"].nunique() == obs["dose"].nunique() == 1
        controls = screen.obs.iloc[table.match.groups[int(table.match.group[g])]]
        expected = screen.obs.query("perturbation == 'control'")
        expected = expected[(expected["cell_type"] == label["cell_type"]) & (expected["donor"] == label["donor"])]
        assert sorted(controls.index) == sorted(expected.index)
    assert table.match.exact.all()


def test_report(table: PopulationTable) -> None:
    report = table.report
    assert list(report.columns[:2]) == ["perturbation", "dose"]
    assert (report["n_cells"] == 7).all() and (report["n_controls"] == 14).all() and report["exact_match"].all()


def test_control_populations_keep_to_context_and_batch(screen: ad.AnnData, table: PopulationTable) -> None:
    assert len(table.controls) == 6
    for g in range(6):
        obs = screen.obs.iloc[table.controls[g]]
        assert (obs["perturbation"] == "control").all()
        assert obs["cell_type"].nunique() == obs["donor"].nunique() == 1


def test_part_of_the_populations(table: PopulationTable) -> None:
    rows = np.array([5, 2])
    part = table.take(rows)
    assert len(part) == 2 and part.labels.equals(table.labels.iloc[rows].reset_index(drop=True))
    for i, row in enumerate(rows):
        assert part.cells[i].tolist() == table.cells[int(row)].tolist()
        ours, theirs = (m.groups[int(m.group[j])].tolist() for m, j in ((part.match, i), (table.match, row)))
        assert ours == theirs
    assert np.array_equal(part.component, table.component[rows]) and len(table.take(np.empty(0, int))) == 0


def test_a_context_without_controls_is_named() -> None:
    adata = cells([("A", "T", "d1"), ("control", "B", "d1"), ("A", "NK", "d1"), ("control", "T", "d1")])
    with pytest.raises(ValueError, match=r"no control agrees on \['cell_type'\] = 'NK'"):
        build(adata, context_keys="cell_type", batch_key="donor")
    remedied = build(adata, context_keys="cell_type", batch_key="donor", control_match_keys=["donor"])
    assert len(remedied) == 2


def test_controls_match_on_keys_of_populations_only() -> None:
    adata = cells([("A", "T", "d1"), ("control", "T", "d1")])
    with pytest.raises(ValueError, match=r"control_match_keys has 'donor'.*Allowed: .*\('cell_type'\)"):
        build(adata, context_keys="cell_type", control_match_keys=["cell_type", "donor"])


def test_controls_of_another_batch_stand_in(caplog: pytest.LogCaptureFixture) -> None:
    adata = cells([("A", "T", "d1"), ("A", "T", "d1"), ("control", "T", "d2"), ("control", "B", "d1")])
    with caplog.at_level(logging.WARNING, logger="scperturbdiff"):
        found = build(adata, context_keys="cell_type", batch_key="donor")
    assert found.match.groups[0].tolist() == [2]
    assert found.report["exact_match"].tolist() == [False]
    assert "1 of 1 populations have no controls that agree on all of ['cell_type', 'donor']" in caplog.text


def test_populations_of_one_cell_are_counted(caplog: pytest.LogCaptureFixture) -> None:
    adata = cells([("A", "T", "d1"), ("B", "T", "d1"), ("B", "T", "d1"), ("control", "T", "d1")])
    with caplog.at_level(logging.WARNING, logger="scperturbdiff"):
        build(adata, context_keys="cell_type")
    assert "1 of 2 populations have a single cell" in caplog.text


def test_covariates_split_populations() -> None:
    rows = [("A", "x", "1"), ("A", "y", "1"), ("A", "x", "2"), ("control", "x", "1"), ("control", "y", "1")]
    adata = cells(rows, ("perturbation", "site", "hours"))
    adata.obs["hours"] = adata.obs["hours"].astype(float)
    found = build(adata, categorical_covariate_keys=["site"], continuous_covariate_keys=["hours"])
    assert len(found) == 3
    assert found.match.groups.count[found.match.group].tolist() == [1, 1, 1]
    assert found.match.exact.tolist() == [True, False, True]  # rows are sorted: x 1, x 2, y 1


@pytest.mark.parametrize("keys", [{}, {"context_keys": "cell_type", "batch_key": "donor"}])
@pytest.mark.parametrize("labels", [{}, {"perturbation_key": None, "control": None}])
def test_controls_only(keys: dict[str, str], labels: dict[str, None]) -> None:
    adata = cells([("control", "T", "d1"), ("control", "T", "d1"), ("control", "B", "d1")])
    found = build(adata, **keys, **labels)
    assert len(found) == 0 and len(found.report) == 0
    assert sorted(found.controls.count.tolist()) == ([1, 2] if keys else [3])


def test_no_controls() -> None:
    adata = cells([("control", "T", "d1"), ("A", "T", "d1")])
    space = learn(adata)
    with pytest.raises(ValueError, match=r"no control cells \(obs\['perturbation'\] == 'control'\)"):
        build_populations(space, adata[1:].obs)
