"""How a response grows with the dose."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from scperturbdiff.data import POPULATION, check_obs_keys, did_you_mean, parse_doses, preview
from scperturbdiff.evaluation.pl._cells import COLORS, find_genes, get_axes
from scperturbdiff.evaluation.pl._groups import read_groups

if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Unpack

    from anndata import AnnData
    from matplotlib.axes import Axes
    from numpy.typing import NDArray

    from scperturbdiff.evaluation.pl._groups import Groups, ShownGroups

LENGTH = "length of the mean shift"
STYLES = {"real": "-", "predicted": "--"}


def dose_response(
    pred: AnnData,
    real: AnnData,
    control: str | AnnData,
    *,
    dose_key: str,
    perturbation: str | None = None,
    genes: str | Sequence[str] | None = None,
    replicate_key: str | None = None,
    population_key: str = POPULATION,
    ax: Axes | None = None,
    **shown: Unpack[ShownGroups],
) -> Axes:
    """Response to a perturbation against its dose, predicted and real.

    Parameters
    ----------
    pred, real, control
        Predicted cells, real cells, and the label of the controls in `real` or an AnnData of real control cells. Doses
        of either may be absent from the other.
    dose_key
        Column of `obs` with doses.
    perturbation
        Which one, of a single component; `None` where `pred` holds only one.
    genes
        Genes whose mean expression (log-normalised) is drawn. `None`: the length of the mean shift of all genes from
        the controls, less what sampling alone gives.
    replicate_key, population_key
        Columns that tell apart populations of one dose and context: replicates in `real.obs` (`None`: there are none)
        and draws in `pred.obs`, if it has the column. Those with fewer than two cells are left out.
    perturbation_key, context_keys, separator, layer_pred, layer_real, target_sum, normalized, ax
        As in :func:`similarity`. Contexts are populations, too.

    Returns
    -------
    The Axes, with doses on a logarithmic scale: lines through the means over populations, real ones solid, predicted
    ones dashed; bars span mean plus or minus one s.d. over populations, where there are two. A dotted line is at the
    mean of the controls of a gene.

    Raises
    ------
    KeyError
        If a column does not exist.
    ValueError
        If the perturbation has no cells, genes are unknown, or a label is a combination, whose doses are no axis.
    """
    check_obs_keys(real, "real", replicate_key=replicate_key)
    apart = {"real": replicate_key, "predicted": population_key if population_key in pred.obs else None}
    groups = read_groups(pred, real, control, dose_key=dose_key, populations=apart, **shown)
    name = _which(groups, perturbation)
    wanted, at = ([LENGTH], [None]) if genes is None else find_genes(genes, real.var_names)
    many = len(wanted) > 1
    ax = get_axes(ax, (4.8, 3.6))
    for number, (label, column) in enumerate(zip(wanted, at, strict=True)):
        for side in ("real", "predicted"):
            doses, mean, spread = _curve(groups, side, name, column)
            if not len(doses):
                continue
            color = f"C{number % 10}" if many else COLORS[side]
            text = f"{label}, {side}" if many else side
            ax.errorbar(
                doses, mean, spread, color=color, ls=STYLES[side], marker="o", ms=4, lw=1.4, capsize=0, label=text
            )
        if column is not None:
            base = float(np.mean([control.mean[column] for control in groups.controls.values()]))
            ax.axhline(base, color=f"C{number % 10}" if many else COLORS["control"], lw=0.9, ls=":", zorder=0)
    ax.set_xscale("log")
    ax.set_xlabel(f"{dose_key} of {name}")
    ax.set_ylabel(LENGTH if genes is None else "mean log-normalised expression" if many else f"mean of {wanted[0]}")
    if genes is None:
        ax.set_ylim(bottom=0)
    ax.legend(frameon=False, fontsize=8)
    return ax


def _which(groups: Groups, perturbation: str | None) -> str:
    """The name of the perturbation shown, which has cells and one dose at a time."""
    labels = groups.keys["real"].labels
    there = {side: list(dict.fromkeys(condition[-1] for condition in groups.cells[side])) for side in groups.cells}
    if perturbation is None and len(there["predicted"]) != 1:
        raise ValueError(
            f"pred holds {len(there['predicted'])} perturbations: {preview(there['predicted'])}. Name one: "
            "perturbation=..."
        )
    name = there["predicted"][0] if perturbation is None else labels.canonical(perturbation)
    known = list(dict.fromkeys([*there["predicted"], *there["real"]]))
    if name not in known:
        raise ValueError(f"There are no cells of {name!r}.{did_you_mean(name, known)} Perturbations: {preview(known)}.")
    if len(labels.components(name)) != 1:
        raise ValueError(f"{name!r} is a combination: each component has a dose, which are no one axis.")
    return name


def _curve(groups: Groups, side: str, name: str, column: int | None) -> tuple[NDArray[np.float64], ...]:
    """Doses, and mean and s.d. over the populations of each; the s.d. is NaN where there is one."""
    at: dict[float, list[float]] = {}
    for condition, cells in groups.cells[side].items():
        if condition[-1] != name:
            continue
        (dose,) = parse_doses(condition[-2])
        value = cells.length_of_shift(groups.control(side, condition)) if column is None else float(cells.mean[column])
        at.setdefault(dose, []).append(value)
    doses = sorted(at)
    spread = [np.std(at[dose], ddof=1) if len(at[dose]) > 1 else np.nan for dose in doses]
    return np.array(doses), np.array([np.mean(at[dose]) for dose in doses]), np.array(spread)
