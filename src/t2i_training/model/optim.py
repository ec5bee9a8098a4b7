"""The optimizer, and the learning rate as a function of the number of updates made."""

from collections.abc import Callable

import torch

from ..errors import RunError
from ..log import logger


def trainable_parameters(module: torch.nn.Module) -> list[torch.nn.Parameter]:
    """The parameters to train, as a list. Call it again after `prepare`, which may replace them."""
    return [parameter for parameter in module.parameters() if parameter.requires_grad]


def make_optimizer(args, parameters: list):
    """AdamW over `parameters`: 8-bit with --use_8bit_adam, else torch's, fused.

    The loop sets its learning rate before each update, from `make_rate`.
    """
    options = {
        "lr": args.learning_rate,
        "betas": (args.adam_beta1, args.adam_beta2),
        "weight_decay": args.adam_weight_decay,
        "eps": args.adam_epsilon,
    }
    if args.use_8bit_adam:
        import bitsandbytes

        return bitsandbytes.optim.AdamW8bit(parameters, **options)
    return torch.optim.AdamW(parameters, fused=True, **options)


def make_rate(args, num_updates: int, scale: float = 1.0) -> Callable[[int], float]:
    """rate(step): the learning rate of the update that follows `step` updates, in a run of `num_updates`.

    It is --learning_rate times `scale` times the factor of diffusers' schedule --lr_scheduler, which is a function of
    the step. So it depends neither on processes nor on accumulation, and no state has to be restored. Exits if the
    schedule does not allow this rate.
    """
    from diffusers.optimization import get_scheduler

    name, _, rules = args.lr_scheduler.partition(":")
    if args.lr_warmup_steps >= num_updates and name not in ("constant", "piecewise_constant"):
        logger.warning(f"the run's {num_updates} updates are all warm-up: --lr_warmup_steps {args.lr_warmup_steps}")
    if name == "polynomial" and num_updates == args.lr_warmup_steps:
        num_updates += 1  # diffusers divides by the number of updates after the warm-up
    highest = args.learning_rate * scale
    try:
        schedule = get_scheduler(
            name,
            optimizer=torch.optim.SGD([torch.zeros(())], lr=highest),  # get_scheduler reads its learning rate
            num_warmup_steps=args.lr_warmup_steps,
            num_training_steps=num_updates,
            step_rules=rules or None,
        )
    except ValueError as error:  # e.g. polynomial ends at 1e-7, which the rate must exceed
        raise RunError(f"--lr_scheduler {name}: {error}") from error
    (factor,) = schedule.lr_lambdas
    return lambda step: highest * factor(step)
