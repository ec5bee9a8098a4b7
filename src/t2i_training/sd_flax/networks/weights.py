"""Loads and saves networks in the format of diffusers and transformers: config.json and one tensor per parameter, named
by its path, with convolutions as (out, in, height, width) and linear layers as (out, in).
"""

import json
import re
import zipfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import jax
import numpy as np
from flax import nnx, serialization

from .config import read_config

TO_TORCH = {2: (1, 0), 4: (3, 2, 0, 1)}  # axes of a kernel, which in Flax is (in, out) or (height, width, in, out)
TO_FLAX = {2: (1, 0), 4: (2, 3, 1, 0)}
NUMBERED = re.compile(  # lists in old Flax files, e.g. "resnets_0"; other names, e.g. "linear_1", keep their number
    r"^(down_blocks|up_blocks|resnets|attentions|transformer_blocks|downsamplers|upsamplers|to_out|net)_(\d+)$"
)
OLD_ATTENTION = re.compile(r"(?<=\.attentions\.0\.)(query|key|value|proj_attn)(?=\.)")  # in most VAE files
NEW_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
HARMLESS = ("text_model.embeddings.position_ids", "embeddings.position_ids")  # the constants 0, 1, 2, ...
BIN_STEMS = {"model": "pytorch_model"}  # name of transformers' .bin files


class Network(nnx.Module):
    """A network. `config` holds its config.json; `dtype` is that of its arithmetic."""

    weights_stem: str  # stem of its file's name

    def state_dict(self) -> dict[str, np.ndarray]:
        """Its parameters or gradients with names and shapes as on disk: contiguous float32 arrays on the host."""
        tensors = {}
        for path, parameter in nnx.to_flat_state(nnx.state(self)):
            array = np.asarray(jax.device_get(parameter[...]), np.float32)
            if path[-1] == "kernel":
                array = array.transpose(TO_TORCH[array.ndim])
            tensors[tensor_name(path)] = np.ascontiguousarray(array)
        return tensors


def load(network_class: type[Network], folder: str | Path, *, variant: str | None = None, **options) -> Network:
    """The network in `folder`, its parameters in float32 as NumPy arrays, whatever precision the file has.

    Reads, in this order, *.safetensors, *.bin and *.msgpack (of the Flax classes that diffusers had), the first two
    also where an index spreads them over several files; `variant` is the "fp16" of model.fp16.safetensors. `options` go
    to the class. FileNotFoundError where there are no such files; ValueError, naming the tensor, where one is missing,
    not expected or of another shape, or, naming the key, where config.json asks for what is not built here.
    """
    files = find_files(folder, network_class.weights_stem, variant)
    is_torch = files[0].suffix != ".msgpack"
    read = read_torch if is_torch else read_msgpack
    tensors = ((file, name, array) for file in files for name, array in read(file))
    return _build(network_class, read_config(folder), options, tensors, is_torch)


def from_torch(network_class: type[Network], network, **options) -> Network:
    """The equivalent of a diffusers or transformers network in memory. Errors as for `load`."""
    config = network.config.to_dict() if hasattr(network.config, "to_dict") else dict(network.config)
    source = type(network).__name__
    tensors = ((source, name, tensor.float().numpy()) for name, tensor in network.state_dict().items())
    return _build(network_class, config, options, tensors, is_torch=True)


def _build(network_class: type[Network], config: dict, options: dict, tensors, is_torch: bool) -> Network:
    graph, state = nnx.split(nnx.eval_shape(lambda: network_class(config, **options)))
    parameters = fill(dict(nnx.to_flat_state(state)), tensors, is_torch)
    return nnx.merge(graph, nnx.from_flat_state(parameters))


def fill(blanks: dict, tensors: Iterable[tuple], is_torch: bool) -> dict:
    """Fill `blanks`, a dict from path to parameter. Raises ValueError unless the tensors fit and are finite.

    A tensor comes as (where from, name, array); with `is_torch` its axes are PyTorch's.
    """
    paths = {tensor_name(path): path for path in blanks}
    parameters = {}
    for source, old_name, array in tensors:
        name = current_name(old_name, paths)
        if name in HARMLESS:
            continue
        if name not in paths:
            raise ValueError(f"{source}: tensor {old_name} has no place in the network that config.json describes")
        path = paths[name]
        expected = shape_on_disk(path, blanks[path]) if is_torch else blanks[path].shape
        if array.shape != expected:
            raise ValueError(f"{source}: tensor {old_name} is {array.shape}, but config.json makes it {expected}")
        if is_torch and path[-1] == "kernel":
            array = array.transpose(TO_FLAX[array.ndim])
        parameters[path] = nnx.Param(np.array(array, np.float32))
        if not np.isfinite(parameters[path].get_value()).all():
            raise ValueError(f"{source}: tensor {old_name} holds values that are not finite: download the file again")
    if missing := sorted(paths[name] for name in paths if paths[name] not in parameters):
        raise ValueError(f"{source}: tensor {tensor_name(missing[0])} is missing ({len(missing)} in all)")
    return parameters


def save(network: Network, folder: str | Path) -> None:
    """Write config.json and the weights into `folder`, as float32 safetensors that diffusers or transformers load."""
    from safetensors.numpy import save_file

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    config = dict(network.config)
    if network.weights_stem == "model":  # transformers loads in the precision that the config names
        config |= {
            "architectures": ["CLIPTextModel"],
            **dict.fromkeys(config.keys() & {"dtype", "torch_dtype"}, "float32"),
        }
    else:
        config["_class_name"] = type(network).__name__  # old Flax folders say FlaxUNet2DConditionModel
    (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    save_file(network.state_dict(), folder / f"{network.weights_stem}.safetensors", metadata={"format": "pt"})


def split(network: Network) -> tuple[dict[str, jax.Array], Callable]:
    """A network's parameters by their names on disk, in Flax's axes, and the function that merges them into a network.

    For training loops: calling a jitted function takes 1 ms of Python with this dict, 40 ms with SD 1.5's UNet itself.
    """
    graph, state = nnx.split(network)
    paths = {tensor_name(path): path for path, _ in nnx.to_flat_state(state)}
    parameters = {tensor_name(path): parameter[...] for path, parameter in nnx.to_flat_state(state)}

    def merge(parameters: dict[str, jax.Array]) -> Network:
        state = {paths[name]: nnx.Param(value) for name, value in parameters.items()}
        return nnx.merge(graph, nnx.from_flat_state(state))

    return parameters, merge


def shapes_on_disk(network: Network) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor that `save` would write. Works on networks from nnx.eval_shape."""
    return {tensor_name(path): shape_on_disk(path, value) for path, value in nnx.to_flat_state(nnx.state(network))}


def shape_on_disk(path: tuple, parameter) -> tuple[int, ...]:
    shape = parameter.shape
    return tuple(shape[axis] for axis in TO_TORCH[len(shape)]) if path[-1] == "kernel" else shape


def tensor_name(path: tuple) -> str:
    """A parameter's name on disk: ("to_out", 0, "kernel") is "to_out.0.weight"."""
    *modules, leaf = path
    return ".".join(map(str, (*modules, "bias" if leaf == "bias" else "weight")))


def current_name(name: str, expected) -> str:
    """The current name of a tensor from an older file, or from transformers 5, which omits "text_model."."""
    if name not in expected and f"text_model.{name}" in expected:
        return f"text_model.{name}"
    return OLD_ATTENTION.sub(lambda match: NEW_ATTENTION[match[0]], name)


def find_files(folder: str | Path, stem: str, variant: str | None) -> list[Path]:
    """The files with the weights, all of one format. Raises FileNotFoundError, with what is there instead."""
    folder, mark = Path(folder), f".{variant}" if variant else ""
    for name, ending in ((stem, ".safetensors"), (BIN_STEMS.get(stem, stem), ".bin")):
        whole, index = folder / f"{name}{mark}{ending}", folder / f"{name}{ending}.index{mark}.json"
        if whole.is_file():
            return [whole]
        if index.is_file():
            names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
            return [folder / Path(name).name for name in sorted(names)]
    for name in () if variant else ("diffusion_flax_model.msgpack", "flax_model.msgpack"):
        if (folder / name).is_file():
            return [folder / name]
    there = ", ".join(sorted(path.name for path in folder.iterdir())) if folder.is_dir() else "no such folder"
    raise FileNotFoundError(f"{folder}: no {stem}{mark}.safetensors, .bin or .msgpack here, but: {there}")


def read_torch(file: Path) -> Iterator[tuple[str, np.ndarray]]:
    """The tensors of a safetensors or torch file as float32, one at a time. Unpickles only tensors."""
    import torch
    from safetensors import safe_open

    if file.suffix == ".safetensors":
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118  # it is no dict
                yield name, tensors.get_tensor(name).float().numpy()
    else:  # memory-mapped, if it is a file of torch's zip format
        tensors = torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
        for name, tensor in tensors.items():
            yield name, tensor.float().numpy()


def read_msgpack(file: Path) -> Iterator[tuple[str, np.ndarray]]:
    """The tensors of an old Flax file, with torch's names and Flax's axes."""
    stack = [((), serialization.msgpack_restore(file.read_bytes()))]
    while stack:
        path, value = stack.pop()
        if isinstance(value, dict):
            stack += [((*path, NUMBERED.sub(r"\1.\2", key)), below) for key, below in value.items()]
        else:
            yield tensor_name(path), np.asarray(value)
