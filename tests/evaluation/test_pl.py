from __future__ import annotations

from typing import TYPE_CHECKING, Any

import anndata as ad
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from matplotlib.collections import PathCollection
from matplotlib.text import Annotation, Text
from scipy import sparse

from scperturbdiff import pl

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from matplotlib.axes import Axes

N_GENES = 30
KEYS: dict[str, Any] = {"perturbation_key": "perturbation", "context": {"cell_type": "B"}}


def _cells(seed: int, shift_sd: float = 0.0, n_populations: int = 6, n: int = 20) -> ad.AnnData:
    """Control and treated counts of one cell type; a treatment shared by a population varies with `shift_sd`."""
    rng = np.random.default_rng(seed)
    effect = np.zeros(N_GENES)
    effect[:6] = [1.5, -1.5, 1.2, -1.2, 1.0, 0.8]
    rows, obs = [], []
    for population in range(n_populations):
        own = effect * (1 + shift_sd * rng.standard_normal())
        for name in ("control", "drug"):
            rows.append(rng.poisson(4 * np.exp(own if name == "drug" else 0 * own), size=(n, N_GENES)))
            obs += [(name, "B", f"r{population}")] * n
    names = [f"c{i}" for i in range(len(obs))]
    frame = pd.DataFrame(obs, columns=["perturbation", "cell_type", "population"], index=names)
    cells = ad.AnnData(sparse.csr_matrix(np.concatenate(rows), dtype=np.float32), obs=frame)
    cells.var_names = [f"g{i}" for i in range(N_GENES)]
    cells.layers["counts"] = cells.X.copy()
    return cells


@pytest.fixture(scope="module")
def real() -> ad.AnnData:
    return _cells(1, shift_sd=0.3)


@pytest.fixture(scope="module")
def pred() -> ad.AnnData:
    cells = _cells(2)
    return cells[cells.obs["perturbation"] == "drug"].copy()


@pytest.fixture(autouse=True)
def close_figures() -> Iterator[None]:
    plt.close("all")  # what other tests left
    yield
    plt.close("all")


@pytest.fixture
def summary() -> pd.DataFrame:
    rows = [
        ("model", "prediction", "energy_distance", 0.7),
        ("model", "prediction", "pearson_delta", np.nan),
        ("floor", "baseline", "energy_distance", 0.0),
        ("floor", "baseline", "pearson_delta", -12.3),
        ("ceiling", "ceiling", "energy_distance", 1.0),
        ("ceiling", "ceiling", "pearson_delta", 1.0),
    ]
    return pd.DataFrame(rows, columns=["model", "role", "metric", "normalized"]).assign(separated=True)


def _offsets(ax: Axes) -> list[np.ndarray]:
    found = [np.asarray(c.get_offsets()) for c in ax.collections if isinstance(c, PathCollection)]
    return [points for points in found if len(points)]


FIGURES: dict[str, Callable[..., Axes]] = {
    "mean_shift": pl.mean_shift,
    "populations": pl.populations,
    "violins": pl.violins,
    "draws": lambda *args, **kwargs: pl.draws(*args, replicate_key="population", **kwargs),
}


@pytest.mark.parametrize("name", FIGURES)
def test_axes_given_are_used_and_new_ones_made(name: str, pred: ad.AnnData, real: ad.AnnData) -> None:
    figure, given = plt.subplots()
    assert FIGURES[name](pred, real, "control", ax=given, **KEYS) is given
    made = FIGURES[name](pred, real, "control", **KEYS)
    assert made.figure is not figure and "drug" in made.get_title() + made.get_title(loc="left")
    made.figure.canvas.draw()
    assert len(plt.get_fignums()) == 2


def test_mean_shift_shows_the_shifts(pred: ad.AnnData, real: ad.AnnData) -> None:
    ax = pl.mean_shift(pred, real, "control", n_label=4, **KEYS)
    everything, named = _offsets(ax)
    x = real.X.toarray()
    logged = np.log1p(1e4 * x / x.sum(axis=1, keepdims=True))
    treated = (real.obs["perturbation"] == "drug").to_numpy()
    np.testing.assert_allclose(everything[:, 0], logged[treated].mean(0) - logged[~treated].mean(0), atol=1e-4)
    assert np.corrcoef(everything.T)[0, 1] > 0.95
    labels = [child.get_text() for child in ax.get_children() if isinstance(child, Annotation)]
    assert len(labels) == len(named) == 4 and set(labels) <= {f"g{i}" for i in range(6)}


def test_labels_keep_apart(pred: ad.AnnData, real: ad.AnnData) -> None:
    ax = pl.mean_shift(pred, real, "control", n_label=12, **KEYS)
    ax.figure.canvas.draw()
    texts = [child for child in ax.get_children() if isinstance(child, Annotation)]
    assert len(texts) == 12
    extents = [Text.get_window_extent(text) for text in texts]
    clashes = sum(a.overlaps(b) for i, a in enumerate(extents) for b in extents[:i])
    assert clashes == 0


def test_populations_are_placed_among_the_real_cells(pred: ad.AnnData, real: ad.AnnData) -> None:
    ax = pl.populations(pred, real, "control", **KEYS)
    assert [t.get_text() for t in ax.get_legend().get_texts()] == ["control (120)", "real (120)", "predicted (120)"]
    assert len(_offsets(ax)[0]) == 360 and ax.get_xlabel() == "PC1"
    few = pl.populations(pred, real, "control", max_cells=50, **KEYS)
    assert len(_offsets(few)[0]) == 150
    with pytest.raises(ValueError, match="basis='tsne' is unknown. Allowed: 'pca', 'umap'"):
        pl.populations(pred, real, "control", basis="tsne", **KEYS)  # type: ignore[arg-type]


@pytest.mark.slow
def test_populations_by_umap(pred: ad.AnnData, real: ad.AnnData) -> None:
    ax = pl.populations(pred, real, "control", basis="umap", n_pcs=5, max_cells=40, **KEYS)
    points = _offsets(ax)[0]
    assert ax.get_xlabel() == "UMAP1" and points.shape == (120, 2) and np.isfinite(points).all()


def test_violins_of_chosen_genes(pred: ad.AnnData, real: ad.AnnData) -> None:
    ax = pl.violins(pred, real, "control", ["g3", "g20"], **KEYS)
    assert [t.get_text() for t in ax.get_xticklabels()] == ["g3", "g20"]
    assert [t.get_text() for t in ax.get_legend().get_texts()] == ["control", "real", "predicted"]
    default = pl.violins(pred, real, "control", n_genes=3, **KEYS)
    assert {t.get_text() for t in default.get_xticklabels()} <= {f"g{i}" for i in range(6)}
    with pytest.raises(ValueError, match="1 of the genes are not in real.var_names: 'IFIT1'"):
        pl.violins(pred, real, "control", ["g3", "IFIT1"], **KEYS)


def test_draws_show_the_spread_of_populations(pred: ad.AnnData, real: ad.AnnData) -> None:
    ax = pl.draws(pred, real, "control", replicate_key="population", genes=["g0", "g1"], **KEYS)
    assert [t.get_text() for t in ax.get_xticklabels()] == ["PC1", "g0", "g1"]
    assert [t.get_text() for t in ax.get_legend().get_texts()] == ["real replicates (6)", "predicted draws (6)"]
    observed, predicted = (points.reshape(6, 3, 2)[:, :, 1] for points in _offsets(ax))
    assert observed[:, 0].min() > 0 and observed[:, 1].min() > 0 and observed[:, 2].max() < 0
    # Real replicates vary in their response, these predicted draws do not.
    assert (observed.std(axis=0) > 1.5 * predicted.std(axis=0))[:2].all()
    with pytest.raises(KeyError, match="replicate_key='donor' is not a column"):
        pl.draws(pred, real, "control", replicate_key="donor", **KEYS)


def test_scores_heat_map(summary: pd.DataFrame) -> None:
    ax = pl.scores(summary)
    assert [t.get_text() for t in ax.get_yticklabels()] == ["model", "floor"]
    assert [t.get_text() for t in ax.get_xticklabels()] == ["energy distance", "pearson delta"]
    assert [t.get_text() for t in ax.texts] == ["0.70", "–", "0.00", "-12"]
    assert ax.images[0].get_array().mask.tolist() == [[False, True], [False, False]]
    _, given = plt.subplots()
    few = pl.scores(summary, models=["floor"], metrics=["pearson_delta"], ax=given)
    assert few is given and [t.get_text() for t in few.texts] == ["-12"]
    unsure = pl.scores(summary.assign(separated=summary["metric"] == "pearson_delta"))
    assert [t.get_text() for t in unsure.texts] == ["(0.70)", "–", "(0.00)", "-12"]
    with pytest.raises(ValueError, match="metrics not in the summary: 'mmd'"):
        pl.scores(summary, metrics=["mmd"])
    with pytest.raises(ValueError, match="no normalised score"):
        pl.scores(summary.assign(normalized=np.nan))


def test_wrong_input_is_named(pred: ad.AnnData, real: ad.AnnData) -> None:
    two = pred.copy()
    two.obs["perturbation"] = "toxin"
    with pytest.raises(ValueError, match=r"real.obs\['perturbation'\] has no 'toxin'. Values: 'control', 'drug'"):
        pl.mean_shift(two, real, "control", **KEYS)
    with pytest.raises(ValueError, match=r"pred.obs\['cell_type'\] has no 'T'"):
        pl.mean_shift(pred, real, "control", perturbation_key="perturbation", context={"cell_type": "T"})
    with pytest.raises(ValueError, match="pred holds 2 perturbations: 'control', 'drug'. Name one"):
        pl.violins(real, real, real[real.obs["perturbation"] == "control"], **KEYS)
    with pytest.raises(ValueError, match="control has 1 cells"):
        pl.violins(pred, real, real[:1], perturbation="drug", **KEYS)


def test_a_perturbation_is_found_in_any_spelling(pred: ad.AnnData, real: ad.AnnData) -> None:
    written = real.copy()
    written.obs["perturbation"] = written.obs["perturbation"].replace({"drug": "drug+control"})
    shown = [
        pl.mean_shift(pred, cells, "control", perturbation=name, **KEYS)
        for cells, name in ((real, "drug"), (written, "drug"), (written, "control+drug"), (written, None))
    ]
    offsets = [np.asarray(ax.collections[0].get_offsets()) for ax in shown]
    for other in offsets[1:]:
        np.testing.assert_array_equal(other, offsets[0])
    with pytest.raises(
        ValueError, match=r"real.obs\['perturbation'\] has no 'drug'. Values: 'control', 'drug\+control'"
    ):
        pl.mean_shift(pred, written, "control", perturbation="drug", separator=None, **KEYS)
