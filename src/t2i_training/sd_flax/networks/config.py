"""Reads a network's config.json, fills in the defaults of the PyTorch class, and refuses options that are not supported
here."""

import json
from pathlib import Path

IGNORED = {  # do not change a network's output; the last seven are in a checkpoint's unet_ema
    "sample_size", "use_memory_efficient_attention", "split_head_dim", "decay", "inv_gamma", "min_decay",
    "optimization_step", "power", "update_after_step", "use_ema_warmup",
}  # fmt: skip


class Config(dict):
    """The values of a config.json, immutable and hashable, since `jax.jit` caches by them."""

    def __hash__(self):
        return hash(json.dumps(self, sort_keys=True))


def read_config(folder: str | Path) -> dict:
    """The config.json in `folder`. FileNotFoundError where there is none."""
    return json.loads((Path(folder) / "config.json").read_text(encoding="utf-8"))


def complete(config: dict, defaults: dict, only: dict, strict: bool = True) -> Config:
    """`config` over `defaults`. Raises ValueError, with key and value, for options that are not supported here.

    `only` lists, for some keys, the values that are supported. A key found neither there nor in `defaults` is refused
    unless it is off (None or False) or, with `strict` off, whatever it says.
    """
    for key, value in config.items():
        if key in only and value not in only[key]:
            choices = " or ".join(map(repr, only[key]))
            raise ValueError(
                f"config.json: {key}={value!r} is not supported by the Flax networks, which need {choices}"
            )
        known = key in only or key in defaults or key in IGNORED or key.startswith("_")
        if strict and not known and value not in (None, False):
            raise ValueError(f"config.json: {key}={value!r} is not known to the Flax networks")
    return Config(defaults | config)


def check_blocks(config: dict, key: str, supported: tuple[str, ...]) -> None:
    """ValueError unless the block types under `key` are `supported`, and as many as there are block_out_channels."""
    for block_type in config[key]:
        if block_type not in supported:
            raise ValueError(
                f"config.json: {key} has {block_type!r}, which is not supported by the Flax networks; "
                f"they have {' and '.join(supported)}"
            )
    if len(config[key]) != len(config["block_out_channels"]):
        raise ValueError(f"config.json: {key} and block_out_channels differ in length")
