"""What other tools return, in the form that :func:`scperturbdiff.evaluate` takes. None of the tools is imported."""

from scperturbdiff.evaluation.adapters._tools import from_cellflow, from_cpa, from_scgen, from_state

__all__ = ["from_cellflow", "from_cpa", "from_scgen", "from_state"]
