"""Published screens in the form of this package: counts in X, plain names in obs."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from anndata import AnnData
from mudata import MuData
from scipy import sparse

from scperturbdiff.data import COUNTS, Labels, check_cells, check_layer, get_matrix, preview, value_text
from scperturbdiff.datasets._files import find

if TYPE_CHECKING:
    from scperturbdiff.datasets._files import Found, PathLike

RNA = "rna"
"""Modality of a MuData that is read."""
PLAIN = ("guide_confident", "n_counts_original")
"""Columns that hold no names."""


@dataclass(frozen=True)
class Published:
    """How the forms in which a data set is passed on become one form."""

    name: str
    control: str
    accession: str
    doi: str
    columns: dict[str, tuple[str, ...]]
    """Column here -> what it may be called in a file, the first that is there is taken."""
    optional: dict[str, tuple[str, ...]] = field(default_factory=dict)
    """The same of columns that are left out where a file has none."""
    same: dict[str, str] = field(default_factory=dict)
    """Column -> value of all cells."""
    values: dict[str, dict[str, str]] = field(default_factory=dict)
    """Column -> value in a file -> value here; others stay."""

    def load(self, path_or_url: PathLike | None, cache_dir: PathLike | None, sha256: str | None) -> AnnData:
        """Find, check and rename."""
        found = find(self.name, path_or_url, cache_dir, sha256)
        adata, annotation = _rna(found)
        where = repr(found.place)
        check_cells(adata, where)
        obs = self._annotate(annotation, adata.obs_names, where)
        layer = COUNTS if COUNTS in adata.layers else None
        check_layer(adata, layer, where=f"{self.name}, {where}: adata", rows=None)
        counts = sparse.csr_matrix(get_matrix(adata, layer)).astype(np.int32)
        source = {
            "data_set": self.name, "from": found.place, "sha256": found.sha256, "accession": self.accession,
            "doi": self.doi, "control": self.control,
        }  # fmt: skip
        return AnnData(counts, obs=obs, var=adata.var.copy(), uns={"source": source})

    def _annotate(self, given: pd.DataFrame, names: pd.Index, where: str) -> pd.DataFrame:
        obs = pd.DataFrame(index=names)
        for column, known in (self.columns | self.optional).items():
            there = [name for name in known if name in given]
            if there:
                obs[column] = self._values(given[there[0]], column)
            elif column in self.columns:
                raise ValueError(
                    f"{where} is not {self.name}: obs has no column for {column!r} ({' or '.join(map(repr, known))}). "
                    f"Columns: {preview(given.columns, 30)}."
                )
        for column, value in self.same.items():
            if column in given and given[column].nunique() > 1:
                raise ValueError(f"{where} is not {self.name}, cells of one line: obs[{column!r}] has several values.")
            obs[column] = pd.Categorical([value] * len(obs))
        Labels("perturbation", self.control).check_control(obs, f"{where}: obs")
        allowed = set(self.values.get("perturbation", {}).values())
        if allowed and (other := set(obs["perturbation"]) - allowed):
            raise ValueError(f"{where} is not {self.name}: obs has perturbations {preview(sorted(other))}.")
        return obs

    def _values(self, column: pd.Series, name: str) -> Any:
        """Text as categories, under the names used here; what counts or tells yes from no as it is."""
        if name in PLAIN:
            return column.to_numpy()
        names = self.values.get(name, {})
        text = column.astype(object).map(lambda value: names.get(value_text(value), value_text(value)), "ignore")
        return pd.Categorical(text.to_numpy())


def _rna(found: Found) -> tuple[AnnData, pd.DataFrame]:
    """The cells with RNA, and all that is said of them."""
    cells = found.cells
    if not isinstance(cells, MuData):
        return cells, cells.obs
    if RNA not in cells.mod:
        raise ValueError(f"{found.place!r} has no modality {RNA!r}. Modalities: {preview(cells.mod)}.")
    rna = cells.mod[RNA]
    shared = cells.obs.rename(columns=lambda name: name.removeprefix(f"{RNA}:")).reindex(rna.obs_names)
    shared = shared.loc[:, ~shared.columns.duplicated() & ~shared.columns.isin(rna.obs.columns)]
    return rna, rna.obs.join(shared)


KANG = Published(
    "kang_2018",
    control="control",
    accession="GSE96583",
    doi="10.1038/nbt.4042",
    columns={
        "perturbation": ("label", "perturbation"),
        "cell_type": ("cell_type",),
        "donor": ("replicate", "donor"),
    },
    values={
        "perturbation": {"ctrl": "control", "stim": "stimulated"},
        "cell_type": {
            "B": "B cells", "CD14+Mono": "CD14+ Monocytes", "CD4T": "CD4 T cells", "CD8T": "CD8 T cells",
            "Dendritic": "Dendritic cells", "FCGR3A+Mono": "FCGR3A+ Monocytes", "NK": "NK cells",
        },
        "donor": {f"patient_{i}": str(i) for i in (101, 107, 1015, 1016, 1039, 1244, 1256, 1488)},
    },
    optional={"n_counts_original": ("n_counts_original",)},
)  # fmt: skip
PAPALEXI = Published(
    "papalexi_2021",
    control="NT",
    accession="GSE153056",
    doi="10.1038/s41588-021-00778-2",
    columns={
        "perturbation": ("gene_target", "perturbation"),  # pertpy's `perturbation` says whether there is one
        "guide": ("guide_ID", "guide"),
        "replicate": ("replicate", "batch"),
    },
    optional={"guide_confident": ("guide_confident",), "n_counts_original": ("n_counts_original",)},
    same={"cell_type": "THP-1"},
    values={"replicate": {f"rep_{i}": f"rep{i}" for i in (1, 2, 3)}},
)
NORMAN = Published(
    "norman_2019",
    control="control",
    accession="GSE133344",
    doi="10.1126/science.aax4438",
    columns={"perturbation": ("perturbation_name", "perturbation")},
    optional={"lane": ("gemgroup", "lane"), "n_counts_original": ("n_counts_original",)},
    same={"cell_type": "K562"},
)


def kang_2018(
    path_or_url: PathLike | None = None, cache_dir: PathLike | None = None, *, sha256: str | None = None
) -> AnnData:
    """Blood cells of eight lupus patients, with and without interferon beta :cite:p:`kang2018`.

    One perturbation, eight cell types, eight donors, about 24,700 cells: a strong response that differs between cell
    types.

    Parameters
    ----------
    path_or_url
        An `.h5ad` file of the data, such as pertpy's or part of it, or where to download one from (http or https).
        `None`: what ``pertpy.data.kang_2018()`` gives, if pertpy is installed.
    cache_dir
        Folder that downloads are kept in. Default: :attr:`scanpy.settings.datasetdir`.
    sha256
        Digest that the file must have, in hexadecimal digits.

    Returns
    -------
    AnnData with counts in `X` (int32 CSR) and

    * `obs`: `perturbation` (`"control"`, `"stimulated"`), `cell_type` (as `"CD14+ Monocytes"`), `donor` (as `"1015"`;
      `"unlabelled"` where a file does not say), and `n_counts_original` (counts per cell of all genes), where a file
      of fewer genes has it;
    * `uns["source"]`: data set, where it was read from, digest of the file, accession, DOI, and label of controls.

    Raises
    ------
    ImportError
        If there is neither a file nor pertpy.
    FileNotFoundError
        If the path is no file.
    OSError
        If a download fails.
    ValueError
        If the file is another one: no AnnData, without a column that is needed, without controls or counts, or of
        another digest.

    Notes
    -----
    Public at GEO as GSE96583, with no licence stated there; cite the paper. Who passes the file on may have terms of
    their own.

    Examples
    --------
    >>> import scperturbdiff as spd
    >>> adata = spd.datasets.kang_2018("kang_2018.h5ad")
    >>> spd.PerturbDiff.setup_anndata(
    ...     adata, perturbation_key="perturbation", control="control", context_keys=["cell_type"], batch_key="donor"
    ... )
    """
    return KANG.load(path_or_url, cache_dir, sha256)


def papalexi_2021(
    path_or_url: PathLike | None = None, cache_dir: PathLike | None = None, *, sha256: str | None = None
) -> AnnData:
    """A CRISPR knock-out screen (ECCITE-seq) of 25 genes in stimulated THP-1 cells :cite:p:`papalexi2021`.

    One cell line, three replicates, about 20,700 cells. A few targets (of interferon gamma's pathway, SMAD4, SPI1) have
    strong effects, most have almost none, and not every cell with a guide is a knock-out.

    Parameters
    ----------
    path_or_url
        An `.h5mu` file, such as pertpy's, of which the modality `rna` is read, an `.h5ad` file of RNA, or where to
        download one from. `None`: what ``pertpy.data.papalexi_2021()`` gives, if pertpy is installed.
    cache_dir, sha256
        See :func:`kang_2018`.

    Returns
    -------
    AnnData with counts in `X` (int32 CSR) and

    * `obs`: `perturbation` (the gene, `"NT"` for controls), `guide` (as `"STAT2g2"`), `replicate` (`"rep1"` to
      `"rep3"`), `cell_type` (`"THP-1"`), and, where a file has them, `guide_confident` (keep these cells) and
      `n_counts_original` (counts per cell of all genes, where a file has fewer);
    * `uns["source"]`: see :func:`kang_2018`.

    Raises
    ------
    ImportError, FileNotFoundError, OSError, ValueError
        See :func:`kang_2018`.

    Notes
    -----
    Public at GEO as GSE153056, with no licence stated there; cite the paper. Who passes the file on may have terms of
    their own.

    Examples
    --------
    >>> import scperturbdiff as spd
    >>> adata = spd.datasets.papalexi_2021("papalexi_2021.h5mu")
    >>> spd.PerturbDiff.setup_anndata(adata, perturbation_key="perturbation", control="NT", batch_key="replicate")
    """
    return PAPALEXI.load(path_or_url, cache_dir, sha256)


def norman_2019(
    path_or_url: PathLike | None = None, cache_dir: PathLike | None = None, *, sha256: str | None = None
) -> AnnData:
    """A CRISPR activation screen of single genes and pairs of genes in K562 cells :cite:p:`norman2019`.

    One cell line, 105 single genes and 131 pairs, about 111,000 cells.

    Parameters
    ----------
    path_or_url
        An `.h5ad` file of the data, such as pertpy's (its `layers["counts"]` is read, `X` is normalised) or part of it,
        or where to download one from. `None`: what ``pertpy.data.norman_2019()`` gives, if pertpy is installed.
    cache_dir, sha256
        See :func:`kang_2018`.

    Returns
    -------
    AnnData with counts in `X` (int32 CSR) and

    * `obs`: `perturbation` (a gene, a pair as `"KLF1+MAP2K6"`, `"control"`), `cell_type` (`"K562"`), and, where a file
      has them, `lane` (the lane of the sequencing chip, as text) and `n_counts_original` (counts per cell of all genes,
      where a file has fewer);
    * `uns["source"]`: see :func:`kang_2018`.

    Raises
    ------
    ImportError, FileNotFoundError, OSError, ValueError
        See :func:`kang_2018`.

    Notes
    -----
    Public at GEO as GSE133344, with no licence stated there; cite the paper. Who passes the file on may have terms of
    their own.

    Examples
    --------
    >>> import scperturbdiff as spd
    >>> adata = spd.datasets.norman_2019("norman_2019.h5ad")
    >>> spd.PerturbDiff.setup_anndata(adata, perturbation_key="perturbation", control="control", separator="+")
    """
    return NORMAN.load(path_or_url, cache_dir, sha256)
