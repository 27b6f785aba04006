"""Processes that predict together: they meet, and none waits for one that has failed."""

from __future__ import annotations

import os
import time
from datetime import timedelta
from functools import cache
from itertools import count
from threading import Condition, Thread
from typing import TYPE_CHECKING, Any, NamedTuple, Self

import torch.distributed as dist

if TYPE_CHECKING:
    from types import TracebackType

LIMIT = 300.0
"""Seconds that processes wait for one that does not come or is silent. One that ended is noticed at once."""
ROUND = 0.2
"""Seconds between rounds in which processes hear of each other."""

_calls = count()


class Post(NamedTuple):
    """What a process tells the others in every round: at which meeting it is, with what, and how it ended."""

    meeting: int = 0
    value: Any = None
    failed: str | None = None
    is_last: bool = False


class Team:
    """The processes of one call, each of which enters this context.

    A thread of each process tells the others every moment where it is. So a process that fails, or is killed, ends the
    others when they next :meth:`check` or meet, and nobody waits longer than :data:`LIMIT` for a sign of life. How long
    a process works is not limited.

    Parameters
    ----------
    rank, size
        Number of this process, and of all.
    """

    def __init__(self, rank: int, size: int) -> None:
        if not 0 <= rank < size:
            raise ValueError(f"RANK={rank} must be from 0 to WORLD_SIZE - 1 = {size - 1}.")
        self.rank, self.size = rank, size
        self._changed = Condition()
        self._post, self._met, self._values = Post(), 0, [None] * size
        self._trouble: str | None = None

    @classmethod
    def launched(cls) -> Team | None:
        """The processes that this one was started with: by its own `torch.distributed`, or by `torchrun`."""
        if dist.is_available() and dist.is_initialized():
            return cls(dist.get_rank(), dist.get_world_size())
        if "RANK" in os.environ and "WORLD_SIZE" in os.environ:
            return cls(int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]))
        return None

    def __enter__(self) -> Self:
        if self.size > 1:
            self._own_group = not dist.is_initialized()
            try:
                if self._own_group:
                    _start()
                # its own, on CPUs: other work of the processes may use the default one meanwhile
                self._group = dist.new_group(backend="gloo", timeout=timedelta(seconds=LIMIT))
            except RuntimeError as error:
                raise ConnectionError(
                    f"Process {self.rank} of {self.size} did not meet the others within {LIMIT:.0f} s: {error}"
                ) from error
            self._thread = Thread(target=self._listen, daemon=True)
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.size == 1:
            return
        with self._changed:
            failed = None if kind is None else f"{kind.__name__}: {error}"
            self._post = Post(self._post.meeting, None, failed, is_last=True)
        self._thread.join()
        dist.destroy_process_group(self._group)
        if self._own_group:
            dist.destroy_process_group()
        if kind is None:
            self.check()

    def check(self) -> None:
        """Raise a `ConnectionError` if another process has failed or is gone."""
        if self._trouble is not None:
            raise ConnectionError(self._trouble)

    def gather(self, value: Any = None) -> list[Any]:
        """Wait until all processes are here; what each of them brought."""
        if self.size == 1:
            return [value]
        with self._changed:
            meeting = self._post.meeting + 1
            self._post = Post(meeting, value)
            while self._met < meeting:
                self.check()
                self._changed.wait()
            return self._values

    def share(self, value: Any) -> Any:
        """Wait until all processes are here; what process 0 brought."""
        return self.gather(value if self.rank == 0 else None)[0]

    def _listen(self) -> None:
        """Tell and hear, until all have ended or one has failed."""
        while True:
            posts: list[Any] = [None] * self.size
            trouble = None
            try:
                dist.all_gather_object(posts, self._post, group=self._group)
            except Exception as error:  # noqa: BLE001 (whatever it is, nobody may wait for ever)
                trouble = f"Another process is gone, so process {self.rank} of {self.size} ends: {error}"
            else:
                for rank, post in enumerate(posts):
                    if post.failed is not None and trouble is None:
                        trouble = f"Process {rank} of {self.size} failed, so all end. {post.failed}"
            with self._changed:
                self._trouble = trouble
                # nobody is further than one meeting ahead: the next one begins when all were at this one
                if trouble is None and min(post.meeting for post in posts) > self._met:
                    self._met, self._values = self._met + 1, [post.value for post in posts]
                self._changed.notify_all()
            if trouble is not None or all(post.is_last for post in posts):
                return
            time.sleep(ROUND)


@cache
def _meeting_place() -> Any:
    """Where `torchrun` says that processes find each other, for the rest of this process."""
    return next(dist.rendezvous("env://", timeout=timedelta(seconds=LIMIT)))[0]  # type: ignore[attr-defined]


def _start() -> None:
    """Begin `torch.distributed` as `torchrun` says."""
    # a name of its own each time: what earlier calls left in the store is theirs
    store = dist.PrefixStore(f"scperturbdiff/{next(_calls)}", _meeting_place())  # type: ignore[attr-defined]
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=timedelta(seconds=LIMIT))
