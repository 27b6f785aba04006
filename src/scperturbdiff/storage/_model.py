"""The files of a saved model: JSON that says everything, and the tensors that it names.

The JSON is replaced in one step, last, and names the file of tensors that belongs to it: whatever fails, a folder holds
the old model or the new one, whole.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import secrets
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from scperturbdiff.storage._atomic import atomic_file, atomic_folder, check_space
from scperturbdiff.storage._plain import decode, encode

if TYPE_CHECKING:
    from collections.abc import Mapping
    from contextlib import AbstractContextManager

    import torch

FORMAT, VERSION = "scperturbdiff model", 1
"""What the JSON says it is, and the version of the format that is written and read."""
MODEL, PICKLE = "model.json", "model.pt"
"""Name of the JSON, and of the file of scvi-tools' own format, which older versions wrote."""
MAX_JSON = 2**28
"""Bytes of JSON, at most."""
WEIGHTS = "weights:"
"""What names of tensors of the module's state begin with."""
_ENTRIES = ("format", "version", "written_by", "tensors", "values")


@dataclass(frozen=True)
class SavedModel:
    """A model as plain values and tensors.

    Attributes
    ----------
    weights
        Tensors of the module's state.
    values
        Everything else: plain values, arrays, tables.
    written_by
        Versions of the packages it was written with.
    """

    weights: Mapping[str, torch.Tensor]
    values: dict[str, Any]
    written_by: Mapping[str, str] = field(default_factory=dict)

    def write(self, folder: Path, prefix: str = "", also: Mapping[str, Any] | None = None) -> None:
        """Write the model into a folder, new or there already; other files in it are left alone.

        Parameters
        ----------
        folder
            A new one appears when all is written.
        prefix
            What names of files begin with.
        also
            Further files: name and a function that writes one to a path.

        Raises
        ------
        TypeError
            If there is a value that cannot be kept.
        OSError
            If there is no space, or no permission.
        """
        prefix = _checked(prefix)
        tensors = {WEIGHTS + name: value.detach().cpu().contiguous() for name, value in self.weights.items()}
        values = encode(self.values, tensors, "values")
        needed = sum(tensor.nbytes for tensor in tensors.values())
        place: AbstractContextManager[Path] = nullcontext(folder) if folder.is_dir() else atomic_folder(folder)
        with place as inside:
            check_space(inside, 2 * needed)
            with ExitStack() as stack:  # they get their names when the model is written
                for name, write in (also or {}).items():
                    write(stack.enter_context(atomic_file(inside / f"{prefix}{name}", overwrite=True)))
                self._write(inside, prefix, tensors, values)

    def _write(self, folder: Path, prefix: str, tensors: dict[str, torch.Tensor], values: Any) -> None:
        token, former = secrets.token_hex(8), _former(folder, prefix)
        path = folder / _tensor_file(prefix, token)
        os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))  # ours alone
        mode = path.stat().st_mode
        try:
            save_file(tensors, path)
            path.chmod(mode)  # safetensors lets nobody else read
            entries = FORMAT, VERSION, dict(self.written_by), {"token": token, "sha256": _digest(path)}, values
            text = json.dumps(dict(zip(_ENTRIES, entries, strict=True)), allow_nan=False, indent=1)
            with atomic_file(folder / f"{prefix}{MODEL}", overwrite=True) as target:
                target.write_text(text, encoding="utf-8")
        except BaseException:
            path.unlink(missing_ok=True)
            raise
        for name in (former, f"{prefix}{PICKLE}"):
            if name is not None:
                (folder / name).unlink(missing_ok=True)

    @classmethod
    def read(cls, folder: Path, prefix: str = "") -> SavedModel:
        """What :meth:`write` wrote.

        Raises
        ------
        FileNotFoundError
            If the folder holds no such model.
        ValueError
            If a file is damaged, of another format, or not what this class writes.
        """
        path = folder / f"{_checked(prefix)}{MODEL}"
        for attempt in range(2):
            said = _read_json(path)
            try:
                tensors = _read_tensors(folder, prefix, said["tensors"])
                break
            except FileNotFoundError:
                if attempt:  # replaced while it was read: once is enough
                    raise ValueError(f"{str(path)!r} names a file of tensors that is not there.") from None
        try:
            values = decode(said["values"], tensors)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{str(path)!r} cannot be read: {error}") from None
        if not isinstance(values, dict):
            raise ValueError(f"{str(path)!r} is damaged: its values must be a dictionary.")
        weights = {name.removeprefix(WEIGHTS): t for name, t in tensors.items() if name.startswith(WEIGHTS)}
        return cls(weights, values, said["written_by"])


def find_model(folder: str | os.PathLike[str], prefix: str | None = None) -> bool:
    """Whether a folder holds a model in this format; `False`: in scvi-tools' own, which only pickle reads.

    Raises
    ------
    FileNotFoundError
        If there is neither.
    """
    names = [f"{_checked(prefix or '')}{name}" for name in (MODEL, PICKLE)]
    found = [(Path(folder) / name).is_file() for name in names]
    if not any(found):
        raise FileNotFoundError(f"{str(folder)!r} is not the folder of a saved model: it has no {names[0]}.")
    return found[0]


def _checked(prefix: str) -> str:
    if Path(f"{prefix}x").name != f"{prefix}x" or "\0" in prefix:
        raise ValueError(f"prefix={prefix!r} must be the beginning of a file's name, without a folder.")
    return prefix


def _tensor_file(prefix: str, token: str) -> str:
    return f"{prefix}model.{token}.safetensors"


def _former(folder: Path, prefix: str) -> str | None:
    """File of tensors of the model that is in the folder now, if any can be read."""
    try:
        return _tensor_file(prefix, _read_json(folder / f"{prefix}{MODEL}")["tensors"]["token"])
    except (OSError, ValueError):
        return None


def _read_json(path: Path) -> dict[str, Any]:
    try:
        if path.stat().st_size > MAX_JSON:
            raise ValueError(f"it has more than {MAX_JSON:,} bytes")
        said = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # JSON and Unicode errors are ValueErrors
        raise ValueError(f"{str(path)!r} is no saved model: {str(error)[:200]}") from None
    if not isinstance(said, dict) or said.get("format") != FORMAT:
        raise ValueError(f"{str(path)!r} is no saved model: it does not say that its format is {FORMAT!r}.")
    if said.get("version") != VERSION:
        raise ValueError(
            f"{str(path)!r} has version {str(said.get('version'))[:20]} of the format; this version of scperturbdiff "
            f"reads {VERSION}."
        )
    where = said.get("tensors")
    token, digest = (where.get("token"), where.get("sha256")) if isinstance(where, dict) else (None, None)
    if not _is_hex(token, 16) or not _is_hex(digest, 64) or set(said) != set(_ENTRIES):
        raise ValueError(f"{str(path)!r} is damaged: it must have {', '.join(_ENTRIES)}, and name its tensors.")
    return said


def _is_hex(text: object, length: int) -> bool:
    return isinstance(text, str) and re.fullmatch(f"[0-9a-f]{{{length}}}", text) is not None


def _read_tensors(folder: Path, prefix: str, where: Mapping[str, str]) -> dict[str, torch.Tensor]:
    path = folder / _tensor_file(prefix, where["token"])
    if _digest(path) != where["sha256"]:
        raise ValueError(f"{str(path)!r} is damaged: it is not the file that was saved.")
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            # in memory of their own, aligned as those of training: products round by it
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}
    except SafetensorError as error:
        raise ValueError(f"{str(path)!r} is no file of tensors: {str(error)[:200]}") from None
    for name, tensor in tensors.items():
        if name.startswith(WEIGHTS) and tensor.is_floating_point() and not bool(tensor.isfinite().all()):
            raise ValueError(
                f"{str(path)!r} is damaged: {name.removeprefix(WEIGHTS)} holds numbers that are not finite."
            )
    return tensors


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
