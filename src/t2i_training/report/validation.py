"""Validation images: drawn by all processes, saved singly and in a grid whose first row is the untouched model."""

import textwrap
import warnings
from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
from accelerate.utils import gather_object
from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo

from .. import distributed
from ..files import atomic_write
from ..log import logger
from ..model.networks import uncompiled

STEPS = 20  # of the sampler, for a validation image


def validate(
    generate_image: Callable[[int], Image.Image], prompts: list[str], step: int, output_dir, accelerator, stop
):
    """Generate image i for prompts[i], spread over the processes; save, log and lay them out under those of step 0.

    All processes call it. Writes validation/step-<n>/<i>.png and validation/step-<n>.png. A request to `stop` ends it
    after the image under way, and nothing is written.
    """
    mine = range(accelerator.process_index, len(prompts), accelerator.num_processes)
    images = _generate(generate_image, mine, step, stop)
    distributed.barrier(accelerator)  # without a limit, which gathering has
    generated = dict(gather_object(images))
    if len(generated) < len(prompts):
        done = f"stopped after {len(generated)} of {len(prompts)} images, none kept"
        logger.warning(f"validation at step {step}: {done}")
    elif accelerator.is_main_process:
        images = [generated[i] for i in range(len(prompts))]
        grid = _write(images, prompts, step, output_dir)
        log_images(accelerator, prompts, images, step)
        logger.info(f"validation images: {grid}")


def _generate(generate_image: Callable[[int], Image.Image], indices, step: int, stop) -> list[tuple[int, Image.Image]]:
    """(i, image) for each of `indices`, until the run is asked to stop."""
    images, not_numbers = [], []
    with (
        uncompiled(),  # other batch sizes: compiling would take longer than generating
        np.errstate(invalid="call", call=lambda *_: not_numbers.append(1)),  # nan becomes black in the cast to uint8
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore", FutureWarning)  # of diffusers' pipelines, about their calls of each other
        for i in indices:
            if not stop.pending:
                images.append((i, generate_image(i)))
    if not_numbers:
        logger.warning(
            f"validation images of step {step} are black where a network gave nan; where a VAE overflows in fp16, "
            "--mixed_precision=bf16 or no, or another VAE, helps"
        )
    return images


def _write(images: list[Image.Image], prompts: list[str], step: int, output_dir) -> Path:
    """Save the images, each with its prompt, and the grid. Returns the grid's path."""
    folder = _folder(output_dir, step)
    folder.mkdir(parents=True, exist_ok=True)
    for i, image in enumerate(images):
        note = PngInfo()
        note.add_itxt("prompt", prompts[i])
        with atomic_write(folder / f"{i:02d}.png") as file:
            image.save(file, "png", pnginfo=note)
    rows = [("base model" if step == 0 else f"step {step}", images)]
    if step > 0 and (base := _load(_folder(output_dir, 0), prompts)):
        rows.insert(0, ("base model", base))
    grid = folder.with_suffix(".png")
    with atomic_write(grid) as file:
        make_grid(prompts, rows).save(file, "png")
    return grid


def _folder(output_dir, step: int) -> Path:
    return Path(output_dir) / "validation" / f"step-{step:06d}"


def _load(folder: Path, prompts: list[str]) -> list[Image.Image]:
    """The images of a step, if all are there and were drawn for these prompts, else none."""
    images = []
    for i, prompt in enumerate(prompts):
        path = folder / f"{i:02d}.png"
        if not path.exists() or (image := Image.open(path)).text.get("prompt") != prompt:
            return []
        images.append(image.convert("RGB"))
    return images


def pending(args, progress) -> bool:
    """Whether a validation is to be made before the next step: a run's first, or one that the last stop came before."""
    if not args.validation_prompts:
        return False
    grid = _folder(args.output_dir, progress.step).with_suffix(".png")
    due = progress.step == 0 or (progress.validation_due() and not grid.exists())
    # A shared folder may show the grid to some processes alone: those would not wait for the others.
    return bool(distributed.all_reduce_max(progress.accelerator, int(due)))


def own_grid(args, step: int) -> tuple[Path | None, bool]:
    """(the grid of the run's last step, if it was drawn for its own prompts; whether the untouched model is in it)."""
    folder, prompts = _folder(args.output_dir, step), args.validation_prompts
    grid = folder.with_suffix(".png")
    if not prompts or not grid.exists() or not _load(folder, prompts):
        return None, False
    return grid, bool(_load(_folder(args.output_dir, 0), prompts))


def make_grid(columns: list[str], rows: list[tuple[str, list[Image.Image]]], cell: int = 160) -> Image.Image:
    """Images in a grid, a labelled column for each prompt and a labelled row for each step.

    Cells are at least `cell` pixels wide, small images enlarged without smoothing, so that labels stay readable.
    """
    width = max(cell, rows[0][1][0].width)
    font, margin, gap = _font(15), 110, 6
    letters = max(8, width // 9)
    heads = [textwrap.wrap(text, letters, max_lines=4, placeholder="…") or ["(empty)"] for text in columns]
    top = 8 + 19 * max(map(len, heads))
    heights = [round(row[0].height * width / row[0].width) for _, row in rows]
    grid = Image.new("RGB", (margin + len(columns) * (width + gap), top + sum(heights) + gap * len(rows)), "white")
    ink = ImageDraw.Draw(grid)
    for i, lines in enumerate(heads):
        ink.multiline_text((margin + i * (width + gap), 4), "\n".join(lines), "black", font)
    y = top
    for (label, images), height in zip(rows, heights, strict=True):
        ink.text((6, y + height // 2 - 8), label, "black", font)
        for i, image in enumerate(images):
            smooth = Image.Resampling.NEAREST if image.width < width else Image.Resampling.LANCZOS
            grid.paste(image.convert("RGB").resize((width, height), smooth), (margin + i * (width + gap), y))
        y += height + gap
    return grid


@cache
def _font(size: int):
    import matplotlib  # its bundled DejaVu covers far more scripts than PIL's own font

    return ImageFont.truetype(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf", size)


def log_images(accelerator, prompts: list[str], images: list[Image.Image], step: int, tag="validation") -> None:
    """Send images to the trackers that take them: TensorBoard, Weights & Biases, Comet."""
    for tracker in accelerator.trackers:
        if tracker.name == "tensorboard":
            stack = np.stack([np.asarray(image.convert("RGB")) for image in images])
            tracker.writer.add_images(tag, stack, step, dataformats="NHWC")
        elif tracker.name == "wandb":
            import wandb

            captions = zip(images, prompts, strict=True)
            tracker.log({tag: [wandb.Image(image, caption=prompt) for image, prompt in captions]}, step=step)
        elif tracker.name == "comet_ml":
            for i, image in enumerate(images):
                tracker.writer.log_image(image, name=f"{tag}/{i}: {prompts[i]}", step=step)
