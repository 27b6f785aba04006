"""What the other tests of this folder call a clear error."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from tests.fuzz.errors import UPSTREAM, is_clear, signature, unclear

from scperturbdiff.data import Labels, check_counts, check_not_missing


def raised(call: object) -> Exception:
    with pytest.raises(Exception) as caught:  # noqa: PT011
        call()  # type: ignore[operator]
    return caught.value


def test_an_error_of_the_package_that_names_what_is_wrong_is_clear() -> None:
    error = raised(lambda: check_counts(np.array([[0.5, 1]])))
    assert is_clear(error), unclear(error)
    assert signature(error) == "ValueError < _counts.py:check < _counts.check < _counts.check_counts"
    assert is_clear(raised(lambda: check_not_missing(pd.Series([None]), "donor")))


@pytest.mark.parametrize(
    ("call", "why"),
    [
        (lambda: np.linalg.inv(np.zeros((2, 2))), "LinAlgError is raised by numpy"),
        (lambda: check_counts(None), "AttributeError"),
        (lambda: int("many"), "not by the package"),
        (lambda: [][0], "IndexError"),
    ],
)
def test_what_others_raise_is_not(call: object, why: str) -> None:
    assert not is_clear(raised(call)), why


def test_what_is_raised_below_a_line_of_the_package_by_accident_is_not() -> None:
    error = raised(lambda: Labels("key", "control").name(5))  # type: ignore[arg-type]
    assert isinstance(error, TypeError)
    assert "not raised on purpose" in str(unclear(error))


@pytest.mark.parametrize("message", ["", "something is wrong", "x='tensor([1., 2.])'", "n=" + "9" * 1000])
def test_a_message_names_something_and_is_short(message: str) -> None:
    names: dict[str, object] = {"message": message}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tests.fuzz.errors.PACKAGE", __file__)

        def fail() -> None:
            raise ValueError(names["message"])

        assert not is_clear(raised(fail))
        names["message"] = "n_cells=0 must be positive."
        assert is_clear(raised(fail))


def test_every_error_of_others_that_passes_has_a_reason() -> None:
    for known in UPSTREAM:
        assert known.why and len(known.message) > 10, known
