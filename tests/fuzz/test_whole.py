"""Whatever cells and arguments, from set-up to loaded model: a clear error, or predictions in which all holds."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import pytest
from hypothesis import event, given
from tests.fuzz.cells import Screen
from tests.fuzz.errors import message_of, unclear, upstream
from tests.fuzz.mistakes import MISTAKES
from tests.fuzz.profiles import share
from tests.fuzz.quick import quick_constants
from tests.fuzz.run import Refused, Run, ask, listening, run_case, train
from tests.fuzz.strategies import Case, Request, Training, cases

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

LEGITIMATE = (
    ("setup", r"does not read sparse arrays"),
    ("train", r"Training of 0 epochs makes no trained model"),
    ("train", r"lower validation_size"),
    ("predict", r"Only the VAE was trained"),
    ("predict", r"trained on controls only"),
    ("predict", r"values never seen in training"),  # of a covariate that controls alone have
    ("evaluate", r"real cells lack conditions of pred"),
    ("evaluate", r"Principal components need 2 real cells and 2 genes"),
)
"""Where cases without a mistake may be refused, and with what; clearly, all the same."""
FULL = Screen(
    n_cells=20,
    n_pairs=1,
    batches=("B1", "B2"),
    doses=(0.1, 1.0),
    sites=("s1", "s2"),
    ages=(1.0, 2.0),
    features="dict",
    unseen=("new",),
)
PLAIN = Screen(n_cells=12, contexts=(("C1",),))
BRIEF = Training(n_states=())


@pytest.fixture(autouse=True, scope="module")
def quick() -> Iterator[None]:
    with quick_constants():
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fuzz")


def judge(run: Run, refused: Refused | None) -> None:
    """Fail unless a case ended as it should."""
    mistake = None if run.case.mistake is None or run.named is None else MISTAKES[run.case.mistake]
    if refused is None:
        assert mistake is None or not mistake.is_error, f"{run.case.mistake}: accepted"
        return
    message = message_of(refused.error)
    if why := unclear(refused.error):
        raise AssertionError(f"{refused}: {why}") from refused.error
    fits = any(refused.stage.startswith(stage) and re.search(pattern, message) for stage, pattern in LEGITIMATE)
    if mistake is not None:  # a case may be refused for another reason before
        assert fits or upstream(refused.error) or run.named in message, f"{run.named!r} is not named in {message!r}"
        return
    assert fits, f"nothing is wrong with it, but it is refused: {refused}"


@share(1.0)
@given(case=cases())
def test_any_case_is_predicted_or_refused_with_a_reason(case: Case, folder: Path) -> None:
    refused, run = None, Run(case, folder)
    try:
        with listening(run.said):
            ask(run, *train(run))
    except Refused as error:
        refused = error
    event("refused" if refused else "predicted")
    judge(run, refused)


@pytest.mark.parametrize("name", [name for name, mistake in MISTAKES.items() if mistake.stage != "predict"])
def test_every_mistake_before_prediction_is_named(name: str, folder: Path) -> None:
    for screen in (FULL, PLAIN):
        run = Run(Case(screen, BRIEF, Request(kind="table" if screen is FULL else "names"), mistake=name), folder)
        refused = None
        try:
            with listening(run.said):
                train(run)
        except Refused as error:
            refused = error
        if run.named is not None:
            judge(run, refused)
            return
    pytest.fail(f"{name} fits none of the screens")


@pytest.fixture(scope="module")
def trained(folder: Path) -> dict[Screen, tuple]:
    return {screen: train(Run(Case(screen, BRIEF), folder)) for screen in (FULL, PLAIN)}


@pytest.mark.parametrize("name", [name for name, mistake in MISTAKES.items() if mistake.stage == "predict"])
def test_every_mistake_of_a_request_is_named(name: str, folder: Path, trained: dict[Screen, tuple]) -> None:
    for screen, kind in ((FULL, "table"), (FULL, "all"), (FULL, "contexts"), (PLAIN, "names")):
        parts, data, model = trained[screen]
        run = Run(Case(screen, BRIEF, Request(kind=kind, n_cells=3), mistake=name), folder)
        refused, cells = None, parts.adata
        try:
            with listening(run.said):
                ask(run, parts, data, model)
        except Refused as error:
            refused = error
        finally:
            parts.adata = cells
        if run.named is not None:
            judge(run, refused)
            return
    pytest.fail(f"{name} fits none of the requests")


def test_a_case_without_a_mistake_reaches_the_end(folder: Path) -> None:
    """So that what is asserted on the way is asserted."""
    run = run_case(Case(FULL, BRIEF, Request(kind="table"), more="evaluate"), folder)
    assert run.stage == "evaluate"
