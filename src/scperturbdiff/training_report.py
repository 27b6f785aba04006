"""The report of a training: what was held out, what each part of the model contributes, where evidence is thin."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import pandas as pd

if TYPE_CHECKING:
    from collections.abc import Mapping


@dataclass(frozen=True)
class TrainingReport:
    """What training found, saved with the model as ``model.report_``.

    ``print(model)`` shows the main lines of it, :meth:`to_frame` all.

    Attributes
    ----------
    n_populations, n_conditions, n_contexts
        What retrieval learned from: populations, and the conditions (perturbation, dose, context) and contexts of them.
    n_replicated
        Conditions with several populations.
    replicate_directions
        Directions in which replicates differ by more than the sampling of cells; 0 where draws agree.
    retrieval
        For each way in which a condition can be new (`"replicate"`, `"pair"`, `"context"`, `"perturbation"`): the share
        of the shifts that retrieval explains when training conditions are left out in that way, their sampling noise
        taken off both. 1 is all, 0 no better than no change, NaN where nothing can be left out.
    n_states
        States of cells that populations are predicted as mixtures of.
    fold_weight
        For each way in which a condition can be new: how far predicted counts follow fold changes of genes rather than
        the decoded shift, as far from what is known as conditions left out were. 1 where nothing could be left out.
    hardly_respond
        For each way in which a condition can be new, and for `"seen"` ones: the share of cells that are predicted to
        respond hardly, less than a quarter as much as cells do on average. Empty where all cells respond alike.
    held_out
        Populations that were held out of training the network, by the way in which they were new.
    network_weight
        Weight with which the network is used in predictions, in [0, 1].
    network_reason
        Why.
    network
        Scores on held-out conditions: how many (`n_held_out`), mean relative `change` of their energy distance by the
        network, energy distance of generated to real cells `without_network` and `with_network`.
    little_evidence
        Training conditions with less than 20 cells or without controls that match on every key.
    notes
        What else a reader should know.
    settings
        Constants that were used, by room.
    """

    n_populations: int = 0
    n_conditions: int = 0
    n_contexts: int = 0
    n_replicated: int = 0
    replicate_directions: int = 0
    retrieval: Mapping[str, float] = field(default_factory=dict)
    n_states: int = 1
    fold_weight: Mapping[str, float] = field(default_factory=dict)
    hardly_respond: Mapping[str, float] = field(default_factory=dict)
    held_out: Mapping[str, int] = field(default_factory=dict)
    network_weight: float = 0.0
    network_reason: str = ""
    network: Mapping[str, Any] = field(default_factory=dict)
    little_evidence: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    settings: Mapping[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        shares = {way: round(share, 2) + 0.0 for way, share in self.retrieval.items() if share == share}  # never -0%
        uneven = ", ".join(f"{share:.0%} hardly ({way})" for way, share in self.hardly_respond.items())
        explained = ", ".join(f"{share:.0%} of a new {way}" for way, share in shares.items())
        retrieval = f"explains {explained} when left out" if explained else "nothing could be left out"
        return (
            f"Retrieval from {self.n_populations} populations of {self.n_conditions} conditions in {self.n_contexts} "
            f"contexts, {self.n_states} state{'s' * (self.n_states > 1)} of cells: {retrieval}.\n"
            + (f"Cells respond unevenly: {uneven}.\n" if uneven else "")
            + f"Network weight {self.network_weight:g}. {self.network_reason}"
        )

    def to_frame(self) -> pd.DataFrame:
        """All of it, one row a statement: `part`, `what` and `value` as text."""
        rows: list[tuple[str, str, Any]] = [
            ("data", "populations", self.n_populations),
            ("data", "conditions", self.n_conditions),
            ("data", "contexts", self.n_contexts),
            ("data", "conditions with replicates", self.n_replicated),
            ("data", "directions in which replicates differ", self.replicate_directions),
            *(("retrieval", f"share of shifts explained, new {way}", share) for way, share in self.retrieval.items()),
            ("retrieval", "states of cells", self.n_states),
            *(("retrieval", f"weight of fold changes, new {way}", w) for way, w in self.fold_weight.items()),
            *(("retrieval", f"cells that hardly respond, {way}", share) for way, share in self.hardly_respond.items()),
            *(("held out", f"populations new as {way}", n) for way, n in self.held_out.items()),
            ("network", "weight", self.network_weight),
            ("network", "reason", self.network_reason),
            *(("network", name.replace("_", " "), value) for name, value in self.network.items()),
            *(("little evidence", "condition", name) for name in self.little_evidence),
            *(("notes", "", note) for note in self.notes),
            *(
                ("settings", f"{room}.{name}", value)
                for room, values in self.settings.items()
                for name, value in values.items()
            ),
        ]
        table = pd.DataFrame(rows, columns=["part", "what", "value"])
        table["value"] = [f"{v:.4g}" if isinstance(v, float) else str(v) for v in table["value"]]
        return table

    def summary(self) -> dict[str, Any]:
        """Plain values for ``uns`` of predicted cells and for tables of benchmarks."""
        return {
            "n_populations": self.n_populations,
            "network_weight": self.network_weight,
            "network_reason": self.network_reason,
            "n_states": self.n_states,
            "fold_weight": {way: float(weight) for way, weight in self.fold_weight.items()},
            "hardly_respond": {way: float(share) for way, share in self.hardly_respond.items()},
            "retrieval_explained": {way: float(share) for way, share in self.retrieval.items()},
            "text": str(self),
        }
