"""Where a run stands, and what it reports while it trains: progress bar, rows of metrics.jsonl, trackers.

Losses stay on the device and are read once a logging interval.
"""

import contextlib
import json
import math
import os
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from accelerate.utils import gather_object
from tqdm.auto import tqdm

from .. import distributed, errors, files, library_errors, log, sanitize
from ..cli import out_of_memory
from ..cli.config_file import public_config
from ..data import changes
from ..data.dataset import describe
from ..device import name as device_name
from ..log import logger
from ..run import checkpoint
from ..run.output_folder import METRICS
from . import curves, throughput

PROJECT = "text2image-fine-tune"  # in the trackers, of scripts without --tracker_project_name
MOST_SKIPPED = 32  # consecutive updates that fp16's loss scaler may skip; each halves the scale, to below 2e-5


def plan_updates(args, dataset_size: int, world_size: int) -> tuple[int, int]:
    """(effective batch in samples, number of weight updates) of a run; --max_train_steps overrides the epochs."""
    effective_batch = args.train_batch_size * args.gradient_accumulation_steps * world_size
    return effective_batch, args.max_train_steps or -(-args.num_train_epochs * dataset_size // effective_batch)


class Progress:
    """The position of the run, and its losses, which stay on the device until the logging interval ends.

    `step` counts weight updates up to `total`, `samples_seen` samples over all processes. Both start at `position`, the
    manifest of the checkpoint that is resumed from, or {}. Each process drives `devices` of the kind `device`. What the
    run has settled besides its flags, `seed` and `precision` (by default the accelerator's), is in `config` with them.
    """

    def __init__(
        self, args, accelerator, dataset, image_infos, position: dict, seed: int, devices=1, device=None, precision=None
    ):
        self.args, self.accelerator, self.dataset = args, accelerator, dataset
        self.seed, self.precision = seed, precision or accelerator.mixed_precision
        self.config = public_config(args) | {"seed": seed, "mixed_precision": self.precision}
        self.devices, self.device = devices * accelerator.num_processes, device or device_name(accelerator.device)
        self.effective_batch, self.total = plan_updates(args, len(dataset), self.devices)
        self.step, self.samples_seen = position.get("step", 0), position.get("samples_seen", 0)
        images = len({info.digest for info in image_infos})
        self._of_images = f" of {images} images" if images != len(dataset) else ""
        self._data = changes.describe(args, accelerator, dataset, image_infos)
        if changed := changes.since(position, len(dataset), self._data):
            logger.warning(f"the data set has changed since the checkpoint: {changed}")
        if (before := position.get("effective_batch", self.effective_batch)) != self.effective_batch:
            buckets = vars(args).get("use_aspect_ratio_buckets")
            more = ", and buckets have another order: some images are seen again, others later" if buckets else ""
            logger.warning(f"the effective batch is now {self.effective_batch}, not {before}{more}")
        self._losses, self._grad_norms, self._indices, self._usable = [], [], [], []
        self._skipped = 0  # updates in a row whose gradients were not finite
        # (loss, gradient norm) of each update, fetched from the device but not yet in a row
        self._unreported = list(position.get("unreported", []))
        self._planned = position.get("total")  # total updates planned when the checkpoint was made
        self._file = Path(args.output_dir) / METRICS
        self._bar = self._saved_step = None

    def position(self) -> dict:
        """What a checkpoint's manifest holds about the run."""
        return {
            "step": self.step,
            "samples_seen": self.samples_seen,
            "seed": self.seed,
            "effective_batch": self.effective_batch,
            "total": self.total,
            "dataset_size": len(self.dataset),
            "data": self._data,
            "unreported": self._unreported,
        }

    def save(self, checkpoints, **more) -> None:
        """Save a checkpoint of where the run stands, with `more` in its manifest, unless this step has one.

        The losses are read first, so that nothing non-finite is ever saved.
        """
        if self._saved_step != self.step:
            self.fetch_losses()
            checkpoints.save(self.position() | more)
            self._saved_step = self.step
            self.restart_clock()

    def validation_due(self) -> bool:
        """Whether the update just counted completed a multiple of --validation_epochs epochs, and is not the last."""
        period = self.args.validation_epochs * len(self.dataset)
        completed = self.samples_seen // period > (self.samples_seen - self.effective_batch) // period
        return bool(self.args.validation_prompts) and completed and self.step < self.total

    def open(
        self,
        network,
        objective: Callable | None,
        rate: Callable[[int], float],
        average=None,
        project: str = PROJECT,
        stats=None,
        size: int | None = None,
    ) -> None:
        """Open the trackers: the run is ready to take steps on `objective(network, batch)`, at `rate(step)`.

        For JAX pass `stats` of its devices and a checkpoint's `size` in bytes; network and objective are then None.
        `average` is the EMA of the weights, if there is one; `project` is the run's project in the trackers.
        """
        main = self.accelerator.is_main_process
        config = {  # trackers take scalars only
            name: value if isinstance(value, int | float | str) else str(value) for name, value in self.config.items()
        }
        logs = Path(self.args.output_dir, self.args.logging_dir).absolute()
        if main:
            logs.mkdir(parents=True, exist_ok=True)
        wandb = {"dir": os.environ.get("WANDB_DIR", str(logs))}  # by default, its service's working directory
        with library_errors.readable_errors("--report_to", self.args.report_to):
            self.accelerator.init_trackers(project, config=config, init_kwargs={"wandb": wandb})
        logger.info(
            f"{len(self.dataset)} samples{self._of_images}, {self.effective_batch} an update, {self.total} updates "
            f"({self.total * self.effective_batch / len(self.dataset):.1f} epochs); "
            f"{self.devices} x {self.device}, mixed precision {self.precision}"
        )
        self._announce_rate(rate)
        if main:
            size = checkpoint.size_of(self.args, network, average) if size is None else size
            checkpoint.announce_space(self.args, size, self.step, self.total)
        stats = stats or throughput.DeviceStats(network, objective, self.args, self.accelerator)
        self._speed = throughput.Throughput(stats, self.accelerator)
        self.restart_clock()

    def timed(self, batches: Iterator[dict]) -> Iterator[dict]:
        """Pass batches through, and measure how long the run waits for them (`data_wait`)."""
        return self._speed.timed(batches)

    @contextlib.contextmanager
    def loop(self, checkpoints=None) -> Iterator["Progress"]:
        """Context of the training loop: shows the progress bar if stderr is a terminal; else `_report` logs lines.

        An error gets a note with the step. If memory has run out, what was trained is saved first into `checkpoints`.
        """
        began, hidden = self.step, not self.accelerator.is_main_process or not sys.stderr.isatty()
        self._bar = tqdm(
            total=self.total, initial=self.step, disable=hidden, dynamic_ncols=True,
            bar_format="{percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{elapsed}{postfix}]",
        )  # fmt: skip
        try:
            yield self
        except BaseException as error:
            self._bar.close()  # what is printed now stands below it
            if checkpoints is not None and self.step > began and out_of_memory.line(error):
                self._rescue(checkpoints, error)
            out_of_memory.note_step(error, self.step + 1, trained=self.step > began)
            raise
        self._bar.close()

    def _rescue(self, checkpoints, error: BaseException) -> None:
        """Save the updates made, unless the error came within the next one's, which may have changed half the weights.

        Not with several processes: the others may be in the middle of another step.
        """
        accumulation, micro_batches = self.accelerator.gradient_accumulation_steps, len(self._losses)
        counted = len(self._grad_norms) * accumulation
        if self.accelerator.num_processes > 1 or micro_batches - counted == accumulation:
            return
        traceback.clear_frames(error.__traceback__)  # they hold the step's activations
        for held in (self._losses, self._indices, self._usable):
            del held[counted:]  # of the update that was not finished
        try:
            self.save(checkpoints)
        except Exception as failure:
            logger.warning(f"what was trained since the last checkpoint cannot be saved: {sanitize.reason(failure)}")

    def _announce_rate(self, rate: Callable[[int], float]) -> None:
        """Log the course of the learning rate, unless it is constant."""
        name = self.args.lr_scheduler.partition(":")[0]
        if name == "constant" or self.step >= self.total:
            return
        course = (
            f"{rate(self.step):.3g} in the next update, {rate(self.total - 1):.3g} in the last, number {self.total}"
        )
        if self._planned not in (None, self.total):
            logger.warning(
                f"the run is now {self.total} updates long, not {self._planned}, and --lr_scheduler {name} with it: "
                f"the learning rate is {course}"
            )
        else:
            logger.info(f"the learning rate is {course} (--lr_scheduler {name})")

    def restart_clock(self) -> None:
        """Exclude the time since the last row (a checkpoint, a validation) from the measured speed."""
        self._speed.restart(self.samples_seen)

    def add_micro_batch(self, loss, batch: dict[str, torch.Tensor]) -> None:
        """Take one micro-batch and its loss, a scalar on the device, PyTorch's or JAX's. Waits for nothing."""
        self._losses.append(_detached(loss))
        self._indices.append(batch["index"])
        self._usable.append(_finite(batch))
        self._names = _float_names(batch)
        self._speed.count(batch)

    def count_update(self, grad_norm, learning_rate: float) -> None:
        """Count one weight update; at the end of a logging interval read the device and report."""
        self.step += 1
        self.samples_seen += self.effective_batch
        self._grad_norms.append(_detached(grad_norm))
        self._learning_rate = learning_rate
        self._speed.count_update(self.samples_seen)
        if self.step % self.args.logging_steps == 0 or self.step == self.total:
            self._report()
        self._bar.update()

    def fetch_losses(self) -> None:
        """Read the losses since the last time and stop on a non-finite one. All processes call it."""
        if not self._grad_norms:
            return
        updates = len(self._grad_norms)
        losses = _stack(self._losses).view(updates, -1).mean(1)  # (updates,)
        losses = self.accelerator.reduce(losses, reduction="mean")
        values = torch.stack([losses, _stack(self._grad_norms)]).tolist()  # the only wait for the device
        self._stop_if_not_finite(*values)
        self._unreported += zip(*values, strict=True)
        self._losses, self._grad_norms, self._indices, self._usable = [], [], [], []

    def _report(self) -> None:
        """Fetch the losses and write the row of the logging interval that ends here."""
        self.fetch_losses()
        losses, grad_norms = zip(*self._unreported, strict=True)
        row = {
            "step": self.step,
            "epoch": round(self.samples_seen / len(self.dataset), 4),
            "loss": sum(losses) / len(losses),
            "lr": self._learning_rate,
            "grad_norm": grad_norms[-1] if math.isfinite(grad_norms[-1]) else None,  # JSON knows no infinity
            **self._speed.row(self.samples_seen, self.effective_batch),
        }
        self._unreported = []
        self.restart_clock()
        if self.accelerator.is_main_process:
            with files.saving(METRICS, self._file.with_suffix(".partial")), open(self._file, "a") as file:
                file.write(json.dumps(row) + "\n")
            shown = [f"loss={row['loss']:.4f}, lr={row['lr']:.1e}, {throughput.shown(row)}"]
            seconds = self._speed.seconds_for((self.total - self.step) * self.effective_batch)
            left = [] if seconds is None else [f"left={tqdm.format_interval(seconds)}"]
            self._bar.set_postfix_str(", ".join(left + shown), refresh=False)  # a narrow terminal cuts off its end
            log.step(f"step {self.step} of {self.total}, {', '.join(shown + left)}")
        values = {"train_loss" if name == "loss" else name: value for name, value in row.items() if name != "step"}
        self.accelerator.log({name: value for name, value in values.items() if value is not None}, step=self.step)

    def _stop_if_not_finite(self, losses: list[float], grad_norms: list[float]) -> None:
        """End the run on a non-finite loss, and without a loss scaler on a non-finite gradient.

        fp16's scaler skips such updates by design, up to MOST_SKIPPED in a row; the weights stay as they were.
        """
        scaled = self.precision == "fp16"
        for i, (loss, grad_norm) in enumerate(zip(losses, grad_norms, strict=True)):
            self._skipped = 0 if math.isfinite(grad_norm) else self._skipped + 1
            if not math.isfinite(loss):
                self._end(f"loss {loss}", i, len(losses))
            if self._skipped and not scaled:
                self._end(f"gradient norm {grad_norm}", i, len(losses))
            if self._skipped == MOST_SKIPPED:
                self._end(f"{MOST_SKIPPED} updates in a row skipped, since gradients overflow in fp16,", i, len(losses))

    def _end(self, what: str, i: int, updates: int) -> None:
        """End the run because of the i-th of the `updates` since the last time. All processes call it."""
        micro_batches = len(self._indices) // updates
        seen = slice(i * micro_batches, (i + 1) * micro_batches)
        indices = [int(k) for batch in self._indices[seen] for k in batch]
        usable = [names for batch in self._usable[seen] for names in batch.tolist()]
        names = [describe(self.dataset, self.args.image_column, index) for index in gather_object(indices)]
        usable = gather_object(usable)
        step = self.step - updates + i + 1
        if not self.accelerator.is_main_process:
            # Wait until rank 0 has printed the error: a launcher kills all ranks once one has ended.
            distributed.barrier(self.accelerator)
            raise SystemExit(1)
        text = f"{what} at step {step}, nothing saved since; "
        bad = {}  # names of samples by that of the tensor
        for name, finite in zip(names, usable, strict=True):
            for tensor, is_finite in zip(self._names, finite, strict=True):
                if not is_finite:
                    bad.setdefault(tensor, []).append(name)
        if bad:
            tensor, samples = next(iter(bad.items()))
            raise errors.RunError(text + errors.not_finite(tensor, samples, self.precision == "fp16"))
        raise errors.RunError(
            f"{text}the step's samples: {'; '.join(names)}. "
            "Try a lower --learning_rate, bf16 in place of fp16, or without these samples"
        )

    def close(self) -> None:
        """End trackers and process group; plot the curves."""
        distributed.barrier(self.accelerator)
        if self.accelerator.is_main_process:
            curves.plot_curves(self._file.parent)
        self.accelerator.end_training()


def _finite(batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """For each sample, whether each floating-point tensor (sorted by name) is finite: (B, names) bool, on the device.

    Tells a fault of a frozen network from one of the trained network. Two kernels per tensor; the host does not wait.
    """
    inputs = [batch[name] for name in _float_names(batch)]
    if not inputs:
        return torch.ones(len(batch["index"]), 0, dtype=torch.bool)
    # x - x is 0, or nan where x is not finite
    return torch.stack([(x - x).reshape(len(x), -1).sum(1, dtype=torch.float32) for x in inputs], 1) == 0


def _float_names(batch: dict) -> list[str]:
    return sorted(name for name, x in batch.items() if isinstance(x, torch.Tensor) and x.is_floating_point())


def _detached(scalar):
    return scalar.detach() if isinstance(scalar, torch.Tensor) else scalar


def _stack(scalars: list) -> torch.Tensor:
    """(N,) float32, on the device that PyTorch's scalars are on; waits for JAX's."""
    if isinstance(scalars[0], torch.Tensor):
        return torch.stack(scalars).float()
    return torch.tensor([float(scalar) for scalar in scalars])
