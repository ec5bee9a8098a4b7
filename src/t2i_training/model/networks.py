"""Prepares networks: precision, memory format, compilation, checkpointing. In place: parameter names do not change."""

import contextlib
import copy
import types

import torch
import torch.utils.checkpoint
from diffusers import SchedulerMixin
from transformers import PreTrainedModel

from .. import device
from ..errors import RunError, Unfit
from ..log import logger
from ..sources import weight_files
from .optim import trainable_parameters

# Compiled separately under `--torch_compile=regional`: nearly all FLOPs of a UNet or prior are in these classes.
# diffusers' own choice, BasicTransformerBlock, omits the ResNets, and in Kandinsky's decoder everything.
REGIONS = ("BasicTransformerBlock", "ResnetBlock2D", "Attention")


def standardize(pipeline, dtype: torch.dtype = torch.float32):
    """Check a loaded pipeline's weights, cast them to `dtype`, and limit its tokenizer to the encoder's positions."""
    tokenizer, encoder = getattr(pipeline, "tokenizer", None), getattr(pipeline, "text_encoder", None)
    if tokenizer is not None and encoder is not None:
        prior = getattr(pipeline, "prior", None)
        fit_tokenizer(tokenizer, encoder.config.max_position_embeddings, prior.config.num_embeddings if prior else None)
    for name, part in pipeline.components.items():
        if isinstance(part, torch.nn.Module):
            to_whole(part, name, dtype)
    return pipeline


def fit_tokenizer(tokenizer, positions: int, needed: int | None = None) -> None:
    """Set a tokenizer's maximum length to its text encoder's `positions` if it has none, or a greater one.

    `needed` is the exact number of tokens that the next network reads: Kandinsky's prior.
    """
    length = needed or min(tokenizer.model_max_length, positions)
    if length > positions:
        raise ValueError(f"the prior reads {length} tokens, and its text encoder has positions for {positions}")
    if length != tokenizer.model_max_length:
        stated = tokenizer.model_max_length
        stated = stated if stated < 1e9 else "no length"  # transformers sets 1e30 if there is none
        logger.warning(f"the tokenizer states {stated}: captions are cut to the {length} tokens that are read")
        tokenizer.model_max_length = length
    tokenizer("", max_length=length, padding="max_length", truncation=True)  # fails now rather than at a caption


def to_whole(network: torch.nn.Module, name: str, dtype: torch.dtype) -> torch.nn.Module:
    """Cast a loaded network to `dtype`. Raises Unfit if its files lack a tensor, or hold one that is not finite."""
    lacking = [tensor for tensor, value in network.state_dict().items() if value.is_meta]  # as diffusers leaves them
    if isinstance(network, PreTrainedModel) and network.name_or_path:  # "" of a single file, which diffusers loads
        lacking += weight_files.absent(network)
    if lacking:
        more = f" and {len(lacking) - 1} more" if lacking[1:] else ""
        raise Unfit(f"{name} has no weights for {lacking[0]}{more}, which its config.json describes")
    for tensor, value in network.to(dtype=dtype).state_dict().items():
        # The sum is much faster, but may overflow on large values.
        if value.is_floating_point() and not value.sum(dtype=torch.float32).isfinite() and not value.isfinite().all():
            raise Unfit(f"{name} holds values that are not finite, in {tensor}: download its file again")
    return network


def prepare_trained(network, args, accelerator):
    """The network to train, in the device's memory format, compiled with --torch_compile.

    Compiled in place, by `Module.compile`, so that no wrapper changes names in checkpoints and exports.
    """
    if args.torch_compile:
        # Blocks of a class share a cache with an entry per shape of each bucket; beyond the limits, by default 8 and
        # 256, they would run uncompiled.
        for limit in ("cache_size_limit", "accumulated_cache_size_limit"):
            setattr(torch._dynamo.config, limit, max(1024, getattr(torch._dynamo.config, limit)))
        for module in [network] if args.torch_compile == "whole" else _regions(network):
            module.compile(dynamic=False)  # every batch is full, so dynamic shapes would only cost speed
        _unshare_gradients(network)
    return channels_last(network, accelerator.device)


def _regions(module) -> list[torch.nn.Module]:
    """The outermost modules of the classes in REGIONS."""
    if type(module).__name__ in REGIONS:
        return [module]
    return [region for child in module.children() for region in _regions(child)]


def _unshare_gradients(network) -> None:
    """Copy gradients that share memory: clipping works in place and would scale them twice.

    At batch size 1 Inductor returns e.g. the gradients of two biases as views of one tensor. LoRA adapters, which are
    added later, have no biases.
    """
    owners = {}  # address of a gradient -> the parameter that had it last

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
    """Use xFormers' attention. It runs a kernel at once; if that fails, the error names the flag."""
    try:
        network.enable_xformers_memory_efficient_attention()
    except Exception as error:
        reason = " ".join(str(error).split())[:300]
        raise RunError(f"--enable_xformers_memory_efficient_attention: {reason}; leave it out") from error


def uncompiled():
    """Context without torch.compile: other input shapes than training's would trigger recompilation."""
    return torch.compiler.set_stance("force_eager")


def channels_last(module, device: torch.device):
    """Convert `module` to channels-last for tensor cores, if it runs on CUDA and has several convolutions.

    CLIP's image encoder has a single one, at its input, and is left as it is.
    """
    several = sum(isinstance(part, torch.nn.Conv2d) for part in module.modules()) > 1
    return module.to(memory_format=torch.channels_last) if several and device.type == "cuda" else module


def unwrap(model, accelerator) -> torch.nn.Module:
    """The network without the wrappers of DDP and torch.compile, so that its names are those of the files."""
    model = accelerator.unwrap_model(model)
    return getattr(model, "_orig_mod", model)


def inference_dtype(accelerator) -> torch.dtype:
    """The dtype of frozen networks: that of mixed precision."""
    return {"fp16": torch.float16, "bf16": torch.bfloat16}.get(accelerator.mixed_precision, torch.float32)


def prepare_frozen(module: torch.nn.Module, accelerator, exported: bool = True) -> torch.nn.Module:
    """`module` for inference: without gradients, on the device, in the dtype of mixed precision.

    If it will be `exported`, rank 0 keeps the fp32 original and returns a half-precision copy.
    """
    dtype = inference_dtype(accelerator)
    if module.dtype != dtype and exported and accelerator.is_main_process:
        module = copy.deepcopy(module)
    module = module.requires_grad_(False).eval().to(accelerator.device, dtype)
    return channels_last(module, accelerator.device)


def check_clip_skip(clip_skip: int, layers: int) -> None:
    if clip_skip > layers:
        raise RunError(f"--clip_skip {clip_skip}: the text encoder has {layers} layers, so {layers} is the most")


def skip_layers(text_encoder, clip_skip: int):
    """The text encoder up to layer `clip_skip`, counted from the last; 1 is all of it. Weights are shared.

    The states of that layer go through the final norm, as in A1111, kohya's scripts and diffusers, whose own clip_skip
    is one less.
    """
    check_clip_skip(clip_skip, text_encoder.config.num_hidden_layers)
    if clip_skip == 1:
        return text_encoder
    shared = {id(tensor): tensor for tensor in (*text_encoder.parameters(), *text_encoder.buffers())}
    shorter = copy.deepcopy(text_encoder, shared)
    del getattr(shorter, "text_model", shorter).encoder.layers[1 - clip_skip :]  # transformers before 5.6 nests them
    shorter.config.num_hidden_layers -= clip_skip - 1
    return shorter


def encode_text(text_encoder, input_ids: torch.Tensor) -> torch.Tensor:
    """The states of captions (B, chunks, tokens), as those of one caption: (B, chunks * (tokens - 2) + 2, D).

    As kohya's scripts do, the start of the first chunk and the end of the last are kept, of the others neither.
    """
    states = text_encoder(input_ids.flatten(0, 1))[0].unflatten(0, input_ids.shape[:2])
    return torch.cat([states[:, 0, :1], states[:, :, 1:-1].flatten(1, 2), states[:, -1, -1:]], dim=1)


@contextlib.contextmanager
def on_device(pipeline, accelerator):
    """Move those networks of a pipeline that are on the CPU to the device, and back; leave no memory in use there."""
    networks = [part for part in pipeline.components.values() if isinstance(part, torch.nn.Module)]
    # Compare types: a single process's device is "cuda", that of a tensor on it "cuda:0".
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
            scheduler.__dict__ = state  # without the timesteps and predictions of the last image
        device.release_memory(accelerator.device)


def enable_gradient_checkpointing(blocks) -> None:
    """Gradient checkpointing for a network for which diffusers has none: each block recomputes its activations."""
    for block in blocks:
        block.forward_once, block.forward = block.forward, types.MethodType(_recompute, block)


def _recompute(block, *args, **kwargs):  # torch.compile skips a partial, but not a function
    return torch.utils.checkpoint.checkpoint(block.forward_once, *args, use_reentrant=False, **kwargs)
