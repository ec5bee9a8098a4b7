"""The recipes run and continue; the launcher's settings are such as it knows."""

import os
import subprocess
import sys

import pytest
from accelerate.commands.config.config_args import load_config_from_file
from conftest import flags, free_port, load_script
from runs import rows
from safetensors.torch import load_file
from scripts import REPOSITORY, SCRIPTS, TORCH

EXAMPLES = REPOSITORY / "examples"
RECIPES = {script.recipe: name for name, script in SCRIPTS.items()}


@pytest.fixture
def recipe(tmp_path):
    """recipe(name, *arguments): (words before the script, the script's path, its flags) of what it would launch."""
    for program in ("accelerate", "python"):
        path = tmp_path / "programs" / program
        path.parent.mkdir(exist_ok=True)
        path.write_text('#!/bin/sh\nprintf "%s\\0" "$@"\n')
        path.chmod(0o755)

    def run(name: str, *arguments, **environment) -> tuple[list[str], str, list[str]]:
        environment = os.environ | {"PATH": f"{tmp_path / 'programs'}:{os.environ['PATH']}"} | environment
        words = ["bash", str(EXAMPLES / "recipes" / name), *map(str, arguments)]
        done = subprocess.run(words, env=environment, capture_output=True, text=True, check=True, cwd=tmp_path)
        found = done.stdout.split("\0")[:-1]
        (at,) = (i for i, word in enumerate(found) if word.endswith(".py"))
        return found[:at], found[at], found[at + 1 :]

    return run


def test_every_recipe_is_known():
    assert sorted(RECIPES) == sorted(path.name for path in (EXAMPLES / "recipes").iterdir())


@pytest.mark.parametrize("name", RECIPES)
def test_recipe_launches_its_script(recipe, name, pictures, tmp_path):
    before, script, tokens = recipe(name, pictures, tmp_path / "out", "--seed=3")
    assert SCRIPTS[RECIPES[name]].path.samefile(script)
    args = load_script(RECIPES[name]).parse_args(tokens)
    assert before == [], "under `accelerate launch` a SIGTERM would not reach the script"
    assert args.mixed_precision == "bf16"
    assert args.seed == 3
    assert args.train_data_dir == str(pictures)
    assert args.output_dir == str(tmp_path / "out")
    assert args.max_train_steps >= 1000


def test_recipe_with_a_launcher(recipe, pictures, tmp_path):
    """Its words come before the script; the precision is the script's own flag."""
    before, script, tokens = recipe("sd_lora.sh", pictures, tmp_path / "out", LAUNCH="accelerate launch --multi_gpu")
    assert before == ["launch", "--multi_gpu"]
    assert TORCH["sd_lora"].path.samefile(script)
    assert "--mixed_precision=bf16" in tokens


@pytest.mark.parametrize("name", [name for name in RECIPES if name != "sd_flax.sh"])
def test_recipe_trains_and_continues(recipe, name, model, prior_model, decoder_model, pictures, tmp_path):
    script, out = RECIPES[name], tmp_path / "out"
    small = {"resolution": 32, "train_batch_size": 1, "checkpointing_steps": 1, "report_to": "none"}
    if SCRIPTS[script].base != "model":
        small |= {"pretrained_prior_model_name_or_path": prior_model}
        small |= {"pretrained_decoder_model_name_or_path": decoder_model}
    for steps in (1, 2):
        _, _, tokens = recipe(name, pictures, out, *flags(**small, max_train_steps=steps), MODEL=str(model))
        load_script(script).main(tokens)
        assert [row["step"] for row in rows(out)] == list(range(1, steps + 1))
    assert all(tensor.isfinite().all() for tensor in load_file(out / SCRIPTS[script].trained).values())


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("cpu.yaml", {"distributed_type": "NO", "use_cpu": True, "mixed_precision": "no"}),
        ("one_gpu.yaml", {"distributed_type": "NO", "use_cpu": False, "mixed_precision": "bf16"}),
        ("two_cpu_processes.yaml", {"distributed_type": "MULTI_GPU", "use_cpu": True, "num_processes": 2}),
        ("multi_gpu.yaml", {"distributed_type": "MULTI_GPU", "use_cpu": False, "mixed_precision": "bf16"}),
    ],
)
def test_launcher_knows_the_settings(name, expected):
    config = load_config_from_file(str(EXAMPLES / "accelerate" / name)).to_dict()
    assert {key: config[key] for key in expected} == expected


@pytest.mark.slow("28 s, three interpreters: test_contract_world_size.py holds the two processes")
def test_two_processes_without_a_gpu(sd_flags, tmp_path):
    """By the launcher itself, and without what the tests set to keep to the CPU."""
    environment = {name: value for name, value in os.environ.items() if name != "ACCELERATE_USE_CPU"}
    environment |= {"CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "accelerate.commands.launch", "--main_process_port", str(free_port())]
    command += ["--config_file", str(EXAMPLES / "accelerate" / "two_cpu_processes.yaml"), str(TORCH["sd"].path)]
    run = subprocess.run([*command, *sd_flags(max_train_steps=2)], env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert "4 an update, 2 updates" in run.stderr
    assert "2 x cpu" in run.stderr
    assert [row["step"] for row in rows(tmp_path / "out")] == [1, 2]
