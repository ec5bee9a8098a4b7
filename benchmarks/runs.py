"""Training scripts in processes of their own, which take steps when they are told to."""

import contextlib
import itertools
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from multiprocessing import Pipe
from pathlib import Path

HERE = Path(__file__).parent
SCRIPTS = {  # by the name that tables use; the reference's file may have another name
    "sd": "text_to_image/train_text_to_image.py",
    "sd_lora": "text_to_image/train_text_to_image_lora.py",
    "prior": "kandinsky2_2/text_to_image/train_text_to_image_prior.py",
    "prior_lora": "kandinsky2_2/text_to_image/train_text_to_image_prior_lora.py",
    "decoder": "kandinsky2_2/text_to_image/train_text_to_image_decoder.py",
    "decoder_lora": "kandinsky2_2/text_to_image/train_text_to_image_decoder_lora.py",
}
FLAX_FILE = "train_text_to_image_flax.py"  # beside the torch script of the same runs
REFERENCE_NAMES = {
    "prior_lora": ("train_text_to_image_lora_prior.py", "train_text_to_image_prior_lora.py"),
    "decoder_lora": ("train_text_to_image_lora_decoder.py", "train_text_to_image_decoder_lora.py"),
}
ENCODER = "encoder"  # folder below the decoder's, with all that its training reads of a prior
LONGEST_TURN = 3600  # seconds; a run that says nothing for so long hangs


class Failed(Exception):
    """A run that ended by itself; the message is the last line it wrote."""


def own_script(name: str) -> Path:
    return HERE.parent / SCRIPTS[name]


def flax_script() -> Path:
    return own_script("sd").with_name(FLAX_FILE)


def reference_script(name: str, folder: Path | None) -> Path | None:
    """The reference's script of the same run, anywhere below `folder`."""
    wanted = REFERENCE_NAMES.get(name, (Path(SCRIPTS[name]).name,))
    found = [path for file in wanted for path in sorted(folder.rglob(file))] if folder else []
    return found[0] if found else None


def environment(work: Path) -> dict[str, str]:
    """Of all runs: nothing is downloaded, and nothing that a user has configured has a say."""
    kept = {name: value for name, value in os.environ.items() if name != "JAX_COMPILATION_CACHE_DIR"}
    return kept | {"HF_HOME": str(work / "home"), "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}


class Run:
    """A run that has made its first update.

    `started` is the time that took, from the start of the process, `caching` that within `encodings.cache`, and
    `compiling` that of JAX's compiler, in seconds; `peak` the most GPU memory that torch's allocator had given out in
    the last turn, in bytes. The run ends with `close`, wherever it stands: nothing is exported.
    """

    def __init__(self, script: Path, flags: list[str], work: Path):
        self._log = tempfile.TemporaryFile()  # noqa: SIM115
        self._connection, theirs = Pipe()
        began = time.perf_counter()
        self._process = subprocess.Popen(
            [sys.executable, HERE / "driver.py", str(theirs.fileno()), str(script), *flags],
            env=environment(work), stdin=subprocess.DEVNULL, stdout=self._log, stderr=self._log,
            pass_fds=[theirs.fileno()], start_new_session=True,
        )  # fmt: skip
        theirs.close()
        try:
            times, self.caching, self.compiling, self.peak = self._receive()
        except BaseException:
            self.close()
            raise
        self.started = times[0] - began

    def _receive(self) -> tuple[list[float], float, float, int]:
        try:
            if self._connection.poll(LONGEST_TURN):
                return self._connection.recv()
            reason = f"silent for {LONGEST_TURN} s"
        except (EOFError, ConnectionError):
            reason = self._last_line()
        raise Failed(reason)

    def turn(self, updates: int) -> list[float]:
        """Make so many updates; how long each took, in seconds.

        On a GPU only their sum is exact: the script runs ahead of it.
        """
        with contextlib.suppress(ConnectionError):  # it has ended, as receiving will tell
            self._connection.send(updates)
        times, *_, self.peak = self._receive()
        return [after - before for before, after in itertools.pairwise(times)]

    def _last_line(self) -> str:
        self._process.wait()
        self._log.seek(0)
        return last_line(self._log.read().decode(errors="replace"))

    def close(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._connection.close()
        self._log.close()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()


def last_line(text: str) -> str:
    """The last that a process wrote, without folders."""
    lines = text.replace("\r", "\n").split("\n")
    line = next((line for line in reversed(lines) if line.strip()), "no output")
    return re.sub(r"(/[^\s/'\"]+)+/", "", line).strip()[:160]


def flags(**values) -> list[str]:
    """flags(seed=1, cache_encodings=True): what a command line takes; None and False leave a flag out."""
    tokens = []
    for name, value in values.items():
        if value is not None and value is not False:
            tokens += [f"--{name}"] if value is True else [f"--{name}", str(value)]
    return tokens


def training_flags(name: str, pipelines: dict[str, Path], **changes) -> list[str]:
    """Flags of a run of script `name`, or of the reference's, that goes on until it is closed."""
    base = name.removesuffix("_lora")
    networks = {
        "sd": lambda folder: {"pretrained_model_name_or_path": folder, "center_crop": True},
        "prior": lambda folder: {"pretrained_prior_model_name_or_path": folder},
        "decoder": lambda folder: {
            "pretrained_decoder_model_name_or_path": folder,
            "pretrained_prior_model_name_or_path": folder / ENCODER,
        },
    }[base](pipelines[base])
    endless = {"max_train_steps": 10**6, "checkpointing_steps": 10**6}
    return flags(**networks | endless | {"seed": 1, "learning_rate": 1e-6, "lr_warmup_steps": 0} | changes)
