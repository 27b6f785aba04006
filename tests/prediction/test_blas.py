"""Threads of linear algebra in prediction."""

from __future__ import annotations

from typing import TYPE_CHECKING

from threadpoolctl import ThreadpoolController, threadpool_limits

from scperturbdiff.prediction import _cells

if TYPE_CHECKING:
    import pytest

    from scperturbdiff import PerturbDiff


def blas_threads() -> list[int]:
    return [lib["num_threads"] for lib in ThreadpoolController().select(user_api="blas").info()]


def test_blas_has_one_thread_while_cells_are_generated_and_as_many_as_before_afterwards(
    trained_model: PerturbDiff, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    alone = _cells._predict_alone
    monkeypatch.setattr(_cells, "_predict_alone", lambda *args: (seen.extend(blas_threads()), alone(*args))[1])
    with threadpool_limits(2, user_api="blas"):
        trained_model.predict(perturbations=["P01"], n_cells=4, seed=0, progress=False)
        assert set(blas_threads()) == {2}
    assert set(seen) == {1}
