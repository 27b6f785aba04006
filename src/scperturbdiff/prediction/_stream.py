"""Writing predicted cells to disk while they are generated."""

from __future__ import annotations

import os
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import h5py
import numpy as np
from anndata.io import sparse_dataset, write_elem
from scipy import sparse

from scperturbdiff.arguments import check_type
from scperturbdiff.data import COUNTS, assemble_cells, log_normalize, open_store
from scperturbdiff.storage import atomic_file, atomic_folder, check_space, check_writable

if TYPE_CHECKING:
    from collections.abc import Mapping
    from types import TracebackType

    import pandas as pd
    from anndata import AnnData
    from numpy.typing import NDArray

    from scperturbdiff.prediction._pieces import Piece


BUFFER_CELLS = 4096
"""Cells gathered in memory before they are appended to the file."""
SPARE = 32_000_000
"""Bytes on the disk that are left free: for what HDF5 writes late, and for what others write meanwhile."""
FORMATS = (".h5ad", ".zarr")
MATRICES = ("X", f"layers/{COUNTS}")
CHUNK = 2**18
"""Entries in a chunk of matrices that several processes write, 1 MB: processes write whole ones."""


class CellWriter:
    """Appends generated cells to an `.h5ad` or `.zarr` store.

    Counts and expression, which are nearly all of the cells, are never in memory as a whole; latent vectors and
    annotation are kept until the end.

    They go to a hidden file or folder beside `path`, which gets its name when everything is written: a process that
    is killed leaves no half a file under that name.

    Parameters
    ----------
    path
        Where to write; must not exist.
    target_sum
        Counts per cell after normalisation, before the logarithm.

    Raises
    ------
    TypeError
        If `path` is no path.
    ValueError
        If `path` has another suffix.
    OSError
        If something is at `path` or nothing can be written there.
    """

    def __init__(self, path: str | Path, target_sum: float) -> None:
        check_type("output", path, (str, os.PathLike), "a path")
        self.path, self.target_sum = Path(path), target_sum
        if self.path.suffix not in FORMATS:
            raise ValueError(f"output={str(path)!r} must end in one of {FORMATS}.")
        if os.path.lexists(self.path):
            raise FileExistsError(f"output={str(path)!r} exists already.")
        check_writable(self.path)
        self._is_h5ad = self.path.suffix == ".h5ad"
        self._buffer: list[sparse.csr_matrix] = []
        self._n_buffered = 0
        self._is_empty = True

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            atomic = atomic_file if self._is_h5ad else atomic_folder
            self.partial = stack.enter_context(atomic(self.path, overwrite=False))
            if self._is_h5ad:
                self._store: Any = stack.enter_context(h5py.File(self.partial, "w"))
            else:
                import zarr

                self._store = zarr.open_group(str(self.partial), mode="w-")
            self._store.attrs["encoding-type"], self._store.attrs["encoding-version"] = "anndata", "0.1.0"
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.__exit__(kind, error, trace)

    def rehearse(self, obs: pd.DataFrame, var: pd.DataFrame) -> None:
        """Raise a `ValueError` if annotation of this kind cannot be written, which else shows at the end only.

        Formats differ in what names of columns and values they take.
        """
        try:
            frame = self._annotation(obs, var)
            if self._is_h5ad:
                store: Any = h5py.File("rehearsal", "w", driver="core", backing_store=False)  # in memory
            else:
                import zarr

                store = zarr.group()
            for name in ("obs", "var"):
                write_elem(store, name, getattr(frame, name))
        except Exception as error:
            # the name of the column is in a note
            text = " ".join([str(error), *getattr(error, "__notes__", ())])
            raise ValueError(f"output={str(self.path)!r} cannot hold the annotation of these cells: {text}") from error

    def write(self, piece: Piece) -> Piece:
        """Take the counts of `piece`; returns the piece without them."""
        self._buffer.append(piece.counts)
        self._n_buffered += piece.counts.shape[0]
        if self._n_buffered >= BUFFER_CELLS:
            self._flush()
        return replace(piece, counts=sparse.csr_matrix((0, piece.counts.shape[1]), dtype=np.float32))

    def _flush(self) -> None:
        if not self._buffer:
            return
        counts = sparse.vstack(self._buffer, format="csr")
        self._buffer, self._n_buffered = [], 0
        self._check_space(2 * (counts.data.nbytes + counts.indices.nbytes + 8 * counts.shape[0]))
        parts = {"X": log_normalize(counts, self.target_sum), f"layers/{COUNTS}": counts.astype(np.int32)}
        for name, matrix in parts.items():
            if self._is_empty:
                matrix.indptr = matrix.indptr.astype(np.int64)  # a file may hold more entries than 32 bits count
                if name == "X":
                    write_elem(self._store, name, matrix)
                else:
                    write_elem(self._store, "layers", {COUNTS: matrix})
            else:
                sparse_dataset(self._store[name]).append(matrix)
        self._is_empty = False

    def lay_out(self, indptr: NDArray[np.int64], n_genes: int) -> None:
        """Make matrices of a zarr store whose rows end at `indptr[1:]`, for several processes to :meth:`fill`."""
        shape = len(indptr) - 1, n_genes
        for name, dtype in (("X", np.float32), (COUNTS, np.int32)):
            empty = sparse.csr_matrix(shape, dtype=dtype)
            empty.indptr = np.zeros(len(indptr), np.int64)
            named: Any = ("X", empty) if name == "X" else ("layers", {COUNTS: empty})
            write_elem(self._store, *named, dataset_kwargs={"chunks": (CHUNK,)})
        for name in MATRICES:
            self._store[name]["indptr"][...] = indptr
            for part in ("data", "indices"):
                self._store[name][part].resize((int(indptr[-1]),))

    def attach(self, partial: str) -> None:
        """Open the store that another process has laid out, under its name beside `path`."""
        import zarr

        self._store = zarr.open_group(str(self.path.with_name(partial)), mode="r+")

    def fill(self, start: int, expression: NDArray, counts: NDArray, indices: NDArray) -> None:
        """Write entries from number `start` on, of both matrices."""
        part = slice(start, start + len(indices))
        self._check_space(expression.nbytes + counts.nbytes + 2 * indices.nbytes)
        for name, data in zip(MATRICES, (expression, counts), strict=True):
            self._store[name]["data"][part] = data
            self._store[name]["indices"][part] = indices

    def finish(self, obs: pd.DataFrame, var: pd.DataFrame, pieces: list[Piece], made_by: Mapping[str, Any]) -> None:
        """Write what is left and the annotation."""
        self._flush()
        latent = np.concatenate([piece.latent for piece in pieces])
        frame = self._annotation(obs, var, latent=latent, made_by=made_by)
        self._check_space(latent.nbytes + frame.obs.memory_usage(deep=True).sum())
        for name in ("obs", "var"):
            write_elem(self._store, name, getattr(frame, name))
        for name in ("obsm", "uns", "varm", "obsp", "varp"):
            write_elem(self._store, name, dict(getattr(frame, name)))

    def _annotation(self, obs: pd.DataFrame, var: pd.DataFrame, **more: Any) -> AnnData:
        """Cells without counts."""
        counts = sparse.csr_matrix((len(obs), len(var)), dtype=np.float32)
        return assemble_cells(counts, obs, var, target_sum=self.target_sum, **more)

    def _check_space(self, n_bytes: float) -> None:
        """Raise an `OSError` before a disk is full: then HDF5 does not return an error but ends the interpreter."""
        check_space(self.path.parent, n_bytes + SPARE)

    def open(self) -> AnnData:
        """The cells, with the matrices left on disk."""
        return open_store(self.path)
