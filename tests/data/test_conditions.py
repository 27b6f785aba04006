"""Reading of labels, doses, covariates and features, and what is said about bad ones."""

from __future__ import annotations

import logging
from dataclasses import asdict, replace
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from scipy import sparse

from scperturbdiff.data import DOSE, PERTURBATION, ConditionSpace, FeatureTable
from scperturbdiff.data._labels import Labels, dose_text, read_doses, scale_dose
from scperturbdiff.data._setup import learn_conditions
from scperturbdiff.prediction._request import read_controls


def cells(labels: list[Any], **columns: list[Any]) -> ad.AnnData:
    obs = pd.DataFrame({"perturbation": pd.Series(labels, dtype=object), **columns})
    obs.index = [f"cell{i}" for i in range(len(obs))]
    return ad.AnnData(sparse.csr_matrix(np.ones((len(obs), 2), np.int64)), obs=obs)


def learn(adata: ad.AnnData, **kwargs: Any) -> ConditionSpace:
    arguments = {
        "perturbation_key": "perturbation",
        "control": "control",
        "context_keys": None,
        "batch_key": None,
        "dose_key": None,
        "categorical_covariate_keys": None,
        "continuous_covariate_keys": None,
        "perturbation_embeddings": None,
        "control_match_keys": None,
        "separator": "+",
    }
    return learn_conditions(adata, **(arguments | kwargs))


def read(space: ConditionSpace, adata: ad.AnnData, column: str = PERTURBATION) -> list[str]:
    return space.read_labels(adata.obs)[column].tolist()


# ---- labels --------------------------------------------------------------------------------------------------------


def test_a_combination_has_one_name() -> None:
    adata = cells(["B+A", "A + B", "A", "control", "control+B", "A+B+C", "C+B+A"])
    space = learn(adata)
    assert read(space, adata) == ["A+B", "A+B", "A", "control", "B", "A+B+C", "A+B+C"]
    assert space.components == ("A", "B", "C")
    assert space.is_control(space.read_labels(adata.obs)).tolist() == [False, False, False, True, False, False, False]


def test_another_separator() -> None:
    adata = cells(["A+B|C", "C|A+B", "control"])
    space = learn(adata, separator="|")
    assert read(space, adata) == ["A+B|C", "A+B|C", "control"]
    assert space.components == ("A+B", "C")
    with pytest.raises(ValueError, match="separator must not be empty"):
        learn(adata, separator="")


def test_lists_of_names() -> None:
    adata = cells([["A", "B"], ("B", "A"), np.array(["A"]), {"B"}, ["control"], ["control", "A"]])
    space = learn(adata)
    assert read(space, adata) == ["A+B", "A+B", "A", "B", "control", "A"]
    assert space.components == ("A", "B")


def test_lists_beside_plain_names() -> None:
    adata = cells([["TNF", "IL6"], "control", "TNF", ["IL6"]])
    space = learn(adata)
    assert read(space, adata) == ["IL6+TNF", "control", "TNF", "IL6"]
    assert space.components == ("IL6", "TNF")


def test_names_that_are_numbers() -> None:
    adata = cells([0, 7, 10, 7])
    space = learn(adata, control=0)
    assert read(space, adata) == ["0", "7", "10", "7"]
    assert space.components == ("10", "7")


ODD = ["Na+/K+ ATPase inhibitor", "(+)-JQ1", "IL-2", "Ca2+ ionophore", "CD8+", "a.b|c"]


@pytest.mark.parametrize("name", ODD)
def test_without_a_separator_no_name_is_cut(name: str) -> None:
    adata = cells([name, "control", "X"])
    space = learn(adata, separator=None)
    assert read(space, adata) == [name, "control", "X"] and space.components == tuple(sorted(["X", name]))


@pytest.mark.parametrize("separator", ["+", "-", ".", "|", None])
@pytest.mark.parametrize("name", ODD)
def test_lists_are_never_cut(name: str, separator: str | None) -> None:
    adata = cells([[name, "X"], [name], ["X"], ["control", name], "control"], dose=[[2, 1], 1, 1, [0, 1], 0])
    for space in (learn(adata, separator=separator), learn(adata, separator=separator, dose_key="dose")):
        assert space.components == tuple(sorted(["X", name]))
        names = read(space, adata)
        assert names[1] == names[3] and len(set(names)) == 4
        # the name of a combination, given back as a request, is that combination
        assert read(space, cells(names, dose=[1, 1, 1, 1, 0])) == names
        index, dose = space.encode_perturbations(space.read_labels(adata.obs))
        both = [space.components.index(name), space.components.index("X")]
        assert dict(zip(index[0], dose[0] > 0, strict=True)) == dict(
            zip(both, [space.dose_key is not None, False], strict=True)
        )
        assert index[1:3].tolist() == [[both[0], -1], [both[1], -1]]


def test_names_of_components_are_told_apart() -> None:
    """A list of one name with a separator in it is not the combination that the same text would be."""
    reader = Labels("perturbation", "control")
    assert reader.name(["A", "B"]) == "A+B" and reader.name(["A+B"]) == '["A+B"]'
    assert reader.components('["A+B"]') == ("A+B",) and reader.components("A+B") == ("A", "B")
    assert Labels("p", "A+B").name(["B", "A"]) == '["A", "B"]'  # the control has that name


def test_control_may_hold_the_separator() -> None:
    adata = cells(["vehicle+DMSO", "A"])
    space = learn(adata, control="vehicle+DMSO")
    assert read(space, adata) == ["vehicle+DMSO", "A"] and space.components == ("A",)


def test_absent_control_is_named_with_what_there_is() -> None:
    adata = cells(["ctrl", "A", "B"])
    with pytest.raises(ValueError, match=r"control='control' is not a value of obs\['perturbation'\].*'ctrl'"):
        learn(adata)
    with pytest.raises(ValueError, match="control=... is needed"):
        learn(adata, control=None)
    with pytest.raises(ValueError, match="control='c' is not a value"):
        learn(cells(["cc", "A"]), control="c")
    with pytest.raises(ValueError, match="control='A' is not a value"):
        learn(cells([["A", "B"], ["B"]]), control="A")


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("perturbation_key", "perturbations"),
        ("context_keys", ["cel_type"]),
        ("context_keys", "cel_type"),
        ("batch_key", "cel_type"),
        ("dose_key", "cel_type"),
        ("categorical_covariate_keys", ["cel_type"]),
        ("continuous_covariate_keys", ["cel_type"]),
        ("control_match_keys", ["cel_type"]),
    ],
)
def test_missing_keys_are_named_with_the_nearest(argument: str, value: Any) -> None:
    adata = cells(["control", "A"], cell_type=["T", "T"])
    wrong = value if isinstance(value, str) else value[0]
    near = "perturbation" if argument == "perturbation_key" else "cell_type"
    with pytest.raises(KeyError, match=f"{argument}='{wrong}' is not a column.*Did you mean.*'{near}'"):
        learn(adata, **{argument: value})


def test_missing_labels_are_counted() -> None:
    with pytest.raises(ValueError, match=r"obs\['perturbation'\] is missing \(NaN\) for 2 cells"):
        learn(cells(["control", None, "A", np.nan]))
    with pytest.raises(ValueError, match=r"obs\['cell_type'\] is missing \(NaN\) for 1 cells"):
        learn(cells(["control", "A"], cell_type=["T", None]), context_keys="cell_type")


def test_no_perturbation_at_all() -> None:
    adata = cells(["x", "y"], cell_type=["T", "B"])
    space = learn(adata, perturbation_key=None, control=None, context_keys=["cell_type"])
    assert space.is_control(space.read_labels(adata.obs)).all() and space.components == ()
    with pytest.raises(ValueError, match="dose_key='cell_type' needs a perturbation_key"):
        learn(adata, perturbation_key=None, control=None, dose_key="cell_type")


def test_space_survives_the_registry() -> None:
    adata = cells(["control", "A", "B"], cell_type=["T", "T", "B"], dose=[0, 1, 2])
    table = {"A": [1.0, 2.0], "C": [3.0, 4.0]}
    space = learn(adata, context_keys="cell_type", dose_key="dose", perturbation_embeddings=table)
    stored = asdict(space)
    again = ConditionSpace(**(stored | {"features": FeatureTable(**stored["features"])}))
    assert again.all_components == space.all_components == ("A", "B", "C")
    assert again.dose_range == space.dose_range and again.contexts == ("B", "T")


# ---- what setup says of combinations -------------------------------------------------------------------------------


def said(caplog: pytest.LogCaptureFixture, labels: list[Any], **kwargs: Any) -> list[str]:
    caplog.clear()
    with caplog.at_level(logging.INFO, logger="scperturbdiff"):
        learn(cells(labels), **kwargs)
    told = [record.getMessage() for record in caplog.records]
    return [text for text in told if "control cells" not in text]  # of which there are few


def test_setup_says_how_many_labels_are_combinations(caplog: pytest.LogCaptureFixture) -> None:
    told = said(caplog, ["A+B", "A", "B", "control", "A+control", "A+B"])
    assert told == ["1 of 4 labels of obs['perturbation'] were read as combinations, joined by '+'."]
    assert said(caplog, ["A", "B", "control"]) == []
    assert said(caplog, ["A+B", "A", "control"], separator=None) == []


def test_setup_warns_of_components_that_never_occur_alone(caplog: pytest.LogCaptureFixture) -> None:
    told = said(caplog, ["IL-2+IL-15", "IL-2", "TNF+IL-2", "control"])
    assert "2 components occur only in combinations: 'IL-15', 'TNF'" in told[1] and "separator=None" in told[1]
    assert said(caplog, [["A", "B"], "A", "control"])[1:] == ["1 components occur only in combinations: 'B'."]


@pytest.mark.parametrize("label", ["Na+/K+ ATPase inhibitor", "(+)-JQ1", "Ca2+ ionophore", "A+ B"])
def test_setup_warns_of_labels_that_look_cut(caplog: pytest.LogCaptureFixture, label: str) -> None:
    parts = [part.strip() for part in label.split("+")]
    told = said(caplog, [label, *parts, "control"])
    assert len(told) == 2 and f"1 labels look cut at '+': {label!r}" in told[1] and "separator=None" in told[1]


def test_setup_does_not_warn_of_ordinary_combinations(caplog: pytest.LogCaptureFixture) -> None:
    labels = [
        "A+B",
        "A + B",
        "IL-2+TNF",
        "CD4 (low)+A",
        "A",
        "B",
        "IL-2",
        "TNF",
        "CD4 (low)",
        "5-FU+A",
        "5-FU",
        "control",
    ]
    assert len(said(caplog, labels)) == 1


# ---- doses ---------------------------------------------------------------------------------------------------------


def test_doses_belong_to_components() -> None:
    adata = cells(["B+A", "A+B", "A", "A", "control", "control"], dose=["1.0+0.5", 2, "3", 0, 0, np.nan])
    space = learn(adata, dose_key="dose")
    assert read(space, adata) == ["A+B", "A+B", "A", "control", "control", "control"]
    assert read(space, adata, DOSE) == ["0.5+1", "2+2", "3", "", "", ""]
    assert space.dose_range == {"A": (0.5, 3.0), "B": (1.0, 2.0)}


def test_a_component_at_dose_zero_is_not_there() -> None:
    adata = cells(["A+B", "B+A", "A+B", "control"], dose=["0+2", "0+2", "0+0", 0])
    space = learn(adata, dose_key="dose")
    assert read(space, adata) == ["B", "A", "control", "control"]
    assert read(space, adata, DOSE) == ["2", "2", "", ""]


def test_doses_are_scaled_around_their_median() -> None:
    adata = cells(["A", "A", "A", "B+A", "control"], dose=[1, 4, 16, "4+64", 0])
    space = learn(adata, dose_key="dose")
    assert space.dose_reference == 4
    index, dose = space.encode_perturbations(space.read_labels(adata.obs))
    assert index.tolist() == [[0, -1], [0, -1], [0, -1], [0, 1], [-1, -1]]
    np.testing.assert_allclose(dose, [[-2, 0], [0, 0], [2, 0], [4, 0], [0, 0]])
    np.testing.assert_allclose(scale_dose(np.array([8.0]), 4.0), [1.0])
    assert space.outside_dose_range("A", "64") == [] and space.outside_dose_range("A", "65") == ["A"]
    assert space.outside_dose_range("A+B", "0.5+5") == ["A", "B"]


def test_without_a_dose_key_there_is_no_dose() -> None:
    adata = cells(["A", "control"], dose=[3, 0])
    space = learn(adata)
    assert read(space, adata, DOSE) == ["", ""]
    assert space.encode_perturbations(space.read_labels(adata.obs))[1].tolist() == [[0.0], [0.0]]


@pytest.mark.parametrize(
    ("label", "dose", "message"),
    [
        ("A", -1, "doses must be finite and not negative"),
        ("A", np.nan, "doses must be finite and not negative"),
        ("A", np.inf, "doses must be finite and not negative"),
        ("A", "high", "cannot read 'high' for 'A'"),
        ("A+B", "1+2+3", r"dose '1\+2\+3' has 3 values for 2 components"),
        ("control", 5, "controls must have dose 0 or none"),
    ],
)
def test_bad_doses_are_named(label: str, dose: Any, message: str) -> None:
    with pytest.raises(ValueError, match=rf"obs\['dose'\].*{message}"):
        learn(cells([label, "control"], dose=[dose, 0]), dose_key="dose")


def test_doses_may_be_lists() -> None:
    assert read_doses([1, 2], "+") == (1.0, 2.0) and read_doses(np.float32(0.1), "+") == (0.1,)
    adata = cells(["A+B", "A", "control"], dose=[[2, 1], np.array([3.0]), 0])
    assert read(learn(adata, dose_key="dose"), adata, DOSE) == ["2+1", "3", ""]


def test_the_control_in_a_combination_may_have_a_dose() -> None:
    """As in the files of GEARS: `A+ctrl` with the dose `1+1`."""
    adata = cells(["A+control", "control+A", "A+control", "B+A", "control"], dose=["1+0", "1+2", 3, "1+4", "0"])
    space = learn(adata, dose_key="dose")
    assert read(space, adata) == ["A", "A", "A", "A+B", "control"]
    assert read(space, adata, DOSE) == ["1", "2", "3", "4+1", ""]


@pytest.mark.parametrize("separator", ["+", "-", ".", "e", None])
@pytest.mark.parametrize("dose", [1e12, 1e-6, 0.1, 3, 1.5e-9, "1e+12", "1e-6", "0.1"])
def test_any_dose_with_any_separator(dose: Any, separator: str | None) -> None:
    joined = "A+B" if separator is None else f"A{separator}B"
    labels = [["A", "B"], "A", joined, "control"] if separator else [["A", "B"], "A", "B", "control"]
    adata = cells(labels, dose=pd.Series([dose, dose, dose, 0], dtype=object).tolist())
    space = learn(adata, dose_key="dose", separator=separator)
    value = float(str(dose))
    assert space.dose_range == {"A": (value, value), "B": (value, value)} and space.dose_reference == value
    np.testing.assert_array_equal(space.encode_perturbations(space.read_labels(adata.obs))[1], 0)
    text = read(space, adata, DOSE)[0]
    assert space.outside_dose_range(read(space, adata)[0], text) == []
    # the text of the table of populations, given back as a request, is the same doses
    again = cells([["A", "B"], "control"], dose=[text, 0])
    assert read(space, again, DOSE)[0] == text


def test_doses_of_components_are_numbers_however_they_are_joined() -> None:
    assert read_doses("1e+12+2", "+") == (1e12, 2.0) and read_doses("1e-6-2e-6", "-") == (1e-6, 2e-6)
    assert read_doses("0.1.2", ".") == (0.1, 2.0) and read_doses("0.5+2", "|") == (0.5, 2.0)
    assert read_doses("1e+3", "+") == (1000.0,) and read_doses("1 | 2", "|") == (1.0, 2.0)
    assert dose_text((0.5, 2.0)) == "0.5+2" and dose_text((1e12, 1e-6)) == "1e12+1e-06"
    for bad in ("1+", "+1+2", "1++2", "1-2", "a+b"):
        with pytest.raises(ValueError, match="could not convert"):
            read_doses(bad, "+")


def test_doses_of_single_precision_are_those_of_double() -> None:
    adata = cells(["A", "A", "control"], dose=[0.1, 0.3, 0])
    adata.obs["dose"] = adata.obs["dose"].astype(np.float32)
    assert read(learn(adata, dose_key="dose"), adata, DOSE) == ["0.1", "0.3", ""]


# ---- covariates and contexts ---------------------------------------------------------------------------------------


def test_covariates() -> None:
    adata = cells(["control", "A", "A", "A"], site=["x", "y", "x", "x"], hours=[0.0, 2.0, 4.0, 6.0])
    space = learn(adata, categorical_covariate_keys=["site"], continuous_covariate_keys=["hours"])
    codes, numbers = space.encode_covariates(space.read_labels(adata.obs))
    assert codes[:, 0].tolist() == [0, 1, 0, 0]
    assert numbers.mean() == pytest.approx(0) and numbers.std() == pytest.approx(1)
    new = space.read_labels(adata.obs).assign(site="z")
    with pytest.raises(ValueError, match="'site' has values never seen in training: 'z'. Known: 'x', 'y'"):
        space.encode_covariates(new)


def test_bad_covariates_are_named() -> None:
    with pytest.raises(ValueError, match="'hours' is not numeric: 'two'"):
        learn(cells(["control", "A"], hours=["two", "two"]), continuous_covariate_keys=["hours"])
    with pytest.raises(ValueError, match="'hours' is NaN or infinite for 1 cells"):
        learn(cells(["control", "A"], hours=[1.0, np.inf]), continuous_covariate_keys=["hours"])


def test_contexts_of_several_keys() -> None:
    adata = cells(["control", "A", "A", "A"], cell_type=["T", "T", "B", "T"], tissue=["x", "x", "x", "y"])
    space = learn(adata, context_keys=["cell_type", "tissue"])
    labels = space.read_labels(adata.obs)
    assert len(space.contexts) == 3
    codes = space.context_codes(labels)
    assert codes[0] == codes[1] and len(set(codes.tolist())) == 3
    assert space.context_codes(labels.assign(tissue="z")).tolist() == [-1] * 4
    assert learn(adata).context_codes(labels).tolist() == [0] * 4  # no context keys: one context


# ---- features ------------------------------------------------------------------------------------------------------


def test_feature_tables_in_every_form() -> None:
    frame = pd.DataFrame([[1.0, 2.0], [3.0, 4.0]], index=["A", "B"])
    adata = cells(["control", "A"])
    adata.uns["table"] = frame
    expected = np.array([[1, 2], [3, 4]], np.float32)
    for given in (frame, {"A": [1, 2], "B": np.array([3, 4])}, "table", FeatureTable(("A", "B"), expected)):
        table = FeatureTable.parse(given, adata)
        assert table.names == ("A", "B")
        np.testing.assert_array_equal(table.values, expected)
    rows = table.rows(["B", "C", "A"])
    np.testing.assert_array_equal(rows[[0, 2]], expected[[1, 0]])
    assert np.isnan(rows[1]).all()


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ("missing", KeyError, "perturbation_embeddings='missing' is not in adata.uns. Keys: 'other'"),
        ({"A": [1.0], "B": [1.0, 2.0]}, ValueError, "different lengths.*'A': 1, 'B': 2"),
        ({"A": [1.0], "B": [np.nan]}, ValueError, "NaN or infinite values for 1 names: 'B'"),
        (pd.DataFrame([[1.0], [2.0]], index=["A", "A"]), ValueError, "duplicated names: 'A'"),
        (pd.DataFrame(index=["A"]), ValueError, "empty"),
        ({}, ValueError, "empty"),
        ([1, 2], TypeError, "not list"),
    ],
)
def test_bad_feature_tables_are_named(given: Any, error: type[Exception], message: str) -> None:
    adata = cells(["control"])
    adata.uns["other"] = 1
    with pytest.raises(error, match=message):
        FeatureTable.parse(given, adata)


def test_names_of_features_are_read_as_labels_are() -> None:
    """Without spaces around them, that of other alphabets included."""
    assert FeatureTable.parse({"A\xa0": [1.0], " B": [2.0]}).names == ("A", "B")
    with pytest.raises(ValueError, match="duplicated names: 'A'"):
        FeatureTable.parse({"A": [1.0], "A ": [2.0]})
    for table in ({"A": "text"}, {"A": ["x", "y"]}, pd.DataFrame({"f": ["x"]}, index=["A"])):
        with pytest.raises(TypeError, match="perturbation_embeddings must hold numbers"):
            FeatureTable.parse(table)


def test_features_make_unseen_components_known() -> None:
    adata = cells(["control", "A", "B"])
    space = learn(adata, perturbation_embeddings={"Z": [9.0], "A": [1.0]})
    assert space.all_components == ("A", "B", "Z")
    matrix = space.feature_matrix()
    assert matrix is not None
    np.testing.assert_array_equal(matrix, np.array([[1], [np.nan], [9]], np.float32))
    assert space.encode_perturbations(pd.DataFrame({PERTURBATION: ["A+Z"], DOSE: [""]}))[0].tolist() == [[0, 2]]
    with pytest.raises(KeyError, match="'Q'"):
        space.encode_perturbations(pd.DataFrame({PERTURBATION: ["Q"], DOSE: [""]}))
    more = space.with_features({"Q": [5.0], "A": [1.0]})
    assert more.all_components == ("A", "B", "Z", "Q")
    assert more.feature_matrix()[0, 0] == 1
    with pytest.raises(ValueError, match="other features than the model for 1 names it was set up with: 'A'"):
        space.with_features({"Q": [5.0], "A": [7.0], "Z": [9.0]})  # the network was trained with others
    with pytest.raises(ValueError, match="has 2 features, the model was set up with 1.*'Q'"):
        space.with_features({"Q": [5.0, 1.0]})
    with pytest.raises(ValueError, match="the model was set up without"):
        learn(adata).with_features({"Q": [5.0]})


def test_unknown_components_are_named_with_neighbours_and_remedy() -> None:
    space = learn(cells(["control", "IFNB", "TNFA"]))
    asked = pd.DataFrame({PERTURBATION: ["IFNG+TNFA"], DOSE: [""]})
    with pytest.raises(KeyError, match=r"'IFNG' \(nearest known: 'IFNB'\).*perturbation_embeddings"):
        space.encode_perturbations(asked)


def test_request_for_what_was_trained() -> None:
    adata = cells(["control", "B+A", "A"], dose=[0, 1, 2])
    space = learn(adata, dose_key="dose")
    populations = pd.DataFrame({"perturbation": ["A+B", "A", "A"], "dose": ["1+1", "2", "2"]})
    request = space.training_request(populations)
    assert request["perturbation"].tolist() == ["A+B", "A"] and request["dose"].tolist() == ["1+1", "2"]
    with pytest.raises(ValueError, match="trained on controls only"):
        replace(space).training_request(populations.iloc[:0])


def test_predict_reads_controls_as_setup_does() -> None:
    adata = cells(["control", ["control"], "control+control", "A", ["A"], "A+control"])
    space = learn(adata)
    at_setup = np.flatnonzero(space.is_control(space.read_labels(adata.obs)))
    assert at_setup.tolist() == [0, 1, 2]
    assert read_controls(space, adata).cells.rows.tolist() == at_setup.tolist()


def test_cells_at_dose_zero_are_controls_when_predicting_too() -> None:
    adata = cells(["control", "A", "A", "B"], dose=[0, 0, 1, "0"])
    space = learn(adata, dose_key="dose")
    assert read_controls(space, adata).cells.rows.tolist() == [0, 1, 3]
    without = adata[:, :].copy()
    del without.obs["dose"]  # a table of controls need not have the dose
    assert read_controls(space, without).cells.rows.tolist() == [0]
    with pytest.raises(ValueError, match=r"obs\['perturbation'\] is never 'control'. Values: 'A'"):
        read_controls(space, adata[2:3].copy())
