"""Weights, latent vectors and counts that are not finite are errors, never cells."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch

from scperturbdiff.prediction import _destinations

if TYPE_CHECKING:
    from collections.abc import Callable

    from scperturbdiff import PerturbDiff
    from scperturbdiff.module import PerturbDiffModule


@pytest.fixture
def model(trained_model: PerturbDiff) -> PerturbDiff:
    return copy.deepcopy(trained_model)


def spoil(name: str, value: float = np.nan) -> Callable[[PerturbDiffModule], None]:
    def spoilt(module: PerturbDiffModule) -> None:
        named = {**dict(module.named_parameters()), **dict(module.named_buffers())}
        with torch.no_grad():
            named[name].view(-1)[0] = value

    return spoilt


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("vae.z_encoder.mean_encoder.weight", np.nan),
        ("vae.decoder.px_scale_decoder.0.weight", np.inf),
        ("vae.px_r", np.nan),
        ("latent_mean", np.nan),
        ("latent_scale", np.inf),
        ("generator_ema.replicate_factors", np.nan),
    ],
)
def test_weights_are_named(model: PerturbDiff, name: str, value: float) -> None:
    spoil(name, value)(model.module)
    with pytest.raises(ValueError, match=f"Weights are NaN or infinite: .*{name}") as error:
        model.predict(perturbations=["P01"], progress=False)
    assert len(str(error.value)) < 250
    with pytest.raises(ValueError, match=name):
        model.response(perturbations=["P01"], progress=False)


def test_dispersions_that_are_next_to_infinite_are_named(model: PerturbDiff) -> None:
    spoil("vae.px_r", 200.0)(model.module)
    with pytest.raises(ValueError, match=r"exp\(vae.px_r\)"):
        model.predict(perturbations=["P01"], progress=False)


def test_a_network_counts_where_it_is_used(model: PerturbDiff) -> None:
    spoil("generator_ema.hidden")(model.module)
    weight = model.module.generator_ema.network_weight
    weight.fill_(0)
    assert np.isfinite(model.predict(perturbations=["P01"], n_cells=2, progress=False).obsm["X_perturbdiff"]).all()
    weight.fill_(0.5)
    with pytest.raises(ValueError, match="generator_ema.hidden"):
        model.predict(perturbations=["P01"], progress=False)


def test_latent_vectors_are_finite(model: PerturbDiff) -> None:
    spoil("vae.z_encoder.mean_encoder.bias")(model.module)
    with pytest.raises(ValueError, match="Latent vectors are NaN or infinite"):
        model.get_latent_representation()


def test_what_is_retrieved_is_finite(model: PerturbDiff) -> None:
    module = model.module
    assert module.retrieval is not None
    whole, found = module.retrieval, module.retrieval.responses
    for name in ("shift", "spread", "library", "residual", "fold"):
        spoilt = replace(found, **{name: getattr(found, name) * np.nan})
        module.retrieval = replace(whole, responses=spoilt)
        with pytest.raises(ValueError, match="Retrieved responses are NaN or infinite"):
            model.predict(perturbations=["P01"], progress=False)


def test_drawn_cells_are_finite(model: PerturbDiff, monkeypatch: pytest.MonkeyPatch) -> None:
    module = model.module
    respond, sample = _destinations.respond, module.generator_ema.sample
    monkeypatch.setattr(_destinations, "respond", lambda *args: respond(*args) * np.nan)
    with pytest.raises(ValueError, match="Predicted counts are NaN or infinite"):
        model.predict(perturbations=["P01"], progress=False)
    monkeypatch.setattr(module.generator_ema, "sample", lambda *args, **kwargs: sample(*args, **kwargs) * np.inf)
    with pytest.raises(ValueError, match="Predicted latent vectors are NaN or infinite"):
        model.predict(perturbations=["P01"], progress=False)
