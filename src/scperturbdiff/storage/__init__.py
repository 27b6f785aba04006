"""Files: what a saved model is made of, and writing that leaves the old file whole when it fails."""

from scperturbdiff.storage._atomic import atomic_file, atomic_folder, check_space, check_writable
from scperturbdiff.storage._classes import build, from_state, to_state
from scperturbdiff.storage._compare import changed
from scperturbdiff.storage._device import choose_device
from scperturbdiff.storage._inspect import check_h5ad
from scperturbdiff.storage._model import MODEL, PICKLE, SavedModel, find_model
from scperturbdiff.storage._plain import check_kept

__all__ = [
    "MODEL",
    "PICKLE",
    "SavedModel",
    "atomic_file",
    "atomic_folder",
    "build",
    "changed",
    "check_h5ad",
    "check_kept",
    "check_space",
    "check_writable",
    "choose_device",
    "find_model",
    "from_state",
    "to_state",
]
