"""The optimizer over the trained parameters, and the schedule of its learning rate, counted in weight updates."""

import warnings

import torch

from ..log import logger


def trainable(module: torch.nn.Module) -> list[torch.nn.Parameter]:
    """The parameters to train. A list, and to be taken again after `prepare`, which may have replaced them."""
    return [parameter for parameter in module.parameters() if parameter.requires_grad]


def scaled_rate(args, devices: int) -> float:
    """What --scale_lr makes of --learning_rate."""
    return args.learning_rate * args.gradient_accumulation_steps * args.train_batch_size * devices


def make_optimizer(args, parameters: list, accelerator, scale_lr: bool = False):
    """AdamW over `parameters`: 8-bit if asked, else torch's fused one where the device has it."""
    options = {
        "lr": args.learning_rate,
        "betas": (args.adam_beta1, args.adam_beta2),
        "weight_decay": args.adam_weight_decay,
        "eps": args.adam_epsilon,
    }
    if scale_lr:
        options["lr"] = scaled_rate(args, accelerator.num_processes)
    if args.use_8bit_adam:
        import bitsandbytes

        return bitsandbytes.optim.AdamW8bit(parameters, **options)
    return torch.optim.AdamW(parameters, fused=accelerator.device.type in ("cpu", "cuda"), **options)


def make_schedule(args, optimizer, num_updates: int):
    """A diffusers schedule counted in weight updates, whatever the processes and the accumulation.

    It is not handed to accelerate, which would step it once per process. Its state is the update count alone.
    """
    from diffusers.optimization import get_scheduler

    name, _, rules = args.lr_scheduler.partition(":")
    if args.lr_warmup_steps >= num_updates and name not in ("constant", "piecewise_constant"):
        logger.warning(f"the run's {num_updates} updates are all warm-up: --lr_warmup_steps {args.lr_warmup_steps}")
    if name == "polynomial" and num_updates == args.lr_warmup_steps:
        num_updates += 1  # it divides by the number of updates after the warm-up
    try:
        return get_scheduler(
            name,
            optimizer=optimizer,
            num_warmup_steps=args.lr_warmup_steps,
            num_training_steps=num_updates,
            step_rules=rules or None,
        )
    except ValueError as error:  # of a rate below that which polynomial ends with
        raise SystemExit(f"error: --lr_scheduler {name}: {error}") from error


def set_position(args, schedule, step: int, eight_bit: bool = False) -> None:
    """Put the schedule where it stands after `step` updates; exact, since diffusers' schedules are closed forms.

    Restoring an optimizer has put back the checkpoint's settings; here the flags' take their place again. Its moments
    take the memory layout of their parameters: fused AdamW goes through both as they lie, and a checkpoint written on
    CUDA (channels-last) and read on a CPU, or the other way round, would be updated with another weight's moments.
    """
    if any(("exp_avg" in state) == eight_bit for state in schedule.optimizer.state.values()):  # PyTorch's name
        was = "without" if eight_bit else "with"
        raise SystemExit(f"error: the checkpoint's optimizer ran {was} --use_8bit_adam: go on as it began, {was} it")
    for parameter, state in schedule.optimizer.state.items():
        for name, moment in state.items():
            # Of bitsandbytes' state neither the count, a plain number, nor the bytes, which are in blocks.
            is_moment = isinstance(moment, torch.Tensor) and moment.is_floating_point()
            if is_moment and moment.shape == parameter.shape and moment.stride() != parameter.stride():
                state[name] = torch.empty_like(parameter, dtype=moment.dtype).copy_(moment)
    for group in schedule.optimizer.param_groups:
        group |= {"betas": (args.adam_beta1, args.adam_beta2), "eps": args.adam_epsilon}
        group["weight_decay"] = args.adam_weight_decay
    schedule.last_epoch = step - 1
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns of a step before the optimizer's first, which is meant here
        schedule.step()
