"""Short trainings without some conditions: what they see, what they leave alone, what they tell."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scvi
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import sparse
from tests.screens import screen, table_of, tiny

import scperturbdiff as spd
from scperturbdiff.latent import train_shortly
from scperturbdiff.responses import measure_populations
from scperturbdiff.retrieval import Retrieval
from scperturbdiff.training import ShortTraining, _unseen
from scperturbdiff.training._unseen import UnseenPopulations, excerpt

if TYPE_CHECKING:
    from anndata import AnnData

    from scperturbdiff.retrieval import Novelty

HOW = ShortTraining(n_steps=2, batch_size=32)


def unseen(adata: AnnData, features: np.ndarray | None = None) -> UnseenPopulations:
    model, table = tiny(adata), table_of(adata)
    latent = model.module.encode([adata.X])
    batch = np.unique(adata.obs["donor"], return_inverse=True)[1]
    measured = measure_populations(table, latent, adata.X, batch, model.module.shares)
    model.module.retrieval = Retrieval.fit(measured.responses, features)
    return UnseenPopulations(model.module, measured, adata.X, batch, features, HOW, seed=0)


@given(n_cells=st.integers(1, 400), seed=st.integers(0, 5))
def test_an_excerpt_has_the_same_populations_and_fewer_cells(n_cells: int, seed: int) -> None:
    adata = screen(contexts=2, donors=2, perturbations=3, n_cells=9)
    table = table_of(adata).take(np.array([1, 4, 5, 7]))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_unseen, "SETTINGS", type(_unseen.SETTINGS)(unseen_least=2))
        few, cells = excerpt(table, n_cells, np.random.default_rng(seed))
    pd.testing.assert_frame_equal(few.labels, table.labels)
    assert (np.diff(cells) > 0).all()
    for i in range(len(table)):
        treated, controls = cells[few.cells[i]], cells[few.match.groups[few.match.group[i]]]
        assert set(treated) <= set(table.cells[i])
        assert set(controls) <= set(table.match.groups[table.match.group[i]])
        assert min(len(treated), len(controls)) >= 2
    assert len(cells) <= max(n_cells, 4 * 2 + len(few.match.groups) * 2)


@pytest.mark.parametrize("novelty", ["context", "pair", "perturbation"])
def test_treated_cells_of_what_is_left_out_are_not_trained_on(
    novelty: Novelty, monkeypatch: pytest.MonkeyPatch
) -> None:
    adata = screen(contexts=3, donors=1, perturbations=4, n_cells=6, features=True)
    features = np.random.default_rng(0).normal(size=(4, 2))
    leaves_out, seen = unseen(adata, features), list[np.ndarray]()

    def spy(vae: Any, counts: sparse.csr_matrix, *args: Any, **kwargs: Any) -> None:
        seen.append(counts.toarray())
        train_shortly(vae, counts, *args, **kwargs)

    monkeypatch.setattr(_unseen, "train_shortly", spy)
    spaces = list(leaves_out.spaces(novelty))
    assert len(spaces) == len(seen) == (2 if novelty == "context" else 1)
    known = leaves_out.module.retrieval
    assert known is not None
    for space, counts in zip(spaces, seen, strict=True):
        table, other = space.held_out.table, space.known.table
        assert len(table) and len(table) + len(other) == 12
        left_out = np.unique(table.cells.rows)
        assert len(counts) == space.matrix.shape[0] - len(left_out)
        assert counts.sum() == space.matrix.sum() - space.matrix[left_out].sum()
        held = set(table.context if novelty == "context" else table.component[:, 0])
        kept = set(other.context if novelty == "context" else other.component[:, 0])
        assert held.isdisjoint(kept) == (novelty != "pair")
        assert space.module.retrieval is not None
        assert {str(way) for way in space.module.retrieval.predict(space.held_out.responses.conditions).novelty} == {
            novelty
        }


def test_the_trained_module_is_left_alone() -> None:
    leaves_out = unseen(screen(contexts=2, donors=1, perturbations=2, n_cells=6))
    module, before = leaves_out.module, {k: v for k, v in leaves_out.module.state_dict().items() if k != "_extra_state"}
    before = {name: value.clone() for name, value in before.items()}
    retrieval, random = module.retrieval, torch.get_rng_state()
    first, second = (list(leaves_out.spaces("context")) for _ in range(2))
    assert torch.equal(random, torch.get_rng_state())
    assert module.retrieval is retrieval and module.by_state is None
    for name, value in module.state_dict().items():
        assert name == "_extra_state" or torch.equal(value, before[name]), name
    for one, other in zip(first, second, strict=True):
        np.testing.assert_array_equal(one.held_out.latent, other.held_out.latent)
        assert one.module.vae is not module.vae and one.module.generator is module.generator
        assert not torch.equal(one.module.latent_scale, module.latent_scale)


def test_where_nothing_can_be_left_out_there_is_no_space() -> None:
    leaves_out = unseen(screen(contexts=1, donors=2, perturbations=1, n_cells=6))
    assert not [space for way in ("context", "pair") for space in leaves_out.spaces(way)]  # type: ignore[arg-type]


def test_a_short_training_learns() -> None:
    rng = np.random.default_rng(0)
    rates = np.exp(rng.normal(1.0, 1.5, (2, 1, 12)))
    counts = sparse.csr_matrix(
        np.concatenate([rng.poisson(np.broadcast_to(r, (100, 12))) for r in rates]), dtype=np.float32
    )
    vae = tiny(screen()).module.vae

    def error() -> float:
        latent = vae.encode(torch.as_tensor(counts.toarray()))
        shares = vae.decode_frequencies(latent, torch.zeros(200, dtype=torch.long)).detach().numpy()
        true = np.repeat(rates[:, 0] / rates.sum(-1), 100, axis=0)
        return float(np.abs(shares - true).sum(1).mean())

    vae.eval()
    before = error()
    train_shortly(vae, counts, np.zeros(200, np.int64), 150, 32, lr=1e-2)
    assert not vae.training
    assert error() < 0.5 * before


def additive(n_contexts: int, n_perturbations: int, seed: int) -> AnnData:
    """Types differ in every gene, and effects in log rates are the same in all."""
    rng, n_genes = np.random.default_rng(seed), 150
    level, types = rng.normal(0, 1.5, n_genes), rng.normal(0, 0.6, (n_contexts, n_genes))
    effects = rng.normal(0, 1.0, (n_perturbations, n_genes)) * (rng.random((n_perturbations, n_genes)) < 0.15)
    counts, obs = [], []
    for c in range(n_contexts):
        for p in range(-1, n_perturbations):
            rates = np.exp(level + types[c] + (effects[p] if p >= 0 else 0))
            counts.append(rng.poisson(1000 * rates / rates.sum() * rng.gamma(5, 0.2, (50, n_genes))))
            obs += [("control" if p < 0 else f"P{p}", f"C{c}")] * 50
    table = pd.DataFrame(obs, columns=["perturbation", "context"], index=[f"cell{i}" for i in range(len(obs))])
    genes = pd.DataFrame(index=[f"g{i}" for i in range(n_genes)])
    return ad.AnnData(sparse.csr_matrix(np.concatenate(counts).astype(np.float32)), obs=table, var=genes)


def test_fold_changes_are_followed_where_a_decoder_cannot_know(monkeypatch: pytest.MonkeyPatch) -> None:
    """It has seen the treated cells of training contexts, and there it needs no fold changes."""
    cells = additive(4, 3, seed=0)
    new = (cells.obs["context"] == "C3").to_numpy()
    treated = (cells.obs["perturbation"] != "control").to_numpy()
    train = cells[~(new & treated)].copy()

    def weights() -> dict[str, float]:
        scvi.settings.seed = 0
        spd.PerturbDiff.setup_anndata(train, "perturbation", "control", context_keys=["context"])
        model = spd.PerturbDiff(train)
        model.train(max_epochs_vae=120, accelerator="cpu", enable_progress_bar=False, seed=0)
        assert model.report_ is not None
        return model.report_.fold_weight

    found = weights()
    monkeypatch.setattr(UnseenPopulations, "spaces", lambda *_: iter(()))
    seen = weights()
    assert found["context"] > seen["context"] + 0.1 and found["pair"] > seen["pair"] + 0.1
    assert found["replicate"] == seen["replicate"]


def test_pairs_that_are_left_out_leave_their_context_and_perturbation_known() -> None:
    """In every draw; and distances are those of the trained latent space."""
    adata = screen(contexts=4, donors=1, perturbations=3, n_cells=6)
    leaves_out = unseen(adata)
    for seed in range(20):
        leaves_out.seed = seed
        (held,) = leaves_out._folds("pair")
        table = leaves_out.cells[0]
        known = np.setdiff1d(np.arange(len(table)), held)
        assert set(table.context[held]) <= set(table.context[known])
        assert set(table.component[held, 0]) <= set(table.component[known, 0])
    (space,) = leaves_out.spaces("pair")
    assert space.module.retrieval is not None and leaves_out.module.retrieval is not None
    median = space.unit * space.module.retrieval.median_distance
    assert median == pytest.approx(leaves_out.module.retrieval.median_distance)
