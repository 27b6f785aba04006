"""The laws a simulated screen follows: genes, contexts, perturbations, batches. Draws no cells."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from scperturbdiff.data import did_you_mean, preview

if TYPE_CHECKING:
    from anndata import AnnData
    from numpy.typing import ArrayLike, NDArray

    Floats = NDArray[np.float32]

N_PATHWAYS = 4
N_PARTS = 2
"""Parts of a perturbation's programme, each acting through a pathway of its own."""
N_STATES = 3
N_SUBTYPES = 2
N_FACTORS = 4
ACTIVITY_SD = 0.12
"""Standard deviation, over the cells of a context, of a cell's pathway activity."""
BASE_SD = 3.2
"""Standard deviation, over genes, of the log rate (its upper tail is cut, so that no gene takes over a cell)."""
MAX_EFFECT = 1.6
"""Largest log fold change of a perturbation at strength 1."""


@dataclass(frozen=True)
class Genes:
    """What holds in every cell; arrays over genes, log rates are natural logarithms."""

    base: Floats
    """Log rate, shape `(n_genes,)`."""
    dispersion: Floats
    """Inverse dispersion of the negative binomial (variance = mean + mean^2 / dispersion), shape `(n_genes,)`."""
    markers: Floats
    """Log rate gained when a pathway goes from off (0) to on (1), shape `(n_pathways, n_genes)`."""
    states: Floats
    """Programmes along which cells of one context vary, shape `(n_states, n_genes)`."""
    hidden: Floats
    """Programme of the unrecorded factor, shape `(n_genes,)`."""


@dataclass(frozen=True)
class Contexts:
    """Cell types."""

    base: Floats
    """Log rate without pathways, shape `(n_contexts, n_genes)`."""
    activity: Floats
    """Mean activity of each pathway, in 0 to 1, shape `(n_contexts, n_pathways)`."""
    usage: Floats
    """Standard deviation of the cells' scores on each state programme, shape `(n_contexts, n_states)`."""
    subtypes: Floats
    """Log rate added by subtype, shape `(n_contexts, n_subtypes, n_genes)`."""
    fraction: Floats
    """Fraction of cells in the first subtype, shape `(n_contexts,)`."""
    gene_response: Floats
    """Factor on any perturbation's effect on a gene, shape `(n_contexts, n_genes)`."""


@dataclass(frozen=True)
class Perturbations:
    """Single perturbations and pairs of them."""

    programme: Floats
    """Log fold change of each part at strength 1, shape `(n_perturbations, n_parts, n_genes)`."""
    pathway: NDArray[np.int64]
    """Pathway each part acts through, shape `(n_perturbations, n_parts)`."""
    factors: Floats
    """What an informative embedding shows, shape `(n_perturbations, n_parts * n_pathways + n_factors)`."""
    context_scale: Floats
    """Part of the strength that nothing explains, shape `(n_contexts, n_perturbations)`."""
    strength: Floats
    """Mean strength over the cells of a context, shape `(n_contexts, n_perturbations, n_parts)`."""
    ec50: Floats
    """Dose of half the maximal effect, shape `(n_perturbations,)`."""
    pairs: NDArray[np.int64]
    """Components of the combinations, shape `(n_pairs, 2)`."""
    interaction: Floats
    """Non-additive log fold change at strength 1, shape `(n_pairs, n_genes)`."""


def sparse_programme(rng: np.random.Generator, shape: tuple[int, ...], fraction: float, scale: float) -> Floats:
    """Normal effects of standard deviation `scale` on a random `fraction` of genes (at least one), else 0."""
    keep = rng.random(shape) < fraction
    keep |= rng.random(shape).argmax(axis=-1)[..., None] == np.arange(shape[-1])
    return (rng.normal(0.0, scale, shape) * keep).astype(np.float32)


def response(activity: ArrayLike) -> NDArray[Any]:
    """Strength of a part as a function of the activity of its pathway: a sigmoid from 0.2 to 1.8."""
    return 0.2 + 1.6 / (1.0 + np.exp(-6.0 * (np.asarray(activity) - 0.5)))


def saturation(dose: ArrayLike, ec50: ArrayLike, slope: float = 1.5) -> NDArray[Any]:
    """Hill effect of a dose: 0 without, one half at `ec50`, towards 1 at high doses."""
    power = np.power(np.asarray(dose, dtype=float), slope)
    return power / (power + np.power(np.asarray(ec50, dtype=float), slope))


def draw_genes(rng: np.random.Generator, n_genes: int) -> Genes:
    """Draw what holds in every cell."""
    return Genes(
        base=rng.normal(0.0, BASE_SD, n_genes).clip(-2.5 * BASE_SD, BASE_SD).astype(np.float32),
        dispersion=np.exp(rng.normal(1.2, 0.5, n_genes)).astype(np.float32),
        markers=np.abs(sparse_programme(rng, (N_PATHWAYS, n_genes), 0.06, 2.0)),
        states=sparse_programme(rng, (N_STATES, n_genes), 0.15, 0.5),
        hidden=sparse_programme(rng, (n_genes,), 0.2, 1.0),
    )


def draw_contexts(rng: np.random.Generator, n_contexts: int, genes: Genes) -> Contexts:
    """Draw contexts: what makes two of them alike in controls also makes them respond alike."""
    n_genes, n_axes = len(genes.base), 3
    place = rng.normal(size=(n_contexts, n_axes))
    to_activity = rng.normal(size=(n_axes, N_PATHWAYS))
    to_activity /= np.linalg.norm(to_activity, axis=0)
    activity = 1.0 / (1.0 + np.exp(-1.5 * (place @ to_activity + rng.normal(0.0, 0.4, (n_contexts, N_PATHWAYS)))))
    shared = place @ sparse_programme(rng, (n_axes, n_genes), 0.25, 0.6)
    own = sparse_programme(rng, (n_contexts, n_genes), 0.05, 1.0)
    return Contexts(
        base=(genes.base + shared + own).astype(np.float32),
        activity=activity.astype(np.float32),
        usage=rng.uniform(0.4, 1.2, (n_contexts, N_STATES)).astype(np.float32),
        subtypes=sparse_programme(rng, (n_contexts, N_SUBTYPES, n_genes), 0.06, 0.7),
        fraction=rng.uniform(0.3, 0.7, n_contexts).astype(np.float32),
        gene_response=np.exp(rng.normal(0.0, 0.25, (n_contexts, n_genes))).astype(np.float32),
    )


def draw_perturbations(
    rng: np.random.Generator,
    contexts: Contexts,
    n_perturbations: int,
    n_pairs: int,
    interaction: float,
    effect_scale: float,
    doses: NDArray[np.float64],
) -> Perturbations:
    """Draw perturbations: those that share a pathway share a programme; about one in six is weak."""
    n_contexts, n_genes = contexts.base.shape
    first = rng.permutation(np.arange(n_perturbations) % N_PATHWAYS)
    second = (first + rng.integers(1, N_PATHWAYS, n_perturbations)) % N_PATHWAYS
    pathway = np.column_stack([first, second])
    loading = rng.normal(size=(n_perturbations, N_FACTORS))
    weak = rng.permutation(np.arange(n_perturbations) % 6 == 5)
    size = effect_scale * np.exp(rng.normal(0.0, 0.2, n_perturbations)) * np.where(weak, 0.2, 1.0)
    core = sparse_programme(rng, (N_PATHWAYS, n_genes), 0.1, 0.7)[pathway]
    factor = np.einsum("pf,fkg->pkg", loading, sparse_programme(rng, (N_FACTORS, N_PARTS, n_genes), 0.05, 0.5))
    own = sparse_programme(rng, (n_perturbations, N_PARTS, n_genes), 0.01, 0.6)
    programme = (size[:, None, None] * (core + factor + own).clip(-MAX_EFFECT, MAX_EFFECT)).astype(np.float32)

    nodes, weights = np.polynomial.hermite_e.hermegauss(15)
    at_nodes = response(contexts.activity[:, pathway, None] + ACTIVITY_SD * nodes)
    context_scale = np.exp(rng.normal(0.0, 0.12, (n_contexts, n_perturbations)))
    strength = context_scale[..., None] * (at_nodes @ weights) / weights.sum()

    codes = np.sort(rng.choice(n_perturbations * (n_perturbations - 1) // 2, n_pairs, replace=False))
    pairs = np.column_stack(np.triu_indices(n_perturbations, k=1))[codes]
    low, high = np.sort(first[pairs], axis=1).T
    synergy = rng.choice([-1.0, 1.0], (N_PATHWAYS, N_PATHWAYS)) * rng.uniform(0.3, 0.8, (N_PATHWAYS, N_PATHWAYS))
    joint = sparse_programme(rng, (N_PATHWAYS, N_PATHWAYS, n_genes), 0.08, 0.7 * effect_scale)
    extra = synergy[low, high, None] * programme[pairs].sum(axis=(1, 2)) + joint[low, high]

    middle = np.exp(np.log(doses).mean()) if doses.size else 1.0
    return Perturbations(
        programme=programme,
        pathway=pathway,
        factors=(size[:, None] * np.hstack([*np.eye(N_PATHWAYS)[pathway.T], loading * 0.5])).astype(np.float32),
        context_scale=context_scale.astype(np.float32),
        strength=strength.astype(np.float32),
        ec50=(middle * np.exp(rng.normal(0.0, 0.5, n_perturbations))).astype(np.float32),
        pairs=pairs.astype(np.int64),
        interaction=(interaction * extra).astype(np.float32),
    )


def _position(names: NDArray[Any], name: str, what: str) -> int:
    found = np.flatnonzero(names == name)
    if not found.size:
        hint = did_you_mean(name, names)
        raise ValueError(f"{what} {name!r} was not simulated.{hint} Known: {preview(names.tolist())}.")
    return int(found[0])


def true_log_fold_change(adata: AnnData, perturbation: str, context: str, dose: float | None = None) -> Floats:
    """The effect that was simulated, averaged over the responding cells of a context, the unrecorded factor at 0.

    Parameters
    ----------
    adata
        Return value of :func:`simulate` (also after writing and reading, or of a subset of its cells, all genes).
    perturbation, context
        Labels of `adata.obs["perturbation"]` and `adata.obs["cell_type"]`.
    dose
        Needed exactly when the screen has doses. Any dose >= 0.

    Returns
    -------
    Natural log fold change of every gene's rate against controls, before rates are scaled to the library size,
    shape `(n_genes,)`.
    """
    if "truth" not in adata.uns:
        raise ValueError("adata.uns has no 'truth': true_log_fold_change works on what simulate() returned.")
    truth = adata.uns["truth"]
    if (dose is not None) != bool(len(truth["doses"])):
        raise ValueError("dose must be given when the screen has doses, and only then.")
    if dose is not None and not 0 <= dose < np.inf:
        raise ValueError(f"dose={dose} must be finite and not negative.")
    if perturbation == truth["control"]:
        return np.zeros(truth["programme"].shape[-1], dtype=np.float32)
    at = _position(truth["contexts"], context, "context")
    label = _position(truth["labels"], perturbation, "perturbation")
    n_single = len(truth["perturbations"])
    parts = [label] if label < n_single else list(truth["pairs"][label - n_single])
    strength = truth["strength"][at, parts]
    if dose is not None:
        strength = strength * saturation(dose, truth["ec50"][parts])[:, None]
    effect = np.einsum("pk,pkg->g", strength, truth["programme"][parts])
    if label >= n_single:
        effect = effect + np.sqrt(strength.mean(axis=1).prod()) * truth["interaction"][label - n_single]
    return (effect * truth["gene_response"][at]).astype(np.float32)
