"""Screens of a few cells, built by code from a short description that is printed when a case fails."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product
from typing import TYPE_CHECKING, Any

import anndata as ad
import numpy as np
import pandas as pd
from anndata import AnnData
from mudata import MuData
from scipy import sparse

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

PERTURBATION, BATCH, DOSE, SITE, AGE = "perturbation", "batch", "dose", "site", "age"
"""Columns of `obs`; those of contexts have the names of the screen."""
CONTROL = "control"
LAYOUTS = ("dense", "fortran", "csr", "csc", "duplicates", "unsorted", "zeros", "backed", "csr_array", "csc_array")
"""The last two are those that scvi-tools does not read."""
DTYPES = ("float32", "float64", "int64", "int32", "uint8", "uint16", "int8")
FEATURES = "features"


@dataclass(frozen=True)
class Screen:
    """A screen. Everything that is drawn at random comes from `seed`."""

    n_cells: int = 24
    n_genes: int = 8
    names: tuple[str, ...] = ("P1", "P2")
    """Single perturbations."""
    n_pairs: int = 0
    separator: str | None = "+"
    lists: bool = False
    """Whether combinations are lists of names, not joined."""
    contexts: tuple[tuple[Any, ...], ...] = (("C1", "C2"),)
    """Values of each column of contexts."""
    context_names: tuple[str, ...] = ("cell_type", "line", "patient")
    batches: tuple[Any, ...] = ()
    doses: tuple[float, ...] = ()
    dose_as: str = "number"
    """`number`, `text`, or `list` (of one number a component)."""
    sites: tuple[str, ...] = ()
    """Values of a categorical covariate."""
    ages: tuple[float, ...] = ()
    """Values of a continuous covariate."""
    features: str | None = None
    """`dict`, `table`, or `uns`."""
    n_features: int = 2
    equal_features: bool = False
    unseen: tuple[str, ...] = ()
    """Names with features and no cells."""
    match: tuple[int, ...] | None = None
    """Numbers of the keys that controls should agree on; `None`: not given."""
    design: str = "balanced"
    """`balanced`, `random`, or `thin` (as many populations as cells allow)."""
    level: str = "ordinary"
    """`ordinary`, `sparse` (about one count a cell), `large` (up to 10^5), `equal` (all cells alike)."""
    layout: str = "csr"
    dtype: str = "float32"
    in_layer: bool = False
    column: str = "category"
    """How columns of labels are stored: `category`, `object`, `string`, `unused` (a category that no cell has)."""
    mudata: bool = False
    seed: int = 0

    @property
    def context_keys(self) -> list[str]:
        """Columns of contexts."""
        return list(self.context_names[: len(self.contexts)])

    @property
    def obs_keys(self) -> list[str]:
        """Columns beside perturbation and dose."""
        more = ((SITE, self.sites), (AGE, self.ages), (BATCH, self.batches))
        return self.context_keys + [key for key, values in more if values]

    @property
    def match_keys(self) -> list[str] | None:
        """Keys that controls should agree on."""
        keys = self.obs_keys
        return None if self.match is None else list(dict.fromkeys(keys[i % len(keys)] for i in self.match if keys))

    @property
    def labels(self) -> list[Any]:
        """Different labels of treated cells, as written."""
        n = len(self.names)
        pairs = [(self.names[i % n], self.names[(i + 1) % n]) for i in range(self.n_pairs if n > 1 else 0)]
        written = [list(pair) if self.lists else (self.separator or "+").join(pair) for pair in pairs]
        return self.single_labels + (written if self.lists or self.separator else [])

    @property
    def single_labels(self) -> list[Any]:
        """Labels of single perturbations, as written: in a column of lists those with the separator are lists."""
        cut = self.separator if self.lists else None
        return [[name] if cut and cut in name else name for name in dict.fromkeys(self.names)]


def build(screen: Screen) -> AnnData:
    """The cells of a screen, in memory."""
    rng = np.random.default_rng(screen.seed)
    obs, effect = _annotate(screen, rng)
    counts = _counts(screen, effect, rng)
    names = pd.Index([f"cell {i}" for i in range(len(obs))])
    adata = AnnData(obs=obs.set_index(names), var=pd.DataFrame(index=[f"gene {i}" for i in range(screen.n_genes)]))
    stored = as_layout(counts, screen.layout, screen.dtype)
    if screen.in_layer:
        adata.layers["counts"] = stored
        adata.X = np.log1p(counts).astype(np.float32)
    else:
        adata.X = stored
    if screen.features == "uns":
        adata.uns[FEATURES] = feature_table(screen)
    return adata


def on_disk(adata: AnnData, path: Path) -> AnnData:
    """The cells, read from a file with matrices left there."""
    adata.write_h5ad(path)
    return ad.read_h5ad(path, backed="r")


def as_mudata(adata: AnnData) -> MuData:
    """The cells as a modality of its own beside another one, columns of `obs` with both."""
    other = AnnData(np.ones((adata.n_obs, 2), np.float32), obs=pd.DataFrame(index=adata.obs_names))
    other.var_names = ["protein 0", "protein 1"]
    both = MuData({"rna": AnnData(adata.X, obs=pd.DataFrame(index=adata.obs_names), var=adata.var), "other": other})
    for name, layer in adata.layers.items():
        if name is not None:
            both.mod["rna"].layers[name] = layer
    for key in adata.obs:
        both.obs[key] = adata.obs[key]
    both.uns.update(adata.uns)
    return both


def setup_arguments(screen: Screen) -> dict[str, Any]:
    """Arguments of `setup_anndata` that describe the screen."""
    features = {"dict": feature_dict, "table": feature_table, "uns": lambda _: FEATURES, None: lambda _: None}
    return {
        "perturbation_key": PERTURBATION,
        "control": CONTROL,
        "layer": "counts" if screen.in_layer else None,
        "context_keys": screen.context_keys,
        "batch_key": BATCH if screen.batches else None,
        "dose_key": DOSE if screen.doses else None,
        "categorical_covariate_keys": [SITE] if screen.sites else None,
        "continuous_covariate_keys": [AGE] if screen.ages else None,
        "perturbation_embeddings": features[screen.features](screen),
        "control_match_keys": screen.match_keys,
        "separator": screen.separator,
    }


def feature_dict(screen: Screen) -> dict[str, NDArray[np.float64]]:
    """Features of all names."""
    rng = np.random.default_rng((screen.seed, 1))
    names = dict.fromkeys((*screen.names, *screen.unseen))
    equal = rng.normal(size=screen.n_features)
    return {name: equal if screen.equal_features else rng.normal(size=screen.n_features) for name in names}


def feature_table(screen: Screen) -> pd.DataFrame:
    """Features of all names, one a row."""
    columns = [f"f{i}" for i in range(screen.n_features)]
    return pd.DataFrame.from_dict(feature_dict(screen), orient="index", columns=columns)


def dose_of(screen: Screen, label: Any, dose: float, second: float) -> Any:
    """A dose as it is written for a label."""
    is_pair = label in screen.labels[len(screen.single_labels) :]
    if screen.dose_as == "text":
        return f"{dose}+{second}" if is_pair else str(dose)
    if screen.dose_as == "list":
        return [dose, second] if is_pair else [dose]
    return dose


def as_layout(counts: NDArray[np.int64], layout: str, dtype: str) -> Any:
    """Counts as a matrix of that layout and type."""
    values = counts.astype(dtype)
    if layout in ("dense", "backed"):
        return values
    if layout == "fortran":
        return np.asfortranarray(values)
    if layout in ("csc", "csr_array", "csc_array"):
        return {"csc": sparse.csc_matrix, "csr_array": sparse.csr_array, "csc_array": sparse.csc_array}[layout](values)
    matrix = sparse.csr_matrix(values)
    if layout == "duplicates":  # every count is written twice: one, and the rest
        first = np.minimum(matrix.data, 1)
        data = np.stack([first, matrix.data - first], axis=1).ravel()
        return sparse.csr_matrix((data, np.repeat(matrix.indices, 2), 2 * matrix.indptr), matrix.shape)
    if layout == "zeros":  # every entry is stored
        n, m = values.shape
        return sparse.csr_matrix((values.ravel(), np.tile(np.arange(m), n), np.arange(n + 1) * m), (n, m))
    if layout == "unsorted":
        order = np.concatenate(
            [np.arange(b, a, -1) - 1 for a, b in zip(matrix.indptr, matrix.indptr[1:], strict=False)]
        )
        order = order.astype(int)
        return sparse.csr_matrix((matrix.data[order], matrix.indices[order], matrix.indptr), matrix.shape)
    return matrix


def _annotate(screen: Screen, rng: np.random.Generator) -> tuple[pd.DataFrame, NDArray[np.int64]]:
    """`obs` without names, and the number of each cell's label (0: control)."""
    labels, n = screen.labels, screen.n_cells
    cells = np.arange(n)
    contexts = list(product(*screen.contexts))
    n_contexts = len(contexts)
    if screen.design == "balanced":
        context, label = cells % n_contexts, (cells // n_contexts) % (len(labels) + 1)
    elif screen.design == "thin":
        context, label = (cells // (len(labels) + 1)) % n_contexts, cells % (len(labels) + 1)
    else:
        context, label = rng.integers(n_contexts, size=n), rng.integers(len(labels) + 1, size=n)
    label[np.unique(context, return_index=True)[1]] = 0  # every context that is there has a control
    columns: dict[str, Any] = {}
    columns[PERTURBATION] = pd.Series([CONTROL if k == 0 else labels[k - 1] for k in label], dtype=object)
    for i, key in enumerate(screen.context_keys):
        columns[key] = _typed([contexts[c][i] for c in context])
    if screen.batches:
        columns[BATCH] = _typed([screen.batches[b] for b in rng.integers(len(screen.batches), size=n)])
    if screen.sites:
        columns[SITE] = _typed([screen.sites[s] for s in rng.integers(len(screen.sites), size=n)])
    if screen.ages:
        columns[AGE] = pd.Series([screen.ages[a] for a in rng.integers(len(screen.ages), size=n)])
    if screen.doses:
        chosen = rng.integers(len(screen.doses), size=(n, 2))
        given = [
            (0.0 if screen.dose_as == "number" else "0" if screen.dose_as == "text" else [0.0])
            if k == 0
            else dose_of(screen, labels[k - 1], screen.doses[a], screen.doses[b])
            for k, (a, b) in zip(label, chosen, strict=True)
        ]
        columns[DOSE] = pd.Series(given, dtype=float if screen.dose_as == "number" else object)
    obs = pd.DataFrame(columns)
    for key in (PERTURBATION, *screen.context_keys, BATCH, SITE):
        if key in obs and obs[key].dtype == object and not (key == PERTURBATION and screen.lists):
            obs[key] = _stored(obs[key], screen.column)
    return obs, label


def _typed(values: list[Any]) -> pd.Series:
    return pd.Series(values, dtype=object if any(isinstance(value, str) for value in values) else None)


def _stored(column: pd.Series, how: str) -> pd.Series:
    if how == "unused":
        return column.astype("category").cat.add_categories(["in no cell"])
    return column if how == "object" else column.astype(how)


def _counts(screen: Screen, label: NDArray[np.int64], rng: np.random.Generator) -> NDArray[np.int64]:
    """Counts with an effect of each label; no cell is empty."""
    n, m = len(label), screen.n_genes
    base = rng.gamma(1.0, 2.0, size=m) + 0.05
    effect = np.exp(rng.normal(size=(label.max() + 1, m)) * (rng.random(m) < 0.5))
    effect[0] = 1
    mean = base * effect[label] * rng.gamma(4.0, 0.25, size=(n, 1))
    if screen.level == "sparse":
        mean /= mean.sum(1, keepdims=True)
    if screen.level == "large":
        mean *= 10 ** rng.uniform(0, 4, size=(n, 1))
    counts = rng.poisson(mean)
    if screen.level == "equal":
        counts = np.broadcast_to(counts[:1], counts.shape).copy()
    empty = np.flatnonzero(counts.sum(1) == 0)
    counts[empty, rng.integers(m, size=len(empty))] = 1
    kind = np.dtype(screen.dtype)
    return np.minimum(counts, np.iinfo(kind).max if kind.kind in "iu" else 10**6)
