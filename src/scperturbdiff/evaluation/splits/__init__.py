"""Hold out conditions of a screen, for any model: `adata[split.train]`, `adata[split.test]`."""

from scperturbdiff.evaluation.splits._hold_out import (
    hold_out_batches,
    hold_out_combinations,
    hold_out_contexts,
    hold_out_pairs,
    hold_out_perturbations,
)
from scperturbdiff.evaluation.splits._leaks import code_weights as code_weights  # for the check of evaluate()
from scperturbdiff.evaluation.splits._leaks import leak_report
from scperturbdiff.evaluation.splits._leaks import row_codes as row_codes
from scperturbdiff.evaluation.splits._split import Split

__all__ = [
    "Split",
    "hold_out_batches",
    "hold_out_combinations",
    "hold_out_contexts",
    "hold_out_pairs",
    "hold_out_perturbations",
    "leak_report",
]
