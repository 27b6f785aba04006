"""What all baselines share: fitting means, choosing control cells, sampling counts."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any, NamedTuple, Self

import numpy as np
import pandas as pd
from scipy import sparse

from scperturbdiff.data import (
    CONTROL_CELL,
    DOSE,
    N_CELLS,
    PERTURBATION,
    POPULATION,
    Labels,
    assemble_cells,
    cells_wanted,
    check_cells,
    check_counts,
    check_obs_keys,
    check_unique_names,
    choose_controls,
    context_name,
    dose_text,
    log_normalize,
    parse_doses,
    preview,
    read_contexts,
    read_genes,
)
from scperturbdiff.evaluation.baselines import _means as means
from scperturbdiff.seeds import derive_seed, resolve_seed

if TYPE_CHECKING:
    from collections.abc import Sequence

    from anndata import AnnData
    from numpy.typing import NDArray

    from scperturbdiff.evaluation.baselines._means import Context, Doses, Floats


class Change(NamedTuple):
    """A predicted change of mean expression, shape `(n_genes,)`."""

    values: Floats
    fold: bool = False
    """Whether `values` are natural log fold changes of mean expression or shifts of its log-normalised mean."""


class Request(NamedTuple):
    """What is asked for: a condition and the log-normalised mean profile of its controls."""

    context: Context
    label: str
    """The one name of the perturbation; see :meth:`scperturbdiff.data.Labels.name`."""
    components: tuple[str, ...]
    """Sorted."""
    doses: Doses
    profile: Floats


class Baseline(ABC):
    """A rule that predicts populations of cells from training means; subclasses say how expression changes.

    Sampling of counts is the same for all of them. The rule gives, per gene, a shift of the mean log-normalised
    expression or a fold change of mean expression. It is turned into the share each gene should have of a cell's
    counts (shares add up to 1). Counts of the chosen control cells are then thinned (genes that go down) or gain
    Poisson counts in proportion to the cell's library size (genes that go up): a gene that does not change keeps its
    counts, and a cell keeps, on average, the library size of its control cell.
    """

    profiles_: means.Profiles
    labels_: Labels
    genes_: pd.Index

    def fit(
        self,
        adata: AnnData,
        *,
        perturbation_key: str,
        control: str,
        context_keys: Sequence[str] = (),
        layer: str | None = None,
        batch_key: str | None = None,
        dose_key: str | None = None,
        separator: str | None = "+",
    ) -> Self:
        """Average the training cells.

        Parameters
        ----------
        adata
            Training cells with raw counts; read in blocks of rows, never changed.
        perturbation_key, control
            Column of `adata.obs` with perturbations, and its label for control cells.
        context_keys
            Columns of `adata.obs` that make the context. None: all cells are of one context, and the rules that learn
            from other contexts use that one.
        layer
            Layer with counts; `None` for X. Also read by :meth:`predict`.
        batch_key
            Column that predicted cells take over from their control cell. It plays no other part.
        dose_key
            Column with doses, as in :meth:`scperturbdiff.PerturbDiff.setup_anndata`. Means are then taken per dose, and
            a prediction uses the nearest measured dose on the logarithmic scale. `None`: over all doses.
        separator
            Joins the names of a combination, whose order does not matter; `None`: no label is one.

        Raises
        ------
        KeyError
            For a column or layer that does not exist.
        ValueError
            If X is not counts, the control label is absent, or a context has treated cells but no controls.
        """
        context_keys = (context_keys,) if isinstance(context_keys, str) else tuple(context_keys)
        check_cells(adata)
        check_unique_names(adata)
        check_obs_keys(adata, batch_key=batch_key)
        self.labels_ = Labels(perturbation_key, control, separator, dose_key)
        self.profiles_ = means.read_profiles(adata, self.labels_, context_keys, layer)
        self.genes_ = pd.Index(adata.var_names)
        self.context_keys, self.layer, self.batch_key = context_keys, layer, batch_key
        return self

    def predict(
        self,
        controls: AnnData,
        perturbations: Sequence[str] | pd.DataFrame,
        *,
        n_cells: int | None = None,
        seed: int | None = None,
    ) -> AnnData:
        """Predict cells of every perturbation in every context of the controls.

        Parameters
        ----------
        controls
            Control cells with raw counts in `layer`. If `obs` has the perturbation column, only rows with the control
            label are used; without the column all rows are controls. Genes are matched by name.
        perturbations
            Labels, or a DataFrame with one row per wanted perturbation: a column named like `perturbation_key`, with
            `dose_key` also one of doses, and as wanted `n_cells`. Its other columns are copied to the predicted cells
            and change nothing. What is asked for again is drawn again, and numbered in ``obs["population"]``.
        n_cells
            Cells per context and perturbation. Default: each control cell of the context once; fewer are a random part.
        seed
            Seed of the cells and counts. A condition's cells do not depend on what else is predicted.

        Returns
        -------
        New AnnData, ordered by context, then perturbation: log-normalised `X`, sampled counts in `layers["counts"]`;
        `obs` has the columns of perturbation, contexts, batch and dose, `control_cell` and `population`.

        Raises
        ------
        ValueError
            For perturbations the rule knows nothing about (the message has the nearest names), missing genes, no
            control cell, counts that are not counts.
        """
        check_cells(controls, "controls")
        wanted = self._read_request(perturbations, n_cells)
        rows = self._control_rows(controls)
        seed = resolve_seed(seed)
        code, contexts = read_contexts(controls.obs.iloc[rows], self.context_keys)
        repeats = wanted.groupby([PERTURBATION, DOSE], sort=False).cumcount()
        counts, tables = [], []
        for number, context in enumerate(contexts):
            of_context = rows[code == number]
            cells = read_genes(controls, self.genes_, self.layer, of_context, "controls")
            check_counts(cells, f"the counts of the controls of context {context_name(context)!r}")
            obs = controls.obs.iloc[of_context]
            profile = means.mean_rows(log_normalize(cells, means.TARGET_SUM))
            for repeat, (_, row) in zip(repeats, wanted.iterrows(), strict=True):
                request = self._request(context, row[PERTURBATION], row[DOSE], profile)
                again = [repeat] if repeat else []  # other cells than before
                rng = np.random.default_rng(derive_seed(seed, *context, request.label, row[DOSE], *again))
                drawn = np.sort(choose_controls(cells.shape[0], row[N_CELLS] or cells.shape[0], rng))
                counts.append(self._sample(cells, drawn, request, rng))
                tables.append(self._annotate(obs.iloc[drawn], row["columns"], repeat))
        matrix, obs = sparse.vstack(counts, format="csr"), pd.concat(tables, ignore_index=True)
        made_by = {"baseline": type(self).__name__, "seed": seed}
        return assemble_cells(matrix, obs, pd.DataFrame(index=self.genes_), made_by=made_by)

    def can_predict(self, perturbation: str, context: Sequence[str] = ()) -> bool:
        """Whether the rule has training cells to go by for this label in this context (at any dose)."""
        return self.why_not(perturbation, context) is None

    def why_not(self, perturbation: str, context: Sequence[str] = ()) -> str | None:
        """Why the rule cannot predict this label in this context at any dose; `None` where it can."""
        self._check_fitted()
        near = self.profiles_.controls.get(tuple(context), next(iter(self.profiles_.controls.values())))
        label = self.labels_.canonical(perturbation)
        doses = "" if self.labels_.dose_key is None else dose_text([1.0] * len(self.labels_.components(label)))
        try:
            self._change(self._request(tuple(context), label, doses, self.profiles_.log_means[near]))
        except ValueError as error:
            return str(error)
        return None

    def _request(self, context: Context, label: str, doses: str, profile: Floats) -> Request:
        return Request(context, label, self.labels_.components(label), parse_doses(doses), profile)

    @abstractmethod
    def _change(self, request: Request) -> Change | None:
        """The predicted change; `None` for none. Raises a `ValueError` where the rule has nothing to go by."""

    def _sample(
        self, cells: sparse.csr_matrix, drawn: NDArray[np.intp], request: Request, rng: np.random.Generator
    ) -> sparse.csr_matrix:
        change = self._change(request)
        if change is None:
            return cells[drawn]
        before = means.mean_share(cells)
        if change.fold:
            after = np.maximum((before * means.TARGET_SUM + means.PSEUDO) * np.exp(change.values) - means.PSEUDO, 0.0)
            after /= after.sum()
        else:
            after = means.shares_for_log_means(cells, request.profile + change.values, rng)
        return means.resample(cells[drawn], before, after, rng)

    def _check_fitted(self) -> None:
        if not hasattr(self, "profiles_"):
            raise RuntimeError(f"{type(self).__name__} is not fitted: call fit(adata, ...) first.")

    def _read_request(self, perturbations: Sequence[str] | pd.DataFrame, n_cells: int | None) -> pd.DataFrame:
        """One row per wanted condition: its name, its doses, `n_cells` (0: all) and `columns` (for obs)."""
        self._check_fitted()
        key, dose_key = self.labels_.key, self.labels_.dose_key
        if isinstance(perturbations, str):
            perturbations = [perturbations]
        if not isinstance(perturbations, pd.DataFrame):
            perturbations = pd.DataFrame({key: pd.Series(list(perturbations), dtype=object)})
        needed = [name for name in (key, dose_key) if name is not None]
        absent = [name for name in needed if name not in perturbations]
        if absent or not len(perturbations):
            raise ValueError(
                f"perturbations must have at least one row and the columns {preview(needed)}; "
                f"missing: {preview(absent)}. With doses, pass a DataFrame."
            )
        table = self.labels_.read(perturbations)
        if self.labels_.is_control(table).any():
            raise ValueError(
                f"perturbations asks for {self.labels_.control!r}, the control (a dose of 0 is that, too): controls "
                "are given, not predicted."
            )
        table[N_CELLS] = [cells_wanted(n, 0) for n in perturbations.get(N_CELLS, [n_cells] * len(table))]
        columns = perturbations.drop(columns=N_CELLS, errors="ignore").rename(columns=str)
        for name, read in zip(needed, (PERTURBATION, DOSE), strict=False):  # lists cannot be written to a file
            is_list = columns[name].map(lambda v: isinstance(v, list | tuple | set))
            columns[name] = columns[name].where(~is_list, table[read])
        table["columns"] = pd.Series(columns.to_dict("records"), index=table.index, dtype=object)
        return table

    def _control_rows(self, controls: AnnData) -> NDArray[np.intp]:
        check_obs_keys(controls, "controls", context_keys=self.context_keys, batch_key=self.batch_key)
        rows = np.arange(controls.n_obs)
        if self.labels_.key in controls.obs:
            rows = np.flatnonzero(self.labels_.control_cells(controls.obs))
        if not rows.size:
            raise ValueError(
                f"None of the {controls.n_obs} cells to predict from is a control cell "
                f"(obs[{self.labels_.key!r}] == {self.labels_.control!r})."
            )
        return rows

    def _annotate(self, obs: pd.DataFrame, columns: dict[str, Any], repeat: int) -> pd.DataFrame:
        kept = [key for key in (*self.context_keys, self.batch_key) if key is not None]
        made = {**columns, **{key: obs[key].astype(object).to_numpy() for key in kept}}
        made |= {CONTROL_CELL: obs.index.to_numpy(dtype=object), POPULATION: str(repeat)}
        order = dict.fromkeys([self.labels_.key, *kept, *made])
        return pd.DataFrame({name: made[name] for name in order}, index=obs.index)
