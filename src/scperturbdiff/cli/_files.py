"""Files of the commands: read with clear errors, written as a whole, never overwritten by accident."""

from __future__ import annotations

import os
from functools import partial
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence
    from pathlib import Path

    import pandas as pd
    from anndata import AnnData


FORMATS = (".h5ad", ".zarr")
"""Suffixes of files of cells that are written."""
CELL_BYTES = 100
"""Memory that a predicted cell takes at the very least, with its name, latent vector and a few counts."""
SPARE_BYTES = 32_000_000
"""Space on the disk that is left free when cells are written."""


def read_cells(path: Path) -> AnnData:
    """Read an h5ad file; errors name it."""
    import anndata as ad

    from scperturbdiff.storage import check_h5ad

    def read(path: Path) -> AnnData:
        check_h5ad(path)
        cells = ad.read_h5ad(path)
        if not isinstance(cells, ad.AnnData):
            raise TypeError(f"it holds a {type(cells).__name__}")
        return cells

    return _read(path, "h5ad", read)


def read_table(path: Path) -> pd.DataFrame:
    """Read a CSV file, all values as the text they are: a donor is called 01, a gene NA. Errors name the file."""
    import pandas as pd

    return _read(path, "CSV", partial(pd.read_csv, dtype=str, keep_default_na=False, na_values=[""]))


def _read(path: Path, kind: str, read: Callable[[Path], Any]) -> Any:
    if not path.is_file():
        raise FileNotFoundError(f"There is no file {str(path)!r}.")
    try:
        return read(path)
    except Exception as error:  # of a damaged file libraries say anything: a RecursionError, an AttributeError ...
        said = str(error) or type(error).__name__
        raise ValueError(f"{str(path)!r} cannot be read as {kind}: {said}") from error


def check_wanted(table: pd.DataFrame | None, n_cells: int | None, n_populations: int | None) -> None:
    """Raise an error if numbers of cells are none, or so large that nothing could hold them."""
    import numpy as np
    import pandas as pd

    from scperturbdiff.data import N_CELLS
    from scperturbdiff.memory import check_memory

    wanted = pd.Series([n_cells], dtype=float) if table is None or N_CELLS not in table else table[N_CELLS]
    numbers = pd.to_numeric(wanted, errors="coerce")
    wrong = wanted.notna() & ~(np.isfinite(numbers) & (numbers >= 1) & (numbers % 1 == 0))
    if wrong.any():
        raise ValueError(f"{N_CELLS}={wanted[wrong].iloc[0]} must be a positive integer.")
    total = float(numbers.sum()) * (n_populations or 1)
    check_memory(total * CELL_BYTES, f"{total:,.0f} cells", "Ask for fewer.")


def check_outputs(paths: Sequence[Path], overwrite: bool) -> None:
    """Raise an `OSError` if files are there already, or cannot be written; asked before long work, not after."""
    from scperturbdiff.storage import check_writable

    check_free(paths, overwrite)
    for path in paths:
        wanted = "folder" if path.suffix == ".zarr" else "file"
        if path.exists() and path.is_dir() != (wanted == "folder"):
            raise OSError(f"--out {str(path)!r} is no {wanted}, and is not replaced by one.")
        check_writable(path)


def check_free(paths: Iterable[Path], overwrite: bool) -> None:
    """Raise a `FileExistsError` if any output is there already."""
    taken = [str(path) for path in paths if os.path.lexists(path)]
    if taken and not overwrite:
        raise FileExistsError(f"{', '.join(taken)} already there. Pass --overwrite to replace, or another --out.")


def share_of_work() -> int | None:
    """Number of this process among those that `torchrun` started; `None` where it started none."""
    return int(os.environ["RANK"]) if "RANK" in os.environ and "WORLD_SIZE" in os.environ else None


def own_device() -> int | str:
    """Number of the GPU that is this process's, in the order in which `torchrun` counts processes of a machine."""
    if share_of_work() is None:
        return "auto"
    import torch

    n_devices = torch.cuda.device_count()
    return int(os.environ.get("LOCAL_RANK", 0)) % n_devices if n_devices else "auto"


def check_shared(path: Path, share: int) -> None:
    """Raise an `OSError` if several processes cannot write cells to `path`: they replace nothing."""
    from scperturbdiff.storage import check_writable

    if os.path.lexists(path):
        raise FileExistsError(f"{path} already there. Processes of torchrun replace nothing: remove it first.")
    if share == 0:  # which makes and removes folders on the way
        check_writable(path)


def check_folder(path: Path) -> None:
    """Raise an `OSError` unless there is or can be a folder, and files can be written into it."""
    from scperturbdiff.storage import check_writable

    if path.exists() and not path.is_dir():
        raise NotADirectoryError(f"--out {str(path)!r} is a file; a folder is wanted.")
    check_writable(path / "file")


def check_model(folder: Path, allow_pickle: bool = False) -> None:
    """Raise unless `folder` holds a model that may be read; before anything else is."""
    from scperturbdiff.storage import find_model

    if not find_model(folder) and not allow_pickle:
        raise ValueError(
            f"{str(folder)!r} holds a model of an older version, a pickle, which can run any code when read. If you "
            f"trust whoever wrote it: scperturbdiff convert {folder} --out NEW --allow-pickle"
        )


def check_format(path: Path) -> None:
    """Raise a `ValueError` unless cells can be written to a file of this name."""
    if path.suffix not in FORMATS:
        raise ValueError(f"--out {str(path)!r} must end in {' or '.join(FORMATS)}.")


def write_cells(adata: AnnData, path: Path, overwrite: bool) -> None:
    """Write an `.h5ad` file or a `.zarr` store."""
    from scperturbdiff.storage import atomic_file, atomic_folder, check_space

    if path.suffix == ".zarr":
        with atomic_folder(path, overwrite=overwrite) as partial:
            adata.write_zarr(partial)
        return
    matrices = [adata.X, *adata.layers.values()]
    n_bytes = sum(matrix.data.nbytes + matrix.indices.nbytes for matrix in matrices)
    # counts shrink to a fourth; on a full disk HDF5 would end the interpreter
    check_space(path.parent, n_bytes / 2 + SPARE_BYTES)
    with atomic_file(path, overwrite=overwrite) as partial:
        adata.write_h5ad(partial, compression="gzip")


def write_table(table: pd.DataFrame, path: Path, overwrite: bool) -> None:
    """Write a CSV file without the index."""
    from scperturbdiff.storage import atomic_file

    with atomic_file(path, overwrite=overwrite) as partial:
        table.to_csv(partial, index=False)


def write_figure(figure: Any, path: Path, overwrite: bool) -> None:
    """Write a figure in the format of the suffix."""
    from scperturbdiff.storage import atomic_file

    with atomic_file(path, overwrite=overwrite) as partial:
        figure.savefig(partial, dpi=100, bbox_inches="tight")
