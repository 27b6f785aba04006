"""Writing that leaves the old file whole when it fails, and never half a new one; what to ask before long work."""

from __future__ import annotations

import errno
import os
import secrets
import shutil
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

MB = 1_000_000
NAME = 40
"""Characters of the target's name in that of a temporary one, which must not become too long for the file system."""
TAKEN = (errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR)
"""What systems say of a folder moved to where something is."""


@contextmanager
def atomic_file(path: str | Path, *, overwrite: bool) -> Iterator[Path]:
    """A file that is there as a whole or not at all.

    Whatever ends the block early, also a killed process, leaves at `path` what was there before. A link at `path` is
    not followed: it counts as something that exists, and is what is replaced.

    Parameters
    ----------
    path
        The file to write. Folders above it are made.
    overwrite
        Whether a file at `path` is replaced. Without, of several writers one wins and the others fail.

    Yields
    ------
    An empty file beside `path`, with its suffix, to write to.

    Raises
    ------
    FileExistsError
        Before or after the block, if something is at `path` and may not be replaced.
    IsADirectoryError
        If a folder is at `path`.
    """
    path = Path(path)
    _check_free(path, overwrite)
    if _is_folder(path):
        raise IsADirectoryError(errno.EISDIR, f"{str(path)!r} is a folder; a file is to be written there.")
    with _parents(path):
        partial = _new_file(path)
        try:
            yield partial
            _sync(partial)
            os.replace(partial, path) if overwrite else _move_new(partial, path)
            _sync_folder(path.parent)
        finally:
            partial.unlink(missing_ok=True)


@contextmanager
def atomic_folder(path: str | Path, *, overwrite: bool = False) -> Iterator[Path]:
    """A folder that is there as a whole or not at all: :func:`atomic_file` for folders.

    An old folder is moved aside, to a hidden name beside it, and removed when the new one is in its place; a process
    killed between these two steps leaves both, whole, under such names.

    Parameters
    ----------
    path
        The folder to write. Folders above it are made.
    overwrite
        Whether a folder at `path` is replaced. Without, of several writers one wins and the others fail.

    Yields
    ------
    An empty folder beside `path` to write to.

    Raises
    ------
    FileExistsError
        Before or after the block, if something is at `path` and may not be replaced.
    NotADirectoryError
        If a file is at `path`.
    """
    path = Path(path)
    _check_free(path, overwrite)
    if path.exists() and not path.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, f"{str(path)!r} is a file; a folder is to be written there.")
    with _parents(path):
        partial = _beside(path)
        partial.mkdir()
        try:
            yield partial
            for folder, _, names in os.walk(partial):
                for name in names:
                    _sync(Path(folder, name))
                _sync_folder(Path(folder))
            _replace_folder(partial, path) if overwrite else _move_new_folder(partial, path)
            _sync_folder(path.parent)
        finally:
            shutil.rmtree(partial, ignore_errors=True)


def check_writable(path: str | Path) -> None:
    """Raise an error now if a file or folder could not be made at `path` later.

    A file is made beside it and removed again, and so are the folders above it that were not there. To ask whether
    files can be written *into* a folder, ask for one of them.

    Parameters
    ----------
    path
        What is to be written, and need not be there.

    Raises
    ------
    OSError
        Names `path` and the reason.
    """
    path = Path(path)
    try:
        with suppress(FileNotFoundError):
            path.lstat()  # a name may be too long, which that of the file beside it is not
        with _parents(path, keep=False):
            _new_file(path).unlink()
    except OSError as error:
        raise OSError(error.errno, f"{str(path)!r} cannot be written: {error.strerror}.") from error


def check_space(folder: str | Path, n_bytes: float) -> None:
    """Raise an error if less than `n_bytes` are free where `folder` is or will be.

    Quotas of users are not seen.

    Raises
    ------
    OSError
        With `errno.ENOSPC`; tells what is needed and what is free.
    """
    there = Path(folder).absolute()
    while not there.exists():
        there = there.parent
    free = shutil.disk_usage(there).free
    if free < n_bytes:
        text = f"No space in {str(folder)!r}: {n_bytes / MB:,.1f} MB are needed, {free / MB:,.1f} MB are free."
        raise OSError(errno.ENOSPC, text)


def _is_folder(path: Path) -> bool:
    """Whether it is a folder itself: links to folders are replaced as links."""
    return path.is_dir() and not path.is_symlink()


def _check_free(path: Path, overwrite: bool) -> None:
    if os.path.lexists(path) and not overwrite:
        raise _exists(path)


def _exists(path: Path) -> FileExistsError:
    return FileExistsError(errno.EEXIST, f"{str(path)!r} exists already.")


def _beside(path: Path) -> Path:
    """A hidden name in the folder of `path` that nobody else uses."""
    return path.with_name(f".{path.stem[:NAME]}.{secrets.token_hex(8)}.partial{path.suffix[:NAME]}")


def _new_file(path: Path) -> Path:
    """An empty file beside `path`, never one that was there, with the permissions that the user's files have."""
    partial = _beside(path)
    os.close(os.open(partial, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
    return partial


@contextmanager
def _parents(path: Path, *, keep: bool = True) -> Iterator[None]:
    """Folders above `path`; those made here go again on failure, or without `keep`, unless somebody uses them."""
    made: list[Path] = []
    try:
        for folder in reversed(path.parents):
            with suppress(FileExistsError):
                if not folder.exists():
                    folder.mkdir()
                    made.append(folder)
        yield
    except BaseException:
        keep = False
        raise
    finally:
        if not keep:
            with suppress(OSError):
                for folder in reversed(made):
                    folder.rmdir()


def _move_new(partial: Path, path: Path) -> None:
    """Give a file its name, which must be free: unlike renaming, linking never replaces."""
    try:
        os.link(partial, path)
    except FileExistsError:
        raise _exists(path) from None
    except OSError:  # file systems without links: the name is taken first
        try:
            os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY))
        except FileExistsError:
            raise _exists(path) from None
        try:
            os.replace(partial, path)
        except BaseException:
            path.unlink()
            raise


def _move_new_folder(partial: Path, path: Path) -> None:
    """Give a folder its name, which must be free. Renaming replaces an empty folder at most."""
    if os.path.lexists(path):
        raise _exists(path)
    try:
        os.rename(partial, path)
    except OSError as error:
        raise (_exists(path) if error.errno in TAKEN else error) from None


def _replace_folder(partial: Path, path: Path) -> None:
    """Give a folder its name, and remove what had it."""
    old: list[Path] = []
    try:
        while True:
            aside = _beside(path)
            with suppress(FileNotFoundError):
                os.rename(path, aside)
                old.append(aside)
            try:
                os.rename(partial, path)
                break
            except OSError as error:
                if error.errno not in TAKEN:  # somebody else was faster; the last one stays
                    raise
    except BaseException:
        if old and not os.path.lexists(path):
            os.rename(old.pop(), path)
        raise
    finally:
        for aside in old:
            shutil.rmtree(aside, ignore_errors=True) if _is_folder(aside) else aside.unlink()


def _sync(path: Path) -> None:
    """Have the content on disk before the name: else a power cut leaves an empty file under it."""
    with path.open("r+b") as file:
        os.fsync(file.fileno())


def _sync_folder(path: Path) -> None:
    with suppress(OSError):  # not on every system
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
