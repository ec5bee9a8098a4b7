"""JAX's devices, and arrays on them.

The devices form a mesh, hosts x devices per host. Batches are split over all devices. The trained state is replicated
on each device or, with --shard_parameters, sharded over the devices of each host. So every host holds all of it, and
saving and sampling need no communication. Lock, data, metrics and trackers use accelerate on the CPU, as in the other
scripts.
"""

import functools
import importlib.metadata
import os
import re
import socket
import warnings
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import torch
from accelerate.utils import broadcast_object_list
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from ..errors import RunError
from ..report import flops
from ..run import lifecycle, missing_gpu


def start(args):
    """(accelerator, mesh, precision). Several hosts are joined where a launcher started several processes."""
    warnings.filterwarnings("ignore", r"os\.fork\(\) was called", RuntimeWarning)  # loader workers leave JAX alone
    wanted = args.mixed_precision
    if "mixed_precision" not in args.typed:
        wanted = os.environ.get("ACCELERATE_MIXED_PRECISION", wanted)  # of `accelerate launch --mixed_precision`
    if wanted not in ("no", "fp16", "bf16"):
        raise RunError(f"--mixed_precision {wanted} is not for JAX: take bf16")
    accelerator = lifecycle.start(args, for_jax=True)
    if accelerator.num_processes > 1 and not jax.distributed.is_initialized():
        _join_hosts(accelerator)
    if jax.process_count() != accelerator.num_processes:
        raise RunError("these devices belong to several hosts: start a process on each with torchrun")
    if jax.default_backend() == "cpu" and accelerator.is_main_process:
        asked = "JAX_PLATFORMS asks for the CPU" if "cpu" in os.environ.get("JAX_PLATFORMS", "") else None
        missing_gpu.report(asked, _lacks_plugin, begin=functools.partial(jax.devices, "gpu"))
    precision = _possible_precision(wanted)
    full = precision == "no" and not args.allow_tf32
    jax.config.update("jax_default_matmul_precision", "highest" if full else "default")
    devices = sorted(jax.devices(), key=lambda device: (device.process_index, device.id))
    mesh = Mesh(np.array(devices).reshape(accelerator.num_processes, -1), ("hosts", "devices"))
    if args.shard_parameters and mesh.shape["devices"] == 1:
        raise RunError("--shard_parameters needs several devices per host, and there is one: leave it out")
    return accelerator, mesh, precision


def _lacks_plugin(maker: str) -> str | None:
    name = {"NVIDIA": "cuda", "AMD": "rocm"}[maker]
    if any(re.match(f"jax[-_]{name}", package.name or "") for package in importlib.metadata.distributions()):
        return None
    way_out = "pip install 'jax[cuda13]'" if maker == "NVIDIA" else "https://docs.jax.dev/en/latest/installation.html"
    return f"JAX has no plugin for it: {way_out}"


def _join_hosts(accelerator) -> None:
    with socket.socket() as probe:
        probe.bind(("", 0))
        address = f"{os.environ['MASTER_ADDR']}:{probe.getsockname()[1]}"
    several = int(os.environ.get("LOCAL_WORLD_SIZE", 1)) > 1
    jax.config.update("jax_enable_preemption_service", False)  # it would take SIGTERM for itself
    jax.distributed.initialize(
        broadcast_object_list([address])[0], accelerator.num_processes, accelerator.process_index,
        local_device_ids=[accelerator.local_process_index] if several else None,
    )  # fmt: skip


def leave_hosts() -> None:
    """Disconnect from the other hosts, all at once; otherwise the first to end waits five minutes and aborts."""
    if jax.distributed.is_initialized():
        jax.distributed.shutdown()


def _possible_precision(wanted: str) -> str:
    possible = {"cpu": "no", "tpu": "bf16"}.get(jax.default_backend(), "fp16")
    if wanted != "fp16" or possible == "fp16":
        return wanted
    warnings.warn(f"fp16 needs a GPU: training in {'bf16' if possible == 'bf16' else 'fp32'}", stacklevel=3)
    return possible


def describe(mesh: Mesh) -> tuple[int, str]:
    """Devices of a host, and what they are."""
    return mesh.shape["devices"], mesh.devices.flat[0].device_kind


class DeviceStats:
    """`report.throughput.DeviceStats` for JAX's devices. `sample_flops()` is called after an update, of which it is."""

    def __init__(self, args, precision: str, mesh: Mesh, sample_flops: Callable[[], float]):
        self.devices, self.flops = mesh.size, lambda _batch: sample_flops()
        self.peak = flops.peak_tflops(describe(mesh)[1], precision, args.allow_tf32)

    def restart(self) -> None:
        """Does nothing: JAX cannot reset its peak of memory."""

    def peak_memory(self) -> int | None:
        """Bytes on one device since the process began."""
        known = [device.memory_stats() for device in jax.local_devices()]
        return max((facts["peak_bytes_in_use"] for facts in known if facts), default=None)


def compute_dtype(precision: str):
    return {"fp16": jnp.float16, "bf16": jnp.bfloat16}.get(precision, jnp.float32)


# Arrays on the devices


def place(tree, mesh: Mesh, shard: bool = False):
    """Put host arrays on the devices: replicated or, with `shard`, split over the devices of each host."""

    def put(array):
        sharding = NamedSharding(mesh, _split_axis(array.shape, mesh.shape["devices"]) if shard else P())
        return jax.make_array_from_callback(array.shape, sharding, lambda part: np.array(array[part]))

    return jax.tree.map(put, tree)


def _split_axis(shape: tuple[int, ...], parts: int) -> P:
    """Split the longest axis that divides evenly."""
    axes = [axis for axis, size in enumerate(shape) if size % parts == 0]
    return P(*[None] * max(axes, key=lambda axis: shape[axis]), "devices") if axes else P()


def fetch(tree):
    """Device arrays as NumPy arrays, assembled from their shards on this host. Valid until the next step.

    Each shard is read through an alias, since JAX keeps a host copy as long as the array that was read lives.
    """

    def get(array):
        if array.is_fully_replicated:
            return np.asarray(array.addressable_data(0))
        whole = np.empty(array.shape, array.dtype)
        for part in array.addressable_shards:
            whole[part.index] = part.data.addressable_data(0)
        return whole

    return jax.tree.map(get, tree)


def local(tree):
    """Device arrays on the first device of this host only. Replicated arrays are not copied."""

    def get(array):
        return array.addressable_data(0) if array.is_fully_replicated else jax.device_put(fetch(array), first)

    first = jax.local_devices()[0]
    return jax.tree.map(get, tree)


def place_batch(micro_batches: list[dict[str, torch.Tensor]], mesh: Mesh) -> dict[str, jax.Array]:
    """This process's micro-batches on the devices: each entry (micro-batches, samples of all hosts, ...)."""
    sharding = NamedSharding(mesh, P(None, ("hosts", "devices")))
    names = [name for name in micro_batches[0] if name != "index"]  # used only to name bad samples
    stacked = {name: np.stack([to_numpy(batch[name]) for batch in micro_batches]) for name in names}
    return {name: jax.make_array_from_process_local_data(sharding, array) for name, array in stacked.items()}


def to_numpy(tensor: torch.Tensor) -> np.ndarray:
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.int16).numpy().view(jnp.bfloat16)
    return (tensor.int() if tensor.dtype == torch.int64 else tensor).numpy()


def to_torch(array: jax.Array) -> torch.Tensor:
    array = np.array(array)
    if array.dtype == jnp.bfloat16:
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)


_jit = functools.cache(jax.jit)


def on_host(arrays, *axes: str):
    """Put networks on every device of this host or, with "devices", split samples over them."""
    return jax.device_put(arrays, NamedSharding(Mesh(np.array(jax.local_devices()), "devices"), P(*axes)))


def encode_on_host(batch: dict[str, torch.Tensor], encode: functools.partial) -> dict[str, torch.Tensor]:
    """Called by the cache: `encode(batch)` on the devices of this host, which hold the networks bound to it."""
    size = len(next(iter(batch.values())))
    # Repeat some samples, so that all devices get equally many.
    places = np.arange(size + -size % jax.local_device_count()) % size
    samples = on_host({name: to_numpy(tensor)[places] for name, tensor in batch.items()}, "devices")
    return {name: to_torch(array)[:size] for name, array in _jit(encode.func)(samples, **encode.keywords).items()}
