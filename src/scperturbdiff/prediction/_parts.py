"""Parts of a prediction on disk: what several processes make, and an interrupted prediction goes on from."""

from __future__ import annotations

import json
import logging
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING, Any
from zipfile import BadZipFile

import numpy as np
from scipy import sparse

from scperturbdiff.prediction._fingerprint import differences
from scperturbdiff.prediction._pieces import Piece
from scperturbdiff.prediction._stream import BUFFER_CELLS, SPARE
from scperturbdiff.storage import atomic_file, check_space

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from scperturbdiff.prediction._generate import PopulationGenerator
    from scperturbdiff.prediction._request import PopulationRequest


logger = logging.getLogger("scvi.scperturbdiff")  # follows scvi.settings.verbosity

RUN = "run.json"
"""What the parts are of."""
FEW, MANY = 64, 4096
"""Parts of a small prediction, at least where it has as many populations; parts of a large one, at most."""


@dataclass(frozen=True)
class CountFile:
    """Cells of a part, `n_cells` with `n_entries` counts that are not 0, in a file that fits into memory."""

    path: Path
    n_cells: int
    n_entries: int

    def counts(self, n_genes: int) -> sparse.csr_matrix:
        """Counts `(n_cells, n_genes)`, float32."""
        with _reading(self.path) as file:
            start = np.concatenate([[0], np.cumsum(file["lengths"], dtype=np.int64)])
            entries = file["values"].astype(np.float32), file["indices"].astype(np.int32), start
        return sparse.csr_matrix(entries, shape=(self.n_cells, n_genes))

    def annotation(self) -> tuple[list[Piece], NDArray[np.int64]]:
        """The pieces, without counts, and the number of entries of each cell."""
        with _reading(self.path) as file:
            ends = np.cumsum(file["sizes"])[:-1]
            state = np.split(file["state"], ends) if "state" in file else [None] * len(file["sizes"])
            columns = file["population"].tolist(), file["draw"].tolist(), *(np.split(file[x], ends) for x in SPLIT)
            lengths = file["lengths"].astype(np.int64)
        empty = sparse.csr_matrix((0, 0), dtype=np.float32)
        pieces = zip(*columns, state, strict=True)
        return [Piece(i, draw, rows, empty, latent, of) for i, draw, rows, latent, of in pieces], lengths


NAMED = 5
"""Differences that an error lists, at most."""
SPLIT = ("rows", "latent")
"""What every cell has."""


class Parts:
    """Whole populations, consecutive ones together, each such part in files of its own in one folder.

    A part is there when its record is, which is written last. What is a part does not depend on the processes.

    Parameters
    ----------
    folder
        Where they are.
    sizes
        Cells of each population, all draws together.
    """

    def __init__(self, folder: Path, sizes: Sequence[int]) -> None:
        self.folder, cells = folder, np.asarray(sizes, dtype=np.int64)
        total = int(cells.sum())
        wanted = min(max(total // FEW, 1), max(BUFFER_CELLS, total // MANY))
        before = (np.cumsum(cells) - cells) // wanted
        self.of = np.unique(before, return_inverse=True)[1]
        """Number of the part that each population is in."""
        self.sizes = np.bincount(self.of, weights=cells).astype(np.int64)
        """Cells of each part."""

    def open(self, run: dict[str, Any]) -> None:
        """Make the folder, or check that what is there is of the same `run`.

        Raises
        ------
        ValueError
            If there are parts of something else; what differs is named.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        there = self._run()
        if there is None and any(self.folder.glob("*.json")):
            there = {}
        if there is None:
            with atomic_file(self.folder / RUN, overwrite=True) as path:
                path.write_text(json.dumps(run, indent=1), encoding="utf-8")
        elif found := differences(there, run):
            raise ValueError(
                f"{str(self.folder)!r} holds parts of another prediction to the same place, which are not taken. "
                f"There and here: {'; '.join(found[:NAMED])}. Repeat that one to go on with it, or remove the folder."
            )

    def check_shared(self, run: dict[str, Any]) -> None:
        """Raise an `OSError` unless what process 0 opened is seen by this one."""
        if differences(self._run() or {}, run):
            raise FileNotFoundError(
                f"{str(self.folder)!r}, which process 0 made, is not seen by another process: all need the same disk."
            )

    def _run(self) -> dict[str, Any] | None:
        try:
            run: dict[str, Any] = json.loads((self.folder / RUN).read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        return run

    def missing(self) -> list[int]:
        """Parts that are still to be made."""
        return [part for part in range(len(self.sizes)) if not self._record(part).exists()]

    def _record(self, part: int) -> Path:
        return self.folder / f"{part:06d}.json"

    def generate(
        self,
        parts: Sequence[int],
        generator: PopulationGenerator,
        request: PopulationRequest,
        *,
        progress: bool,
        check: Callable[[], None],
    ) -> None:
        """Make some parts; `check` is called after every piece."""
        only = np.flatnonzero(np.isin(self.of, parts)).tolist()

        def checked() -> Iterator[Piece]:
            for piece in generator.generate(request, progress, only):
                check()
                yield piece

        for part, pieces in groupby(checked(), lambda piece: int(self.of[piece.population])):
            files = list(self._write(part, pieces))
            made = np.flatnonzero(self.of == part).tolist()
            record = {
                "files": [[file.path.name, file.n_cells, file.n_entries] for file in files],
                "evidence": {i: generator.evidence[i] for i in made},
                "unchanged": {i: generator.unchanged[i] for i in made if i in generator.unchanged},
            }
            with atomic_file(self._record(part), overwrite=True) as path:
                path.write_text(json.dumps(record), encoding="utf-8")

    def _write(self, part: int, pieces: Iterable[Piece]) -> Iterator[CountFile]:
        """Write the pieces of a part, those together that fit into memory well."""
        number, some, n_cells = 0, [], 0
        for piece in pieces:
            some.append(piece)
            n_cells += len(piece.rows)
            if n_cells >= BUFFER_CELLS:
                yield self._write_file(part, number, some)
                number, some, n_cells = number + 1, [], 0
        if some:
            yield self._write_file(part, number, some)

    def _write_file(self, part: int, number: int, pieces: list[Piece]) -> CountFile:
        counts = sparse.vstack([piece.counts for piece in pieces], format="csr")
        arrays: dict[str, Any] = {
            "population": np.array([piece.population for piece in pieces]),
            "draw": np.array([piece.draw for piece in pieces]),
            "sizes": np.array([len(piece.rows) for piece in pieces]),
            "rows": np.concatenate([piece.rows for piece in pieces]),
            "latent": np.concatenate([piece.latent for piece in pieces]),
            "lengths": _small(np.diff(counts.indptr)),
            "indices": _small(counts.indices),
            "values": _small(counts.data),
        }
        if all(piece.state is not None for piece in pieces):
            arrays["state"] = np.concatenate([np.asarray(piece.state) for piece in pieces])
        check_space(self.folder, sum(array.nbytes for array in arrays.values()) + SPARE)
        path = self.folder / f"{part:06d}.{number}.npz"
        with atomic_file(path, overwrite=True) as partial:
            np.savez(partial, **arrays)
        return CountFile(path, counts.shape[0], counts.nnz)

    def read(self, generator: PopulationGenerator) -> list[CountFile]:
        """The files of all parts, in order of populations; the generator is told what was found out on the way."""
        files = []
        for part in range(len(self.sizes)):
            record = json.loads(self._record(part).read_text(encoding="utf-8"))
            files += [CountFile(self.folder / name, *numbers) for name, *numbers in record["files"]]
            for i, (novelty, variance) in record["evidence"].items():
                generator.evidence[int(i)] = novelty, variance
            generator.unchanged |= {int(i): name for i, name in record["unchanged"].items()}
        return files


def balance(parts: Sequence[int], sizes: NDArray[np.int64], n: int) -> list[list[int]]:
    """Share `parts` among `n`: the largest first, each to the one that has the fewest cells so far."""
    shares: list[list[int]] = [[] for _ in range(n)]
    load = np.zeros(n, np.int64)
    for part in sorted(parts, key=lambda part: (-sizes[part], part)):
        least = int(load.argmin())
        shares[least].append(part)
        load[least] += sizes[part]
    return [sorted(share) for share in shares]


def _small(values: NDArray[Any]) -> NDArray[Any]:
    """Whole numbers, none below 0, in as few bytes as they need."""
    return values.astype(np.min_scalar_type(int(values.max(initial=0))))


@contextmanager
def _reading(path: Path) -> Iterator[Any]:
    try:
        with np.load(path) as file:
            yield file
    except (BadZipFile, KeyError, EOFError, ValueError) as error:
        raise ValueError(f"{str(path)!r} is damaged ({error}). Remove its folder and begin anew.") from error
