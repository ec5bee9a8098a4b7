"""Contract: a run that goes back shows its own course. What the course that was left has written is kept, and said."""

import json
import shutil

import pytest
from conftest import load_script
from PIL import Image
from runs import checkpoints, rows

RUN = {
    "max_train_steps": 6, "checkpointing_steps": 2, "train_batch_size": 6, "validation_epochs": 2,
    "validation_prompts": ["a red bird"],
}  # fmt: skip
LATER = ["step-000004", "step-000004.png", "step-000006", "step-000006.png"]


@pytest.fixture(scope="module", autouse=True)
def cheap_pictures():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(load_script("sd"), "generate_image", lambda index, **_: Image.new("RGB", (32, 32), (0, 9, 90)))
        yield


@pytest.fixture
def out(finished, tmp_path, caplog):
    """Output folder of a run of six updates: checkpoints and grids at 2, 4 and 6."""
    folder = shutil.copytree(finished("sd", **RUN), tmp_path / "out")
    caplog.clear()
    return folder


def grids(folder) -> list[str]:
    return sorted(path.name for path in folder.glob("step-*"))


def said(caplog) -> str:
    return next(r.message for r in caplog.records if r.message.startswith("done after"))


def shown(out) -> str | None:
    """The grid that the card shows, and what it calls it."""
    lines = [line for line in (out / "README.md").read_text().splitlines() if line.startswith("![")]
    return lines[0] if lines else None


def test_a_shorter_course(out, train, caplog):
    before = (out / "metrics.jsonl").read_text()
    train(**RUN | {"max_train_steps": 3}, resume_from_checkpoint="checkpoint-2")
    assert grids(out / "validation") == [
        "step-000000", "step-000000.png", "step-000002", "step-000002.png", "step-000003", "step-000003.png",
    ]  # fmt: skip
    assert grids(out / "validation.1") == LATER
    assert [row["step"] for row in rows(out)] == [1, 2, 3]
    assert (out / "metrics.jsonl.1").read_text() == before
    assert checkpoints(out) == ["checkpoint-2", "checkpoint-4.1", "checkpoint-6.1"]
    for line in (
        f"{out}/checkpoint-6 is later than the checkpoint resumed from; moved to {out}/checkpoint-6.1",
        f"moved to {out}/validation.1",
        f"is kept in {out}/metrics.jsonl.1",
    ):
        assert line in caplog.text
    assert said(caplog).endswith(f"README.md; before and after: {out}/validation/step-000003.png")
    assert shown(out) == "![base model and fine-tuned model](validation/step-000003.png)"


def test_the_same_course_twice(out, train, caplog):
    train(**RUN, resume_from_checkpoint="checkpoint-2")
    train(**RUN, resume_from_checkpoint="checkpoint-4")
    assert grids(out / "validation.1") == LATER
    assert grids(out / "validation.2") == LATER[2:]
    assert [row["step"] for row in rows(out)] == [1, 2, 3, 4, 5, 6]
    assert shown(out) == "![base model and fine-tuned model](validation/step-000006.png)"


def test_going_on_after_a_crash_keeps_nothing_twice(out, train, caplog):
    """The same flags write the same again."""
    shutil.rmtree(out / "checkpoint-6")
    train(**RUN, resume_from_checkpoint="latest")
    assert [path.name for path in out.glob("*.1")] == []
    assert grids(out / "validation")[-4:] == LATER


def test_other_prompts(out, train, caplog):
    """The untouched model was never asked for them: there is no "before"."""
    train(**RUN | {"validation_prompts": ["a blue bird"], "max_train_steps": 8}, resume_from_checkpoint="checkpoint-6")
    assert said(caplog).endswith(f"; validation images: {out}/validation/step-000008.png")
    assert shown(out) == "![fine-tuned model](validation/step-000008.png)"
    assert "- `a blue bird`" in (out / "README.md").read_text()
    with Image.open(out / "validation" / "step-000008.png") as grid:
        assert grid.height < 2 * 166, "one row"


@pytest.mark.parametrize("checkpoint", ["checkpoint-2", "checkpoint-6"])
def test_validation_switched_off(out, train, caplog, checkpoint):
    train(**RUN | {"validation_prompts": None, "max_train_steps": 7}, resume_from_checkpoint=checkpoint)
    assert said(caplog).endswith("README.md")
    assert shown(out) is None


def test_a_longer_course_whose_schedule_is_another(out, train, caplog):
    """The last grid of the shorter one is no step of this one: its last checkpoint came before."""
    folder = train(**RUN | {"max_train_steps": 3}, output_dir=out.parent / "other")
    train(**RUN, output_dir=folder, resume_from_checkpoint="latest")
    assert grids(folder / "validation.1") == ["step-000003", "step-000003.png"]
    assert "step-000003.png" not in grids(folder / "validation")
    assert shown(folder) == "![base model and fine-tuned model](validation/step-000006.png)"


def test_fewer_updates_than_were_made(out, train, caplog):
    train(**RUN | {"max_train_steps": 3}, resume_from_checkpoint="latest")
    assert "done after 6 updates" in said(caplog)
    assert shown(out) == "![base model and fine-tuned model](validation/step-000006.png)"
    assert not list(out.glob("*.1"))


def test_the_course_that_was_left_is_taken_up_again(out, train, caplog):
    """Of the rows and grids at hand none is known to be its own, but for the untouched model's."""
    train(**RUN | {"learning_rate": 1e-4}, resume_from_checkpoint="checkpoint-2")
    assert checkpoints(out)[-2:] == ["checkpoint-6", "checkpoint-6.1"]
    train(**RUN | {"max_train_steps": 7}, resume_from_checkpoint="checkpoint-6.1")
    assert f"checkpoint-6 is of the same step as the checkpoint resumed from; moved to {out}/checkpoint-6.2" in (
        caplog.text
    )
    assert [row["step"] for row in rows(out)] == [7]
    assert len((out / "metrics.jsonl.2").read_text().splitlines()) == 6
    drawn = ["step-000000", "step-000000.png", *LATER[2:], "step-000007", "step-000007.png"]
    assert grids(out / "validation") == drawn, "that of step 6, which is due, with its own weights"
    assert shown(out) == "![base model and fine-tuned model](validation/step-000007.png)"


def test_a_checkpoint_of_another_folder(out, train, caplog):
    """What an earlier run has left in the folder is no part of this one, its untouched model's row neither."""
    other = train(**RUN | {"max_train_steps": 2, "seed": 4}, output_dir=out.parent / "other")
    (other / "checkpoint-2").rename(out.parent / "elsewhere")
    train(**RUN | {"max_train_steps": 3}, output_dir=other, resume_from_checkpoint=out / "checkpoint-2", seed=3)
    assert grids(other / "validation.1") == ["step-000000", "step-000000.png", "step-000002", "step-000002.png"]
    assert [row["step"] for row in rows(other)] == [3]
    assert shown(other) == "![fine-tuned model](validation/step-000003.png)"
    assert json.loads((other / "metrics.jsonl.1").read_text().splitlines()[-1])["step"] == 2
