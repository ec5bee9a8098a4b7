"""Runs that are interrupted, killed and compared.

`interrupt` sends a real signal to this process after a given update. `Server` gives runs a process of their own without
the seconds of imports: it has them behind it, and forks. Started as a program, this file is that server.
"""

import contextlib
import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.nn.modules.module import register_module_forward_hook
from torch.optim.optimizer import register_optimizer_step_post_hook

# Everything that is drawn for a sample, switched on.
ALL_DRAWS = {"random_flip": True, "caption_dropout": 0.5, "noise_offset": 0.1, "input_perturbation": 0.1}
DRAWS = {  # the same, script by script
    "sd": ALL_DRAWS, "sd_lora": ALL_DRAWS, "prior": {"caption_dropout": 0.5}, "prior_lora": {"caption_dropout": 0.5},
    "decoder": {"image_embeds_dropout": 0.5}, "decoder_lora": {"image_embeds_dropout": 0.5},
}  # fmt: skip

ADAPTERS = "pytorch_lora_weights.safetensors"
TRAINED = {  # script -> where a checkpoint, and the output folder, hold the trained weights
    "sd": "unet/diffusion_pytorch_model.safetensors", "sd_lora": ADAPTERS,
    "prior": "prior/diffusion_pytorch_model.safetensors", "prior_lora": ADAPTERS,
    "decoder": "unet/diffusion_pytorch_model.safetensors", "decoder_lora": ADAPTERS,
    "sd_flax": "unet/diffusion_pytorch_model.safetensors",
}  # fmt: skip


@contextlib.contextmanager
def interrupt(update: int, number: int = signal.SIGTERM):
    """Inside, this process gets a signal within its `update`-th weight update, and the run must end because of it."""
    seen = []

    def count(_optimizer, _args, _kwargs):
        seen.append(update)
        if len(seen) == update:
            os.kill(os.getpid(), number)

    hook = register_optimizer_step_post_hook(count)
    try:
        with pytest.raises(SystemExit) as stop:
            yield
    finally:
        hook.remove()
    assert stop.value.code == 128 + number
    assert len(seen) == update, "the run went on after the update that was interrupted"


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


def outcome(folder: Path, step: int, trained: str = TRAINED["sd"], tensors: int = 50) -> dict:
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
    """A run of the script in a process of its own."""

    def __init__(self, server: subprocess.Popen, tokens: list[str], log: Path):
        self.log, self.server = log, server
        server.stdin.write(json.dumps({"tokens": tokens, "log": str(log)}) + "\n")
        server.stdin.flush()
        self.pid = int(server.stdout.readline())
        self.ended = False

    def kill(self, number: int) -> None:
        os.kill(self.pid, number)

    def wait(self) -> int:
        """Exit status; -n for a process that died of signal n."""
        status = int(self.server.stdout.readline())
        self.ended = True
        return status

    def output(self) -> str:
        return self.log.read_text(encoding="utf-8", errors="replace")


class Server:
    """Starts runs, one at a time."""

    def __init__(self):
        command, pipes = [sys.executable, __file__], {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        self.process = subprocess.Popen(command, text=True, **pipes)
        self.runs = []

    def start(self, tokens: list[str], folder: Path) -> Run:
        self.end_run()
        self.runs.append(Run(self.process, tokens, folder / f"run-{len(self.runs)}.log"))
        return self.runs[-1]

    def end_run(self) -> None:
        """Kill what a failed test has left running."""
        if self.runs and not self.runs[-1].ended:
            self.runs[-1].kill(signal.SIGKILL)
            self.runs[-1].wait()

    def close(self) -> None:
        self.end_run()
        self.process.kill()  # the end of its input would not reach it, while loader workers forked here hold the pipe
        self.process.wait()


def _serve() -> list[str]:
    """Fork for each request. Returns, in the child alone, the tokens to run with."""
    for line in sys.stdin:
        request = json.loads(line)
        pid = os.fork()
        if pid == 0:
            log = os.open(request["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            null = os.open(os.devnull, os.O_RDONLY)
            for descriptor, target in ((null, 0), (log, 1), (log, 2)):
                os.dup2(descriptor, target)
            return request["tokens"]
        print(pid, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
    sys.exit()


if __name__ == "__main__":
    from conftest import load_script

    script = load_script("sd")
    import datasets  # noqa: F401
    import transformers  # noqa: F401

    script.main(_serve())
