"""Training in several processes: the same model as from one, whatever the sizes, and no process that waits."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from tests.helpers import FEW_STEPS
from tests.screens import screen, table_of, tiny
from tests.training.parallel_worker import QUIET, STAGES, Watch, cells, model_of

from scperturbdiff.diffusion import PopulationSampler
from scperturbdiff.diffusion._populations import PopulationBatch
from scperturbdiff.latent._batches import RowBatches
from scperturbdiff.training import PopulationTraining, Processes
from scperturbdiff.training._populations import check_shared, population_sampler

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).parents[2]
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
LIMIT = 900
"""Seconds after which processes count as waiting for each other; they need 20 where nothing else runs."""


def run(what: str, folder: Path, by: list[str]) -> list[Any]:
    """What both processes left."""
    kept = {name: value for name, value in os.environ.items() if name not in ("PL_GLOBAL_SEED", "LOCAL_RANK")}
    command = [sys.executable, *by, "-m", "tests.training.parallel_worker", str(folder), what]
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log, env=kept | {"OMP_NUM_THREADS": "1"})
        try:
            code = process.wait(LIMIT)
        except subprocess.TimeoutExpired:
            process.terminate()  # it ends those that it started
            process.wait(60)
            code = None
    if code != 0:
        ended = "did not end" if code is None else f"ended with {code}"
        pytest.fail(f"processes {ended}: {(folder / 'log').read_text(encoding='utf-8')[-5000:]}")
    return [torch.load(folder / f"rank{rank}.pt", weights_only=False) for rank in range(2)]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    return run("trained", tmp_path_factory.mktemp("trained"), TORCHRUN)


def joined(batches: tuple[PopulationBatch, PopulationBatch]) -> PopulationBatch:
    return PopulationBatch(*(torch.cat(parts) for parts in zip(*(vars(b).values() for b in batches), strict=True)))


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
def test_two_processes_step_as_one_that_has_both_halves(
    stage: str, trained: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Gradients of every step, and the last weights."""
    halves = [result[stage] for result in trained]
    rows, drawn, steps = (zip(*(half[name] for half in halves), strict=True) for name in ("rows", "drawn", "numbers"))
    numbers = [[torch.cat(pair) for pair in zip(*step, strict=True)] for step in steps]

    def both(batches: RowBatches) -> Iterator[list[int]]:
        return (sum(next(rows), []) for _ in range(len(batches)))

    monkeypatch.setattr(RowBatches, "__iter__", both)
    monkeypatch.setattr(PopulationSampler, "draw", lambda *_: joined(next(drawn)))
    watch, model = Watch(numbers), model_of(cells(), 0)
    model.train(**QUIET, **STAGES[stage], callbacks=[watch])
    assert next(rows, None) is None and next(drawn, None) is None and not any(numbers)
    assert len(watch.gradients) == 6 and sum(map(len, watch.numbers)) >= 6
    for alone, *shared in zip(watch.gradients, *(half["gradients"] for half in halves), strict=True):
        for found in shared:
            assert found.keys() == alone.keys()
            for name, gradient in alone.items():
                most = 1e-4 * float(gradient.abs().max()) + 1e-6
                torch.testing.assert_close(found[name], gradient, rtol=0, atol=most, msg=f"gradient of {name}")
    weights, start = model.module.state_dict(), model_of(cells(), 0).module.state_dict()
    moved = [name for name, value in halves[0]["weights"].items() if not torch.equal(value, start[name])]
    assert any(name.startswith({"vae": "vae.", "network": "generator_ema."}[stage]) for name in moved)
    for name, value in halves[0]["weights"].items():
        # the mean of the correction is taken off, and this bias with it: rounding alone moves it
        if not name.endswith("transformer.out.bias"):
            torch.testing.assert_close(value, weights[name], rtol=1e-4, atol=1e-4, msg=name)


@pytest.mark.slow
def test_processes_have_cells_and_populations_of_their_own(trained: list[Any]) -> None:
    first, second = (result["odd"] for result in trained)
    epoch = 3 + 1  # batches to train on and to validate with
    assert len(first["rows"]) == len(second["rows"]) == 2 * epoch
    assert [len(batch) for batch in first["rows"]] == [17, 17, 17, 7] * 2 == [len(batch) for batch in second["rows"]]
    for start in (0, epoch):
        seen = sum(first["rows"][start : start + epoch] + second["rows"][start : start + epoch], [])
        assert len(set(seen)) == len(seen)
    assert set(first["rows"][0]) != set(first["rows"][epoch])
    assert len(first["drawn"]) == len(second["drawn"]) == 4 * 3
    for start in range(0, 12, 3):
        ours, theirs = (torch.cat(result["drawn"][start : start + 3]).tolist() for result in (first, second))
        assert len(ours) == len(theirs) == 3 * 3 and not set(ours) & set(theirs)
    assert set(torch.cat(first["drawn"]).tolist()) & set(torch.cat(second["drawn"]).tolist())  # dealt anew


@pytest.mark.slow
def test_processes_end_with_one_model(trained: list[Any]) -> None:
    """Also before the first one's is given to all: what lies between the stages is the same everywhere."""
    first, second = (result["odd"] for result in trained)
    assert first["before"][0]["weights"] != second["before"][0]["weights"]
    assert first["before"][-1] == second["before"][-1] == first["model"] == second["model"]
    assert first["history"] == second["history"] and first["cells"] == second["cells"]


@pytest.mark.slow
def test_processes_that_cannot_train_together_say_why(trained: list[Any]) -> None:
    for result in trained:
        assert result["too many"].startswith("2 processes are too many for 1 populations to train on")
        assert "number of cells was 100, is 120" in result["differ"] and "Process 1" in result["differ"]


@pytest.mark.slow
def test_one_process_writes_checkpoints_and_all_go_on_from_them(tmp_path: Path) -> None:
    first, second = run("resumed", tmp_path, TORCHRUN)
    assert first["whole"] == first["resumed"] == second["whole"] == second["resumed"]
    assert {"run.json", "network.ckpt", "start_"} <= set(first["written"]) and second["written"] == []
    assert not (tmp_path / "checkpoints1").exists()
    for cut, again, other in (first["errors"], second["errors"]):
        assert cut == "cut off" and "holds checkpoints" in again and "seed was 5, is 6" in other


@pytest.mark.slow
def test_lightning_starts_the_processes_of_a_script(tmp_path: Path, trained: list[Any]) -> None:
    first, second = run("launched", tmp_path, [])
    assert first == second
    assert first["model"] == trained[0]["odd"]["model"]


# ---- one process ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize(("n", "batch_size", "n_ranks"), [(20, 4, 2), (101, 33, 2), (7, 128, 3), (10, 3, 4), (3, 1, 3)])
def test_batches_are_shared_evenly(n: int, batch_size: int, n_ranks: int, shuffle: bool) -> None:
    rows = np.arange(n) * 2
    shares = [RowBatches(rows, batch_size, shuffle, rank, n_ranks, seed=1) for rank in range(n_ranks)]
    whole, orders = math.ceil(batch_size / n_ranks) * n_ranks, []
    for _ in range(2):
        batches = [list(share) for share in shares]
        assert {len(of_rank) for of_rank in batches} == {len(shares[0])} and len(shares[0])
        for parts in zip(*batches, strict=True):
            assert len({len(part) for part in parts}) == 1 and len(parts[0])
        seen = [row for of_rank in batches for part in of_rank for row in part]
        assert len(set(seen)) == len(seen) and set(seen) <= set(rows.tolist())
        assert n - len(seen) < (whole if shuffle and n >= whole else n_ranks)
        orders.append(batches)
    assert (orders[0] == orders[1]) is not shuffle


@pytest.mark.parametrize(("n", "batch_size"), [(20, 4), (21, 4), (3, 128)])
def test_batches_of_one_process_are_those_of_torchs_order(n: int, batch_size: int) -> None:
    torch.manual_seed(3)
    found = list(RowBatches(np.arange(n), batch_size, shuffle=True))
    torch.manual_seed(3)
    order = torch.randperm(n).numpy()
    parts = [order[i * batch_size : (i + 1) * batch_size] for i in range(max(1, n // batch_size))]
    assert found == [np.sort(part).tolist() for part in parts]


def test_more_processes_than_cells_are_an_error() -> None:
    with pytest.raises(ValueError, match="5 processes are too many for 4 cells"):
        RowBatches(np.arange(4), 2, True, 0, 5)


def test_populations_are_dealt_evenly() -> None:
    table = table_of(screen()).take(np.arange(15))
    shares = [population_sampler(table, torch.device("cpu")) for _ in range(2)]
    drawn = torch.zeros(2, 15)
    for rank, share in enumerate(shares):
        share.share(rank, 2)
    for epoch in range(200):
        groups = []
        for rank, share in enumerate(shares):
            torch.manual_seed(epoch)
            share.shuffle()
            groups.append(share.draw(20, 2, 1).group)
            drawn[rank] += groups[-1].bincount(minlength=15)
        assert not set(groups[0].tolist()) & set(groups[1].tolist())
    each = drawn / drawn.sum(1, keepdim=True)
    assert float((each - 1 / 15).abs().max()) < 0.03


@pytest.mark.parametrize(("validation_size", "asked", "most"), [(None, True, 4), (0.5, False, 2)])
def test_more_processes_than_populations_are_an_error_before_training(
    validation_size: float | None, asked: bool, most: int
) -> None:
    split = table_of(screen(contexts=1, donors=1)), validation_size, 0, True
    check_shared(*split, asked=asked, n_ranks=most)
    with pytest.raises(ValueError, match=f"^{most + 1} processes are too many for {most} populations to train on"):
        check_shared(*split, asked=asked, n_ranks=most + 1)


def test_no_network_needs_no_populations() -> None:
    check_shared(table_of(screen(contexts=1, donors=1)), None, 0, asked=False, n_ranks=50)


def test_scores_of_held_out_populations_are_those_of_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    adata = screen(contexts=5)
    model = tiny(adata)
    training = PopulationTraining.prepare(model.module, model.adata_manager, table_of(adata), None, 0.5, 0)
    plan = training.stage(1, True, {}).plan
    alone = plan.validation_scores()
    assert len(alone[0]) == 20 == len(plan.scored)  # more than are scored at a time
    parts = []
    for rank in range(3):
        plan.sampler.share(rank, 3)
        monkeypatch.setattr(plan, "_of_all", lambda values: values)
        parts.append(plan.validation_scores())
    for whole, *shares in zip(alone, *parts, strict=True):
        assert torch.equal(sum(shares), whole)
        assert all(int((share != 0).any(-1).sum() if share.dim() > 1 else (share != 0).sum()) < 20 for share in shares)


class Gradients(pl.Callback):
    """Names of what is trained and has no gradient."""

    def __init__(self) -> None:
        self.missing = dict[str, list[str]]()

    def on_after_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        found = [name for name, p in pl_module.named_parameters() if p.requires_grad and p.grad is None]
        self.missing[type(pl_module).__name__] = found


@pytest.mark.parametrize("features", [True, False])
def test_all_that_is_trained_takes_part(features: bool) -> None:
    """Else processes would wait for gradients that never come."""
    watch, model = Gradients(), tiny(screen(features=features))
    for _ in range(2):
        model.train(**FEW_STEPS, callbacks=[watch])
        assert watch.missing == {"LatentTrainingPlan": [], "GeneratorTrainingPlan": []}
        watch.missing.clear()


@pytest.mark.parametrize("strategy", ["ddp_spawn", "fsdp", "ddp_find_unused_parameters_true", "nonsense"])
def test_strategies_that_do_not_train_both_stages_are_named(strategy: str) -> None:
    with pytest.raises(ValueError, match=rf"strategy='{strategy}' is not one of \('auto', 'ddp'\)"):
        model_of(cells(), 0).train(**QUIET, strategy=strategy)


@pytest.mark.parametrize("asked", [{}, {"devices": 1}, {"devices": "auto"}, {"devices": "1"}, {"strategy": "auto"}])
def test_one_device_is_lightnings_affair(asked: dict[str, Any]) -> None:
    options = {"accelerator": "cpu", "devices": "auto", **asked}
    assert Processes.launch(options) == (Processes(device=torch.device("cpu")), options)


def test_one_process_asks_nobody() -> None:
    alone, model = Processes(), SimpleNamespace()
    assert alone.first(lambda: 3) == 3 and alone.same("x") == "x"
    alone.check_same(lambda: pytest.fail("cells are looked at for nothing"))
    alone.share(model)
    alone.place(model)
    with pytest.raises(KeyError):
        alone.first(lambda: {}["nothing"])
