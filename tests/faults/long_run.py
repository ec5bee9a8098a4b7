"""Whether a long run holds on to memory, open files or threads: a run of thousands of updates, watched from outside.

    python tests/faults/long_run.py                                   # 5000 updates
    python tests/faults/long_run.py --updates 20000 --cache_encodings

The Stable Diffusion script trains a tiny model, with loader workers, trackers, an average, and a checkpoint and a
validation every tenth of the run. Each second `/proc` is asked for its memory, open files and threads, and for the
memory of it and its workers together that is no file's (PSS: what several share is counted once). The table has a line
for each twentieth of the run. After the warm-up, its first fifth, the second half must hold no more memory than the
first, within --growth percent, not more open files at any time (tensors under way from the workers have one each, so
their number swings), and always as many threads and processes, or the exit status is 1. Linux alone.
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

WARM_UP, LINES = 0.2, 20
COLUMNS = ("rss_mib", "tree_mib", "handles", "threads", "processes")


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
        return {
            "rss_mib": _kib(process / "status", "VmRSS:") / 1024,
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
    """(exit status, what was seen each second) of a run."""
    seen, start = [], time.monotonic()
    environment = os.environ | {"ACCELERATE_USE_CPU": "true", "HF_HUB_OFFLINE": "1"}
    with open(log, "w", encoding="utf-8") as file:
        run = subprocess.Popen([sys.executable, *tokens], stdout=file, stderr=subprocess.STDOUT, env=environment)
    while run.poll() is None:
        if found := look(run.pid):
            seen.append({"step": last_step(output_dir / "metrics.jsonl"), "seconds": time.monotonic() - start, **found})
        time.sleep(1)
    return run.returncode, [sight for sight in seen if sight["step"]]


def summary(seen: list[dict], updates: int) -> list[dict]:
    """A line for each twentieth of the run: the medians of what was seen in it, and the most handles."""
    lines = []
    for i in range(LINES):
        part = [one for one in seen if i * updates <= LINES * one["step"] < (i + 1) * updates]
        if part:
            medians = {name: statistics.median(one[name] for one in part) for name in COLUMNS}
            most = {"most_handles": max(one["handles"] for one in part)}
            lines.append({"step": part[-1]["step"], "seconds": part[-1]["seconds"], **medians, **most})
    return lines


def faults(lines: list[dict], updates: int, growth: float) -> list[str]:
    """What grew after the warm-up."""
    steady = [line for line in lines if line["step"] > WARM_UP * updates]
    if len(steady) < 4:
        return ["too short to tell: more --updates"]
    found, half = [], len(steady) // 2
    for name in ("rss_mib", "tree_mib"):
        first, last = (statistics.mean(line[name] for line in part) for part in (steady[:half], steady[-half:]))
        if last > first * (1 + growth / 100):
            found.append(f"{name} grew by {last / first - 1:.1%}, from {first:.0f} to {last:.0f}")
    first, last = (max(line["most_handles"] for line in part) for part in (steady[:half], steady[-half:]))
    if last > first + 4:
        found.append(f"the most handles at a time grew from {first} to {last}")
    for name in ("threads", "processes"):
        if len(values := {line[name] for line in steady}) > 1:
            found.append(f"{name} did not stay the same: {sorted(values)}")
    return found


def command(args, folder: Path) -> list[str]:
    pictures, period = tiny.make_pictures(folder / "pictures", 10), args.updates // 10
    switches = [f"--{name}" for name in ("cache_encodings",) if getattr(args, name)]
    return [
        str(tiny.SCRIPTS["sd"]), f"--pretrained_model_name_or_path={tiny.make_stable_diffusion(folder / 'model')}",
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
    parser.add_argument("--growth", type=float, default=3.0, help="percent by which memory may grow")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory(prefix="t2i-long-run-") as name:
        folder = Path(name)
        status, seen = watch(command(args, folder), folder / "out", folder / "run.log")
        log = (folder / "run.log").read_text(encoding="utf-8", errors="replace")
    lines = summary(seen, args.updates)
    shown = ("step", "seconds", *COLUMNS, "most_handles")
    print(" ".join(f"{name:>9}" for name in shown))
    for line in lines:
        print(" ".join(f"{line[name]:{max(9, len(name))}.0f}" for name in shown))
    found = faults(lines, args.updates, args.growth) if status == 0 else [f"exit status {status}: {log[-2000:]}"]
    print("\n".join(f"FAULT: {fault}" for fault in found) or f"flat after the warm-up, {len(seen)} looks")
    return bool(found)


if __name__ == "__main__":
    sys.exit(main())
