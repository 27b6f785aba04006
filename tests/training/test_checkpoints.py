"""Going on with a training that was cut off: the state reached is that of one that was not."""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lightning.pytorch as pl
import numpy as np
import pandas as pd
import pytest
import scvi
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from tests.helpers import FEW_STEPS, TINY, assert_same_cells
from tests.screens import screen, tiny

import scperturbdiff as spd
from scperturbdiff.cli import main
from scperturbdiff.diffusion import GeneratorTrainingPlan, NetworkSelection
from scperturbdiff.latent import LatentTrainingPlan

if TYPE_CHECKING:
    from anndata import AnnData

TRAIN: dict[str, Any] = FEW_STEPS | {
    "max_epochs_vae": 2,
    "max_epochs_generator": 4,
    "validation_size": 0.4,
    "logger": None,
}
DEFAULTS = dict(spd.PerturbDiff.__init__.__kwdefaults__ or {})
PREDICT: dict[str, Any] = {"perturbations": ["P0", "P3"], "n_cells": 6, "seed": 1, "progress": False}


class Interrupt(pl.Callback):
    """Interrupts a stage at the end of an epoch, before its checkpoint is written."""

    def __init__(self, stage: type, epoch: int) -> None:
        self.stage, self.epoch = stage, epoch

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if isinstance(pl_module, self.stage) and trainer.current_epoch == self.epoch:
            raise KeyboardInterrupt


@pytest.fixture(autouse=True)
def no_seed(seed: int) -> None:
    """A seed in the settings counts as one that was asked for."""
    scvi.settings.seed = None


@pytest.fixture(scope="module")
def cells() -> AnnData:
    return screen(donors=1)


@pytest.fixture(scope="module")
def whole(cells: AnnData) -> spd.PerturbDiff:
    """A training without checkpoints that nothing interrupted."""
    model = tiny(cells)
    model.train(**TRAIN, seed=3)
    return model


def assert_same_models(first: spd.PerturbDiff, second: spd.PerturbDiff) -> None:
    ours, theirs = first.module.state_dict(), second.module.state_dict()
    assert ours.keys() == theirs.keys()
    assert [n for n, v in ours.items() if isinstance(v, torch.Tensor) and not torch.equal(v, theirs[n])] == []
    assert list(first.history_) == list(second.history_)
    for name, table in first.history_.items():
        pd.testing.assert_frame_equal(table, second.history_[name])
    assert str(first.report_) == str(second.report_)
    assert_same_cells(first.predict(**PREDICT), second.predict(**PREDICT))


def interrupted(cells: AnnData, folder: Path, stage: type, epoch: int, **options: Any) -> spd.PerturbDiff:
    model = tiny(cells)
    with pytest.raises(KeyboardInterrupt, match="Go on with resume=True"):
        model.train(**(TRAIN | options), seed=3, checkpoint_dir=folder, callbacks=[Interrupt(stage, epoch)])
    return model


def epoch_of(folder: Path) -> int:
    """Whole epochs of the second stage in its checkpoint."""
    return int(torch.load(folder / "network.ckpt", weights_only=True)["epoch"]) + 1


@pytest.mark.parametrize(
    ("stage", "epoch", "kept"),
    [
        (LatentTrainingPlan, 1, 0),
        (GeneratorTrainingPlan, 0, 0),
        (GeneratorTrainingPlan, 1, 1),
        (GeneratorTrainingPlan, 3, 3),
    ],
)
def test_what_was_interrupted_goes_on_to_the_same_end(
    cells: AnnData, whole: spd.PerturbDiff, tmp_path: Path, stage: type, epoch: int, kept: int
) -> None:
    interrupted(cells, tmp_path / "c", stage, epoch)
    assert (epoch_of(tmp_path / "c") if (tmp_path / "c" / "network.ckpt").exists() else 0) == kept
    # another process: other weights to start from, another state of the generators, no seed given
    again = tiny(cells, seed=9)
    torch.rand(5)
    passes: list[str] = []

    class Count(pl.Callback):
        def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            passes.append(type(pl_module).__name__)

    again.train(**TRAIN, checkpoint_dir=tmp_path / "c", resume=True, callbacks=[Count()])
    assert passes.count("LatentTrainingPlan") == (2 if stage is LatentTrainingPlan else 0)
    assert passes.count("GeneratorTrainingPlan") == 4 - kept
    assert_same_models(whole, again)


def test_a_network_that_is_used_goes_on(cells: AnnData, tmp_path: Path) -> None:
    untested = {**TRAIN, "validation_size": 0.0}
    model, again = tiny(cells), tiny(cells, seed=9)
    model.train(**untested, seed=3)
    assert model.report_.network_weight == 1
    interrupted(cells, tmp_path, GeneratorTrainingPlan, 2, validation_size=0.0)
    again.train(**untested, checkpoint_dir=tmp_path, resume=True)
    assert_same_models(model, again)


CHILD = """
import sys, time
import lightning.pytorch as pl
from tests.screens import screen, tiny
from tests.training.test_checkpoints import TRAIN

class Wait(pl.Callback):
    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.current_epoch == 2:  # of the second stage: the first has two epochs
            print("in its third epoch", flush=True)
            time.sleep(60)

tiny(screen(donors=1)).train(**TRAIN, seed=3, checkpoint_dir=sys.argv[1], callbacks=[Wait()])
"""


def test_a_process_that_was_killed_loses_no_more_than_an_epoch(
    cells: AnnData, whole: spd.PerturbDiff, tmp_path: Path
) -> None:
    root = Path(__file__).parents[2]
    path = os.pathsep.join([str(root), str(root / "src")])
    command = [sys.executable, "-c", CHILD, str(tmp_path / "c")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": path}) as child:
        assert child.stdout is not None
        reached = any("in its third epoch" in line for line in child.stdout)
        child.kill()
    assert reached and child.returncode == -signal.SIGKILL
    assert epoch_of(tmp_path / "c") == 2
    again = tiny(cells, seed=9)
    again.train(**TRAIN, checkpoint_dir=tmp_path / "c", resume=True)
    assert_same_models(whole, again)


def test_interrupted_twice_in_one_session(cells: AnnData, whole: spd.PerturbDiff, tmp_path: Path) -> None:
    model = interrupted(cells, tmp_path, GeneratorTrainingPlan, 1)
    with pytest.raises(KeyboardInterrupt):
        model.train(**TRAIN, checkpoint_dir=tmp_path, resume=True, callbacks=[Interrupt(GeneratorTrainingPlan, 2)])
    assert epoch_of(tmp_path) == 2
    model.train(**TRAIN, checkpoint_dir=tmp_path, resume=True)
    assert_same_models(whole, model)


def test_checkpoints_change_nothing_and_stay_small(cells: AnnData, whole: spd.PerturbDiff, tmp_path: Path) -> None:
    model = tiny(cells)
    model.train(**TRAIN, seed=3, checkpoint_dir=tmp_path / "new" / "folder")
    assert_same_models(whole, model)
    found = sorted(path.name for path in (tmp_path / "new" / "folder").iterdir())
    assert len(found) == 4 and {"network.ckpt", "run.json", "start_model.json"} < set(found)
    # one that has ended is gone on with, too: its last epoch is trained again
    again = tiny(cells, seed=9)
    again.train(**TRAIN, checkpoint_dir=tmp_path / "new" / "folder", resume=True)
    assert_same_models(whole, again)


def test_a_training_that_stops_early_stops_at_the_same_epoch(
    cells: AnnData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Stop(pl.Callback):
        def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            trainer.should_stop = isinstance(pl_module, GeneratorTrainingPlan) and trainer.current_epoch == 2

    model = tiny(cells)
    model.train(**TRAIN, seed=3, checkpoint_dir=tmp_path, callbacks=[Stop()])
    assert len(model.history_["generator_loss_train"]) == 3 and epoch_of(tmp_path) == 2


@pytest.mark.parametrize("last", [{}, {"max_steps": 8}])
def test_the_end_is_found_from_a_checkpoint_of_the_last_epoch(
    cells: AnnData, tmp_path: Path, last: dict[str, Any]
) -> None:
    """Lightning does not begin a training that had reached its end: the best weights are put back all the same."""
    keep = ModelCheckpoint(tmp_path, filename="{epoch}", every_n_epochs=1, save_top_k=-1)
    model, again = tiny(cells), tiny(cells, seed=9)
    model.train(**TRAIN, **last, seed=3, callbacks=[keep])
    again.train(**TRAIN, **last, ckpt_path=tmp_path / "epoch=3.ckpt")
    assert model.report_.network_reason == again.report_.network_reason
    for name, value in model.module.generator_ema.state_dict().items():
        assert torch.equal(value, again.module.generator_ema.state_dict()[name]), name


def test_a_checkpoint_of_an_early_end_is_the_end(cells: AnnData, tmp_path: Path) -> None:
    class Stop(pl.Callback):
        def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            trainer.should_stop = trainer.current_epoch == 1

    keep = ModelCheckpoint(tmp_path, filename="{epoch}", every_n_epochs=1, save_top_k=-1)
    model, again = tiny(cells), tiny(cells, seed=9)
    model.train(**TRAIN, seed=3, callbacks=[Stop(), keep])
    again.train(**TRAIN, ckpt_path=tmp_path / "epoch=1.ckpt")
    ours, theirs = model.module.generator_ema.state_dict(), again.module.generator_ema.state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert len(again.history_["generator_loss_train"]) == 2


def test_further_training_goes_on(cells: AnnData, tmp_path: Path) -> None:
    """Of a trained model the VAE is kept; what it starts from is in the folder, too."""
    first = tiny(cells)
    first.train(**TRAIN, seed=1)
    first.save(tmp_path / "model")
    further: dict[str, Any] = {**TRAIN, "max_epochs_vae": None, "seed": 2}
    models = [spd.PerturbDiff.load(tmp_path / "model", adata=cells) for _ in range(3)]
    models[0].train(**further)
    with pytest.raises(KeyboardInterrupt):
        models[1].train(**further, checkpoint_dir=tmp_path / "c", callbacks=[Interrupt(GeneratorTrainingPlan, 2)])
    assert_same_cells(models[1].predict(**PREDICT), first.predict(**PREDICT))
    models[2].train(**further, checkpoint_dir=tmp_path / "c", resume=True)
    assert_same_models(models[0], models[2])


def test_the_first_stage_alone(cells: AnnData, tmp_path: Path) -> None:
    only = {**TRAIN, "max_epochs_generator": 0}
    model, again = tiny(cells), tiny(cells, seed=9)
    model.train(**only, seed=3, checkpoint_dir=tmp_path)
    again.train(**only, checkpoint_dir=tmp_path, resume=True)
    assert again.is_trained_ and list(again.history_) == list(model.history_)
    np.testing.assert_array_equal(model.get_latent_representation(), again.get_latent_representation())


def test_weights_that_are_not_finite_are_no_checkpoint(cells: AnnData, tmp_path: Path) -> None:
    plan = {**FEW_STEPS["plan_kwargs"], "lr": 1e30, "steps_per_epoch": 6}
    tiny(cells).train(**(TRAIN | {"plan_kwargs": plan}), checkpoint_dir=tmp_path)
    assert not (tmp_path / "network.ckpt").exists()


# ---- whose checkpoints they are --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def left(cells: AnnData, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a training that was interrupted."""
    folder = tmp_path_factory.mktemp("left")
    interrupted(cells, folder, GeneratorTrainingPlan, 1)
    return folder


@pytest.fixture
def untouched(left: Path) -> Any:
    """The same, and it must not change."""
    before = {path.name: path.read_bytes() for path in left.iterdir()}
    yield left
    assert {path.name: path.read_bytes() for path in left.iterdir()} == before


def test_checkpoints_are_not_overwritten_unasked(cells: AnnData, untouched: Path) -> None:
    with pytest.raises(FileExistsError, match=r"holds checkpoints \(run.json.*resume=True"):
        tiny(cells).train(**TRAIN, seed=3, checkpoint_dir=untouched)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"seed": 4}, "seed was 3, is 4"),
        ({"batch_size": 64}, r"train\(batch_size\) was 128, is 64"),
        ({"max_epochs_generator": 5}, r"train\(max_epochs_generator\) was 4, is 5"),
        ({"plan_kwargs": {"steps_per_epoch": 9}}, r"train\(plan_kwargs\) was .*\"steps_per_epoch\": 2"),
        ({"precision": "bf16-mixed"}, r"train\(precision\) was null, is \"bf16-mixed\""),
    ],
)
def test_other_arguments_are_named(cells: AnnData, untouched: Path, options: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=f"the checkpoints of another training: {text}"):
        tiny(cells).train(**(TRAIN | {"seed": 3} | options), checkpoint_dir=untouched, resume=True)


def test_other_cells_and_models_are_named(cells: AnnData, untouched: Path) -> None:
    asked: dict[str, Any] = {"checkpoint_dir": untouched, "resume": True, "seed": 3}
    with pytest.raises(ValueError, match=r"PerturbDiff\(n_latent\) was 4, is 3"):
        spd.PerturbDiff(cells, **(TINY | {"n_latent": 3})).train(**TRAIN, **asked)
    keys: dict[str, Any] = {"perturbation_key": "perturbation", "control": "control", "context_keys": ["cell_type"]}
    renamed = screen(donors=1)
    renamed.var_names = [f"x{i}" for i in range(cells.n_vars)]
    for other, text in ((renamed, "names of genes"), (screen(donors=1)[1:].copy(), "number of cells was 50, is 49")):
        spd.PerturbDiff.setup_anndata(other, **keys, batch_key="donor")
        with pytest.raises(ValueError, match=text):
            tiny(other).train(**TRAIN, **asked)
    other = screen(donors=1)
    spd.PerturbDiff.setup_anndata(other, **keys)
    with pytest.raises(ValueError, match=r"populations was.*setup\(batch_key\) was \"donor\", is null"):
        tiny(other).train(**TRAIN, **asked)


def test_an_empty_folder_is_the_beginning(
    cells: AnnData, whole: spd.PerturbDiff, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = tiny(cells)
    with caplog.at_level(logging.INFO, "scvi.scperturbdiff"):
        logging.getLogger("scvi").propagate, before = True, logging.getLogger("scvi").propagate
        model.train(**TRAIN, seed=3, checkpoint_dir=tmp_path, resume=True)
        logging.getLogger("scvi").propagate = before
    assert "holds no checkpoints to go on from: training starts at its beginning" in caplog.text
    assert_same_models(whole, model)


def test_what_contradicts_itself_is_an_error(cells: AnnData, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="resume=True needs the checkpoint_dir"):
        tiny(cells).train(**TRAIN, resume=True)
    with pytest.raises(ValueError, match="checkpoint_dir or ckpt_path, not both"):
        tiny(cells).train(**TRAIN, checkpoint_dir=tmp_path, ckpt_path=tmp_path / "x.ckpt")
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("text", ["{", "[]", json.dumps({"seed": 0})])
def test_a_damaged_run_is_named(cells: AnnData, tmp_path: Path, text: str) -> None:
    (tmp_path / "run.json").write_text(text)
    with pytest.raises(ValueError, match="run.json' is damaged"):
        tiny(cells).train(**TRAIN, checkpoint_dir=tmp_path, resume=True)


def test_what_was_chosen_is_in_checkpoints() -> None:
    assert set(NetworkSelection().state_dict()) == {"without", "best", "start", "tried", "_of"}


# ---- the command -----------------------------------------------------------------------------------------------------


def command(cells: AnnData, folder: Path, *options: str) -> list[str]:
    if not (folder / "cells.h5ad").exists():
        cells.write_h5ad(folder / "cells.h5ad")
    keys = ["--perturbation-key", "perturbation", "--control", "control", "--context-key", "cell_type"]
    return ["train", str(folder / "cells.h5ad"), "--out", str(folder / "model"), *keys, *options]


def test_the_command_goes_on(
    cells: AnnData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With 8 populations no network is trained: what is gone on from is the first stage."""
    monkeypatch.setattr(spd.PerturbDiff.__init__, "__kwdefaults__", {**DEFAULTS, **TINY})
    options = ["--max-epochs", "2", "--accelerator", "cpu", "--checkpoint", str(tmp_path / "c")]
    save = spd.PerturbDiff.save

    def fails(*args: Any, **kwargs: Any) -> None:
        raise OSError("no space")

    monkeypatch.setattr(spd.PerturbDiff, "save", fails)
    assert main(command(cells, tmp_path, *options)) == 1 and "no space" in capsys.readouterr().err
    monkeypatch.setattr(spd.PerturbDiff, "save", save)
    assert main(command(cells, tmp_path, *options)) == 1
    assert "resume=True" in capsys.readouterr().err and not (tmp_path / "model").exists()
    assert main(command(cells, tmp_path, *options, "--resume", "--seed", "1")) == 1
    assert "seed was 0, is 1" in capsys.readouterr().err
    assert main(command(cells, tmp_path, *options, "--resume")) == 0
    assert "Epoch" not in capsys.readouterr().err  # of the VAE
    assert (tmp_path / "model").is_dir()


def test_the_command_needs_a_folder_to_go_on_from(
    cells: AnnData, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(command(cells, tmp_path, "--resume")) == 1
    assert "--resume needs --checkpoint DIR" in capsys.readouterr().err
