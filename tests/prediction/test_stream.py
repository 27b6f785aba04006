"""Cells on their way to disk: all of them in the end, or nothing under the name that was asked for."""

from __future__ import annotations

import contextlib
import errno
import multiprocessing
import os
import shutil
import signal
import time
from collections import namedtuple
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import pytest
from anndata import read_h5ad, read_zarr
from scipy import sparse
from tests.helpers import assert_same_cells

from scperturbdiff.prediction._pieces import Piece
from scperturbdiff.prediction._stream import SPARE, CellWriter

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from anndata import AnnData

    from scperturbdiff import PerturbDiff

N_CELLS, N_GENES, N_LATENT = 7, 11, 3
SUFFIXES = ["h5ad", "zarr"]
Usage = namedtuple("Usage", ["total", "used", "free"])


@pytest.fixture(autouse=True)
def small_buffer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("scperturbdiff.prediction._stream.BUFFER_CELLS", 2 * N_CELLS)


def make_pieces(n: int) -> Iterator[Piece]:
    rng = np.random.default_rng(0)
    for i in range(n):
        counts = sparse.csr_matrix(rng.poisson(1.0, (N_CELLS, N_GENES)).astype(np.float32))
        yield Piece(i, 0, np.arange(N_CELLS), counts, rng.normal(size=(N_CELLS, N_LATENT)).astype(np.float32))


def make_obs(pieces: list[Piece]) -> pd.DataFrame:
    names = [f"population {piece.population}" for piece in pieces for _ in piece.rows]
    return pd.DataFrame({"perturbation": np.array(names, dtype=object)})


VAR = pd.DataFrame({"chromosome": ["1"] * N_GENES}, index=[f"g{i}" for i in range(N_GENES)])


def write(path: Path, n: int = 5) -> AnnData:
    with CellWriter(path, 1e4) as writer:
        kept = [writer.write(piece) for piece in make_pieces(n)]
        writer.finish(make_obs(kept), VAR, kept, {"model": "none"})
    return writer.open()


def read(path: Path) -> AnnData:
    return (read_h5ad if path.suffix == ".h5ad" else read_zarr)(path)


def names(folder: Path) -> list[str]:
    return sorted(os.listdir(folder))


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_cells_on_disk(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / "above" / f"cells.{suffix}"
    cells = write(path)
    assert names(path.parent) == [path.name]
    counts = sparse.vstack([piece.counts for piece in make_pieces(5)])
    assert (read(path).layers["counts"] != counts).nnz == 0
    # what the documentation says of the cells that are returned
    assert_same_cells(cells.to_memory(), read(path))
    assert_same_cells(cells.to_memory().copy(), read(path))


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_nothing_is_replaced(suffix: str, tmp_path: Path) -> None:
    path, link = tmp_path / f"cells.{suffix}", tmp_path / f"link.{suffix}"
    path.write_text("mine")
    link.symlink_to(tmp_path / "nowhere")
    for taken in (path, link):
        with pytest.raises(FileExistsError, match=f"output='.*{taken.name}' exists already"):
            CellWriter(taken, 1e4)
    assert path.read_text() == "mine"
    assert names(tmp_path) == sorted([path.name, link.name])


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_of_two_writers_one_wins(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"cells.{suffix}"
    with pytest.raises(FileExistsError, match="exists already"), CellWriter(path, 1e4) as slow:  # noqa: PT012
        kept = [slow.write(piece) for piece in make_pieces(1)]
        write(path)
        slow.finish(make_obs(kept), VAR, kept, {})
    assert read(path).n_obs == 5 * N_CELLS
    assert names(tmp_path) == [path.name]


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_failure_leaves_nothing(suffix: str, tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), CellWriter(tmp_path / f"cells.{suffix}", 1e4) as writer:  # noqa: PT012
        for piece in make_pieces(5):
            writer.write(piece)
        raise KeyboardInterrupt
    assert names(tmp_path) == []


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_folder_that_cannot_be_written_is_noticed_first(suffix: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(OSError, match=f"'.*file/cells.{suffix}' cannot be written: Not a directory"):
        CellWriter(tmp_path / "file" / f"cells.{suffix}", 1e4)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_disk_is_not_filled(suffix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last flush that fits is written, the next one is not begun: HDF5 would end the interpreter."""
    free = iter([SPARE + 10**6, SPARE + 10**6, SPARE + 100])
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(10**12, 0, next(free)))
    with pytest.raises(OSError, match=r"32\.0 MB are needed, 32\.0 MB are free") as caught:
        write(tmp_path / f"cells.{suffix}", n=10)
    assert caught.value.errno == errno.ENOSPC
    assert names(tmp_path) == []


BAD: dict[str, tuple[Any, Any]] = {
    "zarr": ({"perturbation": ["A"], "dose/day": ["1"]}, "dose/day"),
    "h5ad": ({"perturbation": ["A\0"]}, "perturbation"),
}


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("where", ["obs", "var"])
def test_annotation_that_cannot_be_written_is_noticed_first(suffix: str, where: str, tmp_path: Path) -> None:
    columns, name = BAD[suffix]
    good, bad = pd.DataFrame({"fine": ["A"]}, index=["a"]), pd.DataFrame(columns, index=["a"])
    with CellWriter(tmp_path / f"cells.{suffix}", 1e4) as writer:
        writer.rehearse(good, good)
        with pytest.raises(ValueError, match=f"cells.{suffix}' cannot hold the annotation of these cells.*{name}"):
            writer.rehearse(*((bad, good) if where == "obs" else (good, bad)))
        kept = [writer.write(piece) for piece in make_pieces(1)]
        writer.finish(make_obs(kept), VAR, kept, {})
    assert list(read(tmp_path / f"cells.{suffix}").obs) == ["perturbation"]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the other process needs this one's model")
@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGTERM])
def test_a_killed_prediction_leaves_nothing_under_the_name(
    suffix: str, end: signal.Signals, trained_model: PerturbDiff, screen: AnnData, tmp_path: Path
) -> None:
    controls = screen[screen.obs["perturbation"] == "control"].copy()
    path = tmp_path / f"cells.{suffix}"

    def predict() -> None:
        trained_model.predict(controls, n_cells=200, n_populations=1000, seed=0, progress=False, output=path)

    process = multiprocessing.get_context("fork").Process(target=predict)
    process.start()
    deadline = time.monotonic() + 60
    while process.is_alive() and time.monotonic() < deadline and not has_cells(tmp_path):
        time.sleep(0.05)
    assert process.is_alive(), "it is at work"
    os.kill(process.pid or 0, end)
    process.join(timeout=60)
    assert process.exitcode == -end
    assert has_cells(tmp_path), "the test is one of half a file"
    assert all(name.startswith(".cells.") for name in names(tmp_path))


def has_cells(folder: Path) -> bool:
    """Whether matrices are on their way to a file of this folder."""
    for partial in folder.glob(".cells.*"):
        with contextlib.suppress(FileNotFoundError):  # what is rehearsed is removed again
            if partial.is_dir():
                return (partial / "layers" / "counts" / "data" / "c").is_dir()
            return partial.stat().st_size > 10_000
    return False


def test_an_output_that_is_no_path_is_named() -> None:
    with pytest.raises(TypeError, match="output=5 must be a path"):
        CellWriter(5, 1e4)
