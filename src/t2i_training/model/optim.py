"""The optimizer over the trained parameters, and its learning rate as a function of the weight updates made."""

from collections.abc import Callable

import torch

from ..errors import RunError
from ..log import logger


def trainable_parameters(module: torch.nn.Module) -> list[torch.nn.Parameter]:
    """The parameters to train. A list, and to be taken again after `prepare`, which may have replaced them."""
    return [parameter for parameter in module.parameters() if parameter.requires_grad]


def make_optimizer(args, parameters: list, accelerator):
    """AdamW over `parameters`: 8-bit if asked, else torch's fused one where the device has it.

    The loop sets its learning rate before each update, to what `make_rate` gives.
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
    return torch.optim.AdamW(parameters, fused=accelerator.device.type in ("cpu", "cuda"), **options)


def make_rate(args, num_updates: int, scale: float = 1.0) -> Callable[[int], float]:
    """The learning rate of each weight update of a run of `num_updates`, by how many were made before it.

    It is diffusers' schedule --lr_scheduler, whose factor is a closed form, times --learning_rate times `scale`: so it
    depends neither on processes nor on accumulation, and there is nothing to restore. Exits on a schedule that this
    rate does not fit.
    """
    from diffusers.optimization import get_scheduler

    name, _, rules = args.lr_scheduler.partition(":")
    if args.lr_warmup_steps >= num_updates and name not in ("constant", "piecewise_constant"):
        logger.warning(f"the run's {num_updates} updates are all warm-up: --lr_warmup_steps {args.lr_warmup_steps}")
    if name == "polynomial" and num_updates == args.lr_warmup_steps:
        num_updates += 1  # it divides by the number of updates after the warm-up
    highest = args.learning_rate * scale
    try:
        schedule = get_scheduler(
            name,
            optimizer=torch.optim.SGD([torch.zeros(())], lr=highest),  # of which it reads the rate
            num_warmup_steps=args.lr_warmup_steps,
            num_training_steps=num_updates,
            step_rules=rules or None,
        )
    except ValueError as error:  # of a rate below that which polynomial ends with
        raise RunError(f"--lr_scheduler {name}: {error}") from error
    (factor,) = schedule.lr_lambdas
    return lambda step: highest * factor(step)
