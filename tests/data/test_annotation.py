"""Names, parts and values of columns that are refused at set-up, and names that are probably meant to be the same."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import pytest
from tests.helpers import SETUP

from scperturbdiff import PerturbDiff
from scperturbdiff.data import build_populations, check_unique_names, look_alikes, match_controls
from scperturbdiff.data._annotation import RESERVED

if TYPE_CHECKING:
    from collections.abc import Callable

    from anndata import AnnData


@pytest.fixture
def adata(screen: AnnData) -> AnnData:
    return screen.copy()


def setup(adata: AnnData, **arguments: Any) -> None:
    PerturbDiff.setup_anndata(adata, **{**SETUP, **arguments})


@pytest.mark.parametrize("name", [*sorted(RESERVED), "__perturbation", "__dose", "_scvi_batch", "perturbation", "dose"])
def test_names_that_predictions_use_are_refused(adata: AnnData, name: str) -> None:
    adata.obs = adata.obs.rename(columns={"perturbation": "guide"})
    adata.obs[name] = adata.obs["cell_type"]
    message = f"{name!r} is a name that predictions and tables of the model use.*adata.obs\\['my_"
    with pytest.raises(ValueError, match=f"context_keys={message}"):
        setup(adata, perturbation_key="guide", context_keys=["cell_type", name])
    with pytest.raises(ValueError, match=f"batch_key={message}"):
        setup(adata, perturbation_key="guide", batch_key=name)


def test_a_column_of_states_may_be_the_users(adata: AnnData) -> None:
    adata.obs["state"] = adata.obs["cell_type"]
    setup(adata, context_keys=["state"])


@pytest.mark.parametrize(
    ("arguments", "key"),
    [
        ({"context_keys": ["cell_type", "cell_type"]}, "cell_type"),
        ({"batch_key": "perturbation"}, "perturbation"),
        ({"context_keys": ["perturbation"]}, "perturbation"),
        ({"dose_key": "cell_type"}, "cell_type"),
        ({"categorical_covariate_keys": ["cell_type"]}, "cell_type"),
        (
            {"continuous_covariate_keys": ["hidden_factor"], "categorical_covariate_keys": "hidden_factor"},
            "hidden_factor",
        ),
    ],
)
def test_a_column_plays_one_part(adata: AnnData, arguments: dict[str, Any], key: str) -> None:
    with pytest.raises(ValueError, match=rf"obs\['{key}'\] is named by .* and by .*Leave it out of one"):
        setup(adata, **arguments)


def test_a_batch_may_be_a_context(adata: AnnData) -> None:
    setup(adata, context_keys=["cell_type", "donor"])
    setup(adata, categorical_covariate_keys="donor")


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("perturbation_key", 5),
        ("perturbation_key", ["perturbation"]),
        ("batch_key", 1.5),
        ("separator", 5),
        ("control", ["control"]),
        ("context_keys", 5),
        ("context_keys", [5]),
        ("categorical_covariate_keys", [None]),
        ("control_match_keys", 3),
    ],
)
def test_arguments_of_setup_are_texts(adata: AnnData, argument: str, value: Any) -> None:
    with pytest.raises(TypeError, match=f"{argument}=.* must be "):
        setup(adata, **{argument: value})


def dates(column: pd.Series) -> pd.Series:
    return pd.Series(pd.to_datetime(["2024-01-01", "2024-02-01"])[pd.factorize(column)[0] % 2], column.index)


KINDS: dict[str, Callable[[pd.Series], pd.Series]] = {
    "datetime64": dates,
    "mixed-integer": lambda column: pd.Series([1, "2"] * (len(column) // 2), column.index, dtype=object),
    "mixed-integer-float": lambda column: pd.Series([1, 2.0] * (len(column) // 2), column.index, dtype=object),
    "interval": lambda column: pd.cut(pd.Series(np.arange(len(column)), column.index), 2),
    "bytes": lambda column: pd.Series([b"a"] * len(column), column.index, dtype=object),
}


@pytest.mark.parametrize("kind", list(KINDS))
@pytest.mark.parametrize("key", ["cell_type", "donor"])
def test_values_that_are_not_the_same_in_every_table_are_refused(adata: AnnData, kind: str, key: str) -> None:
    adata.obs[key] = KINDS[kind](adata.obs[key])
    with pytest.raises(ValueError, match=rf"obs\['{key}'\] holds values of kind '{kind}'.*astype\(str\)"):
        setup(adata)


@pytest.mark.parametrize("bad", ["a\x00b", "a\ud800"])
def test_names_that_no_file_can_hold_are_refused(adata: AnnData, bad: str) -> None:
    for key, old in (("perturbation", "P01"), ("cell_type", "C1"), ("donor", "D1")):
        changed = adata.copy()
        changed.obs[key] = changed.obs[key].astype(object).replace(old, bad)
        with pytest.raises(ValueError, match=rf"obs\['{key}'\] has 1 names with NUL or half characters"):
            setup(changed)
    adata.var.index = pd.Index([bad, *adata.var_names[1:]], dtype=object)
    with pytest.raises(ValueError, match="adata.var_names has 1 names with NUL"):
        check_unique_names(adata)


@pytest.mark.parametrize("role", ["continuous_covariate_keys", "context_keys", "batch_key"])
def test_a_column_different_in_every_cell_is_refused(adata: AnnData, role: str) -> None:
    adata.obs["age"] = np.arange(adata.n_obs) / 7 if role[:3] == "con" and "cov" in role else adata.obs_names
    value = "age" if role == "batch_key" else ["age"]
    with pytest.raises(ValueError, match=r"obs\['age'\] has \d+ different values in \d+ treated cells.*Round it"):
        setup(adata, **{role: value})


def test_a_value_a_donor_is_not_one_a_cell(adata: AnnData) -> None:
    adata.obs["age"] = adata.obs["donor"].map({"D1": 30.5, "D2": 41.0}).astype(float)
    setup(adata, continuous_covariate_keys=["age"])


def test_too_many_groups_are_refused_before_they_are_compared(adata: AnnData, monkeypatch: pytest.MonkeyPatch) -> None:
    setup(adata)
    space = PerturbDiff(adata, n_latent=4).conditions
    monkeypatch.setattr("scperturbdiff.data._populations.MOST_PAIRS", 35)  # 3 contexts in 2 batches: 6 x 6
    with pytest.raises(ValueError, match="6 groups of treated and 6 of control cells .* too many"):
        build_populations(space, adata.obs)
    monkeypatch.setattr("scperturbdiff.data._populations.MOST_PAIRS", 36)
    assert len(build_populations(space, adata.obs)) == 30


def test_populations_that_agree_on_all_keys_have_the_same_controls() -> None:
    """Against a comparison of every population with every group."""
    rng = np.random.default_rng(0)
    columns = {key: rng.choice(["a", "b", "c"], 60) for key in "xyz"}
    populations, controls = pd.DataFrame(columns)[:40], pd.DataFrame(columns)[40:].reset_index(drop=True)
    found = match_controls(populations, controls, np.arange(100, 120), ["x", "y", "z"])
    for i, row in enumerate(populations.itertuples(index=False)):
        agree = np.array(
            [[a == b for a, b in zip(row, other, strict=True)] for other in controls.itertuples(index=False)]
        )
        score = agree.sum(1) + agree @ 0.5 ** np.arange(2, 5)
        expected = 100 + np.flatnonzero(score == score.max())
        assert sorted(found.groups[found.group[i]]) == expected.tolist()
        assert found.n_agreeing[i] == agree.sum(1)[score.argmax()]


def test_names_that_look_alike() -> None:
    assert look_alikes(["c1", " C1 ", "C2", "1.0", "2", "x"], ["C1", "1", "2.0", "C2"]) == {
        " C1 ": "C1",
        "1.0": "1",
        "2": "2.0",
        "c1": "C1",
    }
    assert look_alikes(["T\x1fd1"], ["T\x1fD1", "T"]) == {"T\x1fd1": "T\x1fD1"}


def test_a_label_that_looks_like_the_control_is_told(adata: AnnData, caplog: pytest.LogCaptureFixture) -> None:
    adata.obs["perturbation"] = adata.obs["perturbation"].astype(str).replace("P01", "Control")
    adata.obs["cell_type"] = adata.obs["cell_type"].astype(str).replace("C2", "c1")
    with caplog.at_level("WARNING"):
        setup(adata)
    assert "1 perturbations differ from the control by case" in caplog.text and "'Control', 'control'" in caplog.text
    assert "1 contexts differ by case" in caplog.text and "'C1', 'c1'" in caplog.text
