"""How many cases are tried: the profiles of hypothesis, `pytest --hypothesis-profile=NAME`."""

from __future__ import annotations

from hypothesis import HealthCheck, settings

PROFILES = {"default": 12, "ci": 40, "long": 2500}
"""Name -> whole cases, from set-up to a loaded model. On one core about half a minute, two minutes, half an hour."""


def register() -> None:
    """Make the profiles known and use the first.

    What every change must pass is the same for everyone: the cases of the first two do not vary. `long` looks for new
    ones.
    """
    slow = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.function_scoped_fixture]
    for name, n in PROFILES.items():
        varies = name == "long"
        settings.register_profile(
            name, max_examples=n, deadline=None, derandomize=not varies, print_blob=varies, suppress_health_check=slow
        )
    settings.load_profile("default")


def number(of: float) -> int:
    """So many for each case of the profile, but one at least."""
    return max(1, round(of * settings.default.max_examples))


def share(of: float) -> settings:
    """Settings for a test that tries so many cases for each of the profile's."""
    return settings(max_examples=number(of))
