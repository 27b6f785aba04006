"""What is asked for: populations asked for again, look-alike contexts, few controls, odd names of keys."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from tests.helpers import FEW_STEPS, SETUP, TINY, assert_same_cells

from scperturbdiff import PerturbDiff, baselines, datasets, summarize_populations

if TYPE_CHECKING:
    from anndata import AnnData


@pytest.fixture
def controls(screen: AnnData) -> AnnData:
    return screen[(screen.obs["perturbation"] == "control").to_numpy()].copy()


def predict(model: PerturbDiff, controls: AnnData, wanted: Any, **options: Any) -> AnnData:
    return model.predict(controls, wanted, **{"seed": 0, "progress": False, **options})


def of(cells: AnnData, *populations: int) -> AnnData:
    """Some of the populations, with what names and numbers of cells say of the others taken out."""
    out = cells[cells.obs["population"].isin([str(number) for number in populations]).to_numpy()].copy()
    out.obs_names = [f"predicted-{i}" for i in range(out.n_obs)]
    out.obs["population"] = out.obs["population"].astype(str).astype("category")
    return out


@pytest.mark.parametrize("n_populations", [None, 1, 2])
def test_what_is_asked_for_again_is_drawn_again(
    trained_model: PerturbDiff, controls: AnnData, n_populations: int | None
) -> None:
    options = {"n_populations": n_populations}
    once = predict(trained_model, controls, ["P01"], **options)
    twice = predict(trained_model, controls, ["P01", "P02", "P01 "], **options)
    n = n_populations or 1
    of_first = twice[(twice.obs["perturbation"].str.strip() == "P01").to_numpy()].copy()
    assert sorted(of_first.obs["population"].unique()) == [str(i) for i in range(2 * n)]
    first, second = of(of_first, *range(n)), of(of_first, *range(n, 2 * n))
    assert_same_cells(first, once)
    assert first.n_obs == second.n_obs and (first.layers["counts"] != second.layers["counts"]).nnz > 0
    if n_populations:  # further draws, and no others
        more = predict(trained_model, controls, ["P01"], n_populations=2 * n)
        np.testing.assert_array_equal(second.X.toarray(), of(more, *range(n, 2 * n)).X.toarray())


def test_another_context_or_batch_is_not_the_same_again(trained_model: PerturbDiff, controls: AnnData) -> None:
    wanted = pd.DataFrame({"perturbation": ["P01"] * 3, "cell_type": ["C1", "C2", "C1"]})
    cells = predict(trained_model, controls, wanted, n_cells=4)
    drawn = cells.obs.groupby(["cell_type", "donor"], observed=True)["population"].nunique()
    assert drawn["C1"].tolist() == [2, 2] and drawn["C2"].tolist() == [1, 1]


def test_simple_rules_draw_again_too(screen: AnnData, controls: AnnData) -> None:
    rule = baselines.PerturbationMeanShift().fit(
        screen, perturbation_key="perturbation", control="control", context_keys=["cell_type"]
    )
    once, twice = (rule.predict(controls, names, seed=0) for names in (["P01"], ["P01", "P01"]))
    first, second = of(twice, 0), of(twice, 1)
    np.testing.assert_array_equal(first.X.toarray(), once.X.toarray())
    assert first.n_obs == second.n_obs and (first.layers["counts"] != second.layers["counts"]).nnz > 0


def test_summaries_want_the_same_draws_of_all(trained_model: PerturbDiff, controls: AnnData) -> None:
    both = predict(trained_model, controls, ["P01", "P02", "P01"], n_populations=2)
    with pytest.raises(ValueError, match=r"3 conditions do not have all of the 4 draws.*'P02 / C1'"):
        summarize_populations(both, controls)
    four = summarize_populations(predict(trained_model, controls, ["P01"], n_populations=4), controls)
    again = summarize_populations(predict(trained_model, controls, ["P01", "P01"], n_populations=2), controls)
    pd.testing.assert_frame_equal(four.genes, again.genes)
    pd.testing.assert_frame_equal(four.conditions, again.conditions)


@pytest.mark.parametrize("name", ["c1", "C1 "])
def test_a_context_that_looks_like_a_known_one_is_told(
    trained_model: PerturbDiff, controls: AnnData, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    cells = controls[(controls.obs["cell_type"] == "C1").to_numpy()].copy()
    with caplog.at_level("WARNING"):
        predict(trained_model, cells, ["P01"], n_cells=2)
        assert "contexts are new" not in caplog.text
        cells.obs["cell_type"] = name
        predict(trained_model, cells, ["P01"], n_cells=2)
    assert (
        f"1 contexts are new to the model but for case, spaces or the form of a number: '{name} (known: C1)'"
        in caplog.text
    )


def test_few_controls_are_told_and_kept(
    trained_model: PerturbDiff, controls: AnnData, caplog: pytest.LogCaptureFixture
) -> None:
    place = (controls.obs["cell_type"] == "C1") & (controls.obs["donor"] == "D2")
    few = controls[np.setdiff1d(np.arange(controls.n_obs), np.flatnonzero(place)[1:])].copy()
    with caplog.at_level("WARNING"):
        cells = predict(trained_model, few, ["P01"])
    assert "1 groups have fewer than 20 control cells" in caplog.text and "'C1 / D2'" in caplog.text
    assert cells.uns["scperturbdiff"]["few_controls"] == ["C1 / D2"]
    assert predict(trained_model, controls, ["P01"]).uns["scperturbdiff"]["few_controls"] == []


def test_keys_called_gene_are_kept(screen: AnnData) -> None:
    adata = screen.copy()
    adata.obs = adata.obs.rename(columns={"perturbation": "gene"})
    PerturbDiff.setup_anndata(adata, "gene", "control", context_keys="cell_type")
    model = PerturbDiff(adata, **TINY)
    model.train(**FEW_STEPS)
    table = model.response(perturbations=["P01"], n_cells=2, progress=False)
    assert set(table["gene"]) == {"P01"} and list(table["measured_gene"].unique()) == list(adata.var_names)
    drawn = model.predict(perturbations=["P01"], n_populations=2, progress=False)
    genes = summarize_populations(drawn, adata).genes
    assert set(genes["gene"]) == {"P01"} and genes["measured_gene"].nunique() == adata.n_vars


def test_dates_of_control_cells_are_refused(trained_model: PerturbDiff, controls: AnnData) -> None:
    controls.obs["donor"] = pd.to_datetime("2024-01-01")
    with pytest.raises(ValueError, match=r"obs\['donor'\] holds values of kind 'datetime64'"):
        predict(trained_model, controls, ["P01"])


def test_names_of_control_cells_that_no_file_can_hold(trained_model: PerturbDiff, controls: AnnData) -> None:
    bad = ad.AnnData(controls.X, obs=controls.obs.set_axis(["a\x00", *controls.obs_names[1:]]), var=controls.var)
    with pytest.raises(ValueError, match="adata.obs_names has 1 names with NUL"):
        predict(trained_model, bad, ["P01"])


def test_batches_of_whole_numbers_beside_contexts_of_fractions() -> None:
    """A row of numbers would be of one type, and the batch 3 become 3.0, which was never seen."""
    cells = datasets.simulate(2, 2, 20, 10, n_batches=2, seed=0)
    cells.obs["cell_type"] = cells.obs["cell_type"].astype(str).map({"C1": 0.5, "C2": 1.5}).astype(float)
    cells.obs["donor"] = cells.obs["donor"].astype(str).map({"D1": 3, "D2": 4}).astype(int)
    PerturbDiff.setup_anndata(cells, **SETUP)
    model = PerturbDiff(cells, **TINY)
    model.train(**FEW_STEPS)
    pred = model.predict(perturbations=["P01"], n_cells=4, progress=False)
    assert set(pred.obs["donor"].astype(str)) == {"3", "4"}


HOURS = {"categorical_covariate_keys": ["hours"]}, {"continuous_covariate_keys": ["hours"]}


@pytest.mark.parametrize("kind", HOURS)
def test_a_covariate_that_is_asked_for_chooses_controls_that_have_it(
    kind: dict[str, list[str]], caplog: pytest.LogCaptureFixture
) -> None:
    adata = datasets.simulate(2, 3, 30, 40, n_batches=2, seed=0)
    adata.obs["hours"] = np.where(adata.obs["donor"] == "D1", 6.0, 24.0)
    if "categorical_covariate_keys" in kind:
        adata.obs["hours"] = adata.obs["hours"].astype(int).astype(str)
    PerturbDiff.setup_anndata(adata, **{**SETUP, "batch_key": None}, **kind)
    model = PerturbDiff(adata, **TINY)
    model.train(**FEW_STEPS)
    controls = adata[(adata.obs["perturbation"] == "control").to_numpy()].copy()

    def predicted(hours: list[Any], **without: Any) -> AnnData:
        return predict(model, without.get("cells", controls), pd.DataFrame({"perturbation": "P01", "hours": hours}))

    cells = predicted([24])
    of_controls = controls.obs.loc[cells.obs["control_cell"], "hours"]
    assert set(of_controls.astype(float)) == {24.0} and set(cells.obs["hours"].astype(float)) == {24.0}
    assert set(predicted([6, 24]).obs["hours"].astype(float)) == {6.0, 24.0}
    late = controls[(controls.obs["hours"].astype(float) == 24).to_numpy()].copy()
    moved = predicted([6], cells=late)  # no control has it: all are taken as if they had
    assert set(moved.obs["hours"].astype(float)) == {6.0} and moved.obs["control_cell"].nunique() == late.n_obs
    with caplog.at_level("WARNING"):
        assert set(predicted([6, 24], cells=late).obs["hours"].astype(float)) == {6.0, 24.0}
    assert "No control cells for 'P01, 6' with hours" in caplog.text
