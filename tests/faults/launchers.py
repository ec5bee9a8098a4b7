"""Stop runs under each launcher and print, as a table, what came of it: what is saved, exit status, processes left.

    python tests/faults/launchers.py [--signals TERM USR1] [--launchers python ...]

A run of a tiny model on the CPU is sent a signal after its third update: to the process that was started (as `kill`,
`docker stop` and `timeout` do), to its process group (Ctrl-C, `systemd`), or to the script's first process alone.
"""

import argparse
import contextlib
import itertools
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

TESTS = Path(__file__).parents[1]
sys.path.insert(0, str(TESTS))

import tiny  # noqa: E402
from conftest import flags, free_port, short_run  # noqa: E402
from scripts import TORCH  # noqa: E402

TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]
ACCELERATE = [sys.executable, "-m", "accelerate.commands.launch"]
LAUNCHERS = {
    "python": [sys.executable],
    "srun, 2 tasks": [sys.executable, __file__, "--tasks", "PORT"],
    "torchrun, 1 process": [*TORCHRUN, "--nproc_per_node=1", "--master_port=PORT"],
    "torchrun, 2 processes": [*TORCHRUN, "--nproc_per_node=2", "--master_port=PORT"],
    "torchrun, 2 processes, --signals-to-handle": [
        *TORCHRUN, "--nproc_per_node=2", "--master_port=PORT",
        "--signals-to-handle=SIGTERM,SIGINT,SIGHUP,SIGUSR1,SIGUSR2",
    ],
    "accelerate launch, 1 process": [*ACCELERATE, "--num_processes=1", "--num_machines=1", "--mixed_precision=no",
                                     "--dynamo_backend=no"],
    "accelerate launch --multi_gpu, 2 processes": [
        *ACCELERATE, "--multi_gpu", "--num_processes=2", "--num_machines=1", "--mixed_precision=no",
        "--dynamo_backend=no", "--main_process_port=PORT",
    ],
}  # fmt: skip
TARGETS = ("launcher", "group", "script")
PATIENCE = 400  # seconds


def start_tasks(port: str, command: list[str]) -> int:
    """Start two processes as Slurm's srun does, without a launcher; the greater of their exit statuses."""
    stops = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)
    for number in stops:
        signal.signal(number, signal.SIG_IGN)  # `scancel --signal` and a time limit reach the tasks
    world = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    ranks = [os.environ | world | {"RANK": rank, "LOCAL_RANK": rank} for rank in "01"]

    def heed():  # what is ignored stays so in a child
        for number in stops:
            signal.signal(number, signal.SIG_DFL)

    tasks = [subprocess.Popen([sys.executable, *command], env=environment, preexec_fn=heed) for environment in ranks]
    return max(task.wait() for task in tasks)


def processes_with(word: str) -> list[int]:
    """Running processes in whose command line the word stands, oldest first. Linux only."""
    found = []
    for folder in Path("/proc").iterdir():
        with contextlib.suppress(OSError, ValueError):
            state = (folder / "stat").read_text().rpartition(")")[2].split()[0]
            if state != "Z" and word.encode() in (folder / "cmdline").read_bytes().split(b"\0"):
                found.append(int(folder.name))
    return sorted(found)


def wait_until(condition, seconds: float = PATIENCE) -> bool:
    end = time.monotonic() + seconds
    while not (met := condition()) and time.monotonic() < end:
        time.sleep(0.05)
    return bool(met)


def stop(launcher: str, target: str, number: int, model: Path, pictures: Path, folder: Path) -> tuple[str, str, str]:
    """(what is saved, exit status of what was started, processes that it left) of one run."""
    out, log = folder / "out", folder / "log"
    # No checkpoint but that of the stop: a run that trains on would come to others.
    tokens = flags(**short_run(model, pictures, out) | {"max_train_steps": 10**6, "checkpointing_steps": 10**6})
    command = [word.replace("PORT", str(free_port())) for word in LAUNCHERS[launcher]]
    environment = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    with open(log, "wb") as file:
        started = subprocess.Popen(
            [*command, str(TORCH["sd"].path), *tokens], stdout=file, stderr=file, env=environment,
            start_new_session=True,
        )  # fmt: skip
    rows = out / "metrics.jsonl"
    if not wait_until(lambda: rows.exists() and rows.read_bytes().count(b"\n") >= 3):
        os.killpg(started.pid, signal.SIGKILL)
        raise SystemExit(f"error: {launcher}: no update within {PATIENCE} s\n{log.read_text()[-3000:]}")
    launching = len(command) > 1
    script = next(pid for pid in processes_with(str(out)) if pid != started.pid) if launching else started.pid
    if target == "group":
        os.killpg(started.pid, number)
    else:
        os.kill(started.pid if target == "launcher" else script, number)
    try:
        status = str(started.wait(PATIENCE))
    except subprocess.TimeoutExpired:
        status = "runs on"
    time.sleep(0.5)
    left = processes_with(str(out))
    orphans = ""
    if left:
        ends = status != "runs on" and wait_until(lambda: not processes_with(str(out)), 30)
        orphans = "ends by itself" if ends else "trains on"
    for pid in processes_with(str(out)):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    saved = ", ".join(path.name for path in out.glob("checkpoint-*"))
    return "the step" if saved else "nothing", status, f"{len(left)}, {orphans}" if left else "none"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--signals", nargs="+", default=["TERM", "USR1"], help="Without SIG.")
    parser.add_argument("--launchers", nargs="+", default=list(LAUNCHERS), choices=list(LAUNCHERS))
    parser.add_argument("--targets", nargs="+", default=list(TARGETS), choices=TARGETS)
    args = parser.parse_args()
    print("| launcher | signal | sent to | saved | exit status | processes left |\n|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        model = tiny.make_stable_diffusion(Path(folder, "model"))
        pictures = tiny.make_pictures(Path(folder, "pictures"))
        cases = itertools.product(args.launchers, args.signals, args.targets)
        for i, (launcher, name, target) in enumerate(cases):
            if (launcher, target) in (("python", "script"), ("srun, 2 tasks", "launcher")):
                continue  # the script is what was started; what stands for srun hands nothing on
            place = Path(folder, str(i))
            place.mkdir()
            result = stop(launcher, target, signal.Signals[f"SIG{name}"], model, pictures, place)
            print("|", " | ".join([launcher, f"SIG{name}", target, *result]), "|", flush=True)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--tasks"]:
        sys.exit(start_tasks(sys.argv[2], sys.argv[3:]))
    main()
