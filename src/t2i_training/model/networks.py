"""Networks on the device: precision, memory layout, compilation, recomputation. All in place: their names stay."""

import contextlib
import copy
import types

import torch
import torch.utils.checkpoint
from diffusers import SchedulerMixin
from torch.utils._triton import has_triton
from transformers import PreTrainedModel

from ..errors import RunError, Unfit
from ..log import logger
from ..sources import weight_files
from .optim import trainable_parameters

# What is compiled on its own under `--torch_compile=regional`: where nearly all of a UNet's or prior's arithmetic is.
# diffusers' own choice, BasicTransformerBlock, leaves out the ResNets, and of Kandinsky's decoder everything.
REGIONS = ("BasicTransformerBlock", "ResnetBlock2D", "Attention")


def standardize(pipeline, dtype: torch.dtype = torch.float32):
    """A pipeline as it was loaded: its weights whole and in `dtype`, its captions as long as its text encoder reads.

    A tokenizer that states no length, or one beyond the encoder's positions, is given theirs, for good.
    """
    tokenizer, encoder = getattr(pipeline, "tokenizer", None), getattr(pipeline, "text_encoder", None)
    if tokenizer is not None and encoder is not None:
        prior = getattr(pipeline, "prior", None)
        fit_tokenizer(tokenizer, encoder.config.max_position_embeddings, prior.config.num_embeddings if prior else None)
    for name, part in pipeline.components.items():
        if isinstance(part, torch.nn.Module):
            to_whole(part, name, dtype)
    return pipeline


def fit_tokenizer(tokenizer, positions: int, needed: int | None = None) -> None:
    """Give a tokenizer the length that its text encoder has `positions` for, where it states none, or a greater one.

    `needed` is the number of tokens that a network behind the encoder reads, no more and no fewer: Kandinsky's prior.
    """
    length = needed or min(tokenizer.model_max_length, positions)
    if length > positions:
        raise ValueError(f"the prior reads {length} tokens, and its text encoder has positions for {positions}")
    if length != tokenizer.model_max_length:
        stated = tokenizer.model_max_length
        stated = stated if stated < 1e9 else "no length"  # transformers' stand-in for none is 1e30
        logger.warning(f"the tokenizer states {stated}: captions are cut to the {length} tokens that are read")
        tokenizer.model_max_length = length
    tokenizer("", max_length=length, padding="max_length", truncation=True)  # what fails here is no caption's fault


def to_whole(network: torch.nn.Module, name: str, dtype: torch.dtype) -> torch.nn.Module:
    """A network as it was loaded, in `dtype`. Unfit if its files lack a tensor, or hold one that is not finite."""
    lacking = [tensor for tensor, value in network.state_dict().items() if value.is_meta]  # as diffusers leaves them
    if isinstance(network, PreTrainedModel):
        lacking = weight_files.absent(network)
    if lacking:
        more = f" and {len(lacking) - 1} more" if lacking[1:] else ""
        raise Unfit(f"{name} has no weights for {lacking[0]}{more}, which its config.json tells of")
    for tensor, value in network.to(dtype=dtype).state_dict().items():
        # The sum is quicker by far; of great values it may be infinite.
        if value.is_floating_point() and not value.sum(dtype=torch.float32).isfinite() and not value.isfinite().all():
            raise Unfit(f"{name} holds values that are not finite, in {tensor}: its file is of no use")
    return network


def prepare_trained(network, args, accelerator):
    """The network to train, laid out for the device, and compiled if that is asked for.

    In place, by `Module.compile`: no wrapper gets into checkpoints and exports.
    """
    if args.torch_compile:
        if accelerator.device.type == "cuda" and not has_triton():
            raise RunError("--torch_compile: Triton does not work on this GPU: leave the flag out")
        # Blocks of a class share a cache, with an entry for each shape; after the default's 8 they would run eagerly.
        torch._dynamo.config.cache_size_limit = max(64, torch._dynamo.config.cache_size_limit)
        for module in [network] if args.torch_compile == "whole" else _regions(network):
            module.compile(dynamic=False)  # every batch is full: shapes that vary would cost speed for nothing
        _unshare_gradients(network)
    return channels_last(network, accelerator.device)


def _regions(module) -> list[torch.nn.Module]:
    """The outermost modules of the classes in REGIONS."""
    if type(module).__name__ in REGIONS:
        return [module]
    return [region for child in module.children() for region in _regions(child)]


def _unshare_gradients(network) -> None:
    """See to it that no two gradients share memory, where clipping, which works in place, would scale them twice.

    Inductor returns one as a view of another when the sum over the batch that would part them is of a single sample:
    those of two biases, say. Adapters, which a LoRA run adds later, have no biases.
    """
    owners = {}  # address of a gradient's memory -> the parameter that had it last

    def part(parameter):
        address = parameter.grad.untyped_storage().data_ptr()
        owner = owners.setdefault(address, parameter)
        if owner is not parameter:
            if owner.grad is not None and owner.grad.untyped_storage().data_ptr() == address:
                parameter.grad = parameter.grad.clone()
            else:
                owners[address] = parameter

    for parameter in trainable_parameters(network):
        parameter.register_post_accumulate_grad_hook(part)


def use_xformers(network) -> None:
    """Let a network attend by xFormers. It tries a kernel at once, and what that says of the device names the flag."""
    try:
        network.enable_xformers_memory_efficient_attention()
    except Exception as error:
        reason = " ".join(str(error).split())[:300]
        raise RunError(f"--enable_xformers_memory_efficient_attention: {reason}; leave it out") from error


def uncompiled():
    """A context in which compiled networks run as they are written: for shapes that training does not have."""
    return torch.compiler.set_stance("force_eager")


def channels_last(module, device: torch.device):
    """`module` with its convolutions laid out as tensor cores read them, if it has several and is for CUDA.

    CLIP's image encoder has one, at its entrance, and is left as it is.
    """
    several = sum(isinstance(part, torch.nn.Conv2d) for part in module.modules()) > 1
    return module.to(memory_format=torch.channels_last) if several and device.type == "cuda" else module


def unwrap(model, accelerator) -> torch.nn.Module:
    """The network itself, without what DDP and torch.compile put around it: its names are those of the files."""
    model = accelerator.unwrap_model(model)
    return getattr(model, "_orig_mod", model)


def inference_dtype(accelerator) -> torch.dtype:
    """What frozen networks are cast to: the mixed precision's type, from the flag or from `accelerate launch`."""
    return {"fp16": torch.float16, "bf16": torch.bfloat16}.get(accelerator.mixed_precision, torch.float32)


def prepare_frozen(module: torch.nn.Module, accelerator, exported: bool = True) -> torch.nn.Module:
    """`module` for inference: without gradients, on the device, in the mixed precision's type.

    In half precision it is a copy where the original is `exported`, by the main process, to be written unrounded.
    """
    dtype = inference_dtype(accelerator)
    if module.dtype != dtype and exported and accelerator.is_main_process:
        module = copy.deepcopy(module)
    module = module.requires_grad_(False).eval().to(accelerator.device, dtype)
    return channels_last(module, accelerator.device)


@contextlib.contextmanager
def on_device(pipeline, accelerator):
    """Lend the device to those networks of a pipeline that are kept on the CPU; nothing of the drawing stays on it."""
    networks = [part for part in pipeline.components.values() if isinstance(part, torch.nn.Module)]
    # By type: a single process's device is "cuda", and that of what lies on it "cuda:0".
    guests = [network for network in networks if network.device.type != accelerator.device.type]
    schedulers = [part for part in pipeline.components.values() if isinstance(part, SchedulerMixin)]
    unused = [dict(vars(scheduler)) for scheduler in schedulers]
    for network in guests:
        network.to(accelerator.device)
    try:
        yield
    finally:
        for network in guests:
            network.to("cpu")
        for scheduler, state in zip(schedulers, unused, strict=True):
            scheduler.__dict__ = state  # without the last drawing's timesteps and predictions
        if accelerator.device.type == "cuda":
            torch.cuda.empty_cache()  # drawing leaves blocks of sizes that training has no use for


def enable_gradient_checkpointing(blocks) -> None:
    """Gradient checkpointing for a network that diffusers gives none: each block recomputes its activations."""
    for block in blocks:
        block.forward_once, block.forward = block.forward, types.MethodType(_recompute, block)


def _recompute(block, *args, **kwargs):  # a function, and not a partial, which torch.compile would leave alone
    return torch.utils.checkpoint.checkpoint(block.forward_once, *args, use_reentrant=False, **kwargs)
