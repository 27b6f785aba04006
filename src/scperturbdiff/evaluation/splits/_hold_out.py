"""Choose what to hold out: what was named, looked up, or a draw."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from scperturbdiff.arguments import check_int, check_number
from scperturbdiff.data import context_name, preview
from scperturbdiff.evaluation.splits._split import Screen, Split, known_label, pair_name
from scperturbdiff.seeds import check_seed

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Mapping, Sequence

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
    """Hold out (perturbation, context) pairs; of those that are drawn, both are still seen in training.

    Parameters
    ----------
    adata
        Cells of a screen. Only `obs` is read.
    perturbation_key, control
        Column of `adata.obs` with perturbations, and its label for control cells, which always stay in training.
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
        For unknown labels; where drawn pairs would be all of a perturbation or a context, or listed ones all there are.
    """
    screen = Screen(adata, perturbation_key, control, context_keys, separator=separator)
    if not screen.context_keys:
        raise ValueError(
            "hold_out_pairs needs context_keys: without a context there are no pairs to hold out. Whole perturbations "
            "are held out by hold_out_perturbations, combinations by hold_out_combinations."
        )
    if pairs is None:
        screen.check_pairs()
    how = f"drawn with seed {seed}" if pairs is None else "as listed"
    drawn = _draw_pairs(screen.conditions, fraction, seed) if pairs is None else map(screen.known_pair, pairs)
    chosen = sorted(set(drawn))
    if len(chosen) == len(screen.conditions):
        raise ValueError(f"All {len(chosen)} pairs would be held out: none is left to train on.")
    test = np.isin(screen.condition_code, [screen.conditions[pair] for pair in chosen])
    text = f"{len(chosen)} of {len(screen.conditions)} (perturbation, context) pairs held out, {how}."
    return screen.make("pairs", text, map(pair_name, chosen), train=~test, test=test)


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
    """Hold out every treated cell of whole contexts; at least one context stays in training.

    Parameters
    ----------
    adata, perturbation_key, control, context_keys, separator, seed
        As in :func:`hold_out_pairs`.
    contexts, fraction
        Contexts to hold out, each a value or with several context keys a tuple of values, or what fraction of them (at
        least one) when none are named.
    keep_controls
        Whether the control cells of held-out contexts stay in training. They are in `Split.controls` either way.
    """
    screen = Screen(adata, perturbation_key, control, context_keys, separator=separator)
    if not screen.context_keys:
        raise ValueError(
            "hold_out_contexts needs context_keys, the columns of obs that make the context. Without contexts use "
            "hold_out_perturbations or hold_out_batches."
        )
    treated = sorted({context for _, context in screen.conditions})
    wanted = _choose(
        contexts, treated, fraction, seed, screen.known_context, "hold_out_perturbations or hold_out_batches"
    )
    if wanted.issuperset(treated):
        raise ValueError(f"All {len(treated)} contexts with treated cells would be held out: none is left to train on.")
    inside = np.isin(screen.context_code, [screen.contexts.index(context) for context in wanted])
    return screen.make_whole("contexts", map(context_name, sorted(wanted)), len(treated), inside, keep_controls)


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

    Components that occur only together with a held-out one are no longer in training either; this is an error when
    components were drawn, and as asked when they were named.

    Parameters
    ----------
    adata, perturbation_key, control, context_keys, separator, seed
        As in :func:`hold_out_pairs`.
    perturbations, fraction
        Components to hold out, or what fraction of them (at least one) when none are named.
    """
    screen = Screen(adata, perturbation_key, control, context_keys, separator=separator)
    components = screen.components_of(~screen.is_control)
    known = sorted(components)
    wanted = _choose(
        perturbations, known, fraction, seed, partial(known_label, known=known, what="perturbation"),
        "hold_out_contexts or hold_out_batches",
    )  # fmt: skip
    test = screen.containing(wanted)
    remaining = screen.components_of(~test)
    lost = sorted(components - wanted - remaining)
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
    """Hold out combinations of which exactly `seen` components are seen alone in training.

    Parameters
    ----------
    adata, perturbation_key, control, context_keys, separator, seed
        As in :func:`hold_out_pairs`.
    seen
        Number of components that training contains alone. The others are taken out of training altogether: their other
        conditions are left out of training and test. Below the number of components this may hold out more
        combinations than were drawn.
    combinations, fraction
        Combinations to hold out, components in any order, or what fraction (at least one) when none are named.
    """
    screen = Screen(adata, perturbation_key, control, context_keys, separator=separator)
    pairs = {label: parts for label, parts in screen.parts.items() if len(parts) > 1}
    singles = {parts[0] for parts in screen.parts.values() if len(parts) == 1}
    if not pairs:
        raise ValueError(f"adata.obs[{perturbation_key!r}] has no combination (separator={separator!r}).")
    check_int("seen", seen, 0, max(map(len, pairs.values())))
    eligible = [label for label, parts in pairs.items() if len(singles.intersection(parts)) >= seen]
    if not eligible:
        raise ValueError(f"No combination has {seen} components that also occur alone.")
    rng = np.random.default_rng(check_seed(seed))
    if combinations is not None:
        what = f"Combination (with {seen} components that occur alone)"
        named = (combinations,) if isinstance(combinations, str) else combinations
        order = [known_label(screen.labels.canonical(name), eligible, what) for name in named]
        target = len(pairs)
    else:
        order = rng.permutation(np.array(eligible, dtype=object)).tolist()
        target = _share(fraction, len(pairs))
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
        Batches to hold out, what fraction when none are named, and whether their controls stay in training; as in
        :func:`hold_out_contexts`. `Split.controls` are those of the held-out conditions' contexts in all batches.
    """
    screen = Screen(adata, perturbation_key, control, context_keys, batch_key, separator)
    batch = screen.table[batch_key].to_numpy()
    known = sorted(set(batch[~screen.is_control]))
    wanted = _choose(
        batches, known, fraction, seed, partial(known_label, known=known, what="batch"),
        "hold_out_pairs, hold_out_contexts or hold_out_perturbations",
    )  # fmt: skip
    inside = np.isin(batch, list(wanted))
    treated, held = (set(screen.perturbation[cells & ~screen.is_control]) for cells in (~inside, inside))
    if not treated or (held - treated and batches is None):
        found = f"{len(treated)} perturbations in training; lost: {preview(sorted(held - treated))}."
        raise ValueError(f"Holding out {preview(sorted(wanted))} leaves {found}")
    return screen.make_whole("batches", sorted(wanted), len(known), inside, keep_controls)


def _share(fraction: float, n: int) -> int:
    """`fraction` of `n`, rounded, but at least one."""
    check_number("fraction", fraction, "(0, 1)")
    return max(1, round(fraction * n))


def _choose(
    names: Iterable[Any] | None, known: Sequence[T], fraction: float, seed: int, check: Callable[[Any], T], instead: str
) -> set[T]:
    """`names`, each checked; where none are given, `fraction` of `known`, never all. `instead` names other splits."""
    if names is not None:
        return set(map(check, (names,) if isinstance(names, str) else names))
    size = _share(fraction, len(known))
    if len(known) < 2:
        only = preview(context_name(name) if isinstance(name, tuple) else name for name in known)
        raise ValueError(f"Nothing would be left to train on: there is only {only} to draw from. Use {instead}.")
    chosen = np.random.default_rng(check_seed(seed)).permutation(len(known))[: min(size, len(known) - 1)]
    return {known[i] for i in chosen}


def _draw_pairs(conditions: Collection[tuple[str, Context]], fraction: float, seed: int) -> list[tuple[str, Context]]:
    """Draw (perturbation, context) pairs evenly, leaving every perturbation and every context one pair at least."""
    rng = np.random.default_rng(check_seed(seed))
    perturbations = sorted({perturbation for perturbation, _ in conditions})
    contexts = sorted({context for _, context in conditions})
    present = np.array([[(label, context) in conditions for context in contexts] for label in perturbations])
    left = present.copy()
    target = _share(fraction, len(conditions))
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
