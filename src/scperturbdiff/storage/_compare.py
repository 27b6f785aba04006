"""What differs between two descriptions of a run: files that are left of one are of use to the same one only."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping


def changed(there: Mapping[str, Any], here: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
    """Name and both values, `None` where one has none, of all that differs.

    They are compared as texts: what is not a number differs from itself, and pairs are lists once they are read again.
    """
    pairs = {name: (there.get(name), here.get(name)) for name in {**there, **here}}
    return [(name, *pair) for name, pair in pairs.items() if json.dumps(pair[0]) != json.dumps(pair[1])]
