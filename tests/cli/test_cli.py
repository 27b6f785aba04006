"""The command line, called in this process on tiny data."""

from __future__ import annotations

import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import pytest

from scperturbdiff import PerturbDiff, splits
from scperturbdiff.cli import main
from scperturbdiff.datasets import simulate

SCRIPT = str(Path(sys.executable).with_name("scperturbdiff"))
KEYS = ["--perturbation-key", "perturbation", "--control", "control", "--context-key", "cell_type"]


def run(*words: object) -> int:
    return main([str(word) for word in words])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Training cells, control cells without labels, held-out cells with controls, and a model trained on the first."""
    folder = tmp_path_factory.mktemp("cli")
    adata = simulate(n_contexts=2, n_perturbations=3, n_genes=60, n_cells_per_population=8, n_batches=2, seed=5)
    del adata.uns["truth"]
    held_out = [("P02", "C2"), ("P03", "C1")]
    split = splits.hold_out_pairs(
        adata, perturbation_key="perturbation", control="control", context_keys=["cell_type"], pairs=held_out
    )
    adata[split.train].write_h5ad(folder / "train.h5ad")
    adata[split.test | split.controls].write_h5ad(folder / "real.h5ad")
    controls = adata[split.controls].copy()
    del controls.obs["perturbation"]
    controls.write_h5ad(folder / "controls.h5ad")
    pd.DataFrame(held_out, columns=["perturbation", "cell_type"]).to_csv(folder / "wanted.csv", index=False)
    words = ["train", folder / "train.h5ad", "--out", folder / "model", *KEYS, "--batch-key", "donor"]
    assert run(*words, "--max-epochs", 1, "--accelerator", "cpu") == 0
    return folder


def failure(capsys: pytest.CaptureFixture[str], *words: object) -> str:
    """Run a command that fails and return what it says: one line on stderr, no traceback."""
    capsys.readouterr()
    assert run(*words) == 1
    said = capsys.readouterr().err.strip().splitlines()
    assert len(said) == 1, said
    assert said[0].startswith(f"scperturbdiff {words[0]}: error: ")
    return said[0].split("error: ", 1)[1]


# ---- demo ---------------------------------------------------------------------------------------------------------


def test_the_demo_prints_a_table_and_writes_cells_and_a_figure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run("demo", "--quick", "--seed", 2) == 0
    said = capsys.readouterr()
    for row in ("PerturbDiff", "no change", "perturbation mean shift", "ceiling (split-half)"):
        assert any(line.startswith(row) for line in said.out.splitlines()), row
    assert "energy distance" in said.out and "delta correlation" in said.out
    assert "Retrieval from" in said.out and "Network weight" in said.out
    assert "Training: first" in said.out, "long work is announced"
    assert "Epoch" not in said.err + said.out, "bars are for terminals"
    out = tmp_path / "scperturbdiff-demo"
    assert sorted(p.name for p in out.iterdir()) == ["populations.png", "predicted.h5ad", "table.csv"]
    assert [p.name for p in tmp_path.iterdir()] == [out.name], "nothing else is left behind"
    assert (out / "populations.png").read_bytes().startswith(b"\x89PNG")
    pred, table = ad.read_h5ad(out / "predicted.h5ad"), pd.read_csv(out / "table.csv")
    # held-out conditions only, with as many cells as were measured
    sizes = pred.obs.groupby(["cell_type", "perturbation"], observed=True).size()
    scored = table[table["model"] == "PerturbDiff"].groupby(["cell_type", "perturbation"])["n_real"].first()
    assert sizes.to_dict() == scored.to_dict()
    # the figures printed are those of the file
    energy = table[(table["metric"] == "energy_distance") & (table["model"] == "no_change")]["value"].mean()
    assert f"{energy:.3f}" in next(line for line in said.out.splitlines() if line.startswith("no change"))
    assert "Pass --overwrite to replace" in failure(capsys, "demo", "--quick", "--seed", 2)
    # with the same seed the same cells come back
    assert run("demo", "--quick", "--seed", 2, "--overwrite") == 0
    again = ad.read_h5ad(out / "predicted.h5ad")
    assert (again.layers["counts"] != pred.layers["counts"]).nnz == 0


def test_the_demo_does_not_replace_files_in_a_folder_it_was_given(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "predicted.h5ad").write_text("mine")
    assert "predicted.h5ad" in failure(capsys, "demo", "--quick", "--out", tmp_path)
    assert (tmp_path / "predicted.h5ad").read_text() == "mine"


# ---- train and predict --------------------------------------------------------------------------------------------


def test_predict_writes_what_the_model_predicts(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "new" / "pred.h5ad"
    words = ["predict", folder / "model", folder / "controls.h5ad", "--out", out, "--n-cells", 7, "--seed", 3]
    assert run(*words, "--perturbations", "P01", "P02+P03", "--n-populations", 2) == 0
    pred = ad.read_h5ad(out)
    assert [p.name for p in out.parent.iterdir()] == ["pred.h5ad"]
    sizes = pred.obs.groupby(["cell_type", "perturbation", "population"], observed=True).size()
    assert len(sizes) == 8 and (sizes == 7).all()
    model = PerturbDiff.load(folder / "model", adata=False)
    controls = ad.read_h5ad(folder / "controls.h5ad")
    same = model.predict(controls, ["P01", "P02+P03"], n_cells=7, n_populations=2, seed=3, progress=False)
    assert (pred.layers["counts"] != same.layers["counts"]).nnz == 0


def test_predict_takes_a_table_or_everything(folder: Path, tmp_path: Path) -> None:
    words = ["predict", folder / "model", folder / "controls.h5ad", "--n-cells", 4]
    assert run(*words, "--table", folder / "wanted.csv", "--out", tmp_path / "table.h5ad") == 0
    obs = ad.read_h5ad(tmp_path / "table.h5ad").obs
    assert obs.groupby(["cell_type", "perturbation"], observed=True).size().to_dict() == {
        ("C1", "P03"): 4,
        ("C2", "P02"): 4,
    }
    for name, read in (("all.h5ad", ad.read_h5ad), ("all.zarr", ad.read_zarr)):
        assert run(*words, "--out", tmp_path / name) == 0
        assert set(read(tmp_path / name).obs["perturbation"]) == {"P01", "P02", "P03"}


def test_training_is_repeatable(folder: Path, tmp_path: Path) -> None:
    words = ["train", folder / "train.h5ad", *KEYS, "--batch-key", "donor", "--max-epochs", 1, "--accelerator", "cpu"]
    assert run(*words, "--out", tmp_path / "model") == 0
    first, second = (PerturbDiff.load(path / "model", adata=False) for path in (folder, tmp_path))
    cells = ad.read_h5ad(folder / "controls.h5ad")
    np.testing.assert_array_equal(first.get_latent_representation(cells), second.get_latent_representation(cells))
    assert first.report_ is not None
    assert str(first.report_) == str(second.report_)


def test_embeddings_reach_perturbations_never_seen(folder: Path, tmp_path: Path) -> None:
    table = pd.DataFrame(np.random.default_rng(0).normal(size=(4, 3)), index=["P01", "P02", "P03", "P04"])
    table.to_csv(tmp_path / "features.csv")
    words = ["train", folder / "train.h5ad", *KEYS, "--embeddings", tmp_path / "features.csv", "--max-epochs", 1]
    assert run(*words, "--out", tmp_path / "model") == 0
    words = ["predict", tmp_path / "model", folder / "controls.h5ad", "--perturbations", "P04", "--n-cells", 3]
    assert run(*words, "--out", tmp_path / "pred.h5ad") == 0
    assert set(ad.read_h5ad(tmp_path / "pred.h5ad").obs["perturbation"]) == {"P04"}


@pytest.mark.parametrize(("separator", "components"), [("+", {"A", "B", "C"}), ("none", {"A", "B+C"})])
def test_names_with_a_separator_in_them(
    separator: str, components: set[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    obs = pd.DataFrame({"drug": ["DMSO", "A", "B+C"] * 4}, index=[f"c{i}" for i in range(12)])
    ad.AnnData(np.ones((12, 5), np.float32), obs=obs).write_h5ad(tmp_path / "screen.h5ad")
    found = set()
    monkeypatch.setattr(PerturbDiff, "train", lambda model, **_: found.update(model.conditions.components))
    monkeypatch.setattr(PerturbDiff, "save", lambda *_, **__: None)
    words = ["train", tmp_path / "screen.h5ad", "--out", tmp_path / "model", "--separator", separator]
    assert run(*words, "--perturbation-key", "drug", "--control", "DMSO") == 0
    assert found == components


# ---- evaluate -----------------------------------------------------------------------------------------------------


def test_evaluate_writes_tables_and_figures(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["predict", folder / "model", folder / "controls.h5ad", "--table", folder / "wanted.csv"]
    assert run(*words, "--out", tmp_path / "pred.h5ad") == 0
    words = ["evaluate", tmp_path / "pred.h5ad", folder / "real.h5ad", *KEYS, "--out", tmp_path / "scores"]
    words += ["--metrics", "energy_distance", "pearson_delta"]
    assert run(*words, "--train", folder / "train.h5ad") == 0
    written = sorted(p.name for p in (tmp_path / "scores").iterdir())
    assert {"table.csv", "summary.csv", "populations.png", "mean_shift.png"} <= set(written)
    table = pd.read_csv(tmp_path / "scores" / "table.csv")
    assert {"prediction", "no_change", "perturbation_mean_shift", "ceiling"} <= set(table["model"])
    assert set(table["metric"]) == {"energy_distance", "pearson_delta"}
    assert "energy_distance" in capsys.readouterr().out
    assert "already there" in failure(capsys, *words)
    # without training cells there are no simple rules to compare with
    assert run(*words, "--overwrite") == 0
    assert set(pd.read_csv(tmp_path / "scores" / "table.csv")["model"]) == {"prediction", "ceiling"}
    # the same cells, log-normalised, and no two sorts of metrics more than was asked for
    scores = table[table["model"] == "prediction"].set_index(["perturbation", "metric"])["value"]
    pred = ad.read_h5ad(tmp_path / "pred.h5ad")
    del pred.layers["counts"]
    pred.write_h5ad(tmp_path / "logged.h5ad")
    words = ["evaluate", tmp_path / "logged.h5ad", *words[2:], "--overwrite"]
    assert "layer_pred='counts' is not in pred.layers" in failure(capsys, *words)
    assert run(*words, "--normalized", "--train", folder / "train.h5ad") == 0
    again = pd.read_csv(tmp_path / "scores" / "table.csv")
    again = again[again["model"] == "prediction"].set_index(["perturbation", "metric"])["value"]
    pd.testing.assert_series_equal(again, scores, rtol=1e-3)
    assert "--allow-overlap" not in failure(capsys, *words, "--normalized", "--train", folder / "real.h5ad")


def test_evaluate_writes_a_report(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["predict", folder / "model", folder / "controls.h5ad", "--table", folder / "wanted.csv"]
    assert run(*words, "--out", tmp_path / "pred.h5ad") == 0
    words = ["evaluate", tmp_path / "pred.h5ad", folder / "real.h5ad", *KEYS, "--out", tmp_path / "scores"]
    words += ["--metrics", "energy_distance", "--train", folder / "train.h5ad", "--model", folder / "model"]
    page = tmp_path / "report.html"
    assert run(*words, "--report", page) == 0
    said, html = capsys.readouterr().out, page.read_text(encoding="utf-8")
    first = next(line for line in said.splitlines() if "better than the best simple rule" in line)
    assert first in html and f"Report in {page}" in said
    # what was run, and the scores of the table
    command = " ".join(map(str, ["scperturbdiff", *words, "--report", page]))
    assert command in html
    table = pd.read_csv(tmp_path / "scores" / "table.csv")
    for value in table.loc[table["model"] == "prediction", "value"]:
        assert f"<td>{value:.3g}</td>" in html
    assert "report.html already there. Pass --overwrite" in failure(
        capsys, *words, "--out", tmp_path / "2", "--report", page
    )
    assert "must end in .html" in failure(capsys, *words, "--overwrite", "--report", tmp_path / "report.doc")
    assert run(*words, "--overwrite", "--report", tmp_path / "card.md") == 0
    assert first.split("(")[0] in (tmp_path / "card.md").read_text(encoding="utf-8")


def test_evaluate_is_told_of_doses_and_separators(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: dict[str, object] = {}

    def evaluate(*_: object, **keys: object) -> None:
        told.update(keys)
        raise ValueError

    monkeypatch.setattr("scperturbdiff.evaluate", evaluate, raising=False)
    words = ["evaluate", folder / "real.h5ad", folder / "real.h5ad", *KEYS, "--out", tmp_path / "out"]
    assert run(*words, "--dose-key", "dose", "--separator", "none") == 1
    assert (told["dose_key"], told["separator"]) == ("dose", None)


# ---- errors -------------------------------------------------------------------------------------------------------


def test_a_missing_file_is_named(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    gone, out = tmp_path / "gone.h5ad", tmp_path / "out.zarr"
    for words in (
        ["train", gone, "--out", out, *KEYS],
        ["train", folder / "train.h5ad", "--out", out, *KEYS, "--embeddings", gone],
        ["predict", folder / "model", gone, "--out", out],
        ["predict", folder / "model", folder / "controls.h5ad", "--table", gone, "--out", out],
        ["predict", gone, folder / "controls.h5ad", "--out", out],
        ["evaluate", gone, folder / "real.h5ad", "--out", out, *KEYS],
        ["evaluate", folder / "real.h5ad", gone, "--out", out, *KEYS],
    ):
        assert str(gone) in failure(capsys, *words)
    assert not out.exists()


def test_a_missing_key_or_label_is_named(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["train", folder / "train.h5ad", "--out", tmp_path / "model"]
    wrong_key = ["--perturbation-key", "drug", "--control", "control"]
    assert "perturbation_key='drug' is not a column" in failure(capsys, *words, *wrong_key)
    right = ["--perturbation-key", "perturbation", "--control", "control"]
    assert "xpu2" in failure(capsys, *words, *right, "--max-epochs", 1, "--accelerator", "xpu2")
    wrong_label = ["--perturbation-key", "perturbation", "--control", "DMSO"]
    assert "control='DMSO' is not a value" in failure(capsys, *words, *wrong_label)
    words = ["predict", folder / "model", folder / "controls.h5ad", "--out", tmp_path / "pred.h5ad"]
    assert "'P011' (nearest known" in failure(capsys, *words, "--perturbations", "P011")
    assert "layer='raw'" in failure(capsys, *words, "--layer", "raw")
    assert list(tmp_path.iterdir()) == []


def test_files_of_another_kind_are_named(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "text.h5ad").write_text("not an h5ad file")
    words = ["train", tmp_path / "text.h5ad", "--out", tmp_path / "model", *KEYS]
    assert "text.h5ad' cannot be read as h5ad" in failure(capsys, *words)
    words = ["train", folder / "train.h5ad", "--out", tmp_path / "text.h5ad", "--overwrite", *KEYS]
    assert "a folder is wanted" in failure(capsys, *words)
    words = ["predict", tmp_path, folder / "controls.h5ad", "--out", tmp_path / "pred.h5ad"]
    assert "no model.json" in failure(capsys, *words)


def test_nothing_is_overwritten_unless_asked_for(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "pred.h5ad").write_text("mine")
    (tmp_path / "model").mkdir()
    words = ["predict", folder / "model", folder / "controls.h5ad", "--n-cells", 2, "--out", tmp_path / "pred.h5ad"]
    assert "already there" in failure(capsys, *words)
    assert (tmp_path / "pred.h5ad").read_text() == "mine"
    assert "already there" in failure(
        capsys, "train", folder / "train.h5ad", "--out", tmp_path / "model", *KEYS, "--max-epochs", 1
    )
    assert list((tmp_path / "model").iterdir()) == []
    assert run(*words, "--overwrite") == 0
    assert ad.read_h5ad(tmp_path / "pred.h5ad").n_obs == 2 * 2 * 3


def test_the_traceback_is_there_for_those_who_ask(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"gone\.h5ad"):
        run("train", tmp_path / "gone.h5ad", "--out", tmp_path / "model", *KEYS, "--traceback")


@pytest.mark.parametrize("words", [[], ["train"], ["predict", "a", "b"], ["demo", "--seed", "x"], ["fly"]])
def test_wrong_arguments_are_explained(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        run(*words)
    assert stop.value.code == 2
    assert "usage: scperturbdiff" in capsys.readouterr().err


@pytest.mark.parametrize("command", [[sys.executable, "-m", "scperturbdiff"], [SCRIPT]], ids=["module", "script"])
def test_the_command_is_installed(command: list[str]) -> None:
    said = subprocess.run([*command, "--help"], capture_output=True, text=True, check=True)
    for name in ("demo", "train", "predict", "evaluate"):
        assert name in said.stdout
    said = subprocess.run([*command, "--version"], capture_output=True, text=True, check=True)
    assert said.stdout == f"scperturbdiff {version('scperturbdiff')}\n"
