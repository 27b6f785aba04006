"""What a clear error is: raised by this package on purpose, short, and naming what is wrong."""

from __future__ import annotations

import dis
import re
from dataclasses import dataclass
from inspect import signature as signature_of
from pathlib import Path
from typing import TYPE_CHECKING

from lightning.fabric.utilities.exceptions import MisconfigurationException

import scperturbdiff
from scperturbdiff import PerturbDiff

if TYPE_CHECKING:
    from types import TracebackType

PACKAGE = str(Path(scperturbdiff.__file__).parent)
NAMED: tuple[type[Exception], ...] = (KeyError, ValueError, TypeError, OSError, RuntimeError)
"""What the package may raise; the classes themselves or their children, but those of :data:`NEVER`."""
NEVER: tuple[type[Exception], ...] = (UnicodeError, RecursionError, NotImplementedError)
MAX_LENGTH = 1000
DUMPS = ("tensor(", "array([", "<object", "Parameter containing")
ARGUMENTS = {
    name
    for function in (
        PerturbDiff.__init__,
        PerturbDiff.setup_anndata,
        PerturbDiff.setup_mudata,
        PerturbDiff.train,
        PerturbDiff.predict,
        PerturbDiff.load_query_data,
        scperturbdiff.evaluate,
    )
    for name in signature_of(function).parameters
} - {"self", "control", "real", "pred"}
NAMES = re.compile(rf"['\"=\d]|\w\.\w|\b({'|'.join(sorted(ARGUMENTS))})\b")
"""A message that names something quotes it, writes `key=value`, or has a number or the name of an argument in it."""


@dataclass(frozen=True)
class Upstream:
    """An error of another package that says what is wrong well enough."""

    kind: type[BaseException]
    message: str
    """Pattern that is found in the message."""
    why: str


UPSTREAM: tuple[Upstream, ...] = (
    Upstream(
        TypeError,
        r"^(\w+\.)?\w+\(\) got an unexpected keyword argument '\w+'$",
        "Python names the argument, and the class or function that does not have it",
    ),
    Upstream(
        ValueError,
        r"^You selected an invalid accelerator name: `accelerator=.*Available names are",
        "Lightning names the argument and its value, and lists what is allowed",
    ),
    Upstream(
        MisconfigurationException,
        r"^`Trainer\(devices=.*\)` value is not a valid input using \w+ accelerator",
        "Lightning names the argument and its value",
    ),
    Upstream(
        TypeError,
        r"^`devices` selected with `CPUAccelerator` should be an int > 0",
        "Lightning names the argument and says what is allowed",
    ),
    Upstream(ValueError, r"^Invalid learning rate: \S+$", "PyTorch names the argument and its value"),
    Upstream(
        ValueError, r"^indices and data should have the same size", "SciPy, where rows of a damaged matrix are taken"
    ),
)
"""The one table of what others raise. Each is raised on purpose and made to happen by one of :data:`MISTAKES`."""


def raised_at(error: BaseException) -> tuple[str, str, bool]:
    """File and function of the innermost frame of an error, and whether a `raise` statement stands there."""
    trace: TracebackType | None = error.__traceback__
    if trace is None:
        return "", "", False
    while trace.tb_next is not None:
        trace = trace.tb_next
    code = trace.tb_frame.f_code
    raised = any(
        instruction.offset == trace.tb_lasti and instruction.opname == "RAISE_VARARGS"
        for instruction in dis.get_instructions(code)
    )
    return code.co_filename, code.co_name, raised


def message_of(error: BaseException) -> str:
    """What an error says (`str` of a `KeyError` would quote it)."""
    return str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)


def upstream(error: BaseException) -> Upstream | None:
    """The entry of :data:`UPSTREAM` that an error is."""
    said = message_of(error)
    return next((known for known in UPSTREAM if isinstance(error, known.kind) and re.search(known.message, said)), None)


def unclear(error: BaseException) -> str | None:
    """Why an error is not clear; `None`: it is."""
    message = message_of(error)
    if upstream(error) is not None:
        return None
    if not isinstance(error, NAMED) or isinstance(error, NEVER):
        return f"{type(error).__name__} is not one of the errors of the package"
    file, function, raised = raised_at(error)
    if not file.startswith(PACKAGE):
        return f"raised by {file} ({function}), not by the package"
    if not raised:
        return f"not raised on purpose: no raise statement in {function} of {Path(file).name}"
    if not message.strip() or not NAMES.search(message):
        return "the message names no key, value or number"
    if len(message) > MAX_LENGTH:
        return f"the message has {len(message)} characters"
    if dump := next((text for text in DUMPS if text in message), None):
        return f"the message holds {dump!r}"
    return None


def is_clear(error: BaseException) -> bool:
    """Whether an error is one a user can act on: of the package, on purpose, and naming what is wrong."""
    return unclear(error) is None


def signature(error: BaseException) -> str:
    """A text that errors with one cause share: kind, and functions of the package on the way."""
    functions, trace = [], error.__traceback__
    while trace is not None:
        code = trace.tb_frame.f_code
        if code.co_filename.startswith(PACKAGE):
            functions.append(f"{Path(code.co_filename).stem}.{code.co_name}")
        trace = trace.tb_next
    file, function, _ = raised_at(error)
    return f"{type(error).__name__} < {Path(file).name}:{function} < {' < '.join(functions[::-1][:3])}"
