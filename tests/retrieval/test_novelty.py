"""How a condition is new, and what it may not use then, against loops over sets."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from scperturbdiff.retrieval import Conditions
from scperturbdiff.retrieval._conditions import novelty_of

PERTURBATION = st.dictionaries(st.integers(0, 3), st.sampled_from([-1.5, 0.0, 2.0]), min_size=1, max_size=2)
CONDITION = st.tuples(PERTURBATION, st.integers(-1, 2))
Condition = tuple[dict[int, float], int]


def table(conditions: list[Condition], width: int, shuffle: np.random.Generator) -> Conditions:
    """Conditions as arrays: components in any order, in any column, the others empty."""
    n = len(conditions)
    component, dose = np.full((n, width), -1), shuffle.normal(size=(n, width))  # doses of nothing mean nothing
    for i, (perturbation, _) in enumerate(conditions):
        places = shuffle.permutation(width)[: len(perturbation)]
        for place, (name, amount) in zip(places, perturbation.items(), strict=True):
            component[i, place], dose[i, place] = name, amount
    context = np.array([context for _, context in conditions], np.int64)
    return Conditions(np.zeros((n, 1)), component.astype(np.int64), dose, context, np.ones(n))


def by_loop(asked: Condition, known: list[Condition]) -> str:
    perturbation, context = asked
    if any(all(name not in other for other, _ in known) for name in perturbation):
        return "perturbation"
    if all(context != other for _, other in known):
        return "context"
    return "seen" if any(asked == other for other in known) else "pair"


@settings(max_examples=200, deadline=None)
@given(
    st.lists(CONDITION, min_size=1, max_size=8),
    st.lists(CONDITION, min_size=1, max_size=8),
    st.integers(2, 3),
    st.integers(2, 3),
    st.integers(0, 2**31),
)
def test_novelties_are_those_of_a_loop(
    asked: list[Condition], known: list[Condition], width: int, other_width: int, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    ours, theirs = table(asked, width, rng), table(known, other_width, rng)
    assert novelty_of(ours, theirs) == [by_loop(condition, known) for condition in asked]
    for i, (perturbation, context) in enumerate(asked):
        same_context = [context == other for _, other in known]
        same = [perturbation == other for other, _ in known]
        shared = [bool(set(perturbation) & set(other)) for other, _ in known]
        one = ours.take(slice(i, i + 1))
        assert one.same_perturbation(theirs)[0].tolist() == same
        assert one.excluded(theirs, "context")[0].tolist() == same_context
        assert one.excluded(theirs, "pair")[0].tolist() == [a and b for a, b in zip(same, same_context, strict=True)]
        assert one.excluded(theirs, "perturbation")[0].tolist() == shared
        for novelty in ("seen", "replicate"):
            assert not one.excluded(theirs, novelty).any()


@settings(max_examples=50, deadline=None)
@given(st.lists(CONDITION, min_size=1, max_size=10), st.integers(0, 2**31))
def test_pair_codes_are_equal_for_equal_conditions(conditions: list[Condition], seed: int) -> None:
    codes = table(conditions, 3, np.random.default_rng(seed)).pair_codes()
    for i, one in enumerate(conditions):
        assert [codes[i] == code for code in codes] == [one == other for other in conditions]


def test_the_novelty_of_a_condition_is_recognised() -> None:
    everything: list[Condition] = [({p: 0.0}, c) for p in range(3) for c in range(4) if (p, c) != (2, 1)]
    asked: list[Condition] = [
        ({0: 0.0}, 0),
        ({2: 0.0}, 1),
        ({0: 0.0}, -1),
        ({9: 0.0}, 0),
        ({9: 0.0}, -1),
        ({0: 1.0}, 0),
    ]
    rng = np.random.default_rng(0)
    found = novelty_of(table(asked, 1, rng), table(everything, 1, rng))
    assert found == ["seen", "pair", "context", "perturbation", "perturbation", "pair"]
