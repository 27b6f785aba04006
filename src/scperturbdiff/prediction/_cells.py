"""Prediction from a checked request to cells, in memory or on disk."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from scipy import sparse

from scperturbdiff.arguments import check_flag, check_number
from scperturbdiff.data import assemble_cells
from scperturbdiff.prediction._shards import predict_shards
from scperturbdiff.prediction._stream import CellWriter
from scperturbdiff.prediction._team import Team
from scperturbdiff.prediction._threads import one_blas_thread

if TYPE_CHECKING:
    from pathlib import Path

    from anndata import AnnData

    from scperturbdiff.prediction._prepared import PreparedRequest


BYTES_PER_CELL = 300
"""Memory of a predicted cell, with its names and labels."""


def predict_cells(
    prepared: PreparedRequest, *, target_sum: float, progress: bool, output: str | Path | None = None
) -> AnnData:
    """Generate cells into memory or, with `output`, piece by piece onto disk.

    Where this process is one of several, all of them write to `output` together, see :func:`predict_shards`.

    Returns
    -------
    The cells; with `output` they are backed by that file.
    """
    check_number("target_sum", target_sum, "(0, inf)")
    check_flag("progress", progress)
    prepared.check_room(BYTES_PER_CELL + 4 * len(prepared.generator.module.latent_mean), output is None)
    team = None if output is None else Team.launched()
    with one_blas_thread():
        if output is not None and team is not None and (team.size > 1 or str(output).endswith(".zarr")):
            return predict_shards(prepared, team, output, target_sum=target_sum, progress=progress)
        return _predict_alone(prepared, target_sum, progress, output)


def _predict_alone(prepared: PreparedRequest, target_sum: float, progress: bool, output: str | Path | None) -> AnnData:
    pieces = prepared.generator.generate(prepared.request, progress)
    var = prepared.controls.var.loc[prepared.genes]
    if output is not None:
        with CellWriter(output, target_sum) as writer:
            writer.rehearse(prepared.asked(), var)
            kept = [writer.write(piece) for piece in pieces]
            writer.finish(prepared.annotate(kept), var, kept, prepared.made_by())
        return writer.open()
    made = list(pieces)
    return assemble_cells(
        sparse.vstack([piece.counts for piece in made], format="csr"),
        prepared.annotate(made),
        var,
        latent=np.concatenate([piece.latent for piece in made]),
        target_sum=target_sum,
        made_by=prepared.made_by(),
    )
