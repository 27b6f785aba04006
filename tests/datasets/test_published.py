"""Published screens: real files, small files in the forms of pertpy, and what is wrong with others."""

from __future__ import annotations

import hashlib
import sys
import threading
from contextlib import nullcontext
from doctest import DocTestParser
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import ModuleType
from typing import TYPE_CHECKING, Any

import anndata as ad
import h5py
import mudata
import numpy as np
import pandas as pd
import pytest
import scanpy as sc
from mudata import MuData
from scipy import sparse
from tests.helpers import FEW_STEPS, TINY

from scperturbdiff import PerturbDiff, datasets
from scperturbdiff.data import check_counts

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


def run_example(name: str, path: Path, monkeypatch: pytest.MonkeyPatch) -> ad.AnnData:
    """Run the example of a loader's docstring on a file, put where it says; what it set up."""
    lines = DocTestParser().get_examples(str(getattr(datasets, name).__doc__))
    folder = path.parent / "example"
    folder.mkdir()
    monkeypatch.chdir(folder)
    for ending in ("h5ad", "h5mu"):
        (folder / f"{name}.{ending}").symlink_to(path)
    namespace: dict[str, Any] = {}
    exec("".join(line.source for line in lines), namespace)
    adata: ad.AnnData = namespace["adata"]
    return adata


def matrix(n: int, n_genes: int = 12, seed: int = 0) -> sparse.csc_matrix:
    return sparse.csc_matrix(np.random.default_rng(seed).poisson(2.0, (n, n_genes)).astype(np.float32))


def cells(rows: list[tuple[Any, ...]], columns: list[str], repeats: int = 8) -> ad.AnnData:
    """`repeats` cells of each row, in the order of pertpy's files: not sorted by anything."""
    obs = pd.DataFrame([row for _ in range(repeats) for row in rows], columns=columns)
    obs.index = [f"AAAC{i}-1" for i in range(len(obs))]
    for column in obs:
        if obs[column].dtype == object:
            obs[column] = obs[column].astype("category")
    counts = matrix(len(obs))
    return ad.AnnData(counts, obs=obs, var=pd.DataFrame(index=[f"GENE{i}" for i in range(counts.shape[1])]))


def kang() -> ad.AnnData:
    rows = [
        (label, kind, f"patient_{donor}", 7)
        for label in ("stim", "ctrl")
        for kind in ("CD14+ Monocytes", "B cells")
        for donor in (101, 1015)
    ]
    return cells(rows, ["label", "cell_type", "replicate", "nCount_RNA"])


def papalexi() -> MuData:
    rows = [
        (gene, f"{gene}g{guide}", "NT" if gene == "NT" else "Perturbed", replicate)
        for gene in ("STAT1", "NT", "IFNGR1")
        for guide in (1, 2)
        for replicate in ("rep1", "rep2")
    ]
    rna = cells(rows, ["gene_target", "guide_ID", "perturbation", "replicate"])
    protein = ad.AnnData(np.ones((rna.n_obs, 2), np.float32), obs=rna.obs[[]], var=pd.DataFrame(index=["CD86", "PDL1"]))
    with mudata.set_options(pull_on_update=False) if hasattr(mudata, "set_options") else nullcontext():
        return MuData({"rna": rna, "adt": protein})


def norman() -> ad.AnnData:
    rows = [(name, lane) for name in ("KLF1", "control", "KLF1+MAP2K6", "MAP2K6") for lane in (1, 2)]
    adata = cells(rows, ["perturbation_name", "gemgroup"])
    adata.layers["counts"] = adata.X.copy()
    sc.pp.normalize_total(adata)
    sc.pp.log1p(adata)
    return adata


def write(data: ad.AnnData | MuData, path: Path) -> Path:
    data.write(path)
    return path


MADE = {"kang_2018": kang, "papalexi_2021": papalexi, "norman_2019": norman}


@pytest.fixture(params=MADE)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def test_files_of_pertpy_become_one_form(name: str, tmp_path: Path) -> None:
    given = MADE[name]()
    path = write(given, tmp_path / "file.bin")  # what is in it counts, not what it is called
    adata = getattr(datasets, name)(path)
    raw = given.mod["rna"] if isinstance(given, MuData) else given
    assert adata.X.dtype == np.int32 and adata.X.format == "csr"
    np.testing.assert_array_equal(adata.X.toarray(), raw.layers.get("counts", raw.X).toarray())
    assert adata.obs_names.equals(raw.obs_names) and adata.var_names.equals(raw.var_names)
    source = adata.uns["source"]
    assert source["data_set"] == name and source["from"] == str(path)
    assert source["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
    assert source["control"] in set(adata.obs["perturbation"])
    # what was read can be written, and read again
    again = getattr(datasets, name)(write(adata, tmp_path / "again.h5ad"))
    pd.testing.assert_frame_equal(again.obs, adata.obs)
    assert (again.X != adata.X).nnz == 0


def test_values_are_named_alike(tmp_path: Path) -> None:
    blood = datasets.kang_2018(write(kang(), tmp_path / "kang.h5ad"))
    assert list(blood.obs) == ["perturbation", "cell_type", "donor"]
    assert [set(blood.obs[c]) for c in blood.obs] == [
        {"control", "stimulated"}, {"CD14+ Monocytes", "B cells"}, {"101", "1015"},
    ]  # fmt: skip
    assert ((blood.obs["perturbation"] == "control") == (kang().obs["label"] == "ctrl")).all()
    knock_out = datasets.papalexi_2021(write(papalexi(), tmp_path / "papalexi.h5mu"))
    assert list(knock_out.obs) == ["perturbation", "guide", "replicate", "cell_type"]
    assert set(knock_out.obs["perturbation"]) == {"NT", "STAT1", "IFNGR1"}
    assert set(knock_out.obs["replicate"]) == {"rep1", "rep2"} and set(knock_out.obs["cell_type"]) == {"THP-1"}
    pairs = datasets.norman_2019(write(norman(), tmp_path / "norman.h5ad"))
    assert list(pairs.obs) == ["perturbation", "lane", "cell_type"]
    assert set(pairs.obs["perturbation"]) == {"control", "KLF1", "MAP2K6", "KLF1+MAP2K6"}
    assert set(pairs.obs["lane"]) == {"1", "2"} and set(pairs.obs["cell_type"]) == {"K562"}


def test_columns_may_be_those_of_all_modalities(tmp_path: Path) -> None:
    """Older and newer files differ in where annotation is kept."""
    mdata = papalexi()
    expected = datasets.papalexi_2021(write(mdata, tmp_path / "in_rna.h5mu"))
    mdata.obs["gene_target"] = mdata.mod["rna"].obs.pop("gene_target")
    mdata.obs["rna:replicate"] = mdata.mod["rna"].obs.pop("replicate")
    found = datasets.papalexi_2021(write(mdata, tmp_path / "in_all.h5mu"))
    pd.testing.assert_frame_equal(found.obs, expected.obs)


def test_the_example_of_the_docstring_runs(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    adata = run_example(name, write(MADE[name](), tmp_path / "file"), monkeypatch)
    model = PerturbDiff(adata, **TINY)
    model.train(**FEW_STEPS)
    wanted = next(p for p in adata.obs["perturbation"].unique() if p != adata.uns["source"]["control"])
    assert set(model.predict(adata, [wanted], n_cells=4, progress=False).obs["perturbation"]) == {wanted}


REAL = {
    "kang_2018": ("kang2018_scgen_valid.h5ad", (1975, 6998), 1039, 2),
    "papalexi_2021": ("papalexi2021_sceptre_299g.h5ad", (20729, 299), 18343, 26),
    "norman_2019": ("norman2019_perturbench_500g.h5ad", (3375, 250), 3275, 34),
}


def test_real_files(name: str, data_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, shape, n_treated, n_labels = REAL[name]
    given = ad.read_h5ad(data_dir / file)
    (tmp_path / file).symlink_to(data_dir / file)
    adata = run_example(name, tmp_path / file, monkeypatch)
    assert adata.shape == shape and adata.obs["perturbation"].nunique() == n_labels
    assert (adata.obs["perturbation"] != adata.uns["source"]["control"]).sum() == n_treated
    assert (adata.X != given.X).nnz == 0
    check_counts(adata.X)
    np.testing.assert_array_equal(adata.obs["n_counts_original"], given.obs["n_counts_original"])
    if name == "kang_2018":
        # the two namings of cell types agree: Kang's own, where the file has it, says the same
        own = given.obs["cell_type_kang"].astype(str)
        assert set(adata.obs["cell_type"]) == set(own) - {"unlabelled", "Megakaryocytes"}
        assert (adata.obs["cell_type"].astype(str) == own)[own != "unlabelled"].mean() > 0.8


def test_the_digest_of_a_file_is_checked(tmp_path: Path) -> None:
    path = write(kang(), tmp_path / "kang.h5ad")
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    assert datasets.kang_2018(path, sha256=digest.upper()).n_obs == kang().n_obs
    with pytest.raises(ValueError, match=f"has the SHA-256 digest {digest}, not {'0' * 64}: another or a damaged file"):
        datasets.kang_2018(path, sha256="0" * 64)
    with pytest.raises(ValueError, match="sha256='abc' must be a SHA-256 digest, 64 hexadecimal digits"):
        datasets.kang_2018(path, sha256="abc")
    with pytest.raises(ValueError, match=r"give path_or_url=\.\.\., too"):
        datasets.kang_2018(sha256=digest)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[tuple[str, list[str]]]:
    """Addresses below which there is a file, one that ends too early, and nothing; and what was asked for."""
    whole = write(kang(), tmp_path / "served").read_bytes()
    asked: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            self.send_response(404 if "absent" in self.path else 200)
            self.send_header("Content-Length", str(len(whole)))
            self.end_headers()
            self.wfile.write(whole[:1000] if "short" in self.path else whole)

        def log_message(self, format: str, *args: Any) -> None:
            pass

    httpd = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=partial(httpd.serve_forever, poll_interval=0.01), daemon=True).start()
    yield f"http://127.0.0.1:{httpd.server_port}", asked
    httpd.shutdown()
    httpd.server_close()


def test_a_url_is_downloaded_once(server: tuple[str, list[str]], tmp_path: Path) -> None:
    address, asked = server
    cache = tmp_path / "cache"
    first, second = (datasets.kang_2018(f"{address}/files/kang.h5ad?download=1", cache) for _ in range(2))
    assert len(asked) == 1 and (first.X != second.X).nnz == 0
    assert first.uns["source"]["from"] == f"{address}/files/kang.h5ad?download=1"
    assert [path.name.partition("-")[2] for path in cache.iterdir()] == ["kang.h5ad"]
    datasets.kang_2018(f"{address}/elsewhere/kang.h5ad", cache)  # another file of the same name
    assert len(asked) == len(list(cache.iterdir())) == 2


@pytest.mark.parametrize(
    ("file", "sha256", "error", "told"),
    [
        ("short.h5ad", None, OSError, "could not be downloaded: it ended after 1000 of"),
        ("absent.h5ad", None, OSError, "could not be downloaded: HTTP Error 404.*give its path"),
        ("kang.h5ad", "1" * 64, ValueError, "another or a damaged file"),
    ],
)
def test_a_download_that_fails_leaves_nothing(
    server: tuple[str, list[str]], tmp_path: Path, file: str, sha256: str | None, error: type[Exception], told: str
) -> None:
    with pytest.raises(error, match=told):
        datasets.kang_2018(f"{server[0]}/{file}", tmp_path / "cache", sha256=sha256)
    assert list((tmp_path / "cache").iterdir()) == []


def fake_pertpy(monkeypatch: pytest.MonkeyPatch, load: Any) -> None:
    package, data = ModuleType("pertpy"), ModuleType("pertpy.data")
    data.kang_2018 = load  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "pertpy", package)
    monkeypatch.setitem(sys.modules, "pertpy.data", data)
    monkeypatch.setattr("importlib.metadata.version", lambda name: f"1.0 of {name}")


def test_pertpy_is_asked_where_no_file_is_given(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    folders = []

    def load() -> ad.AnnData:
        folders.append(sc.settings.datasetdir)
        return kang()

    fake_pertpy(monkeypatch, load)
    before = sc.settings.datasetdir
    adata = datasets.kang_2018(cache_dir=tmp_path)
    datasets.kang_2018()
    assert folders == [tmp_path, before] and sc.settings.datasetdir == before
    assert adata.uns["source"]["from"] == "pertpy 1.0 of pertpy" and set(adata.obs["donor"]) == {"101", "1015"}


def test_without_file_or_pertpy_or_network_both_ways_are_named(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pertpy", None)  # as if it were not installed
    monkeypatch.delitem(sys.modules, "pertpy.data", raising=False)
    with pytest.raises(ImportError, match=rf"{name}\('{name}.h5ad'\).*pip install pertpy.*pertpy.data.{name}\(\)"):
        getattr(datasets, name)()
    if name == "kang_2018":

        def offline() -> ad.AnnData:
            raise ConnectionError("no route to host")

        fake_pertpy(monkeypatch, offline)
        with pytest.raises(OSError, match=r"pertpy could not get kang_2018: no route to host.*path or URL"):
            datasets.kang_2018()


def changed(data: Any, **columns: Any) -> ad.AnnData:
    for column, value in columns.items():
        if value is None:
            del data.obs[column]
        else:
            data.obs[column] = value
    return data


WRONG = {
    "no column": ("kang_2018", lambda: changed(kang(), label=None), "no column for 'perturbation'.*'label' or"),
    "no controls": ("kang_2018", lambda: changed(kang(), label="stim"), "'control' is not a value of .*'stimulated'"),
    "other perturbations": (
        "kang_2018",
        lambda: changed(kang(), label=["ctrl", "PMA"] * 32),
        "is not kang_2018: obs has perturbations 'PMA'",
    ),
    "missing labels": ("norman_2019", lambda: changed(norman(), perturbation_name=np.nan), "is missing"),
    "cells of other lines": (
        "norman_2019",
        lambda: changed(norman(), cell_type=["T", "B"] * 32),
        "one line: obs.'cell_type'. has several values",
    ),
    "another data set": ("papalexi_2021", kang, "is not papalexi_2021: obs has no column for 'perturbation'"),
    "no counts": ("kang_2018", lambda: sc.pp.log1p(kang(), copy=True), "kang_2018, .*must hold raw counts"),
    "no RNA": (
        "papalexi_2021",
        lambda: MuData({"adt": papalexi().mod["adt"]}),
        "has no modality 'rna'. Modalities: 'adt'",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_files_are_named(case: str, tmp_path: Path) -> None:
    name, make, told = WRONG[case]
    path = write(make(), tmp_path / "wrong")
    with pytest.raises(ValueError, match=told) as caught:
        getattr(datasets, name)(path)
    assert str(path) in str(caught.value)


def test_what_is_no_file(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("not found")
    with pytest.raises(ValueError, match="is no HDF5 file"):
        datasets.kang_2018(tmp_path / "text")
    with pytest.raises(FileNotFoundError, match="absent"):
        datasets.kang_2018(tmp_path / "absent.h5ad")
    with pytest.raises(ValueError, match="URL that begins with http"):
        datasets.kang_2018("ftp://host/kang.h5ad", tmp_path)
    with pytest.raises(TypeError, match="path_or_url=3 must be the path or the URL of a file"):
        datasets.kang_2018(3)  # type: ignore[arg-type]
    with h5py.File(tmp_path / "other.h5", "w") as file:
        file["numbers"] = [1, 2]
    with pytest.raises(ValueError, match="holds no AnnData and no MuData, but 'numbers'"):
        datasets.kang_2018(tmp_path / "other.h5")
