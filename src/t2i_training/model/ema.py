"""EMA of the weights: diffusers' EMAModel, saved and restored as a model folder, on any device."""

import contextlib
import json
from pathlib import Path

import safetensors.torch
import torch
from diffusers.training_utils import EMAModel

from .. import device, sanitize
from ..errors import RunError

WEIGHTS_NAME = "diffusion_pytorch_model.safetensors"
VISIT = 2**28  # bytes of an offloaded average that are on the device at once during its update


def make_ema(model, initial=None, offload: bool = False, foreach: bool = False) -> EMAModel:
    """The EMA of `model`'s weights, starting from those of `initial` (default: its own).

    It lies on the model's device or, with `offload`, in host memory (pinned where that is faster). Fused (foreach)
    kernels update it on a GPU, and on a CPU with `foreach`.
    """
    place = next(model.parameters()).device
    foreach = foreach or place.type != "cpu"
    ema = EMAModel((initial or model).parameters(), model_cls=type(model), model_config=model.config, foreach=foreach)
    if initial is not None and initial is not model:
        ema.optimization_step = 10**6  # EMAModel's warm-up would replace it in the first updates
    return _place(ema, place, offload)


def _place(ema: EMAModel, place: torch.device, offload: bool) -> EMAModel:
    ema.offloaded = offload
    ema.to("cpu" if offload else place)
    if offload and device.pins_memory(place):
        ema.pin_memory()
    return ema


def update(ema: EMAModel, model) -> None:
    """Update the EMA. An offloaded one is moved to the device in parts: as a whole it would need more memory there than
    one that stays, since foreach makes a second copy for the difference.
    """
    parameters = list(model.parameters())
    if not ema.offloaded or parameters[0].device.type == "cpu":
        return ema.step(parameters)
    host, steps = ema.shadow_params, ema.optimization_step
    for part in _parts(host):
        ema.shadow_params = [average.to(parameters[0].device, non_blocking=True) for average in host[part]]
        ema.optimization_step = steps  # each part's step counts it up
        ema.step(parameters[part])
        for pinned, average in zip(host[part], ema.shadow_params, strict=True):
            pinned.copy_(average, non_blocking=True)  # the next part is queued behind this copy, on the same stream
    ema.shadow_params = host


def _parts(tensors: list[torch.Tensor]) -> list[slice]:
    """Slices of consecutive tensors of VISIT bytes together, or of a single larger one."""
    parts, start, size = [], 0, 0
    for i, tensor in enumerate(tensors):
        if size and size + tensor.nbytes > VISIT:
            parts.append(slice(start, i))
            start, size = i, 0
        size += tensor.nbytes
    return [*parts, slice(start, len(tensors))]


@contextlib.contextmanager
def averaged(ema: EMAModel | None, model):
    """Context in which `model` has the averaged weights (its own if `ema` is None). Afterwards they are restored."""
    if ema is None:
        yield model
        return
    parameters = list(model.parameters())
    ema.store(parameters)
    try:
        # EMAModel.copy_to, with foreach, would have all of an offloaded average on the device at once.
        for parameter, average in zip(parameters, ema.shadow_params, strict=True):
            parameter.data.copy_(average)
        yield model
    finally:
        ema.restore(parameters)


def save_ema(ema: EMAModel, model, folder: Path) -> None:
    """Write the average as a model folder that `from_pretrained` loads; its counters stand in config.json.

    diffusers' `EMAModel.save_pretrained` builds a second network first, which costs seconds and gigabytes.
    """
    if ema.offloaded and torch.accelerator.is_available():
        torch.accelerator.synchronize()  # `update`'s copies to the host are asynchronous
    names = [name for name, _ in model.named_parameters()]
    weights = model.state_dict() | dict(zip(names, ema.shadow_params, strict=True))
    model.save_config(folder)
    safetensors.torch.save_file(
        {name: tensor.detach().cpu().contiguous() for name, tensor in weights.items()},
        folder / WEIGHTS_NAME, metadata={"format": "pt"},
    )  # fmt: skip
    config = json.loads((folder / "config.json").read_text())
    counters = {name: value for name, value in ema.state_dict().items() if name != "shadow_params"}
    (folder / "config.json").write_text(json.dumps(config | counters, indent=2, sort_keys=True) + "\n")


def load_ema(ema: EMAModel, model, folder: Path) -> None:
    """Restore what `save_ema` wrote, in place. `model` gives the order of the parameters."""
    weights = safetensors.torch.load_file(folder / WEIGHTS_NAME)
    for (name, _), average in zip(model.named_parameters(), ema.shadow_params, strict=True):
        average.copy_(weights[name])
    counters = json.loads((folder / "config.json").read_text())
    ema.load_state_dict({name: counters[name] for name in ema.state_dict() if name in counters})


def save_networks(name: str, model, ema: EMAModel | None, folder: Path) -> None:
    """A checkpoint's `<name>/` and, with an average, `<name>_ema/`: model folders that `from_pretrained` loads."""
    model.save_pretrained(folder / name)
    if ema is not None:
        save_ema(ema, model, folder / f"{name}_ema")


def load_networks(name: str, model, ema: EMAModel | None, folder: Path) -> None:
    """Read in place what `save_networks` wrote. Exits with one line if it holds no average, or another network."""
    if ema is not None and not (folder / f"{name}_ema").is_dir():
        raise RunError(f"--use_ema: {folder} was saved without it; resume without --use_ema, or start anew")
    try:
        model.load_state_dict(safetensors.torch.load_file(folder / name / WEIGHTS_NAME))
        if ema is not None:
            load_ema(ema, model, folder / f"{name}_ema")
    except FileNotFoundError:
        raise RunError(f"{folder} was not saved by this script: it holds no complete {name}") from None
    except (RuntimeError, KeyError) as error:
        raise RunError(f"{folder} does not fit this model: {sanitize.reason(error)[:300]}") from error
