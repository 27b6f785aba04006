"""Strategies of hypothesis: screens, training, requests, words of the command. Most of what they make is right."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from hypothesis import strategies as st
from tests.fuzz.cells import DTYPES, LAYOUTS, Screen
from tests.fuzz.mistakes import MISTAKES

if TYPE_CHECKING:
    from hypothesis.strategies import SearchStrategy


@dataclass(frozen=True)
class Training:
    """Size and training of a model."""

    n_latent: int = 4
    n_states: tuple[int, ...] = (2, 4, 8)
    vae_epochs: int = 1
    generator_epochs: int = 1
    validation_size: float | None = None
    train_size: float = 1.0
    batch_size: int = 128
    plan: tuple[tuple[str, Any], ...] = ()
    seed: int = 0


@dataclass(frozen=True)
class Request:
    """What is asked of a model."""

    kind: str = "names"
    """`all`, `names`, `table`, or `contexts` (a table that chooses among them)."""
    wanted: tuple[int, ...] = (0,)
    """Numbers of labels of the screen."""
    pair: bool = False
    """Whether a pair of names that may never have been measured is asked for, too."""
    unseen: bool = False
    n_cells: int | None = None
    in_table: bool = False
    """Whether numbers of cells are a column of the table."""
    n_populations: int | None = None
    n_steps: int | None = None
    sampler: str = "renoise"
    guidance: float = 1.0
    seed: int | None = 0
    target_sum: float = 1e4
    cells: str = "controls"
    """`all`, `controls`, `bare` (without their label), `shuffled`, `more genes`, or `none` (those of training)."""
    transform: bool = False
    output: str | None = None


@dataclass(frozen=True)
class Case:
    """A screen, a training and a request, with at most one thing wrong."""

    screen: Screen = field(default_factory=Screen)
    training: Training = field(default_factory=Training)
    request: Request = field(default_factory=Request)
    more: str = "nothing"
    """What is called beside: `evaluate`, `response`, `describe`, `query`, `train again`."""
    mistake: str | None = None


PLAIN = ("P1", "P2", "P3", "P4", "P5")
ODD = (
    "IL-2", "a b", "Ünï ★", "😀", "1", "1.0", "nan", "None", "True", "Control", "control2", "A'B", 'A"B', "x/y", "[A]",
    "a,b", "A|B", "-", "(x", "ⅷ", "e1", "1e3", "x" * 150, "%s", "{0}", "\\n", "a\tb", "_", "A:B", "a\x1fb", "0", "P1 ",
    "é", "e\u0301",
)  # fmt: skip
WITH_PLUS = ("Na+/K+ inh", "IL-2+", "+", "A+B", "(+)-JQ1")
NOT_IN_TEXT = ["Cs", "Cc"]


def names(plus: bool) -> SearchStrategy[str]:
    """Names of perturbations; `plus`: those with a plus as well."""
    text = st.text(st.characters(exclude_categories=NOT_IN_TEXT, exclude_characters="+"), min_size=1, max_size=6)
    readable = text.filter(lambda name: name.strip() not in ("", "control"))
    kinds = [st.sampled_from(PLAIN), st.sampled_from(PLAIN), st.sampled_from(ODD), readable]
    return st.one_of(*kinds, *([st.sampled_from(WITH_PLUS)] if plus else []))


def values(most: int = 3) -> SearchStrategy[tuple[Any, ...]]:
    """Different values of a column: texts, whole or other numbers, or yes and no."""
    few = {"min_size": 1, "max_size": most, "unique": True}
    readable = st.one_of(st.sampled_from(("C1", "C2", "C3")), names(True))
    return st.one_of(
        st.lists(st.sampled_from(("C1", "C2", "C3")), **few),
        st.lists(readable, **few),
        st.lists(st.integers(-5, 10**6), **few),
        st.lists(st.sampled_from((0.5, 1.0, 0.1, 1e-9, 1e20)), **few),
        st.lists(st.booleans(), **few),
    ).map(tuple)


def maybe(strategy: SearchStrategy[Any], nothing: Any = ()) -> SearchStrategy[Any]:
    """A strategy, two times of three `nothing`."""
    return st.one_of(st.just(nothing), st.just(nothing), strategy)


@st.composite
def screens(draw: st.DrawFn) -> Screen:
    """A screen that can be set up."""
    separator = draw(st.sampled_from(("+", "+", "+", None, "|", " and ", "_")))
    lists = draw(st.sampled_from((False, False, False, True)))
    single = names(lists or separator is None)
    if separator is not None and not lists:
        single = single.filter(lambda name: separator not in name)
    unique_by = str.strip
    some = draw(st.lists(single, min_size=1, max_size=5, unique_by=unique_by))
    n_contexts = draw(st.sampled_from((0, 1, 1, 1, 2, 3)))
    contexts = tuple(draw(values(3 if n_contexts < 2 else 2)) for _ in range(n_contexts))
    odd_keys = draw(maybe(st.permutations(("cell type", "ctx", "Zelltyp ★", "0")), ("cell_type", "line", "patient")))
    features = draw(st.sampled_from((None, None, "dict", "table", "uns")))
    unseen = draw(st.lists(single, max_size=2, unique_by=unique_by)) if features else []
    doses = draw(maybe(st.lists(st.sampled_from((0.1, 1.0, 10.0, 1e-6, 0.5, 3.0, 1e12)), min_size=1, max_size=3)))
    mudata = draw(st.sampled_from((False,) * 9 + (True,)))
    layout = draw(st.sampled_from(LAYOUTS[:-2] * 3 + LAYOUTS))
    dose_as = draw(st.sampled_from(("number", "number", "text", "list")))
    if layout == "backed" and (lists or dose_as == "list" or mudata):
        layout = "csr"  # lists cannot be written to a file
    return Screen(
        n_cells=draw(st.one_of(st.integers(2, 30), st.integers(20, 60), st.integers(20, 60), st.integers(60, 150))),
        n_genes=draw(st.one_of(st.integers(1, 6), st.integers(5, 60))),
        names=tuple(some),
        n_pairs=draw(st.sampled_from((0, 0, 1, 2, 5))),
        separator=separator,
        lists=lists,
        contexts=contexts,
        context_names=tuple(odd_keys),
        batches=draw(maybe(values())),
        doses=tuple(dict.fromkeys(doses)),
        dose_as=dose_as,
        sites=draw(maybe(st.just(("s1", "s2")))),
        ages=draw(maybe(st.sampled_from(((30.0,), (1.0, 2.0), (0.0, 1e9))))),
        features=features,
        n_features=draw(st.integers(1, 4)),
        equal_features=draw(st.sampled_from((False, False, False, True))),
        unseen=tuple(name for name in unseen if name.strip() not in {seen.strip() for seen in some}),
        match=draw(maybe(st.lists(st.integers(0, 5), max_size=3).map(tuple), None)),
        design=draw(st.sampled_from(("balanced", "balanced", "random", "thin"))),
        level=draw(st.sampled_from(("ordinary", "ordinary", "ordinary", "sparse", "large", "equal"))),
        layout=layout,
        dtype=draw(st.sampled_from(DTYPES)),
        in_layer=draw(st.sampled_from((False, False, True))),
        column=draw(st.sampled_from(("category", "category", "object", "string", "unused"))),
        mudata=mudata,
        seed=draw(st.integers(0, 2**32 - 1)),
    )


PLANS = (
    (), (), (), (),
    (("objective", "mmd+mse"),), (("lr", 1.0),), (("lr", 10.0),), (("n_cells", 2),), (("n_populations", 1),),
    (("n_draws", 3),),
)  # fmt: skip


@st.composite
def trainings(draw: st.DrawFn) -> Training:
    """A short training of a small model."""
    return Training(
        n_latent=draw(st.sampled_from((4, 4, 2, 1, 8))),
        n_states=draw(st.sampled_from(((2, 4, 8), (2,), (), ()))),
        vae_epochs=draw(st.sampled_from((1, 1, 2, 0))),
        generator_epochs=draw(st.sampled_from((1,) * 7 + (2, 2, 0))),
        validation_size=draw(st.sampled_from((None, None, None, 0.0, 0.3, 0.9))),
        train_size=draw(st.sampled_from((1.0, 1.0, 1.0, 0.7))),
        batch_size=draw(st.sampled_from((128, 128, 16, 1))),
        plan=draw(st.sampled_from(PLANS)),
        seed=draw(st.integers(0, 2**32 - 1)),
    )


@st.composite
def requests(draw: st.DrawFn) -> Request:
    """A request that can be answered."""
    return Request(
        kind=draw(st.sampled_from(("names", "names", "all", "table", "contexts"))),
        wanted=tuple(draw(st.lists(st.integers(0, 9), min_size=1, max_size=3))),
        pair=draw(st.sampled_from((False, False, True))),
        unseen=draw(st.booleans()),
        n_cells=draw(st.sampled_from((None, 1, 3, 10, 40))),
        in_table=draw(st.booleans()),
        n_populations=draw(st.sampled_from((None, None, 1, 3))),
        n_steps=draw(st.sampled_from((None, None, 1, 3))),
        sampler=draw(st.sampled_from(("renoise", "renoise", "ddim", "dpm++"))),
        guidance=draw(st.sampled_from((1.0, 1.0, 0.0, 2.0))),
        seed=draw(st.sampled_from((0, 7, None))),
        target_sum=draw(st.sampled_from((1e4, 1e4, 1.0, 1e6))),
        cells=draw(st.sampled_from(("controls", "controls", "all", "bare", "shuffled", "more genes", "none"))),
        transform=draw(st.sampled_from((False, False, True))),
        output=draw(st.sampled_from((None,) * 6 + (".h5ad", ".zarr"))),
    )


MORE = ("nothing",) * 5 + ("evaluate", "response", "describe", "query", "train again")


def cases() -> SearchStrategy[Case]:
    """A case; one in four has a mistake."""
    right = st.builds(Case, screens(), trainings(), requests(), st.sampled_from(MORE), st.none())
    wrong = st.builds(Case, screens(), trainings(), requests(), st.just("nothing"), st.sampled_from(sorted(MISTAKES)))
    return st.one_of(right, right, right, wrong)
