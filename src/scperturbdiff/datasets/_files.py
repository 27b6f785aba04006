"""Files of published data sets: given as a path or a URL, or those that pertpy downloads."""

from __future__ import annotations

import hashlib
import os
import tempfile
from contextlib import contextmanager
from dataclasses import dataclass
from http.client import HTTPException
from importlib import import_module, metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit
from urllib.request import urlopen

from scperturbdiff.arguments import check_type, refusal
from scperturbdiff.data import preview

if TYPE_CHECKING:
    from collections.abc import Iterator

    from anndata import AnnData

    PathLike = str | os.PathLike[str]

BLOCK = 2**20
"""Bytes read at a time."""
TIMEOUT = 60.0
"""Seconds without an answer after which a download is given up."""


@dataclass(frozen=True)
class Found:
    """What was read: an AnnData or a MuData, where from, and the digest of the file if there is one."""

    cells: Any
    place: str
    sha256: str = ""


def find(name: str, path_or_url: PathLike | None, cache_dir: PathLike | None, sha256: str | None) -> Found:
    """Read the data set `name`, which is what its function is called here and in pertpy.

    Parameters
    ----------
    path_or_url
        A file, or where to download it from; `None`: pertpy's.
    cache_dir
        Folder of downloads; `None`: :attr:`scanpy.settings.datasetdir`.
    sha256
        What the digest of the file must be; `None`: anything.
    """
    if sha256 is not None:
        check_type("sha256", sha256, str, "a SHA-256 digest, 64 hexadecimal digits")
        if len(sha256) != 64 or set(sha256.lower()) - set("0123456789abcdef"):
            raise refusal("sha256", sha256, "a SHA-256 digest, 64 hexadecimal digits")
    if path_or_url is None:
        if sha256 is not None:
            raise ValueError("sha256=... is that of a file: give path_or_url=..., too.")
        return _from_pertpy(name, cache_dir)
    check_type("path_or_url", path_or_url, (str, os.PathLike), "the path or the URL of a file")
    text = os.fspath(path_or_url)
    path = _download(text, cache_dir, sha256) if "://" in text else Path(text).expanduser()
    if not path.is_file():
        raise FileNotFoundError(f"path_or_url={text!r} is no file.")
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    _check_digest(digest, sha256, text)
    return Found(_read(path, text), text, digest)


def _check_digest(digest: str, wanted: str | None, place: str) -> None:
    if wanted is not None and digest != wanted.lower():
        raise ValueError(f"{place!r} has the SHA-256 digest {digest}, not {wanted.lower()}: another or a damaged file.")


def _read(path: Path, place: str) -> Any:
    """The AnnData or MuData in a file, whatever it is called."""
    import anndata
    import h5py
    import mudata

    if not h5py.is_hdf5(path):
        raise ValueError(f"{place!r} is no HDF5 file: an .h5ad or .h5mu file is wanted.")
    with h5py.File(path) as file:
        parts = set(file)
    if "mod" in parts:
        return mudata.read_h5mu(path)
    if not {"obs", "var"} <= parts:
        raise ValueError(f"{place!r} holds no AnnData and no MuData, but {preview(sorted(parts))}.")
    return anndata.read_h5ad(path)


def _download(url: str, cache_dir: PathLike | None, sha256: str | None) -> Path:
    """The file of a URL in the folder of downloads; it appears there when it is whole and what it should be."""
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.netloc:
        raise refusal("path_or_url", url, "a path, or a URL that begins with http:// or https://")
    with _datasetdir(cache_dir) as folder:
        path = folder / f"{hashlib.sha256(url.encode()).hexdigest()[:8]}-{Path(parts.path).name or 'data'}"
    if path.is_file():
        return path
    folder.mkdir(parents=True, exist_ok=True)
    digest = hashlib.sha256()
    handle, part = tempfile.mkstemp(dir=folder, prefix=f".{path.name}-")
    try:
        with os.fdopen(handle, "wb") as file, urlopen(url, timeout=TIMEOUT) as answer:  # noqa: S310
            while block := answer.read(BLOCK):
                digest.update(block)
                file.write(block)
            told = answer.headers.get("Content-Length")
            if told is not None and file.tell() != int(told):
                raise OSError(f"it ended after {file.tell()} of {told} bytes")
        _check_digest(digest.hexdigest(), sha256, url)
        Path(part).replace(path)
    except (OSError, HTTPException) as error:
        raise OSError(f"{url!r} could not be downloaded: {error}. Download it yourself and give its path.") from error
    finally:
        Path(part).unlink(missing_ok=True)
    return path


@contextmanager
def _datasetdir(cache_dir: PathLike | None) -> Iterator[Path]:
    """The folder in which scanpy and pertpy keep data sets, for the time being `cache_dir` if that is given."""
    import scanpy as sc

    before = sc.settings.datasetdir
    try:
        if cache_dir is not None:
            sc.settings.datasetdir = Path(cache_dir).expanduser()
        yield Path(sc.settings.datasetdir)
    finally:
        sc.settings.datasetdir = before


def _from_pertpy(name: str, cache_dir: PathLike | None) -> Found:
    """What ``pertpy.data.<name>()`` returns."""
    ways = (
        f"Either give the path or URL of a file, {name}('{name}.h5ad'), or install pertpy (pip install pertpy), which "
        f"downloads it: pertpy.data.{name}()."
    )
    try:
        load = getattr(import_module("pertpy.data"), name)
    except (ImportError, AttributeError) as error:
        raise ImportError(f"{name} has no file to read, and pertpy cannot be used ({error}). {ways}") from error
    with _datasetdir(cache_dir):
        try:
            cells: AnnData = load()
        except OSError as error:
            raise OSError(f"pertpy could not get {name}: {error}. {ways}") from error
    return Found(cells, f"pertpy {metadata.version('pertpy')}")
