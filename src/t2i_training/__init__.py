"""Mechanisms shared by the training scripts: everything around a run, nothing of what a run optimises.

Importing the package, and `t2i_training.cli`, costs no torch: `--help` and usage errors come at once.
"""

__version__ = "0.1.0"
