"""Seeds: streams that depend on what is drawn, and leave others alone."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from scperturbdiff.seeds import derive_seed, resolve_seed, seeded, stream


def test_seeds_depend_on_what_is_drawn() -> None:
    assert derive_seed(1, "A", "T") == derive_seed(1, "A", "T")
    others = {derive_seed(1, "A", "T"), derive_seed(2, "A", "T"), derive_seed(1, "T", "A"), derive_seed(1, "AT")}
    assert len(others) == 4 and all(0 <= seed < 2**63 for seed in others)


def test_seeded_blocks_leave_the_stream_alone() -> None:
    torch.manual_seed(5)
    expected = torch.randn(2)
    torch.manual_seed(5)
    with seeded(1):
        first = torch.randn(2)
    assert torch.equal(torch.randn(2), expected)
    with seeded(1):
        assert torch.equal(torch.randn(2), first)


def test_a_stream_has_the_numbers_of_a_seeded_block_and_leaves_the_global_one_alone() -> None:
    with seeded(2**62 + 3):
        expected = torch.randn(3), torch.randperm(9)
    torch.manual_seed(5)
    before, own = torch.get_rng_state(), stream(2**62 + 3)
    drawn = torch.randn(3, generator=own), torch.randperm(9, generator=own)
    assert all(torch.equal(a, b) for a, b in zip(drawn, expected, strict=True))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("seed", [-1, 2**63, 2**70, 1.5, float("nan")])
def test_seeds_that_files_cannot_hold_are_refused(seed: Any) -> None:
    with pytest.raises(ValueError, match=rf"seed={seed} must be a whole number from 0 to 9,223,372,036,854,775,807"):
        resolve_seed(seed)


@pytest.mark.parametrize("seed", [True, "1", [1]])
def test_seeds_are_numbers(seed: Any) -> None:
    with pytest.raises(TypeError, match="must be a whole number"):
        resolve_seed(seed)


def test_seed_falls_back_to_the_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    assert resolve_seed(7) == resolve_seed(np.int32(7)) == 7
    monkeypatch.setattr("scvi.settings._seed", 11)
    assert resolve_seed(None) == 11
    monkeypatch.setattr("scvi.settings._seed", None)
    assert resolve_seed(None) != resolve_seed(None)
