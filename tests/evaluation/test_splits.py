"""What is held out stays out of training, and leaks are found."""

from __future__ import annotations

from dataclasses import replace

import anndata
import numpy as np
import pandas as pd
import pytest
from scipy import sparse

from scperturbdiff import splits
from scperturbdiff.datasets import simulate

KEYS = {"perturbation_key": "perturbation", "control": "control"}
CONTEXT = {"context_keys": ["cell_type"]}


@pytest.fixture(scope="module")
def screen():
    return simulate(5, 6, 4, 40, n_batches=3, combinations=8)


def conditions(adata, mask):
    obs = adata.obs[mask & (adata.obs["perturbation"] != "control").to_numpy()]
    return set(zip(obs["perturbation"].astype(str), obs["cell_type"].astype(str), strict=True))


def parts(labels):
    return {part for label in labels for part in str(label).split("+")}


@pytest.mark.parametrize("fraction", [0.1, 0.25, 0.5])
@pytest.mark.parametrize("seed", [0, 1])
def test_pairs(screen, fraction, seed):
    split = splits.hold_out_pairs(screen, **KEYS, **CONTEXT, fraction=fraction, seed=seed)
    trained, tested = conditions(screen, split.train), conditions(screen, split.test)
    assert not trained & tested and len(trained | tested) == 5 * 14
    assert len(tested) == round(fraction * 70) == len(split.held_out)
    assert {p for p, _ in trained} == {p for p, _ in tested | trained}
    per_context = pd.Series([c for _, c in tested]).value_counts()
    assert len(per_context) == 5 and per_context.max() - per_context.min() <= 1
    assert (split.train ^ split.test).all() and not split.left_out.any()
    assert split.held_out["n_cells"].sum() == split.test.sum()
    assert (screen.obs["perturbation"][split.controls] == "control").all()
    again = splits.hold_out_pairs(screen, **KEYS, **CONTEXT, fraction=fraction, seed=seed)
    other = splits.hold_out_pairs(screen, **KEYS, **CONTEXT, fraction=fraction, seed=seed + 10)
    np.testing.assert_array_equal(split.test, again.test)
    assert (split.test != other.test).any()


def test_named_pairs_and_controls_of_their_contexts(screen):
    split = splits.hold_out_pairs(screen, **KEYS, **CONTEXT, pairs=[("P01", "C2"), ("P02", "C3")])
    assert conditions(screen, split.test) == {("P01", "C2"), ("P02", "C3")}
    assert set(screen.obs["cell_type"][split.controls]) == {"C2", "C3"}
    assert split.report().loc["test", "n_conditions"] == 2
    assert split.report().loc["test", "n_cells"] == 2 * 3 * 4


def test_pairs_over_two_context_keys(screen):
    keys = ["cell_type", "donor"]
    split = splits.hold_out_pairs(screen, **KEYS, context_keys=keys, pairs=[("P01", "C2", "D1")])
    obs = screen.obs[split.test]
    assert len(obs) == 4 and (obs["donor"] == "D1").all() and (obs["cell_type"] == "C2").all()
    assert list(split.held_out.columns) == ["perturbation", "cell_type", "donor", "n_cells"]
    drawn = splits.hold_out_pairs(screen, **KEYS, context_keys=keys, fraction=0.2)
    assert len(drawn.held_out) == round(0.2 * 14 * 15)


def test_pairs_where_not_every_pair_was_measured(screen):
    """A perturbation measured in one context only is never held out there."""
    rare = (screen.obs["perturbation"] == "P03") & (screen.obs["cell_type"] != "C1")
    adata = screen[~rare.to_numpy()]
    for seed in range(5):
        split = splits.hold_out_pairs(adata, **KEYS, **CONTEXT, fraction=0.5, seed=seed)
        assert ("P03", "C1") in conditions(adata, split.train)


def test_too_many_pairs(screen):
    with pytest.raises(ValueError, match=r"asks for 66 of 70 pairs, but only \d+ can be held out"):
        splits.hold_out_pairs(screen, **KEYS, **CONTEXT, fraction=0.95)


@pytest.mark.parametrize("keep_controls", [True, False])
def test_contexts(screen, keep_controls):
    split = splits.hold_out_contexts(screen, **KEYS, **CONTEXT, contexts=["C4"], keep_controls=keep_controls)
    inside = (screen.obs["cell_type"] == "C4").to_numpy()
    control = (screen.obs["perturbation"] == "control").to_numpy()
    np.testing.assert_array_equal(split.test, inside & ~control)
    np.testing.assert_array_equal(split.controls, inside & control)
    assert split.train[inside & control].all() == keep_controls
    assert split.train[~inside].all() and not split.left_out.any()
    drawn = splits.hold_out_contexts(screen, **KEYS, **CONTEXT, fraction=0.4, seed=2)
    assert len(drawn.labels) == 2


def test_perturbations(screen):
    split = splits.hold_out_perturbations(screen, **KEYS, **CONTEXT, perturbations=["P02"])
    assert "P02" not in parts(screen.obs["perturbation"][split.train].unique())
    assert all("P02" in parts([label]) for label in screen.obs["perturbation"][split.test].unique())
    assert split.labels == ("P02",) and (split.train ^ split.test).all()
    drawn = splits.hold_out_perturbations(screen, **KEYS, fraction=0.34, seed=1)
    assert len(drawn.labels) == 2
    assert not set(drawn.labels) & parts(screen.obs["perturbation"][drawn.train].unique())


@pytest.mark.parametrize("seen", [0, 1, 2])
def test_combinations(screen, seen):
    split = splits.hold_out_combinations(screen, **KEYS, seen=seen, fraction=0.2, seed=3)
    trained = set(screen.obs["perturbation"][split.train].astype(str))
    alone = {label for label in trained if "+" not in label}
    tested = set(screen.obs["perturbation"][split.test].astype(str))
    assert tested == set(split.labels) and len(tested) >= 2
    for label in tested:
        assert len(alone & parts([label])) == seen
        unseen = parts([label]) - alone
        assert not unseen & parts(trained)
    assert not tested & trained
    assert split.left_out.any() == (seen < 2)


def test_named_combination_in_any_order(screen):
    label = next(name for name in screen.uns["truth"]["labels"].tolist() if "+" in name)
    turned = "+".join(reversed(label.split("+")))
    split = splits.hold_out_combinations(screen, **KEYS, combinations=[turned])
    assert split.labels == (label,)


def test_batches(screen):
    split = splits.hold_out_batches(screen, **KEYS, **CONTEXT, batch_key="donor", batches=["D2"])
    obs = screen.obs
    np.testing.assert_array_equal(split.test, ((obs["donor"] == "D2") & (obs["perturbation"] != "control")).to_numpy())
    assert "donor" in split.held_out and len(split.held_out) == 5 * 14
    without = splits.hold_out_batches(screen, **KEYS, batch_key="donor", batches=["D2"], keep_controls=False)
    assert "D2" not in set(obs["donor"][without.train])


def everything(screen):
    yield splits.hold_out_pairs(screen, **KEYS, **CONTEXT)
    yield splits.hold_out_contexts(screen, **KEYS, **CONTEXT)
    yield splits.hold_out_perturbations(screen, **KEYS, **CONTEXT, perturbations=["P01"])
    for seen in (0, 1, 2):
        yield splits.hold_out_combinations(screen, **KEYS, **CONTEXT, seen=seen)
    yield splits.hold_out_batches(screen, **KEYS, **CONTEXT, batch_key="donor")


def test_no_leak_in_any_kind_of_split(screen):
    kinds = []
    for split in everything(screen):
        report = splits.leak_report(split, screen)
        assert not report["leak"].any(), report
        kinds.append(split.kind)
        assert str(len(split.labels)) in split.description
    assert set(kinds) == {"pairs", "contexts", "perturbations", "combinations", "batches"}


def test_unseen_perturbation_is_stated_but_no_leak(screen):
    split = splits.hold_out_perturbations(screen, **KEYS, **CONTEXT, perturbations=["P01"])
    report = splits.leak_report(split, screen)
    assert report.loc["unseen_perturbations", "n"] == 1 and "P01" in report.loc["unseen_perturbations", "detail"]


def test_every_kind_of_split_with_a_leak_is_caught(screen):
    """Give one held-out cell back to training: its condition and its label must show, for every kind."""
    for split in everything(screen):
        train, test = split.train.copy(), split.test.copy()
        cell = np.flatnonzero(test)[0]
        train[cell], test[cell] = True, False
        report = splits.leak_report(replace(split, train=train, test=test), screen)
        assert report.loc["held_out_condition_trained", "leak"], split.kind
        assert report.loc["held_out_label_trained", "leak"], split.kind
        assert not report.loc["shared_cells", "leak"]
        report = splits.leak_report(replace(split, train=train), screen)
        assert report.loc["shared_cells", "n"] == 1


def test_reversed_combination_in_training_is_a_leak(screen):
    split = splits.hold_out_combinations(screen, **KEYS, **CONTEXT)
    adata = screen.copy()
    names = adata.obs["perturbation"].astype(str).to_numpy()
    turned = "+".join(reversed(split.labels[0].split("+")))
    names[np.flatnonzero(split.train)[-1]] = turned
    adata.obs["perturbation"] = names
    assert splits.leak_report(split, adata).loc["held_out_label_trained", "leak"]


def relabelled(screen, rename):
    adata = screen.copy()
    adata.obs["perturbation"] = pd.Series([rename(str(p)) for p in adata.obs["perturbation"]], dtype=object).to_numpy()
    return adata


def beside_control(name):
    """As GEARS writes single perturbations."""
    return name if name == "control" or "+" in name else f"{name}+control"


def test_single_perturbations_beside_the_control_are_single(screen):
    adata = relabelled(screen, beside_control)
    for plain, other in zip(everything(screen), everything(adata), strict=True):
        for mask in ("train", "test", "controls"):
            np.testing.assert_array_equal(getattr(plain, mask), getattr(other, mask))
        assert plain.labels == other.labels
        pd.testing.assert_frame_equal(plain.held_out, other.held_out)


def test_a_leak_under_another_spelling_is_found(screen):
    split = splits.hold_out_perturbations(screen, **KEYS, **CONTEXT, perturbations=["P01"])
    cell = np.flatnonzero(split.test & (screen.obs["perturbation"] == "P01").to_numpy())[0]
    train, test = split.train.copy(), split.test.copy()
    train[cell], test[cell] = True, False
    adata = relabelled(screen, str)
    adata.obs.iloc[cell, adata.obs.columns.get_loc("perturbation")] = "control+P01"
    report = splits.leak_report(replace(split, train=train, test=test), adata)
    assert report.loc["held_out_condition_trained", "leak"] and report.loc["held_out_label_trained", "leak"]


def test_lists_and_odd_names(screen):
    odd = {"P01": "Na+/K+ inhibitor", "P02": "(+)-JQ1"}

    def as_list(name):
        return [odd.get(part, part) for part in name.split("+")]

    listed = relabelled(screen, as_list)
    label = next(name for name in screen.uns["truth"]["labels"].tolist() if "+" in name and "P01" in name)
    plain = splits.hold_out_combinations(screen, **KEYS, combinations=[label])
    other = splits.hold_out_combinations(listed, **KEYS, combinations=[as_list(label)])
    np.testing.assert_array_equal(plain.test, other.test)
    assert not splits.leak_report(other, listed)["leak"].any()
    split = splits.hold_out_perturbations(listed, **KEYS, perturbations=["(+)-JQ1"])
    expected = splits.hold_out_perturbations(screen, **KEYS, perturbations=["P02"])
    np.testing.assert_array_equal(split.test, expected.test)
    assert not splits.leak_report(split, listed)["leak"].any()
    single = screen[~screen.obs["perturbation"].astype(str).str.contains("+", regex=False)]
    texts = relabelled(single, lambda name: odd.get(name, name))
    split = splits.hold_out_perturbations(texts, **KEYS, perturbations=["(+)-JQ1"], separator=None)
    assert set(texts.obs["perturbation"][split.test]) == {"(+)-JQ1"}
    with pytest.raises(ValueError, match="no combination"):
        splits.hold_out_combinations(texts, **KEYS, separator=None)


def test_labels_with_an_empty_or_repeated_component_are_refused(screen):
    for label, what in (("P01+", "an empty"), ("P01+P01", "a repeated")):
        adata = relabelled(screen, lambda name, label=label: label if name == "P01" else name)
        with pytest.raises(
            ValueError, match=rf"obs\['perturbation'\]='{label.replace('+', '.')}' has {what} component"
        ):
            splits.hold_out_perturbations(adata, **KEYS)


@pytest.mark.parametrize("as_dense", [False, True])
def test_copied_cells_are_found(screen, as_dense):
    split = splits.hold_out_pairs(screen, **KEYS, **CONTEXT)
    adata = screen.copy()
    matrix = adata.X.toarray()
    test, train = np.flatnonzero(split.test)[:3], np.flatnonzero(split.train)[:3]
    matrix[test] = matrix[train]
    adata.X = matrix if as_dense else sparse.csr_matrix(matrix)
    report = splits.leak_report(split, adata)
    assert report.loc["identical_counts", "n"] == 3 and report.loc["identical_counts", "leak"]
    swapped = matrix.copy()
    swapped[test] = matrix[train][:, ::-1]
    adata.X = swapped
    assert splits.leak_report(split, adata).loc["identical_counts", "n"] == 0


def test_duplicated_names_are_found(screen):
    split = splits.hold_out_pairs(screen, **KEYS, **CONTEXT)
    adata = screen.copy()
    names = adata.obs_names.to_numpy().copy()
    names[np.flatnonzero(split.test)[0]] = names[np.flatnonzero(split.train)[0]]
    adata.obs_names = names
    assert splits.leak_report(split, adata).loc["duplicated_names", "n"] == 1


def test_report_of_contexts_without_controls(screen):
    adata = screen[~((screen.obs["perturbation"] == "control") & (screen.obs["cell_type"] == "C1")).to_numpy()]
    split = splits.hold_out_contexts(adata, **KEYS, **CONTEXT, contexts=["C1"])
    report = splits.leak_report(split, adata)
    assert report.loc["no_controls", "n"] == 1 and "C1" in report.loc["no_controls", "detail"]
    assert report.loc["unseen_contexts", "n"] == 1


def test_wrong_input(screen):
    with pytest.raises(KeyError, match="perturbatoin.*Did you mean 'perturbation'"):
        splits.hold_out_perturbations(screen, perturbation_key="perturbatoin", control="control")
    with pytest.raises(ValueError, match="control='ctrl' is not a value of.*Did you mean 'control'"):
        splits.hold_out_perturbations(screen, perturbation_key="perturbation", control="ctrl")
    with pytest.raises(ValueError, match="Context 'C9'"):
        splits.hold_out_contexts(screen, **KEYS, **CONTEXT, contexts=["C9"])
    with pytest.raises(ValueError, match="perturbation 'P1' does not occur.*Did you mean"):
        splits.hold_out_perturbations(screen, **KEYS, perturbations=["P1"])
    with pytest.raises(ValueError, match="batch 'D9'"):
        splits.hold_out_batches(screen, **KEYS, batch_key="donor", batches=["D9"])
    with pytest.raises(ValueError, match="one value for each of 'cell_type'"):
        splits.hold_out_pairs(screen, **KEYS, **CONTEXT, pairs=[("P01", "C1", "D1")])
    with pytest.raises(ValueError, match="fraction=1.2"):
        splits.hold_out_pairs(screen, **KEYS, **CONTEXT, fraction=1.2)
    with pytest.raises(ValueError, match="seen=3"):
        splits.hold_out_combinations(screen, **KEYS, seen=3)
    for wrong in ({"seed": -1}, {"seed": 1.5}, {"fraction": float("nan")}):
        with pytest.raises(ValueError, match=f"{next(iter(wrong))}=.* must be a"):
            splits.hold_out_pairs(screen, **KEYS, **CONTEXT, **wrong)
    with pytest.raises(TypeError, match="adata must be an AnnData"):
        splits.hold_out_pairs(screen.obs, **KEYS, **CONTEXT)
    with pytest.raises(ValueError, match="needs context_keys"):
        splits.hold_out_pairs(screen, **KEYS, context_keys=[])
    with pytest.raises(ValueError, match="none is left"):
        splits.hold_out_contexts(screen, **KEYS, **CONTEXT, contexts=[f"C{i}" for i in range(1, 6)])
    with pytest.raises(ValueError, match="no combination"):
        splits.hold_out_combinations(simulate(1, 2, 2, 10), **KEYS)
    with pytest.raises(ValueError, match="made for"):
        splits.leak_report(splits.hold_out_pairs(screen, **KEYS, **CONTEXT), screen[:10])
    partly = anndata.AnnData(np.ones((3, 2)), obs=pd.DataFrame({"p": ["a", None, "control"]}, index=list("xyz")))
    with pytest.raises(ValueError, match="is missing .NaN. for 1 cells"):
        splits.hold_out_perturbations(partly, perturbation_key="p", control="control")


def test_a_text_is_one_name(screen) -> None:
    keys = {"perturbation_key": "perturbation", "control": "control"}
    assert splits.hold_out_perturbations(screen, **keys, perturbations="P01").labels == ("P01",)
    assert splits.hold_out_contexts(screen, **keys, context_keys=["cell_type"], contexts="C1").labels == ("C1",)
    assert splits.hold_out_batches(screen, **keys, context_keys=[], batch_key="donor", batches="D1").labels == ("D1",)


def test_not_all_pairs_can_be_held_out(screen) -> None:
    keys = {"perturbation_key": "perturbation", "control": "control", "context_keys": ["cell_type"]}
    treated = screen.obs[screen.obs["perturbation"] != "control"].astype(str)
    pairs = treated[["perturbation", "cell_type"]].drop_duplicates().itertuples(index=False, name=None)
    with pytest.raises(ValueError, match="none is left to train on"):
        splits.hold_out_pairs(screen, **keys, pairs=list(pairs))


def test_a_split_that_cannot_be_made_leads_to_one_that_can(screen) -> None:
    """Kang's cells have one perturbation: the first call that everybody tries must say which one to make."""
    keys = {"perturbation_key": "perturbation", "control": "control"}
    drug, line = screen.obs["perturbation"].astype(str), screen.obs["cell_type"].astype(str)
    one_drug = screen[(drug.isin(["control", "P01"])).to_numpy()].copy()
    one_line = screen[(line == "C1").to_numpy()].copy()
    neither = screen[(drug.isin(["control", "P01"]) & (line == "C1")).to_numpy()].copy()
    by_line = {**keys, "context_keys": ["cell_type"]}
    with pytest.raises(ValueError, match="one perturbation, 'P01', in 5 contexts. Use hold_out_contexts"):
        splits.hold_out_pairs(one_drug, **by_line)
    assert splits.hold_out_contexts(one_drug, **by_line).test.any()
    with pytest.raises(ValueError, match="perturbations in one context, 'C1'. Use hold_out_perturbations"):
        splits.hold_out_pairs(one_line, **by_line)
    assert splits.hold_out_perturbations(one_line, **by_line).test.any()
    with pytest.raises(ValueError, match="one perturbation, 'P01', in one context, 'C1'. Use hold_out_batches"):
        splits.hold_out_pairs(neither, **by_line)
    assert splits.hold_out_batches(neither, **by_line, batch_key="donor").test.any()
    # pairs that are named are held out all the same
    assert splits.hold_out_pairs(one_drug, **by_line, pairs=[("P01", "C1")]).test.any()
    for make, cells, instead in (
        (splits.hold_out_contexts, one_line, "there is only 'C1' to draw from. Use hold_out_perturbations or"),
        (splits.hold_out_perturbations, one_drug, "there is only 'P01' to draw from. Use hold_out_contexts or"),
    ):
        with pytest.raises(ValueError, match=instead):
            make(cells, **by_line)
    with pytest.raises(ValueError, match="needs context_keys.*held out by hold_out_perturbations"):
        splits.hold_out_pairs(screen, **keys, context_keys=[])
