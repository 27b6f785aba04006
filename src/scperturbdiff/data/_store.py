"""Cells that stay on disk: an AnnData of which annotation alone is in memory."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import h5py
from anndata import AnnData
from anndata.io import read_elem, sparse_dataset

from scperturbdiff.data._messages import preview

if TYPE_CHECKING:
    from pathlib import Path

ANNOTATION = ("obs", "var", "uns", "obsm", "varm")
"""What is read into memory."""
SPARSE = ("csr_matrix", "csc_matrix")


def open_store(store: str | Path | Any) -> AnnData:
    """Open cells that do not fit into memory: `X` and layers stay on disk, and are read where they are needed.

    The cells can be used wherever this package takes an AnnData, for set-up, training and prediction, with the same
    results as in memory. Counts are checked while they are read, and eight blocks of 2,048 cells at set-up.

    Parameters
    ----------
    store
        Path of a `.zarr` store, sharded or not, or of an `.h5ad` file; a URL of a store that fsspec knows
        (``"s3://..."``; needs fsspec and its package for that protocol); or an open ``zarr.Group`` or
        ``h5py.Group``.

    Returns
    -------
    AnnData with `obs`, `var`, `uns`, `obsm` and `varm` in memory. ``to_memory()`` reads the rest.

    Raises
    ------
    FileNotFoundError
        If there is nothing.
    ValueError
        If what is there is no AnnData.

    Examples
    --------
    >>> cells = scperturbdiff.open_store("screen.zarr")
    >>> scperturbdiff.PerturbDiff.setup_anndata(cells, perturbation_key="perturbation", control="control")
    """
    group, name = _open(store), repr(str(store))
    if missing := [part for part in ("obs", "var") if part not in group]:
        raise ValueError(f"{name} is no AnnData: it has no {preview(missing)}.")
    stored = group["layers"] if "layers" in group else {}
    return AnnData(
        X=_on_disk(group["X"]) if "X" in group else None,
        layers={key: _on_disk(stored[key]) for key in stored},
        **{part: read_elem(group[part]) for part in ANNOTATION if part in group},
    )


def _open(store: Any) -> Any:
    """The group of a store."""
    if not isinstance(store, str | os.PathLike):
        return store
    path = os.fspath(store)
    if path.endswith((".h5ad", ".h5")):
        return h5py.File(path, "r")
    import zarr

    return zarr.open_group(path, mode="r")


def _on_disk(stored: Any) -> Any:
    """A matrix that stays where it is."""
    return sparse_dataset(stored) if stored.attrs.get("encoding-type") in SPARSE else stored
