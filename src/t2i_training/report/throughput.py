"""Measures speed and memory for the rows of metrics.jsonl, on rank 0, without waiting for the device."""

import time
from collections import deque
from collections.abc import Callable, Iterator

import torch

from .. import device
from ..log import logger
from . import flops


class DeviceStats:
    """Peak FLOP/s and memory of PyTorch's devices, and the FLOPs of `objective(network, batch)`."""

    def __init__(self, network, objective: Callable, args, accelerator):
        self._network, self._objective, self._device = network, objective, accelerator.device
        self._flops = {}  # of one sample, by the shapes of its tensors
        self.devices = accelerator.num_processes
        # TFLOP/s of one device, if known
        self.peak = flops.peak_tflops(device.name(self._device), accelerator.mixed_precision, args.allow_tf32)

    def restart(self) -> None:
        """Reset the peak of allocated memory."""
        device.restart_peak_memory(self._device)

    def flops(self, batch: dict[str, torch.Tensor]) -> float:
        """FLOPs of one sample of this micro-batch. They are counted once for each bucket."""
        shapes = tuple(tensor.shape[1:] for tensor in batch.values())
        if shapes not in self._flops:
            self._flops[shapes] = flops.count(self._objective, self._network, batch) / len(batch["index"])
        return self._flops[shapes]

    def peak_memory(self) -> int | None:
        """Peak bytes allocated on this rank's device since the restart; None on a CPU and Apple's GPUs."""
        return device.peak_memory(self._device)


class Throughput:
    """Speed since the last row, without pauses, and memory."""

    def __init__(self, stats, accelerator):
        self.stats, self._counts = stats, accelerator.is_main_process
        self._work, self._worked = 0.0, 0  # FLOPs since the restart of so many samples
        self._settled = None  # (time, samples seen) after the first update
        self._recent = deque(maxlen=10)  # (seconds, samples) of the last rows, without the first update
        self._waited = 0.0  # seconds spent waiting for data since the restart

    def restart(self, samples_seen: int) -> None:
        """Start a new interval of time and peak memory."""
        self.stats.restart()
        self._start, self._start_samples, self._waited = time.perf_counter(), samples_seen, 0.0
        self._work, self._worked = 0.0, 0

    def timed(self, batches: Iterator) -> Iterator:
        """Pass batches through; the time that `next` takes counts as waiting for data."""
        while True:
            start = time.perf_counter()
            try:
                batch = next(batches)
            except StopIteration:
                return
            finally:
                self._waited += time.perf_counter() - start
            yield batch

    def count(self, batch: dict[str, torch.Tensor]) -> None:
        """Add the FLOPs of a micro-batch. A failure to count them is only a warning."""
        if not self._counts:
            return
        start, samples = time.perf_counter(), len(batch["index"])
        try:
            self._work += samples * self.stats.flops(batch)
            self._worked += samples
        except Exception as error:  # e.g. an attention kernel without support for fake tensors
            self._counts = False
            logger.warning(f"FLOPs are not counted: {type(error).__name__}: {' '.join(str(error).split())[:200]}")
        self._start += time.perf_counter() - start

    def count_update(self, samples_seen: int) -> None:
        """Note when the first update ends. It takes longer: workers start, kernels are chosen, networks compiled."""
        self._settled = self._settled or (time.perf_counter(), samples_seen)

    def seconds_for(self, samples: int) -> float | None:
        """Estimated seconds for that many samples, at the rate of the last rows without pauses; None if unknown."""
        seconds, seen = map(sum, zip(*self._recent, strict=True)) if self._recent else (0, 0)
        return 0.0 if not samples else samples * seconds / seen if seen else None

    def row(self, samples_seen: int, effective_batch: int) -> dict[str, float]:
        """images_per_second over all processes; seconds_per_step, of an update; data_wait, the share of the time spent
        waiting for data (0..1); on GPUs peak_memory_gib, allocated by this process; tflops_per_second of the trained
        network, per device; mfu, their share (0..1) of what the device could do, if that is known."""
        seconds, samples = max(time.perf_counter() - self._start, 1e-9), samples_seen - self._start_samples
        start, start_samples = max((self._start, self._start_samples), self._settled or (0.0, 0))
        if samples_seen > start_samples:
            self._recent.append((time.perf_counter() - start, samples_seen - start_samples))
        row = {
            "images_per_second": round(samples / seconds, 3),
            "seconds_per_step": round(seconds / samples * effective_batch, 6),
            "data_wait": round(self._waited / seconds, 4),
        }
        peak_memory = self.stats.peak_memory()
        if peak_memory is not None:
            row["peak_memory_gib"] = round(peak_memory / 2**30, 3)
        if self._counts and self._worked:
            tflops = self._work / self._worked * samples / seconds / self.stats.devices / 1e12
            row["tflops_per_second"] = float(f"{tflops:.4g}")
            if self.stats.peak:
                row["mfu"] = round(tflops / self.stats.peak, 4)
        return row


def shown(row: dict) -> str:
    """A row's measurements as text for the progress bar."""
    texts = [f"images/s={row['images_per_second']:.1f}", f"data={row['data_wait']:.0%}"]
    texts += [f"GiB={row['peak_memory_gib']:.1f}"] if "peak_memory_gib" in row else []
    texts += [f"mfu={row['mfu']:.0%}"] if "mfu" in row else []
    return ", ".join(texts)
