"""What is not the rate: starts with and without encodings on disk, --help, and the stall of a checkpoint."""

import dataclasses
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

import pictures
import rates
import runs

SAVE_EVERY, SAVES = 4, 2


def cache_starts(bench: rates.Bench, tiny: dict[str, Path], count: int) -> dict[str, float]:
    """Seconds from the start of the process to the first update, of the tiny Stable Diffusion on `count` images."""
    data = pictures.make(bench.work / "pictures" / f"8px-{count}", count, (8, 8))
    encodings = bench.work / "encodings" / f"starts-{count}"
    shutil.rmtree(encodings, ignore_errors=True)
    bench = dataclasses.replace(bench, pipelines=tiny, pictures=data, resolution=64)
    seconds = {}
    # `datasets` reads the folder once and keeps what it found: the first run pays, and is not shown.
    for kind, variant in (("", rates.PLAIN), ("plain", rates.PLAIN), ("cold", rates.CACHED), ("warm", rates.CACHED)):
        given = {} if variant == rates.PLAIN else {"encodings_dir": encodings}
        with bench.start("sd", variant, runs.own_script("sd"), train_batch_size=4, **given) as run:
            seconds[kind] = run.started
    shutil.rmtree(encodings)
    return seconds


def help_seconds(script: Path, repetitions: int = 3) -> float:
    """Until --help is on the screen."""

    def once() -> float:
        began = time.perf_counter()
        subprocess.run([sys.executable, script, "--help"], capture_output=True, check=False)
        return time.perf_counter() - began

    return statistics.median(once() for _ in range(repetitions))


def checkpoint_stall(bench: rates.Bench, name: str, variant: str, script: Path) -> tuple[str, str]:
    """(seconds for which the loop stands still to save, size of a checkpoint in GB); why not, if it did not run."""
    changes = {"checkpointing_steps": SAVE_EVERY, "checkpoints_total_limit": 1}
    try:
        run = bench.start(name, variant, script, **changes)
    except runs.Failed:
        return "does not start", "-"
    with run:
        # Turn k is update k + 2, and a save after update n falls into the turn of update n + 1.
        seconds = [run.turn(1)[0] for _ in range(SAVE_EVERY * SAVES)]
        folder = bench.work / "outputs" / f"{name}-{variant}"
        size = max(sum(f.stat().st_size for f in c.rglob("*") if f.is_file()) for c in folder.glob("checkpoint-*"))
    saving = seconds[SAVE_EVERY - 1 :: SAVE_EVERY]
    other = [s for i, s in enumerate(seconds) if (i + 1) % SAVE_EVERY]
    return f"{statistics.mean(saving) - statistics.median(other):.2f}", f"{size / 1e9:.3g}"
