"""Runs of the training scripts in forks of this process, and what kills them.

A fork has the imports behind it: a run costs its own seconds alone. On its board it says which phase it is in; so a
kill can be aimed at a phase, and be counted under the one that it fell into.
"""

import contextlib
import faulthandler
import functools
import gc
import importlib
import importlib.util
import io
import os
import signal
import sys
import time
import traceback
from dataclasses import dataclass
from pathlib import Path

import conftest
import tiny
import tiny_kandinsky
import tqdm
from board import PHASES, Board
from scripts import SCRIPTS

from t2i_training.sd_flax import flags

STEPS, KEPT = 4, 2
EVERY = {  # script -> its flags besides those of conftest.short_run
    "max_train_steps": STEPS, "train_batch_size": 4, "checkpointing_steps": 1, "checkpoints_total_limit": KEPT,
    "logging_steps": 2, "validation_epochs": 2, "resume_from_checkpoint": "latest", "resolution": 16,
}  # fmt: skip
JAX = {  # JAX's settings: programs are compiled quickly, and by the first run alone
    "jax_platforms": "cpu", "jax_disable_most_optimizations": True, "jax_persistent_cache_min_compile_time_secs": 0,
    "jax_persistent_cache_min_entry_size_bytes": -1,
}  # fmt: skip
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT
HUNG, STOPS = "hung", (signal.SIGTERM, signal.SIGINT)
CHANGES = ("os.rename", "os.remove", "os.rmdir", "os.mkdir")


def runnable() -> list[str]:
    """Those that can be run here: JAX is optional."""
    jax = all(importlib.util.find_spec(package) for package in flags.PACKAGES)
    return [name for name in SCRIPTS if jax or name != "sd_flax"]


def load(names: list[str], programs: Path) -> None:
    """Import the scripts, and what they import when they first need it: forks have all of it.

    JAX keeps its compiled programs in the folder `programs`.
    """
    for module in ("datasets", "matplotlib.backends.backend_agg", "peft"):
        importlib.import_module(module)
    tqdm.tqdm.monitor_interval = 0  # its thread may hold a lock when this process forks
    for name in names:
        conftest.load_script(name)
    if "sd_flax" in names:
        for name, value in (JAX | {"jax_compilation_cache_dir": str(programs)}).items():
            sys.modules["jax"].config.update(name, value)
    for library in ("diffusers", "transformers"):
        importlib.import_module(library).utils.logging.disable_progress_bar()


def make_models(folder: Path) -> dict:
    """The tiny models and images of all runs, as flags of conftest.short_run."""
    prior = tiny_kandinsky.make_prior(folder / "prior")
    return {
        "sd": tiny.make_stable_diffusion(folder / "sd"), "prior": prior,
        "decoder": tiny_kandinsky.make_decoder(folder / "decoder", prior),
        "pictures": tiny.make_pictures(folder / "pictures"),
    }  # fmt: skip


def command(script: str, models: dict, output_dir: Path, **changes) -> list[str]:
    """The tokens of a run."""
    values = conftest.short_run(models["sd"], models["pictures"], output_dir)
    if SCRIPTS[script].base != "model":
        values |= {f"pretrained_{part}_model_name_or_path": models[part] for part in ("prior", "decoder")}
        del values["pretrained_model_name_or_path"]
    known = SCRIPTS[script]
    values |= EVERY | known.draws | known.validates | known.resumed | ({"learning_rate": 1e-2} if known.is_lora else {})
    values |= changes
    return conftest.flags(**{name: value for name, value in values.items() if f"--{name} " in _help(script)})


@functools.cache
def _help(script: str) -> str:
    """Where the flags stand that a script has."""
    with contextlib.redirect_stdout(io.StringIO()) as text, contextlib.suppress(SystemExit):
        conftest.load_script(script).parse_args(["--help"])
    return text.getvalue().replace("\n", " \n").replace("]", " ]")


@dataclass
class Kill:
    """When and how a run is killed: at the `count`-th entry into `phase` or, `at_change`, at its `count`-th change.

    Then after `delay` seconds. Without a phase `delay` counts from the start of the run.
    """

    number: int
    delay: float = 0.0
    phase: str | None = None
    count: int = 1
    at_change: bool = False

    def __str__(self):
        place = f"{'change' if self.at_change else 'entry'} {self.count} of {self.phase} + " if self.phase else ""
        return f"{signal.Signals(self.number).name} at {place}{1000 * self.delay:.1f} ms"


class Victim:
    """A run in a fork. `wait` gives its exit status, -n for a death by signal n, and HUNG where it did not end."""

    def __init__(self, script: str, tokens: list[str], output_dir: Path, log: Path, kill: Kill | None = None):
        self.board, self.log, self.kill, self.killed_in = Board(), log, kill, None
        self._began, self.status = time.monotonic(), None
        sys.stdout.flush()
        # What Python does after a fork passes over exceptions: a signal there would leave locks as they were, for ever.
        signal.pthread_sigmask(signal.SIG_BLOCK, STOPS)
        self.pid = os.fork()
        if self.pid == 0:
            _run(script, tokens, output_dir, log, self.board, kill)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPS)

    def _ended(self) -> bool:
        if self.status is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self.status = os.waitstatus_to_exitcode(status) if pid else None
        return self.status is not None

    def wait(self, limit: float = 200.0) -> int | str:
        """Kill it as planned, and see it end. If it does not, its log says where it hangs."""
        kill = self.kill
        if kill is not None and not kill.at_change:
            entries = self.board.entries
            while kill.phase and entries[PHASES.index(kill.phase)] < kill.count and not self._ended():
                time.sleep(0.0003)
            end = (time.monotonic() if kill.phase else self._began) + kill.delay
            while time.monotonic() < end and not self._ended():
                time.sleep(0.0003)
            if not self._ended():
                self.killed_in = self.board.phase
                os.kill(self.pid, kill.number)
        while not self._ended():
            time.sleep(0.002)
            if time.monotonic() - self._began > limit:
                os.kill(self.pid, signal.SIGQUIT)
                time.sleep(1)
                os.kill(self.pid, signal.SIGKILL)
                os.waitpid(self.pid, 0)
                self.status = HUNG
                return HUNG
        if self.status == -signal.SIGALRM:  # which stands for SIGKILL, see _at_change
            self.status = -signal.SIGKILL
        if kill is not None and kill.at_change and self.board.changes[PHASES.index(kill.phase)] >= kill.count:
            self.killed_in = kill.phase
        if self.status == -signal.SIGKILL:
            self.killed_in = self.board.phase
        elif self.status == 0 and kill is not None and kill.number == signal.SIGKILL:
            self.killed_in = None  # it was over before
        return self.status


def _run(script, tokens, output_dir, log, board, kill) -> None:
    """In the fork: the run, until its end or death."""
    status = 1
    gc.freeze()  # or the first collection goes through, and copies, all that was imported
    try:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPS)
        descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        null = os.open(os.devnull, os.O_RDONLY)
        for source, target in ((null, 0), (descriptor, 1), (descriptor, 2)):
            os.dup2(source, target)
        faulthandler.register(signal.SIGQUIT)
        module = conftest.load_script(script)
        board.wrap_all(module)
        _watch_changes(board, str(output_dir), kill)
        from t2i_training.report import flops, validation

        flops.count = lambda *_: 1.0  # half a second in every run, for a readout
        validation.STEPS = conftest.SAMPLING_STEPS
        module.main(tokens)
        board.enter("end")  # and its time counts
        status = 0
    except SystemExit as stop:
        status = stop.code if isinstance(stop.code, int) else 1
        print(stop.code, file=sys.stderr)
    except KeyboardInterrupt:
        status = 128 + signal.SIGINT
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(status)


def _watch_changes(board: Board, output_dir: str, kill: Kill | None) -> None:
    owner = os.getpid()

    def watch(event, arguments):
        if event == "open":
            path, _, flags = arguments
            ours = flags & WRITES and isinstance(path, str | Path) and str(path).startswith(output_dir)
        elif event in CHANGES:  # rmtree names its files relatively to an open folder
            ours = str(arguments[0]).startswith(output_dir) or arguments[-1] != -1
        else:
            return
        if ours and os.getpid() == owner:
            phase = PHASES.index(board.phase)
            board.changes[phase] += 1
            if kill and kill.at_change and kill.phase == PHASES[phase] and kill.count == board.changes[phase]:
                _at_change(kill)

    sys.addaudithook(watch)


def _at_change(kill: Kill) -> None:
    """Before the change, or SIGKILL in the midst of it: by the kernel's clock, whose signal nothing here handles."""
    if kill.number == signal.SIGKILL and kill.delay:
        signal.setitimer(signal.ITIMER_REAL, kill.delay)
    else:
        os.kill(os.getpid(), kill.number)
