"""Optimizer, EMA and loss scaling in JAX, by the formulas of PyTorch and diffusers; their state and its checkpoints."""

import json
import math
from pathlib import Path

import flax
import jax
import jax.numpy as jnp
import jaxlib
import numpy as np
import optax
import safetensors.numpy
from diffusers.training_utils import EMAModel
from jax.sharding import Mesh

from .. import sanitize
from ..errors import RunError
from ..run import checkpoint
from . import flops, networks
from .devices import fetch, place

OPTIMIZER = "optimizer.safetensors"
VERSIONS = {module.__name__: module.__version__ for module in (jax, jaxlib, flax, optax)}  # for a checkpoint's manifest
FIRST_SCALE, PATIENCE = 2.0**16, 2000  # of the loss in fp16, as in torch.amp.GradScaler


class NoiseScheduler:
    """The part of diffusers' DDPMScheduler that training uses, in JAX."""

    def __init__(self, scheduler):
        self.config, self.alphas_cumprod = scheduler.config, jnp.asarray(scheduler.alphas_cumprod.numpy())

    def _scales(self, timesteps):
        alpha_bar = self.alphas_cumprod[timesteps][:, None, None, None]
        return alpha_bar**0.5, (1 - alpha_bar) ** 0.5

    def add_noise(self, latents, noise, timesteps):
        """arXiv:2006.11239 equation 4."""
        signal, sigma = self._scales(timesteps)
        return signal * latents + sigma * noise

    def get_velocity(self, latents, noise, timesteps):
        """arXiv:2202.00512, appendix D."""
        signal, sigma = self._scales(timesteps)
        return signal * noise - sigma * latents


def make_optimizer(args):
    """AdamW as in torch.optim.AdamW, without the learning rate."""
    adam = optax.scale_by_adam(args.adam_beta1, args.adam_beta2, args.adam_epsilon)
    return optax.chain(adam, optax.add_decayed_weights(args.adam_weight_decay))


def gradient_of(loss_function, state: dict, batch: dict, max_norm: float):
    """(loss, gradient, its norm): means over the micro-batches, which lie along the first axis of `batch`.

    The gradient is clipped to `max_norm` as in torch.nn.utils.clip_grad_norm_; the norm is that before clipping.
    """
    parameters, count = state["parameters"], len(next(iter(batch.values())))
    scale = state["scaling"]["scale"] if "scaling" in state else 1.0

    def add(total, micro_batch):
        loss, gradient = jax.value_and_grad(lambda p: scale * loss_function(p, micro_batch))(parameters)
        return jax.tree.map(lambda a, b: a + b / (scale * count), total, gradient), loss / scale

    total = jax.tree.map(jnp.zeros_like, parameters)
    if count > 1:
        gradient, losses = jax.lax.scan(add, total, batch)
    else:  # no scan, which XLA would compile as a loop
        gradient, losses = add(total, {name: array[0] for name, array in batch.items()})
    norm = optax.global_norm(gradient)
    factor = jnp.minimum(1.0, max_norm / (norm + 1e-6))
    return losses.mean(), jax.tree.map(lambda array: array * factor, gradient), norm


def update(state: dict, gradient, norm, optimizer, rate, ema_share) -> dict:
    """The state after one step of AdamW and of the EMA; in fp16 with loss scaling as in torch.amp.GradScaler.

    `ema_share` is 1 - decay of the EMA.
    """
    steps, moments = optimizer.update(gradient, state["optimizer"], state["parameters"])
    parameters = jax.tree.map(lambda array, step: array - rate * step, state["parameters"], steps)
    new = state | {"parameters": parameters, "optimizer": moments}
    if "scaling" in state:
        finite, scaling = jnp.isfinite(norm), state["scaling"]
        new = jax.tree.map(lambda new, old: jnp.where(finite, new, old), new, state)
        good = jnp.where(finite, scaling["good"] + 1, 0)
        scale = jnp.where(finite, jnp.where(good == PATIENCE, 2.0, 1.0), 0.5) * scaling["scale"]
        new["scaling"] = {"scale": scale, "good": good % PATIENCE}
    if "average" in state:  # as diffusers' EMAModel
        new["average"] = jax.tree.map(lambda a, p: a - ema_share * (a - p), state["average"], new["parameters"])
    return new


def _shapes(batch: dict) -> tuple[tuple[int, ...], ...]:
    return tuple(array.shape for array in batch.values())


# What is trained


class TrainState:
    """The state of training: parameters, moments, EMA. Saves and restores them.

    `state` is in host memory until `begin` puts it on the devices, so that resuming needs no extra device memory.
    """

    def __init__(self, args, precision: str, network, mesh: Mesh):
        self.mesh, self.shard, self.updates = mesh, args.shard_parameters, 0
        parameters, self.merge = networks.split(network)
        moments = jax.eval_shape(make_optimizer(args).init, parameters)
        moments = jax.tree.map(lambda array: np.zeros(array.shape, array.dtype), moments)
        state = {"parameters": parameters, "optimizer": moments}
        if args.use_ema:
            state["average"] = parameters
        if precision == "fp16":
            state["scaling"] = {"scale": np.float32(FIRST_SCALE), "good": np.int32(0)}
        self.state, self._inputs, self._flops = state, None, {}

    def begin(self, train_step) -> None:
        """Set `train_step(state, batch, frozen, rate, ema_share)`, which returns (state, loss, gradient norm).

        It is compiled at the first call, once for each shape of images. The new state reuses the memory of the old one.
        """
        self.state = place(self.state, self.mesh, self.shard)
        shardings = jax.tree.map(lambda array: array.sharding, self.state)
        self.train_step = jax.jit(train_step, donate_argnums=0, out_shardings=(shardings, None, None))

    def step(self, batch: dict, frozen: dict, rate: float):
        """Make one update. Returns (loss, gradient norm) without waiting for the device."""
        if self._inputs is None or _shapes(self._inputs[1]) != _shapes(batch):
            inputs = self.state, batch, frozen, np.float32(rate), np.float32(0)
            self._inputs = jax.tree.map(lambda array: jax.ShapeDtypeStruct(array.shape, array.dtype), inputs)
        self.updates += 1
        share = 1 - EMAModel([]).get_decay(self.updates)  # on the host: float32 would lose digits
        self.state, loss, norm = self.train_step(self.state, batch, frozen, np.float32(rate), np.float32(share))
        return loss, norm

    def nbytes(self) -> int:
        """Bytes of a checkpoint."""
        return sum(array.nbytes for array in jax.tree.leaves(self.state))

    def sample_flops(self) -> float:
        """FLOPs of the trained network for one sample of the last step, counted from shapes, once for each bucket."""
        shapes = _shapes(self._inputs[1])
        if shapes not in self._flops:
            self._flops[shapes] = flops.count(self.train_step.__wrapped__, *self._inputs) / math.prod(shapes[0][:2])
        return self._flops[shapes]

    def network(self, get=fetch, part: str = "parameters"):
        """The network, in host memory or where `get` puts it; with `part="average"` the EMA's."""
        return self.merge(get(self.state[part]))

    def export(self, get=fetch):
        """The network to export: the EMA's if there is one."""
        return self.network(get, "average" if "average" in self.state else "parameters")

    def save(self, folder: Path) -> None:
        """A checkpoint's `unet/` and `unet_ema/`, as the PyTorch script writes them, and the moments."""
        networks.save(self.network(), folder / "unet")
        if "average" in self.state:
            networks.save(self.network(part="average"), folder / "unet_ema")
            counters = EMAModel([]).state_dict() | {"optimization_step": self.updates}
            counters.pop("shadow_params")
            config = json.loads((folder / "unet_ema" / "config.json").read_text())
            text = json.dumps(config | counters, indent=2, sort_keys=True) + "\n"
            (folder / "unet_ema" / "config.json").write_text(text, encoding="utf-8")
        safetensors.numpy.save_file(self._flat(fetch(self._moments())), folder / OPTIMIZER)

    def load(self, folder: Path) -> None:
        """Read what `save` wrote. Exits with one line if it holds no average, or another network."""
        if "average" in self.state and not (folder / "unet_ema").is_dir():
            raise RunError(f"--use_ema: {folder} was saved without it; resume without --use_ema, or start anew")
        if not (folder / OPTIMIZER).is_file():
            raise RunError(f"{folder} was not saved by this script: there is no {OPTIMIZER}")
        try:
            state = {"parameters": networks.split(networks.load_unet(folder / "unet"))[0]}
            if "average" in self.state:
                state["average"] = networks.split(networks.load_unet(folder / "unet_ema"))[0]
            saved, moments = safetensors.numpy.load_file(folder / OPTIMIZER), self._moments()
            if not any(name in saved for name in self._flat({"scaling": moments.get("scaling")})):
                moments.pop("scaling", None)  # saved in another precision: start with a new scale
            names = self._flat(moments)
            state |= jax.tree.unflatten(jax.tree.structure(moments), [saved[name] for name in names])
            shapes = jax.tree.map(np.shape, state)
            if shapes != jax.tree.map(np.shape, {name: self.state[name] for name in state}):
                raise ValueError("tensors of other shapes")
        except (ValueError, KeyError) as error:
            raise RunError(f"{folder} does not fit this model: {sanitize.reason(error)[:300]}") from error
        self.updates = checkpoint.read_manifest(folder)["step"]
        self.state = self.state | state

    def _moments(self) -> dict:
        return {name: self.state[name] for name in ("optimizer", "scaling") if name in self.state}

    @staticmethod
    def _flat(tree) -> dict:
        return {jax.tree_util.keystr(path): array for path, array in jax.tree_util.tree_flatten_with_path(tree)[0]}
