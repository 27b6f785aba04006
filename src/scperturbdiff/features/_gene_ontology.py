"""What genes are annotated with in the Gene Ontology."""

from __future__ import annotations

import logging
from types import NoneType
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
from scipy import sparse
from sklearn.decomposition import TruncatedSVD
from sklearn.preprocessing import normalize

from scperturbdiff.arguments import check_int, check_texts, check_type
from scperturbdiff.data import preview
from scperturbdiff.features._annotation import EVIDENCE, read_annotation
from scperturbdiff.features._files import check_file
from scperturbdiff.features._names import Missing, Wanted
from scperturbdiff.features._ontology import Ontology, read_ontology
from scperturbdiff.features._signs import fix_signs

if TYPE_CHECKING:
    import os
    from collections.abc import Mapping, Sequence

    from scperturbdiff.features._annotation import Annotation

logger = logging.getLogger(__name__)


def gene_ontology(
    genes: Sequence[str] | None,
    annotation: str | os.PathLike[str],
    ontology: str | os.PathLike[str],
    *,
    n_components: int = 64,
    exclude_evidence: Sequence[str] = ("ND",),
    namespaces: Sequence[str] | None = None,
    taxon: int | None = None,
    min_genes: int = 2,
    aliases: Mapping[str, str] | None = None,
    missing: Missing = "warn",
) -> pd.DataFrame:
    """Features of genes from their annotation: genes are alike that take part in the same processes.

    A gene has the terms it is annotated with and all terms these are (`is_a`) or are part of (`part_of`). Terms count
    by the logarithm of the number of genes for each gene that has them, so that rare terms count for more and one that
    all genes have for nothing; rows are scaled to length 1 (TF-IDF). A truncated singular value decomposition keeps
    the first components. All annotated genes of the file are in it, so that a gene's row does not depend on which
    genes are asked for: tables made later from the same files fit. Negated annotations (qualifier `NOT`) are left out.

    Parameters
    ----------
    genes
        Names of the rows wanted, as in the file: symbols in GAF, numbers of Entrez Gene in gene2go. `None`: all genes.
    annotation
        GAF 2.x (from geneontology.org) or NCBI's gene2go, plain or gzipped.
    ontology
        The terms in OBO format, `go-basic.obo` for one, plain or gzipped. Terms under alternative identifiers, and
        obsolete ones with one replacement, are read as the terms in use. Other annotations are left out, and named.
    n_components
        Columns of the table: fewer than genes and terms.
    exclude_evidence
        Codes of evidence to leave out. `"ND"` says that nothing is known, `"IEA"` that nobody looked at the annotation.
        Annotations of a well-studied gene may come from the very screen to be predicted.
    namespaces
        Parts of the ontology to use, `("biological_process",)` for one. Default: all.
    taxon
        NCBI's number of the species, 9606 for human. Needed where the file holds several.
    min_genes
        Genes that a term must have to count.
    aliases
        Other names of genes, alias to name; either may be the one in the file: `{"TP53": "7157"}` reads gene2go for
        symbols. Synonyms of a GAF file are not used by themselves, but named where a gene is missing.
    missing
        What is done about `genes` without annotation: `"warn"` names them, with synonyms or the nearest names, and
        leaves them out; `"error"` raises.

    Returns
    -------
    Scores without unit, float32, shape `(n_genes, n_components)`: one row a gene in the order of `genes` (else sorted),
    columns `go1` and so on. The length of a row is at most 1 and says how much of the gene's annotation the components
    hold. The largest entry of a column over all annotated genes is positive.

    Raises
    ------
    FileNotFoundError
        If a file is not there.
    KeyError
        If none of `genes` is annotated, or with `missing="error"` one is not.
    ValueError
        If a file is damaged or of another format (the line is named), holds several species and `taxon` is not given,
        or if `n_components` is too large.
    """
    wanted = Wanted.of("genes", genes, aliases, missing)
    check_type("taxon", taxon, (int, np.integer, NoneType), "NCBI's number of a species, or None")
    check_int("min_genes", min_genes, 1)
    excluded = check_texts("exclude_evidence", exclude_evidence)
    if unknown := sorted(set(excluded) - set(EVIDENCE)):
        raise ValueError(f"exclude_evidence has {preview(unknown)}. Allowed: {preview(EVIDENCE, 30)}.")
    annotation_path, ontology_path = check_file("annotation", annotation), check_file("ontology", ontology)
    terms = read_ontology(ontology_path)
    used = _columns(terms, namespaces)
    read = read_annotation(annotation_path, taxon, excluded)
    matrix, names = _weighted_terms(read, terms, used, min_genes)
    check_int("n_components", n_components, 1, min(matrix.shape) - 1)
    # the start of the iteration is fixed: the same files give the same table
    scores = TruncatedSVD(n_components, algorithm="arpack", random_state=0).fit_transform(matrix)
    values = fix_signs(scores).astype(np.float32)
    index = names
    if wanted.names is not None:
        rows = set(names)
        found = wanted.rows(
            names,
            where=str(annotation_path),
            table="the annotation",
            remedy="Other names of the same gene go into aliases.",
            lacks=lambda name: _why_not(name, rows, read),
        )
        index = list(found)
        values = values[list(found.values())]
    return pd.DataFrame(values, index=pd.Index(index, name="gene"), columns=[f"go{i + 1}" for i in range(n_components)])


def _columns(terms: Ontology, namespaces: Sequence[str] | None) -> np.ndarray:
    """Which terms are of the namespaces wanted."""
    given = np.array(terms.namespaces, dtype=object)
    if namespaces is None:
        return np.ones(len(given), np.bool_)
    wanted = check_texts("namespaces", namespaces)
    known = sorted(set(terms.namespaces))
    if unknown := sorted(set(wanted) - set(known)):
        raise ValueError(f"namespaces has {preview(unknown)}. The ontology has {preview(known)}.")
    return np.isin(given, wanted)


def _weighted_terms(
    annotation: Annotation, terms: Ontology, used: np.ndarray, min_genes: int
) -> tuple[sparse.csr_matrix, list[str]]:
    """TF-IDF `(n_genes, n_terms)` with ancestors, rows of length 1, and the genes, without those that have no term."""
    genes = sorted(annotation.terms)
    pairs = [(i, term) for i, gene in enumerate(genes) for term in sorted(annotation.terms[gene])]
    _tell_unknown({term for _, term in pairs if term not in terms.position}, terms, len({t for _, t in pairs}))
    known = np.array([(i, terms.position[term]) for i, term in pairs if term in terms.position], np.int64).reshape(
        -1, 2
    )
    n = (len(genes), len(terms.terms))
    direct = sparse.csr_matrix((np.ones(len(known), np.int32), (known[:, 0], known[:, 1])), shape=n)
    whole = sparse.csr_matrix((direct @ terms.ancestors().astype(np.int32)) > 0, dtype=np.float64)
    whole = whole[whole.getnnz(axis=1) > 0]
    kept = np.flatnonzero(direct.getnnz(axis=1) > 0)
    n_with = whole.getnnz(axis=0)
    informative = used & (n_with >= min_genes) & (n_with < whole.shape[0])
    weights = np.log(whole.shape[0] / np.maximum(n_with[informative], 1))
    matrix = sparse.csr_matrix(whole[:, np.flatnonzero(informative)] @ sparse.diags(weights, format="csr"))
    some = matrix.getnnz(axis=1) > 0
    names = [genes[i] for i in kept[some]]
    if min(matrix[some].shape) < 2:
        raise ValueError(
            f"Only {len(names)} genes and {matrix.shape[1]} terms tell genes apart (terms that min_genes={min_genes} "
            "genes or more have, and not all); two of each are needed."
        )
    return normalize(matrix[some]), names


def _tell_unknown(unknown: set[str], terms: Ontology, n_terms: int) -> None:
    """Warn of terms that are annotated, but not in use in the ontology."""
    if len(unknown) == n_terms:
        raise ValueError(
            f"None of the {n_terms} annotated terms is in the ontology: {preview(sorted(unknown))}. "
            f"It has {preview(terms.terms, 3)}. Do the two files belong together?"
        )
    gone, absent = sorted(unknown & terms.obsolete), sorted(unknown - terms.obsolete)
    if gone:
        logger.warning("%d annotated terms are obsolete, without one replacement: %s.", len(gone), preview(gone))
    if absent:
        text = "%d annotated terms are not in the ontology (is it older than the annotation?): %s."
        logger.warning(text, len(absent), preview(absent))


def _why_not(gene: str, rows: set[str], annotation: Annotation) -> str:
    """What is known of a gene that has none of the rows; empty where nothing is."""
    if gene in annotation.terms:
        return "no annotation that tells genes apart"
    meant = sorted(annotation.synonyms.get(gene, set()) & rows)
    return f"a synonym of {preview(meant)}" if meant else ""
