"""Shared by all tests: a home of its own for caches, one thread unless told otherwise, tiny models made once.

Torch is imported by the workers, when they first need it, and not by the process that waits for them.
"""

import contextlib
import gc
import importlib.util
import io
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
from collections import Counter
from functools import cache
from pathlib import Path
from types import SimpleNamespace

os.environ |= {"HF_HOME": tempfile.mkdtemp(prefix="t2i-tests-"), "HF_HUB_OFFLINE": "1"}
os.environ |= {"WANDB_MODE": "offline", "TOKENIZERS_PARALLELISM": "false"}
os.environ |= {"ACCELERATE_USE_CPU": "true", "JAX_PLATFORMS": "cpu"}  # results there are the same bit for bit
os.environ.setdefault("OMP_NUM_THREADS", "1")  # tests/capabilities.sh asks for more

import pytest
import tiny
import tiny_kandinsky
from scripts import REPOSITORY, SCRIPTS

from t2i_training.stopping import STOP_SIGNALS

signal.signal(signal.SIGINT, signal.default_int_handler)  # which a shell's background jobs ignore, and runs heed that

SAMPLING_STEPS = 2  # of a validation image, in all tests but those that are about it

# The longest first, so that no worker is left with one of them when the others have nothing to do.
LONG_FILES = (
    "test_learning.py", "test_train_text_to_image_flax.py", "test_contract_encodings.py", "test_train_text_to_image.py",
    "test_contract_resume.py", "test_compile.py", "test_flax_models.py", "test_contract_stop.py",
    "test_contract_world_size_all.py", "test_flops.py", "test_contract_world_size.py", "test_kandinsky_decoder.py",
    "test_hub.py", "test_contract_secrets.py", "test_contract_data_faults.py", "test_contract_checkpoints.py",
)  # fmt: skip

# File -> the tests, as a pattern of their names, that --quick runs: units that take no time, and a short run of each
# script.
QUICK = {
    "test_checks.py": "", "test_draws.py": "", "test_hub_card.py": "", "test_images.py": "", "test_losses.py": "",
    "test_model_kind.py": "", "test_names.py": "", "test_networks.py": "", "test_out_of_memory.py": "",
    "test_readme.py": "", "test_rooms.py": "", "test_scripts_alike.py": "", "test_validation.py": "",
    "test_bad_input.py": "test_(usage|fault|flag|tracker)",
    "test_cli.py": r"(?!test_usage_errors_import_nothing_heavy\[(?!sd\]))",
    "test_data.py": "(?!test_crash)",
    "test_lifecycle.py": "",
    "test_contract_numerics.py": r".*\bbad_loss",
    "test_contract_resume_all.py": r"test_interrupted_after_every_update\[(sd_lora|prior_lora|decoder_lora)",
    "test_contract_resume.py": r"test_interrupted_after_every_update\[constant",
    "test_contract_checkpoints.py": r"test_layout|test_damaged_newest.*\[truncated",
    "test_contract_encodings.py": r"test_cached_training.*\[(prior|decoder_lora)\]",
    "test_contract_data_faults.py": r"test_a_run_fails_before|test_skipping.*\[sd",
    "test_contract_stop.py": "test_signal_in_the_last",
    "test_contract_bases.py": "test_what_files_tell",
    "test_contract_secrets.py": "test_an_error_in|test_a_token_in|test_a_line_end",
    "test_train_text_to_image.py": "test_every_flag|test_exported_tree|test_what_is_drawn",
    "test_kandinsky_prior.py": "test_exported_tree",
    "test_kandinsky_decoder.py": "test_exported_tree",
}  # fmt: skip


def pytest_addoption(parser):
    tiers = parser.getgroup("tiers", "how much is run; by default all that is not marked slow")
    tiers.addoption("--all", action="store_true", dest="all_tests", help="what is marked slow as well")
    tiers.addoption("--quick", action="store_true", help="a minute: the units, and a short run of each script")


def pytest_configure(config):
    if config.option.all_tests and config.option.quick:
        raise pytest.UsageError("--all and --quick: choose one")
    if not hasattr(config, "workerinput"):
        config.pluginmanager.register(CleanCheckout())
        config.pluginmanager.register(SlowestFiles())


class CleanCheckout:
    """The tests leave the checkout as git saw it before, or fail. Without git nothing is looked at."""

    def __init__(self):
        self.before, self.left = self.status(), set()

    @staticmethod
    def status() -> set[str]:
        command = ["git", "-C", str(REPOSITORY), "status", "--porcelain", "--untracked-files=all"]
        try:
            return set(subprocess.run(command, capture_output=True, text=True, check=False).stdout.splitlines())
        except FileNotFoundError:
            return set()

    def pytest_sessionfinish(self, session):
        self.left = self.status() - self.before
        if self.left:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter):
        for line in sorted(self.left):
            terminalreporter.line(f"left in the checkout: {line}", red=True)


class SlowestFiles:
    """Where the time goes, at the end of every run of several files."""

    def __init__(self):
        self.seconds = Counter()

    def pytest_runtest_logreport(self, report):
        self.seconds[report.location[0]] += report.duration

    def pytest_terminal_summary(self, terminalreporter):
        if len(self.seconds) > 1:
            slowest = [f"{Path(file).name} {seconds:.0f} s" for file, seconds in self.seconds.most_common(5)]
            terminalreporter.line(f"slowest of {self.seconds.total():.0f} s in tests: {', '.join(slowest)}")


def pytest_ignore_collect(collection_path, config):
    """Files without a quick test are not even imported: JAX takes seconds."""
    is_test = collection_path.name.startswith("test_") and collection_path.suffix == ".py"
    return True if config.option.quick and is_test and collection_path.name not in QUICK else None


def pytest_collection_modifyitems(config, items):
    order = {name: place for place, name in enumerate(LONG_FILES)}
    items.sort(key=lambda item: order.get(item.path.name, len(order)))
    selected, left_out = [], []
    for item in items:
        (selected if _selected(item, config) else left_out).append(item)
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = selected


def pytest_collection_finish():
    """Leave what is imported out of every later collection of garbage."""
    gc.collect()
    gc.freeze()


def _selected(item, config) -> bool:
    """Whether the tier that was asked for has it; a test that the command line names, or `-m slow`, always is."""
    name = item.nodeid.partition("::")[2]
    named = [argument.partition("::")[2] for argument in config.args if "::" in argument]
    if config.option.all_tests or "slow" in config.option.markexpr or any(name.startswith(test) for test in named):
        return True
    quick = re.match(QUICK[item.path.name], name) if config.option.quick else True
    return bool(quick) and item.get_closest_marker("slow") is None


@pytest.fixture(autouse=True)
def device(request, monkeypatch):
    """Tests marked `gpu` run on it, all others on the CPU."""
    if request.node.get_closest_marker("gpu") is None:
        yield
        return
    import torch
    from accelerate import PartialState

    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    monkeypatch.delenv("ACCELERATE_USE_CPU")
    PartialState._reset_state()
    yield
    PartialState._reset_state()


@pytest.fixture(autouse=True)
def signals_as_before():
    """A run that an error ends in this process leaves its handlers, as its process would have ended with it."""
    before = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture(scope="session")
def model(tmp_path_factory) -> Path:
    """Folder of a tiny Stable Diffusion that predicts noise."""
    return tiny.make_stable_diffusion(tmp_path_factory.mktemp("models") / "sd")


@pytest.fixture(scope="session")
def small_model(model, tmp_path_factory) -> Path:
    """The tiny Stable Diffusion with fewer layers, which JAX takes half the time to compile."""
    return tiny.make_smaller(model, tmp_path_factory.mktemp("models") / "small-sd")


@pytest.fixture(scope="session")
def guarded_model(model, tmp_path_factory) -> Path:
    """The tiny Stable Diffusion with a safety checker, to which every image is suspect."""
    return tiny.add_safety_checker(model, tmp_path_factory.mktemp("models") / "guarded")


@pytest.fixture(scope="session")
def v_model(tmp_path_factory) -> Path:
    """Folder of a tiny Stable Diffusion that predicts velocity."""
    return tiny.make_stable_diffusion(tmp_path_factory.mktemp("models") / "sd-v", prediction_type="v_prediction")


@pytest.fixture(scope="session")
def prior_model(tmp_path_factory) -> Path:
    """Folder of a tiny Kandinsky 2.2 prior."""
    return tiny_kandinsky.make_prior(tmp_path_factory.mktemp("models") / "prior")


@pytest.fixture(scope="session")
def decoder_model(tmp_path_factory, prior_model) -> Path:
    """Folder of a tiny Kandinsky 2.2 decoder, whose card names that prior."""
    return tiny_kandinsky.make_decoder(tmp_path_factory.mktemp("models") / "decoder", prior_model)


@pytest.fixture(scope="session")
def photographs(tmp_path_factory):
    return tiny.make_photographs(tmp_path_factory.mktemp("data") / "photographs")


@pytest.fixture(scope="session")
def pictures(tmp_path_factory) -> Path:
    """Folder of tiny.PICTURES captioned images."""
    return tiny.make_pictures(tmp_path_factory.mktemp("data") / "pictures")


@pytest.fixture(scope="session")
def server():
    """server.start(tokens, folder, script, processes=n): a run in processes of its own, to be signalled and killed."""
    import runs

    server = runs.Server()
    yield server
    server.close()


@pytest.fixture(scope="session", autouse=True)
def count_flops_once():
    """Hundreds of runs, a second each: a network's class is counted once. test_flops.py counts for itself."""
    from t2i_training.report import flops

    count, known = flops.count, {}

    def count_once(objective, network, batch):
        kind = type(network)
        if kind not in known:
            known[kind] = count(objective, network, batch)
        return known[kind]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(flops, "count", count_once)
        yield count


@pytest.fixture(scope="session", autouse=True)
def draw_curves_once():
    """They are half of a short run's time: rows of equal kinds share an image. test_progress.py draws for itself."""
    from t2i_training.report import curves

    figure, known = curves._figure, {}

    def draw_once(rows):
        kinds = frozenset((name, type(value)) for row in rows for name, value in row.items())
        if kinds not in known:
            figure(rows).savefig(file := io.BytesIO(), dpi=100, format="png")
            known[kinds] = file.getvalue()
        return SimpleNamespace(savefig=lambda file, **_options: file.write_bytes(known[kinds]))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(curves, "_figure", draw_once)
        yield figure


@pytest.fixture(scope="session", autouse=True)
def few_sampling_steps():
    """Hundreds of validation images: test_validation.py has how many steps a user's take."""
    from t2i_training.report import validation

    with pytest.MonkeyPatch.context() as patch:
        steps = validation.STEPS
        patch.setattr(validation, "STEPS", SAMPLING_STEPS)
        yield steps


SYNC_FOR_REAL = ("test_contract_checkpoints.py", "test_contract_storage.py")  # and all runs in processes of their own


@pytest.fixture(scope="module", autouse=True)
def no_waiting_for_the_disk(request):
    """A run syncs 28 files and folders, several milliseconds each, for a loss of power that no test can cause."""
    with pytest.MonkeyPatch.context() as patch:
        if request.path.name not in SYNC_FOR_REAL:
            patch.setattr(os, "fsync", lambda _descriptor: None)
        yield


@cache
def load_script(name: str):
    """A training script as a module, as `import` would give it."""
    spec = importlib.util.spec_from_file_location(SCRIPTS[name].path.stem, SCRIPTS[name].path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # loader workers and pickles look it up
    spec.loader.exec_module(module)
    return module


def load_quick_flax_script(patch: pytest.MonkeyPatch):
    """The Flax script with nothing to compile: an update shrinks the weights, images are grey. All else is real."""
    script = load_script("sd_flax")
    from t2i_training.sd_flax import devices, train_state

    def begin(trained, train_step, begin=train_state.TrainState.begin):
        def shrink(tree):
            shrunk = script.jax.tree.map(lambda array: array * 0.9, devices.fetch(tree))
            return devices.place(shrunk, trained.mesh, trained.shard)

        def step(state, *_):
            names = {"parameters", "average"} & set(state)
            return state | {name: shrink(state[name]) for name in names}, 1.0, 1.0

        begin(trained, train_step)
        trained.train_step = step

    patch.setattr(train_state.TrainState, "sample_flops", lambda _: 1e6)
    patch.setattr(train_state.TrainState, "begin", begin)
    patch.setattr(script, "generate_image", lambda index, **_: script.Image.new("RGB", (16, 16), "grey"))
    return script


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
        "report_to": "none", "logging_steps": 1, "learning_rate": 1e-3, "dataloader_num_workers": 0,
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


@pytest.fixture(scope="session")
def command(model, prior_model, decoder_model, pictures, tmp_path_factory):
    """command(script, **changes): tokens of a short run of any script; `output_dir` is a new folder unless given."""
    kandinsky = {
        "pretrained_model_name_or_path": None, "pretrained_prior_model_name_or_path": prior_model,
        "pretrained_decoder_model_name_or_path": decoder_model,
    }  # fmt: skip

    def make(script: str, **changes) -> list[str]:
        changes.setdefault("output_dir", tmp_path_factory.mktemp("run") / "out")
        models = {} if SCRIPTS[script].base == "model" else kandinsky
        rate = {"learning_rate": 1e-2} if SCRIPTS[script].is_lora else {}
        return flags(**short_run(model, pictures, changes["output_dir"]) | models | rate | changes)

    return make


@pytest.fixture
def refused(command, capsys):
    """refused(script, **changes): the one line that a command line ends with, as its flags are checked."""

    def run(script: str, **changes) -> str:
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            load_script(script).parse_args(command(script, **changes))
        assert stop.value.code == 2
        (line,) = capsys.readouterr().err.splitlines()
        return line

    return run


@pytest.fixture(scope="module")
def finished(command):
    """finished(script, **changes): output folder of a short run in this process.

    Equal changes share one run: leave its folder as it is.
    """
    done = {}

    def make(script: str, **changes) -> Path:
        key = repr((script, sorted(changes.items())))
        if key not in done:
            tokens = command(script, **changes)
            load_script(script).main(tokens)
            done[key] = Path(tokens[tokens.index("--output_dir") + 1])
        return done[key]

    return make


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
    environment = os.environ | options.pop("env", {})
    command += [str(SCRIPTS[script].path), *tokens]
    return subprocess.run(command, capture_output=True, text=True, env=environment, **options)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextlib.contextmanager
def held(folder: Path):
    """Inside, a run in another process has that output folder."""
    from t2i_training.run import output_folder

    ready, write = os.pipe()
    if (pid := os.fork()) == 0:
        try:
            output_folder.lock(folder)
            os.write(write, b"held")
            signal.pause()
        finally:
            os._exit(1)
    try:
        assert os.read(ready, 4) == b"held"
        yield
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        os.close(ready)
        os.close(write)


@pytest.fixture
def case(record_property):
    """case(injected, expected), then case.seen(what happened): a line of what tests/faults/table.py prints."""

    class Case:
        def __call__(self, injected, expected):
            record_property("case", (injected, expected))

        def seen(self, what):
            record_property("seen", what)

    return Case()
