"""Prediction by several processes into one zarr store."""

from __future__ import annotations

import logging
import os
import shutil
from contextlib import ExitStack
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from scperturbdiff.arguments import check_type
from scperturbdiff.data import log_normalize
from scperturbdiff.prediction._fingerprint import differences, fingerprint
from scperturbdiff.prediction._parts import NAMED, Parts, balance
from scperturbdiff.prediction._stream import CHUNK, CellWriter

if TYPE_CHECKING:
    from anndata import AnnData
    from numpy.typing import NDArray

    from scperturbdiff.prediction._parts import CountFile
    from scperturbdiff.prediction._prepared import PreparedRequest
    from scperturbdiff.prediction._team import Team


logger = logging.getLogger("scvi.scperturbdiff")  # follows scvi.settings.verbosity

WINDOW = 16 * CHUNK
"""Entries of matrices that are joined at a time."""


def predict_shards(
    prepared: PreparedRequest, team: Team, output: str | Path, *, target_sum: float, progress: bool
) -> AnnData:
    """Generate cells in all processes of `team`, with bits and order of rows as in one, into one `.zarr` store.

    Each process writes parts, whole populations, to a folder beside `output`. When all are there, process 0 makes an
    empty store beside it, into which all write their share of its chunks, and gives it its name. Parts stay until then:
    the same call goes on with what is missing, with as many processes as it likes.

    Raises
    ------
    ConnectionError
        If another process fails or is gone.
    ValueError
        If processes were asked for different things, or parts at that place are of something else.
    """
    check_type("output", output, (str, os.PathLike), "a path")
    path = Path(output)
    if path.suffix != ".zarr":
        raise ValueError(f"output={str(output)!r} must end in .zarr, which several processes can write at once.")
    n_draws, var = prepared.generator.settings.n_populations or 1, prepared.controls.var.loc[prepared.genes]
    parts = Parts(path.with_name(f".{path.name}.parts"), [n_draws * n for n in prepared.request.n_cells])
    with team:
        asked = fingerprint(prepared, target_sum)
        for rank, other in enumerate(team.gather(asked)):
            if found := differences(other, asked):
                raise ValueError(
                    f"Processes must be asked for the same, with the same seed=... Process {rank} and process "
                    f"{team.rank}: {'; '.join(found[:NAMED])}."
                )
        if team.rank == 0:  # which makes folders that are missing before others look
            writer = CellWriter(path, target_sum)
            writer.rehearse(prepared.asked(), var)
            parts.open(asked)
        missing = team.share(parts.missing() if team.rank == 0 else None)
        if team.rank != 0:
            writer = CellWriter(path, target_sum)
            parts.check_shared(asked)
        elif len(missing) < len(parts.sizes):
            text = "Going on with %s: %d of %d parts are there."
            logger.info(text, parts.folder, len(parts.sizes) - len(missing), len(parts.sizes))
        mine = balance(missing, parts.sizes, team.size)[team.rank]
        shown = progress and team.rank == 0
        parts.generate(mine, prepared.generator, prepared.request, progress=shown, check=team.check)
        team.gather()
        _join(prepared, parts, writer, team)
        if team.rank == 0:
            prepared.generator.tell_of_unchanged(prepared.request)
            shutil.rmtree(parts.folder, ignore_errors=True)
    return writer.open()


def _join(prepared: PreparedRequest, parts: Parts, writer: CellWriter, team: Team) -> None:
    """Make one store of all parts; it has its name when process 0 returns."""
    files, n_genes = parts.read(prepared.generator), len(prepared.genes)
    with ExitStack() as stack:
        if team.rank == 0:
            stack.enter_context(writer)
            found = [file.annotation() for file in files]
            lengths = np.concatenate([lengths for _, lengths in found])
            writer.lay_out(np.concatenate([[0], np.cumsum(lengths)]), n_genes)
            pieces = [piece for some, _ in found for piece in some]
        name = team.share(writer.partial.name if team.rank == 0 else None)
        if team.rank != 0:
            writer.attach(name)
        _fill(writer, files, n_genes, team)
        team.gather()
        if team.rank == 0:
            var = prepared.controls.var.loc[prepared.genes]
            writer.finish(prepared.annotate(pieces), var, pieces, prepared.made_by())


def _fill(writer: CellWriter, files: list[CountFile], n_genes: int, team: Team) -> None:
    """Write this process's share of the entries of the matrices: whole chunks, which no other process touches."""

    @lru_cache(maxsize=1)
    def read(i: int) -> tuple[NDArray[Any], ...]:
        counts = files[i].counts(n_genes)
        return log_normalize(counts, writer.target_sum).data, counts.data, counts.indices

    ends = np.cumsum([file.n_entries for file in files])
    n_chunks = -(-int(ends[-1]) // CHUNK)
    first, last = (min(CHUNK * (n_chunks * rank // team.size), int(ends[-1])) for rank in (team.rank, team.rank + 1))
    for start in range(first, last, WINDOW):
        stop = min(start + WINDOW, last)
        some = range(int(np.searchsorted(ends, start, "right")), int(np.searchsorted(ends, stop, "left")) + 1)
        taken = []
        for i in some:
            offset = int(ends[i]) - files[i].n_entries
            part = slice(max(start - offset, 0), stop - offset)
            taken.append([column[part] for column in read(i)])
        writer.fill(start, *map(np.concatenate, zip(*taken, strict=True)))
        team.check()
