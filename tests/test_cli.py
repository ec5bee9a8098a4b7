"""The command line is the published scripts' one: nothing missing, nothing changed, our additions frozen."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import load_script
from scripts import REPOSITORY, SCRIPTS, TORCH

from t2i_training.cli import checks

RECORDED = json.loads((Path(__file__).parent / "data" / "recorded_flags.json").read_text())
CACHE = {  # the flags of cached encodings, as every script that has them has them
    "cache_encodings": {"type": None, "default": False, "nargs": 0},
    "encodings_dir": {"type": "str", "default": None},
    "cache_crops": {"type": "int", "default": 4},
}
DEFAULTS = {"dataloader_num_workers": None}  # that differ from the published ones: results do not depend on them
TYPES = {None: "str", str: "str", int: "int", float: "float"}


@pytest.fixture(params=SCRIPTS)
def script(request):
    if request.param == "sd_flax":
        pytest.importorskip("jax")
    return request.param


def recorded(script: str) -> dict:
    return RECORDED[SCRIPTS[script].path.relative_to(REPOSITORY).as_posix()]


def actions(script: str, monkeypatch) -> dict:
    """The flags of a script's parser, by name."""
    monkeypatch.setattr(checks, "parse", lambda parser, *_: parser)
    module = load_script(script)
    if script == "sd_flax":
        monkeypatch.setattr(module.flax_flags, "need_packages", lambda parser: None)
    parser = module.parse_args()
    return {action.dest: action for action in parser._actions if action.dest != "help"}


def facts(action) -> dict:
    kind = getattr(action.type, "kind", action.type)  # of those that take a range
    entry = {
        "type": None if action.nargs == 0 else TYPES[kind], "default": action.default,
        "choices": action.choices, "nargs": action.nargs, "required": action.required or None,
    }  # fmt: skip
    return {name: value for name, value in entry.items() if value is not None or name in ("type", "default")}


def test_every_published_flag_is_here_unchanged(script, monkeypatch):
    """Same name, type, choices, default, number of values, and required or not; but for DEFAULTS."""
    here = {name: facts(action) for name, action in actions(script, monkeypatch).items()}
    for name, default in DEFAULTS.items():
        assert here[name]["default"] == default
        here[name]["default"] = recorded(script).get(name, here[name])["default"]
    assert {name: here.get(name) for name in recorded(script)} == recorded(script)


def test_our_additions_are_these(script, monkeypatch):
    here = actions(script, monkeypatch)
    assert set(here) - set(recorded(script)) == SCRIPTS[script].ours
    cache = {name: facts(action) for name, action in here.items() if name in CACHE}
    assert cache == {
        name: entry for name, entry in CACHE.items() if name != "cache_crops" or SCRIPTS[script].base == "model"
    }


def test_every_flag_is_spelled_in_full_and_explained(script, monkeypatch):
    for name, action in actions(script, monkeypatch).items():
        also = ["--validation_prompt"] if name == "validation_prompts" else []
        assert action.option_strings == [f"--{name}", *also]
        assert action.help


def test_recorded_facts_are_of_seven_scripts():
    assert {path: len(flags) for path, flags in RECORDED.items()} == {
        "text_to_image/train_text_to_image.py": 57,
        "text_to_image/train_text_to_image_lora.py": 51,
        "text_to_image/train_text_to_image_flax.py": 34,
        "kandinsky2_2/text_to_image/train_text_to_image_decoder.py": 43,
        "kandinsky2_2/text_to_image/train_text_to_image_decoder_lora.py": 42,
        "kandinsky2_2/text_to_image/train_text_to_image_prior.py": 42,
        "kandinsky2_2/text_to_image/train_text_to_image_prior_lora.py": 42,
    }


def test_several_prompts_under_the_name_of_one(sd_flags):
    """The guides speak of --validation_prompt for scripts that have --validation_prompts."""
    for tokens in (["--validation_prompt", "a red bird"], ["--validation_prompt=a red bird"]):
        assert load_script("sd").parse_args([*sd_flags(), *tokens]).validation_prompts == ["a red bird"]


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ("--learning=1", "learning_rate"), ("--max_train_st=1", "max_train_steps"), ("--conf=x", "config"),
        ("--use_e", "use_ema"), ("--learning-rate=1", "learning_rate"),
    ],
)  # fmt: skip
def test_abbreviations_are_refused(sd_flags, capsys, given, meant):
    with pytest.raises(SystemExit):
        load_script("sd").parse_args([*sd_flags(), given])
    assert f"unrecognized arguments: {given} (did you mean --{meant}" in capsys.readouterr().err


def test_an_abbreviation_of_a_flag_that_is_required(sd_flags, capsys):
    with pytest.raises(SystemExit):
        load_script("sd").parse_args(sd_flags(pretrained_model_name_or_path=None, pretrained_model="x"))
    message = "there is no --pretrained_model (did you mean --pretrained_model_name_or_path?)"
    assert message in capsys.readouterr().err


def test_values_reach_the_arguments(sd_flags):
    tokens = sd_flags(validation_prompts=["a cat", "a dog"], use_ema=True, snr_gamma=5, mixed_precision="bf16")
    args = load_script("sd").parse_args([*tokens, "--learning_rate=2e-5"])
    assert (args.validation_prompts, args.use_ema, args.snr_gamma) == (["a cat", "a dog"], True, 5.0)
    assert (args.mixed_precision, args.learning_rate) == ("bf16", 2e-5)


def imported(tokens: list[str], script: str) -> tuple[subprocess.CompletedProcess, set[str]]:
    """A script run for itself, and the top-level modules that it imported."""
    command = [sys.executable, "-X", "importtime", str(SCRIPTS[script].path), *tokens]
    run = subprocess.run(command, capture_output=True, text=True, timeout=60)
    names = re.findall(r"^import time:.*\| +([\w.]+)$", run.stderr, re.MULTILINE)
    assert "argparse" in names
    return run, {name.partition(".")[0] for name in names}


HEAVY = {"torch", "diffusers", "transformers", "accelerate", "datasets", "numpy", "PIL", "jax", "flax"}


def test_help_names_every_flag_and_imports_nothing_heavy(script):
    run, modules = imported(["--help"], script)
    assert run.returncode == 0
    assert all(
        f"--{name} " in run.stdout or f"--{name}\n" in run.stdout for name in [*recorded(script), *SCRIPTS[script].ours]
    )
    assert not modules & HEAVY


def test_usage_errors_import_nothing_heavy(script, tmp_path):
    model = (
        "pretrained_model_name_or_path" if SCRIPTS[script].base == "model" else "pretrained_prior_model_name_or_path"
    )
    (tmp_path / "run.yaml").write_text(f"resolution: 12\ntrain_data_dir: .\n{model}: ./\n")
    for tokens in ([], ["--no_such_flag"], ["--config", str(tmp_path / "run.yaml")]):
        run, modules = imported(tokens, script)
        assert run.returncode == 2
        assert "error: " in run.stderr
        assert not modules & HEAVY


def test_without_fcntl(sd_flags):
    """As on Windows: one line, at once."""
    hide = "import runpy, sys; sys.modules['fcntl'] = None; sys.argv = sys.argv[1:]; "
    code = hide + "runpy.run_path(sys.argv[0], run_name='__main__')"
    command = [sys.executable, "-X", "importtime", "-c", code, str(TORCH["sd"].path), *sd_flags()]
    run = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert run.returncode == 2
    assert (
        "error: file locks (fcntl) and forked loader workers need Linux or macOS: on Windows, run it in WSL"
        in run.stderr
    )
    assert " torch\n" not in run.stderr
