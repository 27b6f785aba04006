"""Bad input: every case ends in an error that names what is wrong and what is allowed."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import pytest
import scvi
import torch
from scipy import sparse
from tests.helpers import FEW_STEPS, SETUP, TINY, assert_same_cells

from scperturbdiff import PerturbDiff
from scperturbdiff.data import log_normalize
from scperturbdiff.prediction import summarize_populations
from scperturbdiff.prediction._generate import as_csr

if TYPE_CHECKING:
    from pathlib import Path

    from anndata import AnnData


@pytest.fixture
def adata(screen: AnnData) -> AnnData:
    return screen.copy()


@pytest.fixture(scope="module")
def model(trained_model: PerturbDiff) -> PerturbDiff:
    return trained_model


@pytest.fixture
def controls(screen: AnnData) -> AnnData:
    return screen[screen.obs["perturbation"] == "control"].copy()


def trained(adata: AnnData) -> PerturbDiff:
    PerturbDiff.setup_anndata(adata, **SETUP)
    model = PerturbDiff(adata, **TINY)
    model.train(**FEW_STEPS)
    return model


def setup(adata: AnnData, **arguments: Any) -> None:
    PerturbDiff.setup_anndata(adata, **{**SETUP, **arguments})


def message(error: pytest.ExceptionInfo[Exception]) -> str:
    return str(error.value.args[0])


# ---- keys and labels at setup -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("perturbation_key", "pertubation"),
        ("context_keys", ["celltype"]),
        ("context_keys", "celltype"),
        ("batch_key", "donors"),
        ("control_match_keys", ["cell_typ"]),
        ("categorical_covariate_keys", ["doner"]),
        ("continuous_covariate_keys", ["hidden_facto"]),
        ("dose_key", "hiden_factor"),
    ],
)
def test_a_misspelt_key_is_named_with_the_nearest_and_all_columns(adata: AnnData, argument: str, value: Any) -> None:
    with pytest.raises(KeyError) as error:
        setup(adata, **{argument: value})
    wrong = value if isinstance(value, str) else value[0]
    near = {"p": "perturbation", "c": "cell_type", "d": "donor", "h": "hidden_factor"}[wrong[0]]
    assert argument in message(error) and repr(wrong) in message(error)
    assert f"Did you mean {near!r}" in message(error)
    assert all(column in message(error) for column in adata.obs)


def test_a_missing_layer_is_named(adata: AnnData) -> None:
    adata.layers["counts"] = adata.X.copy()
    with pytest.raises(KeyError, match=r"layer='raw'.*'counts'"):
        setup(adata, layer="raw")


def test_an_absent_control_label_is_named_with_the_labels_there_are(adata: AnnData) -> None:
    with pytest.raises(ValueError, match=r"control='contrl'.*Did you mean 'control'.*'P01'"):
        setup(adata, control="contrl")


def test_a_control_label_is_needed(adata: AnnData) -> None:
    with pytest.raises(ValueError, match="control=... is needed"):
        setup(adata, control=None)


@pytest.mark.parametrize("key", ["perturbation", "cell_type", "donor"])
def test_missing_labels_are_counted(adata: AnnData, key: str) -> None:
    labels = adata.obs[key].astype(object)
    labels.iloc[[1, 4, 30]] = np.nan
    adata.obs[key] = labels
    with pytest.raises(ValueError, match=rf"obs\['{key}'\] is missing \(NaN\) for 3 cells"):
        setup(adata)


# ---- counts -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize(
    ("value", "what"),
    [(0.5, "non-integer"), (-1.0, "negative"), (np.nan, "NaN or infinite"), (np.inf, "NaN or infinite")],
)
@pytest.mark.parametrize("where", ["setup", "predict", "latent"])
def test_values_that_are_no_counts_are_counted(
    model: PerturbDiff, controls: AnnData, value: float, what: str, dense: bool, where: str
) -> None:
    counts = controls.X.toarray().astype(np.float32)
    counts[[0, 2], [3, 5]] = value
    controls.X = counts if dense else sparse.csr_matrix(counts)
    calls = {
        "setup": lambda: setup(controls),
        "predict": lambda: model.predict(controls, ["P01"], progress=False),
        "latent": lambda: model.get_latent_representation(controls),
    }
    with pytest.raises(ValueError, match=rf"X must hold raw counts, but 2 entries are {what}.*layer="):
        calls[where]()


def test_log_normalised_values_are_no_counts(adata: AnnData) -> None:
    adata.X = log_normalize(adata.X)
    with pytest.raises(ValueError, match="non-integer.*log-normalised values are not counts"):
        setup(adata)


def test_counts_that_changed_since_setup_are_no_counts(adata: AnnData) -> None:
    setup(adata)
    model = PerturbDiff(adata, **TINY)
    adata.X = log_normalize(adata.X)
    with pytest.raises(ValueError, match="adata.X must hold raw counts, but .* non-integer"):
        model.train(**FEW_STEPS)
    assert not model.is_trained_


def test_observed_cells_of_a_response_are_checked(model: PerturbDiff, adata: AnnData) -> None:
    adata.X = log_normalize(adata.X)
    with pytest.raises(ValueError, match="real.X must hold raw counts, but .* non-integer"):
        model.response(perturbations=["P01"], real=adata, progress=False)


def test_control_cells_of_a_summary_are_checked(model: PerturbDiff, controls: AnnData) -> None:
    predicted = model.predict(controls, ["P01"], n_populations=2, progress=False)
    controls.X = log_normalize(controls.X)
    with pytest.raises(ValueError, match="control.X must hold raw counts, but .* non-integer"):
        summarize_populations(predicted, controls)


def test_sparse_arrays_are_named_with_the_remedy(adata: AnnData, model: PerturbDiff, controls: AnnData) -> None:
    adata.X = sparse.csr_array(adata.X)
    with pytest.raises(TypeError, match=r"adata.X = scipy.sparse.csr_matrix\(adata.X\)"):
        setup(adata)
    expected = model.predict(controls, ["P01"], seed=0, progress=False)
    controls.X = sparse.csr_array(controls.X)
    assert_same_cells(model.predict(controls, ["P01"], seed=0, progress=False), expected)


def test_predicted_counts_do_not_wrap() -> None:
    found = as_csr(torch.tensor([[0.0, 3e9], [2.0**31, 1.0]])).astype(np.int32)
    assert found.toarray().tolist() == [[0, 2**31 - 128], [2**31 - 128, 1]]


def test_cells_without_counts_are_counted_and_listed(adata: AnnData) -> None:
    counts = adata.X.toarray()
    counts[[3, 7]] = 0
    adata.X = sparse.csr_matrix(counts)
    with pytest.raises(ValueError, match=r"2 cells have no counts at all \(rows 3, 7\)"):
        setup(adata)


def test_an_empty_matrix_is_an_error(adata: AnnData, model: PerturbDiff) -> None:
    with pytest.raises(ValueError, match="empty"):
        setup(adata[:0].copy())
    with pytest.raises(ValueError, match="empty"):
        setup(adata[:, :0].copy())
    with pytest.raises(ValueError, match="empty"):
        model.predict(adata[:0].copy(), ["P01"], progress=False)


# ---- names --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("names", ["var_names", "obs_names"])
def test_repeated_names_are_listed(model: PerturbDiff, controls: AnnData, names: str) -> None:
    repeated = getattr(controls, names).to_numpy().astype(object)
    repeated[1] = repeated[0]
    setattr(controls, names, pd.Index(repeated))
    expected = rf"{names} has 1 duplicated names: '{repeated[0]}'.*{names}_make_unique"
    with pytest.raises(ValueError, match=expected):
        setup(controls)
    with pytest.raises(ValueError, match=expected):
        model.predict(controls, ["P01"], progress=False)


def test_missing_genes_are_counted_and_listed(model: PerturbDiff, controls: AnnData) -> None:
    fewer = controls[:, 2:].copy()
    for call in (
        lambda: model.predict(fewer, ["P01"], progress=False),
        lambda: model.get_latent_representation(fewer),
    ):
        with pytest.raises(ValueError, match="2 of the 100 genes wanted are missing.*'gene0001', 'gene0002'"):
            call()


def test_loading_with_other_genes_is_an_error(model: PerturbDiff, screen: AnnData, tmp_path: Path) -> None:
    model.save(tmp_path / "model")
    permuted = screen[:, ::-1].copy()
    with pytest.raises(ValueError, match="another order.*get_var_names"):
        PerturbDiff.load(tmp_path / "model", adata=permuted)
    with pytest.raises(ValueError, match="1 of the model's 100 genes are missing.*'gene0001'"):
        PerturbDiff.load(tmp_path / "model", adata=screen[:, 1:].copy())


# ---- what is asked for --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["P001", "P01+P001"])
def test_an_unseen_perturbation_is_named_with_the_nearest_and_the_remedy(
    model: PerturbDiff, controls: AnnData, name: str
) -> None:
    with pytest.raises(KeyError) as error:
        model.predict(controls, ["P02", name], progress=False)
    for part in ("'P001'", "nearest known: 'P01'", "'P03'", "perturbation_embeddings"):
        assert part in message(error)


def test_features_for_a_model_without_features_are_an_error(model: PerturbDiff, controls: AnnData) -> None:
    with pytest.raises(ValueError, match="set up without"):
        model.predict(controls, ["new"], perturbation_embeddings={"new": np.ones(3)}, progress=False)


def test_a_context_without_control_cells_to_start_from_is_named(model: PerturbDiff, controls: AnnData) -> None:
    wanted = pd.DataFrame({"perturbation": ["P01"], "cell_type": ["C9"]})
    with pytest.raises(ValueError, match=r"No control cells for 'P01'.*'C9'.*C1"):
        model.predict(controls, wanted, progress=False)


def test_a_missing_context_column_is_named(model: PerturbDiff, controls: AnnData) -> None:
    controls.obs = controls.obs.rename(columns={"cell_type": "celltype"})
    with pytest.raises(KeyError, match="'cell_type'.*Did you mean 'celltype'"):
        model.predict(controls, ["P01"], progress=False)


def test_cells_without_a_single_control_are_an_error(model: PerturbDiff, screen: AnnData) -> None:
    with pytest.raises(ValueError, match=r"no control cells: obs\['perturbation'\] is never 'control'.*'P01'"):
        model.predict(screen[screen.obs["perturbation"] != "control"].copy(), ["P01"], progress=False)


def test_a_batch_never_seen_is_named_with_the_remedy(model: PerturbDiff, controls: AnnData) -> None:
    controls.obs["donor"] = controls.obs["donor"].cat.rename_categories({"D2": "D7"})
    with pytest.raises(ValueError, match=r"obs\['donor'\].*: 'D7'\. Known: 'D1', 'D2'\. Pass transform_batch"):
        model.predict(controls, ["P01"], progress=False)
    assert model.predict(controls, ["P01"], n_cells=4, transform_batch="D1", progress=False).n_obs == 12
    with pytest.raises(ValueError, match=r"transform_batch='D7'.*\['D1', 'D2'\]"):
        model.predict(controls, ["P01"], transform_batch="D7", progress=False)


@pytest.mark.parametrize(
    ("perturbations", "error", "match"),
    [
        ("P01", TypeError, r"must be a list.*pass \['P01'\]"),
        ([], ValueError, "perturbations is empty"),
        (5, TypeError, "perturbations=5 must be"),
        (pd.DataFrame({"name": ["P01"]}), KeyError, "no column 'perturbation'.*'name'"),
        (pd.DataFrame({"perturbation": ["P01"], "tissue": ["skin"]}), KeyError, "'tissue'.*Allowed.*'cell_type'"),
        (pd.DataFrame({"perturbation": ["P01"], "n_cells": [0]}), ValueError, "n_cells=0"),
        (pd.DataFrame({"perturbation": ["P01"], "n_cells": [1.5]}), ValueError, "n_cells=1.5"),
    ],
)
def test_a_request_that_makes_no_sense(
    model: PerturbDiff, controls: AnnData, perturbations: Any, error: type[Exception], match: str
) -> None:
    with pytest.raises(error, match=match):
        model.predict(controls, perturbations, progress=False)


WHOLE, NUMBER = "a whole number", "a number in "


@pytest.mark.parametrize(
    ("argument", "values", "allowed"),
    [
        ("n_cells", (0, -1, 1.5, np.inf, "5", True, [1], 10**12), WHOLE),
        ("n_populations", (0, 2.5, "2", True, 10**12), WHOLE),
        ("n_steps", (-1, 2.5, "2", True, 10**9), WHOLE),
        ("sampler", ("euler", None, 3), "one of 'renoise', 'ddim', 'dpm\\+\\+'"),
        ("guidance", (np.nan, np.inf, "a", None), NUMBER),
        ("target_sum", (0, -5.0, np.nan, np.inf, None, "a"), NUMBER),
        ("seed", (-1, 2**70, 1.5, "a"), WHOLE),
        ("progress", (None, "no"), "True or False"),
    ],
)
def test_settings_of_predict_are_checked(
    model: PerturbDiff, controls: AnnData, argument: str, values: tuple[Any, ...], allowed: str
) -> None:
    for value in values:
        with pytest.raises((TypeError, ValueError), match=rf"{argument}={re.escape(repr(value))} must be {allowed}"):
            model.predict(controls, ["P01"], **{"progress": False, argument: value})


@pytest.mark.parametrize(("argument", "value"), [("pseudocount", 0), ("pseudocount", np.nan), ("target_sum", -1)])
def test_settings_of_response_are_checked(model: PerturbDiff, argument: str, value: Any) -> None:
    with pytest.raises(ValueError, match=rf"{argument}={value} must be a number in \(0, inf\)"):
        model.response(perturbations=["P01"], progress=False, **{argument: value})


def test_numbers_of_numpy_are_numbers(model: PerturbDiff, controls: AnnData) -> None:
    expected = model.predict(controls, ["P01"], n_cells=4, n_populations=2, guidance=1.0, seed=1, progress=False)
    given = {"n_cells": np.int64(4), "n_populations": np.uint8(2), "guidance": np.float32(1), "seed": np.int16(1)}
    assert_same_cells(model.predict(controls, ["P01"], progress=False, **given), expected)


def test_rows_are_found_by_number_or_mask(model: PerturbDiff, controls: AnnData) -> None:
    everything = model.get_latent_representation(controls)
    n = controls.n_obs
    mask = np.arange(n) % 3 == 0
    for indices, expected in [([0, 4], [0, 4]), ([-1, 0, 0], [n - 1, 0, 0]), (mask, np.flatnonzero(mask)), ([], [])]:
        found = model.get_latent_representation(controls, indices)
        np.testing.assert_allclose(found, everything[expected], rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match=f"between 0 and {n}, but there are {n} cells"):
        model.get_latent_representation(controls, [0, n])
    for wrong in ([0.5], ["a"], mask[1:], [[0]], 0):
        with pytest.raises(TypeError, match=f"whole numbers or a mask of {n} rows"):
            model.get_latent_representation(controls, wrong)


def test_only_the_rows_asked_for_are_checked(model: PerturbDiff, controls: AnnData) -> None:
    controls.X = controls.X.astype(np.float64)
    controls.X[0, controls.X[0].indices[0]] = 0.5
    assert len(model.get_latent_representation(controls, [1, 2])) == 2


@pytest.mark.parametrize("cells", ["cells.h5ad", 3, pd.DataFrame(), sparse.csr_matrix((2, 2))])
def test_what_is_no_anndata_is_refused(model: PerturbDiff, cells: Any) -> None:
    for call in (
        lambda: model.predict(cells, ["P01"], progress=False),
        lambda: model.get_latent_representation(cells),
        lambda: model.response(perturbations=["P01"], real=cells, progress=False),
        lambda: setup(cells),
    ):
        with pytest.raises(TypeError, match=f"must be an AnnData, not {type(cells).__name__}"):
            call()


def test_names_of_components_are_several(model: PerturbDiff) -> None:
    with pytest.raises(TypeError, match=r"names='P01' must be several names; pass \['P01'\]"):
        model.perturbation_novelty("P01")
    with pytest.raises(TypeError, match="names=5 must be several names"):
        model.perturbation_novelty(5)


# ---- controls and small groups ------------------------------------------------------------------------------------


def test_a_context_without_controls_is_named(adata: AnnData) -> None:
    kept = ~((adata.obs["perturbation"] == "control") & (adata.obs["cell_type"] == "C2"))
    with pytest.raises(ValueError, match=r"no control cells.*cell_type.*'C2'"):
        trained(adata[kept].copy())


def test_a_group_of_one_cell_trains_with_a_warning_and_predicts(
    adata: AnnData, caplog: pytest.LogCaptureFixture
) -> None:
    group = (adata.obs["perturbation"] == "P01") & (adata.obs["cell_type"] == "C1") & (adata.obs["donor"] == "D1")
    kept = ~group | (np.cumsum(group) == 1)
    single = adata[kept].copy()
    with caplog.at_level("WARNING", logger="scperturbdiff"):
        model = trained(single)
    assert "1 of 30 populations have a single cell" in caplog.text
    report = model.populations.set_index(["perturbation", "cell_type", "donor"])
    assert report.loc[("P01", "C1", "D1"), "n_cells"] == 1
    assert all(np.isfinite(p.detach().numpy()).all() for p in model.module.generator.parameters())
    control = single[single.obs["perturbation"] == "control"][:1].copy()
    pred = model.predict(control, ["P01"], progress=False)
    assert pred.n_obs == 1 and np.isfinite(pred.X.data).all()
    assert model.predict(control, ["P01"], n_cells=3, progress=False).n_obs == 3


# ---- training -----------------------------------------------------------------------------------------------------


def test_predicting_before_training_is_an_error(adata: AnnData) -> None:
    setup(adata)
    model = PerturbDiff(adata)
    with pytest.raises(RuntimeError, match=r"predict needs a trained model: call train\(\)"):
        model.predict(adata, ["P01"])
    with pytest.raises(RuntimeError, match="trained"):
        model.get_latent_representation()
    assert model.populations is None


def test_a_model_needs_cells_that_were_set_up(adata: AnnData) -> None:
    with pytest.raises(ValueError, match="setup_anndata"):
        PerturbDiff(adata)


def test_no_training_makes_no_trained_model(adata: AnnData) -> None:
    setup(adata)
    model = PerturbDiff(adata, **TINY)
    with pytest.raises(ValueError, match="0 epochs makes no trained model"):
        model.train(max_epochs=0)
    assert not model.is_trained_
    model.train(**(FEW_STEPS | {"max_epochs_generator": 0}))
    with pytest.raises(RuntimeError, match="Only the VAE was trained"):
        model.predict(perturbations=["P01"])


SIZES = {"n_latent", "n_hidden", "n_vae_layers", "width", "n_layers", "n_heads"}


@pytest.mark.parametrize(
    ("argument", "values", "allowed"),
    [
        *((name, (0, -1, 2.5, "4", None, True, 10**9), WHOLE) for name in sorted(SIZES)),
        *((name, (-0.1, 1.0, np.nan, "a"), NUMBER) for name in ("dropout", "vae_dropout")),
        *((name, (3, ["a"]), "a mapping") for name in ("vae_kwargs", "retrieval_kwargs", "generator_kwargs")),
    ],
)
def test_sizes_are_checked(adata: AnnData, argument: str, values: tuple[Any, ...], allowed: str) -> None:
    setup(adata)
    for value in values:
        with pytest.raises((TypeError, ValueError), match=rf"{argument}={re.escape(repr(value))} must be {allowed}"):
            PerturbDiff(adata, **{argument: value})


@pytest.mark.parametrize(
    ("argument", "values", "allowed"),
    [
        *((name, (-1, 1.5, "3", np.nan, True), WHOLE) for name in ("max_epochs", "max_epochs_vae")),
        ("max_epochs_generator", (-1, 1.5, "3", np.nan, True), WHOLE),
        ("batch_size", (0, -1, 2.5, "a", None), WHOLE),
        ("validation_size", (1.0, -0.1, np.nan, "a", 3), NUMBER),
        ("train_size", (0, 1.5, np.nan, "a", None), NUMBER),
        ("early_stopping", (None, 1), "True or False"),
        ("precision", ("bf16-true", "16-true", "64-true", "no such thing"), "one of '32-true'"),
        ("seed", (-1, 2**70, 1.5, "a"), WHOLE),
        ("plan_kwargs", (3,), "a mapping"),
        ("vae_plan_kwargs", (["lr"],), "a mapping"),
    ],
)
def test_arguments_of_train_are_checked(adata: AnnData, argument: str, values: tuple[Any, ...], allowed: str) -> None:
    setup(adata)
    model = PerturbDiff(adata, **TINY)
    for value in values:
        with pytest.raises((TypeError, ValueError), match=rf"{argument}={re.escape(repr(value))} must be {allowed}"):
            model.train(**{"max_epochs": 1, argument: value})
    assert not model.is_trained_


@pytest.mark.parametrize("argument", ["lr", "eps", "dispersion_lr_factor"])
@pytest.mark.parametrize("value", [0, -1.0, np.nan, "a"])
def test_rates_of_the_first_stage_are_checked(adata: AnnData, argument: str, value: Any) -> None:
    setup(adata)
    with pytest.raises((TypeError, ValueError), match=rf"{argument}={value!r} must be a number in \(0, "):
        PerturbDiff(adata, **TINY).train(vae_plan_kwargs={argument: value})


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"plan_kwargs": {"objective": "l2"}}, "objective='l2'.*energy_score"),
        ({"plan_kwargs": {"n_draws": 1}}, "n_draws=1"),
        ({"plan_kwargs": {"n_cells": 0}}, "n_cells.*=0 must be a whole number, 1 or more"),
        ({"plan_kwargs": {"steps_per_epoch": 1.5}}, "steps_per_epoch.*=1.5 must be a whole number"),
        ({"plan_kwargs": {"p_terminal": 2}}, "p_terminal.*=2 must be a number in"),
        ({"ckpt_path": "no/such/file"}, "ckpt_path='no/such/file' is not a file"),
        ({"ckpt_path": __file__}, "is no checkpoint"),
    ],
)
def test_settings_of_train_are_checked(adata: AnnData, arguments: dict[str, Any], match: str) -> None:
    setup(adata)
    with pytest.raises((ValueError, FileNotFoundError), match=match):
        PerturbDiff(adata).train(max_epochs=1, enable_progress_bar=False, **arguments)


def test_a_width_that_cannot_be_shared_by_heads_is_refused(adata: AnnData) -> None:
    setup(adata)
    for width, n_heads in ((7, 1), (12, 8)):
        with pytest.raises(ValueError, match=f"width={width} must be even and a multiple of n_heads={n_heads}"):
            PerturbDiff(adata, width=width, n_heads=n_heads)
    with pytest.raises(TypeError, match=r"plan_kwargs has no 'n_cell'\. Allowed: .*n_cells"):
        PerturbDiff(adata, **TINY).train(plan_kwargs={"n_cell": 8})


# ---- loading ------------------------------------------------------------------------------------------------------


def test_a_folder_that_is_no_model_is_named(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "missing"):
        with pytest.raises(FileNotFoundError, match=str(folder)):
            PerturbDiff.load(folder, adata=False)


def test_a_model_of_another_class_is_refused(adata: AnnData, tmp_path: Path) -> None:
    scvi.model.SCVI.setup_anndata(adata)
    other = scvi.model.SCVI(adata)
    other.train(max_epochs=1, enable_progress_bar=False)
    other.save(tmp_path / "scvi")
    with pytest.raises(ValueError, match="allow_pickle=True"):
        PerturbDiff.load(tmp_path / "scvi", adata=False)
    with pytest.raises(ValueError, match="different class"):
        PerturbDiff.load(tmp_path / "scvi", adata=False, allow_pickle=True)


def test_a_model_loaded_without_cells_says_so(model: PerturbDiff, tmp_path: Path) -> None:
    model.save(tmp_path / "model")
    loaded = PerturbDiff.load(tmp_path / "model", adata=False)
    with pytest.raises(ValueError, match="without an AnnData"):
        loaded.predict(perturbations=["P01"])
    with pytest.raises(ValueError, match="without an AnnData"):
        loaded.get_latent_representation()
    with pytest.raises(ValueError, match="without an AnnData"):
        loaded.train()
