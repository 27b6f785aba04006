"""What set-up warns of, once, although nothing is wrong."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import anndata as ad
import numpy as np
import pandas as pd
import pytest

from scperturbdiff import PerturbDiff

if TYPE_CHECKING:
    from collections.abc import Sequence

KEYS: dict[str, Any] = {"perturbation_key": "drug", "control": "DMSO"}


def cells(drugs: Sequence[str], contexts: Sequence[str] | None = None, n_genes: int = 5) -> ad.AnnData:
    counts = np.random.default_rng(0).poisson(3.0, (len(drugs), n_genes)).astype(np.float32) + 1
    obs = pd.DataFrame({"drug": drugs, "line": contexts or "A"}, index=[f"c{i}" for i in range(len(drugs))])
    return ad.AnnData(counts, obs, pd.DataFrame(index=[f"g{i}" for i in range(n_genes)]))


def warned(caplog: pytest.LogCaptureFixture, adata: ad.AnnData, **keys: Any) -> list[str]:
    caplog.clear()
    with caplog.at_level(logging.WARNING, logger="scperturbdiff"):
        PerturbDiff.setup_anndata(adata, **{**KEYS, **keys})
    return [record.getMessage() for record in caplog.records]


ENOUGH = ["DMSO"] * 25 + ["A"] * 25


def test_nothing_is_said_of_ordinary_cells(caplog: pytest.LogCaptureFixture) -> None:
    assert warned(caplog, cells(ENOUGH), context_keys=["line"]) == []


def test_contexts_of_few_controls_are_named(caplog: pytest.LogCaptureFixture) -> None:
    drugs = [*ENOUGH, *["DMSO"] * 3, *["A"] * 5, *["A"] * 4, *["DMSO"] * 2]
    contexts = ["K562"] * 50 + ["HeLa"] * 8 + ["Jurkat"] * 4 + ["untreated"] * 2
    (told,) = warned(caplog, cells(drugs, contexts), context_keys=["line"])
    assert "2 of 3 contexts have fewer than 20 control cells" in told
    assert "'HeLa: 3', 'Jurkat: 0'" in told and "untreated" not in told
    assert warned(caplog, cells(["DMSO", "A"])) == ["The number of control cells is 1, from which little can be told."]
    # two columns make a context
    adata = cells(drugs, contexts)
    adata.obs["batch"] = "b1"
    (told,) = warned(caplog, adata, context_keys=["line", "batch"])
    assert "'HeLa, b1: 3'" in told


@pytest.mark.parametrize(("label", "separator"), [("A_B", "_"), ("A|B", "|"), ("A & B", "&"), ("DMSO;B", ";")])
def test_another_separator_is_suggested(label: str, separator: str, caplog: pytest.LogCaptureFixture) -> None:
    adata = cells([*ENOUGH, "B", label, "C.x", "D1", "EF"])
    (told,) = warned(caplog, adata)
    assert told == (
        f"No label has separator='+', but 1 would be combinations of others with separator={separator!r}: {label!r}."
    )
    assert warned(caplog, adata, separator=separator) == []
    assert warned(caplog, adata, separator=None) == [], "no label is one, as was said"


@pytest.mark.parametrize("labels", [["B", "A+B", "A_B"], ["B_1", "C-2"], ["A_C"]])
def test_no_separator_is_suggested_where_labels_are_no_combinations_of_others(
    labels: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    assert warned(caplog, cells([*ENOUGH, *labels])) == []


def test_many_genes_are_told_with_a_line_that_selects_some(caplog: pytest.LogCaptureFixture) -> None:
    import scanpy as sc

    adata = cells(ENOUGH, n_genes=10_001)
    (told,) = warned(caplog, adata)
    assert "adata has 10001 genes" in told
    line = told.partition("Before set-up: ")[2]
    exec(line, {"sc": sc, "adata": adata})
    assert adata.n_vars == 3000 and (adata.X == np.floor(adata.X)).all()
    assert warned(caplog, adata) == []
    wide = cells(ENOUGH, n_genes=10_001)
    wide.layers["raw"] = wide.X.copy()
    (told,) = warned(caplog, wide, layer="raw")
    exec(told.partition("Before set-up: ")[2], {"sc": sc, "adata": wide})
    assert wide.n_vars == 3000


def test_counts_that_were_normalised_are_told(caplog: pytest.LogCaptureFixture) -> None:
    adata = cells(ENOUGH, n_genes=40)
    adata.X = np.round(1e6 * adata.X / adata.X.sum(axis=1, keepdims=True))
    (told,) = warned(caplog, adata)
    assert (
        "The cells of adata.X all add up to about 1,000,0" in told and "it seems to be normalised and rounded" in told
    )
    adata.X = 1e4 * adata.X / adata.X.sum(axis=1, keepdims=True)
    with pytest.raises(
        ValueError, match="entries are non-integer. Its cells all add up to about 10,000: they seem to be"
    ):
        PerturbDiff.setup_anndata(adata, **KEYS)
