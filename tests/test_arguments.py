"""Checks of single arguments."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import numpy as np
import pandas as pd
import pytest

from scperturbdiff.arguments import check_choice, check_flag, check_int, check_number, check_texts, check_type


@pytest.mark.parametrize("value", [1, 5, np.int8(3), np.uint64(2)])
def test_whole_numbers_pass(value: Any) -> None:
    found = check_int("n", value, 1, 5)
    assert type(found) is int and found == value


@pytest.mark.parametrize("value", [0, 6, 2.0, 2.5, np.nan, np.inf, Fraction(1, 2)])
def test_other_numbers_are_refused(value: Any) -> None:
    with pytest.raises(ValueError, match="^n=.* must be a whole number from 1 to 5.$"):
        check_int("n", value, 1, 5)


@pytest.mark.parametrize("value", [True, np.True_, "2", None, [2], np.array([2]), 1j])
def test_what_is_no_number_is_refused(value: Any) -> None:
    with pytest.raises(TypeError, match="^n=.* must be a whole number, 1 or more.$"):
        check_int("n", value, 1)
    with pytest.raises(TypeError, match=r"^n=.* must be a number in \[0, 1\).$"):
        check_number("n", value, "[0, 1)")


def test_intervals_have_ends_or_not() -> None:
    assert check_number("x", 0, "[0, 1)") == 0 and check_number("x", np.float32(0.5), "(0, 1)") == 0.5
    assert check_number("x", np.inf, "(0, inf]") == np.inf and check_number("x", -1e300) == -1e300
    for value, allowed in [(1, "[0, 1)"), (0, "(0, 1]"), (np.nan, "[0, 1]"), (np.inf, "(-inf, inf)")]:
        with pytest.raises(ValueError, match="must be a number in"):
            check_number("x", value, allowed)


def test_choices_flags_and_types() -> None:
    check_choice("x", "a", ("a", "b"))
    check_flag("x", np.False_)
    check_type("x", None, (str, type(None)), "a text or None")
    for value in ("c", 0, None, ["a"], True):
        with pytest.raises(ValueError, match="^x=.* must be one of 'a', 1.$"):
            check_choice("x", value, ("a", 1))
    with pytest.raises(TypeError, match="x=1 must be True or False"):
        check_flag("x", 1)
    with pytest.raises(TypeError, match="x=3 must be a text"):
        check_type("x", 3, str, "a text")


def test_texts_may_be_single() -> None:
    assert check_texts("x", None) == () and check_texts("x", "ab") == ("ab",)
    for value in (["a", "b"], ("a", "b"), pd.Index(["a", "b"]), np.array(["a", "b"]), pd.Series(["a", "b"])):
        assert check_texts("x", value) == ("a", "b")
    for wrong in (3, [3], [None], np.nan, ["a", ["b"]]):
        with pytest.raises(TypeError, match="x=.* must be a text, several texts, or None"):
            check_texts("x", wrong)


def test_long_values_are_cut() -> None:
    with pytest.raises(TypeError) as error:
        check_int("n", np.zeros(10**5), 1)
    assert len(str(error.value)) < 200
