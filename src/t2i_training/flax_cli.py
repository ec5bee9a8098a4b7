"""The flags of the Flax script alone. Nothing heavier than argparse is imported."""

import argparse
import importlib.util

from . import checks

PACKAGES = ("jax", "flax", "optax")


def add_flax_args(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("Flax")
    group.add_argument(
        "--from_pt", action="store_true", help="Insist on PyTorch's weight files; by default whichever are there."
    )
    group.add_argument(
        "--shard_parameters", action="store_true", help="Spread weights, moments and average over a host's devices."
    )
    group.add_argument(
        "--gradient_checkpointing", action="store_true", help="Recompute activations: less memory, slower."
    )
    parser.set_defaults(seed=checks.DefaultSeed(0), mixed_precision="no")  # as the published Flax script has them


def need_packages(parser: argparse.ArgumentParser) -> None:
    """Exit with one line where JAX is not installed: it comes with requirements of its own."""
    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        parser.error(f"{', '.join(missing)} not installed: pip install -r requirements_flax.txt")
