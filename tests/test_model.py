"""The model from setup to predicted cells, on a screen so small that training takes a second."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import anndata as ad
import lightning.pytorch as pl
import numpy as np
import pandas as pd
import pytest
import scanpy as sc
import scvi
import torch
from pandas.testing import assert_frame_equal
from scipy import sparse
from tests.helpers import BRIEF, N_LATENT, SETUP, assert_same_cells

from scperturbdiff import PerturbDiff
from scperturbdiff.data import log_normalize
from scperturbdiff.diffusion import VALIDATION_METRIC

if TYPE_CHECKING:
    from pathlib import Path

    from anndata import AnnData

QUIET: dict[str, Any] = {"progress": False, "seed": 1}


@pytest.fixture(scope="module")
def model(trained_model: PerturbDiff) -> PerturbDiff:
    return trained_model


@pytest.fixture
def controls(screen: AnnData) -> AnnData:
    """Control cells that nothing marks as such: the column of perturbations is gone."""
    cells = screen[screen.obs["perturbation"] == "control"].copy()
    del cells.obs["perturbation"]
    return cells


def trained(adata: AnnData, **arguments: Any) -> PerturbDiff:
    PerturbDiff.setup_anndata(adata, **SETUP)
    model = PerturbDiff(adata, n_latent=N_LATENT)
    model.train(**{**BRIEF, **arguments})
    return model


def counts(adata: AnnData, **labels: str) -> np.ndarray:
    """Sampled counts of the cells with these labels, sorted so that the order of rows does not matter."""
    chosen = np.ones(adata.n_obs, dtype=bool)
    for key, value in labels.items():
        chosen &= (adata.obs[key] == value).to_numpy()
    assert chosen.any()
    dense = adata[chosen].layers["counts"].toarray()
    return dense[np.lexsort(dense.T)]


# ---- what predict returns -----------------------------------------------------------------------------------------


def test_predicted_cells_have_counts_expression_latent_vectors_and_labels(
    model: PerturbDiff, screen: AnnData, controls: AnnData
) -> None:
    pred = model.predict(controls, ["P01", "P03"], n_cells=25, **QUIET)
    assert pred.shape == (3 * 2 * 25, 100)
    assert pred.var_names.equals(screen.var_names)
    assert pred.obs_names.is_unique
    assert sparse.isspmatrix_csr(pred.X) and pred.X.dtype == np.float32
    sampled = pred.layers["counts"]
    assert sparse.isspmatrix_csr(sampled) and sampled.dtype == np.int32 and sampled.min() >= 0
    assert abs(pred.X - log_normalize(sampled, 1e4)).max() < 1e-6
    assert pred.obsm["X_perturbdiff"].shape == (150, N_LATENT)
    assert np.isfinite(pred.obsm["X_perturbdiff"]).all()
    assert list(pred.obs) == ["perturbation", "cell_type", "donor", "control_cell", "population"]
    assert (pred.obs.groupby(["cell_type", "perturbation"], observed=True).size() == 25).all()
    assert pred.uns["scperturbdiff"]["seed"] == 1
    assert pred.uns["scperturbdiff"]["target_sum"] == 1e4


def test_each_cell_starts_from_a_control_cell_of_its_context_and_batch(model: PerturbDiff, controls: AnnData) -> None:
    pred = model.predict(controls, ["P02"], **QUIET)
    source = controls.obs.loc[pred.obs["control_cell"]]
    for key in ("cell_type", "donor"):
        assert (source[key].astype(str).to_numpy() == pred.obs[key].astype(str).to_numpy()).all()
    # by default every control cell is used once
    assert sorted(pred.obs["control_cell"]) == sorted(controls.obs_names)


def test_library_sizes_follow_those_of_the_control_cells(model: PerturbDiff, controls: AnnData) -> None:
    deep = controls.copy()
    first = (deep.obs["cell_type"] == "C1").to_numpy()
    deep.X = sparse.csr_matrix(deep.X.multiply(np.where(first, 3, 1)[:, None]))
    sizes = pd.Series(np.asarray(deep.X.sum(1)).ravel(), deep.obs_names)
    pred, before = (model.predict(cells, ["P01"], **QUIET) for cells in (deep, controls))
    predicted, shallow = (np.asarray(cells.layers["counts"].sum(1)).ravel() for cells in (pred, before))
    for context, times in (("C1", 3), ("C2", 1)):
        rows, those = ((cells.obs["cell_type"] == context).to_numpy() for cells in (pred, before))
        assert predicted[rows].mean() == pytest.approx(times * shallow[those].mean(), rel=0.1)
    wanted = sizes.loc[pred.obs["control_cell"]].to_numpy()
    assert np.corrcoef(np.log(predicted), np.log(wanted))[0, 1] > 0.8


def test_batches_share_the_cells_in_proportion_to_their_controls(model: PerturbDiff, controls: AnnData) -> None:
    kept = (controls.obs["donor"] == "D1") | (np.arange(controls.n_obs) % 4 == 0)
    pred = model.predict(controls[kept], ["P01"], n_cells=50, **QUIET)
    sizes = pred.obs.groupby(["cell_type", "donor"], observed=True).size()
    assert sizes.xs("D1", level="donor").tolist() == [40, 40, 40]


def test_predictions_need_no_treated_cell_and_ignore_them(
    model: PerturbDiff, screen: AnnData, controls: AnnData
) -> None:
    pred = model.predict(controls, ["P01"], **QUIET)
    assert_same_cells(pred, model.predict(screen, ["P01"], **QUIET))
    assert_same_cells(pred, model.predict(None, ["P01"], **QUIET))


def test_the_input_stays_as_it_is(model: PerturbDiff, screen: AnnData) -> None:
    given, before = screen.copy(), screen.copy()
    model.predict(given, ["P01"], n_populations=2, **QUIET)
    model.get_latent_representation(given)
    assert_same_anndata(given, before)


def test_training_changes_only_what_scvi_registers(screen: AnnData) -> None:
    given = screen.copy()
    trained(given, max_epochs=1)
    added = [column for column in given.obs if column not in screen.obs]
    assert all(column.startswith("_scvi") for column in added)
    assert all(key.startswith("_scvi") for key in given.uns if key not in screen.uns)
    given.obs = given.obs.drop(columns=added)
    for key in [key for key in given.uns if key not in screen.uns]:
        del given.uns[key]
    assert_same_anndata(given, screen)


def assert_same_anndata(a: AnnData, b: AnnData) -> None:
    assert (a.X != b.X).nnz == 0 and a.X.dtype == b.X.dtype
    assert_frame_equal(a.obs, b.obs)
    assert_frame_equal(a.var, b.var)
    for part in ("layers", "obsm", "varm", "obsp"):
        names = [[n for n in getattr(x, part) if n is not None] for x in (a, b)]  # None is X since anndata 0.13
        assert names == [[], []]
    assert_same_values(a.uns, b.uns)


def assert_same_values(a: Any, b: Any) -> None:
    assert type(a) is type(b)
    if hasattr(a, "items") and not isinstance(a, pd.DataFrame):
        assert list(a) == list(b)
        for key in a:
            assert_same_values(a[key], b[key])
    elif isinstance(a, pd.DataFrame):
        assert_frame_equal(a, b)
    else:
        np.testing.assert_array_equal(a, b)


# ---- what a prediction may and may not depend on -----------------------------------------------------------------


def test_genes_are_found_by_name(model: PerturbDiff, controls: AnnData) -> None:
    pred = model.predict(controls, ["P01"], **QUIET)
    order = np.random.default_rng(0).permutation(controls.n_vars)
    assert_same_cells(pred, model.predict(controls[:, order].copy(), ["P01"], **QUIET))
    other = controls[:, :7].copy()
    other.var_names = [f"other{i}" for i in range(7)]
    more = ad.concat([other, controls[:, order]], axis=1, merge="same")
    assert more.n_vars == 107
    assert_same_cells(pred, model.predict(more, ["P01"], **QUIET))


def test_contexts_together_are_contexts_apart(model: PerturbDiff, controls: AnnData) -> None:
    together = model.predict(controls, ["P01", "P02"], n_cells=30, **QUIET)
    for context in ("C1", "C2"):
        own = controls[controls.obs["cell_type"] == context].copy()
        for perturbation in ("P01", "P02"):
            apart = model.predict(own, [perturbation], n_cells=30, **QUIET)
            np.testing.assert_array_equal(counts(apart), counts(together, cell_type=context, perturbation=perturbation))


def test_the_order_of_control_cells_does_not_matter(model: PerturbDiff, controls: AnnData) -> None:
    order = np.random.default_rng(1).permutation(controls.n_obs)
    shuffled = model.predict(controls[order].copy(), ["P01"], n_cells=30, **QUIET)
    assert_same_cells(model.predict(controls, ["P01"], n_cells=30, **QUIET), shuffled)


@pytest.mark.parametrize("stored", ["dense", "csc", "float64", "backed", "layer"])
def test_storage_of_the_counts_does_not_matter(
    model: PerturbDiff, controls: AnnData, stored: str, tmp_path: Path
) -> None:
    pred = model.predict(controls, ["P01"], n_cells=20, **QUIET)
    given, layer = controls.copy(), None
    if stored == "dense":
        given.X = given.X.toarray()
    elif stored == "csc":
        given.X = given.X.tocsc()
    elif stored == "float64":
        given.X = given.X.astype(np.float64)
    elif stored == "backed":
        given.write_h5ad(tmp_path / "controls.h5ad")
        given = ad.read_h5ad(tmp_path / "controls.h5ad", backed="r")
    else:
        layer, given.layers["raw"] = "raw", given.X
        given.X = log_normalize(given.X)
    assert_same_cells(pred, model.predict(given, ["P01"], n_cells=20, layer=layer, **QUIET))


def test_the_perturbation_context_and_batch_do_matter(model: PerturbDiff, controls: AnnData) -> None:
    pred = model.predict(controls, ["P01", "P02"], n_cells=30, **QUIET)
    first, second = (pred[pred.obs["perturbation"] == p].obsm["X_perturbdiff"] for p in ("P01", "P02"))
    assert not np.allclose(np.sort(first, 0), np.sort(second, 0))
    one_batch = model.predict(controls, ["P01", "P02"], n_cells=30, transform_batch="D1", **QUIET)
    moved = (pred.obs["donor"] == "D2").to_numpy()
    different = (pred.layers["counts"] != one_batch.layers["counts"]).toarray().any(1)
    assert different[moved].all() and not different[~moved].any()


# ---- seeds --------------------------------------------------------------------------------------------------------


def test_the_seed_decides_on_the_cells(model: PerturbDiff, controls: AnnData) -> None:
    first = model.predict(controls, ["P01"], seed=1, progress=False)
    assert_same_cells(first, model.predict(controls, ["P01"], seed=1, progress=False))
    assert (counts(first) != counts(model.predict(controls, ["P01"], seed=2, progress=False))).any()


def test_without_a_seed_the_one_of_scvi_settings_is_used(model: PerturbDiff, controls: AnnData) -> None:
    scvi.settings.seed = 7
    pred = model.predict(controls, ["P01"], progress=False)
    assert pred.uns["scperturbdiff"]["seed"] == 7
    assert_same_cells(pred, model.predict(controls, ["P01"], seed=7, progress=False))


def test_without_any_seed_cells_differ_and_the_seed_is_kept(
    model: PerturbDiff, controls: AnnData, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scvi.settings, "_seed", None)
    assert scvi.settings.seed is None
    first, second = (model.predict(controls, ["P01"], progress=False) for _ in range(2))
    assert (counts(first) != counts(second)).any()
    again = model.predict(controls, ["P01"], seed=second.uns["scperturbdiff"]["seed"], progress=False)
    assert_same_cells(second, again)


def test_training_is_repeatable(screen: AnnData, controls: AnnData) -> None:
    preds = []
    for seed in (0, 0, 1):
        scvi.settings.seed = seed
        preds.append(trained(screen.copy(), max_epochs=1).predict(controls, ["P01"], **QUIET))
    assert_same_cells(preds[0], preds[1])
    assert (counts(preds[0]) != counts(preds[2])).any()


# ---- requests -----------------------------------------------------------------------------------------------------


def test_combinations_of_any_size_in_any_order(model: PerturbDiff, controls: AnnData) -> None:
    pred = model.predict(controls, ["P01+P04", "P01+P02+P03"], n_cells=10, **QUIET)
    assert set(pred.obs["perturbation"]) == {"P01+P04", "P01+P02+P03"}
    turned = model.predict(controls, ["P04+P01"], n_cells=10, **QUIET)
    assert set(turned.obs["perturbation"]) == {"P04+P01"}
    np.testing.assert_array_equal(counts(turned), counts(pred, perturbation="P01+P04"))
    assert (counts(turned) != counts(model.predict(controls, ["P01"], n_cells=10, **QUIET))).any()


def test_a_table_asks_for_populations_one_by_one(model: PerturbDiff, controls: AnnData) -> None:
    wanted = pd.DataFrame({"perturbation": ["P01", "P02"], "cell_type": ["C1", "C3"], "n_cells": [12, 5]})
    pred = model.predict(controls, wanted, **QUIET)
    sizes = pred.obs.groupby(["perturbation", "cell_type"], observed=True).size()
    assert sizes.to_dict() == {("P01", "C1"): 12, ("P02", "C3"): 5}
    whole = model.predict(controls, ["P01"], n_cells=12, **QUIET)
    np.testing.assert_array_equal(counts(pred, perturbation="P01"), counts(whole, cell_type="C1"))


def test_nothing_asked_for_is_everything_of_training(model: PerturbDiff, screen: AnnData, controls: AnnData) -> None:
    pred = model.predict(controls, n_cells=4, **QUIET)
    assert set(pred.obs["perturbation"]) == set(screen.obs["perturbation"]) - {"control"}


def test_a_context_never_seen_is_predicted_from_its_own_controls(model: PerturbDiff, controls: AnnData) -> None:
    new = controls[controls.obs["cell_type"] == "C1"].copy()
    new.obs["cell_type"] = "unheard of"
    pred = model.predict(new, ["P01"], n_cells=10, **QUIET)
    assert set(pred.obs["cell_type"]) == {"unheard of"}


def test_independent_draws_of_populations(model: PerturbDiff, controls: AnnData) -> None:
    pred = model.predict(controls, ["P01"], n_cells=8, n_populations=3, **QUIET)
    assert pred.obs.groupby(["cell_type", "population"], observed=True).size().tolist() == [8] * 9
    assert sorted(pred.obs["population"].unique()) == ["0", "1", "2"]
    np.testing.assert_array_equal(
        counts(pred, population="0"), counts(model.predict(controls, ["P01"], n_cells=8, n_populations=1, **QUIET))
    )
    assert (counts(pred, population="0") != counts(pred, population="1")).any()


@pytest.mark.parametrize("sampler", ["renoise", "ddim", "dpm++"])
def test_several_steps(model: PerturbDiff, controls: AnnData, sampler: Any) -> None:
    heard = copy.copy(model)
    heard.module = copy.deepcopy(model.module)
    heard.module.generator_ema.network_weight.fill_(1)  # one of weight 0 would not be evaluated
    torch.nn.init.normal_(heard.module.generator_ema.transformer.out.weight, 0, 0.1)
    one = heard.predict(controls, ["P01"], n_cells=6, **QUIET)
    pred = heard.predict(controls, ["P01"], n_cells=6, n_steps=3, sampler=sampler, guidance=1.5, **QUIET)
    assert (pred.uns["scperturbdiff"]["n_steps"], pred.uns["scperturbdiff"]["sampler"]) == (3, sampler)
    assert (counts(pred) != counts(one)).any()


def test_more_cells_than_controls(model: PerturbDiff, controls: AnnData) -> None:
    few = controls[controls.obs["cell_type"] == "C1"][:3].copy()
    pred = model.predict(few, ["P01"], n_cells=300, **QUIET)
    assert pred.n_obs == 300
    assert pred.obs["control_cell"].value_counts().tolist() == [100, 100, 100]
    assert len(np.unique(pred.layers["counts"].toarray(), axis=0)) == 300  # no cell is the copy of another


def test_without_a_perturbation_control_cells_keep_their_counts(model: PerturbDiff, controls: AnnData) -> None:
    """As many cells as there are controls: each is used once, and nearly nothing changes its counts."""
    pred = model.predict(controls, ["control"], **QUIET)
    assert pred.n_obs == controls.n_obs
    start = controls[pred.obs["control_cell"].to_numpy(), pred.var_names]
    assert (pred.layers["counts"].toarray() == np.asarray(start.to_df())).mean() > 0.995


# ---- saving and loading -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("with_adata", [True, False])
def test_a_loaded_model_predicts_the_same_cells(
    model: PerturbDiff, screen: AnnData, controls: AnnData, with_adata: bool, tmp_path: Path
) -> None:
    pred = model.predict(controls, ["P01", "P02+P03"], n_cells=20, **QUIET)
    model.save(tmp_path / "model")
    loaded = PerturbDiff.load(tmp_path / "model", adata=screen.copy() if with_adata else False)
    assert_same_cells(pred, loaded.predict(controls, ["P01", "P02+P03"], n_cells=20, **QUIET))
    np.testing.assert_array_equal(model.get_latent_representation(controls), loaded.get_latent_representation(controls))
    assert_frame_equal(model.populations, loaded.populations)
    if with_adata:
        assert_same_cells(pred, loaded.predict(None, ["P01", "P02+P03"], n_cells=20, **QUIET))


def test_a_saved_model_can_bring_its_cells(model: PerturbDiff, controls: AnnData, tmp_path: Path) -> None:
    model.save(tmp_path / "model", save_anndata=True)
    loaded = PerturbDiff.load(tmp_path / "model")
    assert_same_cells(model.predict(None, ["P01"], **QUIET), loaded.predict(None, ["P01"], **QUIET))


def test_a_loaded_model_can_be_trained_further(model: PerturbDiff, screen: AnnData, tmp_path: Path) -> None:
    model.save(tmp_path / "model")
    loaded = PerturbDiff.load(tmp_path / "model", adata=screen.copy())
    latent = loaded.get_latent_representation()
    loaded.train(max_epochs_generator=1, plan_kwargs={"steps_per_epoch": 3}, enable_progress_bar=False)
    # the latent space is kept unless asked for
    np.testing.assert_array_equal(latent, loaded.get_latent_representation())


# ---- training -----------------------------------------------------------------------------------------------------


class Given(pl.Callback):
    """Replaces the scores of held-out populations by given ones and keeps the weights that were scored."""

    def __init__(self, scores: list[float]) -> None:
        self.scores, self.weights = scores, []

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not hasattr(pl_module, "validation_scores"):
            return  # the first stage
        n, generator = pl_module.validation[0].n_populations, pl_module.module.generator_ema

        def scored(strength: object = None) -> tuple[torch.Tensor, torch.Tensor]:
            if 0 < generator.network_weight < 1 or strength is not None:  # in part, and a law of responses, do harm
                return torch.full((n,), 9.0), torch.full((n, 4), 9.0)
            value = self.scores[len(self.weights)]
            self.weights.append({name: w.clone() for name, w in generator.state_dict().items()})
            return torch.full((n,), value), torch.full((n, 4), value)

        pl_module.validation_scores = scored


@pytest.mark.parametrize(
    ("scores", "best", "early_stopping"),
    # the first is that without the network; kept weights must be better by 5 %
    [
        ([1.0, 0.9, 0.4, 0.7, 0.8], 2, True),
        ([1.0, 0.9, 0.4, 0.7, 0.8], 2, False),
        ([1.0, 0.99, 1.2, 0.96, 1.0], None, True),
        ([1.0, 1.3, 1.2, 1.1, 0.8], 4, False),
    ],
)
def test_the_weights_kept_are_the_best_that_were_scored(
    screen: AnnData, controls: AnnData, scores: list[float], best: int | None, early_stopping: bool, tmp_path: Path
) -> None:
    given = Given(scores)
    model = trained(
        screen.copy(), callbacks=[given], early_stopping=early_stopping, max_epochs_generator=len(scores) - 1
    )
    np.testing.assert_allclose(model.history[VALIDATION_METRIC].to_numpy(float).ravel(), scores[1:], rtol=1e-6)
    kept, wanted = model.module.generator_ema.state_dict(), given.weights[0 if best is None else best]
    assert kept["network_weight"] == wanted["network_weight"] == (best is not None)
    # the law of replicates is measured again when training ends
    for name in kept.keys() - {"replicate_factors"}:
        assert torch.equal(kept[name], wanted[name]), name
    moved = [not torch.equal(given.weights[-1][name], w) for name, w in given.weights[1].items()]
    assert any(moved), "epochs have weights of their own"
    pred = model.predict(controls, ["P01"], **QUIET)
    assert pred.uns["scperturbdiff"]["n_steps"] == (best is not None)
    model.save(tmp_path / "model")
    assert_same_cells(pred, PerturbDiff.load(tmp_path / "model", adata=False).predict(controls, ["P01"], **QUIET))


def test_early_stopping_stops(screen: AnnData) -> None:
    model = trained(
        screen.copy(),
        max_epochs_generator=200,
        early_stopping_patience=2,
        plan_kwargs={"steps_per_epoch": 1, "lr": 0.3, "warmup_steps": 1, "ema_decay": 0.1},
    )
    assert len(model.history[VALIDATION_METRIC]) < 200


def test_max_epochs_bounds_both_stages(screen: AnnData) -> None:
    model = trained(screen.copy(), max_epochs=1, max_epochs_vae=None, max_epochs_generator=5)
    assert len(model.history["elbo_train"]) == 1
    assert len(model.history["generator_loss_train"]) == 1


def test_history_has_both_stages(model: PerturbDiff) -> None:
    for key in ("elbo_train", "reconstruction_loss_train", "kl_local_train", "generator_loss_train", VALIDATION_METRIC):
        assert len(model.history[key]) == 2, key
        assert np.isfinite(model.history[key].to_numpy(dtype=float)).all(), key


def test_populations_are_reported(model: PerturbDiff, screen: AnnData) -> None:
    report = model.populations
    treated = screen.obs[screen.obs["perturbation"] != "control"]
    keys = ["perturbation", "cell_type", "donor"]
    sizes = treated.groupby(keys, observed=True).size()
    assert report.set_index(keys)["n_cells"].to_dict() == sizes.to_dict()
    assert (report["n_controls"] == 20).all() and report["exact_match"].all()
    held = report[report["held_out"]]
    assert 0 < len(held) < len(report) / 2
    # all batches of a condition are held out together
    assert (held.groupby(["perturbation", "cell_type"], observed=True).size() == 2).all()


def test_train_takes_the_arguments_of_scvi_tools_and_its_autotune(screen: AnnData) -> None:
    seen = []

    class Note(pl.Callback):
        def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            seen.append(type(pl_module).__name__)

    adata = screen.copy()
    PerturbDiff.setup_anndata(adata, **SETUP)
    model = PerturbDiff(adata)
    model.train(
        accelerator="cpu",
        devices=1,
        check_val_every_n_epoch=1,
        enable_progress_bar=False,
        logger=None,
        callbacks=[Note()],
        max_epochs=1,
        plan_kwargs={"steps_per_epoch": 2},
    )
    assert len(seen) == 2 and len(set(seen)) == 2
    assert model.is_trained


def test_training_without_contexts_and_batches(screen: AnnData, controls: AnnData) -> None:
    adata = screen.copy()
    PerturbDiff.setup_anndata(adata, perturbation_key="perturbation", control="control")
    model = PerturbDiff(adata, n_latent=8, width=16, n_layers=1, n_heads=2)
    model.train(**BRIEF)
    pred = model.predict(controls, ["P01"], n_cells=9, **QUIET)
    assert pred.shape == (9, 100)
    assert pred.obsm["X_perturbdiff"].shape == (9, 8)
    assert list(pred.obs) == ["perturbation", "control_cell", "population"]


def test_the_names_of_the_columns_are_the_users_own(screen: AnnData) -> None:
    adata = screen.copy()
    adata.obs = adata.obs.rename(columns={"perturbation": "population", "cell_type": "dose", "donor": "n_cells"})
    adata.obs = adata.obs.rename(columns={"population": "drug", "dose": "my line", "n_cells": "10x lane"})
    adata.obs["drug"] = adata.obs["drug"].cat.rename_categories({"control": "DMSO"})
    PerturbDiff.setup_anndata(
        adata, perturbation_key="drug", control="DMSO", context_keys="my line", batch_key="10x lane"
    )
    model = PerturbDiff(adata)
    model.train(**BRIEF)
    pred = model.predict(adata, ["P01"], n_cells=4, **QUIET)
    assert list(pred.obs)[:3] == ["drug", "my line", "10x lane"]


# ---- latent vectors -----------------------------------------------------------------------------------------------


def test_latent_representation(model: PerturbDiff, screen: AnnData) -> None:
    latent = model.get_latent_representation()
    assert latent.shape == (screen.n_obs, N_LATENT) and latent.dtype == np.float32
    assert np.isfinite(latent).all()
    np.testing.assert_array_equal(latent, model.get_latent_representation(screen))
    np.testing.assert_allclose(
        latent[[5, 2, 2]], model.get_latent_representation(indices=[5, 2, 2]), rtol=1e-5, atol=1e-6
    )
    turned = screen[:, ::-1].copy()
    np.testing.assert_array_equal(latent, model.get_latent_representation(turned))
    # it tells cells apart
    assert (latent.std(0) > 0).all()


# ---- the world around it ------------------------------------------------------------------------------------------


def test_predicted_cells_drop_into_scanpy(model: PerturbDiff, screen: AnnData, controls: AnnData) -> None:
    pred = model.predict(controls, ["P01", "P02"], n_cells=20, **QUIET)
    real = screen.copy()
    real.layers["counts"] = real.X.copy()
    real.X = log_normalize(real.X)
    both = ad.concat({"real": real, "predicted": pred}, label="source", index_unique="-")
    assert both.n_obs == real.n_obs + pred.n_obs and both.n_vars == 100
    assert {"perturbation", "cell_type", "donor", "source"} <= set(both.obs)
    sc.pp.pca(both, n_comps=10)
    assert both.obsm["X_pca"].shape == (both.n_obs, 10)
    tested = both[both.obs["perturbation"].isin(["control", "P01"])].copy()
    sc.tl.rank_genes_groups(tested, "perturbation", reference="control", method="t-test")
    found = sc.get.rank_genes_groups_df(tested, group="P01")
    assert set(found["names"]) == set(screen.var_names)
    assert np.isfinite(found["logfoldchanges"]).all()
    sc.tl.rank_genes_groups(pred, "perturbation", method="wilcoxon")
    sc.pp.calculate_qc_metrics(pred, layer="counts", inplace=True, percent_top=None)
    assert (pred.obs["total_counts"] > 0).all()


def test_predicted_cells_survive_a_file(model: PerturbDiff, controls: AnnData, tmp_path: Path) -> None:
    pred = model.predict(controls, ["P01", "P02+P03"], n_cells=5, **QUIET)
    pred.write_h5ad(tmp_path / "pred.h5ad")
    assert_same_cells(pred, ad.read_h5ad(tmp_path / "pred.h5ad"))


def test_the_model_describes_itself(model: PerturbDiff, capsys: pytest.CaptureFixture[str]) -> None:
    print(model)
    assert "PerturbDiff with 4 perturbation components, 3 treated contexts" in " ".join(capsys.readouterr().out.split())
