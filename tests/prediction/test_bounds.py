"""What is asked for is bounded: by memory before anything is made, and by pieces while it is made."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import pytest
from pandas.testing import assert_frame_equal
from tests.helpers import assert_same_cells

from scperturbdiff import memory
from scperturbdiff.memory import check_memory, memory_bytes

if TYPE_CHECKING:
    from pathlib import Path

    from anndata import AnnData

    from scperturbdiff import PerturbDiff


@pytest.fixture
def controls(screen: AnnData) -> AnnData:
    return screen[(screen.obs["perturbation"] == "control").to_numpy()].copy()


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"n_cells": 10**12}, "n_cells=1000000000000 must be a whole number from 1 to 1,000,000,000"),
        ({"n_cells": 10**9}, r"3,000,000,000 cells need [\d,]+ GB of memory.*output="),
        ({"n_populations": 10**6, "n_cells": 10**4}, r"30,000,000,000 cells need .*Lower n_cells or n_populations"),
        ({"perturbations": pd.DataFrame({"perturbation": ["P01"], "n_cells": [1e12]})}, "n_cells=1000000000000"),
    ],
)
def test_absurd_requests_are_refused_at_once(
    trained_model: PerturbDiff, controls: AnnData, options: dict[str, Any], named: str
) -> None:
    begin = time.perf_counter()
    with pytest.raises(ValueError, match=named) as error:
        trained_model.predict(controls, **{"perturbations": ["P01"], "progress": False, **options})
    assert time.perf_counter() - begin < 5 and "\n" not in str(error.value)


def test_a_file_and_a_response_have_room_for_more(
    trained_model: PerturbDiff, controls: AnnData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "memory_bytes", lambda: 2**20)  # cells of some 50 counts
    options: dict[str, Any] = {"n_cells": 500, "progress": False, "seed": 0}
    with pytest.raises(ValueError, match="1,500 cells need"):
        trained_model.predict(controls, ["P01"], **options)
    assert trained_model.predict(controls, ["P01"], **options, output=tmp_path / "cells.h5ad").n_obs == 1500
    trained_model.response(controls, ["P01"], **options)
    options["n_cells"] = 10**4
    with pytest.raises(ValueError, match="30,000 cells need"):
        trained_model.predict(controls, ["P01"], **options, output=tmp_path / "more.h5ad")
    with pytest.raises(ValueError, match="30,000 cells need"):
        trained_model.response(controls, ["P01"], **options)
    assert [path.name for path in tmp_path.iterdir()] == ["cells.h5ad"]


def test_memory_is_that_of_the_machine_or_the_container(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    machine = memory_bytes()
    assert machine > 2**27
    for text, expected in (("max\n", machine), ("1000\n", 1000)):
        (tmp_path / "memory.max").write_text(text)
        monkeypatch.setattr(memory, "CONTAINER", tmp_path / "memory.max")
        assert memory_bytes() == expected or text == "max\n"
    check_memory(1000, "cells", "")
    with pytest.raises(ValueError, match="cells need .* GB of memory; there are 0. Less."):
        check_memory(1001, "cells", "Less.")


def test_cells_do_not_depend_on_how_many_are_handed_on_together(
    trained_model: PerturbDiff, controls: AnnData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options: dict[str, Any] = {"n_cells": 1100, "n_populations": 2, "seed": 0, "progress": False}
    whole = trained_model.predict(controls, ["P01"], **options)
    table = trained_model.response(controls, ["P01"], **options)
    monkeypatch.setattr("scperturbdiff.prediction._generate.PIECES", 2)
    assert_same_cells(trained_model.predict(controls, ["P01"], **options), whole)
    written = trained_model.predict(controls, ["P01"], **options, output=tmp_path / "cells.h5ad").to_memory()
    np.testing.assert_array_equal(written.obsm["X_perturbdiff"], whole.obsm["X_perturbdiff"])
    assert (written.layers["counts"] != whole.layers["counts"]).nnz == 0
    assert_frame_equal(trained_model.response(controls, ["P01"], **options), table)


def test_cells_do_not_depend_on_how_many_groups_are_kept(
    trained_model: PerturbDiff, controls: AnnData, monkeypatch: pytest.MonkeyPatch
) -> None:
    options: dict[str, Any] = {"seed": 0, "progress": False}
    whole = trained_model.predict(controls, ["P01", "P02"], **options)
    monkeypatch.setattr("scperturbdiff.prediction._encoded.KEPT_ENTRIES", 0)
    assert_same_cells(trained_model.predict(controls, ["P01", "P02"], **options), whole)


def test_latent_vectors_do_not_depend_on_blocks(
    trained_model: PerturbDiff, controls: AnnData, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = trained_model.get_latent_representation(controls)
    monkeypatch.setattr("scperturbdiff.prediction._encode.CHUNK_ROWS", 7)
    np.testing.assert_allclose(trained_model.get_latent_representation(controls), whole, rtol=1e-5, atol=1e-5)
