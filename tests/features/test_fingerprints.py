"""Fingerprints of molecules: what RDKit is asked for, and what is said about what is no molecule."""

from __future__ import annotations

import builtins
import logging
from typing import Any

import numpy as np
import pandas as pd
import pytest

from scperturbdiff import features

DRUGS = {"ethanol": "CCO", "aspirin": "CC(=O)Oc1ccccc1C(=O)O", "hexane": "CCCCCC"}


@pytest.fixture
def rdkit() -> Any:
    return pytest.importorskip("rdkit", reason="fingerprints need RDKit")


@pytest.mark.usefixtures("rdkit")
def test_radius_0_counts_atoms_by_their_surroundings() -> None:
    """Closed form: hexane has two ends and four inner atoms, ethanol three different atoms."""
    table = features.fingerprints(DRUGS, radius=0)
    assert table.shape == (3, 2048) and table.index.tolist() == list(DRUGS)
    assert table.dtypes.eq(np.float32).all()
    assert sorted(table.loc["hexane"][table.loc["hexane"] > 0]) == [2, 4]
    assert sorted(table.loc["ethanol"][table.loc["ethanol"] > 0]) == [1, 1, 1]
    bits = features.fingerprints(DRUGS, radius=0, counts=False)
    pd.testing.assert_frame_equal(bits, (table > 0).astype(np.float32))


@pytest.mark.usefixtures("rdkit")
def test_rows_depend_on_the_molecule_alone() -> None:
    table = features.fingerprints(pd.Series(DRUGS))
    pd.testing.assert_frame_equal(features.fingerprints({"aspirin": DRUGS["aspirin"]}), table.loc[["aspirin"]])
    other = features.fingerprints({"aspirin": "OC(=O)c1ccccc1OC(C)=O"})  # written from another end
    pd.testing.assert_frame_equal(other, table.loc[["aspirin"]])


@pytest.mark.usefixtures("rdkit")
def test_every_smiles_that_is_none_is_named() -> None:
    wrong = {**DRUGS, "odd": "C1CC", "empty": " ", "absent": None, "five bonds": "C(C)(C)(C)(C)C"}
    with pytest.raises(ValueError, match="4 of 7 SMILES cannot be read") as error:
        features.fingerprints(wrong)
    for part in ("'odd': 'C1CC'", "'empty'", "'absent': None", "'five bonds'"):
        assert part in str(error.value)


@pytest.mark.usefixtures("rdkit")
def test_the_same_molecule_under_two_names_and_salts_are_told(caplog: pytest.LogCaptureFixture) -> None:
    drugs = {**DRUGS, "alcohol": "OCC", "salt": "[Na+].CC(=O)Oc1ccccc1C(=O)O"}
    with caplog.at_level(logging.WARNING, logger="scperturbdiff"):
        features.fingerprints(drugs)
    assert "1 molecules have more than one name" in caplog.text and "'ethanol' = 'alcohol'" in caplog.text
    assert "1 drugs have several fragments" in caplog.text and "'salt'" in caplog.text
    caplog.clear()
    with caplog.at_level(logging.WARNING, logger="scperturbdiff"):
        table = features.fingerprints(drugs, strip_salts=True)
    assert "'aspirin' = 'salt'" in caplog.text and "fragments" not in caplog.text
    np.testing.assert_array_equal(table.loc["salt"], table.loc["aspirin"])


@pytest.mark.usefixtures("rdkit")
@pytest.mark.parametrize(
    ("smiles", "how", "error", "message"),
    [
        (["CCO"], {}, TypeError, "a mapping or a Series"),
        (pd.Series(["C", "CC"], index=["a", "a"]), {}, ValueError, "repeated names: 'a'"),
        ({}, {}, ValueError, "no names"),
        ({1: "C"}, {}, TypeError, "smiles"),
        (DRUGS, {"radius": -1}, ValueError, "radius=-1"),
        (DRUGS, {"n_bits": 2.5}, ValueError, "n_bits=2.5"),
        (DRUGS, {"counts": 1}, TypeError, "counts=1"),
    ],
)
def test_wrong_arguments_are_named(smiles: Any, how: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        features.fingerprints(smiles, **how)


def test_without_rdkit_the_remedy_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    known = builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.split(".")[0] == "rdkit":
            raise ImportError(name)
        return known(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ImportError, match=r"pip install scperturbdiff\[drugs\]"):
        features.fingerprints(DRUGS)
