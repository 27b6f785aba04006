"""Choose what to hold out: what was named, looked up, or a draw."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeVar

import numpy as np

from scperturbdiff.data import context_name, preview
from scperturbdiff.evaluation.splits._split import Screen, Split, known_label

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Mapping, Sequence

    from anndata import AnnData

    from scperturbdiff.evaluation.splits._split import Context


T = TypeVar("T")


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
    how = f"drawn with seed {seed}" if pairs is None else "as listed"
    drawn = _draw_pairs(screen.conditions, fraction, seed) if pairs is None else map(screen.known_pair, pairs)
    chosen = sorted(set(drawn))
    test = np.isin(screen.condition_code, [screen.conditions[pair] for pair in chosen])
    text = f"{len(chosen)} of {len(screen.conditions)} (perturbation, context) pairs held out, {how}."
    names = [f"{perturbation} in {context_name(context)}" for perturbation, context in chosen]
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
    contexts, fraction
        Contexts to hold out, each a value or with several context keys a tuple of values, or what fraction of them (at
        least one) when none are named.
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
    wanted = set(_draw(treated, fraction, seed) if contexts is None else map(screen.known_context, contexts))
    if not set(treated) - wanted:
        raise ValueError(f"All {len(treated)} contexts with treated cells would be held out: none is left to train on.")
    inside = screen.in_contexts(wanted)
    test = inside & ~screen.is_control
    text = f"{len(wanted)} of {len(treated)} contexts held out{'' if keep_controls else ' with their controls'}."
    names = map(context_name, sorted(wanted))
    return screen.make("contexts", text, names, train=~test if keep_controls else ~inside, test=test)


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
    perturbations, fraction
        Components to hold out, or what fraction of them (at least one) when none are named.

    Returns
    -------
    The split. Components that occur only together with a held-out one are no longer in training either; this is
    an error when components were drawn, and as asked when they were named.
    """
    screen = Screen(adata, perturbation_key, control, context_keys, separator=separator)
    components = sorted({part for parts in screen.parts.values() for part in parts})
    wanted = _named_or_drawn(perturbations, components, "perturbation", fraction, seed)
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
    combinations, fraction
        Combinations to hold out, components in any order, or what fraction (at least one) when none are named.

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
        target = max(1, round(_check_fraction(fraction) * len(pairs)))
    held, gone = _combinations_seen(screen.parts, order, seen, target, rng)
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
    batches, fraction, keep_controls
        Batches to hold out, what fraction when none are named, and their controls; as in :func:`hold_out_contexts`.

    Returns
    -------
    The split. `Split.controls` are those of the held-out conditions' contexts in all batches.
    """
    screen = Screen(adata, perturbation_key, control, context_keys, batch_key, separator)
    assert screen.batch is not None
    known = sorted(set(screen.batch[~screen.is_control]))
    wanted = _named_or_drawn(batches, known, "batch", fraction, seed)
    inside = np.isin(screen.batch, list(wanted))
    test = inside & ~screen.is_control
    left = set(screen.perturbation[~inside & ~screen.is_control])
    lost = sorted(set(screen.perturbation[test]) - left)
    if not left or (lost and batches is None):
        found = f"{len(left)} perturbations in training; lost: {preview(lost)}."
        raise ValueError(f"Holding out {preview(sorted(wanted))} leaves {found}")
    text = f"{len(wanted)} of {len(known)} batches held out{'' if keep_controls else ' with their controls'}."
    return screen.make("batches", text, sorted(wanted), train=~test if keep_controls else ~inside, test=test)


def _check_fraction(fraction: float) -> float:
    """Raise a `ValueError` unless `fraction` lies strictly between 0 and 1."""
    if not 0 < fraction < 1:
        raise ValueError(f"fraction={fraction} must lie between 0 and 1, both excluded.")
    return fraction


def _draw(names: Sequence[T], fraction: float, seed: int) -> list[T]:
    """`fraction` of `names`, rounded, but at least one and never all."""
    size = round(_check_fraction(fraction) * len(names))
    if len(names) < 2:
        raise ValueError(f"Nothing would be left to train on: there is only {preview(names)} to draw from.")
    chosen = np.random.default_rng(seed).permutation(len(names))[: min(max(1, size), len(names) - 1)]
    return [names[i] for i in sorted(chosen)]


def _named_or_drawn(
    names: Iterable[str] | None, known: Sequence[str], what: str, fraction: float, seed: int
) -> set[str]:
    return set(_draw(known, fraction, seed)) if names is None else {known_label(name, known, what) for name in names}


def _draw_pairs(conditions: Collection[tuple[str, Context]], fraction: float, seed: int) -> list[tuple[str, Context]]:
    """Draw (perturbation, context) pairs evenly, leaving every perturbation and every context one pair at least."""
    rng = np.random.default_rng(seed)
    perturbations = sorted({perturbation for perturbation, _ in conditions})
    contexts = sorted({context for _, context in conditions})
    present = np.array([[(label, context) in conditions for context in contexts] for label in perturbations])
    left = present.copy()
    target = max(1, round(_check_fraction(fraction) * len(conditions)))
    for number in range(target):
        free = left & (left.sum(axis=1) > 1)[:, None] & (left.sum(axis=0) > 1)
        if not free.any():
            raise ValueError(
                f"fraction={fraction} asks for {target} of {len(conditions)} pairs, but only {number} can be held out "
                "with every perturbation and every context still in training."
            )
        # The emptiest share first, ties at random: an even spread over contexts, then over perturbations.
        share = 1 - left.sum(axis=0) / present.sum(axis=0)
        column = np.where(free.any(axis=0), share + 1e-6 * rng.random(len(contexts)), np.inf).argmin()
        share = 1 - left.sum(axis=1) / present.sum(axis=1)
        row = np.where(free[:, column], share + 1e-6 * rng.random(len(perturbations)), np.inf).argmin()
        left[row, column] = False
    rows, columns = np.nonzero(present & ~left)
    return [(perturbations[i], contexts[j]) for i, j in zip(rows, columns, strict=True)]


def _combinations_seen(
    parts: Mapping[str, tuple[str, ...]], order: Iterable[str], seen: int, target: int, rng: np.random.Generator
) -> tuple[list[str], set[str]]:
    """Take combinations in `order` until `target` are held out with exactly `seen` components alone in training.

    `parts` holds the components of every label; a combination that would spoil those taken before is passed over; `rng`
    chooses which components go. Returns the combinations held out, and the components that leave training altogether.
    """
    singles = {components[0] for components in parts.values() if len(components) == 1}
    chosen: set[str] = set()
    gone: set[str] = set()
    held: list[str] = []
    for label in order:
        if len(held) >= target:
            break
        staying = [part for part in parts[label] if part in singles and part not in gone]
        leave = rng.permutation(np.array(staying, dtype=object))[seen:].tolist()
        now_gone = gone.union(leave, (part for part in parts[label] if part not in singles))
        now_held = [
            other
            for other, components in parts.items()
            if len(components) > 1
            and (other == label or other in chosen or now_gone.intersection(components))
            and len(singles.intersection(components) - now_gone) == seen
        ]
        if label in now_held and chosen <= set(now_held):
            chosen.add(label)
            gone, held = now_gone, now_held
    return held, gone
