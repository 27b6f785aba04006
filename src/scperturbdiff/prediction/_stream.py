"""Writing predicted cells to disk while they are generated."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self

import h5py
import numpy as np
from anndata import AnnData
from anndata.io import read_elem, sparse_dataset, write_elem
from scipy import sparse

from scperturbdiff.data import COUNTS, assemble_cells, log_normalize

if TYPE_CHECKING:
    from collections.abc import Mapping
    from types import TracebackType

    import pandas as pd

    from scperturbdiff.prediction._pieces import Piece


BUFFER_CELLS = 4096
"""Cells gathered in memory before they are appended to the file."""
FORMATS = (".h5ad", ".zarr")


class CellWriter:
    """Appends generated cells to an `.h5ad` or `.zarr` store.

    Counts and expression, which are nearly all of the cells, are never in memory as a whole; latent vectors and
    annotation are kept until the end.

    Parameters
    ----------
    path
        Where to write; must not exist.
    target_sum
        Counts per cell after normalisation, before the logarithm.
    """

    def __init__(self, path: str | Path, target_sum: float) -> None:
        self.path, self.target_sum = Path(path), target_sum
        if self.path.suffix not in FORMATS:
            raise ValueError(f"output={str(path)!r} must end in one of {FORMATS}.")
        if self.path.exists():
            raise FileExistsError(f"output={str(path)!r} exists already.")
        self._buffer: list[sparse.csr_matrix] = []
        self._n_buffered = 0
        self._is_empty = True

    def _open(self, mode: Literal["r", "w"]) -> Any:
        if self.path.suffix == ".h5ad":
            return h5py.File(self.path, mode)
        import zarr

        return zarr.open_group(str(self.path), mode=mode)

    def __enter__(self) -> Self:
        self._store = self._open("w")
        self._store.attrs["encoding-type"], self._store.attrs["encoding-version"] = "anndata", "0.1.0"
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if isinstance(self._store, h5py.File):
            self._store.close()
        if kind is not None:  # half a file is worse than none
            shutil.rmtree(self.path) if self.path.is_dir() else self.path.unlink(missing_ok=True)

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

    def finish(self, obs: pd.DataFrame, var: pd.DataFrame, pieces: list[Piece], made_by: Mapping[str, Any]) -> None:
        """Write what is left and the annotation."""
        self._flush()
        frame = assemble_cells(
            sparse.csr_matrix((len(obs), len(var)), dtype=np.float32),
            obs,
            var,
            latent=np.concatenate([piece.latent for piece in pieces]),
            target_sum=self.target_sum,
            made_by=made_by,
        )
        for name in ("obs", "var"):
            write_elem(self._store, name, getattr(frame, name))
        for name in ("obsm", "uns", "varm", "obsp", "varp"):
            write_elem(self._store, name, dict(getattr(frame, name)))

    def open(self) -> AnnData:
        """The cells, with the matrices left on disk."""
        store = self._open("r")
        return AnnData(
            X=sparse_dataset(store["X"]),
            layers={COUNTS: sparse_dataset(store[f"layers/{COUNTS}"])},
            **{name: read_elem(store[name]) for name in ("obs", "var", "obsm", "uns")},
        )
