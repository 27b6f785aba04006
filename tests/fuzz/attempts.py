"""Reading crafted files in processes of their own, which may end in any way."""

from __future__ import annotations

import contextlib
import io
import multiprocessing
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import anndata as ad
from tests.fuzz.corpus import ENTRIES, KEYS, SECRET, craft
from tests.fuzz.errors import message_of, unclear

from scperturbdiff import PerturbDiff
from scperturbdiff.cli import main

if TYPE_CHECKING:
    from collections.abc import Sequence
    from multiprocessing.connection import Connection

    from tests.fuzz.corpus import Entry

SECONDS = 90
"""Within which a file is read or refused."""
MEMORY = 24_000_000_000
"""Address space that a process may take beyond what it has (what is not used costs nothing)."""


@dataclass(frozen=True)
class Attempt:
    """How it ended."""

    crashed: str = ""
    """How the process ended that should not have."""
    read: bool = False
    """Whether cells were predicted from the file."""
    faults: tuple[str, ...] = ()
    """What is wrong with how it was refused."""
    said: str = ""


def attempt(entry: Entry, folder: Path) -> Attempt:
    """Make the file of an entry and give it to the command, or to the model."""
    path = craft(entry, folder)
    made = folder / "predicted.h5ad"
    made.unlink(missing_ok=True)
    words = ["predict", str(folder / "model"), str(path), "--perturbations", "A", "--out", str(made)]
    said = io.StringIO()
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
        code = main(words)
    lines = said.getvalue().strip().splitlines()
    faults = []
    if code not in (0, 1) or "Traceback" in said.getvalue():
        faults.append(f"exit code {code}: {said.getvalue()[-300:]}")
    if code == 1 and not (lines[-1].startswith("scperturbdiff predict: error: ") and len(lines[-1]) < 1200):
        faults.append(f"not one line: {lines[-3:]}")
    if made.exists() != (code == 0):
        faults.append("half a result")
    read = code == 0
    if entry.suffix == ".zarr" or code == 0:
        read, more = _in_python(path, folder)
        faults += more
    if (folder / SECRET).exists():
        if code == 0:
            faults.append("another file was read")
        (folder / SECRET).unlink()
    return Attempt("", read, tuple(faults), lines[-1] if lines else "")


def _in_python(path: Path, folder: Path) -> tuple[bool, list[str]]:
    """The same with anndata's reader: what it says is its own; what is said of what it read must be clear."""
    reader = ad.read_zarr if path.suffix == ".zarr" else ad.read_h5ad
    try:
        cells: Any = reader(path)
        cells.obs_names, cells.var_names  # noqa: B018
    except Exception:  # noqa: BLE001
        return False, []
    faults, done = [], True
    for call in (
        lambda: PerturbDiff.setup_anndata(cells, **KEYS),
        lambda: PerturbDiff.load(folder / "model", adata=False).predict(cells, ["A"], n_cells=2, progress=False),
    ):
        try:
            call()
        except Exception as error:  # noqa: BLE001
            done = False
            if why := unclear(error):
                faults.append(f"{why}: {type(error).__name__}: {message_of(error)[:200]}")
    return done, faults


def _work(numbers: Sequence[int], folder: str, results: Connection) -> None:
    """Try one entry after the other, in a process that may die."""
    with contextlib.suppress(ImportError):
        import resource

        size = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
        resource.setrlimit(resource.RLIMIT_AS, (size + MEMORY, size + MEMORY))
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 2)  # what libraries in C have to say
    for number in numbers:
        try:
            found = attempt(ENTRIES[number], Path(folder))
        except BaseException as error:  # noqa: BLE001
            found = Attempt(faults=(f"{type(error).__name__} out of the command: {str(error)[:300]}",))
        results.send(found)
    results.close()


def attempt_all(entries: Sequence[Entry], folder: Path) -> dict[str, Attempt]:
    """Try entries; a process that crashes or hangs is replaced."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    found: dict[str, Attempt] = {}
    left = [ENTRIES.index(entry) for entry in entries]
    while left:
        ours, theirs = context.Pipe(duplex=False)
        process = context.Process(target=_work, args=(left, str(folder), theirs))
        process.start()
        theirs.close()
        done = 0
        try:
            while done < len(left):
                if not ours.poll(SECONDS):
                    raise TimeoutError
                found[ENTRIES[left[done]].name] = ours.recv()
                done += 1
        except (EOFError, TimeoutError) as error:
            process.kill()
            process.join()
            how = "does not end" if isinstance(error, TimeoutError) else f"exit code {process.exitcode}"
            found[ENTRIES[left[done]].name] = Attempt(crashed=how)
            done += 1
        process.join()
        left = left[done:]
    return found
