"""Control cells are decoded once; where that is too much to keep, piece by piece, to the same cells."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tests.helpers import assert_same_cells

from scperturbdiff.module import PerturbDiffModule
from scperturbdiff.prediction import _generate

if TYPE_CHECKING:
    import pytest
    import torch
    from anndata import AnnData

    from scperturbdiff import PerturbDiff


def test_cells_are_the_same_whether_shares_are_kept(
    trained_model: PerturbDiff, screen: AnnData, monkeypatch: pytest.MonkeyPatch
) -> None:
    controls = screen[(screen.obs["perturbation"] == "control").to_numpy()].copy()
    given: list[bool] = []
    moved_counts = PerturbDiffModule.moved_counts

    def watched(self: PerturbDiffModule, *args: torch.Tensor) -> torch.Tensor:
        given.append(args[-1] is not None)
        return moved_counts(self, *args)

    monkeypatch.setattr(PerturbDiffModule, "moved_counts", watched)

    def predict() -> AnnData:
        return trained_model.predict(controls, ["P01", "P02"], n_cells=100, seed=0, progress=False)

    kept = predict()
    assert given and all(given)
    given.clear()
    monkeypatch.setattr(_generate, "KEPT_SHARES", 0)
    assert_same_cells(predict(), kept)
    assert given and not any(given)
