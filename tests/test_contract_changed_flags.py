"""Contract: what a run resumed with other flags does. docs/guarantees.md has the table; each change is named.

`python tests/faults/table.py` prints a line a case.
"""

import json
import shutil

import pytest
import tiny
from conftest import load_script
from runs import checkpoints, interrupt, outcome, rows
from scripts import ADAPTERS

from t2i_training.run.checkpoint import read_manifest

# A run of four updates, the learning rate falling along a cosine, stopped after the second.
RUN = {"max_train_steps": 4, "lr_scheduler": "cosine", "learning_rate": 1e-2}
SAME = {  # the result is that of an undisturbed run, bit for bit
    "dataloader_num_workers": 1, "checkpointing_steps": 1, "checkpoints_total_limit": 1, "validation_prompt": "a",
    "logging_dir": "other", "report_to": "tensorboard", "save_kohya": True,
}  # fmt: skip
ACT = {  # acts from the checkpoint on
    "learning_rate": 5e-3, "lr_scheduler": "constant", "lr_warmup_steps": 4, "adam_beta1": 0.5, "adam_beta2": 0.9,
    "adam_weight_decay": 0.5, "adam_epsilon": 1e-3, "max_grad_norm": 1e-3, "snr_gamma": 1.0, "noise_offset": 0.5,
    "input_perturbation": 0.5, "prediction_type": "v_prediction", "caption_dropout": 0.9, "random_flip": True,
    "center_crop": True, "resolution": 64, "train_batch_size": 3,
    "gradient_accumulation_steps": 2, "max_train_samples": 5, "max_train_steps": 6, "mixed_precision": "bf16",
    "cache_encodings": True, "caption_prefix": "zwx", "num_repeats": 2, "max_token_length": 150,
}  # fmt: skip
ALIKE = (  # acts where a flag that is not named here does: optimizer, schedule, loss, reading of images
    "lr_warmup_steps", "adam_beta2", "adam_weight_decay", "adam_epsilon", "noise_offset", "input_perturbation",
    "random_flip", "center_crop",
)  # fmt: skip
REFUSED = {  # what the one line says
    "seed": (4, "error: --seed 4 differs from the checkpoint's, 3: leave it out to continue"),
    "rank": (2, "does not fit this model: its adapters have other names, or another --rank"),
}
SLOW = pytest.mark.slow("a second each: another flag acts in the same place")
SAID = {  # besides the flag itself
    "train_batch_size": "the effective batch is now 3, not 2",
    "gradient_accumulation_steps": "the effective batch is now 4, not 2",
    "num_repeats": "the data set has changed since the checkpoint: it had 6 samples and has 12, which are seen in",
    "max_train_samples": "the data set has changed since the checkpoint: it had 6 samples and has 5, which are seen in",
}


@pytest.fixture(scope="module")
def run(command):
    """run(output_dir, **changes): a LoRA run in this process."""

    def call(output_dir, script="sd_lora", **changes):
        load_script(script).main(command(script, output_dir=output_dir, **{**RUN, **changes}))
        return output_dir

    return call


@pytest.fixture(scope="module")
def whole(run, tmp_path_factory):
    return run(tmp_path_factory.mktemp("flags") / "out", checkpointing_steps=4)


@pytest.fixture(scope="module")
def stopped(run, tmp_path_factory):
    folder = tmp_path_factory.mktemp("flags") / "out"
    with interrupt(2):
        run(folder, checkpointing_steps=4)
    assert checkpoints(folder) == ["checkpoint-2"]
    return folder


@pytest.fixture
def out(stopped, tmp_path):
    return shutil.copytree(stopped, tmp_path / "out")


@pytest.fixture
def resume(run, out):
    return lambda **changes: run(out, resume_from_checkpoint="latest", **{"checkpointing_steps": 4, **changes})


def named(caplog) -> str:
    return next((r.message for r in caplog.records if "flags that have changed" in r.message), "")


def refusal(call, **changes) -> str:
    with pytest.raises(SystemExit) as stop:
        call(**changes)
    message = str(stop.value.code)
    assert message.startswith("error: ")
    assert "\n" not in message
    return message


@pytest.mark.parametrize("flag", SAME)
def test_the_result_is_the_same(resume, whole, case, caplog, flag):
    case(f"resumed with another --{flag}", "the same result, bit for bit")
    caplog.clear()
    out = resume(**{flag: SAME[flag]})
    result = outcome(out, 4, ADAPTERS, 60)
    for place in ("files", "export"):  # what --save_kohya adds apart
        result[place] = {ADAPTERS: result[place][ADAPTERS]}
    assert result == outcome(whole, 4, ADAPTERS, 60)
    assert f"--{flag} " in named(caplog)
    case.seen(f"same; {named(caplog)}")


@pytest.mark.parametrize("flag", [pytest.param(flag, marks=SLOW) if flag in ALIKE else flag for flag in ACT])
def test_it_acts_from_the_checkpoint_on(resume, whole, case, caplog, flag):
    case(f"resumed with another --{flag}", "acts from the checkpoint on, and is named")
    caplog.clear()
    out = resume(**{flag: ACT[flag]})
    assert rows(out)[:2] == rows(whole)[:2], "what was before is as it was"
    assert rows(out)[-1]["step"] == (ACT["max_train_steps"] if flag == "max_train_steps" else 4)
    assert rows(out)[2:] != rows(whole)[2:]
    assert f"--{flag} " in named(caplog)
    assert SAID.get(flag, "") in caplog.text
    assert (out / ADAPTERS).exists()
    case.seen("; ".join([named(caplog), SAID.get(flag, "")]).strip("; "))


def test_fewer_updates_than_were_made(resume, out, case, caplog):
    case("resumed with fewer --max_train_steps than were made", "nothing is trained, the checkpoint is exported")
    before = read_manifest(out / "checkpoint-2")
    resume(max_train_steps=1)
    assert read_manifest(out / "checkpoint-2") == before
    assert checkpoints(out) == ["checkpoint-2"]
    assert (out / ADAPTERS).exists()
    case.seen("exported")


@pytest.mark.parametrize("flag", REFUSED)
def test_refused(resume, out, case, flag):
    case(f"resumed with another --{flag}", "refused in one line; nothing is changed")
    value, wanted = REFUSED[flag]
    before = {path: path.read_bytes() for path in out.rglob("*.*") if path.is_file()}
    message = refusal(resume, **{flag: value})
    assert wanted in message
    assert flag == "seed" or str(out / "checkpoint-2") in message
    assert {path: path.read_bytes() for path in out.rglob("*.*") if path.is_file()} == before
    case.seen(message)


@pytest.mark.parametrize("other", ["another script", "another network"])
def test_checkpoint_of_another_model(run, resume, out, case, tmp_path, other):
    case(f"resumed with the checkpoint of {other}", "one line that names the checkpoint")
    if other == "another script":
        message, fault = (
            refusal(run, output_dir=out, script="sd", resume_from_checkpoint="latest"),
            "was not saved by this script",
        )
    else:
        message = refusal(resume, pretrained_model_name_or_path=wider(tmp_path / "model"))
        fault = "does not fit this model"
    assert message.startswith(f"error: {out / 'checkpoint-2'} {fault}: ")
    case.seen(message)


def wider(folder):
    """A Stable Diffusion whose UNet has more channels."""
    from diffusers import UNet2DConditionModel

    tiny.make_stable_diffusion(folder)
    config = json.loads((folder / "unet" / "config.json").read_text()) | {"block_out_channels": [16, 32]}
    UNet2DConditionModel.from_config(config).save_pretrained(folder / "unet")
    return folder


def test_model_of_another_name_is_named(resume, case, caplog, tmp_path):
    """It fits, so it may be the same one elsewhere: the run goes on, and says so."""
    case("resumed with a model of another name and the same shape", "goes on, and is named")
    caplog.clear()
    resume(pretrained_model_name_or_path=tiny.make_stable_diffusion(tmp_path / "moved"))
    assert "--pretrained_model_name_or_path " in named(caplog)
    case.seen(named(caplog))


def test_nothing_is_said_where_nothing_changed(resume, caplog):
    caplog.clear()
    resume()
    assert named(caplog) == ""
