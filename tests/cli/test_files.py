"""Files that commands read and write: what is wrong with them is told in one line, before long work."""

from __future__ import annotations

import errno
import os
import shutil
from collections import namedtuple
from typing import TYPE_CHECKING, Any

import anndata as ad
import h5py
import numpy as np
import pandas as pd
import pytest
from scipy import sparse

from scperturbdiff import PerturbDiff
from scperturbdiff.cli import main
from scperturbdiff.cli._files import read_cells, read_table, write_cells

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

KEYS = ["--perturbation-key", "drug", "--control", "DMSO"]
Usage = namedtuple("Usage", ["total", "used", "free"])


def failure(capsys: pytest.CaptureFixture[str], *words: object, code: int = 1) -> str:
    """Run a command that fails and return what it says: one line on stderr, no traceback."""
    capsys.readouterr()
    assert main([str(word) for word in words]) == code
    said = capsys.readouterr().err.strip().splitlines()
    assert len(said) == 1, said
    return said[0].removeprefix(f"scperturbdiff {words[0]}: ").removeprefix("error: ")


def names(folder: Path) -> list[str]:
    return sorted(os.listdir(folder))


@pytest.fixture
def screen(tmp_path: Path) -> Path:
    """A file of cells."""
    folder = tmp_path / "in"
    folder.mkdir()
    obs = pd.DataFrame({"drug": ["DMSO", "A", "B"] * 4}, index=[f"c{i}" for i in range(12)])
    ad.AnnData(np.ones((12, 5), np.float32), obs=obs).write_h5ad(folder / "screen.h5ad")
    return folder / "screen.h5ad"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A folder that looks like a model, as long as nobody reads it."""
    folder = tmp_path / "in" / "model"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "model.json").write_text("{}")
    return folder


# ---- what is read --------------------------------------------------------------------------------------------------


def entry(**attributes: str) -> dict[str, str]:
    return {name.replace("_", "-"): value for name, value in attributes.items()}


def external_link(file: h5py.File) -> None:
    file["uns/more"] = h5py.ExternalLink("/etc/passwd", "/")


def external_storage(file: h5py.File) -> None:
    del file["X"]
    data = file.create_dataset("X", (12, 5), "i1", external=[("/etc/passwd", 0, 60)])
    data.attrs.update(entry(encoding_type="array", encoding_version="0.2.0"))


def virtual(file: h5py.File) -> None:
    layout = h5py.VirtualLayout((12, 5), "f4")
    layout[:] = h5py.VirtualSource("/etc/passwd", "X", (12, 5))
    del file["X"]
    file.create_virtual_dataset("X", layout)


def loop(file: h5py.File) -> None:
    file["uns/again"] = file["uns"]


def soft_loop(file: h5py.File) -> None:
    file["uns/again"] = h5py.SoftLink("/uns")


def bomb(file: h5py.File) -> None:
    """400 TB of zeros, none of them stored."""
    del file["X"]
    data = file.create_dataset("X", (10**8, 10**6), "f4", chunks=(1000, 1000), compression="gzip")
    data.attrs.update(entry(encoding_type="array", encoding_version="0.2.0"))


def absurd_shape(file: h5py.File) -> None:
    del file["X"]
    group = file.create_group("X")
    group.attrs.update(entry(encoding_type="csr_matrix", encoding_version="0.1.0"))
    group.attrs["shape"] = [12, 2**62]
    group["data"], group["indices"], group["indptr"] = np.ones(1), np.zeros(1, int), np.arange(13) > 0


def other_content(file: h5py.File) -> None:
    for name in list(file):
        del file[name]
    file["numbers"] = np.arange(3)


def dictionary(file: h5py.File) -> None:
    file.attrs["encoding-type"] = "dict"


def damaged(file: h5py.File) -> None:
    del file["X"]
    data = file.create_dataset("X", (12, 5), "f4", chunks=(12, 5), compression="gzip")
    data.attrs.update(entry(encoding_type="array", encoding_version="0.2.0"))
    data.id.write_direct_chunk((0, 0), b"no gzip at all")


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (external_link, "'/uns/more' is a link into another file, '/etc/passwd'"),
        (external_storage, "'/X' is stored in another file, '/etc/passwd'"),
        (virtual, "'/X' is stored in another file, '/etc/passwd'"),
        (loop, "'/uns/again' is '/uns' by another name"),
        (soft_loop, "recursion"),
        (bomb, "of which '/X' is the largest, need 372,529 GB of memory"),
        (absurd_shape, ""),
        (other_content, "it has no obs and no var"),
        (dictionary, ""),
        (damaged, ""),
    ],
)
def test_a_spoilt_file_is_named(
    spoil: Callable[[h5py.File], None], said: str, screen: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with h5py.File(screen, "r+") as file:
        spoil(file)
    message = failure(capsys, "train", screen, "--out", tmp_path / "model", *KEYS)
    assert message.startswith(f"{str(screen)!r} cannot be read as h5ad: ")
    assert said in message
    assert names(tmp_path) == ["in"]


def test_names_within_a_file_are_no_fault(screen: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with h5py.File(screen, "r+") as file:
        file["layers/counts"] = h5py.SoftLink("/X")
        file["layers/same"] = file["X"]
    assert set(read_cells(screen).layers) - {None} == {"counts", "same"}  # None: X, since anndata 0.13
    monkeypatch.setattr("scperturbdiff.storage._inspect.MAX_ENTRIES", 5)
    with pytest.raises(ValueError, match="more than 5 entries"):
        read_cells(screen)


@pytest.mark.parametrize("kept", [0, 1, 500, -500])
def test_a_file_that_is_cut_off_is_named(
    kept: int, screen: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    screen.write_bytes(screen.read_bytes()[:kept])
    words = ["evaluate", screen, screen, "--out", tmp_path / "scores", *KEYS]
    assert f"{str(screen)!r} cannot be read as h5ad: " in failure(capsys, *words)


@pytest.mark.parametrize("content", [b"", b"\x00\xff\xfe", b'a,b\n1,2\n"3'])
def test_a_table_that_is_none_is_named(
    content: bytes, screen: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "in" / "table.csv").write_bytes(content)
    words = ["train", screen, "--out", tmp_path / "model", "--embeddings", tmp_path / "in" / "table.csv", *KEYS]
    assert "table.csv' cannot be read as .csv: " in failure(capsys, *words)


def test_values_of_a_table_stay_the_text_they_are(tmp_path: Path) -> None:
    (tmp_path / "wanted.csv").write_text("drug,donor,n_cells\nNA,01,5\n1e3,,\n")
    table = read_table(tmp_path / "wanted.csv")
    assert table["drug"].tolist() == ["NA", "1e3"] and table["donor"].tolist()[0] == "01"
    assert table.isna().to_numpy().tolist() == [[False] * 3, [False, True, True]]


@pytest.mark.parametrize("n", ["inf", "-inf", "0", "2.5", "many", "1e400"])
def test_numbers_of_cells_in_a_table(
    n: str, screen: Path, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "wanted.csv").write_text(f"drug,n_cells\nA,\nB,{n}\n")
    words = ["predict", model, screen, "--out", tmp_path / "pred.h5ad", "--table", tmp_path / "wanted.csv"]
    assert "must be a positive integer" in failure(capsys, *words)


@pytest.mark.parametrize("more", [["--n-cells", 10**15], ["--n-cells", 10**8, "--n-populations", 10**7], ["--table"]])
def test_more_cells_than_any_memory_holds(
    more: list[Any], screen: Path, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "wanted.csv").write_text("drug,n_cells\nA,10\nB,1e15\n")
    more = [*more, tmp_path / "wanted.csv"] if more == ["--table"] else more
    message = failure(capsys, "predict", model, screen, "--out", tmp_path / "pred.h5ad", *more)
    assert message.startswith("1,000,000,000,000,0") and "GB of memory; there are" in message


# ---- what is written -----------------------------------------------------------------------------------------------


@pytest.fixture
def no_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing may be read before outputs were looked at."""

    def fail(*_: object, **__: object) -> None:
        pytest.fail("work was begun")

    monkeypatch.setattr("scperturbdiff.cli._commands.read_cells", fail)
    monkeypatch.setattr("scperturbdiff.datasets.simulate", fail)


def commands(out: Path, screen: Path, model: Path) -> dict[str, list[Any]]:
    return {
        "demo": ["demo", "--quick", "--out", out],
        "train": ["train", screen, "--out", out, *KEYS],
        "predict": ["predict", model, screen, "--out", out / "pred.h5ad"],
        "evaluate": ["evaluate", screen, screen, "--out", out, *KEYS],
    }


@pytest.mark.usefixtures("no_work")
@pytest.mark.parametrize("name", ["demo", "train", "predict", "evaluate"])
def test_outputs_are_looked_at_first(
    name: str,
    screen: Path,
    model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "file").write_text("mine")
    words = commands(tmp_path / "file" / "out", screen, model)[name]
    assert "cannot be written: Not a directory" in failure(capsys, *words)

    def refuse(*_: object) -> int:
        raise OSError(errno.EROFS, "Read-only file system")

    (tmp_path / "folder").mkdir()
    monkeypatch.setattr(os, "open", refuse)  # tests may run as a user that may write everywhere
    words = [*commands(tmp_path / "folder", screen, model)[name], "--overwrite"]
    assert "cannot be written: Read-only file system" in failure(capsys, *words)
    monkeypatch.undo()
    assert names(tmp_path) == ["file", "folder", "in"]


@pytest.mark.usefixtures("no_work")
def test_predicted_cells_have_one_of_two_formats(
    screen: Path, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["predict", model, screen, "--overwrite", "--out"]
    for name in ("pred", "pred.csv", "pred.h5"):
        assert f"{name}' must end in .h5ad or .zarr" in failure(capsys, *words, tmp_path / name)
    (tmp_path / "folder.h5ad").mkdir()
    assert "folder.h5ad' is no file" in failure(capsys, *words, tmp_path / "folder.h5ad")
    (tmp_path / "file.zarr").write_text("mine")
    assert "file.zarr' is no folder" in failure(capsys, *words, tmp_path / "file.zarr")
    (tmp_path / "link.h5ad").symlink_to(tmp_path / "nowhere")
    assert "link.h5ad already there" in failure(
        capsys, *[w for w in words if w != "--overwrite"], tmp_path / "link.h5ad"
    )


@pytest.mark.parametrize("suffix", ["h5ad", "zarr"])
def test_cells_are_written_as_a_whole(suffix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / f"cells.{suffix}"
    read = ad.read_h5ad if suffix == "h5ad" else ad.read_zarr
    (tmp_path / f".cells.{suffix}.partial").symlink_to(tmp_path / "victim")
    for i in (1, 2):
        write_cells(ad.AnnData(sparse.csr_matrix(np.full((3, 4), i, np.float32))), path, overwrite=i == 2)
        assert (read(path).X.toarray() == i).all()

    def fail(_: object, partial: Path, **__: object) -> None:
        assert partial.exists()
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(ad.AnnData, f"write_{suffix}", fail)
    with pytest.raises(OSError, match="No space left"):
        write_cells(ad.AnnData(sparse.csr_matrix((3, 4))), path, overwrite=True)
    assert (read(path).X.toarray() == 2).all()
    assert names(tmp_path) == sorted([f".cells.{suffix}.partial", path.name])


def test_a_full_disk_is_noticed_before_hdf5_ends_the_interpreter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(10**9, 10**9, 0))
    with pytest.raises(OSError, match="MB are needed, 0.0 MB are free"):
        write_cells(ad.AnnData(sparse.csr_matrix((3, 4))), tmp_path / "cells.h5ad", overwrite=False)
    assert names(tmp_path) == []


# ---- being stopped -------------------------------------------------------------------------------------------------


def as_lightning_does(*_: object, **__: object) -> None:
    try:
        raise KeyboardInterrupt
    except KeyboardInterrupt:
        raise SystemExit(1)  # noqa: B904


def interrupt(*_: object, **__: object) -> None:
    raise KeyboardInterrupt


def exhaust(*_: object, **__: object) -> None:
    raise MemoryError


@pytest.mark.parametrize(
    ("stop", "code", "said"),
    [
        (interrupt, 130, "interrupted"),
        (as_lightning_does, 130, "interrupted"),
        (exhaust, 1, "Not enough memory"),
    ],
)
def test_a_command_that_is_stopped_says_so(
    stop: Callable[..., None],
    code: int,
    said: str,
    screen: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(PerturbDiff, "train", stop)
    words = ["train", screen, "--out", tmp_path / "model", *KEYS]
    assert failure(capsys, *words, code=code) == said
    if code == 130:
        words += ["--checkpoint", tmp_path / "steps"]
        assert failure(capsys, *words, code=code) == "interrupted; go on with --resume"
    assert names(tmp_path) == ["in"]


@pytest.mark.parametrize("seed", ["-1", str(2**70), "1.5"])
def test_seeds_are_within_what_libraries_take(seed: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["demo", "--seed", seed])
    assert stop.value.code == 2
    assert "--seed" in capsys.readouterr().err


def test_help_says_what_a_model_is_trusted_for(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["predict", "--help"])
    assert "trusted for its numbers only" in " ".join(capsys.readouterr().out.split())
