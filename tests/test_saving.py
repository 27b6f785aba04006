"""Saved models: whole or not at all, what is read is what was written, and nothing in a folder is ever run."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import pickle
import shutil
import subprocess
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import torch
from pandas.testing import assert_frame_equal
from safetensors.torch import load_file, save_file
from tests.helpers import FEW_STEPS, SETUP, TINY, assert_same_cells

import scperturbdiff.storage._model as storage
from scperturbdiff import PerturbDiff
from scperturbdiff.cli import main
from scperturbdiff.storage import SavedModel

if TYPE_CHECKING:
    from collections.abc import Callable

    from anndata import AnnData

QUIET: dict[str, Any] = {"n_cells": 12, "seed": 3, "progress": False}


@pytest.fixture(scope="module")
def controls(screen: AnnData) -> AnnData:
    return screen[(screen.obs["perturbation"] == "control").to_numpy()].copy()


@pytest.fixture(scope="module")
def model(screen: AnnData) -> PerturbDiff:
    cells = screen.copy()
    PerturbDiff.setup_anndata(cells, **SETUP)
    made = PerturbDiff(cells, **TINY)
    made.train(**FEW_STEPS)
    return made


@pytest.fixture
def folder(model: PerturbDiff, tmp_path: Path) -> Path:
    model.save(tmp_path / "model")
    return tmp_path / "model"


def tensor_file(folder: Path) -> Path:
    (found,) = folder.glob("model.*.safetensors")
    return found


def rewrite(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Change the JSON of a saved model."""
    said = json.loads((folder / "model.json").read_text())
    change(said)
    (folder / "model.json").write_text(json.dumps(said))


def retensor(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    """Change the tensors of a saved model as somebody would who knows how it is checked."""
    tensors = load_file(tensor_file(folder))
    change(tensors)
    save_file(tensors, tensor_file(folder))
    sign(folder)


def sign(folder: Path) -> None:
    digest = hashlib.sha256(tensor_file(folder).read_bytes()).hexdigest()
    rewrite(folder, lambda said: said["tensors"].update(sha256=digest))


# ---- what is written is what is read ------------------------------------------------------------------------------


def test_everything_comes_back(model: PerturbDiff, controls: AnnData, folder: Path) -> None:
    again = PerturbDiff.load(folder, adata=False)
    assert_same_cells(model.predict(controls, ["P01"], **QUIET), again.predict(controls, ["P01"], **QUIET))
    assert model.populations_ is not None
    assert again.populations_ is not None
    assert_frame_equal(model.populations_, again.populations_)
    assert repr(model.report_) == repr(again.report_)
    assert model.init_params_ == again.init_params_
    assert (model.history_ is None) == (again.history_ is None)
    for name, state in model.module.state_dict().items():
        if isinstance(state, torch.Tensor):
            assert torch.equal(state, again.module.state_dict()[name]), name
    tensors = [*again.module.parameters(), *again.module.buffers()]
    assert not any(tensor.is_meta for tensor in tensors)
    assert all(tensor.data_ptr() % 16 == 0 for tensor in tensors)  # else products round in another way
    assert [p.requires_grad for p in model.module.parameters()] == [p.requires_grad for p in again.module.parameters()]


def test_draws_of_something_new_come_back_to_the_last_bit(controls: AnnData, model: PerturbDiff, folder: Path) -> None:
    other = controls.copy()
    other.obs["cell_type"] = "never seen"
    asked: dict[str, Any] = QUIET | {"n_populations": 3}
    again = PerturbDiff.load(folder, adata=False)
    assert_same_cells(model.predict(other, ["P01"], **asked), again.predict(other, ["P01"], **asked))


def test_loading_draws_no_random_numbers(folder: Path) -> None:
    torch.manual_seed(1)
    before = torch.get_rng_state()
    PerturbDiff.load(folder, adata=False)
    assert torch.equal(before, torch.get_rng_state())


def test_doses_features_covariates_and_lists_come_back(screen: AnnData, tmp_path: Path) -> None:
    rng, cells = np.random.default_rng(0), screen[screen.obs["cell_type"].isin(["C1", "C2"])].copy()
    treated = (cells.obs["perturbation"] != "control").to_numpy()
    first = (cells.obs["donor"] == "D1").to_numpy()
    cells.obs["dose"] = np.where(treated, np.where(first, 0.1, 1.0), 0)
    cells.obs["sex"] = pd.Categorical(np.where(first, "f", "m"))
    cells.obs["hours"] = np.where(cells.obs["cell_type"] == "C1", 6.0, 24.0)
    features = {name: rng.normal(size=3) for name in ("P01", "P02", "P03", "P04", "new")}
    keys = {"dose_key": "dose", "categorical_covariate_keys": ["sex"], "continuous_covariate_keys": ["hours"]}
    PerturbDiff.setup_anndata(cells, **SETUP, **keys, perturbation_embeddings=features)
    model = PerturbDiff(cells, **TINY, retrieval_kwargs={"n_neighbors": 8})
    model.train(**FEW_STEPS)
    model.save(tmp_path / "model")
    again = PerturbDiff.load(tmp_path / "model", adata=False)
    wanted = pd.DataFrame({"perturbation": ["P01", "new", "P01+P02"], "dose": [0.3, 1.0, 0.1]})
    controls = cells[~treated].copy()
    assert_same_cells(model.predict(controls, wanted, **QUIET), again.predict(controls, wanted, **QUIET))
    assert again.registry_["setup_args"]["dose_key"] == "dose"
    np.testing.assert_array_equal(again.registry_["setup_args"]["perturbation_embeddings"]["new"], features["new"])
    assert PerturbDiff.load(tmp_path / "model", adata=cells.copy()).conditions.contexts == model.conditions.contexts


def test_a_model_before_training_comes_back(screen: AnnData, tmp_path: Path) -> None:
    cells = screen.copy()
    PerturbDiff.setup_anndata(cells, **SETUP)
    PerturbDiff(cells, **TINY).save(tmp_path / "model", prefix="first_")
    assert not PerturbDiff.load(tmp_path / "model", adata=False, prefix="first_").is_trained_
    with pytest.raises(FileNotFoundError, match=r"has no model\.json"):
        PerturbDiff.load(tmp_path / "model", adata=False)


def test_arguments_that_could_not_be_saved_are_refused_before_training(screen: AnnData) -> None:
    cells = screen.copy()
    PerturbDiff.setup_anndata(cells, **SETUP)
    with pytest.raises(TypeError, match="vae_kwargs.* cannot keep"):
        PerturbDiff(cells, **TINY, vae_kwargs={"extra": object()})


def test_weights_that_are_not_finite_are_not_saved(model: PerturbDiff, folder: Path, tmp_path: Path) -> None:
    broken = PerturbDiff.load(folder, adata=False)
    next(broken.module.vae.parameters()).data[0] = torch.nan
    with pytest.raises(ValueError, match="not finite"):
        broken.save(tmp_path / "broken")
    assert not (tmp_path / "broken").exists()


def test_attributes_of_the_user_are_named_as_not_saved(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    again = PerturbDiff.load(folder, adata=False)
    again.mine_ = 1  # type: ignore[attr-defined]
    with caplog.at_level(logging.WARNING, logger="scperturbdiff"):
        again.save(tmp_path / "more")
    assert "not saved: 'mine_'" in caplog.text


def test_registry_and_setup_are_read_without_the_model(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert PerturbDiff.load_registry(folder)["setup_args"]["control"] == "control"
    PerturbDiff.view_setup_args(folder)
    assert "'perturbation_key': 'perturbation'" in capsys.readouterr().out


@pytest.mark.parametrize(("accelerator", "device"), [("tpu", "auto"), ("cpu", 3), ("nonsense", 0)])
def test_devices_that_are_not_here_are_named(folder: Path, accelerator: str, device: Any) -> None:
    with pytest.raises(ValueError, match=f"accelerator='{accelerator}'"):
        PerturbDiff.load(folder, adata=False, accelerator=accelerator, device=device)


def test_the_hub_of_scvi_tools_loads_a_model(model: PerturbDiff, controls: AnnData, tmp_path: Path) -> None:
    """The recipe of docs/security.md: metadata made by hand, a card of the hub's own class."""
    hub = pytest.importorskip("huggingface_hub", reason="scvi.hub needs huggingface_hub")
    import scvi
    from scvi.hub import HubMetadata, HubModel

    model.save(tmp_path / "model", save_anndata=True)
    metadata = HubMetadata(scvi.__version__, ad.__version__, "PerturbDiff", model_parent_module="scperturbdiff")
    HubModel(str(tmp_path / "model"), metadata=metadata, model_card=hub.ModelCard("# A model")).save()
    loaded = HubModel(str(tmp_path / "model")).model
    assert_same_cells(model.predict(controls, ["P01"], **QUIET), loaded.predict(controls, ["P01"], **QUIET))


# ---- whole or not at all ------------------------------------------------------------------------------------------


def test_cells_of_a_former_model_are_not_those_of_the_next(
    model: PerturbDiff, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "model"
    model.save(folder, save_anndata=True)
    model.save(folder, overwrite=True)
    assert (folder / "adata.h5ad.former").is_file() and PerturbDiff.load(folder, adata=None).adata is None
    model.save(folder, overwrite=True, save_anndata=True)
    before = (folder / "adata.h5ad").read_bytes()

    def full(*_: object) -> None:
        raise OSError("no space")

    monkeypatch.setattr("scperturbdiff.storage._model.save_file", full)
    monkeypatch.setattr(type(model.adata), "write", lambda self, path: Path(path).write_bytes(b"other"))
    with pytest.raises(OSError, match="no space"):
        model.save(folder, overwrite=True, save_anndata=True)
    assert (folder / "adata.h5ad").read_bytes() == before


def test_saving_over_a_model_replaces_it_and_leaves_other_files(model: PerturbDiff, folder: Path) -> None:
    (folder / "notes.txt").write_text("mine")
    former = tensor_file(folder).name
    with pytest.raises(ValueError, match="overwrite=True"):
        model.save(folder)
    model.save(folder, overwrite=True)
    assert tensor_file(folder).name != former
    assert tensor_file(folder).stat().st_mode == (folder / "notes.txt").stat().st_mode
    assert sorted(path.name for path in folder.iterdir()) == sorted(
        ["model.json", "notes.txt", tensor_file(folder).name]
    )


@pytest.mark.parametrize("fails", ["save_file", "_digest", "atomic_file", "check_space"])
def test_a_failed_save_leaves_the_old_model_whole(
    model: PerturbDiff, controls: AnnData, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails: str
) -> None:
    before = {path.name: path.read_bytes() for path in folder.iterdir()}

    def broken(*args: Any, **kwargs: Any) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(storage, fails, broken)
    with pytest.raises(OSError, match="disk full"):
        model.save(folder, overwrite=True)
    with pytest.raises(OSError, match="disk full"):
        model.save(tmp_path / "new")
    monkeypatch.undo()
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]
    assert PerturbDiff.load(folder, adata=False).is_trained_


def test_writers_at_the_same_time_leave_a_whole_model(model: PerturbDiff, folder: Path) -> None:
    attributes = {name: value for name, value in model._get_user_attributes() if name.endswith("_")}
    from scperturbdiff.saving import pack

    saved = pack(model.module, attributes)
    errors: list[Exception] = []

    def write() -> None:
        try:
            for _ in range(5):
                saved.write(folder)
        except (OSError, ValueError) as error:
            errors.append(error)

    def read() -> None:
        try:
            for _ in range(5):
                SavedModel.read(folder)
        except (OSError, ValueError) as error:
            errors.append(error)

    threads = [threading.Thread(target=target) for target in (write, write, read)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    # a reader may be overtaken twice, and says so; what is left is whole
    assert [error for error in errors if "is not there" not in str(error)] == []
    assert PerturbDiff.load(folder, adata=False).is_trained_


def test_a_killed_save_leaves_the_old_model_whole(folder: Path) -> None:
    """The process dies after the tensors are written, before the JSON is replaced."""
    before = (folder / "model.json").read_bytes()
    code = (
        "import os, signal, sys\n"
        "import scperturbdiff.storage._model as storage\n"
        "from pathlib import Path\n"
        "saved = storage.SavedModel.read(Path(sys.argv[1]))\n"
        "storage._digest = lambda path: os.kill(os.getpid(), signal.SIGKILL)\n"
        "saved.write(Path(sys.argv[1]))\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(folder)], check=False, capture_output=True)
    assert done.returncode == -9, done.stderr.decode()
    assert (folder / "model.json").read_bytes() == before
    assert len(list(folder.glob("model.*.safetensors"))) == 2  # one of them the dead process'
    assert PerturbDiff.load(folder, adata=False).is_trained_


def test_a_link_is_not_written_through(model: PerturbDiff, tmp_path: Path) -> None:
    victim = tmp_path / "victim.txt"
    victim.write_text("precious")
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "model.json").symlink_to(victim)
    model.save(tmp_path / "model", overwrite=True)
    assert victim.read_text() == "precious"
    assert PerturbDiff.load(tmp_path / "model", adata=False).is_trained_
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="is there already"):
        model.save(tmp_path / "dangling")


@pytest.mark.parametrize("prefix", ["../", "a/b", "..\0", "/"])
def test_a_prefix_does_not_leave_the_folder(model: PerturbDiff, tmp_path: Path, prefix: str) -> None:
    with pytest.raises(ValueError, match="prefix="):
        model.save(tmp_path / "inner" / "model", prefix=prefix)
    with pytest.raises(ValueError, match="prefix="):
        PerturbDiff.load(tmp_path, adata=False, prefix=prefix)


# ---- nothing is run -----------------------------------------------------------------------------------------------


class Bomb:
    """Creates a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


def _pickled(canary: Path) -> bytes:
    content = {"model_state_dict": {}, "var_names": [], "attr_dict": {"registry_": {}, "bomb_": Bomb(canary)}}
    return pickle.dumps(content)


def _only_pickle(folder: Path, canary: Path) -> None:
    shutil.rmtree(folder)
    folder.mkdir()
    torch.save({"attr_dict": {"registry_": Bomb(canary)}}, folder / "model.pt")


def _pickle_as_json(folder: Path, canary: Path) -> None:
    (folder / "model.json").write_bytes(_pickled(canary))


def _pickle_as_tensors(folder: Path, canary: Path) -> None:
    tensor_file(folder).write_bytes(_pickled(canary))
    sign(folder)


def _link_to_pickle(folder: Path, canary: Path) -> None:
    evil = folder.parent / "evil.pt"
    evil.write_bytes(_pickled(canary))
    path = tensor_file(folder)
    path.unlink()
    path.symlink_to(evil)
    sign(folder)


def _token_elsewhere(folder: Path, canary: Path) -> None:
    evil = folder.parent / "model.evil.safetensors"
    evil.write_bytes(_pickled(canary))
    rewrite(folder, lambda said: said["tensors"].update(token="../model.evil"))


def _setup_method(name: str) -> Callable[[Path, Path], None]:
    return lambda folder, canary: rewrite(
        folder, lambda said: said["values"]["registry"].update(setup_method_name=name)
    )


def _attribute(name: str) -> Callable[[Path, Path], None]:
    return lambda folder, canary: rewrite(folder, lambda said: said["values"]["attributes"].update({name: "os.system"}))


def _class_of_retrieval(folder: Path, canary: Path) -> None:
    def change(said: dict[str, Any]) -> None:
        said["values"]["retrieval"]["retrieval"]["retrieval"] = {
            "kind": "subprocess.Popen",
            "args": ["touch", str(canary)],
        }

    rewrite(folder, change)


def _unknown_tag(folder: Path, canary: Path) -> None:
    rewrite(folder, lambda said: said["values"].update(arguments={"$": "__import__('os').system", "of": str(canary)}))


def _object_number(folder: Path, canary: Path) -> None:
    rewrite(folder, lambda said: said["values"]["arguments"].update(n_latent={"$": "number", "dtype": "O", "of": 4}))


def _registry_argument(folder: Path, canary: Path) -> None:
    rewrite(folder, lambda said: said["values"]["registry"]["setup_args"].update(source_registry={"a": 1}))


def _pickled_cells(folder: Path, canary: Path) -> None:
    (folder / "adata.h5ad").write_bytes(_pickled(canary))


ATTACKS: dict[str, Callable[[Path, Path], None]] = {
    "a pickle alone": _only_pickle,
    "a pickle as JSON": _pickle_as_json,
    "a pickle as tensors": _pickle_as_tensors,
    "a link to a pickle": _link_to_pickle,
    "JSON that points elsewhere": _token_elsewhere,
    "set-up by __init__": _setup_method("__init__"),
    "set-up by load": _setup_method("load"),
    "set-up by convert_legacy_save": _setup_method("convert_legacy_save"),
    "an attribute __class__": _attribute("__class__"),
    "an attribute that is a method": _attribute("predict"),
    "a class of another module": _class_of_retrieval,
    "a tag that is code": _unknown_tag,
    "a number of objects": _object_number,
    "an argument of set-up": _registry_argument,
    "pickled cells": _pickled_cells,
}


@pytest.mark.parametrize("attack", ATTACKS)
def test_no_attack_runs_code(folder: Path, controls: AnnData, tmp_path: Path, attack: str) -> None:
    canary = tmp_path / "canary"
    ATTACKS[attack](folder, canary)

    def registry() -> Any:
        return PerturbDiff.load_registry(folder)

    calls: list[Callable[[], Any]] = [lambda: PerturbDiff.load(folder)]
    if attack != "pickled cells":
        calls += [
            lambda: PerturbDiff.load(folder, adata=False),
            lambda: PerturbDiff.load(folder, adata=controls.copy()),
            registry,
            lambda: PerturbDiff.load_query_data(controls.copy(), folder),
        ]
    for call in calls:
        if call is registry and attack == "a class of another module":
            assert call()  # a registry may be read where only retrieval is wrong
            continue
        with pytest.raises((ValueError, OSError)) as caught:
            call()
        assert 10 < len(str(caught.value)) < 1000
    assert not canary.exists(), attack


def test_a_pickle_beside_a_model_is_not_read(folder: Path, tmp_path: Path) -> None:
    (folder / "model.pt").write_bytes(_pickled(tmp_path / "canary"))
    assert PerturbDiff.load(folder, adata=False).is_trained_
    assert PerturbDiff.load(folder, adata=False, allow_pickle=True).is_trained_
    assert not (tmp_path / "canary").exists()


def test_the_command_line_reads_no_pickle(
    folder: Path, controls: AnnData, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _only_pickle(folder, tmp_path / "canary")
    controls.write_h5ad(tmp_path / "controls.h5ad")
    words = ["predict", str(folder), str(tmp_path / "controls.h5ad"), "--out", str(tmp_path / "pred.h5ad")]
    assert main(words) == 1
    assert main(["convert", str(folder), "--out", str(tmp_path / "new")]) == 1
    assert "--allow-pickle" in capsys.readouterr().err
    assert not (tmp_path / "canary").exists()


def test_an_old_model_is_converted_when_its_writer_is_trusted(
    model: PerturbDiff, controls: AnnData, tmp_path: Path
) -> None:
    super(PerturbDiff, model).save(str(tmp_path / "old"))  # scvi-tools' own format
    with pytest.raises(ValueError, match="allow_pickle=True"):
        PerturbDiff.load(tmp_path / "old", adata=False)
    assert main(["convert", str(tmp_path / "old"), "--out", str(tmp_path / "new"), "--allow-pickle"]) == 0
    again = PerturbDiff.load(tmp_path / "new", adata=False)
    assert_same_cells(model.predict(controls, ["P01"], **QUIET), again.predict(controls, ["P01"], **QUIET))


# ---- damage is named ----------------------------------------------------------------------------------------------


def _set(*path: Any) -> Callable[[Path], None]:
    """Set what is at the keys of `path` but the last to the last."""

    def damage(folder: Path) -> None:
        def change(said: dict[str, Any]) -> None:
            inner: Any = said
            for key in path[:-2]:
                inner = inner[key]
            inner[path[-2]] = path[-1]

        rewrite(folder, change)

    return damage


def _tensors(change: Callable[[dict[str, torch.Tensor]], Any]) -> Callable[[Path], None]:
    return lambda folder: retensor(folder, change)


def _bytes(change: Callable[[bytes], bytes], name: str = "json") -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        path = folder / "model.json" if name == "json" else tensor_file(folder)
        path.write_bytes(change(path.read_bytes()))

    return damage


WEIGHT, SHIFT = "weights:latent_mean", "values.retrieval.retrieval.retrieval.responses.shift"
ARGUMENTS, REGISTRY, FOUND = ("values", "arguments"), ("values", "registry"), ("values", "attributes")
DAMAGE: dict[str, Callable[[Path], Any]] = {
    "empty JSON": _bytes(lambda _: b""),
    "half of the JSON": _bytes(lambda text: text[: len(text) // 2]),
    "JSON of another program": _bytes(lambda _: b'{"format": "other"}'),
    "a list": _bytes(lambda _: b"[1, 2]"),
    "deep JSON": _bytes(lambda _: b"[" * 100_000),
    "a number of many digits": _bytes(lambda _: b'{"format": ' + b"9" * 10_000 + b"}"),
    "not text": _bytes(lambda _: b"\xff\xfe\x00"),
    "a later version": _set("version", 99),
    "more entries": _set("extra", 1),
    "half of the tensors": _bytes(lambda data: data[: len(data) // 2], "tensors"),
    "one bit": _bytes(lambda data: data[:-1] + bytes([data[-1] ^ 1]), "tensors"),
    "no file of tensors": lambda folder: tensor_file(folder).unlink(),
    "weights that are not finite": _tensors(lambda t: t[WEIGHT].fill_(torch.inf)),
    "a weight of another shape": _tensors(lambda t: t.update({WEIGHT: torch.zeros(3)})),
    "a weight of another type": _tensors(lambda t: t.update({WEIGHT: t[WEIGHT].double()})),
    "a missing weight": _tensors(lambda t: t.pop(WEIGHT)),
    "a weight more": _tensors(lambda t: t.update({"weights:other": torch.zeros(1)})),
    "a huge model": _set(*ARGUMENTS, "n_hidden", 10**12),
    "a large model": _set(*ARGUMENTS, "n_hidden", 10**6),
    "very many layers": _set(*ARGUMENTS, "n_layers", 10**6),
    "half a unit": _set(*ARGUMENTS, "n_hidden", 1.5),
    "an unknown argument": _set(*ARGUMENTS, "adata", 1),
    "an unknown nested argument": _set(*ARGUMENTS, "vae_kwargs", {"nonsense": 1}),
    "no registry": _set(*REGISTRY, 1),
    "another class": _set(*REGISTRY, "model_name", "SCVI"),
    "no field of counts": _set(*REGISTRY, "field_registries", {}),
    "fewer genes": _set(*REGISTRY, "field_registries", "X", "summary_stats", "n_vars", 3),
    "no conditions": _set(*REGISTRY, "scperturbdiff_conditions", {}),
    "conditions of another type": _set(*REGISTRY, "scperturbdiff_conditions", "components", 5),
    "components of another type": _set(*REGISTRY, "scperturbdiff_conditions", "contexts", {"$": "tuple", "of": [1]}),
    "a table that is none": _set(*FOUND, "populations_", [1]),
    "a missing attribute": lambda folder: rewrite(folder, lambda said: said["values"]["attributes"].pop("is_trained_")),
    "a report of other fields": _set(*FOUND, "report_", {"kind": "TrainingReport", "n_populations": 1}),
    "retrieval of another version": _set("values", "retrieval", "retrieval", "version", 77),
    "retrieval of other dimensions": _tensors(lambda t: t.update({SHIFT: t[SHIFT][:, :1].clone()})),
    "settings of another type": _set("values", "retrieval", "retrieval", "retrieval", "settings", "n_neighbors", "x"),
    "retrieval that is none": _set("values", "retrieval", "retrieval", [1, 2]),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_ends_in_one_clear_error(folder: Path, damage: str) -> None:
    DAMAGE[damage](folder)
    with pytest.raises(ValueError, match=r"\w") as caught:
        PerturbDiff.load(folder, adata=False)
    assert 20 < len(str(caught.value)) < 1000
    assert "\n" not in str(caught.value)


def test_a_folder_without_permission_is_named(model: PerturbDiff, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file"):
        model.save(tmp_path / "file" / "model")
    if os.geteuid() == 0:
        return  # root may write everywhere
    (tmp_path / "closed").mkdir(mode=0o500)
    with pytest.raises(PermissionError):
        model.save(tmp_path / "closed" / "model")
