"""Fingerprints of molecules."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from scperturbdiff.arguments import check_flag, check_int, check_type
from scperturbdiff.data import preview
from scperturbdiff.features._names import check_names

if TYPE_CHECKING:
    from collections.abc import Iterable

logger = logging.getLogger(__name__)


def fingerprints(
    smiles: Mapping[str, str] | pd.Series,
    *,
    radius: int = 2,
    n_bits: int = 2048,
    counts: bool = True,
    strip_salts: bool = False,
) -> pd.DataFrame:
    """Morgan fingerprints of drugs: how often each neighbourhood of an atom occurs in the molecule.

    Computed by RDKit, an optional dependency: `pip install scperturbdiff[drugs]`. Neighbourhoods of up to `radius`
    bonds are hashed to `n_bits` columns (extended-connectivity fingerprints; Rogers and Hahn 2010); stereochemistry is
    not told apart. The columns of a molecule do not depend on which others are in the call: tables of two calls with
    the same `radius`, `n_bits` and `counts` fit together.

    Parameters
    ----------
    smiles
        Name of the drug to its SMILES: a mapping, or a Series whose index has the names.
    radius
        Largest radius in bonds, from 0; 2 is known as ECFP4.
    n_bits
        Number of columns. Neighbourhoods that share one are added; with fewer columns more do.
    counts
        Numbers of occurrences; `False`: 1 where there is any, else 0.
    strip_salts
        Keep the largest fragment of each molecule only, without counter-ions and solvents. Molecules of several
        fragments are named in a warning where they are kept whole.

    Returns
    -------
    Counts (not log-transformed), float32, shape `(n_drugs, n_bits)`: one row a drug in the order given, columns
    `morgan1` and so on. Drugs that are the same molecule, by their canonical SMILES, are named in a warning: their rows
    are equal.

    Raises
    ------
    ImportError
        Without RDKit.
    ValueError
        If a SMILES is empty, missing or cannot be read (all such drugs are named), or a name repeats.
    """
    check_type("smiles", smiles, (Mapping, pd.Series), "a mapping or a Series from names to SMILES")
    check_int("radius", radius, 0, 10)
    check_int("n_bits", n_bits, 8, 2**20)
    check_flag("counts", counts)
    check_flag("strip_salts", strip_salts)
    chem, generators, standardize, block_logs = _rdkit()
    names = check_names("smiles", list(smiles.keys()))
    with block_logs():  # what RDKit would print is in our errors
        molecules = _molecules(
            dict(zip(names, smiles.to_list() if isinstance(smiles, pd.Series) else smiles.values(), strict=True)), chem
        )
        several = [name for name, molecule in molecules.items() if len(chem.GetMolFrags(molecule)) > 1]
        if strip_salts:
            chooser = standardize.LargestFragmentChooser()
            molecules |= {name: chooser.choose(molecules[name]) for name in several}
        canonical = {name: chem.MolToSmiles(molecule) for name, molecule in molecules.items()}
        generator = generators.GetMorganGenerator(radius=radius, fpSize=n_bits)
        count = generator.GetCountFingerprintAsNumPy if counts else generator.GetFingerprintAsNumPy
        values = np.empty((len(names), n_bits), np.float32)
        for row, molecule in zip(values, molecules.values(), strict=True):
            row[:] = count(molecule)
    if several and not strip_salts:
        text = "%d drugs have several fragments, salts for example, all of which are counted: %s. See strip_salts."
        logger.warning(text, len(several), preview(several))
    _tell_same(canonical)
    return pd.DataFrame(values, index=pd.Index(names, name="drug"), columns=[f"morgan{i + 1}" for i in range(n_bits)])


def _rdkit() -> tuple[Any, Any, Any, Any]:
    """The modules of RDKit that are used; asked for when they are, as it is an optional dependency."""
    try:
        from rdkit import Chem
        from rdkit.Chem import rdFingerprintGenerator
        from rdkit.Chem.MolStandardize import rdMolStandardize
        from rdkit.rdBase import BlockLogs
    except ImportError as error:
        raise ImportError("Fingerprints need RDKit: pip install scperturbdiff[drugs]") from error
    return Chem, rdFingerprintGenerator, rdMolStandardize, BlockLogs


def _molecules(smiles: Mapping[str, Any], chem: Any) -> dict[str, Any]:
    """Molecule of each name; a `ValueError` names all that are none."""
    read = {
        name: chem.MolFromSmiles(text) if isinstance(text, str) and text.strip() else None
        for name, text in smiles.items()
    }
    wrong = {name: smiles[name] for name, molecule in read.items() if molecule is None}
    if wrong:
        named = "; ".join(f"{name!r}: {text!r}" for name, text in list(wrong.items())[:50])
        more = f"; ... ({len(wrong) - 50} more)" if len(wrong) > 50 else ""
        raise ValueError(
            f"{len(wrong)} of {len(smiles)} SMILES cannot be read: {named}{more}. Correct them or leave them out."
        )
    return read


def _tell_same(canonical: Mapping[str, str]) -> None:
    """Warn of names with the same canonical SMILES."""
    table = pd.Series(canonical)
    groups: Iterable[pd.Series] = (group for _, group in table.groupby(table, sort=False) if len(group) > 1)
    if same := [" = ".join(map(repr, group.index)) for group in groups]:
        more = f"; ... ({len(same) - 10} more)" if len(same) > 10 else ""
        text = "%d molecules have more than one name, and the same features under each: %s%s."
        logger.warning(text, len(same), "; ".join(same[:10]), more)
