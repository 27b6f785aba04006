"""Crafted files are read or refused in one line; none ends the interpreter, hangs it, or reads another file."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import pytest
from tests.fuzz.attempts import attempt_all
from tests.fuzz.corpus import ENTRIES, KEYS, craft, right_cells
from tests.fuzz.profiles import number
from tests.helpers import FEW_STEPS, TINY

from scperturbdiff import PerturbDiff

if TYPE_CHECKING:
    from pathlib import Path

    from tests.fuzz.attempts import Attempt
    from tests.fuzz.corpus import Entry

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="processes cannot be forked")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model that files are given to."""
    folder = tmp_path_factory.mktemp("corpus")
    cells = right_cells()
    PerturbDiff.setup_anndata(cells, **KEYS)
    model = PerturbDiff(cells, **TINY)
    model.train(**FEW_STEPS)
    model.save(folder / "model")
    return folder


def faults(entries: list[Entry], found: dict[str, Attempt]) -> list[str]:
    """What is wrong with how attempts ended."""
    out = []
    for entry in entries:
        ended = found[entry.name]
        if ended.crashed:
            out.append(f"{entry.name}: {ended.crashed}")
        out += [f"{entry.name}: {fault}" for fault in ended.faults]
        if entry.outcome != "either" and ended.read != (entry.outcome == "read"):
            out.append(f"{entry.name}: {'read' if ended.read else f'refused: {ended.said}'}")
    return out


@pytest.mark.parametrize("suffix", [".h5ad", ".zarr"])
def test_a_crafted_file_is_read_correctly_or_refused(suffix: str, folder: Path) -> None:
    entries = [entry for entry in ENTRIES if entry.suffix == suffix and entry.seed < number(0.1)]
    wrong = faults(entries, attempt_all(entries, folder))
    assert not wrong, "\n".join(wrong)


def test_entries_have_names_of_their_own_and_can_be_made(tmp_path: Path) -> None:
    names = [(entry.name, entry.suffix) for entry in ENTRIES]
    assert len(set(names)) == len(names) > 150
    for entry in (entry for entry in ENTRIES if entry.seed < 2):
        assert craft(entry, tmp_path).exists()
