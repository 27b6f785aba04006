"""Draw the cells of a simulated perturbation screen."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
import pandas as pd
from anndata import AnnData

from scperturbdiff.arguments import check_choice, check_int, check_number
from scperturbdiff.datasets._cells import draw_cells
from scperturbdiff.datasets._truth import Contexts, Genes, Perturbations, draw_contexts, draw_genes, draw_perturbations
from scperturbdiff.memory import check_memory
from scperturbdiff.seeds import check_seed

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

CONTROL = "control"
Law = Literal["none", "gaussian", "two_modes"]
FeatureKind = Literal["informative", "random"]


def simulate(
    n_contexts: int = 6,
    n_perturbations: int = 8,
    n_cells_per_population: int = 60,
    n_genes: int = 500,
    *,
    n_batches: int = 3,
    n_control_cells: int | None = None,
    combinations: int = 0,
    interaction: float = 0.0,
    doses: Sequence[float] | None = None,
    hidden_factor: Law = "none",
    hidden_scale: float = 0.7,
    effect_scale: float = 1.0,
    responders: float = 1.0,
    batch_scale: float = 0.1,
    n_features: int = 0,
    features: FeatureKind = "informative",
    library_size: float | None = None,
    seed: int = 0,
) -> AnnData:
    """Simulate a perturbation screen whose truth is known.

    A cell's count of a gene is negative binomial (a gamma-Poisson mixture with a dispersion per gene); its mean is
    the cell's lognormal library size times the gene's share of the cell's rates. The log rate is a sum of: the
    gene's own level; the programme of the context; the cell's place along a few continuous programmes and its
    subtype; the markers of a few pathways, in proportion to the cell's activity of each; the batch; the effect of
    the perturbation; the unrecorded factor.

    A perturbation is two sparse programmes of log fold changes, each acting through a pathway of its own. The strength
    of each is a sigmoid of the *cell's* activity of its pathway, which varies mostly between contexts and shows in
    the markers; so size and direction of the response depend on the context, in a way that can be learned for an unseen
    (context, perturbation). A factor per gene and context and a lognormal factor per (context, perturbation) (standard
    deviations 0.25 and 0.12) come on top. About one perturbation in six is weak.

    Parameters
    ----------
    n_contexts, n_perturbations
        Numbers of cell types, `"C1"` and so on (those that look alike as controls respond alike), and of single
        perturbations, `"P01"` and so on.
    n_cells_per_population, n_control_cells
        Cells in each treated population, that is, each (context, perturbation, dose, batch), and control cells in each
        (context, batch), by default twice as many.
    n_genes, n_batches
        Numbers of genes and of donors, `"D1"` and so on. Each donor has every condition.
    combinations, interaction
        Number of pairs `"P01+P02"`, drawn at random, and strength of the part of a pair's effect that is not the sum of
        its components': synergy or buffering and a programme of its own, both set by the two pathways, so that it can
        be learned from other pairs. 0: effects add up in log rates.
    doses
        Positive doses at which every perturbation is given; the effect saturates (Hill coefficient 1.5, half-maximal
        dose drawn per perturbation around the middle of `doses`). Controls have dose 0. `None`: no dose column.
    hidden_factor, hidden_scale
        Law of the unrecorded factor that has one value per treated population (0 in controls): `"none"` (always 0),
        `"gaussian"` (standard normal), `"two_modes"` (-1 or 1); and factor of the programme along which it moves
        populations (normal log fold changes on a fifth of the genes).
    effect_scale, batch_scale
        Factor on all effects of perturbations (0: none has any), and standard deviation of the additive effect of a
        batch on a gene's log rate.
    responders
        Share of the treated cells that the perturbation acts on, drawn for each cell; the others are as controls are
        (guides that do not cut, drugs that do not get in). A treated population then has two modes.
    n_features, features
        Number of features of `uns["perturbation_embedding"]`, a DataFrame with one row per single perturbation (0: no
        embedding). `"informative"`: a random linear map of the pathway and of the factors that shape the programme,
        with a little noise. `"random"`: noise.
    library_size
        Median counts per cell, at least 100. Default: 2.5 per gene, at most 2,500; about 30 % of entries are then
        non-zero, as after a selection of variable genes.
    seed
        The same seed gives the same cells. Genes, contexts and batches have streams of their own, so they stay when
        the number of perturbations or cells changes.

    Returns
    -------
    AnnData with integer counts in `X` (int32 CSR), cells ordered by population, and

    * `obs`: `perturbation` (`"control"` for controls), `cell_type`, `donor`, `dose` (with `doses`), `hidden_factor`,
      `responds` (with `responders` below 1);
    * `uns["truth"]`: every law and realised value, in particular `populations` (DataFrame), `pathway_activity`,
      `strength` (mean over cells, contexts x perturbations x 2), `programme` (perturbations x 2 x genes),
      `gene_response`, `pairs`, `interaction`, `ec50`, `batch_effect`, `hidden_law`, `hidden_programme` (scaled).
      Effects are natural logarithms. :func:`true_log_fold_change` puts them together.

    Raises
    ------
    ValueError
        For sizes below 1, too many combinations, doses that are not positive, finite and distinct, negative scales, or
        unknown words.

    Examples
    --------
    >>> import scperturbdiff as spd
    >>> adata = spd.datasets.simulate(n_contexts=2, n_perturbations=3, n_cells_per_population=10, n_genes=50)
    >>> adata.shape
    (300, 50)
    """
    if n_control_cells is None:
        n_control_cells = 2 * n_cells_per_population
    if library_size is None:
        library_size = float(np.clip(2.5 * n_genes, 100.0, 2500.0))
    given = dict(locals())
    _check_arguments(given)
    levels = _check_doses(doses)
    streams = [np.random.default_rng(s) for s in np.random.SeedSequence(seed).spawn(6)]
    genes = draw_genes(streams[0], n_genes)
    contexts = draw_contexts(streams[1], n_contexts, genes)
    effects = draw_perturbations(streams[2], contexts, n_perturbations, combinations, interaction, effect_scale, levels)
    batch_effect = (batch_scale * streams[3].normal(size=(n_batches, n_genes))).astype(np.float32)

    names = _Names(n_contexts, n_perturbations, n_batches, effects.pairs)
    table = _population_table(len(names.labels), levels, given)
    table["hidden_factor"] = _draw_hidden(streams[4], hidden_factor, table["label"].to_numpy() >= 0)
    cell_rng, feature_rng, responder_rng = streams[5].spawn(3)
    responds = np.repeat(table["label"].to_numpy() >= 0, table["n_cells"])
    responds &= responder_rng.random(len(responds)) < responders
    hidden = hidden_scale * genes.hidden
    counts = draw_cells(cell_rng, table, genes, contexts, effects, batch_effect, hidden, library_size, responds)

    populations = names.annotate(table, with_dose=bool(levels.size))
    obs = populations.drop(columns="n_cells").iloc[np.repeat(np.arange(len(table)), table["n_cells"])]
    obs.index = pd.Index("cell" + np.arange(len(obs)).astype(str).astype(object))
    if responders < 1:
        obs["responds"] = responds
    var = pd.DataFrame({"dispersion": genes.dispersion}, index=[f"gene{i + 1:04d}" for i in range(n_genes)])
    adata = AnnData(X=counts, obs=obs, var=var)
    adata.uns["truth"] = {
        **_truth(names, populations, genes, contexts, effects),
        "doses": levels,
        "batch_effect": batch_effect,
        "hidden_law": hidden_factor,
        "hidden_programme": hidden,
        "seed": seed,
    }
    if n_features:
        adata.uns["perturbation_embedding"] = pd.DataFrame(
            _draw_features(feature_rng, effects, n_features, features),
            index=names.labels[:n_perturbations].tolist(),
            columns=[f"f{i + 1}" for i in range(n_features)],
        )
    return adata


def _check_arguments(given: dict[str, Any]) -> None:
    """Raise a `ValueError` for an argument of :func:`simulate`, by name, that is not allowed."""
    for name in ("n_contexts", "n_perturbations", "n_cells_per_population", "n_genes", "n_batches", "n_control_cells"):
        check_int(name, given[name], 1, 10**7)
    for name in ("interaction", "hidden_scale", "effect_scale", "batch_scale"):
        check_number(name, given[name], "[0, inf)")
    check_number("responders", given["responders"], "[0, 1]")
    n = given["n_perturbations"]
    check_int("combinations", given["combinations"], 0, n * (n - 1) // 2)
    check_int("n_features", given["n_features"], 0, 10**5)
    check_number("library_size", given["library_size"], "[100, inf)")
    check_choice("hidden_factor", given["hidden_factor"], get_args(Law))
    check_choice("features", given["features"], get_args(FeatureKind))
    check_seed(given["seed"])
    n_doses = 1 if given["doses"] is None else np.size(given["doses"])
    n_cells = (n + given["combinations"]) * n_doses * given["n_cells_per_population"] + given["n_control_cells"]
    n_cells *= given["n_contexts"] * given["n_batches"]
    rows = n_cells + given["n_contexts"] * (n + given["combinations"])  # of effects
    check_memory(8 * given["n_genes"] * rows, f"{n_cells:,} cells", "Ask for fewer cells or genes.")


def _check_doses(doses: Sequence[float] | None) -> NDArray[np.float64]:
    if doses is None:
        return np.empty(0)
    levels = np.asarray(doses, dtype=float)
    if levels.ndim != 1 or not levels.size or not np.isfinite(levels).all() or (levels <= 0).any():
        raise ValueError(f"doses={doses!r} must be positive, finite numbers; dose 0 is the control's.")
    if np.unique(levels).size < levels.size:
        raise ValueError(f"doses={doses!r} has repeated values.")
    return levels


class _Names:
    """Labels of contexts, perturbations (singles first, then pairs) and batches."""

    def __init__(self, n_contexts: int, n_perturbations: int, n_batches: int, pairs: NDArray[np.int64]) -> None:
        width = max(2, len(str(n_perturbations)))
        singles = [f"P{i + 1:0{width}d}" for i in range(n_perturbations)]
        self.labels = np.array([*singles, *(f"{singles[a]}+{singles[b]}" for a, b in pairs)])
        self.contexts = np.array([f"C{i + 1}" for i in range(n_contexts)])
        self.batches = np.array([f"D{i + 1}" for i in range(n_batches)])

    def annotate(self, table: pd.DataFrame, with_dose: bool) -> pd.DataFrame:
        """The table of populations with names for numbers, as categories."""
        coded = {
            "perturbation": (table["label"] + 1, [CONTROL, *self.labels.tolist()]),
            "cell_type": (table["context"], self.contexts.tolist()),
            "donor": (table["batch"], self.batches.tolist()),
        }
        names = {name: pd.Categorical.from_codes(codes, pd.Index(labels)) for name, (codes, labels) in coded.items()}
        numbers = table[[*(["dose"] if with_dose else []), "hidden_factor", "n_cells"]]
        return pd.DataFrame(names).join(numbers).set_axis([f"population{i}" for i in range(len(table))])


def _truth(
    names: _Names, populations: pd.DataFrame, genes: Genes, contexts: Contexts, effects: Perturbations
) -> dict[str, Any]:
    """What `uns["truth"]` says of genes, contexts and perturbations."""
    labels = ["perturbation", "cell_type", "donor"]
    return {
        "control": CONTROL,
        "contexts": names.contexts,
        "perturbations": names.labels[: len(effects.programme)],
        "labels": names.labels,
        "batches": names.batches,
        "populations": populations.assign(**populations[labels].astype(str)),
        "base_log_rate": contexts.base,
        "dispersion": genes.dispersion,
        "pathway_markers": genes.markers,
        "pathway_activity": contexts.activity,
        "pathway_of_perturbation": effects.pathway,
        "gene_response": contexts.gene_response,
        **{name: vars(effects)[name] for name in ("strength", "programme", "pairs", "interaction", "ec50")},
    }


def _population_table(n_labels: int, levels: NDArray[np.float64], sizes: dict[str, Any]) -> pd.DataFrame:
    """One row per population in numbers; label -1 is the control. Dose is NaN for a screen without doses."""
    contexts, batches = range(sizes["n_contexts"]), range(sizes["n_batches"])
    control = pd.MultiIndex.from_product([contexts, [-1], [0.0], batches])
    given = levels if levels.size else [np.nan]
    treated = pd.MultiIndex.from_product([contexts, range(n_labels), given, batches])
    table = pd.concat([index.to_frame(index=False) for index in (control, treated)], ignore_index=True)
    table.columns = pd.Index(["context", "label", "dose", "batch"])
    is_control = table["label"] < 0
    table["n_cells"] = np.where(is_control, sizes["n_control_cells"], sizes["n_cells_per_population"])
    return table.sort_values(["context", "label", "dose", "batch"], ignore_index=True)


def _draw_hidden(rng: np.random.Generator, law: Law, treated: NDArray[np.bool_]) -> NDArray[np.float64]:
    if law == "gaussian":
        values = rng.normal(size=treated.size)
    elif law == "two_modes":
        values = rng.choice([-1.0, 1.0], treated.size)
    else:
        values = np.zeros(treated.size)
    return np.where(treated, values, 0.0)


def _draw_features(
    rng: np.random.Generator, effects: Perturbations, n_features: int, kind: FeatureKind
) -> NDArray[np.float32]:
    n_perturbations, n_factors = effects.factors.shape
    noise = rng.normal(size=(n_perturbations, n_features))
    if kind == "random":
        return noise.astype(np.float32)
    mixing = rng.normal(size=(n_factors, n_features)) / np.sqrt(n_factors)
    return (effects.factors @ mixing + 0.05 * noise).astype(np.float32)
