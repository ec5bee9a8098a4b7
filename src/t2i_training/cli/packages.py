"""Optional packages, often built for another torch: hides those that a run does not use, and tries those that it does.

diffusers, transformers, peft and accelerate import such packages if they are installed. A broken package that the run
does not need would end it with a long traceback. Imports no torch by itself.
"""

import importlib.metadata
import logging
import os
import sys

from ..errors import RunError

# Kernels, quantisation and parallelism that these scripts do not use.
UNUSED = (
    "aiter", "apex", "flash_attn", "flash_attn_3", "flash_attn_interface", "gguf", "hqq", "kernels", "modelopt",
    "msamp", "optimum", "sageattention", "torchao", "transformer_engine",
)  # fmt: skip
LOOKING = ("accelerate", "diffusers", "peft", "transformers")  # import them if they are installed
FLAGS = {"xformers": "enable_xformers_memory_efficient_attention", "bitsandbytes": "use_8bit_adam"}


def hide_unused(args) -> None:
    """Hide packages that this run does not use from `import` and `find_spec`. Call it before torch is imported.

    Both treat a name that is None in sys.modules as not installed. If one of the libraries in LOOKING is loaded already
    (e.g. in a notebook), it has found the packages and would fail without them; then nothing is hidden.
    """
    too_late = any(name in sys.modules for name in LOOKING)
    used = {name for name, flag in FLAGS.items() if getattr(args, flag, False)}
    # Refused later, with a message of its own.
    if os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true":
        used.add("deepspeed")
    for name in (*UNUSED, *FLAGS, "deepspeed"):
        if name not in used:
            if not too_late:
                sys.modules.setdefault(name, None)
        elif name in sys.modules and sys.modules[name] is None:  # hidden by an earlier run in this process
            del sys.modules[name]
    logging.getLogger("xformers").setLevel(logging.ERROR)  # `try_out` says in one line what it logs in six


def try_out(args, device) -> None:
    """Exit with one line if a package that a flag asks for does not work with this torch on this device."""
    trials = {"xformers": _try_xformers, "bitsandbytes": _try_bitsandbytes, "triton": _try_triton}
    for name, flag in (*FLAGS.items(), ("triton", "torch_compile")):
        if not getattr(args, flag, False):
            continue
        try:
            trials[name](device)
        except Exception as error:  # from a loader, a driver or a compiler
            reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
            line = f"--{flag}: {_release(name)} does not work here: leave the flag out"
            raise RunError(f"{line}, or install a release for this torch ({reason})") from error


def _release(name: str) -> str:
    try:
        return f"{name} {importlib.metadata.version(name)}"
    except importlib.metadata.PackageNotFoundError:  # e.g. a folder on sys.path
        return name


def _try_xformers(device) -> None:
    """Attention over two tokens, forward and backward. Kernels that were not loaded say which torch they need."""
    import torch
    import xformers.ops

    not_loaded = getattr(sys.modules.get("xformers._cpp_lib"), "_cpp_library_load_exception", None)
    if not_loaded is not None:
        raise not_loaded
    query = torch.zeros(1, 2, 1, 64, device=device, requires_grad=True)
    xformers.ops.memory_efficient_attention(query, query, query).sum().backward()


def _try_bitsandbytes(device) -> None:
    """One update of a tensor that is large enough for 8-bit state."""
    import bitsandbytes
    import torch

    parameter = torch.nn.Parameter(torch.zeros(4096, device=device))
    parameter.grad = torch.ones_like(parameter)
    bitsandbytes.optim.AdamW8bit([parameter]).step()


def _try_triton(device) -> None:
    """A kernel of Inductor's. On the CPU it writes C++, whose compiler `checks` has looked for."""
    import torch

    if device.type != "cpu":
        torch.compile(lambda x: x.sin() + 1)(torch.zeros(4, device=device))
