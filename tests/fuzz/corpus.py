"""Files with which nobody should be able to do harm, made by code: damaged, absurd, reaching elsewhere, odd."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import h5py
import numpy as np
import pandas as pd
from anndata import AnnData
from scipy import sparse

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

SHAPE = (12, 5)
KEYS: dict[str, Any] = {"perturbation_key": "drug", "control": "DMSO", "context_keys": ["line"]}


@dataclass(frozen=True)
class Entry:
    """A crafted file."""

    name: str
    suffix: str
    """`.h5ad` or `.zarr`."""
    make: Callable[[Path], None]
    """Changes a right file, which is there already."""
    outcome: str
    """`refused`, `read`, or `either`."""
    seed: int = 0
    """Of those made at random; profiles with more cases try more of them."""


ENTRIES: list[Entry] = []
"""All crafted files. Models of others have tests of their own (`tests/test_saving.py`)."""


def right_cells() -> AnnData:
    """The cells that files are made of: two lines, three of each drug in them."""
    obs = pd.DataFrame({"drug": ["DMSO", "A"] * 6, "line": ["x"] * 6 + ["y"] * 6}, index=[f"c{i}" for i in range(12)])
    counts = np.random.default_rng(0).poisson(2.0, SHAPE) + np.eye(*SHAPE, dtype=int) + 1
    var = pd.DataFrame(index=[f"g{i}" for i in range(5)])
    return AnnData(sparse.csr_matrix(counts.astype(np.float32)), obs=obs, var=var, uns={"note": "text"})


def write_right(path: Path) -> None:
    """Write them in the format of the suffix."""
    cells = right_cells()
    if path.suffix == ".zarr":
        cells.write_zarr(path)
    else:
        cells.write_h5ad(path)


def craft(entry: Entry, folder: Path) -> Path:
    """Make the file of an entry; returns its path."""
    path, right = (folder / f"{name}{entry.suffix}" for name in ("crafted", "right"))
    shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    if not right.exists():
        write_right(right)
    shutil.copytree(right, path) if right.is_dir() else shutil.copy(right, path)
    entry.make(path)
    return path


def as_bytes(name: str, outcome: str = "refused") -> Callable[[Callable[[bytes], bytes]], None]:
    """Add a file made of the bytes of a right one."""

    def add(change: Callable[[bytes], bytes]) -> None:
        def make(path: Path) -> None:
            path.write_bytes(change(path.read_bytes()))

        ENTRIES.append(Entry(name, ".h5ad", make, outcome))

    return add


def in_file(name: str, outcome: str = "refused") -> Callable[[Callable[[h5py.File], None]], None]:
    """Add a file made by a change with h5py."""

    def add(change: Callable[[h5py.File], None]) -> None:
        def make(path: Path) -> None:
            with h5py.File(path, "r+") as file:
                change(file)

        ENTRIES.append(Entry(name, ".h5ad", make, outcome))

    return add


def in_store(name: str, outcome: str = "refused") -> Callable[[Callable[[Path], None]], None]:
    """Add a zarr store made by a change of its files."""

    def add(change: Callable[[Path], None]) -> None:
        ENTRIES.append(Entry(name, ".zarr", change, outcome))

    return add


# ---- no file of cells ---------------------------------------------------------------------------------------------

as_bytes("nothing")(lambda whole: b"")
as_bytes("one byte")(lambda whole: b"\x89")
as_bytes("text")(lambda whole: b"these are no cells\n" * 50)
as_bytes("a web page")(lambda whole: b"<!DOCTYPE html><html><body>404</body></html>")
as_bytes("a pickle")(lambda whole: b"\x80\x04c__builtin__\nexit\n)R.")
as_bytes("the signature alone")(lambda whole: whole[:8])
as_bytes("the first 512 bytes")(lambda whole: whole[:512])
as_bytes("the first half")(lambda whole: whole[: len(whole) // 2])
as_bytes("without the last bytes")(lambda whole: whole[:-100])
as_bytes("bytes behind the end", "either")(lambda whole: whole + b"more" * 100)


def _some_bytes_changed(path: Path, seed: int) -> None:
    rng, whole = np.random.default_rng(seed), bytearray(path.read_bytes())
    for at in rng.integers(8, len(whole), size=int(rng.choice([1, 3, 30, 300]))):
        whole[at] = int(rng.integers(256))
    path.write_bytes(whole)


def _a_part_is_zero(path: Path, seed: int) -> None:
    rng, whole = np.random.default_rng(seed), path.read_bytes()
    start, length = int(rng.integers(96, len(whole))), int(rng.integers(8, 2000))
    path.write_bytes(whole[:start] + bytes(len(whole[start : start + length])) + whole[start + length :])


for _seed in range(500):
    for _change in (_some_bytes_changed, _a_part_is_zero):
        _name = f"{_change.__name__.strip('_').replace('_', ' ')}, {_seed}"
        ENTRIES.append(Entry(_name, ".h5ad", partial(_change, seed=_seed), "either", _seed))


def _folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


ENTRIES.append(Entry("a folder", ".h5ad", _folder, "refused"))

# ---- other content ------------------------------------------------------------------------------------------------


def _put(file: h5py.File, name: str, value: Any, **attributes: Any) -> None:
    """Replace an entry, keeping its attributes."""
    kept = dict(file[name].attrs) if name in file else {}
    if name in file:
        del file[name]
    made = file.create_dataset(name, data=value)
    made.attrs.update(kept | {key.replace("_", "-"): text for key, text in attributes.items()})


@in_file("numbers alone")
def _(file: h5py.File) -> None:
    for name in list(file):
        del file[name]
    file["numbers"] = np.arange(3)


for _name in (
    "obs",
    "var",
    "X",
    "obs/_index",
    "var/_index",
    "X/data",
    "X/indices",
    "X/indptr",
    "obs/drug/codes",
    "obs/drug",
):

    @in_file(f"without {_name}", "refused" if _name != "obs/drug" else "either")
    def _(file: h5py.File, name: str = _name) -> None:
        del file[name]


for _name, _kind in (
    ("/", "dict"), ("/", "mudata"), ("/", "no such kind"), ("X", "csc_matrix"), ("X", "array"), ("X", "no such kind"),
    ("X", "dataframe"), ("obs", "array"), ("obs", "dict"), ("obs/drug", "string-array"),
    ("obs/drug", "nullable-integer"),
    ("uns", "dataframe"), ("uns/note", "array"), ("obs/_index", "array"),
):  # fmt: skip

    @in_file(f"encoding of {_name} is {_kind}", "either")
    def _(file: h5py.File, name: str = _name, kind: str = _kind) -> None:
        file[name].attrs["encoding-type"] = kind


@in_file("encodings of another version", "either")
def _(file: h5py.File) -> None:
    for name in ("/", "X", "obs", "obs/drug"):
        file[name].attrs["encoding-version"] = "99.0"


@in_file("encodings that are numbers", "either")
def _(file: h5py.File) -> None:
    file["X"].attrs["encoding-type"] = 5


@in_file("no encodings", "either")
def _(file: h5py.File) -> None:
    for name in ("/", "X", "obs", "var", "obs/drug", "uns"):
        for key in list(file[name].attrs):
            if key.startswith("encoding"):
                del file[name].attrs[key]


@in_file("columns that are not there")
def _(file: h5py.File) -> None:
    file["obs"].attrs["column-order"] = ["drug", "line", "more"]


@in_file("an index that is not there")
def _(file: h5py.File) -> None:
    file["obs"].attrs["_index"] = "nothing"


# ---- counts -------------------------------------------------------------------------------------------------------


def _csr(name: str, outcome: str = "refused", **changes: Callable[[np.ndarray], np.ndarray]) -> None:
    """Add a file whose sparse matrix has changed parts."""

    @in_file(f"csr: {name}", outcome)
    def _(file: h5py.File) -> None:
        for part, change in changes.items():
            _put(file, f"X/{part}", change(file[f"X/{part}"][:]))


def _set(at: int, value: Any, dtype: Any = None) -> Callable[[np.ndarray], np.ndarray]:
    def change(values: np.ndarray) -> np.ndarray:
        out = values.astype(dtype or values.dtype)
        out[at] = value
        return out

    return change


_csr("an index far beyond the genes", indices=_set(3, 10**6))
_csr("an index just beyond the genes", indices=_set(3, SHAPE[1]))
_csr("a negative index", indices=_set(3, -1))
_csr("a very negative index", indices=_set(3, -(2**31)))
_csr("an index of 64 bits", indices=_set(3, 2**40, np.int64))
_csr("pointers that fall", indptr=_set(5, 2))
_csr("a pointer beyond the end", indptr=_set(5, 10**6))
_csr("a last pointer beyond the end", indptr=_set(-1, 10**9))
_csr("a pointer of 64 bits", indptr=_set(-1, 2**62, np.int64))
_csr("a negative pointer", indptr=_set(3, -7))
_csr("pointers that begin late", indptr=_set(0, 2))
_csr("too few pointers", indptr=lambda values: values[:-3])
_csr("too many pointers", indptr=lambda values: np.append(values, values[-1]))
_csr("no pointers", indptr=lambda values: values[:0])
_csr("too little data", data=lambda values: values[:-5])
_csr("no data", data=lambda values: values[:0])
_csr("too much data", data=lambda values: np.append(values, 1).astype(values.dtype))
_csr("too few indices", indices=lambda values: values[:-5])
_csr("data in rows and columns", data=lambda values: np.stack([values, values]))
_csr("indices that are fractions", "either", indices=lambda values: values + 0.5)
_csr("data that are text", data=lambda values: np.array([b"1"] * len(values)))
_csr("a repeated index", "read", indices=lambda values: np.where(np.arange(len(values)) == 1, values[0], values))
_csr("indices in falling order", "read", indices=lambda values: 4 - values)
for _value in (np.nan, np.inf, -1, 0.5, 1e300, 3e9, 1e-300):
    _csr(f"a count of {_value}", data=_set(0, _value, np.float64))
for _value in (0, 7):
    _csr(f"a count of {_value}", "read", data=_set(0, _value))
_csr("a count of 2 ** 63", data=_set(0, 2**63, np.uint64))
for _kind, _outcome in (
    ("uint8", "read"),
    ("int64", "read"),
    ("bool", "read"),
    ("float16", "either"),
    (">f4", "either"),
):
    _csr(f"counts of type {_kind}", _outcome, data=lambda values, kind=_kind: values.astype(kind))
_csr("complex counts", data=lambda values: values.astype(complex))

for _shape in (
    [12, 50],
    [120, 5],
    [11, 5],
    [12, 2**62],
    [2**62, 5],
    [-12, 5],
    [12, 0],
    [0, 0],
    [12],
    [12, 5, 1],
    [12.5, 5.0],
):

    @in_file(f"csr: shape {_shape}", "either" if _shape[-1:] == [5.0] else "refused")
    def _(file: h5py.File, shape: list = _shape) -> None:
        file["X"].attrs["shape"] = shape


def _dense(name: str, value: Callable[[], Any], outcome: str = "refused") -> None:
    @in_file(f"dense: {name}", outcome)
    def _(file: h5py.File) -> None:
        del file["X"]
        made = file.create_dataset("X", data=value())
        made.attrs.update({"encoding-type": "array", "encoding-version": "0.2.0"})


_dense("other cells", lambda: np.ones((11, 5)))
_dense("other genes", lambda: np.ones((12, 6)))
_dense("one dimension", lambda: np.ones(60))
_dense("three dimensions", lambda: np.ones((12, 5, 1)))
_dense("one number", lambda: 5.0)
_dense("text", lambda: np.full(SHAPE, b"1"))
_dense("records", lambda: np.zeros(SHAPE, dtype=[("a", "f4"), ("b", "i4")]))
_dense("nothing but zeros", lambda: np.zeros(SHAPE))
_dense("right", lambda: np.ones(SHAPE), "read")

# ---- reaching elsewhere, going round, being huge ------------------------------------------------------------------


@in_file("uns: a group in itself")
def _(file: h5py.File) -> None:
    file["uns/again"] = file["uns"]


@in_file("uns: the whole file in itself")
def _(file: h5py.File) -> None:
    file["uns/again"] = file["/"]


@in_file("uns: a link to itself")
def _(file: h5py.File) -> None:
    file["uns/again"] = h5py.SoftLink("/uns")


@in_file("uns: links round")
def _(file: h5py.File) -> None:
    file["uns/a"] = h5py.SoftLink("/uns/b")
    file["uns/b"] = h5py.SoftLink("/uns/a")


@in_file("uns: a link to nothing", "either")
def _(file: h5py.File) -> None:
    file["uns/a"] = h5py.SoftLink("/nothing")


@in_file("uns: groups in groups, 3,000 deep", "either")
def _(file: h5py.File) -> None:
    group = file["uns"]
    for _ in range(3000):
        group = group.create_group("a")
        group.attrs.update({"encoding-type": "dict", "encoding-version": "0.1.0"})


SECRET = "secret.h5"
"""A file beside the crafted one that is none of its business."""


def _secret(file: h5py.File) -> str:
    from pathlib import Path

    path = Path(file.filename).with_name(SECRET)
    with h5py.File(path, "w") as other:
        other["X"] = np.full(SHAPE, 9.0)
    return str(path)


@in_file("X: a link into another file")
def _(file: h5py.File) -> None:
    del file["X"]
    file["X"] = h5py.ExternalLink(_secret(file), "/X")


@in_file("uns: a link into another file")
def _(file: h5py.File) -> None:
    file["uns/more"] = h5py.ExternalLink(_secret(file), "/")


@in_file("X: stored in another file")
def _(file: h5py.File) -> None:
    del file["X"]
    made = file.create_dataset("X", SHAPE, "i1", external=[(_secret(file), 0, 60)])
    made.attrs.update({"encoding-type": "array", "encoding-version": "0.2.0"})


@in_file("X: a view of another file")
def _(file: h5py.File) -> None:
    layout = h5py.VirtualLayout(SHAPE, "f4")
    layout[:] = h5py.VirtualSource(_secret(file), "X", SHAPE)
    del file["X"]
    made = file.create_virtual_dataset("X", layout)
    made.attrs.update({"encoding-type": "array", "encoding-version": "0.2.0"})


def _bomb(name: str, where: str, shape: tuple[int, ...]) -> None:
    @in_file(f"{name}: {' x '.join(map(str, shape))} numbers, none stored")
    def _(file: h5py.File) -> None:
        if where in file:
            del file[where]
        made = file.create_dataset(where, shape, "f4", chunks=tuple(min(n, 1000) for n in shape), compression="gzip")
        made.attrs.update({"encoding-type": "array", "encoding-version": "0.2.0"})


_bomb("X", "X", (10**8, 10**6))
_bomb("X", "X", (12, 2**40))
_bomb("uns", "uns/more", (2**40,))
_bomb("obs", "obs/more", (2**40,))
_bomb("data", "X/data", (2**40,))


@in_file("a chunk that is no gzip")
def _(file: h5py.File) -> None:
    del file["X"]
    made = file.create_dataset("X", SHAPE, "f4", chunks=SHAPE, compression="gzip")
    made.attrs.update({"encoding-type": "array", "encoding-version": "0.2.0"})
    made.id.write_direct_chunk((0, 0), b"no gzip at all")


# ---- annotation ---------------------------------------------------------------------------------------------------


def _names(name: str, change: Callable[[list[str]], list[Any]], outcome: str, where: str = "obs/_index") -> None:
    @in_file(f"{where}: {name}", outcome)
    def _(file: h5py.File) -> None:
        found = file[where]
        found = found["values"] if isinstance(found, h5py.Group) else found  # anndata 0.13 writes a mask beside them
        values = change(found.asstr()[:].tolist())
        kind = h5py.string_dtype() if all(isinstance(value, str) for value in values) else None
        _put(file, where, np.array(values, dtype=kind) if kind else np.array(values))


for _where in ("obs/_index", "var/_index"):
    _names("repeated", lambda names: [names[0], *names[:-1]], "refused", _where)
    _names("too few", lambda names: names[:-1], "refused", _where)
    _names("empty", lambda names: ["", *names[1:]], "either", _where)
    _names("slashes and dots", lambda names: ["../../a", *names[1:]], "either", _where)
    _names("very long", lambda names: ["x" * 10**6, *names[1:]], "either", _where)
    _names("numbers", lambda names: list(range(len(names))), "either", _where)


@in_file("obs/_index: no UTF-8", "either")
def _(file: h5py.File) -> None:
    values = [b"\xff\xfe%d" % i for i in range(12)]
    _put(file, "obs/_index", np.array(values, dtype=h5py.string_dtype("ascii")))


@in_file("obs: a column with a slash", "either")
def _(file: h5py.File) -> None:
    file["obs"].attrs["column-order"] = ["drug", "line", "a/b"]
    file["obs/a/b"] = np.arange(12)


for _code in (2, 127, -2):

    @in_file(f"obs/drug: a code of {_code}")
    def _(file: h5py.File, code: int = _code) -> None:
        _put(file, "obs/drug/codes", _set(0, code)(file["obs/drug/codes"][:]))


@in_file("obs/drug: a missing label")
def _(file: h5py.File) -> None:
    _put(file, "obs/drug/codes", _set(0, -1)(file["obs/drug/codes"][:]))


@in_file("obs/drug: codes that are fractions", "either")
def _(file: h5py.File) -> None:
    _put(file, "obs/drug/codes", file["obs/drug/codes"][:] + 0.5)


@in_file("obs/drug: too few codes")
def _(file: h5py.File) -> None:
    _put(file, "obs/drug/codes", file["obs/drug/codes"][:-1])


@in_file("obs/drug: a category twice")
def _(file: h5py.File) -> None:
    _put(file, "obs/drug/categories", np.array(["DMSO", "DMSO"], dtype=h5py.string_dtype()))


# ---- zarr ---------------------------------------------------------------------------------------------------------


def _json(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


for _name in ("obs", "var", "X", "X/data", "X/indices", "X/indptr", "obs/_index", "obs/drug/codes"):

    @in_store(f"without {_name}", "either")
    def _(path: Path, name: str = _name) -> None:
        shutil.rmtree(path / name)


def _chunks(path: Path) -> list[Path]:
    """Files of an array's chunks, of either version of the format."""
    return sorted(file for file in path.rglob("*") if file.is_file() and file.name[0] not in ".z")


for _name in ("X/data", "X/indices", "X/indptr", "obs/drug/codes", "obs/_index"):

    @in_store(f"no chunks of {_name}", "either")
    def _(path: Path, name: str = _name) -> None:
        for chunk in _chunks(path / name):
            chunk.unlink()

    @in_store(f"chunks of {_name} cut off", "either")
    def _(path: Path, name: str = _name) -> None:
        for chunk in _chunks(path / name):
            chunk.write_bytes(chunk.read_bytes()[:-3])

    @in_store(f"chunks of {_name} are noise", "either")
    def _(path: Path, name: str = _name) -> None:
        for chunk in _chunks(path / name):
            chunk.write_bytes(np.random.default_rng(0).bytes(len(chunk.read_bytes())))


def _meta(path: Path) -> Path:
    return next(path / name for name in (".zarray", "zarr.json") if (path / name).exists())


for _change in (
    {"shape": [10**12]}, {"shape": [-1]}, {"shape": [3]}, {"shape": []}, {"dtype": "<f8"}, {"dtype": "|O"},
    {"dtype": "<U5"}, {"dtype": "nonsense"}, {"chunks": [0]}, {"chunks": [10**12]}, {"compressor": {"id": "nonsense"}},
    {"zarr_format": 99}, {"fill_value": "NaN"}, {"filters": [{"id": "pickle"}]},
):  # fmt: skip
    for _name in ("X/data", "X/indptr"):

        @in_store(f"{_name}: {_change}", "either")
        def _(path: Path, name: str = _name, change: dict = _change) -> None:
            (path / ".zmetadata").unlink(missing_ok=True)
            _json(_meta(path / name), **change)


@in_store("damaged JSON", "either")
def _(path: Path) -> None:
    (path / ".zmetadata").unlink(missing_ok=True)
    _meta(path / "X/data").write_text("{")


@in_store("an empty folder")
def _(path: Path) -> None:
    shutil.rmtree(path)
    path.mkdir()
