"""The package's door: names come when they are used, so that importing it and asking for help take no time."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest

import scperturbdiff

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
