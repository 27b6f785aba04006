"""The space of conditions a model was set up with, and how cells and requests are read into it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from scperturbdiff.data._features import FeatureTable, explain_unknown
from scperturbdiff.data._labels import DOSE, PERTURBATION, Labels, parse_doses, scale_dose
from scperturbdiff.data._messages import preview

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray


@dataclass(frozen=True)
class ConditionSpace:
    """Keys, known names and scales of the conditions in a data set.

    Attributes
    ----------
    perturbation_key, control, separator, context_keys, batch_key, dose_key, categorical_keys, continuous_keys
        As given to :meth:`scperturbdiff.PerturbDiff.setup_anndata`.
    control_match_keys
        Keys on which controls should agree, the most important first.
    components, features
        Names of the components of the treated cells, sorted, and features of components, if any were given.
    contexts
        Contexts with treated cells (:meth:`context_labels`), sorted.
    dose_reference, dose_range
        Median positive dose, the origin of the logarithmic scale; smallest and largest dose of each component.
    categories, scales
        Values of each categorical, mean and standard deviation of each continuous covariate.
    """

    perturbation_key: str | None
    control: str | None
    separator: str | None = "+"
    context_keys: tuple[str, ...] = ()
    batch_key: str | None = None
    dose_key: str | None = None
    categorical_keys: tuple[str, ...] = ()
    continuous_keys: tuple[str, ...] = ()
    control_match_keys: tuple[str, ...] = ()
    components: tuple[str, ...] = ()
    contexts: tuple[str, ...] = ()
    features: FeatureTable | None = None
    dose_reference: float = 1.0
    dose_range: Mapping[str, tuple[float, float]] | None = None
    categories: Mapping[str, tuple[str, ...]] | None = None
    scales: Mapping[str, tuple[float, float]] | None = None

    @property
    def labels(self) -> Labels:
        """How perturbations and doses are read."""
        return Labels(str(self.perturbation_key), self.control, self.separator, self.dose_key)

    @property
    def obs_keys(self) -> tuple[str, ...]:
        """Columns of `obs` that tell populations of one perturbation and dose apart."""
        batch = (self.batch_key,) if self.batch_key else ()
        return tuple(dict.fromkeys((*self.context_keys, *self.covariate_keys, *batch)))

    @property
    def covariate_keys(self) -> tuple[str, ...]:
        """Columns of covariates."""
        return (*self.categorical_keys, *self.continuous_keys)

    @property
    def all_components(self) -> tuple[str, ...]:
        """Names with a row in the tables of the network: those seen in training, then those with features only."""
        known = set(self.components)
        extra = () if self.features is None else tuple(n for n in self.features.names if n not in known)
        return self.components + extra

    def feature_matrix(self) -> NDArray[np.float64] | None:
        """Features of :attr:`all_components`, NaN rows where unknown."""
        return None if self.features is None else self.features.rows(self.all_components).astype(np.float64)

    def target_genes(self, genes: Sequence[str] | pd.Index) -> NDArray[np.int64]:
        """Position in `genes` of the gene that each of :attr:`all_components` is named after, -1 where there is none.

        In genetic screens a component is called like the gene that it is aimed at.
        """
        at: NDArray[np.int64] = pd.Index(genes).get_indexer(pd.Index(self.all_components))
        return at.astype(np.int64)

    def with_features(self, table: Any) -> ConditionSpace:
        """The space with the components of another feature table added."""
        parsed = FeatureTable.parse(table)
        if self.features is None:
            raise ValueError(
                "perturbation_embeddings was given, but the model was set up without: the network has not learned to "
                "read features. Pass perturbation_embeddings to setup_anndata and train again."
            )
        return replace(self, features=self.features.extended(parsed))

    def read_labels(self, obs: pd.DataFrame) -> pd.DataFrame:
        """Every cell's :attr:`obs_keys`, perturbation and dose (:meth:`Labels.read`), in a table indexed like `obs`."""
        table = obs[list(self.obs_keys)].copy()
        table[[PERTURBATION, DOSE]] = "" if self.perturbation_key is None else self.labels.read(obs)
        return table

    def is_control(self, labels: pd.DataFrame) -> NDArray[np.bool_]:
        """Which rows of :meth:`read_labels` are controls."""
        return np.ones(len(labels), bool) if self.perturbation_key is None else self.labels.is_control(labels)

    def encode_perturbations(self, table: pd.DataFrame) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
        """Component rows and log-scaled doses, both `(len(table), c)`, -1 and 0 where there is no component.

        A component with neither a learned name nor features raises a `KeyError`.
        """
        known = {name: i for i, name in enumerate(self.all_components)}
        split = [self.labels.components(label) for label in table[PERTURBATION]]
        unknown = sorted({part for parts in split for part in parts if part not in known})
        if unknown:
            raise KeyError(explain_unknown(unknown, self.components, self.features is not None))
        width = max([1, *(len(parts) for parts in split)])
        index, dose = np.full((len(table), width), -1, np.int64), np.zeros((len(table), width))
        for row, (parts, text) in enumerate(zip(split, table[DOSE], strict=True)):
            index[row, : len(parts)] = [known[part] for part in parts]
            if text:
                dose[row, : len(parts)] = scale_dose(np.array(parse_doses(text)), self.dose_reference)
        return index, dose

    def encode_covariates(self, table: pd.DataFrame) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
        """Codes of categorical and standardised values of continuous covariates; unknown values raise."""
        codes = np.zeros((len(table), len(self.categorical_keys)), np.int64)
        for i, key in enumerate(self.categorical_keys):
            values = (self.categories or {})[key]
            codes[:, i] = pd.Index(values).get_indexer(pd.Index(table[key].astype(str)))
            if (codes[:, i] < 0).any():
                new = table.loc[codes[:, i] < 0, key].astype(str).unique()
                raise ValueError(
                    f"Covariate {key!r} has values never seen in training: {preview(new)}. "
                    f"Known: {preview(values)} (of perturbed cells)."
                )
        numbers = np.zeros((len(table), len(self.continuous_keys)))
        for i, key in enumerate(self.continuous_keys):
            mean, deviation = (self.scales or {})[key]
            numbers[:, i] = (read_numbers(table[key], key, "rows") - mean) / deviation
        return codes, numbers

    def context_labels(self, table: pd.DataFrame) -> pd.Series:
        """One text per row that names its context."""
        if not self.context_keys or len(table) == 0:
            return pd.Series("", index=table.index, dtype=object)
        return table[list(self.context_keys)].astype(str).agg("\x1f".join, axis=1)

    def context_codes(self, table: pd.DataFrame) -> NDArray[np.int64]:
        """Number of each row's context among :attr:`contexts`, -1 for one without treated cells in training."""
        asked = pd.Index(self.context_labels(table), dtype=object)
        return pd.Index(self.contexts, dtype=object).get_indexer(asked)

    def training_request(self, populations: pd.DataFrame | None) -> pd.DataFrame:
        """Every perturbation and dose of the training populations, as a request."""
        if populations is None:
            raise ValueError("The generator was not trained, so there are no training perturbations to predict.")
        shown = populations[["perturbation", "dose"]].drop_duplicates().reset_index(drop=True)
        if len(shown) == 0:
            only = f"obs[{self.perturbation_key!r}] == {self.control!r}"
            raise ValueError(f"The model was trained on controls only ({only}): there is no perturbation to predict.")
        out = pd.DataFrame({str(self.perturbation_key): shown["perturbation"].astype(object)})
        if self.dose_key is not None:
            out[self.dose_key] = shown["dose"].astype(object)
        return out

    def outside_dose_range(self, label: str, dose: str) -> list[str]:
        """Components of a request whose dose lies outside what training measured."""
        if not dose or self.dose_range is None:
            return []
        parts, ranges = self.labels.components(label), self.dose_range
        each = zip(parts, parse_doses(dose), strict=True)
        return [p for p, d in each if p in ranges and not ranges[p][0] <= d <= ranges[p][1]]


def read_numbers(column: pd.Series, key: str, unit: str) -> NDArray[np.float64]:
    """A continuous covariate; raises where it is not a finite number. `unit` is what has one: cells or rows."""
    try:
        values = np.asarray(column.astype(float), np.float64)
    except (TypeError, ValueError):
        raise ValueError(f"continuous covariate {key!r} is not numeric: {preview(column.unique())}.") from None
    if bad := int((~np.isfinite(values)).sum()):
        raise ValueError(f"continuous covariate {key!r} is NaN or infinite for {bad} {unit}.")
    return values
