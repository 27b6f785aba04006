"""Words of the command `scperturbdiff`: most of them right, the rest wrong in any way."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hypothesis import strategies as st

if TYPE_CHECKING:
    from hypothesis.strategies import SearchStrategy

    Words = tuple[str, ...]
    Options = dict[str, tuple[tuple[Words, ...], tuple[Words, ...]]]

KEYS: Options = {
    "--perturbation-key": ((("perturbation",),), (("no such column",), (), ("",))),
    "--control": ((("control",),), (("no such label",), ("",))),
    "--context-key": ((("cell_type",), ("cell_type", "donor")), (("no such column",), (), ("cell_type", "cell_type"))),
    "--separator": ((("+",), ("none",)), (("",), (), ("r",))),
}
"""Option -> words that are right, and words that are wrong. Words in braces are files, see `test_commands.World`."""
SEED: Options = {"--seed": ((("0",), ("7",)), (("-1",), ("1.5",), ("many",), (str(2**70),)))}
FEATURES: Options = {"--embeddings": ((), (("{features}",), ("{text}",), ("{missing}",), ("{screen}",), ("{empty}",)))}
OPTIONS: dict[str, Options] = {
    "predict": {
        "--perturbations": (
            (("P1",), ("P1", "P2"), ("P1+P2",)),
            (("no such thing",), ("",), ("+",), ("😀", "P1"), (), ("P1+P1",), ('["P1"',)),
        ),
        "--table": ((("{wanted}",),), (("{text}",), ("{missing}",), ("{features}",), ("{screen}",), ("{empty}",))),
        "--n-cells": ((("1",), ("3",)), (("0",), ("-1",), ("1.5",), ("many",), (str(10**30),), ("nan",))),
        "--n-populations": ((("1",), ("2",)), (("0",), ("1.5",), (str(10**13),))),
        "--n-steps": ((("1",), ("3",)), (("0",), (str(2**70),))),
        "--layer": ((("counts",),), (("no such layer",), ("",))),
        **FEATURES,
        **SEED,
    },
    "evaluate": {
        **KEYS,
        "--condition-key": ((("donor",),), (("no such column",), ("perturbation",))),
        "--dose-key": ((), (("no such column",), ("cell_type",), ("perturbation",))),
        "--train": ((("{screen}",),), (("{text}",), ("{missing}",), ("{controls}",), ("{empty}",))),
        "--metrics": ((("energy_distance",), ("pearson_delta", "mse_mean")), (("no such metric",), (), ("",))),
        "--layer-pred": ((("counts",),), (("X",), ("no such layer",))),
        "--layer": ((("counts",),), (("no such layer",),)),
        **SEED,
    },
    "train": {
        **KEYS,
        "--batch-key": ((("donor",),), (("no such column",), ("perturbation",))),
        "--dose-key": ((), (("no such column",), ("cell_type",))),
        "--layer": ((("counts",),), (("no such layer",),)),
        "--max-epochs": ((("1",),), (("0",), ("-3",), ("1.5",))),
        "--accelerator": ((("cpu",),), (("abacus",), ("",))),
        "--checkpoint": ((("{out}/checkpoint",),), (("{text}",), ("{text}/below",))),
        "--resume": ((), ((),)),
        **FEATURES,
        **SEED,
    },
    "convert": {"--allow-pickle": (((),), ())},
    "demo": {"--quick": (((),), ()), **SEED},
}
FILES: dict[str, tuple[Words, ...]] = {
    "predict": (("{model}", "{controls}"), ("{model}", "{controls}"), ("{model}", "{screen}")),
    "evaluate": (("{pred}", "{screen}"),),
    "train": (("{screen}",),),
    "convert": (("{model}",),),
    "demo": ((),),
}
NO_FILES = ("{missing}", "{text}", "{folder}", "{empty}", "{cut}", "", "\udcff", "-", "a\nb", "x" * 300)
OUT = ("{out}/new.h5ad", "{out}/new.zarr")
WRONG_OUT = (
    "{taken}",
    "{out}",
    "{text}/below.h5ad",
    "{out}/new.csv",
    "",
    "{out}/" + "x" * 300 + ".h5ad",
    "{locked}/new.h5ad",
)
NEEDED = {"evaluate": ("--perturbation-key", "--control"), "train": ("--perturbation-key", "--control", "--max-epochs")}
"""Options that a right command has (training without a bound would take minutes)."""


@st.composite
def commands(draw: st.DrawFn) -> Words:
    """Words after `scperturbdiff`."""
    command = draw(st.sampled_from(("predict",) * 6 + ("evaluate", "train", "train", "convert", "demo")))
    wrong = draw(st.integers(0, 3)) == 0 or command == "demo"  # a right demo takes long
    files = list(draw(st.sampled_from(FILES[command])))
    words = _out(draw, command, wrong)
    options = OPTIONS[command]
    chosen = draw(st.lists(st.sampled_from(sorted(options)), max_size=3, unique=True))
    if "--perturbations" in chosen and "--table" in chosen and not wrong:
        chosen.remove("--table")
    where = draw(st.integers(0, len(chosen))) if wrong else -1  # the option that is wrong; else a file or a word
    for i, name in enumerate(dict.fromkeys((*NEEDED.get(command, ()), *chosen))):
        right, not_right = options[name]
        spoilt = wrong and i == where and not_right
        if spoilt or right:
            words += [name, *draw(st.sampled_from(not_right if spoilt else right))]
    if wrong and where == len(chosen):
        if files and draw(st.booleans()):
            files[draw(st.integers(0, len(files) - 1))] = draw(st.sampled_from(NO_FILES))
        else:
            strange = st.one_of(
                st.sampled_from(("--no-such-option", "--", "-h", "--version", "{screen}")), st.text(max_size=5)
            )
            words.insert(draw(st.integers(0, len(words))), draw(strange))
    if draw(st.booleans()):
        words.append("--overwrite")
    return (command, *files, *words)


def _out(draw: st.DrawFn, command: str, wrong: bool) -> list[str]:
    """Where the results go: a file that is not there, mostly."""
    bad = command == "demo" or (wrong and draw(st.integers(0, 3)) == 0)
    right = OUT if command == "predict" else ("{out}/new",)
    blocked = ("{text}", "{text}/below") if command == "demo" else WRONG_OUT
    return ["--out", draw(st.sampled_from(blocked if bad else right))]


def any_words() -> SearchStrategy[Words]:
    """Words without sense."""
    some = st.sampled_from(
        ("predict", "train", "demo", "--help", "--out", "{screen}", "{model}", "--quick", "--version")
    )
    return (
        st.lists(st.one_of(some, st.text(max_size=8)), max_size=5).map(tuple).filter(lambda words: "demo" not in words)
    )
