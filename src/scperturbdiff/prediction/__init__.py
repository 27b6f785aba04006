"""Prediction: from a request to cells."""

from scperturbdiff.prediction._cells import predict_cells
from scperturbdiff.prediction._encode import encode_cells
from scperturbdiff.prediction._expression import decode_cells
from scperturbdiff.prediction._generate import PopulationGenerator
from scperturbdiff.prediction._genes import response_table
from scperturbdiff.prediction._novelty import perturbation_novelty, perturbation_representation
from scperturbdiff.prediction._pieces import Settings
from scperturbdiff.prediction._prepared import PreparedRequest, prepare
from scperturbdiff.prediction._summary import PopulationSummary, summarize_populations

__all__ = [
    "PopulationGenerator", "PopulationSummary", "PreparedRequest", "Settings", "decode_cells", "encode_cells",
    "perturbation_novelty", "perturbation_representation", "predict_cells", "prepare", "response_table",
    "summarize_populations",
]  # fmt: skip
