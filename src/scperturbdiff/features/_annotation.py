"""Which terms genes are annotated with, from a GAF file or NCBI's gene2go."""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from scperturbdiff.features._files import iter_lines, reading

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator
    from pathlib import Path

EVIDENCE = (
    *("EXP", "IDA", "IPI", "IMP", "IGI", "IEP", "HTP", "HDA", "HMP", "HGI", "HEP"),
    *("IBA", "IBD", "IKR", "IRD", "ISS", "ISO", "ISA", "ISM", "IGC", "RCA"),
    *("TAS", "NAS", "IC", "ND", "IEA"),
)
"""Codes of evidence of the Gene Ontology: experiments, phylogeny and computation, statements, none, automatic."""


@dataclass(frozen=True)
class Line:
    """One annotation."""

    gene: str
    term: str
    evidence: str
    qualifier: str
    taxon: str
    synonyms: tuple[str, ...] = ()


@dataclass
class Annotation:
    """Terms of each gene, as they are in the file, and symbols of genes by their synonyms."""

    terms: dict[str, set[str]] = field(default_factory=lambda: defaultdict(set))
    synonyms: dict[str, set[str]] = field(default_factory=lambda: defaultdict(set))


def read_annotation(path: Path, taxon: int | None, exclude_evidence: Collection[str]) -> Annotation:
    """Read a file of annotations, without those that are negated, of excluded evidence or of another taxon.

    A file of several taxa without `taxon`, or one without any annotation that is kept, raises a `ValueError`.
    """
    out = Annotation()
    taxa: Counter[str] = Counter()
    wanted = None if taxon is None else str(taxon)
    with reading(path, "GAF or gene2go"):
        for line in _lines(path):
            taxa[line.taxon] += 1
            if wanted not in (None, line.taxon):
                continue
            for synonym in line.synonyms:
                out.synonyms[synonym].add(line.gene)
            if "NOT" not in line.qualifier.split("|") and line.evidence not in exclude_evidence:
                out.terms[line.gene].add(line.term)
    listed = ", ".join(f"{name} ({n:,} annotations)" for name, n in taxa.most_common(10))
    if wanted is None and len(taxa) > 1:
        raise ValueError(f"{str(path)!r} holds {len(taxa)} taxa. Choose one by taxon=...: {listed}.")
    if not out.terms:
        left = f" that are kept (taxon={taxon}, without evidence {', '.join(exclude_evidence)})"
        raise ValueError(f"{str(path)!r} has no annotations{left}. Taxa: {listed or 'none'}.")
    return out


def _lines(path: Path) -> Iterator[Line]:
    """Lines of either format, told by the number of columns and the one that holds terms."""
    for number, text in iter_lines(path):
        if not text.strip() or text.startswith(("!", "#")):
            continue
        columns = text.split("\t")
        if 15 <= len(columns) <= 17 and ":" in columns[4]:
            yield Line(
                gene=columns[2].strip(),
                term=columns[4],
                evidence=columns[6],
                qualifier=columns[3],
                taxon=columns[12].split("|")[0].removeprefix("taxon:"),  # the second is a host or a guest
                synonyms=tuple(filter(None, columns[10].split("|"))),
            )
        elif len(columns) == 8 and ":" in columns[2]:
            # qualifiers are words here, as in "NOT involved_in" of newer files
            yield Line(columns[1].strip(), columns[2], columns[3], "|".join(columns[4].split()), columns[0])
        else:
            raise ValueError(
                f"{str(path)!r}, line {number}: {len(columns)} columns. Allowed: GAF 2 (15 to 17 columns, separated by "
                "tabs, the term in column 5) or NCBI's gene2go (8 columns, the term in column 3)."
            )
