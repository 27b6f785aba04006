"""What users of scvi-tools call on every model: decoded expression; differential expression, which is not offered."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import pytest
import torch

if TYPE_CHECKING:
    from anndata import AnnData

    from scperturbdiff import PerturbDiff


def test_shares_of_genes_of_the_cells_own_latent_vectors(trained_model: PerturbDiff, screen: AnnData) -> None:
    table = trained_model.get_normalized_expression(n_samples=200, seed=0)
    assert isinstance(table, pd.DataFrame)
    assert table.index.equals(screen.obs_names) and table.columns.equals(screen.var_names)
    np.testing.assert_allclose(table.sum(axis=1), 1, rtol=1e-4)
    # the mean over draws is near what the middle of the posterior decodes to
    vae, latent = trained_model.module.vae, torch.as_tensor(trained_model.get_latent_representation())
    codes = torch.as_tensor(screen.obs["donor"].cat.codes.to_numpy(dtype=np.int64, copy=True))
    middle = vae.decode_frequencies(latent, codes).detach().numpy()
    one = trained_model.get_normalized_expression(seed=0)
    errors = [np.abs(found.to_numpy() - middle).mean() for found in (table, one)]
    assert errors[0] < 0.1 * middle.mean() and errors[0] < errors[1]


def test_draws_are_scvi_tools_own(trained_model: PerturbDiff, screen: AnnData) -> None:
    """The same law as of `scvi.module.VAE.inference` and `generative`, which draw in another order."""
    rows = np.arange(40)
    ours = trained_model.get_normalized_expression(
        indices=rows, n_samples=500, return_mean=False, library_size="latent", seed=1
    )
    assert ours.shape == (500, 40, screen.n_vars)
    vae, counts = trained_model.module.vae, torch.as_tensor(screen.X[:40].toarray().astype(np.float32))
    batch = torch.as_tensor(screen.obs["donor"].cat.codes.to_numpy(dtype=np.int64, copy=True))[:40, None]
    torch.manual_seed(0)
    with torch.no_grad():
        inferred = vae.inference(counts, batch, n_samples=500)
        theirs = vae.generative(inferred["z"], inferred["library"], batch)["px"].mu.numpy()
    np.testing.assert_allclose(ours.mean(0).sum(0), theirs.mean(0).sum(0), rtol=0.03)
    np.testing.assert_allclose(ours.std(0).mean(), theirs.std(0).mean(), rtol=0.05)
    np.testing.assert_allclose(ours.sum(-1), np.broadcast_to(counts.sum(1), (500, 40)), rtol=1e-3)


def test_what_is_asked_for_is_what_comes(trained_model: PerturbDiff, screen: AnnData) -> None:
    genes = [screen.var_names[7], screen.var_names[2]]
    ask = trained_model.get_normalized_expression
    whole = ask(seed=3)
    some = ask(indices=[5, 1], gene_list=genes, library_size=1e4, seed=3)
    assert list(some.index) == [screen.obs_names[5], screen.obs_names[1]] and list(some.columns) == genes
    np.testing.assert_allclose(ask(batch_size=7, seed=3), whole, rtol=1e-5)
    np.testing.assert_array_equal(ask(seed=3, return_numpy=True), whole.to_numpy())
    np.testing.assert_array_equal(ask(screen, seed=3), whole)
    assert not np.array_equal(ask(seed=4), whole)
    np.testing.assert_allclose(ask(gene_list=genes, library_size=1e4, seed=3), 1e4 * whole[genes], rtol=1e-4)
    draws = ask(n_samples=3, return_mean=False, seed=3)
    np.testing.assert_allclose(draws.mean(0), ask(n_samples=3, seed=3), rtol=1e-5)
    assert ask(indices=np.zeros(screen.n_obs, bool)).shape == (0, screen.n_vars)
    before = torch.random.get_rng_state()
    ask(seed=3)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_batches(trained_model: PerturbDiff, screen: AnnData) -> None:
    ask = trained_model.get_normalized_expression
    own, first = ask(seed=0), ask(seed=0, transform_batch="D1")
    in_first = (screen.obs["donor"] == "D1").to_numpy()
    np.testing.assert_array_equal(own[in_first], first[in_first])
    assert not np.allclose(own[~in_first], first[~in_first], rtol=1e-3)
    other = screen.copy()
    other.obs["donor"] = "D9"
    with pytest.raises(ValueError, match=r"batches never seen.*: 'D9'\. Known: 'D1', 'D2'\. Pass transform_batch"):
        ask(other)
    np.testing.assert_array_equal(ask(other, seed=0, transform_batch="D1"), first)
    with pytest.raises(ValueError, match="transform_batch='D7' is not one of the training batches"):
        ask(transform_batch="D7")
    del other.obs["donor"]
    with pytest.raises(KeyError, match="batch_key='donor' is not a column"):
        ask(other)


def test_wrong_arguments_are_named(trained_model: PerturbDiff) -> None:
    ask = trained_model.get_normalized_expression
    for wrong, told in (
        ({"gene_list": ["IFIT1"]}, "1 of the 1 genes wanted are missing from model.var_names: 'IFIT1'"),
        ({"library_size": 0}, r"library_size=0 must be a number in \(0, inf\)"),
        ({"n_samples": 0}, "n_samples=0 must be a whole number"),
        ({"n_samples": 2, "return_mean": False, "return_numpy": False}, "draws that are not averaged are no table"),
    ):
        with pytest.raises(ValueError, match=told):
            ask(**wrong)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="library_size='observed' must be a number"):
        ask(library_size="observed")


def test_differential_expression_says_what_to_use(trained_model: PerturbDiff) -> None:
    with pytest.raises(AttributeError, match=r"scanpy.tl.rank_genes_groups.*evaluate.*model.response") as caught:
        trained_model.differential_expression(groupby="perturbation")
    assert "has no differential_expression" in str(caught.value)
