"""Files: what a saved model is made of, and writing that leaves the old file whole when it fails."""

from scperturbdiff.storage._atomic import atomic_file, atomic_folder, check_space, check_writable

__all__ = ["atomic_file", "atomic_folder", "check_space", "check_writable"]
