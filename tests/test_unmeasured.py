"""What was never measured is predicted better than by simple rules, on simulated screens whose truth is known."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import pytest
from tests.helpers import FEW_STEPS, TINY

import scperturbdiff as spd
from scperturbdiff.evaluation.baselines import NoChange, PerturbationMeanShift, default_baselines

if TYPE_CHECKING:
    from anndata import AnnData

    from scperturbdiff.evaluation.baselines import Baseline

KEYS: dict[str, Any] = {"perturbation_key": "perturbation", "control": "control", "context_keys": ["cell_type"]}
BRIEF: dict[str, Any] = {"max_epochs_generator": 8, "enable_progress_bar": False, "accelerator": "cpu"}


def screens(n_cells: int = 40, n_fresh: int = 200, seed: int = 3, **arguments: Any) -> tuple[AnnData, AnnData]:
    """A screen to train on, and more cells of the same laws to score against."""
    arguments |= {"n_genes": 300, "n_batches": 1, "seed": seed}
    train, fresh = (
        spd.datasets.simulate(n_cells_per_population=n, n_control_cells=max(200, 2 * n), **arguments)
        for n in (n_cells, n_fresh)
    )
    return train, fresh


def trained(adata: AnnData, **setup: Any) -> spd.PerturbDiff:
    spd.PerturbDiff.setup_anndata(adata, **KEYS, **setup)
    model = spd.PerturbDiff(adata)
    model.train(seed=0, **BRIEF)
    return model


def compare(
    models: dict[str, spd.PerturbDiff],
    train: AnnData,
    real: AnnData,
    baselines: dict[str, Baseline],
    dose_key: str | None = None,
) -> pd.DataFrame:
    """Mean of each metric over the conditions of `real`, for the models and baselines."""
    conditions = [dose_key] if dose_key else []
    treated = real[(real.obs["perturbation"] != "control").to_numpy()]
    wanted = treated.obs[["perturbation", "cell_type", *conditions]].drop_duplicates()
    wanted = wanted.astype({"perturbation": str, "cell_type": str})
    controls = real[(real.obs["perturbation"] == "control").to_numpy()].copy()  # as the baselines do
    table = spd.evaluate(
        {name: m.predict(controls, wanted, n_cells=200, seed=0, progress=False) for name, m in models.items()},
        real,
        "control",
        perturbation_key="perturbation",
        context_keys=["cell_type"],
        condition_keys=conditions,
        train=train,
        baselines={name: rule.fit(train, **KEYS, dose_key=dose_key) for name, rule in baselines.items()},
        metrics=["energy_distance", "pearson_delta", "pearson_delta_top", "mse_mean"],
        ceiling=False,
    )
    return table.groupby(["model", "metric"])["value"].mean().unstack()


def of_split(fresh: AnnData, split: spd.splits.Split) -> AnnData:
    """Fresh cells of the conditions that a split holds out, and their controls."""
    names = ["perturbation", "cell_type"]
    held = pd.MultiIndex.from_frame(fresh.obs[names].astype(str)).isin(
        pd.MultiIndex.from_frame(split.held_out[names].astype(str))
    )
    control = (fresh.obs["perturbation"] == "control").to_numpy()
    return fresh[held | (control & fresh.obs["cell_type"].isin(split.held_out["cell_type"]).to_numpy())].copy()


@pytest.mark.slow
def test_held_out_pairs_of_a_small_screen() -> None:
    """What perturbations do depends on the context: the model must beat both no change and the mean over contexts."""
    screen = spd.datasets.simulate(8, 8, 30, 150, n_batches=1, effect_scale=2.0, seed=2)
    split = spd.splits.hold_out_pairs(screen, **KEYS, fraction=0.2, seed=2)
    train, real = screen[split.train].copy(), screen[split.test | split.controls].copy()
    spd.PerturbDiff.setup_anndata(train, **KEYS)
    model = spd.PerturbDiff(train, **TINY | {"n_latent": 16, "n_hidden": 64})
    model.train(**FEW_STEPS | {"max_epochs_vae": 20})
    score = compare({"model": model}, train, real, default_baselines("pairs"))["energy_distance"]
    assert score["model"] < 0.3 * score["no_change"]
    assert score["model"] < 0.5 * score["perturbation_mean_shift"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("interaction", "size", "seeds"),
    # one screen of 24 pairs to learn from and 6 to predict says little: interactions of one pair may decide it
    [(1.0, (12, 40), [3]), (1.0, (10, 30), [0, 1, 3]), (0.0, (10, 30), [3])],
)
def test_combinations_against_adding_up(interaction: float, size: tuple[int, int], seeds: list[int]) -> None:
    scores = []
    for seed in seeds:
        train, fresh = screens(
            seed=seed, n_contexts=2, n_perturbations=size[0], combinations=size[1], interaction=interaction
        )
        split = spd.splits.hold_out_combinations(train, **KEYS, fraction=0.2)
        train = train[split.train].copy()
        rules = default_baselines("combinations")
        scores.append(compare({"model": trained(train.copy())}, train, of_split(fresh, split), rules))
    score = sum(scores) / len(scores)
    better = score.loc["model"] / score.loc["additive"]
    assert better["energy_distance"] < (0.9 if len(seeds) == 1 else 1.0)
    assert better["pearson_delta"] > (1.0 if interaction else 0.95)


@pytest.mark.slow
def test_doses_between_and_beyond() -> None:
    train, fresh = screens(200, 1000, n_contexts=2, n_perturbations=5, doses=(0.1, 0.3, 1.0, 3.0, 10.0, 30.0))
    train = train[~train.obs["dose"].isin([1.0, 30.0]).to_numpy()].copy()
    model = trained(train, dose_key="dose")
    rules = {"no_change": NoChange(), "nearest": PerturbationMeanShift("own")}
    for dose in (1.0, 30.0):
        real = fresh[fresh.obs["dose"].isin([0.0, dose]).to_numpy()].copy()
        score = compare({"model": model}, train, real, rules, "dose")
        assert score.loc["model", "pearson_delta_top"] > 0.85
        assert score.loc["model", "energy_distance"] < 0.5 * score.loc["no_change", "energy_distance"]
        assert score.loc["model", "energy_distance"] < score.loc["nearest", "energy_distance"]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["informative", "random"])
def test_unseen_perturbations_live_on_their_features(kind: str) -> None:
    train, fresh = screens(n_contexts=2, n_perturbations=30, n_features=16, features=kind)
    split = spd.splits.hold_out_perturbations(train, **KEYS, fraction=0.2)
    rules = default_baselines("perturbations", train.uns["perturbation_embedding"])
    model = trained(train[split.train].copy(), perturbation_embeddings="perturbation_embedding")
    score = compare({"model": model}, train[split.train].copy(), of_split(fresh, split), rules)["pearson_delta"]
    if kind == "informative":
        assert score["model"] > score[["context_mean_shift", "feature_nearest", "feature_ridge"]].max()
    else:
        assert score["model"] < score["context_mean_shift"] + 0.05


@pytest.mark.slow
def test_a_context_known_by_its_controls() -> None:
    train, fresh = screens(n_contexts=10, n_perturbations=8)
    split = spd.splits.hold_out_contexts(train, **KEYS, fraction=0.2)
    model = trained(train[split.train].copy())
    score = compare({"model": model}, train[split.train].copy(), of_split(fresh, split), default_baselines("contexts"))
    assert score.loc["model", "energy_distance"] < 0.9 * score.loc["perturbation_mean_shift", "energy_distance"]
    assert score.loc["model", "mse_mean"] < score.loc["perturbation_mean_shift", "mse_mean"]


@pytest.mark.slow
def test_pretraining_on_unperturbed_cells_helps_a_small_experiment() -> None:
    sizes = {"n_contexts": 5, "n_perturbations": 8, "n_genes": 300, "n_batches": 1}
    screen = spd.datasets.simulate(**sizes, n_cells_per_population=120, n_control_cells=500, seed=3)
    twentieth = np.random.default_rng(0).random(screen.n_obs) < 0.05
    small, rest = screen[twentieth].copy(), screen[~twentieth].copy()
    atlas = rest[(rest.obs["perturbation"] == "control").to_numpy()].copy()
    spd.PerturbDiff.setup_anndata(atlas, context_keys=["cell_type"])
    reference = spd.PerturbDiff(atlas)
    reference.train(seed=0, **BRIEF)
    scratch = trained(small)
    pretrained = spd.PerturbDiff.load_query_data(small, reference)
    pretrained.train(seed=0, **BRIEF)
    score = compare({"pretrained": pretrained, "scratch": scratch}, small, rest, {"no_change": NoChange()})
    assert score.loc["pretrained", "energy_distance"] < score.loc["scratch", "energy_distance"]
    assert score.loc["pretrained", "energy_distance"] < score.loc["no_change", "energy_distance"]
