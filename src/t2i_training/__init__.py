"""Mechanisms shared by the training scripts: everything around a run, nothing of what a run optimises.

Each folder is a room with a subject; the modules beside them are the ground that all rooms stand on. Which room may
import from which is held by tests/test_rooms.py. Importing the package, `cli` or `sources` costs no torch: `--help` and
usage errors come at once.
"""

__version__ = "0.1.0"
