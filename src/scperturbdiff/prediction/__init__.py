"""From control cells and wanted perturbations to predicted cells."""

from scperturbdiff.prediction.generate import PopulationGenerator, Settings, encode_rows
from scperturbdiff.prediction.predict import Prediction, predict_cells, prepare

__all__ = ["PopulationGenerator", "Prediction", "Settings", "encode_rows", "predict_cells", "prepare"]
