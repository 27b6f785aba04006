"""The one reader of what a cell is: perturbation, components, doses, control, context.

A *label* is what a user writes, text or a list of names. Its *components* are the single perturbations in it, without
the control: `A+ctrl` is `A`. A *name* is the one text for a set of components; read as a label it gives them back.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from scperturbdiff.data._messages import check_text, did_you_mean, preview

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    Context = tuple[str, ...]


PERTURBATION, DOSE = "__perturbation", "__dose"
"""Columns of the tables of this package (the user's own keys may be anything)."""
_NUMBER = r"(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?"
_LISTS = list | tuple | set | frozenset | np.ndarray


@dataclass(frozen=True)
class Labels:
    """How the perturbations of a table are written."""

    key: str
    """Column of the labels."""
    control: str | None
    """Label of control cells; `None` where there is none."""
    separator: str | None = "+"
    """Joins the components of a combination; `None`: no label is a combination. Lists of names are never cut."""
    dose_key: str | None = None
    """Column of doses; `None` without."""

    def __post_init__(self) -> None:
        if self.separator == "":
            raise ValueError("separator must not be empty; None stands for no combinations.")
        if self.control is not None:
            object.__setattr__(self, "control", str(self.control).strip())

    def components(self, label: object) -> tuple[str, ...]:
        """Components in the order in which they are written, empty for controls; empty or repeated ones raise."""
        return self._without_control(self._written(label))

    def _without_control(self, written: Sequence[str]) -> tuple[str, ...]:
        return tuple(part for part in written if part != self.control)

    def _written(self, label: object) -> tuple[str, ...]:
        """What is joined in a label, the control included."""
        text = str(label).strip()
        if not isinstance(label, _LISTS) and text == self.control:
            return (text,)
        parts = tuple(str(part).strip() for part in self._parts(label))
        given = self._without_control(parts)
        if "" in parts or len(set(given)) < len(given):
            what = "an empty" if "" in parts else "a repeated"
            joined = f" or joined by {self.separator!r} (where names hold it, pass separator=None or lists of names)"
            raise ValueError(
                f"obs[{self.key!r}]={label!r} has {what} component. Allowed: {self.control!r} for controls, a name, or "
                f"different names in a list{joined if self.separator else ''}."
            )
        return parts

    def _parts(self, label: object) -> list[Any]:
        if isinstance(label, _LISTS):
            return _in_order(label)
        text = str(label)
        if text.startswith('["'):
            try:
                return list(json.loads(text))
            except json.JSONDecodeError:
                pass
        return [text] if self.separator is None else text.split(self.separator)

    def name(self, components: Sequence[str]) -> str:
        """The one name of components: sorted and joined, or a list in JSON where that would not be read as these."""
        if not components:
            return str(self.control)
        ordered = sorted(components)
        text = (self.separator or "").join(ordered)
        same = [part.strip() for part in self._parts(text)] == ordered and text != self.control
        return text if same else json.dumps(ordered, ensure_ascii=False)

    def canonical(self, label: object) -> str:
        """The one name of a label: `"B+A"`, `"A+B"` and `["A", "B"]` are one perturbation."""
        return self.name(self.components(label))

    def parse(
        self, column: pd.Series, where: str = "obs"
    ) -> tuple[NDArray[np.int64], list[Any], list[tuple[str, ...]]]:
        """Number of each row's label, the different labels, and what is joined in each, the control included."""
        check_not_missing(column, self.key, where)
        try:
            text = _hashable(column)
        except UnicodeEncodeError:  # pandas 3 makes no text of what cannot be written
            check_text(map(str, column.astype(object).unique()), f"{where}[{self.key!r}]")
            raise
        codes, labels = pd.factorize(text.to_numpy(dtype=object))
        return codes, list(labels), [self._written(label) for label in labels]

    def read(self, obs: pd.DataFrame, where: str = "obs") -> pd.DataFrame:
        """Name of the perturbation and text of the doses of every row; components at dose 0 are not there.

        Returns
        -------
        A table indexed like `obs` with :data:`PERTURBATION` (the control label for controls) and :data:`DOSE` (see
        :func:`dose_text`, in the order of the sorted components; empty for controls and without a dose column). Labels
        or doses that are missing or cannot be read raise a `ValueError`.
        """
        codes, _, joined = self.parse(obs[self.key], where)
        if self.dose_key is None:
            names = np.array([self.name(self._without_control(parts)) for parts in joined], dtype=object)[codes]
            return pd.DataFrame({PERTURBATION: names, DOSE: ""}, index=obs.index, dtype=object)
        dose = _hashable(obs[self.dose_key], numbers=True).to_numpy(dtype=object)
        try:
            dose_codes, written = pd.factorize(dose, use_na_sentinel=False)
        except TypeError as error:
            allowed = "a number, text, or a list of numbers"
            raise TypeError(f"obs[{self.dose_key!r}] holds values that are no doses ({error}): {allowed}.") from None
        pairs, number = np.unique(codes * len(written) + dose_codes, return_inverse=True)
        found = [self._condition(joined[pair // len(written)], written[pair % len(written)]) for pair in pairs]
        table = pd.DataFrame(found, columns=[PERTURBATION, DOSE], dtype=object)
        return table.iloc[number.reshape(-1)].set_axis(obs.index)

    def _condition(self, joined: tuple[str, ...], dose: object) -> tuple[str, str]:
        """Name and dose text of what is joined in a label, at a dose as written: one a component or one a part."""
        components = self._without_control(joined)
        given = f"obs[{self.dose_key!r}]={dose!r}"
        try:
            doses = read_doses(dose, self.separator)
            if len(doses) == len(joined) > len(components) > 0:
                doses = tuple(d for part, d in zip(joined, doses, strict=True) if part != self.control)
            doses = match_doses(doses, len(components))
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"obs[{self.dose_key!r}]: cannot read {dose!r} for {self.name(components)!r}: {error}"
            ) from None
        if not components:
            if any(d != 0 and not np.isnan(d) for d in doses):
                raise ValueError(f"{given} for control cells ({self.control!r}): controls must have dose 0 or none.")
            return str(self.control), ""
        if not np.isfinite(doses).all() or min(doses) < 0:
            raise ValueError(f"{given} for {self.name(components)!r}: doses must be finite and not negative.")
        present = sorted((c, d) for c, d in zip(components, doses, strict=True) if d > 0)
        return self.name([c for c, _ in present]), dose_text([d for _, d in present])

    def is_control(self, table: pd.DataFrame) -> NDArray[np.bool_]:
        """Which rows of :meth:`read` are controls."""
        return (table[PERTURBATION] == self.control).to_numpy()

    def control_cells(self, obs: pd.DataFrame) -> NDArray[np.bool_]:
        """Which rows of `obs` are controls; without the dose column, those with the control label."""
        dose = self.dose_key if self.dose_key in obs else None
        plain = Labels(self.key, self.control, self.separator, dose)
        return plain.is_control(plain.read(obs))

    def check_control(self, obs: pd.DataFrame, where: str = "obs") -> None:
        """Raise a `ValueError` unless a label of `obs` is that of controls."""
        _, labels, parts = self.parse(obs[self.key], where)
        if all(map(self._without_control, parts)):
            known = sorted(map(str, labels))
            raise ValueError(
                f"control={self.control!r} is not a value of {where}[{self.key!r}]."
                f"{did_you_mean(self.control, known)} Values: {preview(known, 30)}."
            )


def dose_text(doses: Sequence[float]) -> str:
    """Doses as text, `"0.5+2"`: equal where they agree to 12 digits. The plus joins, whatever the separator is."""
    return "+".join(f"{dose:.12g}".replace("e+", "e") for dose in doses)


def parse_doses(text: str) -> tuple[float, ...]:
    """The doses of :func:`dose_text`."""
    return tuple(map(float, text.split("+"))) if text else ()


def read_doses(dose: object, separator: str | None) -> tuple[float, ...]:
    """Doses as a user writes them: a number, a list, or text like `"1e-6+0.5"`; a `ValueError` where they are none."""
    if isinstance(dose, str):
        return _split_numbers(dose, separator)
    return tuple(_number(d) for d in (dose if isinstance(dose, _LISTS) else (dose,)))


def match_doses(doses: tuple[float, ...], n: int) -> tuple[float, ...]:
    """Doses of `n` components; a single one is that of all. Another number raises a `ValueError`."""
    if len(doses) == 1:
        doses *= max(n, 1)
    if n and len(doses) != n:
        raise ValueError(f"dose {dose_text(doses)!r} has {len(doses)} values for {n} components.")
    return doses


def _split_numbers(text: str, separator: str | None) -> tuple[float, ...]:
    """Numbers joined by the separator or by a plus, which may be part of a number (`1e-6`) as well."""
    for joiner in map(re.escape, dict.fromkeys((separator or "+", "+"))):
        if re.fullmatch(rf"(?:\s*{_NUMBER}\s*{joiner})*\s*{_NUMBER}\s*", text):
            return tuple(map(float, re.findall(rf"({_NUMBER})\s*(?:{joiner}|$)", text)))
    return (float(text),)


def _number(value: Any) -> float:
    """A number; one of single precision as it is written, so that 0.1 is 0.1."""
    if value is None or value is pd.NA:
        return float("nan")
    return float(str(value)) if isinstance(value, np.float32 | np.float16) else float(value)


def value_text(value: Any) -> str:
    """A value as text; numbers that are not whole with up to 12 digits."""
    return f"{_number(value):.12g}" if isinstance(value, float | np.floating) else str(value)


def scale_dose(dose: NDArray[np.floating], reference: float) -> NDArray[np.float64]:
    """Doses on the scale the model uses: `log2(dose / reference)`, 0 at the reference (the median training dose)."""
    return np.log2(np.maximum(np.asarray(dose, np.float64), 1e-12) / reference)


def read_text(obs: pd.DataFrame, keys: Sequence[str], where: str = "obs") -> pd.DataFrame:
    """Columns of `obs` as text, rows numbered; numbers with up to 12 digits. Missing values raise a `ValueError`."""
    out = pd.DataFrame(index=pd.RangeIndex(len(obs)))
    for key in keys:
        check_not_missing(obs[key], key, where)
        codes, values = pd.factorize(obs[key])
        out[key] = np.array([value_text(value) for value in np.asarray(values)], dtype=object)[codes]
    return out


def read_contexts(obs: pd.DataFrame, keys: Sequence[str], where: str = "obs") -> tuple[NDArray[np.intp], list[Context]]:
    """Number of every row's context, and the contexts as tuples of text, sorted; one context without `keys`."""
    if not keys:
        return np.zeros(len(obs), dtype=np.intp), [()]
    table = read_text(obs, keys, where)
    codes: NDArray[np.intp] = table.groupby(list(table), sort=True).ngroup().to_numpy().astype(np.intp)
    return codes, sorted(table.drop_duplicates().itertuples(index=False, name=None))


def context_name(context: Sequence[str]) -> str:
    """A context of one or more columns as text."""
    return ", ".join(context)


def check_not_missing(column: pd.Series, key: str, where: str = "obs") -> None:
    """Raise a `ValueError` that counts the missing values of a column of `obs`."""
    if n := int(column.isna().sum()):
        raise ValueError(f"{where}[{key!r}] is missing (NaN) for {n} cells. Fill it in or remove those cells.")


def _in_order(values: Any) -> list[Any]:
    return sorted(values) if isinstance(values, set | frozenset) else list(values)


def _hashable(column: pd.Series, numbers: bool = False) -> pd.Series:
    """Lists as tuples, all else as text (`numbers`: as it is)."""
    if numbers and column.dtype != object:
        return column.astype(str).astype(float) if column.dtype in (np.float32, np.float16) else column
    if column.dtype != object or not column.map(lambda value: isinstance(value, _LISTS)).any():
        return column if numbers else column.astype(str)
    single = (lambda value: value) if numbers else str
    return column.map(lambda value: tuple(_in_order(value)) if isinstance(value, _LISTS) else single(value))
