"""What a run reports: rows, counts and curves; and that it stops at the first number that is none."""

import contextlib
import io
import json
import math
import re
import sys
from pathlib import Path

import pytest
import torch
from accelerate.state import PartialState
from conftest import load_script
from PIL import Image
from runs import TIMED
from runs import rows as untimed

from t2i_training import log
from t2i_training.data import inspection
from t2i_training.data.dataset import open_dataset
from t2i_training.model import optim
from t2i_training.report import curves, flops, throughput
from t2i_training.report.progress import Progress
from t2i_training.run import lifecycle, output_folder


@pytest.fixture
def drawn_each_time(draw_curves_once, monkeypatch):
    monkeypatch.setattr(curves, "_figure", draw_curves_once)


@pytest.fixture
def started(sd_flags, tmp_path):
    """started(**flags): a Progress over the six test images, ready to count; its files are below tmp_path / "out".

    started.end() ends it."""

    def start(position=None, **changes) -> Progress:
        if position:
            changes = {"resume_from_checkpoint": "latest"} | changes
        args = load_script("sd").parse_args(sd_flags(**changes))
        accelerator = lifecycle.start(args)
        samples = inspection.inspect(args, accelerator, open_dataset(args, 3))
        progress = Progress(args, accelerator, *samples, position or {}, seed=3)
        rate = optim.make_rate(args, progress.total)
        output_folder.take_over(progress.config, accelerator, progress.step)
        progress.open(torch.nn.Linear(3, 5), lambda network, batch: network(batch["pixels"]).mean(), rate)
        stack.callback(progress.close)
        return stack.enter_context(progress.loop())

    with contextlib.ExitStack() as stack:
        start.end = stack.close
        yield start


def batch(indices) -> dict:
    return {"index": torch.tensor(indices), "pixels": torch.ones(len(indices), 3)}


def update(progress, *losses, grad_norm=1.0, indices=(0, 1), lr=0.5) -> None:
    """One weight update of as many micro-batches as losses."""
    for loss in losses:
        progress.add_micro_batch(torch.tensor(loss), batch(indices))
    progress.count_update(torch.tensor(grad_norm), lr)


def rows(tmp_path) -> list[dict]:
    return [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]


def test_row_by_hand(started, tmp_path):
    """The loss is the mean over the interval and its micro-batches; the gradient norm and the rate are the last."""
    progress = started(gradient_accumulation_steps=2, logging_steps=2, max_train_steps=3)
    update(progress, 1.0, 2.0, grad_norm=3.0, lr=0.25)
    assert rows(tmp_path) == []  # the interval is not over
    update(progress, 3.0, 6.0, grad_norm=4.0, lr=0.5)
    update(progress, 8.0, 8.0, grad_norm=5.0, lr=0.125)  # the last update ends the interval early
    assert untimed(tmp_path / "out") == [
        {"step": 2, "epoch": 1.3333, "loss": 3.0, "lr": 0.5, "grad_norm": 4.0},
        {"step": 3, "epoch": 2.0, "loss": 8.0, "lr": 0.125, "grad_norm": 5.0},
    ]


class Clock:
    """Stands in for the time module: a clock that stands still unless it is moved."""

    def __init__(self):
        self.now = 100.0

    def perf_counter(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(throughput, "time", clock)
    return clock


def timed_rows(tmp_path) -> list[dict]:
    return [{name: value for name, value in row.items() if name in TIMED} for row in rows(tmp_path)]


def test_readouts_by_hand(started, tmp_path, clock):
    """Two samples an update. FLOPs of a Linear(3, 5) and one sample: 2 * 3 * 5 forward, as many for its weight."""
    progress = started(logging_steps=2, max_train_steps=4)
    clock.now += 0.5
    update(progress, 1.0)
    clock.now += 1.5
    update(progress, 1.0)
    for seconds in (4.0, 4.0):
        clock.now += seconds
        update(progress, 1.0)
    assert timed_rows(tmp_path) == [
        {"images_per_second": 2.0, "seconds_per_step": 1.0, "data_wait": 0.0, "tflops_per_second": 2.0 * 60e-12},
        {"images_per_second": 0.5, "seconds_per_step": 4.0, "data_wait": 0.0, "tflops_per_second": 0.5 * 60e-12},
    ]


def test_flops_are_those_of_each_shape(started, tmp_path, clock, count_flops_once, monkeypatch):
    """Linear(3, 5) reads rows: of samples of one and of three rows, 60 and 180 FLOPs, 120 on average."""
    monkeypatch.setattr(flops, "count", count_flops_once)
    progress = started(logging_steps=2, max_train_steps=4)
    for rows_of_a_sample in (1, 3, 3, 3):
        clock.now += 1.0
        batch = {"index": torch.tensor([0, 1]), "pixels": torch.ones(2, rows_of_a_sample, 3)}
        progress.add_micro_batch(torch.tensor(1.0), batch)
        progress.count_update(torch.tensor(1.0), 1e-4)
    assert [row["tflops_per_second"] for row in timed_rows(tmp_path)] == [2 * 120e-12, 2 * 180e-12]


def test_pauses_are_left_out(started, tmp_path, clock):
    """A checkpoint or validation restarts the clock: what came before it in the interval does not count either."""
    progress = started(logging_steps=2)
    clock.now += 7.0
    update(progress, 1.0)
    clock.now += 100.0
    progress.restart_clock()
    clock.now += 0.25
    update(progress, 1.0)
    assert [(row["images_per_second"], row["seconds_per_step"]) for row in rows(tmp_path)] == [(8.0, 0.25)]


def test_wait_for_data(started, tmp_path, clock):
    """One second of four in each update is spent in `next`."""

    def loader():
        for name in "abcd":
            clock.now += 1.0
            yield name

    progress = started(logging_steps=2)
    stream = progress.timed(loader())
    names = ""
    for _ in range(4):
        names += next(stream)
        clock.now += 3.0
        update(progress, 1.0)
    assert names == "abcd"
    assert list(stream) == []
    assert [(row["data_wait"], row["seconds_per_step"]) for row in rows(tmp_path)] == [(0.25, 4.0), (0.25, 4.0)]


def test_counting_is_left_out_and_may_fail(started, tmp_path, clock, monkeypatch, caplog):
    calls = []

    def fail(*_):
        calls.append(1)
        clock.now += 50.0
        raise NotImplementedError("no fake\nkernel")

    monkeypatch.setattr(flops, "count", fail)
    progress = started()
    for _ in range(2):
        clock.now += 2.0
        update(progress, 1.0)
    assert calls == [1]
    assert [row["seconds_per_step"] for row in rows(tmp_path)] == [2.0, 2.0]
    assert "tflops_per_second" not in rows(tmp_path)[0]
    assert "FLOPs are not counted: NotImplementedError: no fake kernel" in caplog.text


def test_readouts_in_the_progress_bar():
    row = {"images_per_second": 12.34, "data_wait": 0.034, "peak_memory_gib": 23.45, "mfu": 0.412}
    assert throughput.shown(row) == "images/s=12.3, data=3%, GiB=23.4, mfu=41%"
    assert throughput.shown({"images_per_second": 0.5, "data_wait": 1.0}) == "images/s=0.5, data=100%"


def lines(text: str) -> list[str]:
    return [line[line.index("step ") :] for line in text.splitlines() if " of 10, loss=" in line]


def test_time_left_by_hand(started, clock, caplog):
    """Two seconds an update. The first one's hundred, of compiling say, and a validation's fifty do not count."""
    progress = started(logging_steps=2, max_train_steps=10)
    for seconds in (100.0, 2.0, 2.0, 2.0):
        clock.now += seconds
        update(progress, 1.0)
    clock.now += 50.0
    progress.restart_clock()
    for _ in range(6):
        clock.now += 2.0
        update(progress, 1.0)
    assert [line.rpartition("left=")[2] for line in lines(caplog.text)] == ["00:16", "00:12", "00:08", "00:04", "00:00"]
    assert lines(caplog.text)[1] == "step 4 of 10, loss=1.0000, lr=5.0e-01, images/s=1.0, data=0%, left=00:12"


def test_a_narrow_terminal_cuts_off_what_matters_least(started, clock, monkeypatch):
    """The bar is shortened to one line, from its end: how long it will take comes first."""
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr(sys, "stderr", terminal := io.StringIO())
    monkeypatch.setattr(terminal, "isatty", lambda: True)
    progress = started(logging_steps=2, max_train_steps=15000)
    for _ in range(4):
        clock.now += 2.0
        update(progress, 1.0)
    started.end()
    bar = terminal.getvalue().split("\r")[-1]
    assert "| 4/15000 [" in bar
    assert "left=8:19:52, loss=1.0000, lr=" in bar


def test_time_left_is_not_guessed_from_the_first_update(started, clock, caplog):
    progress = started(max_train_steps=10)
    for seconds in (100.0, 2.0):
        clock.now += seconds
        update(progress, 1.0)
    first, second = lines(caplog.text)
    assert first.endswith("data=0%")
    assert second.endswith("left=00:16")


def test_log_file(started, tmp_path, clock):
    """Messages and a line each logging interval, dated; a resumed run appends; the token is in none of them."""
    file, token = tmp_path / "logs" / "run.log", "hf_" + "SecretOfThisTest" * 2
    progress = started(log_file=file, max_train_steps=10, push_to_hub=True, hub_token=token)
    update(progress, 1.0)
    log.logger.warning(f"the server says: {token}\nand more")
    started({"step": 1, "samples_seen": 2}, log_file=file, max_train_steps=10, resume_from_checkpoint="latest")
    text = file.read_text()
    assert all(re.match(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d (INFO|WARNING) ", line) for line in text.splitlines())
    assert len(lines(text)) == 1
    assert text.count("6 samples, 2 an update, 10 updates") == 2
    assert "WARNING the server says: ***\\nand more\n" in text


def test_log_file_begins_with_what_is_trained(started, model, tmp_path):
    started(log_file=tmp_path / "run.log")
    line = (tmp_path / "run.log").read_text().splitlines()[0]
    assert line.endswith(f" --pretrained_model_name_or_path={model} --output_dir={tmp_path / 'out'}")
    assert f" INFO {Path(sys.argv[0]).name} --" in line


def test_log_file_ends_with_what_ended_the_run(started, tmp_path):
    started(log_file=tmp_path / "run.log")

    def main():
        raise SystemExit("error: no luck")

    def broken():
        raise ValueError("out of luck")

    for program in (main, broken):
        with pytest.raises((SystemExit, ValueError)):
            lifecycle.run(program)
    text = (tmp_path / "run.log").read_text()
    assert " ERROR error: no luck\n" in text
    assert text.endswith("ValueError: out of luck\n\n")


def test_log_file_that_cannot_be_written(started, tmp_path, capsys):
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit, match=r"^error: --log_file \S*file/run.log cannot be written: "):
        started(log_file=tmp_path / "file" / "run.log")
    with pytest.raises(SystemExit):
        started(log_file=tmp_path)
    assert f"error: --log_file {tmp_path} is a folder: name a file in it" in capsys.readouterr().err


def test_log_file_on_a_full_disk_does_not_end_the_run(started, caplog):
    progress = started(log_file="/dev/full", max_train_steps=10)
    update(progress, 1.0)
    update(progress, 1.0)
    assert caplog.text.count("--log_file /dev/full cannot be written any longer: [Errno 28]") == 1
    assert len(lines(caplog.text)) == 2


@pytest.mark.gpu
def test_peak_memory_is_of_the_interval(started, tmp_path):
    progress = started(max_train_steps=9)
    held = torch.empty(2**28, device="cuda")  # a GiB
    update(progress, 1.0)
    del held  # with the second interval under way
    update(progress, 1.0)
    update(progress, 1.0)
    first, second, third = (row["peak_memory_gib"] for row in rows(tmp_path))
    assert first == second >= 1.0
    assert third <= first - 1.0


def test_checkpoint_within_an_interval_changes_no_row(started, tmp_path):
    """It reads the losses early, and the manifest takes along those that stand in no row yet."""
    progress = started(logging_steps=2)
    update(progress, 1.0, grad_norm=3.0)
    progress.fetch_losses()
    progress.fetch_losses()
    position = json.loads(json.dumps(progress.position()))
    update(progress, 5.0)
    assert [(row["step"], row["loss"]) for row in rows(tmp_path)] == [(2, 3.0)]
    update(started(position, logging_steps=2), 5.0)
    assert [(row["step"], row["loss"]) for row in rows(tmp_path)] == [(2, 3.0)]


def test_position(started):
    progress = started(gradient_accumulation_steps=2, max_train_steps=10)
    for _ in range(3):
        update(progress, 1.0, 1.0)
    position = progress.position()
    assert set(position.pop("data")) == {"images", "captions", "samples", "order"}
    assert position == {
        "step": 3, "samples_seen": 12, "seed": 3, "effective_batch": 4, "total": 10, "dataset_size": 6,
        "unreported": [],
    }  # fmt: skip
    assert (progress.total, progress.effective_batch) == (10, 4)


@pytest.mark.parametrize(
    ("planned", "said"),
    [
        (8, "the learning rate is 0.0005 in the next update, 3.81e-05 in the last, number 8 (--lr_scheduler cosine)"),
        (None, "the learning rate is 0.0005 in the next update, 3.81e-05 in the last"),  # by an older version
        (4, "the run is now 8 updates long, not 4, and --lr_scheduler cosine with it: the learning rate is 0.0005 in"),
    ],
)
def test_what_the_learning_rate_will_be(started, caplog, planned, said):
    """A schedule stretched over more updates goes up again."""
    position = {"step": 4, "samples_seen": 8, "seed": 3} | ({"total": planned} if planned else {})
    started(position, max_train_steps=8, lr_scheduler="cosine", lr_warmup_steps=0)
    assert said in caplog.text


def test_nothing_is_said_of_a_constant_rate(started, caplog):
    started(max_train_steps=8)
    assert "learning rate" not in caplog.text


def test_validation_is_due_when_an_epoch_is_complete(started):
    """Six samples, four an update: epochs end within updates 2, 3, 5 and 6. The last is validated after the export."""
    progress = started(gradient_accumulation_steps=2, max_train_steps=6, validation_epochs=1, validation_prompts=["a"])
    due = []
    for _ in range(6):
        update(progress, 1.0, 1.0)
        due.append(progress.validation_due())
    assert due == [False, True, True, False, True, False]


def test_validation_every_other_epoch(started):
    progress = started(train_batch_size=6, max_train_steps=5, validation_epochs=2, validation_prompts=["a"])
    due = []
    for _ in range(5):
        update(progress, 1.0)
        due.append(progress.validation_due())
    assert due == [False, True, False, True, False]


def test_rows_after_the_checkpoint_are_dropped_and_written_again(started, tmp_path):
    first = started(max_train_steps=6)
    for loss in (1.0, 2.0, 3.0, 4.0):
        update(first, loss)
    before = rows(tmp_path)
    resumed = started({"step": 2, "samples_seen": 4}, max_train_steps=6)
    assert rows(tmp_path) == before[:2]
    update(resumed, 7.0)
    assert [(row["step"], row["loss"], row["epoch"]) for row in rows(tmp_path)][1:] == [(2, 2.0, 0.6667), (3, 7.0, 1.0)]


def test_line_cut_short_is_dropped(started, tmp_path):
    update(started(), 1.0)
    file = tmp_path / "out" / "metrics.jsonl"
    whole = file.read_text()
    file.write_text(whole + '{"step": 2, "epo')
    resumed = started({"step": 2, "samples_seen": 4})
    assert file.read_text() == whole
    update(resumed, 3.0)
    assert [row["step"] for row in rows(tmp_path)] == [1, 3]


def test_new_run_begins_a_new_file(started, tmp_path):
    update(started(), 1.0)
    started()
    assert rows(tmp_path) == []


def test_rows_are_read_without_a_run(tmp_path, monkeypatch):
    monkeypatch.setattr(PartialState, "_shared_state", {})  # as in a process that has no Accelerator
    whole = [{"step": step, "loss": 1.0, "lr": 0.5, "grad_norm": None} for step in (1, 2)]
    lines = [json.dumps(whole[0]), "\0\0", "5", '{"step": 2}', json.dumps(whole[1]), '{"st']
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines))
    assert output_folder.read_metrics(tmp_path) == whole


@pytest.mark.usefixtures("drawn_each_time")
def test_curves_are_drawn(tmp_path):
    values = [{"step": i, "loss": math.exp(-i / 9), "lr": 1e-4, "grad_norm": 1 / i} for i in range(1, 40)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in values))
    path = curves.plot_curves(tmp_path)
    assert path == tmp_path / "training_curves.png"
    with Image.open(path) as picture:
        assert picture.format == "PNG"
        assert picture.size == (1200, 340)
        assert len(set(picture.convert("L").crop((50, 30, 380, 280)).getdata())) > 20  # something is drawn in the frame


def test_no_rows_no_curves(tmp_path):
    (tmp_path / "metrics.jsonl").touch()
    assert curves.plot_curves(tmp_path) is None
    assert not (tmp_path / "training_curves.png").exists()


@pytest.mark.usefixtures("drawn_each_time")
def test_closing_draws_the_curves(started, tmp_path):
    progress = started(max_train_steps=1)
    update(progress, 1.0)
    progress.close()
    assert (tmp_path / "out" / "training_curves.png").stat().st_size > 5000


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_bad_loss_names_the_samples_of_its_step(started, tmp_path, pictures, bad):
    """Found at the end of the interval, and told of the very update: step 2 of 3, its two micro-batches."""
    progress = started(gradient_accumulation_steps=2, logging_steps=3, max_train_steps=9)
    update(progress, 1.0, 1.0, indices=(0, 1))
    progress.add_micro_batch(torch.tensor(1.0), batch((2, 3)))
    progress.add_micro_batch(torch.tensor(bad), batch((4, 5)))
    progress.count_update(torch.tensor(1.0), 0.5)
    progress.add_micro_batch(torch.tensor(1.0), batch((0, 1)))
    progress.add_micro_batch(torch.tensor(1.0), batch((0, 1)))
    with pytest.raises(SystemExit) as stop:
        progress.count_update(torch.tensor(1.0), 0.5)
    names = "; ".join(f"row {i} ({pictures / f'{i}.png'}, metadata.jsonl line {i + 1})" for i in (2, 3, 4, 5))
    message = str(stop.value)
    assert message.startswith(f"error: loss {bad} at step 2, ")
    assert f"the step's samples: {names}. " in message
    assert rows(tmp_path) == []


def test_bad_gradient_stops_the_run(started):
    progress = started()
    with pytest.raises(SystemExit, match=r"error: gradient norm inf at step 1, .*row 0 .*row 1 "):
        update(progress, 1.0, grad_norm=math.inf)


def test_checkpoint_reads_the_losses_first(started):
    """`read` is called before a save, so nothing non-finite is ever saved, whatever the logging interval."""
    progress = started(logging_steps=100, max_train_steps=100)
    update(progress, math.nan)
    with pytest.raises(SystemExit, match="error: loss nan at step 1"):
        progress.fetch_losses()


def test_what_frozen_networks_gave_is_told_from_the_trained_one(started, pictures):
    """The first tensor, by name, that is not finite, and the samples that it is of."""
    progress = started(logging_steps=2, max_train_steps=9)
    update(progress, 1.0)
    latents = torch.ones(2, 4, 4, 4)
    latents[1, 0, 0, 0] = float("inf")
    progress.add_micro_batch(
        torch.tensor(math.nan), batch((2, 3)) | {"latents_mean": latents.half(), "noise": torch.ones(2, 4)}
    )
    with pytest.raises(SystemExit) as stop:
        progress.count_update(torch.tensor(math.nan), 0.5)
    assert str(stop.value) == (
        "error: loss nan at step 2, nothing saved since; the frozen networks' latents_mean is not finite for "
        f"row 3 ({pictures / '3.png'}, metadata.jsonl line 4): "
        "the weights of a frozen network may be damaged, or too large"
    )


def skip(progress, updates: int) -> None:
    for _ in range(updates):
        update(progress, 1.0, grad_norm=math.inf)


def test_updates_that_the_loss_scaler_skips(started, tmp_path):
    """Any number of them, but not 32 in a row, over whatever logging intervals: the scale is then next to nothing."""
    progress = started(max_train_steps=900, logging_steps=3)
    progress.precision = "fp16"  # which on a CPU becomes fp32
    skip(progress, 31)
    update(progress, 1.0)
    skip(progress, 31)
    assert rows(tmp_path)[0]["grad_norm"] is None
    with pytest.raises(SystemExit, match="32 updates in a row skipped, since gradients overflow in fp16, at step 64, "):
        skip(progress, 3)


def test_without_a_scaler_one_is_too_many(started):
    progress = started(max_train_steps=9)
    with pytest.raises(SystemExit, match="gradient norm inf at step 1, "):
        skip(progress, 1)
