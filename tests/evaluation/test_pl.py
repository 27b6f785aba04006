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


ALIKE = {"A": 0, "B": 1, "C": 0, "D": 1}
"""Perturbation -> programme: A and C act alike, and so do B and D."""
SIDES: dict[str, Any] = {"perturbation_key": "perturbation", "context_keys": "cell_type"}


def _screen(seed: int, mixed: bool = False, n: int = 40) -> ad.AnnData:
    """Two programmes in two cell types; with `mixed`, cells of B under A are more often of the second type."""
    rng = np.random.default_rng(seed)
    programme = 1.2 * np.random.default_rng(0).standard_normal((2, N_GENES))
    kinds = 1.5 * np.random.default_rng(5).standard_normal((2, N_GENES))
    rows, obs = [], []
    for name in ("control", *ALIKE):
        for kind in (0, 1):
            size = n // 4 if mixed and name in "AD" and kind == 0 else n
            effect = 0.0 if name == "control" else programme[ALIKE[name]]
            rows.append(rng.poisson(4 * np.exp(kinds[kind] + effect), size=(size, N_GENES)))
            obs += [(name, f"T{kind}")] * size
    frame = pd.DataFrame(obs, columns=["perturbation", "cell_type"], index=[f"c{i}" for i in range(len(obs))])
    cells = ad.AnnData(sparse.csr_matrix(np.concatenate(rows), dtype=np.float32), obs=frame)
    cells.var_names = [f"g{i}" for i in range(N_GENES)]
    cells.layers["counts"] = cells.X.copy()
    return cells


def _shifts(cells: ad.AnnData, real: ad.AnnData) -> pd.DataFrame:
    """Mean shifts from the real controls of a type, averaged over types, by the definition."""

    def logged(some: ad.AnnData) -> np.ndarray:
        x = some.X.toarray().astype(float)
        return np.log1p(1e4 * x / x.sum(axis=1, keepdims=True)).mean(axis=0)

    def of(some: ad.AnnData, name: str, kind: str) -> ad.AnnData:
        return some[((some.obs["perturbation"] == name) & (some.obs["cell_type"] == kind)).to_numpy()]

    return pd.DataFrame({
        name: np.mean([logged(of(cells, name, t)) - logged(of(real, "control", t)) for t in ("T0", "T1")], axis=0)
        for name in ALIKE
    })  # fmt: skip


def test_similarity_shows_correlations_of_shifts() -> None:
    real, made = _screen(1, mixed=True), _screen(2)
    pred = made[made.obs["perturbation"] != "control"].copy()
    shifts = {"real": _shifts(real, real), "predicted": _shifts(pred, real)}
    figure, given = plt.subplots()
    ax = pl.similarity(pred, real, "control", ax=given, **SIDES)
    assert ax is given
    names = [t.get_text() for t in ax.get_yticklabels()]
    assert names == [t.get_text() for t in ax.get_xticklabels()] and sorted(names) == list(ALIKE)
    assert ALIKE[names[0]] == ALIKE[names[1]] != ALIKE[names[2]] == ALIKE[names[3]]  # those alike are neighbours
    drawn = np.asarray(ax.images[0].get_array())
    for (i, row), (j, column) in ((a, b) for a in enumerate(names) for b in enumerate(names)):
        if i == j:
            expected = np.corrcoef(shifts["predicted"][row], shifts["real"][row])[0, 1]
        else:
            side = shifts["predicted" if i < j else "real"]
            expected = np.corrcoef(side[row], side[column])[0, 1]
        assert drawn[i, j] == pytest.approx(expected, abs=1e-5)
    for kind in ("predicted", "real"):
        alone = pl.similarity(None if kind == "real" else pred, real, "control", kind=kind, **SIDES)  # type: ignore[arg-type]
        order = [t.get_text() for t in alone.get_yticklabels()]
        np.testing.assert_allclose(alone.images[0].get_array(), shifts[kind][order].corr(), atol=1e-5)
        assert alone.figure is not figure
        alone.figure.canvas.draw()


def test_similarity_is_not_fooled_by_mixtures_of_contexts() -> None:
    real = _screen(1, mixed=True)
    values = []
    for keys in ({"context_keys": "cell_type"}, {}):
        ax = pl.similarity(None, real, "control", kind="real", perturbation_key="perturbation", **keys)  # type: ignore[arg-type]
        names = [t.get_text() for t in ax.get_yticklabels()]
        values.append(float(np.asarray(ax.images[0].get_array())[names.index("A"), names.index("D")]))
    assert values[0] < values[1]  # A and D share nothing but the mixture of their cells


def test_similarity_of_nothing() -> None:
    real = _screen(1)
    one = real[real.obs["perturbation"].isin(["control", "A"])].copy()
    with pytest.raises(ValueError, match="kind='real': correlations need 2 perturbations, and there are 'A'"):
        pl.similarity(None, one, "control", kind="real", **SIDES)
    with pytest.raises(ValueError, match="pred=None has no predicted shifts, which kind='both' shows"):
        pl.similarity(None, real, "control", **SIDES)
    with pytest.raises(ValueError, match="kind='all' must be one of 'both', 'predicted', 'real'"):
        pl.similarity(real, real, "control", kind="all", **SIDES)  # type: ignore[arg-type]
    lost = real[~((real.obs["perturbation"] == "control") & (real.obs["cell_type"] == "T1")).to_numpy()].copy()
    with pytest.raises(
        ValueError, match="no two real control cells in the context of 4 conditions: 'cell_type=T1, per"
    ):
        pl.similarity(None, lost, "control", kind="real", **SIDES)
    # a prediction of no change has no direction: grey, not a number
    still = real[real.obs["perturbation"] == "control"].copy()
    copies = []
    for name in "AB":
        copies.append(still.copy())
        copies[-1].obs["perturbation"] = name
    ax = pl.similarity(ad.concat(copies, index_unique="-"), real, "control", kind="predicted", **SIDES)
    assert ax.images[0].get_array().mask.all()


DOSES = (0.01, 0.1, 1.0, 10.0)
DOSED: dict[str, Any] = {"perturbation_key": "perturbation", "dose_key": "dose", "replicate_key": "donor"}


def _dosed(seed: int, doses: tuple[float, ...] = DOSES, n: int = 60, strength: float = 1.0) -> ad.AnnData:
    """A response that saturates around dose 1, in three populations of different strength."""
    rng = np.random.default_rng(seed)
    effect = np.zeros(N_GENES)
    effect[:6] = [1.5, -1.5, 1.2, -1.2, 1.0, 0.8]
    rows, obs = [], []
    for dose in (0.0, *doses):
        for donor, own in enumerate((0.8, 1.0, 1.2)):
            rate = 4 * np.exp(strength * own * effect * dose / (dose + 1))
            rows.append(rng.poisson(rate, size=(n, N_GENES)))
            obs += [("drug" if dose else "control", dose, f"d{donor}")] * n
    frame = pd.DataFrame(obs, columns=["perturbation", "dose", "donor"], index=[f"c{i}" for i in range(len(obs))])
    cells = ad.AnnData(sparse.csr_matrix(np.concatenate(rows), dtype=np.float32), obs=frame)
    cells.var_names = [f"g{i}" for i in range(N_GENES)]
    cells.layers["counts"] = cells.X.copy()
    cells.obs["population"] = cells.obs["donor"].str[1:].astype(int)
    return cells


def _curves(ax: Axes) -> dict[str, tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Label -> doses, means and half lengths of bars."""
    found = {}
    for container in ax.containers:
        line, _, (bars,) = container.lines  # type: ignore[attr-defined]
        segments = np.array([s[:, 1] if len(s) else [np.nan, np.nan] for s in bars.get_segments()])
        found[container.get_label()] = line.get_xdata(), line.get_ydata(), np.ptp(segments, axis=1) / 2
    return found


def test_dose_response_of_genes() -> None:
    real, made = _dosed(1), _dosed(2, doses=(0.1, 1.0, 3.0))
    pred = made[made.obs["perturbation"] != "control"].copy()
    ax = pl.dose_response(pred, real, "control", genes=["g0", "g1"], **DOSED)
    curves = _curves(ax)
    assert list(curves) == ["g0, real", "g0, predicted", "g1, real", "g1, predicted"]
    assert ax.get_xscale() == "log" and "dose of drug" in ax.get_xlabel()
    for label, (doses, mean, bars) in curves.items():
        gene, side = label.split(", ")
        cells = real if side == "real" else pred
        x = cells.X.toarray().astype(float)
        frame = cells.obs.assign(value=np.log1p(1e4 * x / x.sum(1, keepdims=True))[:, int(gene[1:])])
        frame = frame[frame["perturbation"] == "drug"]
        expected = frame.groupby(["dose", "donor"])["value"].mean().groupby("dose").agg(["mean", "std"])
        np.testing.assert_allclose(doses, expected.index)
        np.testing.assert_allclose(mean, expected["mean"], rtol=1e-5)
        np.testing.assert_allclose(bars, expected["std"], rtol=1e-4)
    assert np.all(np.diff(curves["g0, real"][1]) > 0) and np.all(np.diff(curves["g1, real"][1]) < 0)
    base = [line.get_ydata()[0] for line in ax.lines if line.get_linestyle() == ":"]
    assert len(base) == 2 and base[0] < curves["g0, real"][1][1] and base[1] > curves["g1, real"][1][1]
    ax.figure.canvas.draw()


def test_dose_response_of_the_length_of_the_shift() -> None:
    real, pred = _dosed(1), _dosed(2, strength=0.0)
    figure, given = plt.subplots()
    kept = pred[pred.obs["perturbation"] != "control"].copy()
    ax = pl.dose_response(kept, real, "control", ax=given, **DOSED)
    curves = _curves(ax)
    assert ax is given and list(curves) == ["real", "predicted"]
    assert np.all(np.diff(curves["real"][1]) > 0)
    # no effect has no length, however few cells there are: what sampling gives is taken off
    few = kept[kept.obs.groupby(["dose", "donor"]).cumcount().to_numpy() < 10].copy()
    short = _curves(pl.dose_response(few, real, "control", **DOSED))["predicted"][1]
    assert max(curves["predicted"][1].max(), short.max()) < 0.35 * curves["real"][1].max()
    plain = pl.dose_response(kept, real, "control", perturbation_key="perturbation", dose_key="dose")
    bars = _curves(plain)["real"][2]
    assert np.isnan(bars).all() and len(bars) == len(DOSES)  # one population has no spread


def test_dose_response_says_what_is_wrong() -> None:
    real = _dosed(1, n=5)
    pred = real[real.obs["perturbation"] != "control"].copy()
    with pytest.raises(ValueError, match="1 of the genes are not in real.var_names: 'IFIT1'"):
        pl.dose_response(pred, real, "control", genes="IFIT1", **DOSED)
    with pytest.raises(ValueError, match="There are no cells of 'toxin'.* Perturbations: 'drug'"):
        pl.dose_response(pred, real, "control", perturbation="toxin", **DOSED)
    with pytest.raises(KeyError, match="replicate_key='plate' is not a column"):
        pl.dose_response(pred, real, "control", **DOSED | {"replicate_key": "plate"})
    with pytest.raises(KeyError, match="dose_key='conc' is not a column"):
        pl.dose_response(pred, real, "control", **DOSED | {"dose_key": "conc"})
    both = pred.copy()
    both.obs["perturbation"] = "drug+toxin"
    with pytest.raises(ValueError, match="'drug\\+toxin' is a combination"):
        pl.dose_response(both, real, "control", **DOSED)
    two = ad.concat([pred, both], index_unique="-")
    with pytest.raises(ValueError, match="pred holds 2 perturbations: 'drug', 'drug\\+toxin'. Name one"):
        pl.dose_response(two, real, "control", **DOSED)
