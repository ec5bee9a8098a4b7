"""What a run reports while it trains: progress bar, metrics.jsonl, trackers, curves.

Losses stay on the device and are read once a logging interval.
"""

import json
import math
import os
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from accelerate.utils import gather_object
from tqdm.auto import tqdm

from . import data, files, loading, processes, readouts, runtime, validation
from .checks import public_config
from .runtime import logger

METRICS = "metrics.jsonl"


class Progress:
    """Where the run stands, and its losses, kept on the device until the logging interval ends.

    `step` counts weight updates up to `total`, `samples_seen` samples over all processes. Both start at `position`, the
    manifest of the checkpoint that is resumed from, or {}. Each process drives `devices` of the kind `device`.
    """

    def __init__(self, args, accelerator, dataset, position: dict, devices: int = 1, device: str | None = None):
        self.args, self.accelerator, self.dataset = args, accelerator, dataset
        self.devices, self.device = devices * accelerator.num_processes, device or accelerator.device
        self.effective_batch, self.total = loading.plan_updates(args, len(dataset), self.devices)
        self.step, self.samples_seen = position.get("step", 0), position.get("samples_seen", 0)
        if position.get("dataset_size", len(dataset)) != len(dataset):
            logger.warning("the data set's size has changed since the checkpoint: samples are seen in a new order")
        if position.get("effective_batch", self.effective_batch) != self.effective_batch:
            logger.warning(f"the effective batch is now {self.effective_batch}, not {position['effective_batch']}")
        self._losses, self._grad_norms, self._indices = [], [], []
        # (loss, gradient norm) of each update that is read, but in no row yet
        self._unreported = list(position.get("unreported", []))
        self._file = Path(args.output_dir) / METRICS
        self._bar = None

    def position(self) -> dict:
        """What a checkpoint has to know to continue from here."""
        return {
            "step": self.step,
            "samples_seen": self.samples_seen,
            "seed": self.args.seed,
            "effective_batch": self.effective_batch,
            "dataset_size": len(self.dataset),
            "unreported": self._unreported,
        }

    def validation_due(self) -> bool:
        """Whether the update just counted completed a multiple of --validation_epochs epochs, and is not the last."""
        period = self.args.validation_epochs * len(self.dataset)
        completed = self.samples_seen // period > (self.samples_seen - self.effective_batch) // period
        return bool(self.args.validation_prompts) and completed and self.step < self.total

    def begin(self, network, objective: Callable | None, gauge=None) -> None:
        """Open bar, metrics file and trackers: the run is ready to take steps on `objective(network, batch)`.

        With a `gauge` of other devices than PyTorch's both may be None.
        """
        main = self.accelerator.is_main_process
        if main:
            # Not earlier: what fails before leaves an earlier run's as it was.
            runtime.write_config(self.args, resumed=self.step > 0)
            if self.step == 0 and self._file.exists():
                logger.warning(f"{self._file.parent} holds the result of an earlier run: this one will replace it")
            _keep_metrics_until(self._file, self.step)
            if self.step == 0:
                validation.clear(self.args.output_dir)
        config = public_config(self.args)  # trackers take scalars only
        config = {name: value if isinstance(value, int | float | str) else str(value) for name, value in config.items()}
        project = getattr(self.args, "tracker_project_name", "text2image-fine-tune")
        logs = Path(self.args.output_dir, self.args.logging_dir)
        if main:
            logs.mkdir(parents=True, exist_ok=True)
        wandb = {"dir": os.environ.get("WANDB_DIR", str(logs))}  # by itself it writes into the working directory
        with runtime.readable_errors("--report_to", self.args.report_to):
            self.accelerator.init_trackers(project, config=config, init_kwargs={"wandb": wandb})
        logger.info(
            f"{len(self.dataset)} samples, {self.effective_batch} an update, {self.total} updates "
            f"({self.total * self.effective_batch / len(self.dataset):.1f} epochs); "
            f"{self.devices} x {self.device}, mixed precision {self.args.mixed_precision}"
        )
        interval = 0.1 if sys.stderr.isatty() else 10.0  # a log file wants lines, not an animation
        self._bar = runtime.progress_bar = tqdm(
            total=self.total, initial=self.step, disable=not main, mininterval=interval, unit="step", dynamic_ncols=True
        )
        gauge = gauge or readouts.Gauge(network, objective, self.args, self.accelerator)
        self._speed = readouts.Speedometer(gauge, self.accelerator)
        self.restart_clock()

    def restart_clock(self) -> None:
        """Leave out what just happened (a checkpoint, validation) from the readouts of speed."""
        self._speed.restart(self.samples_seen)

    def add(self, loss, batch: dict[str, torch.Tensor]) -> None:
        """Take one micro-batch and its loss, a scalar on the device, PyTorch's or JAX's. Waits for nothing."""
        self._losses.append(_detached(loss))
        self._indices.append(batch["index"])
        self._speed.count(batch)

    def update(self, grad_norm, learning_rate: float) -> None:
        """Count one weight update; at the end of a logging interval read the device and report."""
        self.step += 1
        self.samples_seen += self.effective_batch
        self._grad_norms.append(_detached(grad_norm))
        self._learning_rate = learning_rate
        if self.step % self.args.logging_steps == 0 or self.step == self.total:
            self._report()
        self._bar.update()

    def read(self) -> None:
        """Read the losses since the last time and stop on a non-finite one. All processes call it."""
        if not self._grad_norms:
            return
        updates = len(self._grad_norms)
        losses = _stack(self._losses).view(updates, -1).mean(1)  # (updates,)
        losses = self.accelerator.reduce(losses, reduction="mean")
        values = torch.stack([losses, _stack(self._grad_norms)]).tolist()  # the only wait for the device
        self._stop_if_not_finite(*values)
        self._unreported += zip(*values, strict=True)
        self._losses, self._grad_norms, self._indices = [], [], []

    def _report(self) -> None:
        """Read the losses, and write down those of the logging interval that ends here."""
        self.read()
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
            shown = f"loss={row['loss']:.4f}, lr={row['lr']:.1e}, {readouts.shown(row)}"
            self._bar.set_postfix_str(shown, refresh=False)
        values = {"train_loss" if name == "loss" else name: value for name, value in row.items() if name != "step"}
        self.accelerator.log({name: value for name, value in values.items() if value is not None}, step=self.step)

    def _stop_if_not_finite(self, losses: list[float], grad_norms: list[float]) -> None:
        """A loss scaler skips non-finite gradients by design; elsewhere they, like a non-finite loss, end the run."""
        scaled = self.args.mixed_precision == "fp16"
        for i, (loss, grad_norm) in enumerate(zip(losses, grad_norms, strict=True)):
            if math.isfinite(loss) and (scaled or math.isfinite(grad_norm)):
                continue
            micro_batches = len(self._indices) // len(losses)
            indices = [int(k) for batch in self._indices[i * micro_batches : (i + 1) * micro_batches] for k in batch]
            names = [data.describe(self.dataset, self.args.image_column, index) for index in gather_object(indices)]
            what = f"loss {loss}" if not math.isfinite(loss) else f"gradient norm {grad_norm}"
            step = self.step - len(losses) + i + 1
            if not self.accelerator.is_main_process:
                processes.wait(
                    self.accelerator
                )  # until the end of the main one, which says it: a launcher kills the others
                raise SystemExit(1)
            runtime.fail(
                f"{what} at step {step}, nothing saved since; the step's samples: {'; '.join(names)}. "
                "Try a lower --learning_rate, bf16 in place of fp16, or without these samples"
            )

    def close(self) -> None:
        """End bar, trackers and process group; draw the curves."""
        processes.wait(self.accelerator)
        self._bar.close()
        if self.accelerator.is_main_process:
            draw_curves(self._file.parent)
        self.accelerator.end_training()


def _detached(scalar):
    return scalar.detach() if isinstance(scalar, torch.Tensor) else scalar


def _stack(scalars: list) -> torch.Tensor:
    """(N,) float32, on the device that PyTorch's scalars are on; JAX's are waited for, and read."""
    if isinstance(scalars[0], torch.Tensor):
        return torch.stack(scalars).float()
    return torch.tensor([float(scalar) for scalar in scalars])


def _keep_metrics_until(file: Path, step: int) -> None:
    """Drop the rows after `step`, which a resumed run writes again, and a half-written last line."""
    rows = []
    if file.exists() and step > 0:
        rows = [row for row in read_metrics(file.parent) if row["step"] <= step]
    files.write_text(file, "".join(json.dumps(row) + "\n" for row in rows))


def read_metrics(output_dir) -> list[dict]:
    """The rows of metrics.jsonl, in order; a last line cut short by a crash is left out, as is what is no row."""
    rows = []
    for line in (Path(output_dir) / METRICS).read_bytes().splitlines():
        try:
            row = json.loads(line)
            norm = row["grad_norm"]
            if type(row["step"]) is not int or not all(map(_is_number, (row["loss"], row["lr"], norm or 0.0))):
                raise ValueError
            rows.append(row)
        except (ValueError, KeyError, TypeError, RecursionError):
            logger.logger.warning(f"{METRICS}: left out a damaged line")  # accelerate's adapter wants a run under way
    return rows


def _is_number(value) -> bool:
    return type(value) in (int, float) and abs(value) < 1e300  # and not nan


def draw_curves(output_dir) -> Path | None:
    """training_curves.png: loss (raw and smoothed), learning rate and gradient norm over the steps."""
    rows = read_metrics(output_dir)
    if not rows:
        return None
    figure, path = _figure(rows), Path(output_dir) / "training_curves.png"
    with files.whole(path) as file:
        figure.savefig(file, dpi=100, format="png")
    return path


def _figure(rows: list[dict]):
    from matplotlib.figure import Figure  # not pyplot: it would pick a display and a global state

    steps, losses = [row["step"] for row in rows], [row["loss"] for row in rows]
    smooth, smoothed = 0.0, []
    for i, loss in enumerate(losses, 1):
        smooth = 0.9 * smooth + 0.1 * loss
        smoothed.append(smooth / (1 - 0.9**i))  # as Adam corrects it: the first values do not linger
    figure = Figure(figsize=(12, 3.4), layout="constrained")
    panels = figure.subplots(1, 3)
    panels[0].plot(steps, losses, color="0.75", linewidth=0.8, label="interval mean")
    panels[0].plot(steps, smoothed, color="tab:blue", label="smoothed")
    panels[0].legend(frameon=False)
    for panel, title in zip(panels, ("loss", "lr", "grad_norm"), strict=True):
        if title != "loss":
            panel.plot(steps, [math.nan if row[title] is None else row[title] for row in rows], color="tab:blue")
        panel.set(title={"lr": "learning rate", "grad_norm": "gradient norm"}.get(title, title), xlabel="step")
        panel.spines[["top", "right"]].set_visible(False)
    return figure
