"""The flags of the Flax script alone. Nothing heavier than argparse is imported."""

import argparse
import importlib.util

from ..cli import flags

PACKAGES = ("jax", "flax", "optax")
HELP = {
    "seed": "Random seed. Default: 0, or the checkpoint's when resuming.",
    "train_batch_size": "Samples per micro-batch and device.",
    "mixed_precision": "Precision of the arithmetic; trained weights are fp32. Default: accelerate launch's, or no.",
    "scale_lr": "Multiply the learning rate by devices x batch size x accumulation.",
}


def add_flax_args(parser: argparse.ArgumentParser) -> None:
    """To be called after the groups of `cli.flags`, of which a few flags mean or default to something else here."""
    group = parser.add_argument_group("JAX weights and memory")
    group.add_argument(
        "--from_pt", action="store_true", help="Insist on PyTorch's weight files; by default whichever are there."
    )
    group.add_argument(
        "--shard_parameters", action="store_true", help="Spread weights, moments and average over a host's devices."
    )
    flags.add_gradient_checkpointing_arg(group)
    for action in parser._actions:
        action.help = HELP.get(action.dest, action.help)
    parser.set_defaults(seed=0, mixed_precision="no")  # as the published Flax script has them


def need_packages(parser: argparse.ArgumentParser) -> None:
    """Exit with one line where JAX is not installed: it comes with requirements of its own."""
    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        parser.error(f"{', '.join(missing)} not installed: pip install -r requirements_flax.txt")
