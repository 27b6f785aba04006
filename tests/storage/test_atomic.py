"""Files and folders that are written as a whole or not at all."""

from __future__ import annotations

import errno
import inspect
import os
import shutil
import subprocess
import sys
import threading
from collections import namedtuple
from contextlib import ExitStack
from typing import TYPE_CHECKING, Protocol

import pytest

from scperturbdiff.storage import atomic_file, atomic_folder, check_space, check_writable

if TYPE_CHECKING:
    from contextlib import AbstractContextManager
    from pathlib import Path

KINDS = ["file", "folder"]
N_WRITERS = 8
Usage = namedtuple("Usage", ["total", "used", "free"])


class Atomic(Protocol):
    """What `atomic_file` and `atomic_folder` have in common."""

    def __call__(self, path: str | Path, *, overwrite: bool) -> AbstractContextManager[Path]: ...


ATOMIC: dict[str, Atomic] = {"file": atomic_file, "folder": atomic_folder}


def put(path: Path, text: str) -> None:
    """Write a file, or into a folder."""
    (path / "inside" if path.is_dir() else path).write_text(text)


def content(path: Path) -> str:
    return (path / "inside" if path.is_dir() else path).read_text()


def make(kind: str, path: Path, text: str) -> None:
    if kind == "folder":
        path.mkdir()
    put(path, text)


def names(folder: Path) -> list[str]:
    """Everything in a folder, hidden names as well."""
    return sorted(os.listdir(folder))


@pytest.mark.parametrize("kind", KINDS)
def test_appears_at_the_end_with_folders_above(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "above" / "more" / "it.csv"
    with ATOMIC[kind](path, overwrite=False) as partial:
        put(partial, "new")
        assert partial.parent == path.parent
        assert partial.suffix == path.suffix
        assert not path.exists()
    assert content(path) == "new"
    assert names(path.parent) == ["it.csv"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize("kind", KINDS)
def test_failure_leaves_what_was_there(kind: str, error: type[BaseException], tmp_path: Path) -> None:
    make(kind, tmp_path / "old", "old")
    for path, overwrite in [(tmp_path / "old", True), (tmp_path / "above" / "new", False)]:
        with pytest.raises(error), ATOMIC[kind](path, overwrite=overwrite) as partial:  # noqa: PT012 (the block fails)
            put(partial, "half")
            raise error
    assert content(tmp_path / "old") == "old"
    assert names(tmp_path) == ["old"]


@pytest.mark.parametrize("kind", KINDS)
def test_overwrites_if_told(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "it"
    make(kind, path, "old")
    with pytest.raises(FileExistsError, match="it' exists already"), ATOMIC[kind](path, overwrite=False):
        pytest.fail("work is not begun")
    with ATOMIC[kind](path, overwrite=True) as partial:
        put(partial, "new")
        assert content(path) == "old"
    assert content(path) == "new"
    assert names(tmp_path) == ["it"]


@pytest.mark.parametrize("kind", KINDS)
def test_what_appears_meanwhile_is_not_replaced(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "it"
    with ExitStack() as stack:
        put(stack.enter_context(ATOMIC[kind](path, overwrite=False)), "mine")
        make(kind, path, "theirs")
        with pytest.raises(FileExistsError, match="it' exists already"):
            stack.close()
    assert content(path) == "theirs"
    assert names(tmp_path) == ["it"]


def test_no_file_for_a_folder_and_no_folder_for_a_file(tmp_path: Path) -> None:
    make("file", tmp_path / "file", "old")
    make("folder", tmp_path / "folder", "old")
    with (
        pytest.raises(IsADirectoryError, match="'.*folder' is a folder"),
        atomic_file(tmp_path / "folder", overwrite=True),
    ):
        pytest.fail("work is not begun")
    with (
        pytest.raises(NotADirectoryError, match="'.*file' is a file"),
        atomic_folder(tmp_path / "file", overwrite=True),
    ):
        pytest.fail("work is not begun")
    assert content(tmp_path / "file") == content(tmp_path / "folder") == "old"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("is_dangling", [False, True])
def test_links_are_not_followed(kind: str, is_dangling: bool, tmp_path: Path) -> None:
    target, path = tmp_path / "target", tmp_path / "it"
    path.symlink_to(target, target_is_directory=kind == "folder")
    if not is_dangling:
        make(kind, target, "old")
    with pytest.raises(FileExistsError), ATOMIC[kind](path, overwrite=False):
        pytest.fail("work is not begun")
    with ATOMIC[kind](path, overwrite=True) as partial:
        put(partial, "new")
    assert not path.is_symlink()
    assert content(path) == "new"
    assert names(tmp_path) == (["it"] if is_dangling else ["it", "target"])
    if not is_dangling:
        assert content(target) == "old"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("overwrite", [False, True])
def test_of_several_threads_one_wins(kind: str, overwrite: bool, tmp_path: Path) -> None:
    path, barrier, failed = tmp_path / "it", threading.Barrier(N_WRITERS), []

    def write(i: int) -> None:
        try:
            with ATOMIC[kind](path, overwrite=overwrite) as partial:
                put(partial, f"writer {i}")
                barrier.wait(timeout=30)
        except FileExistsError:
            failed.append(i)

    threads = [threading.Thread(target=write, args=(i,)) for i in range(N_WRITERS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(failed) == (0 if overwrite else N_WRITERS - 1)
    assert content(path) in {f"writer {i}" for i in range(N_WRITERS) if i not in failed}
    assert names(tmp_path) == ["it"]


WRITER = """
import runpy, sys
source, kind, path, text = sys.argv[1:]
ours = runpy.run_path(source)  # without the package, whose imports take seconds
with ours[f"atomic_{kind}"](path, overwrite=False) as partial:
    (partial / "inside" if partial.is_dir() else partial).write_text(text)
    print("ready", flush=True)
    sys.stdin.readline()
"""


def start(kind: str, path: Path, text: str) -> subprocess.Popen[str]:
    """A process that is about to write."""
    source = inspect.getfile(atomic_file.__wrapped__)
    words, pipe = [sys.executable, "-c", WRITER, source, kind, str(path), text], subprocess.PIPE
    process = subprocess.Popen(words, text=True, stdin=pipe, stdout=pipe, stderr=pipe)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


@pytest.mark.parametrize("kind", KINDS)
def test_of_two_processes_one_wins(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "it"
    processes = {text: start(kind, path, text) for text in ("one", "two")}
    for process in processes.values():
        assert process.stdin is not None
        process.stdin.write("\n")
        process.stdin.flush()
    errors = {text: process.communicate(timeout=30)[1] for text, process in processes.items()}
    winner, loser = sorted(errors, key=lambda text: len(errors[text]))
    assert errors[winner] == ""
    assert "FileExistsError" in errors[loser]
    assert content(path) == winner
    assert names(tmp_path) == ["it"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_killed_process_leaves_nothing_under_the_name(kind: str, tmp_path: Path) -> None:
    process = start(kind, tmp_path / "it", "half")
    process.kill()
    process.communicate(timeout=30)
    assert [name for name in names(tmp_path) if not name.startswith(".it.")] == []


def test_permissions_are_those_of_other_files(tmp_path: Path) -> None:
    for kind in KINDS:
        make(kind, tmp_path / f"usual {kind}", "usual")
        with ATOMIC[kind](tmp_path / kind, overwrite=False) as partial:
            put(partial, "new")
        assert (tmp_path / kind).stat().st_mode == (tmp_path / f"usual {kind}").stat().st_mode


def test_without_hard_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def link(*_: object) -> None:
        raise OSError(errno.EPERM, "not on this file system")

    monkeypatch.setattr(os, "link", link)
    path = tmp_path / "it"
    with atomic_file(path, overwrite=False) as partial:
        put(partial, "new")
    with pytest.raises(FileExistsError), atomic_file(tmp_path / "other", overwrite=False) as partial:
        put(tmp_path / "other", "theirs")
    assert (content(path), content(tmp_path / "other")) == ("new", "theirs")
    assert names(tmp_path) == ["it", "other"]


def test_old_folder_is_put_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, rename = tmp_path / "it", os.rename
    make("folder", path, "old")
    calls: list[Path] = []

    def fail_second(source: Path, target: Path) -> None:
        calls.append(target)
        if len(calls) == 2:
            raise OSError(errno.EIO, "disk on fire")
        rename(source, target)

    monkeypatch.setattr(os, "rename", fail_second)
    with pytest.raises(OSError, match="on fire"), atomic_folder(path, overwrite=True) as partial:
        put(partial, "new")
    assert content(path) == "old"
    assert names(tmp_path) == ["it"]


def test_long_names(tmp_path: Path) -> None:
    path = tmp_path / ("ü" * 120 + ".h5ad")
    check_writable(path)
    with atomic_file(path, overwrite=False) as partial:
        put(partial, "new")
    assert content(path) == "new"
    with pytest.raises(OSError, match="cannot be written: File name too long"):
        check_writable(tmp_path / ("x" * 300))


def test_writable_leaves_nothing(tmp_path: Path) -> None:
    check_writable(tmp_path / "it")
    check_writable(tmp_path / "above" / "more" / "it")
    assert names(tmp_path) == []


@pytest.mark.parametrize("below", ["file/it", "file/more/it"])
def test_writable_names_a_file_in_the_way(below: str, tmp_path: Path) -> None:
    make("file", tmp_path / "file", "old")
    with pytest.raises(OSError, match=rf"^\[Errno \d+\] '.*{below}' cannot be written: Not a directory\.$"):
        check_writable(tmp_path / below)
    assert names(tmp_path) == ["file"]


@pytest.mark.parametrize("call", ["open", "mkdir"])
def test_writable_names_what_may_not_be_written(call: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a read-only folder says; the tests may run as a user that may write everywhere."""

    def refuse(*_: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(os, call, refuse)
    with pytest.raises(PermissionError, match="more/it' cannot be written: Permission denied"):
        check_writable(tmp_path / "more" / "it")
    monkeypatch.undo()
    assert names(tmp_path) == []


def test_space(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Path] = []

    def usage(path: Path) -> Usage:
        asked.append(path)
        return Usage(10**9, 10**9 - 2 * 10**6, 2 * 10**6)

    monkeypatch.setattr(shutil, "disk_usage", usage)
    check_space(tmp_path / "not" / "there", 2e6)
    assert asked == [tmp_path]
    with pytest.raises(OSError, match=r"not': 2,000\.5 MB are needed, 2\.0 MB are free") as caught:
        check_space(tmp_path / "not", 2000.5e6)
    assert caught.value.errno == errno.ENOSPC
