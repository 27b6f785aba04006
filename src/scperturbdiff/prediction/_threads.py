"""Threads of linear algebra while cells are generated."""

from __future__ import annotations

from typing import TYPE_CHECKING

from threadpoolctl import ThreadpoolController

if TYPE_CHECKING:
    from contextlib import AbstractContextManager


def one_blas_thread() -> AbstractContextManager[object]:
    """NumPy's BLAS has one thread inside.

    Systems of retrieval are small. Several threads wait for each other there and, spinning, take the cores from those
    of torch: with two, prediction took twice as long as with one.
    """
    limited: AbstractContextManager[object] = ThreadpoolController().limit(limits=1, user_api="blas")
    return limited
