"""The house rules of the source: which room may use which, and only through its door; no circles, no long files."""

from __future__ import annotations

import ast
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator

PACKAGE = "scperturbdiff"
SOURCE = Path(__file__).resolve().parents[1] / "src"

MODULE = {"latent", "retrieval", "diffusion", "counts"}
ROOMS = {
    "seeds",
    "storage",
    "data",
    "training_report",
    "responses",
    "module",
    "priors",
    "training",
    "transfer",
    "prediction",
    "saving",
    "limits",
}
MODEL = ROOMS | MODULE
GROUND = {"arguments", "memory", "progress"}
"""What every room may import."""
USES: dict[str, set[str]] = {
    "arguments": set(),
    "memory": set(),
    "progress": set(),
    "seeds": set(),
    "storage": set(),
    "data": {"seeds"},
    "retrieval": {"storage"},
    "diffusion": {"seeds"},
    "counts": {"seeds"},
    "latent": {"counts", "seeds"},
    "limits": {"diffusion", "seeds"},
    "training_report": set(),
    "responses": {"counts", "data", "latent", "retrieval"},
    "priors": {"retrieval", "diffusion"},
    "module": MODULE,
    "training": {"module", "priors", "training_report", "responses", "data", "seeds", "storage", *MODULE},
    "transfer": {"module", "data"},
    "saving": {"module", "data", "training_report", "storage"},
    "prediction": {"module", "priors", "data", "retrieval", "diffusion", "counts", "seeds", "storage"},
    "evaluation": {"data", "seeds"},
    "reporting": {"evaluation", "data", "seeds", "storage"},
    "datasets": {"data", "seeds"},
    "features": {"data"},
    "model": MODEL,
    "cli": {PACKAGE, "evaluation", "reporting", "datasets", "features", "model", *MODEL},
    "__main__": {"cli"},
    # the door of the house, which says where its names are found
    PACKAGE: {"data", "evaluation", "reporting", "datasets", "features", "model", "prediction"},
}
"""Room or single file at the top of the package -> what it may import."""

MAX_LINES = 350
LONG = {"model": "the class that users know has the signature and the documentation of every one of its methods"}
"""Module -> why it may have more lines."""


def name_of(path: Path) -> str:
    """Dotted name of a module or package."""
    parts = path.relative_to(SOURCE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = {name_of(path): path for path in sorted((SOURCE / PACKAGE).rglob("*.py"))}


def room(module: str) -> str:
    return module.split(".")[1] if "." in module else module


def imported(tree: ast.AST) -> Iterator[str]:
    """Our modules that a file imports anywhere: also in functions and for type checkers only."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            # `from package import x` may name a module of the package or something in its door
            whole = [f"{node.module}.{alias.name}" for alias in node.names]
            names = [name if name in FILES else str(node.module) for name in whole]
        else:
            continue
        yield from (name for name in names if name.split(".")[0] == PACKAGE)


IMPORTS = {name: set(imported(ast.parse(path.read_text(encoding="utf-8")))) for name, path in FILES.items()}
PAIRS = [(name, used) for name, all_used in IMPORTS.items() for used in sorted(all_used)]


def inside(module: str, package: str) -> bool:
    return module == package or module.startswith(f"{package}.")


def test_the_source_is_read() -> None:
    assert {"scperturbdiff", "scperturbdiff.model", "scperturbdiff.data", "scperturbdiff.data._counts"} <= set(FILES)
    tree = ast.parse(
        "def f():\n    from scperturbdiff.data import _counts, N_CELLS\n    import scperturbdiff.seeds, os"
    )
    assert set(imported(tree)) == {"scperturbdiff.data._counts", "scperturbdiff.data", "scperturbdiff.seeds"}


def test_what_is_imported_exists() -> None:
    assert [pair for pair in PAIRS if pair[1] not in FILES] == []


def test_rooms_are_entered_through_the_door() -> None:
    """`_private` modules are known to their own package alone, which in turn does not go out and in again."""
    wrong = []
    for name, used in PAIRS:
        parts = used.split(".")
        hidden = [".".join(parts[:i]) for i in range(1, len(parts)) if parts[i].startswith("_")]
        if not all(inside(name, package) for package in hidden):
            wrong.append(f"{name} imports {used}")
        if used != PACKAGE and name != used and inside(name, used):
            wrong.append(f"{name} imports {used}")
    assert not wrong, "\n".join(wrong)


def test_rooms_use_only_what_is_below_them() -> None:
    assert {room(name) for name in FILES} == set(USES)
    wrong = [
        f"{name} imports {used}" for name, used in PAIRS if room(used) not in {room(name), *GROUND, *USES[room(name)]}
    ]
    assert not wrong, "\n".join(wrong)


def test_no_file_imports_itself_in_a_circle() -> None:
    try:
        TopologicalSorter(IMPORTS).prepare()
    except CycleError as error:
        pytest.fail(" <- ".join(error.args[1]))


def test_rules_of_rooms_have_no_circle() -> None:
    TopologicalSorter(USES).prepare()


def test_files_are_short() -> None:
    lines = {
        name.removeprefix(f"{PACKAGE}."): len(path.read_text(encoding="utf-8").splitlines())
        for name, path in FILES.items()
    }
    assert {name: n for name, n in lines.items() if n > MAX_LINES and name not in LONG} == {}
    assert [name for name in LONG if lines[name] <= MAX_LINES] == [], "no exception is needed any more"
