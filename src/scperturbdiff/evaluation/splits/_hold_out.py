"""Choose what to hold out."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from scperturbdiff.data import context_name, preview
from scperturbdiff.evaluation.splits._choose import (
    check_fraction,
    combinations_seen,
    draw,
    draw_pairs,
    known_context,
    known_label,
    known_pair,
)
from scperturbdiff.evaluation.splits._split import Screen, Split

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from anndata import AnnData


def hold_out_pairs(
    adata: AnnData,
    *,
    perturbation_key: str,
    control: str,
    context_keys: Sequence[str],
    fraction: float = 0.2,
    pairs: Iterable[Sequence[str]] | None = None,
    separator: str | None = "+",
    seed: int = 0,
) -> Split:
    """Hold out (perturbation, context) pairs whose perturbation and context are both still seen in training.

    Parameters
    ----------
    adata
        Cells of a screen. Only `obs` is read.
    perturbation_key
        Column of `adata.obs` with perturbations.
    control
        Its label for control cells, which always stay in training.
    context_keys
        One or more columns of `adata.obs` that make the context.
    fraction
        Fraction of all pairs to hold out, spread evenly over contexts and perturbations.
    pairs
        Pairs to hold out instead: tuples of a perturbation and one value per context key.
    separator
        Joins the names of a combination; `None`: no label is one. A column of lists is never cut.
    seed
        Decides which pairs are drawn.

    Returns
    -------
    The split; its test cells are the treated cells of the held-out pairs, in all batches and at all doses.

    Raises
    ------
    KeyError
        For a column that does not exist.
    ValueError
        For unknown labels, or when so many pairs cannot be held out with every perturbation and context left in
        training.
    """
    screen = Screen(adata, perturbation_key, control, context_keys, separator=separator)
    if not screen.context_keys:
        raise ValueError("hold_out_pairs needs context_keys: without a context there are no pairs to hold out.")
    if pairs is not None:
        chosen = [known_pair(screen, pair) for pair in pairs]
        how = "as listed"
    else:
        chosen = draw_pairs(screen.conditions, fraction, seed)
        how = f"drawn with seed {seed}"
    test = np.isin(screen.condition_code, [screen.conditions[pair] for pair in chosen])
    text = f"{len(set(chosen))} of {len(screen.conditions)} (perturbation, context) pairs held out, {how}."
    names = [f"{perturbation} in {context_name(context)}" for perturbation, context in sorted(set(chosen))]
    return screen.make("pairs", text, names, train=~test, test=test)


def hold_out_contexts(
    adata: AnnData,
    *,
    perturbation_key: str,
    control: str,
    context_keys: Sequence[str],
    contexts: Iterable[str | Sequence[str]] | None = None,
    fraction: float = 0.2,
    keep_controls: bool = True,
    separator: str | None = "+",
    seed: int = 0,
) -> Split:
    """Hold out every treated cell of whole contexts.

    Parameters
    ----------
    adata, perturbation_key, control, context_keys, separator, seed
        As in :func:`hold_out_pairs`.
    contexts
        Contexts to hold out: a value, or a tuple of values when there are several context keys.
    fraction
        Fraction of contexts to hold out (at least one) when none are named.
    keep_controls
        Whether the control cells of held-out contexts stay in training. They are in `Split.controls` either way.

    Returns
    -------
    The split. At least one context stays in training.
    """
    screen = Screen(adata, perturbation_key, control, context_keys, separator=separator)
    if not screen.context_keys:
        raise ValueError("hold_out_contexts needs context_keys.")
    treated = sorted({context for _, context in screen.conditions})
    if contexts is not None:
        wanted = {known_context(screen, context) for context in contexts}
    else:
        wanted = set(draw(treated, fraction, seed))
    if not set(treated) - wanted:
        raise ValueError(f"All {len(treated)} contexts with treated cells would be held out: none is left to train on.")
    inside = screen.in_contexts(wanted)
    test = inside & ~screen.is_control
    lost = " with their controls" if not keep_controls else ""
    text = f"{len(wanted)} of {len(treated)} contexts held out{lost}."
    train = ~inside if not keep_controls else ~test
    return screen.make("contexts", text, map(context_name, sorted(wanted)), train=train, test=test)


def hold_out_perturbations(
    adata: AnnData,
    *,
    perturbation_key: str,
    control: str,
    context_keys: Sequence[str] = (),
    perturbations: Iterable[str] | None = None,
    fraction: float = 0.2,
    separator: str | None = "+",
    seed: int = 0,
) -> Split:
    """Hold out single perturbations (components) with every condition that contains them, in all contexts.

    Parameters
    ----------
    adata, perturbation_key, control, context_keys, separator, seed
        As in :func:`hold_out_pairs`.
    perturbations
        Components to hold out.
    fraction
        Fraction of components to hold out (at least one) when none are named.

    Returns
    -------
    The split. Components that occur only together with a held-out one are no longer in training either; this is
    an error when components were drawn, and as asked when they were named.
    """
    screen = Screen(adata, perturbation_key, control, context_keys, separator=separator)
    components = sorted({part for parts in screen.parts.values() for part in parts})
    if perturbations is not None:
        wanted = {known_label(name, components, "perturbation") for name in perturbations}
    else:
        wanted = set(draw(components, fraction, seed))
    test = screen.containing(wanted)
    remaining = {part for parts in screen.parts.values() if not wanted.intersection(parts) for part in parts}
    lost = sorted(set(components) - wanted - remaining)
    if not remaining or (lost and perturbations is None):
        raise ValueError(
            f"Holding out {preview(sorted(wanted))} leaves {len(remaining)} components in training; these are lost as "
            f"well, because they occur only in combination with them: {preview(lost)}. Lower fraction, change seed, "
            "or name the perturbations to hold out."
        )
    text = f"{len(wanted)} of {len(components)} perturbations held out with every condition that contains them."
    return screen.make("perturbations", text, sorted(wanted), train=~test, test=test)


def hold_out_combinations(
    adata: AnnData,
    *,
    perturbation_key: str,
    control: str,
    context_keys: Sequence[str] = (),
    seen: int = 2,
    combinations: Iterable[str] | None = None,
    fraction: float = 0.2,
    separator: str | None = "+",
    seed: int = 0,
) -> Split:
    """Hold out combinations of which `seen` components are seen alone in training.

    Parameters
    ----------
    adata, perturbation_key, control, context_keys, separator, seed
        As in :func:`hold_out_pairs`.
    seen
        Number of components that training contains alone. The other components are taken out of training
        altogether: their other conditions are left out of training and test.
    combinations
        Combinations to hold out, in any order of their components.
    fraction
        Fraction of the combinations to hold out (at least one) when none are named.

    Returns
    -------
    The split. Test cells are those of combinations that have exactly `seen` components alone in training, which with
    `seen` below the number of components may be more combinations than were drawn.
    """
    screen = Screen(adata, perturbation_key, control, context_keys, separator=separator)
    pairs = {label: parts for label, parts in screen.parts.items() if len(parts) > 1}
    singles = {parts[0] for parts in screen.parts.values() if len(parts) == 1}
    if not pairs:
        raise ValueError(f"adata.obs[{perturbation_key!r}] has no combination (separator={separator!r}).")
    if not 0 <= seen <= max(map(len, pairs.values())):
        raise ValueError(f"seen={seen} must be between 0 and {max(map(len, pairs.values()))}.")
    eligible = [label for label, parts in pairs.items() if len(singles.intersection(parts)) >= seen]
    if not eligible:
        raise ValueError(f"No combination has {seen} components that also occur alone.")
    rng = np.random.default_rng(seed)
    if combinations is not None:
        what = f"Combination (with {seen} components that occur alone)"
        order = [known_label(screen.labels.canonical(name), eligible, what) for name in combinations]
        target = len(pairs)
    else:
        order = rng.permutation(np.array(eligible, dtype=object)).tolist()
        target = max(1, round(check_fraction(fraction) * len(pairs)))
    held, gone = combinations_seen(screen.parts, order, seen, target, rng)
    missed = sorted(set(order) - set(held))
    if not held or (combinations is not None and missed):
        raise ValueError(f"These combinations cannot all be held out with seen={seen}: {preview(missed)}.")
    test = np.isin(screen.perturbation, held)
    train = ~(test | screen.containing(gone))
    if not (train & ~screen.is_control).any():
        raise ValueError(
            f"No treated cell would be left to train on: {preview(sorted(gone))} had to go. Lower fraction."
        )
    text = f"{len(held)} of {len(pairs)} combinations held out, {seen} of their components seen alone in training."
    return screen.make("combinations", text, sorted(held), train=train, test=test)


def hold_out_batches(
    adata: AnnData,
    *,
    perturbation_key: str,
    control: str,
    batch_key: str,
    context_keys: Sequence[str] = (),
    batches: Iterable[str] | None = None,
    fraction: float = 0.2,
    keep_controls: bool = True,
    separator: str | None = "+",
    seed: int = 0,
) -> Split:
    """Hold out every treated cell of whole batches (donors, plates, replicates).

    Parameters
    ----------
    adata, perturbation_key, control, context_keys, separator, seed
        As in :func:`hold_out_pairs`.
    batch_key
        Column of `adata.obs` with batches.
    batches
        Batches to hold out.
    fraction
        Fraction of batches to hold out (at least one) when none are named.
    keep_controls
        Whether the control cells of held-out batches stay in training.

    Returns
    -------
    The split. `Split.controls` are those of the held-out conditions' contexts in all batches.
    """
    screen = Screen(adata, perturbation_key, control, context_keys, batch_key, separator)
    assert screen.batch is not None
    known = sorted(set(screen.batch[~screen.is_control]))
    if batches is not None:
        wanted = {known_label(batch, known, "batch") for batch in batches}
    else:
        wanted = set(draw(known, fraction, seed))
    inside = np.isin(screen.batch, list(wanted))
    test = inside & ~screen.is_control
    left = set(screen.perturbation[~inside & ~screen.is_control])
    lost = sorted(set(screen.perturbation[test]) - left)
    if not left or (lost and batches is None):
        raise ValueError(
            f"Holding out {preview(sorted(wanted))} leaves {len(left)} perturbations in training; "
            f"lost: {preview(lost)}."
        )
    text = f"{len(wanted)} of {len(known)} batches held out{'' if keep_controls else ' with their controls'}."
    return screen.make("batches", text, sorted(wanted), train=~test if keep_controls else ~inside, test=test)
