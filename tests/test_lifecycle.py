"""What surrounds a run: lock, seed, precision, optimizer, schedule, stop signals."""

import importlib.util
import os
import signal

import pytest
import torch
import yaml
from conftest import held, load_script
from diffusers.optimization import get_scheduler

from t2i_training import library_errors, stopping
from t2i_training.cli.config_file import public_config
from t2i_training.model import networks, optim
from t2i_training.run import lifecycle, output_folder


@pytest.fixture
def parse(sd_flags):
    return lambda **changes: load_script("sd").parse_args(sd_flags(**changes))


@pytest.fixture
def start(parse):
    """start(**flags): (arguments, accelerator) of a run in this process."""

    def run(**changes):
        args = parse(**changes)
        return args, lifecycle.start(args)

    return run


# --- schedules

SCHEDULES = {  # of 6 updates, 2 of them warm-up, at a rate of 1
    "constant": [1, 1, 1, 1, 1, 1],
    "constant_with_warmup": [0, 0.5, 1, 1, 1, 1],
    "linear": [0, 0.5, 1, 0.75, 0.5, 0.25],
    "polynomial": [0, 0.5, 1, 0.75, 0.5, 0.25],
    "cosine": [0, 0.5, 1, 0.853553, 0.5, 0.146447],
    "cosine_with_restarts": [0, 0.5, 1, 0.853553, 0.5, 0.146447],
    "piecewise_constant:1:2,0.1:4,0.01": [1, 1, 0.1, 0.1, 0.01, 0.01],
}

NO_WARM_UP = ("constant", "piecewise_constant:1:2,0.1:4,0.01")


def rate_of(parse, name, accumulation=1):
    args = parse(
        lr_scheduler=name, learning_rate=1, lr_warmup_steps=0 if name in NO_WARM_UP else 2,
        max_train_steps=6, gradient_accumulation_steps=accumulation,
    )  # fmt: skip
    return optim.make_rate(args, 6)


@pytest.mark.parametrize("accumulation", [1, 4])
@pytest.mark.parametrize("name", SCHEDULES)
def test_schedules_count_updates(parse, name, accumulation):
    """By hand; and accumulation, of which the published Kandinsky scripts made the warm-up longer, changes nothing."""
    rate = rate_of(parse, name, accumulation)
    assert [rate(step) for step in range(6)] == pytest.approx(SCHEDULES[name], abs=1e-6)


@pytest.mark.parametrize("name", SCHEDULES)
def test_the_rate_is_that_of_diffusers_schedule(parse, name):
    """To the bit, in whatever order it is asked for: a resumed run has the rates of an uninterrupted one."""
    kind, _, rules = name.partition(":")
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1)
    warm_up = 0 if name in NO_WARM_UP else 2
    stepped = get_scheduler(kind, optimizer, rules or None, num_warmup_steps=warm_up, num_training_steps=6)
    rates = []
    for _ in range(6):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        stepped.step()
    rate = rate_of(parse, name)
    assert [rate(step) for step in (5, 0, 3, 1, 2, 4)] == [rates[step] for step in (5, 0, 3, 1, 2, 4)]


@pytest.mark.parametrize("name", [name for name in SCHEDULES if name not in NO_WARM_UP])
def test_a_run_that_is_all_warm_up(parse, name, caplog):
    rate = optim.make_rate(parse(lr_scheduler=name, learning_rate=1, lr_warmup_steps=4, max_train_steps=4), 4)
    assert [rate(step) for step in range(4)] == [0, 0.25, 0.5, 0.75]
    assert "the run's 4 updates are all warm-up: --lr_warmup_steps 4" in caplog.text


def test_a_rate_below_that_polynomial_ends_with(parse):
    args = parse(lr_scheduler="polynomial", lr_warmup_steps=0, learning_rate=1e-8)
    with pytest.raises(SystemExit, match=r"^error: --lr_scheduler polynomial: .*1e-07"):
        optim.make_rate(args, 4)


# --- optimizer


def test_optimizer_options_reach_adamw(start):
    args, _ = start(learning_rate=0.02, adam_beta1=0.8, adam_beta2=0.95, adam_weight_decay=0.03, adam_epsilon=1e-6)
    parameter = torch.nn.Parameter(torch.zeros(2))
    optimizer = optim.make_optimizer(args, [parameter])
    assert type(optimizer) is torch.optim.AdamW
    (group,) = optimizer.param_groups
    assert group["params"] == [parameter]
    assert (group["lr"], group["betas"], group["weight_decay"], group["eps"]) == (0.02, (0.8, 0.95), 0.03, 1e-6)


def test_first_adamw_update_by_hand(start):
    """w - lr * decay * w - lr * sign(g): the bias-corrected moments of the first step are g and g squared."""
    args, _ = start(learning_rate=0.5, adam_weight_decay=0.25)
    parameter = torch.nn.Parameter(torch.tensor([8.0, -8.0]))
    parameter.grad = torch.tensor([3.0, 0.001])
    optim.make_optimizer(args, [parameter]).step()
    assert parameter.tolist() == pytest.approx([8 - 1 - 0.5, -8 + 1 - 0.5], abs=1e-4)


def test_trainable_is_a_list_of_what_asks_for_gradients():
    layer = torch.nn.Linear(2, 2)
    layer.bias.requires_grad_(False)
    parameters = optim.trainable_parameters(layer)
    assert isinstance(parameters, list)
    assert [parameter is layer.weight for parameter in parameters] == [True]


# --- precision


class Plain(torch.nn.Linear):
    dtype = property(lambda self: self.weight.dtype)


def test_frozen_in_full_precision_is_the_module_itself(start):
    _, accelerator = start()
    module = Plain(2, 2).train()
    assert networks.prepare_frozen(module, accelerator) is module
    assert not module.training
    assert not any(parameter.requires_grad for parameter in module.parameters())


def test_frozen_in_half_precision_leaves_the_original_unrounded(start):
    """The export writes the original: an encoder must come out as it was loaded."""
    _, accelerator = start(mixed_precision="bf16")
    module = Plain(2, 2)
    module.weight.data.fill_(1 / 3)
    copy = networks.prepare_frozen(module, accelerator)
    assert networks.inference_dtype(accelerator) == copy.weight.dtype == torch.bfloat16
    assert not copy.weight.requires_grad
    assert module.weight.dtype == torch.float32
    assert (module.weight == 1 / 3).all()


def test_fp16_without_a_gpu_trains_in_fp32_and_says_so(start):
    with pytest.warns(UserWarning, match="fp16 needs a GPU: training in fp32"):
        _, accelerator = start(mixed_precision="fp16")
    assert accelerator.mixed_precision == "no"
    assert networks.inference_dtype(accelerator) == torch.float32


def test_second_run_in_one_process_may_differ(start, tmp_path):
    for precision, accumulation in (("bf16", 3), ("no", 1)):
        _, accelerator = start(mixed_precision=precision, gradient_accumulation_steps=accumulation)
        assert (accelerator.mixed_precision, accelerator.gradient_accumulation_steps) == (precision, accumulation)


# --- seed and configuration


def test_seed_is_the_one_given(start):
    args, _ = start(seed=5)
    assert lifecycle.resolve_seed(args, {}) == 5


def test_seed_0_is_a_seed(start):
    args, _ = start(seed=0)
    assert lifecycle.resolve_seed(args, {"seed": 0}) == 0


def test_seed_is_drawn_if_none_is_given_and_kept_by_the_checkpoint(start):
    seeds = set()
    for _ in range(4):
        args, _ = start(seed=None)
        seed = lifecycle.resolve_seed(args, {})
        assert 0 <= seed < 2**31
        seeds.add(seed)
        assert lifecycle.resolve_seed(args, {"seed": seed}) == seed
    assert len(seeds) > 1


def test_seed_other_than_the_checkpoints_is_refused(start):
    args, _ = start(seed=5)
    with pytest.raises(SystemExit, match="error: --seed 5 differs from the checkpoint's, 6: leave it out to continue"):
        lifecycle.resolve_seed(args, {"seed": 6})


def test_run_config_can_be_passed_back(start, tmp_path):
    args, _ = start(
        validation_prompts=["- a\nb", "null"], use_ema=True, snr_gamma=5, push_to_hub=True, hub_token="hf_secret",
        mixed_precision="no", seed=None,
    )  # fmt: skip
    config = public_config(args) | {"seed": lifecycle.resolve_seed(args, {})}
    output_folder.write_config(config, resumed=False)
    path = tmp_path / "out" / "run_config.yaml"
    assert "hf_secret" not in path.read_text()
    assert yaml.safe_load(path.read_text())["validation_prompts"] == ["- a\nb", "null"]
    again = load_script("sd").parse_args(["--config", str(path)])
    assert public_config(again) == config
    assert again.hub_token is None


def test_failure_while_loading_names_the_flag(capsys):
    with pytest.raises(SystemExit) as stop, library_errors.readable_errors("--revision", "v9"):
        raise OSError("no\nsuch   revision " + "x" * 1000)
    message = str(stop.value)
    assert message.startswith("error: --revision v9: OSError: no such revision xxx")
    assert len(message) < 600


# --- the lock


def test_lock_refuses_a_second_process_and_dies_with_the_first(start, tmp_path, monkeypatch):
    folder = tmp_path / "out"
    with held(folder):
        for _ in range(2):  # the refused one must not take it with it
            with pytest.raises(SystemExit, match=f"error: --output_dir {folder} is in use by another run"):
                start()
        monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "2")
        with pytest.raises(SystemExit, match=r"is in use by another run: 2 processes were asked for \(SLURM_STEP_NUM_"):
            start()
        monkeypatch.delenv("SLURM_STEP_NUM_TASKS")
    start()
    start()  # a process never locks itself out


# --- processes that never joined

ALONE = (
    "and this one is alone: start them with `torchrun --nproc_per_node=N SCRIPT`, on a cluster one torchrun for each"
)


@pytest.fixture
def environment(monkeypatch):
    """environment(NAME=value): what a launcher, a cluster or MPI tells a process."""
    for name in ("WORLD_SIZE", "LOCAL_RANK", "SLURM_NTASKS", "SLURM_STEP_NUM_TASKS", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    return lambda **names: [monkeypatch.setenv(name, value) for name, value in names.items()]


@pytest.mark.parametrize(
    "names",
    [
        {"SLURM_STEP_NUM_TASKS": "2", "SLURM_NTASKS": "8", "SLURM_PROCID": "0"}, {"SLURM_NTASKS": "2"},
        {"OMPI_COMM_WORLD_SIZE": "2"}, {"PMI_SIZE": "2"},
    ],
)  # fmt: skip
def test_tasks_without_a_launcher_are_told(start, environment, names, caplog):
    environment(**names)
    start()
    assert f"2 processes were asked for ({next(iter(names))}), {ALONE}" in caplog.text


@pytest.mark.parametrize(
    "names",
    [
        {"SLURM_NTASKS": "8", "WORLD_SIZE": "1"},  # one torchrun in an allocation for more
        {"SLURM_NTASKS": "8", "SLURM_STEP_NUM_TASKS": "1"},  # one task of it
        {"SLURM_NTASKS": "1"}, {"SLURM_NTASKS": "4(x2)"}, {},
    ],
)  # fmt: skip
def test_one_process_where_one_was_asked_for(start, environment, names, caplog):
    environment(**names)
    start()
    assert "alone" not in caplog.text


def test_accelerate_launch_that_starts_one_of_several(start, environment, caplog):
    environment(MASTER_PORT="29500", ACCELERATE_USE_CPU="True")  # what its --cpu --num_processes 2 leaves behind
    start()
    assert "`accelerate launch` was asked for several processes, and on the CPU it starts one" in caplog.text


def test_a_launchers_process_that_did_not_join(start, environment):
    environment(WORLD_SIZE="2")
    with pytest.raises(SystemExit, match=r"^error: 2 processes were asked for \(WORLD_SIZE\), and this one is alone: "):
        start()


def test_folder_that_cannot_be_written(start, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit, match=r"error: --output_dir .* cannot be written: "):
        start(output_dir=tmp_path / "file" / "out")


# --- stop signals


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_first_signal_asks_to_stop_the_second_is_pythons(start, number):
    _, accelerator = start()
    stop = stopping.StopRequest()
    with stop.after_step():
        assert (stop.pending, stop.agree(accelerator)) == (False, 0)
        os.kill(os.getpid(), number)
        assert (stop.pending, stop.agreed) == (True, 0)
        assert (stop.agree(accelerator), stop.agreed) == (number, number)
        os.kill(os.getpid(), number)  # within a second: a launcher that was stopped as well passes its own on
        assert signal.getsignal(signal.SIGTERM) != signal.SIG_DFL
    with pytest.raises(SystemExit) as ending:
        lifecycle.release_and_exit(stop, complete=False)
    assert ending.value.code == 128 + number
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGUSR2, signal.SIGXCPU])
def test_an_announcement_may_come_many_times(start, monkeypatch, number):
    """At a soft limit of CPU time SIGXCPU comes once a second; Slurm's SIGUSR1 is followed by a SIGTERM."""
    _, accelerator = start()
    stop = stopping.StopRequest()
    with stop.after_step():
        for now in (100.0, 105.0, 110.0):
            monkeypatch.setattr(stopping.time, "monotonic", lambda now=now: now)
            os.kill(os.getpid(), number)
            assert stop.agree(accelerator) == number
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.agree(accelerator) == signal.SIGTERM
        assert signal.getsignal(signal.SIGTERM) != signal.SIG_DFL, "which would abort"


def test_a_failure_after_the_step_comes_before_any_signal(start):
    """The other processes, which do not know of it, take its number for the largest; this one says what it was."""
    _, accelerator = start()
    stop = stopping.StopRequest()
    with stop.after_step():
        stop.fail_after_step("row 7 (7.png): gone")
        os.kill(os.getpid(), signal.SIGTERM)
        assert (stop.pending, stop.agree(accelerator)) == (True, 127)
    with pytest.raises(SystemExit, match=r"^error: row 7 \(7.png\): gone$"):
        lifecycle.release_and_exit(stop, complete=True)


def test_a_signal_that_other_code_handles_is_left_to_it(start, caplog):
    """wandb's sweeps, submitit, torch's debuggers: a stack dump on SIGUSR1 must not stop the run."""
    got = []
    signal.signal(signal.SIGUSR1, lambda number, _: got.append(number))
    _, accelerator = start()
    stop = stopping.StopRequest()
    with stop.after_step():
        os.kill(os.getpid(), signal.SIGUSR1)
        assert got == [signal.SIGUSR1]
        assert stop.agree(accelerator) == 0
    assert "SIGUSR1 does not stop this run: other code handles it" in caplog.text
    lifecycle.release_and_exit(stop, complete=True)
    os.kill(os.getpid(), signal.SIGUSR1)
    assert got == [signal.SIGUSR1] * 2


def test_an_ignored_signal_stays_ignored():
    signal.signal(signal.SIGUSR2, signal.SIG_IGN)
    stopping.StopRequest()
    assert signal.getsignal(signal.SIGUSR2) == signal.SIG_IGN


def test_platform_without_some_of_the_signals(monkeypatch):
    """Windows has neither SIGHUP nor those of clusters."""
    for name in ("SIGHUP", "SIGUSR1", "SIGUSR2", "SIGXCPU"):
        monkeypatch.delattr(signal, name)
    spec = importlib.util.spec_from_file_location("t2i_training.stopping_there", stopping.__file__)
    spec.loader.exec_module(there := importlib.util.module_from_spec(spec))
    assert [number.name for number in there.STOP_SIGNALS] == ["SIGTERM", "SIGINT"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGXCPU])
def test_signal_before_the_loop_ends_the_run_at_once(start, number, caplog):
    start()
    stopping.StopRequest()
    with pytest.raises(SystemExit) as ending:
        os.kill(os.getpid(), number)
    assert ending.value.code == 128 + number
    kept = "stopped before the first update; saved checkpoints and encodings are kept"
    assert f"{signal.Signals(number).name}: {kept}" in caplog.text


def test_a_launcher_that_passes_the_signal_on_changes_nothing():
    """The process is on its way out: the status is that of the first."""
    stopping.StopRequest()
    with pytest.raises(SystemExit):
        os.kill(os.getpid(), signal.SIGTERM)
    os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_that_a_library_takes_for_an_error(number):
    """torch's C++, asked for the shape of a list, turns whatever is raised meanwhile into a ValueError."""

    def load():
        with library_errors.readable_errors("checkpoint", "x"):
            try:
                os.kill(os.getpid(), number)
            except SystemExit:
                raise ValueError("could not determine the shape") from None

    stop = stopping.StopRequest()
    with pytest.raises(SystemExit) as ending:
        load()
    assert ending.value.code == 128 + number
    with pytest.raises(SystemExit) as ending, stop.after_step():
        pytest.fail("there is no step to take")
    assert ending.value.code == 128 + number


def test_after_an_error_in_the_loop_signals_are_pythons_again():
    """A notebook's kernel lives on, and its Ctrl-C is to interrupt whatever runs there next."""
    with pytest.raises(ZeroDivisionError), stopping.StopRequest().after_step():
        raise ZeroDivisionError
    assert signal.getsignal(signal.SIGINT) == signal.default_int_handler
    with pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)


def test_signal_of_an_earlier_run_is_forgotten(start):
    with stopping.StopRequest().after_step():
        os.kill(os.getpid(), signal.SIGTERM)
    _, accelerator = start()
    stop = stopping.StopRequest()
    assert stop.agree(accelerator) == 0
    assert lifecycle.release_and_exit(stop, complete=True) is None
