"""How strongly doses act: learned from training populations, used for doses nobody measured."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.retrieval.screens import responses

from scperturbdiff.retrieval import Conditions, Retrieval, RetrievalSettings
from scperturbdiff.retrieval._doses import DoseStrength

D, N_DRUGS, NOISE = 8, 6, 0.02
DOSES = np.array([-4.0, -2.0, 0.0, 2.0, 4.0])


def strength(dose: np.ndarray) -> np.ndarray:
    """A response that rises from 0 to 1 over the doses."""
    return 1 / (1 + np.exp(-dose))


def screen(drug: np.ndarray, dose: np.ndarray, noise: float = NOISE, seed: int = 0) -> tuple[Conditions, np.ndarray]:
    """Populations of one context, and their mean shifts: the drug's direction times the strength of the dose."""
    rng = np.random.default_rng(seed)
    directions = np.random.default_rng(99).normal(size=(N_DRUGS, D)) * (1 + np.arange(N_DRUGS))[:, None]
    n = len(drug)
    conditions = Conditions(np.zeros((n, 2)), drug[:, None], dose[:, None], np.zeros(n, np.int64), np.full(n, noise))
    shifts = directions[drug] * strength(dose)[:, None] + noise**0.5 * rng.normal(size=(n, D))
    return conditions, shifts


def every_dose(doses: np.ndarray = DOSES) -> tuple[np.ndarray, np.ndarray]:
    return np.repeat(np.arange(N_DRUGS), len(doses)), np.tile(doses, N_DRUGS)


def test_strengths_are_found() -> None:
    found = DoseStrength.of(*screen(*every_dose()))
    np.testing.assert_array_equal(found.doses, DOSES)
    wanted = strength(DOSES) / np.sqrt((strength(DOSES) ** 2).mean())
    np.testing.assert_allclose(found.strength, wanted, rtol=0.15, atol=0.15)
    between, beyond = found(np.array([1.0, 9.0]))
    assert found.strength[2] < between < found.strength[3] and beyond == found.strength[-1]


def test_a_strong_drug_at_low_doses_does_not_make_them_look_strong() -> None:
    """The weaker half of the drugs is given at the upper doses, the stronger half at the lower ones."""
    drug, dose = every_dose()
    kept = np.where(drug < N_DRUGS // 2, dose >= 0, dose <= 0)
    conditions, shifts = screen(drug[kept], dose[kept], noise=1e-4)
    length = [np.sqrt((shifts[conditions.dose[:, 0] == d] ** 2).mean()) for d in DOSES]
    found = DoseStrength.of(conditions, shifts).strength
    right = strength(DOSES)[1] / strength(DOSES)[3]
    assert length[1] / length[3] > 2.5 * right  # what averages over drugs say
    assert found[1] / found[3] < 1.5 * right


def test_without_doses_or_responses_all_act_alike() -> None:
    drug, dose = every_dose()
    for conditions, shifts in (screen(drug, 0 * dose), (screen(drug, dose)[0], np.zeros((len(drug), D)))):
        found = DoseStrength.of(conditions, shifts)
        np.testing.assert_array_equal(found(np.array([-3.0, 0.0, 5.0])), 1.0)


@given(n=st.integers(2, 60), seed=st.integers(0, 99), most=st.integers(2, 16))
@settings(max_examples=30, deadline=None)
def test_many_doses_are_grouped(n: int, seed: int, most: int) -> None:
    rng = np.random.default_rng(seed)
    asked = screen(rng.integers(0, N_DRUGS, n), rng.uniform(-4, 4, n), seed=seed)
    found = DoseStrength.of(*asked, RetrievalSettings(max_dose_levels=most))
    assert len(found.doses) == len(found.strength) <= most
    assert (np.diff(found.doses) > 0).all() and (found.strength > 0).all() and np.isfinite(found.strength).all()


@pytest.mark.parametrize("held", [0.0, 4.0])
def test_doses_never_measured_are_predicted_at_their_strength(held: float) -> None:
    """Between the others and beyond them, where responses at low doses are hidden in noise."""
    drug, dose = every_dose(DOSES[DOSES != held])
    conditions, shifts = screen(drug, dose, noise=1.0)
    retrieval = Retrieval.fit(responses(conditions, shifts))
    asked, wanted = screen(np.arange(N_DRUGS), np.full(N_DRUGS, held), noise=1e-9)
    found = retrieval.predict(asked, "pair").shift
    again = Retrieval.from_state(retrieval.state())
    np.testing.assert_array_equal(again.predict(asked, "pair").shift, found)
    pair = replace(retrieval.widths["pair"], dose_strength=0.0)
    without = replace(retrieval, widths={**retrieval.widths, "pair": pair}).predict(asked, "pair").shift
    error, more, all_of_it = (float(np.square(x - wanted).mean()) for x in (found, without, np.zeros_like(wanted)))
    assert error < min(more, 0.2 * all_of_it)
