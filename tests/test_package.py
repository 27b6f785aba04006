"""The package's door, through which names come when they are used, and what is said of it where it is published."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement

import scperturbdiff

ROOT = Path(__file__).resolve().parents[1]
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
IMPORTED_AS = {"cell-eval2": "cell_eval2", "scikit-learn": "sklearn", "scvi-tools": "scvi", "umap-learn": "umap"}
CONDA = {"matplotlib": "matplotlib-base", "torch": "pytorch"}
"""Names on conda-forge that differ from those on PyPI."""

HEAVY = {"anndata", "lightning", "matplotlib", "numpy", "pandas", "scanpy", "scipy", "scvi", "sklearn", "torch"}
REPORT = (
    "import atexit, sys, time\natexit.register(lambda: print(time.process_time(), *sys.modules, file=sys.stderr))\n"
)


@pytest.mark.parametrize(
    "code",
    [
        "import scperturbdiff",
        "import scperturbdiff; dir(scperturbdiff); scperturbdiff.__version__",
        "from scperturbdiff.cli import main; main(['--help'])",
        "from scperturbdiff.cli import main; main(['train', '--help'])",
        "from scperturbdiff.cli import main; main(['--version'])",
        "from scperturbdiff.cli import main; main(['fly'])",
    ],
)
def test_nothing_heavy_is_imported_before_it_is_needed(code: str) -> None:
    done = subprocess.run([sys.executable, "-c", REPORT + code], capture_output=True, text=True)
    seconds, *modules = done.stderr.splitlines()[-1].split()
    assert "scperturbdiff" in modules
    assert not HEAVY & set(modules)
    assert float(seconds) < 1  # CPU time, of which a tenth is used


def test_every_name_is_there() -> None:
    assert {*scperturbdiff.__all__, "__version__"} == set(dir(scperturbdiff))
    for name in scperturbdiff.__all__:
        assert getattr(scperturbdiff, name).__name__.split(".")[-1] == name
    everything: dict[str, object] = {}
    exec("from scperturbdiff import *", everything)
    assert set(scperturbdiff.__all__) <= set(everything)
    assert re.fullmatch(r"\d+\.\d+\.\d+.*", scperturbdiff.__version__)


def test_a_name_that_is_not_there_is_an_attribute_error() -> None:
    assert not hasattr(scperturbdiff, "perturbdiff")
    with pytest.raises(AttributeError, match="module 'scperturbdiff' has no attribute 'PertubDiff'"):
        _ = scperturbdiff.PertubDiff
    with pytest.raises(ImportError, match="PertubDiff"):
        exec("from scperturbdiff import PertubDiff")


# ---- what is said of it elsewhere ----------------------------------------------------------------------------------


def test_there_is_one_version() -> None:
    """It is written in pyproject.toml, from where code reads it; files of other tools, which cannot, agree."""
    version = PROJECT["version"]
    assert scperturbdiff.__version__ == version
    done = subprocess.run([sys.executable, "-m", "scperturbdiff", "--version"], capture_output=True, text=True)
    assert done.stdout == f"scperturbdiff {version}\n"
    assert yaml.safe_load(published("CITATION.cff"))["version"] == version
    assert yaml.safe_load(published("docs/scverse/meta.yaml"))["version"] == version
    assert recipe()["context"]["version"] == version


def test_what_is_imported_is_required_or_an_extra_that_the_error_names() -> None:
    required = {IMPORTED_AS.get(name, name) for name in map(name_of, PROJECT["dependencies"])}
    extra_of = {
        IMPORTED_AS.get(name_of(package), name_of(package)): extra
        for extra, packages in PROJECT["optional-dependencies"].items()
        if extra not in ("all", "docs", "test")
        for package in packages
    }
    files = {path: path.read_text(encoding="utf-8") for path in sorted((ROOT / "src").rglob("*.py"))}
    used = {(package, path) for path, text in files.items() for package in third_party(text)}
    assert {package for package, _ in used} >= required, "no requirement that nothing imports"
    assert {package for package, _ in used} <= required | set(extra_of)
    silent = [
        f"{path.relative_to(ROOT)} imports {package} and does not say scperturbdiff[{extra_of[package]}]"
        for package, path in used
        if package not in required and f"scperturbdiff[{extra_of[package]}]" not in files[path]
    ]
    assert not silent, "\n".join(silent)


def test_the_extra_all_has_every_other_that_users_want() -> None:
    extras = PROJECT["optional-dependencies"]
    (everything,) = map(Requirement, extras["all"])
    assert everything.name == PROJECT["name"]
    assert everything.extras == set(extras) - {"all", "docs", "test"}


def test_the_recipe_for_conda_requires_what_pip_does() -> None:
    python, *packages = map(Requirement, recipe()["requirements"]["run"])
    assert python == Requirement("python " + PROJECT["requires-python"])
    renamed = [
        Requirement(CONDA.get(name_of(line), name_of(line)) + str(Requirement(line).specifier))
        for line in PROJECT["dependencies"]
    ]
    assert sorted(map(str, packages)) == sorted(map(str, renamed))


def published(name: str) -> str:
    """Text of a file that is not installed, and that the source distribution need not have."""
    if not (ROOT / name).is_file():
        pytest.skip(f"{name} is not here (only a clone of the repository has it)")
    return (ROOT / name).read_text(encoding="utf-8")


def recipe() -> dict[str, Any]:
    """The recipe, with its variables filled in."""
    text = published("release/recipe.yaml")
    for name, value in yaml.safe_load(text)["context"].items():
        text = text.replace("${{ " + name + " }}", str(value))
    return yaml.safe_load(text)


def name_of(requirement: str) -> str:
    return Requirement(requirement).name


def third_party(text: str) -> set[str]:
    """Packages of others that a file imports anywhere."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(str(node.module).split(".")[0])
    return names - set(sys.stdlib_module_names) - {"scperturbdiff"}
