"""Runs that are interrupted, killed and compared.

`interrupt` sends a real signal to this process after a given update. `Server` gives runs a process of their own without
the seconds of imports: it has them behind it, and forks. Started as a program, this file is that server.
"""

import atexit
import contextlib
import gc
import hashlib
import io
import json
import os
import runpy
import signal
import subprocess
import sys
import threading
import time
import traceback
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import SAMPLING_STEPS, free_port, load_script
from safetensors.torch import load_file
from scripts import SCRIPTS, TORCH
from torch.nn.modules.module import register_module_forward_hook
from torch.optim.optimizer import register_optimizer_step_post_hook

# Runs that take their sums in another order (batches, processes, threads, cached encodings, JAX) do not round alike.
# Adam divides a gradient by its own size; where there is mathematically none, as of the bias of attention's keys, which
# softmax does not see, that is rounding noise by itself: an update as large as any, and another one in every order and
# on every processor. Where such runs' weights are compared, epsilon stands far above the noise (1e-9 to 1e-7) and among
# the gradients (1e-4 to 1e-1): noise moves nothing. Measured of the prior's key biases: 1.4e-6 without, 1e-8 with it.
LARGE_EPSILON = {"adam_epsilon": 1e-2}
# What rounding may do then: to a loss or a norm, through tens of layers, 84 units in the last place of a float32
# (2**-23; measured: 4); to a weight, 4 of a number near 1 (measured: 1).
LOSS = {"rel": 1e-5}
WEIGHT = {"rtol": 0, "atol": 5e-7}


@contextlib.contextmanager
def interrupt(update: int, number: int = signal.SIGTERM, last: bool = False):
    """Inside, this process gets a signal within its `update`-th weight update, and the run must end because of it.

    If it is the `last` one, there is nothing that the signal keeps the run from.
    """
    seen = []

    def count(_optimizer, _args, _kwargs):
        seen.append(update)
        if len(seen) == update:
            os.kill(os.getpid(), number)

    hook = register_optimizer_step_post_hook(count)
    try:
        with contextlib.nullcontext() if last else pytest.raises(SystemExit) as stop:
            yield
    finally:
        hook.remove()
    assert last or stop.value.code == 128 + number
    assert len(seen) == update, "the run went on after the update that was interrupted"


@contextlib.contextmanager
def after_update(number: int, action):
    """Inside, `action()` is called within the `number`-th weight update."""
    seen = []

    def count(*_):
        seen.append(number)
        if len(seen) == number:
            action()

    hook = register_optimizer_step_post_hook(count)
    try:
        yield
    finally:
        hook.remove()


@contextlib.contextmanager
def in_memory(kind: type):
    """Yields a list; the network of class `kind` that computes inside, as it stands in memory, is put into it."""
    found = []

    def look(module, _args, _output):
        if isinstance(module, kind) and not any(module is other for other in found):
            found.append(module)

    hook = register_module_forward_hook(look)
    try:
        yield found
    finally:
        hook.remove()


TIMED = (  # what a row holds that depends on the clock or the device
    "images_per_second", "seconds_per_step", "data_wait", "peak_memory_gib", "tflops_per_second", "mfu",
)  # fmt: skip


def rows(folder: Path) -> list[dict]:
    """The rows of metrics.jsonl without what depends on the clock."""
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [{k: v for k, v in json.loads(line).items() if k not in TIMED} for line in lines]


def assert_alike(folder: Path, expected: Path, *files: str) -> None:
    """Two runs are one but for rounding: all rows, and the weights in `files`."""
    for row, wanted in zip(rows(folder), rows(expected), strict=True):
        assert row == pytest.approx(wanted, **LOSS)
    for file in files:
        torch.testing.assert_close(load_file(folder / file), load_file(expected / file), **WEIGHT)


def outcome(folder: Path, step: int, trained: str = SCRIPTS["sd"].trained, tensors: int = 50) -> dict:
    """All that a finished run must leave bit for bit: the last checkpoint, the exported weights and the metrics.

    `trained` is a file that both must hold, `tensors` a number that the optimizer must know more tensors than.

    Of weight files a digest of the bytes; the optimizer's state number by number, for pickles of equal values differ.
    """
    checkpoint = folder / f"checkpoint-{step}"
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    names = set(manifest.pop("files")) - {"optimizer.bin"}
    manifest.pop("digest")  # of the manifest, with the files' own digests in it
    digests = {name: _digest(checkpoint / name) for name in sorted(names)}
    exported = [path for path in (*folder.glob("[!.cl]*/*"), *folder.glob("*.safetensors")) if path.is_file()]
    export = {str(path.relative_to(folder)): _digest(path) for path in sorted(exported)}
    if (checkpoint / "optimizer.bin").exists():
        optimizer = torch.load(checkpoint / "optimizer.bin", weights_only=True)
        known = len(optimizer["state"])
    else:  # the Flax script's, in which a weight has two moments
        optimizer = load_file(checkpoint / "optimizer.safetensors")
        known = sum(".mu[" in name for name in optimizer)
    assert trained in digests
    assert trained in export
    assert known > tensors, "an entry for each tensor that is trained"
    return {
        "manifest": manifest, "files": digests, "export": export, "optimizer": _plain(optimizer), "rows": rows(folder),
    }  # fmt: skip


def _digest(path: Path) -> str:
    data = path.read_bytes()
    if path.suffix == ".safetensors":  # its header is JSON, and holds the metadata in no particular order
        end = 8 + int.from_bytes(data[:8], "little")
        data = json.dumps(json.loads(data[8:end]), sort_keys=True).encode() + data[end:]
    return hashlib.sha256(data).hexdigest()


def _plain(value):
    if isinstance(value, torch.Tensor):
        return [str(value.dtype), list(value.shape), hashlib.sha256(value.numpy().tobytes()).hexdigest()]
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value


def weights(folder: Path, part: str = "unet") -> dict[str, torch.Tensor]:
    return load_file(folder / part / "diffusion_pytorch_model.safetensors")


def checkpoints(folder: Path) -> list[str]:
    """The names of what stands in an output folder as a checkpoint, or as a part of one."""
    return sorted(path.name for path in folder.iterdir() if "checkpoint-" in path.name)


def wait_until(condition, seconds: float = 60.0):
    """The first true value of `condition()`, asked a thousand times a second."""
    end = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.001)
    return value


class Run:
    """A run of a script in processes of its own, one for each environment, each a group with its loader workers."""

    def __init__(self, server: subprocess.Popen, log: Path, **request):
        self.log, self.server = log, server
        server.stdin.write(json.dumps({"log": str(log), **request}) + "\n")
        server.stdin.flush()
        self.pids = json.loads(server.stdout.readline())
        self.ended = False

    def kill(self, number: int) -> None:
        for pid in self.pids:
            os.kill(pid, number)

    def wait_for_all(self) -> list[int]:
        """Their exit statuses; -n for a process that died of signal n."""
        statuses = json.loads(self.server.stdout.readline())
        self.ended = True
        return statuses

    def wait(self) -> int:
        (status,) = self.wait_for_all()
        return status

    def output(self) -> str:
        return self.log.read_text(encoding="utf-8", errors="replace")


class Server:
    """Starts runs, one at a time. Their hub is at `hub_port` of this machine, where a test may let one answer."""

    def __init__(self):
        self.hub_port, self.runs = free_port(), []
        hub = {"HF_ENDPOINT": f"http://127.0.0.1:{self.hub_port}", "HF_HUB_DISABLE_XET": "1"}
        environment = os.environ | hub | {"HF_HUB_DISABLE_TELEMETRY": "1"}
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        self.process = subprocess.Popen([sys.executable, __file__], text=True, env=environment, **pipes)

    def start(
        self, tokens: list[str], folder: Path, script="sd", *, processes=0, environment=None, count_flops=False,
        whole_exit=False,
    ) -> Run:  # fmt: skip
        """`python script tokens` in `folder`, or what a launcher makes of it; its output goes into a file there.

        `script` is one of ours, or the path of a program. What takes seconds of a new process is left out unless asked
        for: FLOPs are not counted, curves are another run's, and the interpreter's teardown is cut short.
        """
        self.end_run()
        environments = [environment or {}]
        if processes:  # what torch.distributed.run tells each of them
            world = {"WORLD_SIZE": processes, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
            world |= {"LOCAL_WORLD_SIZE": processes, "ACCELERATE_USE_CPU": "true"}
            environments = [environments[0] | world | {"RANK": i, "LOCAL_RANK": i} for i in range(processes)]
        path = SCRIPTS[script].path if script in SCRIPTS else script
        request = {
            "script": str(path), "tokens": tokens, "folder": str(folder),
            "environments": [{name: str(value) for name, value in each.items()} for each in environments],
            "count_flops": count_flops, "whole_exit": whole_exit,
        }  # fmt: skip
        self.runs.append(Run(self.process, folder / f"run-{len(self.runs)}.log", **request))
        return self.runs[-1]

    def end_run(self) -> None:
        """Kill what a failed test has left running."""
        if self.runs and not self.runs[-1].ended:
            for pid in self.runs[-1].pids:
                with contextlib.suppress(ProcessLookupError):  # one of several may have ended
                    os.kill(pid, signal.SIGKILL)
            self.runs[-1].wait_for_all()

    def close(self) -> None:
        self.end_run()
        self.process.kill()  # the end of its input would not reach it, while loader workers forked here hold the pipe
        self.process.wait()


LONGEST = 300  # seconds after which a process that waits for another in vain is ended, by SIGALRM


def _serve() -> dict:
    """Fork for each request. Returns, in the children alone, the request to be met."""
    for line in sys.stdin:
        request, statuses = json.loads(line), {}
        if any(name.startswith("JAX_") for name in request["environments"][0]) and "jax" not in sys.modules:
            _import_flax(request["environments"][0])
        for environment in request["environments"]:
            if (pid := os.fork()) == 0:
                os.setpgid(0, 0)
                _enter(environment)
                log = os.open(request["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
                null = os.open(os.devnull, os.O_RDONLY)
                for descriptor, target in ((null, 0), (log, 1), (log, 2)):
                    os.dup2(descriptor, target)
                return request
            statuses[pid] = None
        print(json.dumps(list(statuses)), flush=True)
        while None in statuses.values():
            pid, status = os.wait()
            statuses[pid] = os.waitstatus_to_exitcode(status)
        print(json.dumps(list(statuses.values())), flush=True)
    sys.exit()


def _import_flax(environment: dict[str, str]) -> None:
    """What a Flax run of that environment needs, for it and all after it: JAX reads its settings when it is imported.

    No device is touched, for JAX's threads would not survive the fork.
    """
    os.environ |= {name: value for name, value in environment.items() if name.startswith("JAX_")}
    load_script("sd_flax")
    _freeze()


def _enter(environment: dict[str, str]) -> None:
    """Let this process be one that was started with `environment`, which libraries may have read before."""
    os.environ |= environment
    if environment.get("HF_HUB_OFFLINE") == "0":
        huggingface_hub.constants.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = False
    signal.alarm(LONGEST)


def _draw_once() -> None:
    """Let all runs' curves be the same image: one takes a new process more than a second."""
    row = {"step": 1, "loss": 1.0, "lr": 1.0, "grad_norm": 1.0}
    curves._figure([row]).savefig(picture := io.BytesIO(), format="png")
    curves._figure = lambda _rows: SimpleNamespace(savefig=lambda file, **_: file.write_bytes(picture.getvalue()))


def _freeze() -> None:
    """Leave what is imported out of every collection: a fork would copy the pages that one writes to."""
    gc.collect()
    gc.freeze()


def _run_script(script: str, tokens: list[str]) -> None:
    sys.argv = [script, *tokens]
    runpy.run_path(script, run_name="__main__")


def _end_early(status: int) -> None:
    """As the interpreter ends, but for taking down all that is imported, which would take two seconds."""
    threading._shutdown()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def _run_and_end_early(script: str, tokens: list[str]) -> None:
    status = 0
    try:
        _run_script(script, tokens)
    except SystemExit as stop:
        if isinstance(stop.code, str):
            print(stop.code, file=sys.stderr)
        status = 1 if isinstance(stop.code, str) else stop.code or 0
    except BaseException:
        traceback.print_exc()
        status = 1
    _end_early(status)


if __name__ == "__main__":
    for name in TORCH:
        load_script(name)
    import datasets
    import huggingface_hub
    import transformers  # noqa: F401

    from t2i_training.report import curves, flops, validation

    validation.STEPS = SAMPLING_STEPS
    _draw_once()
    _freeze()
    request = _serve()
    for module in () if request["count_flops"] else (flops, sys.modules.get("t2i_training.sd_flax.flops")):
        if module:
            module.count = lambda *_: 1.0
    os.chdir(request["folder"])
    (_run_script if request["whole_exit"] else _run_and_end_early)(request["script"], request["tokens"])
