"""Whatever words the command is given: exit code 0, 1 or 2, one line for an error, files left as they were."""

from __future__ import annotations

import contextlib
import hashlib
import io
import shutil
from dataclasses import dataclass
from typing import TYPE_CHECKING

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from hypothesis import event, given
from tests.fuzz.cells import Screen, build
from tests.fuzz.errors import unclear
from tests.fuzz.profiles import share
from tests.fuzz.quick import quick_constants
from tests.fuzz.words import any_words, commands

from scperturbdiff.cli import main

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@dataclass(frozen=True)
class World:
    """Files that commands are given."""

    folder: Path

    def path(self, name: str) -> str:
        return str(self.folder / name)

    @property
    def names(self) -> dict[str, str]:
        """What words in braces stand for."""
        files = {
            "screen": "in/screen.h5ad",
            "controls": "in/controls.h5ad",
            "pred": "in/pred.h5ad",
            "model": "in/model",
            "wanted": "in/wanted.csv",
            "features": "in/features.csv",
            "text": "in/text.txt",
            "empty": "in/empty.h5ad",
            "cut": "in/cut.h5ad",
            "folder": "in",
            "missing": "in/missing",
            "locked": "in/locked",
            "out": "out",
            "taken": "out/taken.h5ad",
        }
        return {name: self.path(file) for name, file in files.items()}

    def spell(self, words: tuple[str, ...]) -> list[str]:
        """Words with files in place of their names."""
        out = []
        for word in words:
            for name, path in self.names.items():
                word = word.replace("{" + name + "}", path)
            out.append(word)
        return out

    def renew(self) -> None:
        """Empty the folder of results, but for one file."""
        shutil.rmtree(self.folder / "out", ignore_errors=True)
        (self.folder / "out").mkdir()
        (self.folder / "out" / "taken.h5ad").write_text("mine")

    def inputs(self) -> dict[str, str]:
        """Hash of every file that is only read."""
        files = sorted(path for path in (self.folder / "in").rglob("*") if path.is_file())
        return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def run(words: list[str]) -> tuple[int, str]:
    """Exit code and what is said on stderr."""
    said = io.StringIO()
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
        try:
            code = main(words)
        except SystemExit as stop:  # argparse
            code = int(stop.code or 0)
    return code, said.getvalue()


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory, monkeymodule: pytest.MonkeyPatch) -> Iterator[World]:
    folder = tmp_path_factory.mktemp("commands")
    world = World(folder)
    (folder / "in" / "locked").mkdir(parents=True)
    (folder / "in" / "locked").chmod(0o500)
    monkeymodule.chdir(folder)
    names = world.names
    adata = build(Screen(n_cells=36, batches=("D1", "D2"), n_genes=12, seed=3))
    adata.obs = adata.obs.rename(columns={"batch": "donor"})
    adata.layers["counts"] = adata.X.copy()
    adata.write_h5ad(names["screen"])
    controls = adata[(adata.obs["perturbation"] == "control").to_numpy()].copy()
    del controls.obs["perturbation"]
    controls.write_h5ad(names["controls"])
    pd.DataFrame({"perturbation": ["P1"], "cell_type": ["C1"], "n_cells": [2]}).to_csv(names["wanted"], index=False)
    pd.DataFrame({"f": [0.5, 1.0]}, index=["P1", "P2"]).to_csv(names["features"])
    (folder / "in" / "text.txt").write_text('no, table "\n1,2,3\n')
    (folder / "in" / "empty.h5ad").write_bytes(b"")
    whole = (folder / "in" / "screen.h5ad").read_bytes()
    (folder / "in" / "cut.h5ad").write_bytes(whole[: len(whole) // 2])
    with quick_constants():
        keys = ["--perturbation-key", "perturbation", "--control", "control", "--context-key", "cell_type"]
        words = ["train", names["screen"], "--out", names["model"], "--batch-key", "donor", "--max-epochs", "1"]
        assert run([*words, *keys, "--accelerator", "cpu"])[0] == 0
        assert run(["predict", names["model"], names["screen"], "--out", names["pred"]])[0] == 0
        yield world
    (folder / "in" / "locked").chmod(0o700)


@pytest.fixture(scope="module")
def monkeymodule() -> Iterator[pytest.MonkeyPatch]:
    with pytest.MonkeyPatch.context() as patch:
        yield patch


def check(words: list[str], world: World) -> int:
    """Run words, and fail unless they end as they should."""
    world.renew()
    before = world.inputs()
    code, said = run(words)
    lines = said.strip().splitlines()
    assert code in (0, 1, 2), code
    assert "Traceback" not in said
    assert world.inputs() == before, "an input has changed"
    if code == 0:
        return code
    assert lines and lines[-1].startswith("scperturbdiff") and "error: " in lines[-1], said
    left = sorted(path.name for path in (world.folder / "out").iterdir() if path.name != "checkpoint")
    assert left == ["taken.h5ad"] and (world.folder / "out" / "taken.h5ad").read_text() == "mine", left
    if code == 1:
        told = [line for line in lines if line.startswith(f"scperturbdiff {words[0]}: error: ")]
        assert len(told) == 1 and len(told[0]) < 1500, said
        world.renew()
        with pytest.raises(Exception) as caught, contextlib.redirect_stderr(io.StringIO()):  # noqa: PT011
            main([*words, "--traceback"])
        assert unclear(caught.value) is None, f"{unclear(caught.value)}: {lines[-1]}"
    return code


@share(0.7)
@given(words=commands())
def test_a_command_ends_with_its_result_or_one_line(words: tuple[str, ...], world: World) -> None:
    code = check(world.spell(words), world)
    event(f"{words[0]}: {code}")


@share(1.0)
@given(words=any_words())
def test_words_without_sense_are_explained(words: tuple[str, ...], world: World) -> None:
    event(str(check(world.spell(words), world)))


def test_right_words_work(world: World) -> None:
    names = world.names
    out = world.path("out/new.h5ad")
    world.renew()
    assert run(["predict", names["model"], names["controls"], "--table", names["wanted"], "--out", out])[0] == 0
    assert ad.read_h5ad(out).n_obs == 2
    keys = ["--perturbation-key", "perturbation", "--control", "control", "--context-key", "cell_type"]
    words = ["evaluate", names["pred"], names["screen"], "--out", world.path("out/scores"), "--metrics", "mse_mean"]
    code, said = run([*words, *keys])
    assert code == 0, said
    assert np.isfinite(pd.read_csv(world.path("out/scores/table.csv"))["value"]).any()
