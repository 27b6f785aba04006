"""From control cells and wanted perturbations to predicted cells."""

from scperturbdiff.prediction.generate import PopulationGenerator, Settings, encode_rows
from scperturbdiff.prediction.predict import predict_cells

__all__ = ["PopulationGenerator", "Settings", "encode_rows", "predict_cells"]
