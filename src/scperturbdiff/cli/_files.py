"""Files of the commands: read with clear errors, never overwritten by accident."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from pathlib import Path

    import pandas as pd
    from anndata import AnnData


def read_cells(path: Path) -> AnnData:
    """Read an h5ad file; errors name it."""
    import anndata as ad

    return _read(path, "h5ad", ad.read_h5ad, (OSError, KeyError, ValueError))


def read_table(path: Path | None, index_col: int | None = None) -> pd.DataFrame | None:
    """Read a CSV file; errors name it. No path, no table."""
    import pandas as pd

    if path is None:
        return None
    wrong = (UnicodeDecodeError, pd.errors.ParserError, pd.errors.EmptyDataError)
    return _read(path, "CSV", partial(pd.read_csv, index_col=index_col), wrong)


def _read(path: Path, kind: str, read: Callable[[Path], Any], errors: tuple[type[Exception], ...]) -> Any:
    if not path.is_file():
        raise FileNotFoundError(f"There is no file {str(path)!r}.")
    try:
        return read(path)
    except errors as error:
        raise ValueError(f"{str(path)!r} cannot be read as {kind}: {error}") from error


def check_free(paths: Iterable[Path], overwrite: bool) -> None:
    """Raise a `FileExistsError` if any output is there already; checked before long work, not after."""
    taken = [str(path) for path in paths if path.exists()]
    if taken and not overwrite:
        raise FileExistsError(f"{', '.join(taken)} already there. Pass --overwrite to replace, or another --out.")


def check_folder(path: Path) -> None:
    """Raise a `NotADirectoryError` if a folder is wanted where there is a file."""
    if path.exists() and not path.is_dir():
        raise NotADirectoryError(f"--out {str(path)!r} is a file; a folder is wanted.")


def check_model(folder: Path) -> None:
    """Raise a `FileNotFoundError` unless `folder` looks like a saved model."""
    if not (folder / "model.pt").is_file():
        raise FileNotFoundError(f"{str(folder)!r} is not a folder of a saved model: it has no model.pt.")


def write_cells(adata: AnnData, path: Path) -> None:
    """Write an h5ad file, through a temporary one beside it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    try:
        adata.write_h5ad(partial, compression="gzip")
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
