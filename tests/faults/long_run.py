"""Whether a long run holds on to memory, open files or threads: a run of thousands of updates, watched from outside.

    python tests/faults/long_run.py                                   # 5000 updates
    python tests/faults/long_run.py --updates 20000 --cache_encodings

The Stable Diffusion script trains a tiny model, with loader workers, trackers, an average, and a checkpoint and a
validation every tenth of the run. Twice a second `/proc` is asked for its memory (rss_mib), that of its workers, their
memory together (tree_mib: not that of files; what several share is counted once), its open files and its threads. The
table has a line for each twentieth of the run.

Then a straight line is laid through the table's second half. A column is flat if its slope, with two standard errors on
top, stays within what is allowed in 1000 updates (`ALLOWED`); it grows if the slope less two standard errors is more
than that; else the run was too short or too restless to tell, which is a fault as well. rss_mib and workers_mib tell of
leaks. tree_mib also rises, by ever less, while the processes write into pages that they have shared since the workers
were forked (counting references is writing); so more of it is allowed. Threads and processes must stay as many. Linux
alone.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
import tiny
from scripts import TORCH

LINES = 20
COLUMNS = ("rss_mib", "workers_mib", "tree_mib", "handles", "threads", "processes")
ALLOWED = {"rss_mib": 2.0, "workers_mib": 2.0, "tree_mib": 3.0, "handles": 1.0}  # more, in 1000 updates


def _tree(pid: int) -> list[int]:
    """A process and all below it."""
    found = [pid]
    for task in Path(f"/proc/{pid}/task").iterdir():
        found += [below for child in (task / "children").read_text().split() for below in _tree(int(child))]
    return found


def _kib(file: Path, name: str) -> int:
    return next(int(line.split()[1]) for line in file.read_text().splitlines() if line.startswith(name))


def _own_kib(pid: int) -> int:
    """Its share of memory that is no file's: libraries count less the more of the machine's processes have them."""
    return sum(_kib(Path(f"/proc/{pid}/smaps_rollup"), name) for name in ("Pss_Anon:", "Pss_Shmem:"))


def look(pid: int) -> dict | None:
    """What a run holds at this moment; None if it ended, or one of its processes did, meanwhile."""
    process = Path(f"/proc/{pid}")
    try:
        tree = _tree(pid)
        rss, *others = [_kib(Path(f"/proc/{one}/status"), "VmRSS:") / 1024 for one in tree]
        return {
            "rss_mib": rss,
            "workers_mib": sum(others),
            "tree_mib": sum(_own_kib(one) for one in tree) / 1024,
            "handles": len(os.listdir(process / "fd")),
            "threads": _kib(process / "status", "Threads:"),
            "processes": len(tree),
        }
    except (OSError, StopIteration):
        return None


def last_step(metrics: Path) -> int:
    """The step of the last whole line of metrics.jsonl, 0 before the first."""
    lines = metrics.read_bytes().split(b"\n") if metrics.exists() else []
    return json.loads(lines[-2])["step"] if len(lines) > 1 else 0


def watch(tokens: list[str], output_dir: Path, log: Path) -> tuple[int, list[dict]]:
    """(exit status, what was seen twice a second) of a run."""
    seen, start = [], time.monotonic()
    environment = os.environ | {"ACCELERATE_USE_CPU": "true", "HF_HUB_OFFLINE": "1"}
    with open(log, "w", encoding="utf-8") as file:
        run = subprocess.Popen([sys.executable, *tokens], stdout=file, stderr=subprocess.STDOUT, env=environment)
    while run.poll() is None:
        if found := look(run.pid):
            seen.append({"step": last_step(output_dir / "metrics.jsonl"), "seconds": time.monotonic() - start, **found})
        time.sleep(0.5)
    return run.returncode, [sight for sight in seen if sight["step"]]


def summary(seen: list[dict], updates: int) -> list[dict]:
    """A line for each twentieth of the run: medians of what was seen in it, and the fewest handles.

    Tensors under way from the workers have a handle each, so that there are more now and then.
    """
    lines = []
    for i in range(LINES):
        part = [one for one in seen if i * updates <= LINES * one["step"] < (i + 1) * updates]
        if part:
            line = {name: statistics.median(one[name] for one in part) for name in ("step", "seconds", *COLUMNS)}
            lines.append(line | {"handles": min(one["handles"] for one in part)})
    return lines


def slope(lines: list[dict], name: str) -> tuple[float, float]:
    """(by how much a column grows in 1000 updates, standard error of that), by least squares."""
    steps, values = [line["step"] / 1000 for line in lines], [line[name] for line in lines]
    rise, start = statistics.linear_regression(steps, values)
    scatter = sum((value - start - rise * step) ** 2 for step, value in zip(steps, values)) / (len(lines) - 2)
    return rise, (scatter / sum((step - statistics.mean(steps)) ** 2 for step in steps)) ** 0.5


def verdict(lines: list[dict], updates: int) -> tuple[list[str], bool]:
    """(a line for each column, whether all are flat) of the second half of a run."""
    half = [line for line in lines if 2 * line["step"] > updates]
    if len(half) < LINES // 4:
        return ["FAULT: too short to tell: more --updates"], False
    told, flat = [], True
    for name, allowed in ALLOWED.items():
        rise, error = slope(half, name)
        outcome = "flat" if rise + 2 * error <= allowed else "FAULT: grows" if rise - 2 * error > allowed else "FAULT: "
        outcome += "too restless to tell: more --updates" * outcome.endswith(" ")
        told.append(f"{name:11} {rise:+7.2f} +- {2 * error:5.2f} in 1000 updates, {allowed} allowed: {outcome}")
        flat &= outcome == "flat"
    for name in ("threads", "processes"):
        if len(values := {line[name] for line in half}) > 1:
            told.append(f"{name:11} FAULT: did not stay the same: {sorted(values)}")
            flat = False
    return told, flat


def command(args, folder: Path) -> list[str]:
    pictures, period = tiny.make_pictures(folder / "pictures", 10), args.updates // 10
    switches = [f"--{name}" for name in ("cache_encodings",) if getattr(args, name)]
    return [
        str(TORCH["sd"].path), f"--pretrained_model_name_or_path={tiny.make_stable_diffusion(folder / 'model')}",
        f"--train_data_dir={pictures}", f"--output_dir={folder / 'out'}", "--resolution=32", "--train_batch_size=2",
        f"--max_train_steps={args.updates}", f"--checkpointing_steps={period}", "--checkpoints_total_limit=2",
        "--validation_prompts", "a cat", "a dog", f"--validation_epochs={max(1, period // 5)}", "--use_ema", "--seed=3",
        f"--dataloader_num_workers={args.workers}", "--random_flip", "--caption_dropout=0.1", *switches,
    ]  # fmt: skip


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--updates", type=int, default=5000)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--cache_encodings", action="store_true")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory(prefix="t2i-long-run-") as name:
        folder = Path(name)
        status, seen = watch(command(args, folder), folder / "out", folder / "run.log")
        log = (folder / "run.log").read_text(encoding="utf-8", errors="replace")
    if status:
        print(f"FAULT: exit status {status}: {log[-2000:]}")
        return 1
    lines, shown = summary(seen, args.updates), ("step", "seconds", *COLUMNS)
    print(" ".join(f"{name:>11}" for name in shown))
    for line in lines:
        print(" ".join(f"{line[name]:11.{int(name not in ('step', 'seconds'))}f}" for name in shown))
    told, flat = verdict(lines, args.updates)
    print(*told, f"{len(seen)} looks", sep="\n")
    return int(not flat)


if __name__ == "__main__":
    sys.exit(main())
