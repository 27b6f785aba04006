"""Code in the documentation runs: the notebooks in quick mode, the Python blocks of the pages on a small screen.

Pages are short, their code fits the column, and links lead somewhere.
"""

from __future__ import annotations

import gzip
import json
import re
from pathlib import Path
from typing import Any

import anndata as ad
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest

import scperturbdiff as spd
from scperturbdiff.data import log_normalize

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted((ROOT / "tutorials").glob("*.ipynb"))
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").glob("*.md")])
RECORDS = sorted((ROOT / "docs" / "benchmarks").glob("*.md"))
FENCE = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)
CODE = re.compile(r"^```(?:\{code-block\} )?(python|r)\n(.*?)^```", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\(([^)\s]+)\)")

SLOW = ("populations", "crispr", "unseen_cell_type", "conditions")
"""Tutorials and pages that take long: the nightly run has them."""
FOR_READING = {"logging": "scvi.autotune needs Ray and minutes: tests/test_integration.py runs it, if Ray is installed"}
"""Page -> why it has a Python block that no test here runs."""
SCRIPTS = {"parallel": "its script starts processes of its own: tests/training/test_parallel.py runs one like it"}
"""Page -> why no Python block of it is run here."""
MAX_COLUMNS = 88  # of code, beside which the theme shows a scroll bar
MAX_WORDS = 850  # of a page, about 600 for most: what goes beyond are records, which belong to docs/benchmarks
REFERENCE = {"api": "the list of public names", "changelog": "CHANGELOG.md"}
"""Page -> why it may be longer."""
HOSTED = {
    "https://scperturbdiff.readthedocs.io/en/stable/": ROOT / "docs",
    "https://github.com/OWNER/scperturbdiff/blob/main/": ROOT,
    "https://raw.githubusercontent.com/OWNER/scperturbdiff/main/": ROOT,
}
"""Beginning of addresses in README.md -> the folder that is published there."""

SCREEN = {"n_contexts": 3, "n_perturbations": 5, "n_cells_per_population": 12, "n_genes": 80, "n_batches": 2}
TRAINING: dict[str, Any] = {"max_epochs_vae": 2, "max_epochs_generator": 2, "enable_progress_bar": False}


def blocks(page: Path) -> list[str]:
    return FENCE.findall(page.read_text(encoding="utf-8"))


def with_blocks(page: Path) -> bool:
    return bool(blocks(page)) and page.stem not in SCRIPTS


def run(name: str, sources: list[str], namespace: dict[str, Any]) -> dict[str, Any]:
    """Run pieces of code one after the other, as a notebook does."""
    for number, source in enumerate(sources):
        exec(compile(source, f"{name}, code {number}", "exec"), namespace)
        plt.close("all")
    return namespace


@pytest.fixture
def in_short(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Screens are small and training is short, whatever the text says; files land in a folder of the test's own."""
    simulate, train = spd.datasets.simulate, spd.PerturbDiff.train
    monkeypatch.setattr(spd.datasets, "simulate", lambda **asked: simulate(**{**asked, **SCREEN}))

    def short(self: spd.PerturbDiff, **asked: Any) -> None:
        plan = {**asked.get("plan_kwargs", {}), "steps_per_epoch": 3}
        train(self, **{**asked, **TRAINING, "plan_kwargs": plan})

    monkeypatch.setattr(spd.PerturbDiff, "train", short)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write_annotation(folder: Path) -> None:
    """Files in the formats of geneontology.org: a hundred genes of the simulator, each with ten of eighty terms."""
    terms = [f"GO:{i:02d}" for i in range(80)]
    (folder / "go-basic.obo").write_text("\n".join(f"[Term]\nid: {term}\n" for term in terms))
    lines, rng = ["!gaf-version: 2.2"], np.random.default_rng(0)
    for gene in (f"gene{i:04d}" for i in range(100)):
        for term in rng.choice(terms, size=10, replace=False):
            columns = ["X", gene, gene, "", term, "X", "IDA", "", "P", "", "", "protein", "taxon:9606", "20260101"]
            lines.append("\t".join([*columns, "X", "", ""]))
    (folder / "goa_human.gaf.gz").write_bytes(gzip.compress(("\n".join(lines) + "\n").encode()))


def presumed(page: str, folder: Path) -> dict[str, Any]:
    """What a page takes for granted before its first line of code: files, or names it uses without saying."""
    if page == "features.md":
        write_annotation(folder)
    if page not in ("README.md", "r_users.md", "from_the_paper.md", "security.md"):
        return {}
    adata = spd.datasets.simulate(combinations=2)
    names = {"control": "DMSO", "P01": "drugA", "P02": "drugB"}
    if page in ("README.md", "r_users.md"):
        pair = adata.obs["perturbation"].astype(str)
        first_pair = next(name for name in pair if "+" in name)
        adata.obs["drug"] = pair.replace({**names, first_pair: "drugA+drugB"}).to_numpy()
        del adata.obs["perturbation"]
        adata[::2].write_h5ad(folder / "screen.h5ad")
        adata[1::2].write_h5ad(folder / "measured.h5ad")
        untreated = adata[(adata.obs["drug"] == "DMSO").to_numpy()].copy()
        untreated.write_h5ad(folder / "untreated.h5ad")
        return {}
    spd.PerturbDiff.setup_anndata(adata, "perturbation", "control", context_keys=["cell_type"])
    if page == "security.md":
        pytest.importorskip("huggingface_hub", reason="scvi.hub needs huggingface_hub")
        model = spd.PerturbDiff(adata)
        model.train()
        return {"model": model, "spd": spd}
    controls = adata[(adata.obs["perturbation"] == "control").to_numpy()].copy()
    return {"adata": adata, "controls": controls, "perturbations": ["P01"]}


def predictions(namespace: dict[str, Any]) -> list[ad.AnnData]:
    """The predicted cells that a piece of code leaves, each looked at."""
    found = [x for x in namespace.values() if isinstance(x, ad.AnnData) and "scperturbdiff" in x.uns]
    for pred in found:
        made_by = pred.uns["scperturbdiff"]
        name, control = (made_by["keys"][key] for key in ("perturbation", "control"))
        columns = [name, *made_by["keys"]["context"]]
        asked = made_by["conditions"][columns].astype(str).drop_duplicates()
        given = pred.obs[columns].astype(str).drop_duplicates()
        assert len(given) and set(map(tuple, given.to_numpy())) == set(map(tuple, asked.to_numpy()))
        assert control not in set(given[name])
        counts = pred.layers["counts"]
        assert counts.dtype.kind == "i" and counts.min() >= 0 and (counts.sum(1) > 0).all()
        assert (pred.X != log_normalize(counts, made_by["target_sum"])).nnz == 0
    return found


def pairs(table: pd.DataFrame) -> set[tuple[str, str]]:
    return set(zip(table["perturbation"].astype(str), table["cell_type"].astype(str), strict=True))


def check_evaluation(namespace: dict[str, Any]) -> None:
    """Held-out pairs are what is predicted and scored, beside simple rules."""
    held_out, table = pairs(namespace["split"].held_out), namespace["table"]
    assert held_out and pairs(namespace["pred"].obs) == held_out == pairs(table)
    assert {"prediction", "no_change", "perturbation_mean_shift"} <= set(table["model"])
    scores = table[(table["metric"] == "energy_distance") & (table["model"] != "additive")]  # held out in its context
    assert np.isfinite(scores["value"]).all()


def check_readme(namespace: dict[str, Any]) -> None:
    assert set(namespace["pred"].obs["drug"]) == {"drugA", "drugA+drugB"}
    assert "drugA+drugB" in Path("report.html").read_text(encoding="utf-8")


def check_features(namespace: dict[str, Any]) -> None:
    assert set(namespace["pred"].obs["target"]) == {"gene0008"}
    assert namespace["go"].index.tolist() == namespace["genes"]


def check_logging(namespace: dict[str, Any]) -> None:
    """Both stages are in one file, and the history is empty, as the page says."""
    logged = pd.read_csv("logs/lightning_logs/version_0/metrics.csv")
    named = ["elbo_train", "reconstruction_loss_train", "generator_loss_train"]
    named += ["energy_distance_validation", "network_change_validation"]
    assert logged[named].notna().any().all()
    assert namespace["model"].history_ == {}


def check_r_users(namespace: dict[str, Any]) -> None:
    assert set(ad.read_h5ad("pred.h5ad").obs["drug"]) == {"drugA"}
    assert "drugA" in Path("report.html").read_text(encoding="utf-8")


def check_populations(namespace: dict[str, Any]) -> None:
    genes, conditions = namespace["summary"]
    assert namespace["pred"].obs["population"].nunique() == 20 and (conditions["n_draws"] == 20).all()
    assert (genes["lower"] <= genes["upper"]).all() and (genes["lower"] < genes["upper"]).any()


def check_conditions(namespace: dict[str, Any]) -> None:
    assert set(namespace["pred"].obs["perturbation"]) == {"new drug"}
    assert namespace["adapted"].is_trained_ and len(namespace["adapted"].populations)


def check_paper(namespace: dict[str, Any]) -> None:
    assert set(namespace["predicted"].obs["perturbation"]) == {"P01"}
    assert namespace["model"].report_.settings["diffusion"]["objective"] == "mmd+mse"
    made_by = namespace["predicted"].uns["scperturbdiff"]
    assert (made_by["sampler"], made_by["guidance"], made_by["n_steps"]) == ("ddim", 1.5, 50)


LEFT = {
    "README": check_readme,
    "conditions": check_conditions,
    "evaluation": check_evaluation,
    "features": check_features,
    "from_the_paper": check_paper,
    "logging": check_logging,
    "populations": check_populations,
    "quickstart": check_evaluation,
    "r_users": check_r_users,
}
"""Page -> a check of what its code leaves."""


def _each(paths: list[Path]) -> list[Any]:
    return [pytest.param(path, marks=[pytest.mark.slow] if path.stem in SLOW else [], id=path.stem) for path in paths]


@pytest.mark.parametrize("page", _each([*filter(with_blocks, [*PAGES, *RECORDS])]))
def test_python_blocks_of_a_page_run(page: Path, in_short: Path) -> None:
    code = blocks(page)
    namespace = run(page.name, code, presumed(page.name, in_short))
    assert bool(predictions(namespace)) == any(".predict(" in block for block in code)
    if page.stem in LEFT:
        LEFT[page.stem](namespace)


@pytest.mark.parametrize("notebook", _each(NOTEBOOKS))
def test_tutorial_runs(notebook: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("SCPERTURBDIFF_QUICK", "1")
    monkeypatch.setenv("SCPERTURBDIFF_KANG", str(tmp_path / "absent.h5ad"))
    monkeypatch.chdir(tmp_path)
    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    namespace = run(notebook.name, ["".join(c["source"]) for c in cells if c["cell_type"] == "code"], {})
    assert namespace["QUICK"]
    assert predictions(namespace)


def test_tutorials_are_listed() -> None:
    listed = (ROOT / "docs" / "tutorials.md").read_text(encoding="utf-8")
    assert NOTEBOOKS
    for notebook in NOTEBOOKS:
        assert f"tutorials/{notebook.stem}\n" in listed


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_python_blocks_that_do_not_run_have_a_reason(page: Path) -> None:
    assert ("```{code-block} python" in page.read_text(encoding="utf-8")) == (page.stem in FOR_READING)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_pages_are_short_and_code_fits(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    if page.stem not in REFERENCE:
        assert len(text.split()) <= MAX_WORDS
    if page.stem not in SCRIPTS:
        lines = [line for _, code in CODE.findall(text) for line in code.splitlines()]
        assert [line for line in lines if len(line) > MAX_COLUMNS] == []


def test_links_of_the_readme_work_elsewhere() -> None:
    """PyPI shows README.md, too, where links within the repository lead nowhere."""
    targets = LINK.findall((ROOT / "README.md").read_text(encoding="utf-8"))
    assert [target for target in targets if not target.startswith("https://")] == []
    ours = [(target, start) for target in targets for start in HOSTED if target.startswith(start)]
    assert ours
    for target, start in ours:
        path = HOSTED[start] / target.removeprefix(start).partition("#")[0]
        assert (path.with_suffix(".md") if path.suffix == ".html" else path).is_file(), target


def test_every_page_is_in_the_sidebar() -> None:
    listed = (ROOT / "docs" / "index.md").read_text(encoding="utf-8").splitlines()
    pages = [
        path.relative_to(ROOT / "docs").with_suffix("").as_posix()
        for path in [*PAGES, *RECORDS]
        if "docs" in path.parts
    ]
    assert [page for page in pages if page != "index" and page not in listed] == []


@pytest.mark.parametrize("page", [*PAGES, *RECORDS], ids=lambda page: "/".join(page.parts[-2:]))
def test_links_between_pages_lead_somewhere(page: Path) -> None:
    for target in LINK.findall(page.read_text(encoding="utf-8")):
        path = target.partition("#")[0]
        if "://" in path or not path or target.startswith("mailto:"):
            continue
        beside = page.parent / path
        notebook = ROOT / f"{path}.ipynb"
        assert beside.exists() or notebook.exists(), f"{page.name} links to {target}, which does not exist"
