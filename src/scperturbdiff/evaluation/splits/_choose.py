"""Draw what to hold out, and look up what was named."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeVar

import numpy as np

from scperturbdiff.data import context_name, did_you_mean, preview, value_text

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Mapping, Sequence

    from scperturbdiff.evaluation.splits._split import Context, Screen


T = TypeVar("T")


def check_fraction(fraction: float) -> float:
    """Raise a `ValueError` unless `fraction` lies strictly between 0 and 1."""
    if not 0 < fraction < 1:
        raise ValueError(f"fraction={fraction} must lie between 0 and 1, both excluded.")
    return fraction


def draw(names: Sequence[T], fraction: float, seed: int) -> list[T]:
    """`fraction` of `names`, rounded, but at least one and never all."""
    size = round(check_fraction(fraction) * len(names))
    if len(names) < 2:
        raise ValueError(f"Nothing would be left to train on: there is only {preview(names)} to draw from.")
    chosen = np.random.default_rng(seed).permutation(len(names))[: min(max(1, size), len(names) - 1)]
    return [names[i] for i in sorted(chosen)]


def draw_pairs(conditions: Collection[tuple[str, Context]], fraction: float, seed: int) -> list[tuple[str, Context]]:
    """Draw (perturbation, context) pairs evenly, leaving every perturbation and every context one pair at least."""
    rng = np.random.default_rng(seed)
    perturbations = sorted({perturbation for perturbation, _ in conditions})
    contexts = sorted({context for _, context in conditions})
    row_of = {name: i for i, name in enumerate(perturbations)}
    column_of = {name: i for i, name in enumerate(contexts)}
    present = np.zeros((len(perturbations), len(contexts)), dtype=bool)
    for perturbation, context in conditions:
        present[row_of[perturbation], column_of[context]] = True
    left = present.copy()
    target = max(1, round(check_fraction(fraction) * len(conditions)))
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


def combinations_seen(
    parts: Mapping[str, tuple[str, ...]],
    order: Iterable[str],
    seen: int,
    target: int,
    rng: np.random.Generator,
) -> tuple[list[str], set[str]]:
    """Take combinations in `order` until `target` are held out with exactly `seen` components alone in training.

    Parameters
    ----------
    parts
        Components of every label.
    order
        Combinations to try, one after the other. One that would spoil those taken before is passed over.
    seen
        Number of components that stay alone in training.
    target
        Number of combinations wanted.
    rng
        Chooses which components go.

    Returns
    -------
    Combinations held out, and components that leave training altogether.
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


def known_label(name: object, known: Sequence[str], what: str) -> str:
    """`name` as text, if it is in `known`; else a `ValueError` with the nearest names."""
    if str(name) not in set(known):
        raise ValueError(
            f"{what} {name!r} does not occur among the treated cells.{did_you_mean(name, known)} "
            f"Known: {preview(known, 30)}."
        )
    return str(name)


def known_context(screen: Screen, context: str | Sequence[str]) -> Context:
    """A context as a tuple of text, checked."""
    values = tuple(context) if isinstance(context, (tuple, list)) else (context,)
    if len(values) != len(screen.context_keys):
        raise ValueError(f"Context {context!r} needs one value for each of {preview(screen.context_keys)}.")
    found = tuple(map(value_text, values))
    known = sorted({other for _, other in screen.conditions})
    known_label(context_name(found), [context_name(c) for c in known], "Context")
    return found


def known_pair(screen: Screen, pair: Sequence[str]) -> tuple[str, Context]:
    """A (perturbation, context values ...) tuple, checked to have cells."""
    perturbation, *values = pair
    label = known_label(screen.labels.canonical(perturbation), list(screen.parts), "Perturbation")
    context = known_context(screen, values)
    if (label, context) not in screen.conditions:
        raise ValueError(f"No cell has perturbation {label!r} in context {context_name(context)!r}.")
    return label, context
