"""Several processes predict into one store: with the bits of one, whole or not there, and nobody waits for the dead."""

from __future__ import annotations

import copy
import json
import multiprocessing
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from itertools import pairwise
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pandas as pd
import pytest
import torch.distributed as dist
from anndata import read_zarr
from pandas.testing import assert_frame_equal
from tests.helpers import assert_same_cells

from scperturbdiff.cli import main
from scperturbdiff.prediction import PopulationGenerator
from scperturbdiff.prediction._fingerprint import digest
from scperturbdiff.prediction._parts import Parts, balance
from scperturbdiff.prediction._team import Team

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from anndata import AnnData

    from scperturbdiff import PerturbDiff

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="other processes need this one's model")

SOON = 240
"""Seconds within which processes must end, on a busy machine."""
REQUEST: dict[str, Any] = {
    "perturbations": ["P01", "P02+P04", "P01"], "n_cells": 9, "n_populations": 2, "seed": 4, "progress": False,
}  # fmt: skip
SMALL = REQUEST | {"perturbations": ["P03"], "n_populations": None}


@pytest.fixture(scope="module")
def model(trained_model: PerturbDiff) -> PerturbDiff:
    """One whose network is evaluated."""
    model = copy.deepcopy(trained_model)
    model.module.generator_ema.network_weight.fill_(1)
    return model


@pytest.fixture(scope="module")
def controls(screen: AnnData) -> AnnData:
    return screen[screen.obs["perturbation"] == "control"].copy()


@pytest.fixture(scope="module")
def expected(model: PerturbDiff, controls: AnnData, tmp_path_factory: pytest.TempPathFactory) -> AnnData:
    """What one process writes."""
    path = tmp_path_factory.mktemp("one") / "cells.zarr"
    model.predict(controls, **REQUEST, output=path).file.close()
    return read_zarr(path)


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("scperturbdiff.prediction._team.ROUND", 0.02)


class Ended(NamedTuple):
    """How a process ended."""

    code: int | None
    error: str


def launch(size: int, work: Callable[[int], Any], folder: Path, started: list[int] | None = None) -> list[Ended]:
    """Run `work(rank)` in processes that are told of each other as `torchrun` does; all must end soon."""
    with socket.socket() as some:
        some.bind(("127.0.0.1", 0))
        port = some.getsockname()[1]

    def run(rank: int) -> None:
        os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        try:
            work(rank)
        except BaseException as error:
            (folder / f"error.{rank}").write_text(f"{type(error).__name__}: {error}")
            raise

    ranks = range(size) if started is None else started
    processes = [multiprocessing.get_context("fork").Process(target=run, args=(rank,)) for rank in ranks]
    for process in processes:
        process.start()
    deadline = time.monotonic() + SOON
    for process in processes:
        process.join(max(deadline - time.monotonic(), 0))
    late = [process for process in processes if process.is_alive()]
    for process in late:
        process.kill()
        process.join()
    assert not late, "a process does not end"
    said = [folder / f"error.{rank}" for rank in ranks]
    out = [
        Ended(p.exitcode, path.read_text() if path.exists() else "") for p, path in zip(processes, said, strict=True)
    ]
    for path in said:
        path.unlink(missing_ok=True)
    return out


def fine(ended: list[Ended]) -> None:
    assert [one.code for one in ended] == [0] * len(ended), ended


def names(folder: Path) -> list[str]:
    return sorted(os.listdir(folder))


def assert_same_store(a: AnnData, b: AnnData) -> None:
    """All that a store holds, and how."""
    assert_same_cells(a, b)
    assert_frame_equal(a.var, b.var)
    assert (set(a.layers), set(a.obsm), set(a.uns)) == (set(b.layers), set(b.obsm), set(b.uns))
    for one, other in ((a.X, b.X), (a.layers["counts"], b.layers["counts"])):
        assert one.dtype == other.dtype
        for part in ("data", "indices", "indptr"):
            np.testing.assert_array_equal(getattr(one, part), getattr(other, part))
    assert digest(a.uns["scperturbdiff"]) == digest(b.uns["scperturbdiff"])


def small_chunks(monkeypatch: pytest.MonkeyPatch, chunk: int) -> None:
    for name in ("_stream.CHUNK", "_shards.CHUNK"):
        monkeypatch.setattr(f"scperturbdiff.prediction.{name}", chunk)
    monkeypatch.setattr("scperturbdiff.prediction._shards.WINDOW", 3 * chunk)
    monkeypatch.setattr("scperturbdiff.prediction._parts.BUFFER_CELLS", 10)


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file that gets a letter for each draw of a population, in whatever process."""
    path, draw = tmp_path_factory.mktemp("drawn") / "drawn", PopulationGenerator._draw

    def counted(*arguments: Any) -> Any:
        with path.open("a") as file:
            file.write("x")
        return draw(*arguments)

    monkeypatch.setattr(PopulationGenerator, "_draw", counted)
    path.touch()
    return path


def break_after(monkeypatch: pytest.MonkeyPatch, n: int, rank: int, how: Callable[[], Any]) -> None:
    """Have one process end in the middle of its work."""
    draw, made = PopulationGenerator._draw, []

    def broken(*arguments: Any) -> Any:
        made.append(1)
        if len(made) > n and os.environ.get("RANK") == str(rank):
            how()
        return draw(*arguments)

    monkeypatch.setattr(PopulationGenerator, "_draw", broken)


def fail() -> None:
    raise ValueError("the disk of process 1 is broken")


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


# ---- the same cells -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("size", "chunk"), [(1, 4000), (2, 2000), (3, 1000)])
def test_processes_write_what_one_writes(
    size: int,
    chunk: int,
    model: PerturbDiff,
    controls: AnnData,
    expected: AnnData,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    drawn: Path,
) -> None:
    small_chunks(monkeypatch, chunk)
    path = tmp_path / "above" / "cells.zarr"

    def work(rank: int) -> None:
        del rank
        cells = model.predict(controls, **REQUEST, output=path)
        assert_same_cells(cells.to_memory(), expected)  # which each process gets

    fine(launch(size, work, tmp_path))
    assert names(path.parent) == [path.name]
    assert_same_store(read_zarr(path), expected)
    # nothing was made twice
    assert len(drawn.read_text()) == len(expected.uns["scperturbdiff"]["conditions"]) * REQUEST["n_populations"]


def test_more_processes_than_populations(model: PerturbDiff, controls: AnnData, tmp_path: Path) -> None:
    wanted = pd.DataFrame({"perturbation": ["P01"], "cell_type": ["C1"], "donor": ["D1"]})
    request = REQUEST | {"perturbations": wanted, "n_populations": None}
    path = tmp_path / "cells.zarr"
    fine(launch(3, lambda _: model.predict(controls, **request, output=path), tmp_path))
    assert read_zarr(path).n_obs == request["n_cells"]
    assert_same_cells(read_zarr(path), model.predict(controls, **request))


@pytest.mark.slow
def test_in_a_group_that_is_there(model: PerturbDiff, controls: AnnData, tmp_path: Path) -> None:
    """With the user's group, which is left alone; when it is gone, as `torchrun` says, more than once."""
    paths = [tmp_path / f"{i}.zarr" for i in range(3)]

    def work(rank: int) -> None:
        dist.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=rank, world_size=2)
        model.predict(controls, **SMALL, output=paths[0])
        assert dist.get_world_size() == 2
        dist.destroy_process_group()
        for path in paths[1:]:
            model.predict(controls, **SMALL, output=path)
            assert not dist.is_initialized()

    fine(launch(2, work, tmp_path))
    one = model.predict(controls, **SMALL)
    for path in paths:
        assert_same_cells(read_zarr(path), one)


@pytest.mark.slow
def test_in_memory_each_process_has_all(model: PerturbDiff, controls: AnnData, tmp_path: Path) -> None:
    one = model.predict(controls, **SMALL)
    fine(launch(2, lambda _: assert_same_cells(model.predict(controls, **SMALL), one), tmp_path))


def test_the_store_opens_lazily(
    model: PerturbDiff, controls: AnnData, expected: AnnData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("xarray", reason="AnnData reads lazily with xarray and dask")
    pytest.importorskip("dask")
    from anndata.experimental import read_lazy

    small_chunks(monkeypatch, 3000)
    set_alone(monkeypatch)
    model.predict(controls, **REQUEST, output=tmp_path / "cells.zarr")
    cells = read_lazy(tmp_path / "cells.zarr")
    assert cells.shape == expected.shape
    assert (cells[5:20].to_memory().X != expected[5:20].X).nnz == 0


# ---- interrupted --------------------------------------------------------------------------------------------------


def set_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """This process is the only one that `torchrun` started."""
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "1")


def test_a_killed_process_ends_the_others_and_the_same_call_goes_on(
    model: PerturbDiff, controls: AnnData, expected: AnnData, tmp_path: Path, drawn: Path
) -> None:
    path = tmp_path / "cells.zarr"

    def predict(_: int) -> None:
        model.predict(controls, **REQUEST, output=path)

    with pytest.MonkeyPatch.context() as patch:
        break_after(patch, 7, rank=1, how=die)
        first, second = launch(2, predict, tmp_path)
    assert second.code == -signal.SIGKILL
    assert first.code == 1 and first.error.startswith("ConnectionError: Another process is gone"), first
    folder = tmp_path / ".cells.zarr.parts"
    assert names(tmp_path) == [folder.name], "nothing half under the name"
    there = [json.loads(record.read_text())["evidence"] for record in folder.glob("0*.json")]
    n_draws = len(expected.uns["scperturbdiff"]["conditions"]) * REQUEST["n_populations"]
    n_there = sum(map(len, there)) * REQUEST["n_populations"]
    assert 0 < n_there < n_draws
    drawn.write_text("")
    fine(launch(3, predict, tmp_path))
    assert names(tmp_path) == [path.name]
    assert_same_store(read_zarr(path), expected)
    assert len(drawn.read_text()) == n_draws - n_there, "what was there is not made again"


def test_a_process_that_fails_ends_the_others(
    model: PerturbDiff, controls: AnnData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    break_after(monkeypatch, 3, rank=1, how=fail)
    path = tmp_path / "cells.zarr"
    first, second = launch(2, lambda _: model.predict(controls, **REQUEST, output=path), tmp_path)
    assert second == Ended(1, "ValueError: the disk of process 1 is broken")
    said = "ConnectionError: Process 1 of 2 failed, so all end. ValueError: the disk of process 1 is broken"
    assert first == Ended(1, said)
    assert names(tmp_path) == [".cells.zarr.parts"]


def test_a_failure_while_parts_are_joined_leaves_them(
    model: PerturbDiff, controls: AnnData, tmp_path: Path, drawn: Path
) -> None:
    path = tmp_path / "cells.zarr"

    def work(rank: int) -> None:
        with pytest.MonkeyPatch.context() as patch:
            if rank == 1:
                patch.setattr("scperturbdiff.prediction._stream.CellWriter.attach", lambda *_: fail())
            model.predict(controls, **SMALL, output=path)

    first, second = launch(2, work, tmp_path)
    assert second.error.startswith("ValueError") and "Process 1 of 2 failed" in first.error
    assert names(tmp_path) == [".cells.zarr.parts"]
    drawn.write_text("")
    fine(launch(2, lambda _: model.predict(controls, **SMALL, output=path), tmp_path))
    assert drawn.read_text() == "", "all parts were there"
    assert_same_cells(read_zarr(path), model.predict(controls, **SMALL))


def test_a_process_that_does_not_come_is_not_waited_for(
    model: PerturbDiff, controls: AnnData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("scperturbdiff.prediction._team.LIMIT", 2.0)
    path = tmp_path / "cells.zarr"
    (ended,) = launch(2, lambda _: model.predict(controls, **REQUEST, output=path), tmp_path, started=[0])
    assert ended.error.startswith("ConnectionError: Process 0 of 2 did not meet the others within 2 s"), ended
    assert names(tmp_path) == []


def test_a_process_that_is_silent_is_not_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("scperturbdiff.prediction._team.LIMIT", 2.0)
    stopped = tmp_path / "stopped"

    def work(rank: int) -> None:
        with Team(rank, 2) as team:
            if rank == 1:
                stopped.write_text(str(os.getpid()))
                os.kill(os.getpid(), signal.SIGSTOP)
                time.sleep(SOON)
            try:
                team.gather()
            finally:
                os.kill(int(stopped.read_text()), signal.SIGKILL)

    first, second = launch(2, work, tmp_path)
    assert second.code == -signal.SIGKILL
    assert first.code == 1 and first.error.startswith("ConnectionError: Another process is gone"), first


# ---- parts of something else --------------------------------------------------------------------------------------


@pytest.fixture
def interrupted(
    model: PerturbDiff, controls: AnnData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> tuple[Path, Path]:
    """Where a prediction was going, and some of its parts."""
    set_alone(monkeypatch)
    path = tmp_path / "cells.zarr"
    with pytest.MonkeyPatch.context() as patch:
        break_after(patch, 5, rank=0, how=fail)
        with pytest.raises(ValueError, match="is broken"):
            model.predict(controls, **REQUEST, output=path)
    return path, tmp_path / ".cells.zarr.parts"


def test_parts_of_another_prediction_are_not_taken(
    interrupted: tuple[Path, Path], model: PerturbDiff, controls: AnnData, expected: AnnData
) -> None:
    path, folder = interrupted
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    other_counts, other_names, other_model = controls.copy(), controls.copy(), copy.deepcopy(model)
    other_counts.X[3, 5] += 1
    other_names.obs_names = [f"{name}-x" for name in controls.obs_names]
    other_model.module.latent_mean[0] += 1
    other_retrieval = copy.deepcopy(model)
    state = other_retrieval.module.get_extra_state()
    state["retrieval"]["retrieval"]["responses"]["shift"][0, 0] += 1
    other_retrieval.module.set_extra_state(state)
    for what, *(of, cells), more in (
        ('seed 4 and 5', model, controls, {"seed": 5}),
        ("n_steps 1 and 2", model, controls, {"n_steps": 2}),
        ("populations", model, controls, {"perturbations": ["P01", "P02+P04", "P02"]}),
        ("number of cells", model, controls, {"n_cells": 8}),
        ("target_sum", model, controls, {"target_sum": 5e3}),
        ("transform_batch", model, controls, {"transform_batch": "D1"}),
        ("counts of control cells", model, other_counts, {}),
        ("names and labels of control cells", model, other_names, {}),
        ("model", other_model, controls, {}),
        ("model", other_retrieval, controls, {}),
    ):  # fmt: skip
        said = rf"parts' holds parts of another prediction.* There and here: (.*; )?{what}[ .]"
        with pytest.raises(ValueError, match=said):
            of.predict(cells, **REQUEST | more, output=path)
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before
    model.predict(controls, **REQUEST, output=path)
    assert_same_store(read_zarr(path), expected)


def test_parts_without_a_record_of_what_they_are_of_are_not_taken(
    interrupted: tuple[Path, Path], model: PerturbDiff, controls: AnnData
) -> None:
    path, folder = interrupted
    (folder / "run.json").unlink()
    with pytest.raises(ValueError, match="parts of another prediction"):
        model.predict(controls, **REQUEST, output=path)


def test_a_damaged_part_is_named(interrupted: tuple[Path, Path], model: PerturbDiff, controls: AnnData) -> None:
    path, folder = interrupted
    part = min(folder.glob("*.npz"))
    content = bytearray(part.read_bytes())
    content[len(content) // 2] ^= 255
    part.write_bytes(content)
    with pytest.raises(ValueError, match=rf"{part.name}' is damaged"):
        model.predict(controls, **REQUEST, output=path)
    assert not path.exists()
    part.unlink()
    with pytest.raises(FileNotFoundError, match=part.name):
        model.predict(controls, **REQUEST, output=path)
    assert not path.exists()


def test_processes_must_be_asked_for_the_same(model: PerturbDiff, controls: AnnData, tmp_path: Path) -> None:
    path = tmp_path / "cells.zarr"
    ended = launch(2, lambda rank: model.predict(controls, **REQUEST | {"seed": rank}, output=path), tmp_path)
    assert [one.code for one in ended] == [1, 1]
    assert any("Processes must be asked for the same" in one.error and "seed" in one.error for one in ended), ended
    assert names(tmp_path) == []


def test_a_folder_that_is_not_shared_is_noticed(tmp_path: Path) -> None:
    here, there = (Parts(tmp_path / name, [3, 4]) for name in ("a", "b"))
    here.open({"seed": 1})
    here.check_shared({"seed": 1})
    with pytest.raises(FileNotFoundError, match="all need the same disk"):
        there.check_shared({"seed": 1})


# ---- what is there, and who makes what ----------------------------------------------------------------------------


def test_several_processes_write_zarr_only(
    model: PerturbDiff, controls: AnnData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_alone(monkeypatch)
    model.predict(controls, **REQUEST, output=tmp_path / "one.h5ad").file.close()
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match=r"cells\.h5ad' must end in \.zarr, which several processes"):
        model.predict(controls, **REQUEST, output=tmp_path / "cells.h5ad")
    assert names(tmp_path) == ["one.h5ad"]


def test_what_is_there_is_not_replaced(model: PerturbDiff, controls: AnnData, tmp_path: Path) -> None:
    path = tmp_path / "cells.zarr"
    path.write_text("mine")
    first, second = launch(2, lambda _: model.predict(controls, **REQUEST, output=path), tmp_path)
    assert first.error.startswith("FileExistsError") and "exists already" in first.error
    assert second.error.startswith("ConnectionError: Process 0 of 2 failed")
    assert (names(tmp_path), path.read_text()) == ([path.name], "mine")


def test_numbers_of_processes_are_checked(
    model: PerturbDiff, controls: AnnData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_alone(monkeypatch)
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(ValueError, match="RANK=1 must be from 0 to WORLD_SIZE - 1 = 0"):
        model.predict(controls, **REQUEST, output=tmp_path / "cells.zarr")


@pytest.mark.parametrize("sizes", [[5], [1] * 1000, [30_000, 1, 1, 4000, 200, 200], [10**6, *[7] * 500]])
def test_parts_are_whole_populations_in_order_and_shares_are_even(sizes: list[int], tmp_path: Path) -> None:
    parts = Parts(tmp_path, sizes)
    assert all(0 <= after - before <= 1 for before, after in pairwise(parts.of)) and parts.of[0] == 0
    np.testing.assert_array_equal(parts.sizes, [np.array(sizes)[parts.of == i].sum() for i in range(len(parts.sizes))])
    for n in (1, 2, 3, 7):
        shares = balance(range(len(parts.sizes)), parts.sizes, n)
        assert sorted(part for share in shares for part in share) == list(range(len(parts.sizes)))
        load = [parts.sizes[share].sum() for share in shares]
        # as the largest goes first, nobody is ahead by more than the last that was given
        assert max(load) - min(load) <= parts.sizes.max()


# ---- the command --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def files(model: PerturbDiff, controls: AnnData, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("files")
    model.save(folder / "model")
    controls.write_h5ad(folder / "controls.h5ad")
    return folder


def words(files: Path, out: Path, *more: str) -> list[str]:
    wanted = ["--perturbations", *REQUEST["perturbations"], "--n-cells", "9", "--n-populations", "2", "--seed", "4"]
    return ["predict", str(files / "model"), str(files / "controls.h5ad"), "--out", str(out), *wanted, *more]


def test_the_command_of_several_processes(
    files: Path, expected: AnnData, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "new" / "cells.zarr"
    fine(launch(2, lambda _: sys.exit(main(words(files, path))), tmp_path))
    assert capfd.readouterr().out.count(f"{expected.n_obs} predicted cells in {path}") == 1
    assert_same_store(read_zarr(path), expected)
    ended = launch(2, lambda _: sys.exit(main(words(files, path, "--overwrite"))), tmp_path)
    assert [one.code for one in ended] == [1, 1]
    assert "cells.zarr already there. Processes of torchrun replace nothing" in capfd.readouterr().err


@pytest.mark.slow
def test_torchrun(files: Path, expected: AnnData, tmp_path: Path) -> None:
    path = tmp_path / "cells.zarr"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["-m", "scperturbdiff", *words(files, path)]
    subprocess.run(command, check=True, timeout=300)
    assert names(tmp_path) == [path.name]
    assert_same_store(read_zarr(path), expected)
    shutil.rmtree(path)
