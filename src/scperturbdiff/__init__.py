"""Predict how populations of single cells respond to a perturbation.

Names are imported when they are first used: `import scperturbdiff` alone, and the command's `--help`, take no time.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from scperturbdiff import datasets, features
    from scperturbdiff.data import open_store
    from scperturbdiff.evaluation import adapters, baselines, evaluate, metrics, pl, splits, summarize_evaluation
    from scperturbdiff.model import PerturbDiff
    from scperturbdiff.prediction import summarize_populations
    from scperturbdiff.reporting import report

    __version__: str
else:
    # name -> the module of this package that it is, or is found in
    _HOMES = {
        "PerturbDiff": "model",
        "adapters": "evaluation",
        "baselines": "evaluation",
        "datasets": "datasets",
        "evaluate": "evaluation",
        "features": "features",
        "metrics": "evaluation",
        "open_store": "data",
        "pl": "evaluation",
        "report": "reporting",
        "splits": "evaluation",
        "summarize_evaluation": "evaluation",
        "summarize_populations": "prediction",
    }

    def __getattr__(name: str) -> Any:
        from importlib import import_module, metadata

        if name == "__version__":
            value = metadata.version("scperturbdiff")
        elif name in _HOMES:
            home = import_module(f"scperturbdiff.{_HOMES[name]}")
            value = home if _HOMES[name] == name else getattr(home, name)
        else:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        globals()[name] = value
        return value

    def __dir__() -> list[str]:
        return sorted([*__all__, "__version__"])


__all__ = [
    "PerturbDiff",
    "adapters",
    "baselines",
    "datasets",
    "evaluate",
    "features",
    "metrics",
    "open_store",
    "pl",
    "report",
    "splits",
    "summarize_evaluation",
    "summarize_populations",
]
