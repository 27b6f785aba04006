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
    The exit code: 0, or 1 after an error, which is told in one line on stderr (2 for wrong arguments, by argparse; 130
    where the user interrupts).
    """
    options = build_parser().parse_args(arguments)
    options.words = ["scperturbdiff", *(sys.argv[1:] if arguments is None else arguments)]
    _quiet_libraries()
    try:
        options.run(options)
    except (KeyboardInterrupt, SystemExit) as stop:
        # Lightning makes the second of the first
        if not isinstance(stop, KeyboardInterrupt) and not isinstance(stop.__context__, KeyboardInterrupt):
            raise
        go_on = "; go on with --resume" if getattr(options, "checkpoint", None) else ""
        print(f"scperturbdiff {options.command}: interrupted{go_on}", file=sys.stderr)
        return 130
    except _expected_errors() as error:
        if options.traceback:
            raise
        print(f"scperturbdiff {options.command}: error: {_message(error)}", file=sys.stderr)
        return 1
    return 0


def _message(error: BaseException) -> str:
    """What an error says, in one line."""
    said: object = error
    if isinstance(error, KeyError) and error.args:
        said = error.args[0]  # str() would quote the whole message
    elif isinstance(error, OSError) and error.strerror and error.filename is None:
        said = error.strerror  # str() would begin with a number
    elif isinstance(error, MemoryError):
        said = f"Not enough memory: {error}"
    return " ".join(str(said).split()).removesuffix(":") or type(error).__name__


def _expected_errors() -> tuple[type[Exception], ...]:
    """What wrong input raises; anything else is a defect and keeps its traceback."""
    lightning = sys.modules.get("lightning.fabric.utilities.exceptions")
    # an accelerator that is not there; what was not imported raised nothing
    others = () if lightning is None else (lightning.MisconfigurationException,)
    return (KeyError, ValueError, TypeError, OSError, MemoryError, *others)


def _quiet_libraries() -> None:
    """Leave progress and our own messages on the terminal, not the advice of the trainer."""
    warnings.filterwarnings("ignore", module=r"(lightning|pytorch_lightning)(\..*)?")
    for name in ("lightning.pytorch", "lightning.fabric", "pytorch_lightning"):
        logging.getLogger(name).setLevel(logging.ERROR)
