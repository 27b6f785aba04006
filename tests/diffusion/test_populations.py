"""Drawing of cells of populations and of their controls, on the device."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from scperturbdiff.data import (
    PERTURBATION,
    ConditionSpace,
    Groups,
    PopulationTable,
    build_populations,
)
from scperturbdiff.data._setup import learn_conditions
from scperturbdiff.datasets import simulate
from scperturbdiff.diffusion import PopulationSampler
from scperturbdiff.diffusion._populations import GroupIndex
from scperturbdiff.model import DESCRIBED

if TYPE_CHECKING:
    import anndata as ad

SETTINGS = settings(max_examples=40, deadline=None, derandomize=True)


def learn(adata: ad.AnnData, **kwargs: Any) -> ConditionSpace:
    arguments: dict[str, Any] = dict.fromkeys(DESCRIBED)
    arguments |= {"perturbation_key": "perturbation", "control": "control", "separator": "+"}
    return learn_conditions(adata, **(arguments | kwargs))


def build(adata: ad.AnnData, **kwargs: Any) -> PopulationTable:
    return build_populations(learn(adata, **kwargs), adata.obs)


@pytest.fixture(scope="module")
def screen() -> ad.AnnData:
    adata = simulate(
        n_contexts=3, n_perturbations=3, n_cells_per_population=7, n_genes=20, n_batches=2, combinations=1, doses=(1, 4)
    )
    return adata[np.random.default_rng(0).permutation(adata.n_obs)].copy()


@pytest.fixture(scope="module")
def table(screen: ad.AnnData) -> PopulationTable:
    return build(screen, context_keys="cell_type", batch_key="donor", dose_key="dose")


def as_tuple(groups: Groups) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    return groups.rows, groups.start, groups.count


def index_of(*sizes: int) -> tuple[GroupIndex, list[np.ndarray]]:
    ends = np.cumsum(sizes)
    groups = [1000 + np.arange(end - size, end) for size, end in zip(sizes, ends, strict=True)]
    return GroupIndex(as_tuple(Groups.from_lists(groups)), "cpu"), groups


@SETTINGS
@given(st.lists(st.integers(1, 40), min_size=1, max_size=4), st.integers(1, 60), st.integers(0, 2**31))
def test_drawn_cells_are_distinct_and_of_their_group(sizes: list[int], n: int, seed: int) -> None:
    torch.manual_seed(seed)
    index, groups = index_of(*sizes)
    index.shuffle()
    group = torch.arange(len(sizes)).repeat(3)
    rows, mask = index.draw(group, n)
    assert rows.shape == mask.shape == (len(group), n)
    for g, drawn, there in zip(group.tolist(), rows.numpy(), mask.numpy(), strict=True):
        assert there.tolist() == [j < sizes[g] for j in range(n)]
        assert set(drawn) <= set(groups[g].tolist())
        assert len(set(drawn[there])) == min(n, sizes[g])
        assert np.bincount(drawn - 1000).max() <= -(-n // sizes[g])  # a small group goes round again, evenly


def test_every_cell_is_drawn_equally_often() -> None:
    index, _ = index_of(5, 23)
    rows, _ = index.draw(torch.ones(20_000, dtype=torch.long), 4)
    for column in (*rows.T, rows.flatten()):  # in every place
        share = torch.bincount(column - 1005, minlength=23) / len(column)
        assert (share * 23).min() > 0.8 and (share * 23).max() < 1.2


def test_every_pair_of_cells_is_drawn_equally_often_after_shuffling() -> None:
    index, _ = index_of(9)
    together = torch.zeros(9, 9)
    for _ in range(300):
        index.shuffle()
        rows, _ = index.draw(torch.zeros(20, dtype=torch.long), 3)
        chosen = torch.zeros(20, 9).scatter_(1, rows - 1000, 1.0)
        together += chosen.T @ chosen
    pairs = together[~torch.eye(9, dtype=torch.bool)] / (300 * 20)
    expected = 3 * 2 / (9 * 8)
    assert pairs.min() > 0.75 * expected and pairs.max() < 1.25 * expected


def test_shuffling_keeps_the_groups() -> None:
    index, groups = index_of(4, 1, 30)
    before = index.rows.clone()
    index.shuffle()
    assert not torch.equal(index.rows, before)
    for start, count, group in zip(index.start.tolist(), index.count.tolist(), groups, strict=True):
        assert sorted(index.rows[start : start + count].tolist()) == group.tolist()


def test_drawn_populations_have_their_own_controls(screen: ad.AnnData, table: PopulationTable) -> None:
    match = table.match
    control_group = torch.as_tensor(match.group)
    batch = PopulationSampler(as_tuple(table.cells), as_tuple(match.groups), control_group, "cpu").draw(40, 5, 3)
    assert batch.cells.shape == batch.mask.shape == (40, 5) and batch.starts.shape == (40, 3, 5)
    assert batch.group.min() >= 0 and len(batch.group.unique()) > 10
    assert torch.equal(batch.controls, batch.starts[:, 0])
    labels = table.labels
    obs = screen.obs
    for i in range(40):
        group, drawn = int(batch.group[i]), obs.iloc[batch.cells[i].tolist()]
        starts = obs.iloc[batch.starts[i].flatten().tolist()]
        assert (starts["perturbation"] == "control").all()
        assert starts["cell_type"].unique().tolist() == drawn["cell_type"].unique().tolist()
        assert starts["donor"].unique().tolist() == drawn["donor"].unique().tolist()
        assert sorted(drawn["perturbation"].iloc[0].split("+")) == labels[PERTURBATION].iloc[group].split("+")
    assert len({tuple(s) for s in batch.starts[0].tolist()}) == 3  # draws start from different controls


def test_control_populations_have_no_number(table: PopulationTable) -> None:
    """To be pretrained on: controls as populations of themselves."""
    controls = as_tuple(table.controls)
    sampler = PopulationSampler(controls, controls, torch.arange(len(table.controls)), "cpu", perturbed=False)
    batch = sampler.draw(6, 4, 2)
    assert (batch.group == -1).all() and batch.cells.shape == (6, 4)
    for cells, starts in zip(batch.cells, batch.starts, strict=True):
        groups = [g for g in range(len(table.controls)) if int(cells[0]) in table.controls[g]]
        assert np.isin(torch.cat([cells, starts.flatten()]).numpy(), table.controls[groups[0]]).all()
