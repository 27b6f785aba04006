"""From arguments to a command, and from an error to one line."""

from __future__ import annotations

import logging
import sys
import warnings
from typing import TYPE_CHECKING

from scperturbdiff.cli._parser import build_parser

if TYPE_CHECKING:
    from collections.abc import Sequence


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Parameters
    ----------
    arguments
        Words after `scperturbdiff`; `None`: those of the process.

    Returns
    -------
    The exit code: 0, or 1 after an error, which is told in one line on stderr (2 for wrong arguments, by argparse).
    """
    options = build_parser().parse_args(arguments)
    _quiet_libraries()
    try:
        options.run(options)
    except _expected_errors() as error:
        if options.traceback:
            raise
        # str() of a KeyError would quote the whole message
        message = error.args[0] if isinstance(error, KeyError) and error.args else error
        print(f"scperturbdiff {options.command}: error: {' '.join(str(message).split())}", file=sys.stderr)
        return 1
    return 0


def _expected_errors() -> tuple[type[Exception], ...]:
    """What wrong input raises; anything else is a defect and keeps its traceback."""
    lightning = sys.modules.get("lightning.fabric.utilities.exceptions")
    # an accelerator that is not there; what was not imported raised nothing
    others = () if lightning is None else (lightning.MisconfigurationException,)
    return (KeyError, ValueError, TypeError, OSError, *others)


def _quiet_libraries() -> None:
    """Leave progress and our own messages on the terminal, not the advice of the trainer."""
    warnings.filterwarnings("ignore", module=r"(lightning|pytorch_lightning)(\..*)?")
    for name in ("lightning.pytorch", "lightning.fabric", "pytorch_lightning"):
        logging.getLogger(name).setLevel(logging.ERROR)
