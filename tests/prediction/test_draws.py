"""How populations are drawn: from which controls, in which pieces, with which offsets, with how many evaluations."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import pytest
import torch
from tests.helpers import FEW_STEPS
from tests.screens import screen, tiny
from torch import Tensor

import scperturbdiff as spd
from scperturbdiff.prediction._batches import batch_codes

if TYPE_CHECKING:
    from collections.abc import Iterator

    from anndata import AnnData

    from scperturbdiff.diffusion import Generator

CONTROLS = 40
"""Control cells of each context."""
PIECE = 256


@pytest.fixture(scope="module")
def cells() -> AnnData:
    return screen(contexts=2, donors=1, perturbations=2, n_cells=CONTROLS)


@pytest.fixture(scope="module")
def trained(cells: AnnData) -> spd.PerturbDiff:
    model = tiny(cells)
    model.train(**FEW_STEPS, validation_size=0.0)
    return model


@pytest.fixture
def model(trained: spd.PerturbDiff) -> Iterator[spd.PerturbDiff]:
    """A model whose generator tests may change; its network has no weight."""
    kept = trained.module.generator_ema
    trained.module.generator_ema = copy.deepcopy(kept)
    trained.module.generator_ema.network_weight.fill_(0)
    yield trained
    trained.module.generator_ema = kept


@pytest.fixture
def generator(model: spd.PerturbDiff) -> Generator:
    return model.module.generator_ema


FACTORS = torch.tensor([[2.0, 0.0], [0.0, 1.0], [1.0, 0.0], [0.0, 0.0]])


def predict(model: spd.PerturbDiff, cells: AnnData, *names: str, **options: Any) -> AnnData:
    options = {"seed": 0, "progress": False} | options
    controls = cells[(cells.obs["perturbation"] == "control").to_numpy() & (cells.obs["cell_type"] == "C0").to_numpy()]
    return model.predict(controls.copy(), list(names), **options)


def standardised(model: spd.PerturbDiff, predicted: AnnData) -> np.ndarray:
    return model.module.standardize(torch.as_tensor(predicted.obsm["X_perturbdiff"])).numpy()


def listen(generator: Generator) -> list[dict[str, Any]]:
    """Arguments and results of every call of the generator."""
    calls: list[dict[str, Any]] = []
    sample = generator.sample

    def heard(start: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        drawn = sample(start, *args, **kwargs)
        calls.append({"start": start, "condition": args[0], "drawn": drawn, **kwargs})
        return drawn

    generator.sample = heard
    return calls


# ---- controls --------------------------------------------------------------------------------------------------------


def test_every_draw_starts_from_a_resample_of_the_controls(model: spd.PerturbDiff, cells: AnnData) -> None:
    """The first as the others: with as many cells as controls, less than half of them are used at all."""
    shares = []
    for seed in range(30):
        predicted = predict(model, cells, "P0", n_populations=2, seed=seed)
        assert predicted.obs["population"].tolist() == ["0"] * CONTROLS + ["1"] * CONTROLS
        used = predicted.obs.groupby("population", observed=True)["control_cell"].nunique()
        shares.append(used.to_numpy() / CONTROLS)
    shares = np.array(shares)
    # a control is missed by the resample and by the draw from it: 1 - exp(-1 + exp(-1)) of them are used
    assert shares.mean(0) == pytest.approx(np.full(2, 1 - np.exp(-1 + np.exp(-1))), abs=0.03)
    assert shares.max() < 0.7


def test_draws_have_one_law(model: spd.PerturbDiff, cells: AnnData, generator: Generator) -> None:
    """Means of the first draw vary as those of the second do, by controls and by replicates."""
    for factors in (torch.zeros(4, 0), FACTORS):
        generator.set_replicates(factors)
        means = []
        for seed in range(60):
            latent = standardised(model, predict(model, cells, "P0", n_populations=2, seed=seed))
            means.append([latent[:CONTROLS].mean(0), latent[CONTROLS:].mean(0)])
        first, second = np.array(means).transpose(1, 2, 0)
        ratio = first.var(1) / second.var(1)
        assert (ratio > 1 / 2.2).all() and (ratio < 2.2).all()  # F test, 60 draws, at 1 in 500
        assert np.abs(np.corrcoef(np.concatenate([first, second]))[:4, 4:]).max() < 0.5


def test_the_best_guess_uses_every_control_equally_often(model: spd.PerturbDiff, cells: AnnData) -> None:
    for n_cells in (None, CONTROLS, 3 * CONTROLS):
        predicted = predict(model, cells, "P0", n_cells=n_cells)
        times = predicted.obs["control_cell"].value_counts()
        assert len(times) == CONTROLS and times.nunique() == 1
    few = predict(model, cells, "P0", n_cells=CONTROLS + 7).obs["control_cell"].value_counts()
    assert few.min() == 1 and few.max() == 2 and few.sum() == CONTROLS + 7


# ---- offsets ---------------------------------------------------------------------------------------------------------


def test_the_best_guess_is_a_mixture(model: spd.PerturbDiff, cells: AnnData, generator: Generator) -> None:
    """Cells spread by the covariance of replicates; where the population lies does not depend on the seed."""
    n = 50 * CONTROLS

    def latents(seed: int) -> np.ndarray:
        return standardised(model, predict(model, cells, "P0", n_cells=n, seed=seed))

    plain = latents(0)
    generator.set_replicates(FACTORS)
    for seed in range(3):
        spread = latents(seed)
        added = np.cov(spread.T) - np.cov(plain.T)
        np.testing.assert_allclose(added, (FACTORS @ FACTORS.T).numpy(), rtol=0.1, atol=0.3)
        wander = FACTORS.norm(dim=1).numpy() / n**0.5
        assert (np.abs(spread.mean(0) - plain.mean(0)) < 4 * wander + 1e-3).all()


def test_a_draw_lies_as_a_replicate_does(model: spd.PerturbDiff, cells: AnnData, generator: Generator) -> None:
    """All cells of a draw have one offset, also where it is drawn in pieces; each draw has its own."""
    n = PIECE + 40
    options = {"n_populations": 3, "n_cells": n}
    plain = standardised(model, predict(model, cells, "P0", **options))
    generator.set_replicates(FACTORS)
    offset = (standardised(model, predict(model, cells, "P0", **options)) - plain).reshape(3, n, 4)
    assert np.ptp(offset, axis=1).max() < 1e-4
    assert np.abs(offset[:, 0, 0][:, None] - offset[:, 0, 0][None])[np.triu_indices(3, 1)].min() > 0.01
    np.testing.assert_allclose(offset[:, 0, 0], 2 * offset[:, 0, 2], atol=1e-4)  # along the factors
    assert np.abs(offset[..., 3]).max() < 1e-4


@pytest.mark.parametrize("n_populations", [None, 2])
@pytest.mark.parametrize("weight", [0.0, 1.0])
def test_control_populations_are_no_replicates(
    model: spd.PerturbDiff, cells: AnnData, generator: Generator, n_populations: int | None, weight: float
) -> None:
    generator.network_weight.fill_(weight)
    for parameter in generator.transformer.out.parameters():
        torch.nn.init.zeros_(parameter)
    plain = predict(model, cells, "control", n_populations=n_populations)
    generator.set_replicates(10 * FACTORS)
    varied = predict(model, cells, "control", n_populations=n_populations)
    np.testing.assert_array_equal(varied.obsm["X_perturbdiff"], plain.obsm["X_perturbdiff"])
    assert (varied.layers["counts"] != plain.layers["counts"]).nnz == 0
    treated = predict(model, cells, "P0", n_populations=n_populations)
    assert np.abs(standardised(model, treated)).max() > 5


# ---- pieces ----------------------------------------------------------------------------------------------------------


class Stub(torch.nn.Module):
    """A network that corrects every cell by something else."""

    def __init__(self, generator: Generator) -> None:
        super().__init__()
        self.control_encoder = generator.transformer.control_encoder
        self.seen: list[int] = []

    def forward(self, cells: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        self.seen.append(cells.shape[1])
        steps = torch.arange(cells.shape[1], dtype=cells.dtype)[None, :, None]
        return (3.0 + steps).expand(len(cells), -1, 4)


@pytest.mark.parametrize(
    ("n_cells", "pieces"),
    [
        (1, [1]),
        (PIECE, [PIECE]),
        (PIECE + 1, [129, 128]),
        (2 * PIECE, [PIECE, PIECE]),
        (2 * PIECE + 1, [171, 171, 171]),
    ],
)
@pytest.mark.parametrize("n_populations", [None, 1])
def test_large_populations_are_drawn_in_equal_pieces(
    model: spd.PerturbDiff,
    cells: AnnData,
    generator: Generator,
    n_cells: int,
    pieces: list[int],
    n_populations: int | None,
) -> None:
    """No last piece of a few cells, whose correction would be centred over them alone."""
    generator.network_weight.fill_(1)
    stub = Stub(generator)
    generator.transformer = stub
    calls = listen(generator)
    predicted = predict(model, cells, "P0", n_cells=n_cells, n_populations=n_populations)
    assert predicted.n_obs == n_cells and stub.seen == pieces == [c["start"].shape[1] for c in calls]
    for call in calls:
        correction = (call["drawn"] - call["condition"].prior.move(call["start"]))[0]
        m = len(correction)
        torch.testing.assert_close(correction.mean(0), torch.zeros(4), rtol=0, atol=1e-3)
        wanted = torch.arange(m) - (m - 1) / 2
        torch.testing.assert_close(correction, wanted[:, None].expand(-1, 4), rtol=0, atol=1e-3)
        assert torch.equal(call["population_noise"], calls[0]["population_noise"])
        assert call["mixture"] == (n_populations is None)


# ---- evaluations of the network --------------------------------------------------------------------------------------


@pytest.mark.parametrize("n_populations", [None, 2])
@pytest.mark.parametrize("options", [{}, {"n_steps": 5}, {"n_steps": 3, "sampler": "ddim", "guidance": 2.0}])
def test_a_network_without_weight_is_not_evaluated(
    model: spd.PerturbDiff,
    cells: AnnData,
    generator: Generator,
    n_populations: int | None,
    options: dict[str, Any],
) -> None:
    calls = listen(generator)

    def never(*args: Any, **kwargs: Any) -> Tensor:
        raise AssertionError("The network was evaluated.")

    generator.transformer.forward = never
    predicted = predict(model, cells, "P0", "P1", n_populations=n_populations, **options)
    assert len(calls) == 2 * (n_populations or 1)
    for call in calls:
        torch.testing.assert_close(call["drawn"], call["condition"].prior.move(call["start"]), rtol=0, atol=0)
    drawn = torch.cat([call["drawn"][0] for call in calls]).numpy()
    np.testing.assert_allclose(standardised(model, predicted), drawn, rtol=1e-4, atol=1e-5)
    assert predicted.uns["scperturbdiff"]["n_steps"] == 0
    generator.network_weight.fill_(1)
    assert predict(model, cells, "P0", n_steps=0).uns["scperturbdiff"]["n_steps"] == 0
    with pytest.raises(AssertionError, match="was evaluated"):
        predict(model, cells, "P0")


@pytest.mark.parametrize("n_steps", [1, 4])
def test_evaluations_are_counted(model: spd.PerturbDiff, cells: AnnData, generator: Generator, n_steps: int) -> None:
    generator.network_weight.fill_(1)
    stub = Stub(generator)
    generator.transformer = stub
    predicted = predict(model, cells, "P0", n_steps=n_steps)
    assert predicted.uns["scperturbdiff"]["n_steps"] == n_steps == len(stub.seen)


# ---- batches ---------------------------------------------------------------------------------------------------------


def test_decoding_as_a_batch_needs_batches(cells: AnnData) -> None:
    plain = cells.copy()
    spd.PerturbDiff.setup_anndata(plain, "perturbation", "control", context_keys=["cell_type"])
    model = tiny(plain)
    model.train(**FEW_STEPS)
    message = "transform_batch='D0', but the model was set up without batch_key"
    with pytest.raises(ValueError, match=message):
        predict(model, plain, "P0", transform_batch="D0")
    with pytest.raises(ValueError, match=message):
        model.get_normalized_expression(transform_batch="D0")
    assert predict(model, plain, "P0").n_obs == CONTROLS


def test_decoding_as_a_batch_that_is_not_there(model: spd.PerturbDiff, cells: AnnData) -> None:
    with pytest.raises(ValueError, match=r"transform_batch='D9' is not one of the training batches \['D0'\]"):
        predict(model, cells, "P0", transform_batch="D9")
    assert predict(model, cells, "P0", transform_batch="D0").n_obs == CONTROLS


def test_decoding_as_a_batch_that_is_a_number() -> None:
    assert batch_codes(2, lambda: pd.Series([7, 7]), ["7", "8"], "donor", 8).tolist() == [1, 1]
    assert batch_codes(2, lambda: pd.Series([8, 7]), ["7", "8"], "donor", None).tolist() == [1, 0]


def test_a_network_does_not_touch_controls(model: spd.PerturbDiff, cells: AnnData, generator: Generator) -> None:
    generator.network_weight.fill_(1)
    with_network, without = (predict(model, cells, "control", n_steps=n) for n in (1, 0))
    np.testing.assert_array_equal(with_network.obsm["X_perturbdiff"], without.obsm["X_perturbdiff"])
    assert (with_network.layers["counts"] != without.layers["counts"]).nnz == 0


def test_controls_have_the_noise_that_they_had_in_training(
    model: spd.PerturbDiff, cells: AnnData, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []
    retrieval = model.module.retrieval
    assert retrieval is not None
    plain = type(retrieval).predict

    def heard(self: Any, conditions: Any, *args: Any) -> Any:
        asked.append(conditions)
        return plain(self, conditions, *args)

    monkeypatch.setattr(type(retrieval), "predict", heard)
    predict(model, cells, "P0")
    known = retrieval.responses.conditions
    same = np.flatnonzero(np.abs(known.control_mean - asked[0].control_mean).max(1) < 1e-5)
    assert len(same)
    np.testing.assert_allclose(known.control_noise[same], asked[0].control_noise[0])
