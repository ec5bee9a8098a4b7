"""The start and the end of a run: accelerator, precision, seed; exit status."""

import datetime
import logging
import os
import secrets
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState, PartialState
from accelerate.utils import (
    DistributedDataParallelKwargs,
    DistributedType,
    GradientAccumulationPlugin,
    ProjectConfiguration,
    broadcast_object_list,
    parse_flag_from_env,
)

from .. import device, distributed, log, sanitize
from ..cli import out_of_memory, packages
from ..errors import RunError
from ..log import logger
from . import missing_gpu, output_folder

# Time limit of collectives on the device; NCCL's default is ten minutes. Longer waits go over gloo (distributed.py).
# What remains is the first step: a rank compiles, counts FLOPs or starts trackers while others wait for gradients.
COLLECTIVE_LIMIT = datetime.timedelta(hours=1)


def start(args, for_jax: bool = False) -> Accelerator:
    """Accelerator, logging, lock on the output folder. Call once, before anything is loaded.

    The accelerator has the run's precision: the flag's, else that of `accelerate launch`. That `for_jax` is on the CPU
    and in full precision: both are JAX's business.
    """
    # Captions are tokenized singly, in forked workers: threads would bring nothing but warnings.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if args.local_rank != -1 and "WORLD_SIZE" in os.environ:
        os.environ.setdefault("LOCAL_RANK", str(args.local_rank))
    # A second run in one process (main() called again) may ask for another precision or accumulation.
    AcceleratorState._reset_state()
    GradientState._reset_state()
    output_dir = Path(args.output_dir)
    # If several are launched without a GPU, accelerate ignores the launcher unless it is told.
    on_cpu = for_jax or (distributed.launched() and not torch.accelerator.is_available())
    PartialState(cpu=on_cpu, timeout=COLLECTIVE_LIMIT)  # before another call creates it without these
    accelerator = _make_accelerator(args, on_cpu, "no" if for_jax else _possible_precision(args.mixed_precision))
    log.to_stderr()
    logger.setLevel(logging.INFO if accelerator.is_main_process else logging.ERROR)
    _quiet_libraries(accelerator)
    _refuse_backends(accelerator)
    if accelerator.num_processes > 1:
        distributed.init_cpu_group()
    elif alone := distributed.never_joined():
        logger.warning(alone)
    if accelerator.is_main_process:
        output_folder.lock(output_dir)
        log.open_file(args.log_file, args.hub_token)
        logger.info(_what_is_trained(args))
    distributed.barrier(accelerator)
    if args.allow_tf32:
        torch.set_float32_matmul_precision("high")  # cuDNN's convolutions are in TF32 unless told otherwise
    if not for_jax:
        _check_device(accelerator)
    packages.try_out(args, accelerator.device)
    return accelerator


def _make_accelerator(args, on_cpu: bool, precision: str | None) -> Accelerator:
    try:
        return Accelerator(
            cpu=on_cpu,
            # As a plugin: given as a number, the environment of `accelerate launch` would have the last word.
            gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=args.gradient_accumulation_steps),
            mixed_precision=precision,
            log_with=None if args.report_to == "none" else args.report_to.split(","),
            project_config=ProjectConfiguration(args.output_dir, str(Path(args.output_dir, args.logging_dir))),
            # DDP keeps no second copy of the gradients, and broadcasts no buffers: all of them are constants.
            kwargs_handlers=[DistributedDataParallelKwargs(gradient_as_bucket_view=True, broadcast_buffers=False)],
        )
    except (ValueError, RuntimeError) as error:  # e.g. fp16 on Apple's GPUs before torch 2.8
        what = f"accelerate does not start with mixed precision {precision or 'no'} on {PartialState().device.type}"
        way_out = "; take --mixed_precision=no" if precision in ("fp16", "bf16") else ""
        raise RunError(f"{what}: {sanitize.reason(error).rstrip('.')}{way_out}") from error


def _check_device(accelerator) -> None:
    """Say why it is the CPU beside a GPU. Exits with one line if it is a GPU on which this torch does not run."""
    place = accelerator.device
    if place.type == "cpu":
        if accelerator.is_main_process:
            missing_gpu.report_torch(asked=parse_flag_from_env("ACCELERATE_USE_CPU"))
        return
    device.try_out(place)
    if accelerator.mixed_precision == "bf16" and device.emulates_bf16(place):
        logger.warning(f"{device.name(place)} has no bf16 arithmetic, and torch emulates it: fp16 is faster there")


def _what_is_trained(args) -> str:
    """The first line of a log: script, models, and where the result will be."""
    models = [f"--{name}={value}" for name, value in vars(args).items() if name.startswith("pretrained_") and value]
    return f"{Path(sys.argv[0]).name} {' '.join(models)} --output_dir={args.output_dir}"


def _refuse_backends(accelerator) -> None:
    if accelerator.distributed_type == DistributedType.XLA:
        raise RunError("TPUs are not for this script: train_text_to_image_flax.py runs on them")
    if accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM):
        name = accelerator.distributed_type.value
        raise RunError(f"{name} shards the weights, which these scripts cannot save yet: use plain --multi_gpu")


def _possible_precision(wanted: str | None) -> str | None:
    """fp16 needs a GPU; without one the guides' commands still run, in full precision, and say so."""
    precision = wanted or os.environ.get("ACCELERATE_MIXED_PRECISION")
    if precision not in (None, "no", "fp16", "bf16"):  # of `accelerate config`: fp8
        raise RunError(f"accelerate is set to mixed precision {precision}: give --mixed_precision=bf16")
    if precision == "fp16" and PartialState().device.type == "cpu":
        warnings.warn("fp16 needs a GPU: training in fp32", stacklevel=3)
        return "no"
    return precision


def _quiet_libraries(accelerator):
    import datasets
    import diffusers
    import transformers

    transformers.utils.logging.set_verbosity_error()
    diffusers.utils.logging.set_verbosity(logging.CRITICAL)  # it logs an error if there are only .bin files
    for library in (transformers, diffusers):
        library.utils.logging.disable_progress_bar()
    datasets.utils.logging.set_verbosity_error()
    if not accelerator.is_main_process or not sys.stderr.isatty():
        datasets.disable_progress_bars()


def resolve_seed(args, position: dict) -> int:
    """The run's seed, equal on all processes: of the checkpoint with this manifest, else the flag's, else a new one."""
    stored = position.get("seed")
    if stored is not None and args.seed not in (None, stored) and "seed" in args.typed:
        raise RunError(f"--seed {args.seed} differs from the checkpoint's, {stored}: leave it out to continue")
    seed = [stored if stored is not None else args.seed if args.seed is not None else secrets.randbelow(2**31)]
    seed = broadcast_object_list(seed)[0]
    logger.info(f"seed {seed}")
    return seed


def run(main: Callable[[], None]) -> None:
    """Call a script's `main`. The error that ends it stands in --log_file too; of used-up memory it is one line."""
    try:
        main()
    except BaseException as error:
        if line := out_of_memory.line(error):
            ending = RunError(line)
            log.error_into_file(ending)
            raise ending from error
        log.error_into_file(error)
        raise


def release_and_exit(stop, complete: bool) -> None:
    """Unlock the output folder. If the run was stopped before it was complete, leave with status 128 + signal.

    After an error that let the step be finished, leave with that.
    """
    stop.restore_signals()
    output_folder.unlock()
    if stop.agreed and stop.failure:
        raise stop.failure
    if stop.agreed and not complete:
        logger.info("stopped; the same command with --resume_from_checkpoint=latest continues")
        raise SystemExit(128 + stop.agreed)
