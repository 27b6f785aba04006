"""Cells that stay on disk: opened, read in pieces, checked while they are read, with the same results as in memory."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import anndata as ad
import numpy as np
import pytest
import scvi
from scipy import sparse
from tests.helpers import FEW_STEPS, SETUP, TINY, assert_same_cells

from scperturbdiff import PerturbDiff, open_store
from scperturbdiff.data import CountReader, check_cells, check_counts, iter_counts, iter_rows
from scperturbdiff.data._rows import is_on_disk, take_rows
from scperturbdiff.latent._batches import RowBatches

if TYPE_CHECKING:
    from pathlib import Path

    from anndata import AnnData
    from numpy.typing import NDArray

FORMS = ["csr.h5ad", "dense.h5ad", "csr.zarr", "dense.zarr", "sharded.zarr"]
ROWS, DATA = "scperturbdiff.data._rows", "scperturbdiff.data._counts"
REQUEST: dict[str, Any] = {"perturbations": ["P01", "P02"], "n_cells": 6, "seed": 0, "progress": False}


def write(cells: AnnData, folder: Path, form: str) -> str:
    """Path of a file or store of these cells."""
    cells, path = cells.copy(), folder / form
    if form.startswith("dense"):
        cells.X = np.asarray(sparse.csr_matrix(cells.X).toarray())
    if form.endswith(".h5ad"):
        cells.write_h5ad(path)
    else:
        with ad.settings.override(zarr_write_format=3, auto_shard_zarr_v3=form.startswith("sharded")):
            cells.write_zarr(path)
    return str(path)


def trained(cells: AnnData, **setup: Any) -> PerturbDiff:
    scvi.settings.seed = 0
    PerturbDiff.setup_anndata(cells, **SETUP, **setup)
    model = PerturbDiff(cells, **TINY)
    model.train(**FEW_STEPS, seed=0)
    return model


@pytest.fixture(scope="module")
def in_memory(screen: AnnData) -> tuple[AnnData, NDArray[np.float32]]:
    """Predicted cells, and latent vectors of all cells."""
    model = trained(screen.copy())
    return model.predict(**REQUEST), model.get_latent_representation()


@pytest.mark.parametrize("form", FORMS)
def test_results_are_those_of_cells_in_memory(screen: AnnData, in_memory: Any, form: str, tmp_path: Path) -> None:
    path = write(screen, tmp_path, form)
    cells = open_store(path)
    model = trained(cells)
    assert is_on_disk(cells.X) and is_on_disk(model.adata.X)
    assert_same_cells(model.predict(**REQUEST), in_memory[0])
    controls = cells[(cells.obs["perturbation"] == "control").to_numpy()]
    assert_same_cells(model.predict(controls, **REQUEST), in_memory[0])
    np.testing.assert_array_equal(model.get_latent_representation(), in_memory[1])
    model.save(tmp_path / "model")
    loaded = PerturbDiff.load(tmp_path / "model", adata=open_store(path))
    assert_same_cells(loaded.predict(**REQUEST), in_memory[0])


def test_a_url_and_a_layer(screen: AnnData, in_memory: Any, tmp_path: Path) -> None:
    fsspec = pytest.importorskip("fsspec")
    cells = screen.copy()
    cells.layers["raw"], cells.X = cells.X, np.log1p(cells.X.toarray())
    fsspec.filesystem("memory").put(write(cells, tmp_path, "csr.zarr"), "/screen.zarr", recursive=True)
    assert_same_cells(trained(open_store("memory://screen.zarr"), layer="raw").predict(**REQUEST), in_memory[0])


def test_latent_vectors_in_a_file_and_few_cells_at_a_time(
    screen: AnnData, in_memory: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """None of the sizes decides a number."""
    monkeypatch.setattr("scperturbdiff.training._latent.MAPPED_BYTES", 0)
    monkeypatch.setattr("scperturbdiff.responses.SOME", 50)
    monkeypatch.setattr("scperturbdiff.data._reader.AHEAD_BYTES", 2**17)
    for name, value in (("NEAR", 2), ("READ_ROWS", 32)):
        monkeypatch.setattr(f"{ROWS}.{name}", value)
    model = trained(open_store(write(screen, tmp_path, "csr.zarr")))
    assert_same_cells(model.predict(**REQUEST), in_memory[0])


def test_annotation_is_read_and_matrices_are_not(screen: AnnData, tmp_path: Path) -> None:
    cells = screen.copy()
    cells.layers["same"], cells.obsm["place"], cells.uns["made"] = cells.X.copy(), np.ones((cells.n_obs, 2)), "today"
    for form in ("csr.h5ad", "csr.zarr"):
        found = open_store(write(cells, tmp_path, form))
        assert is_on_disk(found.X) and is_on_disk(found.layers["same"])
        assert found.obs.equals(cells.obs) and found.var.equals(cells.var) and found.uns["made"] == "today"
        assert (found.to_memory().layers["same"] != cells.X).nnz == 0
    del cells.X
    assert open_store(write(cells, tmp_path, "without.zarr")).X is None


def test_what_is_no_anndata_is_named(tmp_path: Path) -> None:
    import zarr

    with pytest.raises(FileNotFoundError):
        open_store(tmp_path / "nothing.zarr")
    zarr.open_group(str(tmp_path / "other.zarr"), mode="w").create_group("obs")
    with pytest.raises(ValueError, match=r"other.zarr' is no AnnData: it has no 'var'"):
        open_store(tmp_path / "other.zarr")


def test_cells_read_lazily_are_refused_with_what_works(screen: AnnData, tmp_path: Path) -> None:
    class Lazy(ad.AnnData):
        """As `read_lazy` returns it: with annotation that is no table of pandas."""

        obs = property(lambda self: object())  # type: ignore[assignment]

    lazy = screen.copy()
    lazy.__class__ = Lazy
    with pytest.raises(TypeError, match=r"adata was opened with read_lazy.*scperturbdiff.open_store\(path\)"):
        PerturbDiff.setup_anndata(lazy, **SETUP)
    with pytest.raises(TypeError, match="open_store"):
        check_cells("screen.zarr")


def test_cells_that_dask_reads_are_read(screen: AnnData, in_memory: Any, tmp_path: Path) -> None:
    pytest.importorskip("dask")
    lazy = ad.experimental.read_lazy(write(screen, tmp_path, "csr.zarr"))
    with pytest.raises(TypeError, match="open_store"):
        PerturbDiff.setup_anndata(lazy, **SETUP)
    cells = ad.AnnData(lazy.X, obs=lazy.obs.to_memory(), var=lazy.var.to_memory())
    assert_same_cells(trained(cells).predict(**REQUEST), in_memory[0])


def test_matrices_stored_by_gene_are_refused(screen: AnnData, tmp_path: Path) -> None:
    cells = screen.copy()
    cells.X = cells.X.tocsc()
    with pytest.raises(TypeError, match="adata.X is on disk gene by gene"):
        PerturbDiff.setup_anndata(open_store(write(cells, tmp_path, "csr.zarr")), **SETUP)


def test_annbatch_is_refused_with_what_works() -> None:
    with pytest.raises(NotImplementedError, match=r"scperturbdiff.open_store\(path\), then PerturbDiff.setup_anndata"):
        PerturbDiff.setup_annbatch("collection.zarr", paths=["cells.h5ad"], batch_key="donor")


# ---- counts are checked while they are read ------------------------------------------------------------------------


@pytest.fixture
def small_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(f"{DATA}.SAMPLED_BLOCKS", 2)
    monkeypatch.setattr(f"{DATA}.SAMPLED_ROWS", 3)


def damaged(cells: AnnData, row: int, value: float) -> AnnData:
    cells = cells.copy()
    cells.X = cells.X.astype(np.float32)
    cells.X.data[cells.X.indptr[row] : cells.X.indptr[row + 1]] = value
    return cells


@pytest.mark.parametrize(("row", "there"), [(0, True), (2, True), (3, False), (-3, True), (-4, False)])
def test_first_and_last_cells_are_looked_at_before(
    small_samples: None, screen: AnnData, tmp_path: Path, row: int, there: bool
) -> None:
    row %= screen.n_obs
    cells = damaged(screen, row, 0.5)
    matrix = open_store(write(cells, tmp_path, "csr.zarr")).X
    if there:
        with pytest.raises(ValueError, match="adata.X must hold raw counts, but .* entries are non-integer"):
            check_counts(matrix, sample=True)
    else:
        assert len(check_counts(matrix, sample=True)) == 6
    for whole, sample in ((matrix, False), (cells.X, True)):  # what is in memory is looked at as a whole
        with pytest.raises(ValueError, match="non-integer"):
            check_counts(whole, sample=sample)
    rows = np.delete(np.arange(screen.n_obs), row)
    assert len(check_counts(matrix, rows=rows, sample=True)) == 6


@pytest.mark.parametrize(
    ("value", "message"), [(0.5, "entries are non-integer"), (0.0, r"1 cells have no counts at all \(rows 57\)")]
)
@pytest.mark.parametrize("form", ["csr.zarr", "dense.zarr"])
def test_all_cells_are_checked_when_they_are_read(
    small_samples: None, screen: AnnData, tmp_path: Path, form: str, value: float, message: str
) -> None:
    cells = open_store(write(damaged(screen, 57, value), tmp_path, form))
    PerturbDiff.setup_anndata(cells, **SETUP)
    model = PerturbDiff(cells, **TINY)
    with pytest.raises(ValueError, match=f"adata.X.*{message}"):
        model.train(**FEW_STEPS)
    assert not model.is_trained_
    with pytest.raises(ValueError, match=message):
        model.train(**{**FEW_STEPS, "max_epochs_vae": 0})
    good = trained(screen.copy())
    with pytest.raises(ValueError, match=message):
        good.get_latent_representation(cells)
    assert len(good.get_latent_representation(cells, indices=range(57))) == 57


def test_controls_are_checked_when_they_are_read(small_samples: None, screen: AnnData, tmp_path: Path) -> None:
    model = trained(screen.copy())
    row = int(np.flatnonzero(screen.obs["perturbation"] == "control")[7])
    cells = open_store(write(damaged(screen, row, 0.5), tmp_path, "csr.zarr"))
    with pytest.raises(ValueError, match="non-integer"):
        model.predict(cells, **REQUEST)


def test_rows_of_errors_are_those_of_the_matrix(tmp_path: Path) -> None:
    counts = np.ones((9, 4), np.float32)
    counts[[4, 7]] = 0
    matrix = open_store(write(ad.AnnData(counts), tmp_path, "csr.zarr")).X
    with pytest.raises(ValueError, match=r"M: 1 cells .* \(rows 4\)"):
        list(iter_counts(matrix, chunk=2, where="M"))
    with pytest.raises(ValueError, match=r"M: 1 cells .* \(rows 7\)"):
        list(iter_counts(matrix, np.array([8, 0, 7, 1]), 2, "M"))
    assert len(list(iter_counts(counts, chunk=2))) == 5  # in memory, where others have checked it


# ---- rows in pieces ------------------------------------------------------------------------------------------------


@pytest.fixture(params=FORMS)
def stored(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Any, NDArray[np.float32]]:
    values = np.random.default_rng(0).poisson(1.0, size=(60, 5)).astype(np.float32) + np.float32(1)
    return open_store(write(ad.AnnData(values), tmp_path, request.param)).X, values


def dense(block: Any) -> NDArray[np.float32]:
    return block.toarray() if sparse.issparse(block) else np.asarray(block)


@pytest.mark.parametrize(("near", "pieces"), [(0, 60), (2, 7), (1000, 1000)])
def test_near_and_far_rows(stored: Any, near: int, pieces: int, monkeypatch: pytest.MonkeyPatch) -> None:
    matrix, values = stored
    monkeypatch.setattr(f"{ROWS}.NEAR", near)
    monkeypatch.setattr(f"{ROWS}.READ_ROWS", pieces)
    rng = np.random.default_rng(1)
    for rows in (np.arange(60), np.array([59]), np.arange(3, 20), np.sort(rng.permutation(60)[:13])):
        np.testing.assert_array_equal(dense(take_rows(matrix, rows)), values[rows])
        shuffled = rng.permutation(np.concatenate([rows, rows[:2]]))
        np.testing.assert_array_equal(dense(next(iter_rows(matrix, shuffled))), values[shuffled])


def test_batches_are_the_same_whether_announced_or_not(stored: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    matrix, values = stored
    reader, rows = CountReader(matrix), np.array([5, 8, 30, 31])
    assert reader.ahead > 60 and CountReader(values).ahead == 0
    for announced in (rows[:0], np.array([31, 5, 7, 8, 30, 5]), rows[:2]):
        reader.announce(announced)
        assert reader(rows).dtype == np.float32
        np.testing.assert_array_equal(reader(rows), values[rows])
        np.testing.assert_array_equal(reader(np.array([59])), values[[59]])
    np.testing.assert_array_equal(CountReader(sparse.csr_matrix(values))(rows), values[rows])
    monkeypatch.setattr("scperturbdiff.data._reader.AHEAD_BYTES", 2**10)
    assert 10 < CountReader(matrix).ahead < 60  # a row has some 5 entries


@pytest.mark.parametrize(("rank", "n_ranks"), [(0, 1), (1, 2)])
def test_what_comes_next_is_announced(rank: int, n_ranks: int) -> None:
    told: list[set[int]] = []

    class Reader:
        ahead = 21

        def announce(self, rows: NDArray[np.int64]) -> None:
            told.append(set(rows.tolist()))

    batches = RowBatches(np.arange(100), 10, True, rank, n_ranks, reader=Reader())  # type: ignore[arg-type]
    drawn: set[int] = set()
    for batch in batches:
        assert set(batch) <= told[-1] and len(told[-1]) <= 21
        drawn |= set(batch)
    assert set().union(*told) == drawn and len(drawn) == 100 // n_ranks
    assert told[-1] == set()  # memory is given back
    for _ in (unfinished := iter(batches)):
        break
    del unfinished, _
    assert told[-1] == set()
