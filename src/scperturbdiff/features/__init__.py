"""Tables of features for perturbations that nobody measured: from control cells, annotation, molecules and files."""

from scperturbdiff.features._coexpression import coexpression
from scperturbdiff.features._fingerprints import fingerprints
from scperturbdiff.features._gene_ontology import gene_ontology
from scperturbdiff.features._join import join
from scperturbdiff.features._read import read

__all__ = ["coexpression", "fingerprints", "gene_ontology", "join", "read"]
