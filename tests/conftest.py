"""Shared by all tests: a home of its own for caches, one thread for tiny networks, tiny models made once."""

import importlib.util
import os
import socket
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path

os.environ |= {"HF_HOME": tempfile.mkdtemp(prefix="t2i-tests-"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
os.environ |= {"WANDB_MODE": "offline", "TOKENIZERS_PARALLELISM": "false"}

import pytest
import tiny
import torch

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def model(tmp_path_factory) -> Path:
    """Folder of a tiny Stable Diffusion that predicts noise."""
    return tiny.make_stable_diffusion(tmp_path_factory.mktemp("models") / "sd")


@pytest.fixture(scope="session")
def v_model(tmp_path_factory) -> Path:
    """Folder of a tiny Stable Diffusion that predicts velocity."""
    return tiny.make_stable_diffusion(tmp_path_factory.mktemp("models") / "sd-v", prediction_type="v_prediction")


@pytest.fixture(scope="session")
def pictures(tmp_path_factory) -> Path:
    """Folder of tiny.PICTURES captioned pictures."""
    return tiny.make_pictures(tmp_path_factory.mktemp("data") / "pictures")


@pytest.fixture(scope="session")
def server():
    """server.start(tokens, folder): a run in a process of its own, to be signalled and killed."""
    import runs

    server = runs.Server()
    yield server
    server.close()


@cache
def load_script(name: str):
    """A training script as a module, as `import` would give it."""
    spec = importlib.util.spec_from_file_location(tiny.SCRIPTS[name].stem, tiny.SCRIPTS[name])
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # loader workers and pickles look it up
    spec.loader.exec_module(module)
    return module


def flags(**values) -> list[str]:
    """Command-line tokens: flags(use_ema=True, seed=1, validation_prompts=["a", "b"])."""
    tokens = []
    for name, value in values.items():
        if value is None or value is False:
            continue
        tokens.append(f"--{name}")
        if value is not True:
            tokens += map(str, value if isinstance(value, list) else [value])
    return tokens


def short_run(model: Path, pictures: Path, output_dir: Path) -> dict:
    """Flags of a short Stable Diffusion run."""
    return {
        "pretrained_model_name_or_path": model, "train_data_dir": pictures, "output_dir": output_dir,
        "resolution": 32, "train_batch_size": 2, "max_train_steps": 4, "lr_warmup_steps": 0, "seed": 3,
        "report_to": "none", "logging_steps": 1, "learning_rate": 1e-3,
    }  # fmt: skip


@pytest.fixture
def sd_flags(model, pictures, tmp_path):
    """sd_flags(**changes): tokens of a short Stable Diffusion run into tmp_path / "out"; None leaves a flag out."""
    return lambda **changes: flags(**short_run(model, pictures, tmp_path / "out") | changes)


@pytest.fixture
def train(sd_flags, tmp_path):
    """train(**changes): a short run in this process; returns its output folder."""

    def run(**changes) -> Path:
        load_script("sd").main(sd_flags(**changes))
        return Path(changes.get("output_dir", tmp_path / "out"))

    return run


def launch(script: str, tokens: list[str], *, processes: int = 0, **options) -> subprocess.CompletedProcess:
    """Run a script as a user would: python, or `processes` of them under torch's launcher (gloo on the CPU)."""
    command = [sys.executable]
    if processes:
        command += [
            "-m",
            "torch.distributed.run",
            "--nproc_per_node",
            str(processes),
            "--master_port",
            str(free_port()),
        ]
    environment = os.environ | {"ACCELERATE_USE_CPU": "true"} | options.pop("env", {})
    command += [str(tiny.SCRIPTS[script]), *tokens]
    return subprocess.run(command, capture_output=True, text=True, env=environment, **options)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
