"""Runs a training script with networks of the real size and tells what GPU memory it takes: see memory.py.

memory_driver.py FILE NAME FLAGS...

The script does not know of it: where it loads a pipeline it gets one of the real configuration whose weights are zeros
(memory does not depend on them, and zeros take no disk and hardly any host memory), and torch calls a hook before and
after each step of the optimizer. After two of them the process ends, with the measurements in FILE.
"""

import json
import os
import runpy
import sys
from pathlib import Path

import diffusers
import models
import numpy as np
import runs
import torch
import transformers
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from t2i_training.report import flops


def zeros(network: torch.nn.Module) -> torch.nn.Module:
    """`network`, made on the meta device, on the CPU. NumPy's zeros take memory when they are written to alone."""
    names = {torch.float32: np.float32, torch.int64: np.int64, torch.bool: np.bool_}
    return network._apply(lambda tensor: torch.from_numpy(np.zeros(tensor.shape, names[tensor.dtype])))


def networks(base: str, *names: str) -> dict[str, torch.nn.Module]:
    """Those of the pipeline `base` that are named, of the real size."""
    with torch.device("meta"):
        built = models.BUILDERS[base](models.SCALES["full"])
    return {name: zeros(built[name]) for name in names}


def replace_loading(folder: Path) -> None:
    """Make the calls by which the scripts load pretrained networks return these."""

    def load_prior(*_, image_encoder=None, **__):
        parts = networks("prior", "prior", "text_encoder", *([] if image_encoder else ["image_encoder"]))
        return models.prior_pipeline({"image_encoder": image_encoder} | parts, folder)

    diffusers.StableDiffusionPipeline.from_pretrained = lambda *_, **__: models.stable_diffusion_pipeline(
        networks("sd", "unet", "vae", "text_encoder"), folder
    )
    diffusers.KandinskyV22PriorPipeline.from_pretrained = load_prior
    diffusers.KandinskyV22Pipeline.from_pretrained = lambda *_, **__: models.decoder_pipeline(
        networks("decoder", "unet", "movq")
    )
    transformers.CLIPVisionModelWithProjection.from_pretrained = lambda *_, **__: networks("decoder", "image_encoder")[
        "image_encoder"
    ]


def watch(file: Path) -> None:
    """Write bytes into `file`, and end the process: `start`, the peak up to the first weight update, with loading and
    encoding; `update`, that from there to the end of the second; `optimizer`, that of the second's optimizer step;
    `reserved`, what the allocator has taken from the device by then."""
    found = {"start": 0}
    reset = torch.cuda.reset_peak_memory_stats

    def reset_but_remember(*_):  # the script resets it too, when its loop begins
        found["start"] = max(found["start"], torch.cuda.max_memory_allocated())
        reset()

    torch.cuda.reset_peak_memory_stats = reset_but_remember

    def before(*_):
        if "first" in found:
            found["backward"] = torch.cuda.max_memory_allocated()
            reset()

    def after(*_):
        if "first" not in found:
            found["first"] = True
            return reset_but_remember()
        optimizer = torch.cuda.max_memory_allocated()
        bytes_ = {"start": found["start"], "update": max(found["backward"], optimizer), "optimizer": optimizer}
        file.write_text(json.dumps(bytes_ | {"reserved": torch.cuda.max_memory_reserved()}))
        os._exit(0)  # nothing is exported

    register_optimizer_step_pre_hook(before)
    register_optimizer_step_post_hook(after)


def main() -> None:
    file, script = Path(sys.argv[1]), runs.own_script(sys.argv[2])
    sys.argv = [str(script), *sys.argv[3:]]
    sys.path[0] = str(script.parent)  # as `python SCRIPT` has it
    flops.count = lambda *_: 1.0  # which takes seconds, and no memory
    replace_loading(file.parent)
    watch(file)
    runpy.run_path(str(script), run_name="__main__")


if __name__ == "__main__":
    main()
