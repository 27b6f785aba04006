"""The command `scperturbdiff`: h5ad in, h5ad out."""

from scperturbdiff.cli._main import main

__all__ = ["main"]
