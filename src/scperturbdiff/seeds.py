"""Seeds that depend on what is drawn, not on the order in which it is drawn."""

from __future__ import annotations

from contextlib import contextmanager
from hashlib import blake2b
from typing import TYPE_CHECKING

import torch
from scvi import settings

from scperturbdiff.arguments import check_int

if TYPE_CHECKING:
    from collections.abc import Iterator


def check_seed(seed: int) -> int:
    """A whole number that files can hold."""
    return check_int("seed", seed, 0, 2**63 - 1)


def resolve_seed(seed: int | None) -> int:
    """`seed` itself, or `scvi.settings.seed` when that is set, or one drawn from torch's global state."""
    if seed is None:
        seed = settings.seed
    return int(torch.randint(0, 2**62, ()).item()) if seed is None else check_seed(seed)


def derive_seed(seed: int, *names: object) -> int:
    """A seed for the thing called `names`, independent of what else is drawn in the same call.

    Hashing the names (BLAKE2b) is what makes the prediction for one context the same cells whether or not other
    contexts are in the call.
    """
    text = "\x1f".join(str(part) for part in (seed, *names))
    return int.from_bytes(blake2b(text.encode(), digest_size=8).digest(), "little") >> 1


def stream(seed: int, device: torch.device | str = "cpu") -> torch.Generator:
    """A generator of its own, with the numbers of :func:`seeded`: what other threads draw does not change them."""
    return torch.Generator(device).manual_seed(seed)


@contextmanager
def seeded(seed: int, device: torch.device | str = "cpu") -> Iterator[None]:
    """Run a block with torch's generators seeded, then put their state back.

    These are the same for all threads: what may run in several draws from a :func:`stream`.
    """
    device = torch.device(device)
    devices = [device] if device.type == "cuda" else []
    if not devices and torch.cuda.is_available() and torch.cuda.is_initialized():  # all of them are seeded
        devices = [torch.device("cuda", i) for i in range(torch.cuda.device_count())]
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        yield
