"""What a row of metrics.jsonl says about speed and memory. All of it is read on the main process, without waiting."""

import time
from collections.abc import Callable, Iterator

import torch

from . import flops
from .runtime import logger

_END = object()
_waited = 0.0  # seconds that `timed` has waited for data in this process


def timed(iterator: Iterator) -> Iterator:
    """The same items; the time that `next` takes counts as waiting for data."""
    global _waited
    while True:
        start = time.perf_counter()
        item = next(iterator, _END)
        _waited += time.perf_counter() - start
        if item is _END:
            return
        yield item


class Speedometer:
    """Speed since the last row, pauses left out, and memory since the last row.

    `objective(network, batch)` is what is optimised: its FLOPs are counted at the first micro-batch, if it is given.
    """

    def __init__(self, network, objective: Callable, args, accelerator):
        self.accelerator, self._uncounted = accelerator, (objective, network) if objective else None
        self._flops, self._peak = None, None  # FLOPs a sample; TFLOP/s of the device
        if accelerator.device.type == "cuda":
            name, tf32 = torch.cuda.get_device_name(accelerator.device), getattr(args, "allow_tf32", False)
            self._peak = flops.peak_tflops(name, accelerator.mixed_precision, tf32)
            torch.cuda.reset_peak_memory_stats(accelerator.device)

    def restart(self, samples_seen: int) -> None:
        """Leave out the time since the last row, and the memory that was used in it."""
        if self.accelerator.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.accelerator.device)
        self._start, self._start_samples, self._start_waited = time.perf_counter(), samples_seen, _waited

    def count(self, batch: dict[str, torch.Tensor]) -> None:
        """Count the FLOPs of a sample, the first time; a readout must not end a run, so a failure is a warning."""
        if self._uncounted is None or not self.accelerator.is_main_process:
            return
        uncounted, self._uncounted, start = self._uncounted, None, time.perf_counter()
        try:
            self._flops = flops.count(*uncounted, batch) / len(batch["index"])
        except Exception as error:  # an attention kernel that cannot be run on fakes, say
            logger.warning(f"FLOPs are not counted: {type(error).__name__}: {' '.join(str(error).split())[:200]}")
        self._start += time.perf_counter() - start

    def row(self, samples_seen: int, effective_batch: int) -> dict[str, float]:
        """images_per_second over all processes; seconds_per_step, of an update; data_wait, the share of the time spent
        waiting for data (0..1); on CUDA peak_memory_gib, allocated by this process; tflops_per_second of the trained
        network, per device; mfu, their share (0..1) of what the device could do, if that is known."""
        seconds, samples = max(time.perf_counter() - self._start, 1e-9), samples_seen - self._start_samples
        row = {
            "images_per_second": round(samples / seconds, 3),
            "seconds_per_step": round(seconds / samples * effective_batch, 6),
            "data_wait": round((_waited - self._start_waited) / seconds, 4),
        }
        device = self.accelerator.device
        if device.type == "cuda":
            row["peak_memory_gib"] = round(torch.cuda.max_memory_allocated(device) / 2**30, 3)
            torch.cuda.reset_peak_memory_stats(device)
        if self._flops:
            tflops = self._flops * samples / seconds / self.accelerator.num_processes / 1e12
            row["tflops_per_second"] = float(f"{tflops:.4g}")
            if self._peak:
                row["mfu"] = round(tflops / self._peak, 4)
        return row


def shown(row: dict) -> str:
    """A row's readouts for the progress bar."""
    texts = [f"images/s={row['images_per_second']:.1f}", f"data={row['data_wait']:.0%}"]
    texts += [f"GiB={row['peak_memory_gib']:.1f}"] if "peak_memory_gib" in row else []
    texts += [f"mfu={row['mfu']:.0%}"] if "mfu" in row else []
    return ", ".join(texts)
