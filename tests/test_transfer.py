"""Training on unperturbed cells, and adapting a trained model to new data."""

from __future__ import annotations

from typing import TYPE_CHECKING

import anndata
import numpy as np
import pandas as pd
import pytest
import torch
from anndata import AnnData
from scipy import sparse
from tests.helpers import FEW_STEPS, TINY

import scperturbdiff as spd

if TYPE_CHECKING:
    from pathlib import Path

GENES = 20
KEYS = {"context_keys": ["cell_type"], "batch_key": "donor", "categorical_covariate_keys": ["sex"]}


def make_cells(
    perturbations: tuple[str, ...] = ("control", "A", "B"),
    cell_types: tuple[str, ...] = ("T", "NK"),
    donors: tuple[str, ...] = ("d0", "d1"),
    sexes: tuple[str, ...] = ("f", "m"),
) -> AnnData:
    rng = np.random.default_rng(2)
    rows = [(p, c, d, s) for p in perturbations for c in cell_types for d, s in zip(donors, sexes, strict=False)]
    obs = pd.DataFrame([r for r in rows for _ in range(8)], columns=["perturbation", "cell_type", "donor", "sex"])
    obs.index = [f"cell{i}" for i in range(len(obs))]
    counts = sparse.csr_matrix(rng.poisson(3, (len(obs), GENES)).astype(np.float32))
    return AnnData(counts, obs=obs, var=pd.DataFrame(index=[f"g{i}" for i in range(GENES)]))


def setup(adata: AnnData, **kwargs: object) -> AnnData:
    spd.PerturbDiff.setup_anndata(adata, **({"perturbation_key": "perturbation", "control": "control"} | KEYS | kwargs))
    return adata


def trained(adata: AnnData) -> spd.PerturbDiff:
    model = spd.PerturbDiff(adata, **TINY)
    model.train(**FEW_STEPS)
    return model


@pytest.fixture(scope="module")
def reference() -> spd.PerturbDiff:
    features = {"A": [1.0, 0.0], "B": [0.0, 2.0]}
    return trained(setup(make_cells(), perturbation_embeddings=features))


def query_cells() -> AnnData:
    """New perturbation C, new context B cell, new donor d2, new sex x; A, T, d1 and m are known."""
    return make_cells(("control", "C", "A"), ("B cell", "T"), ("d1", "d2"), ("m", "x"))


@pytest.mark.parametrize("how", ["copy", "part", "read again"])
def test_copies_of_registered_cells_can_be_adapted_to(reference: spd.PerturbDiff, tmp_path: Path, how: str) -> None:
    cells = setup(make_cells())
    if how == "read again":
        cells.write_h5ad(tmp_path / "cells.h5ad")
        other = anndata.read_h5ad(tmp_path / "cells.h5ad")
    else:
        other = cells.copy() if how == "copy" else cells[: cells.n_obs - 8].copy()
    model = spd.PerturbDiff.load_query_data(other, reference)
    assert model.adata is other
    assert spd.PerturbDiff(cells, **TINY).adata is cells  # still registered


def state(model: spd.PerturbDiff) -> dict[str, torch.Tensor]:
    return {k: v.clone() for k, v in model.module.state_dict().items() if isinstance(v, torch.Tensor)}


def test_pretraining_on_unperturbed_cells(tmp_path: Path) -> None:
    adata = setup(make_cells(("control",)), perturbation_key=None, control=None)
    model = spd.PerturbDiff(adata, **TINY)
    before = state(model)
    model.train(**FEW_STEPS)
    assert len(model.populations) == 0 and model.conditions.components == ()
    moved = [k for k, v in state(model).items() if k.startswith("generator.") and not torch.equal(v, before[k])]
    assert "generator.transformer.project.weight" in moved
    with pytest.raises(ValueError, match="without perturbation_key.*load_query_data"):
        model.predict(adata, ["A"], progress=False)
    model.save(tmp_path / "m")
    assert spd.PerturbDiff.load(tmp_path / "m", adata=adata).is_trained_


def test_weights_are_taken_over_by_name(reference: spd.PerturbDiff) -> None:
    features = {"C": [1.0, 1.0], "A": [1.0, 0.0]}
    query = spd.PerturbDiff.load_query_data(setup(query_cells(), perturbation_embeddings=features), reference)
    new, old = query.module, reference.module
    for name, weight in old.vae.z_encoder.state_dict().items():
        assert torch.equal(new.vae.z_encoder.state_dict()[name], weight), name
    decoder = [m.vae.decoder.px_decoder.fc_layers[0][0].weight for m in (new, old)]
    latent = TINY["n_latent"]
    assert torch.equal(decoder[0][:, :latent], decoder[1][:, :latent])
    assert torch.equal(decoder[0][:, latent], decoder[1][:, latent + 1])  # d1, known
    torch.testing.assert_close(decoder[0][:, latent + 1], decoder[1][:, latent:].mean(1))  # d2, new
    for part in ("generator", "generator_ema"):
        to, of = getattr(new, part), getattr(old, part)
        assert torch.equal(to.perturbation.name.weight[0], of.perturbation.name.weight[0])  # A
        assert not torch.equal(to.perturbation.name.weight[1], of.perturbation.name.weight[1])  # C is not B
        assert torch.equal(to.categorical[0].weight[0], of.categorical[0].weight[1])  # m
        for name, weight in of.transformer.state_dict().items():
            assert torch.equal(to.transformer.state_dict()[name], weight), name
        assert torch.equal(to.perturbation.feature[0].weight, of.perturbation.feature[0].weight)
    torch.testing.assert_close(new.features, torch.tensor([[1.0, 0.0], [1.0, 1.0]]) / old.feature_scale)
    assert torch.equal(new.feature_scale, old.feature_scale)


@pytest.mark.parametrize("donors", [("d0",), ("d7", "d8"), ("d1", "d7", "d0")])
def test_decoding_goes_on_as_before(reference: spd.PerturbDiff, donors: tuple[str, ...]) -> None:
    cells = make_cells(donors=donors, sexes=("f",) * len(donors))
    query = spd.PerturbDiff.load_query_data(setup(cells, perturbation_embeddings={"A": [1.0, 0.0]}), reference)
    z = torch.randn(5, TINY["n_latent"])
    query.module.eval()
    with torch.no_grad():
        for code, donor in enumerate(sorted(donors)):
            ours = query.module.vae.decode_frequencies(z, torch.full((5,), code))
            if donor in ("d0", "d1"):
                theirs = reference.module.vae.decode_frequencies(z, torch.full((5,), int(donor[1])))
                torch.testing.assert_close(ours, theirs)
            assert torch.isfinite(ours).all()


def test_adapted_model_predicts_and_leaves_the_reference_alone(reference: spd.PerturbDiff, tmp_path: Path) -> None:
    before = state(reference)
    adata = setup(query_cells())
    query = spd.PerturbDiff.load_query_data(adata, reference)
    with pytest.raises(RuntimeError, match="train"):
        query.predict(adata, ["C"], progress=False)
    query.train(**FEW_STEPS)
    predicted = query.predict(adata, ["C", "A+C"], n_cells=5, seed=0, progress=False)
    assert set(predicted.obs["cell_type"]) == {"B cell", "T"} and set(predicted.obs["donor"]) == {"d1", "d2"}
    for name, weight in state(reference).items():
        assert torch.equal(weight, before[name]), name
    query.save(tmp_path / "query")
    again = spd.PerturbDiff.load(tmp_path / "query", adata=False)
    same = again.predict(adata, ["C", "A+C"], n_cells=5, seed=0, progress=False)
    assert (same.layers["counts"] != predicted.layers["counts"]).nnz == 0


def test_vae_is_kept_on_request_and_adapted_shortly_by_default(
    reference: spd.PerturbDiff, monkeypatch: pytest.MonkeyPatch
) -> None:
    from scperturbdiff.training import default_vae_epochs, plan_epochs

    usual = default_vae_epochs(1000, 128)
    assert plan_epochs(1000, 128, None, None, 1, trained=False)[0] == usual
    assert plan_epochs(1000, 128, None, None, 1, trained=False, adapted=True)[0] == -(-usual // 5)
    query = spd.PerturbDiff.load_query_data(setup(query_cells()), reference)
    before = state(query)
    query.train(**(FEW_STEPS | {"max_epochs_vae": 0}))
    after = state(query)
    assert all(torch.equal(v, after[k]) for k, v in before.items() if k.startswith("vae."))
    assert not torch.equal(
        before["generator.transformer.project.weight"], after["generator.transformer.project.weight"]
    )


def test_pretrained_model_is_adapted_to_perturbations(tmp_path: Path) -> None:
    pretrained = trained(setup(make_cells(("control",)), perturbation_key=None, control=None))
    pretrained.save(tmp_path / "reference")
    adata = setup(query_cells())
    query = spd.PerturbDiff.load_query_data(adata, tmp_path / "reference")
    theirs = pretrained.module.generator.transformer.project.weight
    assert torch.equal(query.module.generator.transformer.project.weight, theirs)
    query.train(**FEW_STEPS)
    assert query.predict(adata, ["C"], n_cells=5, seed=0, progress=False).n_obs == 10


def test_query_that_was_not_set_up_takes_the_keys_of_the_reference(reference: spd.PerturbDiff) -> None:
    query = spd.PerturbDiff.load_query_data(query_cells(), reference)
    assert query.conditions.context_keys == ("cell_type",) and query.conditions.components == ("A", "C")


def test_query_with_other_genes(reference: spd.PerturbDiff) -> None:
    with pytest.raises(ValueError, match=r"1 of the model's 20 genes are missing from adata.var_names: 'g3'"):
        spd.PerturbDiff.load_query_data(setup(query_cells()[:, [i for i in range(20) if i != 3]].copy()), reference)
    with pytest.raises(ValueError, match="in another order"):
        spd.PerturbDiff.load_query_data(setup(query_cells()[:, ::-1].copy()), reference)
    with pytest.raises(ValueError, match="reference_model is not trained"):
        spd.PerturbDiff.load_query_data(setup(query_cells()), spd.PerturbDiff(setup(make_cells()), **TINY))


def test_what_is_no_model_and_no_cells_is_named(reference: spd.PerturbDiff) -> None:
    with pytest.raises(TypeError, match=r"reference_model=5 must be a PerturbDiff or its folder"):
        spd.PerturbDiff.load_query_data(query_cells(), 5)
    with pytest.raises(TypeError, match="adata must be an AnnData, not int"):
        spd.PerturbDiff.load_query_data(5, reference)
