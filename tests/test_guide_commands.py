"""The guides' commands, as they are written there, run and leave what the guides say.

What differs: names of models and data; `--push_to_hub`, which one of them keeps in `test_hub.py`; and, for the CPU, the
resolution (32 for 768 and 512) and the length (2 updates for 15000, 1 epoch for 100). `accelerate launch` itself runs
in `test_train_text_to_image.py`; here its one option is given as the launcher would, by an environment variable.
"""

import shlex

import pytest
from conftest import load_script
from runs import rows, wait_until
from safetensors.torch import load_file
from scripts import REPOSITORY, SCRIPTS, TORCH
from test_trackers import wandb_records

FULL = """
  --dataset_name=$DATASET_NAME \
  --resolution=768 \
  --train_batch_size=1 \
  --gradient_accumulation_steps=4 \
  --gradient_checkpointing \
  --max_train_steps=15000 \
  --learning_rate=1e-05 \
  --max_grad_norm=1 \
  --checkpoints_total_limit=3 \
  --lr_scheduler="constant" --lr_warmup_steps=0 \
  --validation_prompts="A robot naruto, 4k photo" \
  --report_to="wandb" \
  --push_to_hub \
"""
LORA = """
  --dataset_name=$DATASET_NAME --caption_column="text" \
  --resolution=768 \
  --train_batch_size=1 \
  --num_train_epochs=100 --checkpointing_steps=5000 \
  --learning_rate=1e-04 --lr_scheduler="constant" --lr_warmup_steps=0 \
  --seed=42 \
  --rank=4 \
"""
DREAM = '--validation_prompt="cute dragon creature" --report_to="wandb"'
COMMANDS = {
    "decoder": f'train_text_to_image_decoder.py {FULL} --output_dir="kandi2-decoder-naruto-model"',
    "decoder, own files": f'train_text_to_image_decoder.py {FULL} --output_dir="kandi22-decoder-naruto-model"'.replace(
        "--dataset_name=$DATASET_NAME", "--train_data_dir=$TRAIN_DIR"
    ),
    "prior": f'train_text_to_image_prior.py {FULL} --output_dir="kandi2-prior-naruto-model"'.replace(
        "--gradient_checkpointing", ""
    ),
    "decoder_lora": f"""train_text_to_image_decoder_lora.py {LORA} --gradient_checkpointing \
        --output_dir="kandi22-decoder-naruto-lora" {DREAM} --push_to_hub""",
    "prior_lora": f"""train_text_to_image_prior_lora.py {LORA} \
        --output_dir="kandi22-prior-naruto-lora" {DREAM} --push_to_hub""",
    "sd_lora": f"""train_text_to_image_lora.py --pretrained_model_name_or_path=$MODEL_NAME \
        --dataset_name=$DATASET_NAME --caption_column="text" --resolution=512 --random_flip --train_batch_size=1 \
        --num_train_epochs=100 --checkpointing_steps=5000 --learning_rate=1e-04 --lr_scheduler="constant" \
        --lr_warmup_steps=0 --seed=42 --output_dir="sd-pokemon-model-lora" {DREAM}""",
}
FOR_THE_CPU = {
    "--resolution=768": "--resolution=32", "--resolution=512": "--resolution=32",
    "--max_train_steps=15000": "--max_train_steps=2", "--num_train_epochs=100": "--num_train_epochs=1",
}  # fmt: skip


@pytest.fixture
def written(model, prior_model, decoder_model, pictures):
    """written(name): (script, its command line) with today's names for models and data, for the CPU."""

    def make(name: str) -> tuple[str, list[str]]:
        command = COMMANDS[name].replace("$MODEL_NAME", str(model))
        tokens = [FOR_THE_CPU.get(t, t) for t in shlex.split(command.replace("$DATASET_NAME", str(pictures)))]
        tokens = [token.replace("$TRAIN_DIR", str(pictures)) for token in tokens]
        script = name.partition(",")[0]
        assert tokens.pop(0) == TORCH[script].path.name
        if script != "sd_lora":  # these have a default, which is on the hub
            tokens += [f"--pretrained_prior_model_name_or_path={prior_model}"]
            tokens += [f"--pretrained_decoder_model_name_or_path={decoder_model}"]
        return script, tokens

    return make


@pytest.mark.parametrize("name", [name for name in COMMANDS if name != "decoder_lora"])
def test_command_runs_as_written(written, name, tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    script, tokens = written(name)
    cwd = tmp_path / "cwd"
    cwd.mkdir()
    monkeypatch.chdir(cwd)
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp16")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))  # its service keeps the working directory of the first run
    with pytest.warns(UserWarning, match="fp16 needs a GPU: training in fp32"):
        load_script(script).main([token for token in tokens if token != "--push_to_hub"])
    (folder,) = cwd.iterdir()
    assert f"--output_dir={folder.name}" in tokens
    updates = 6 if SCRIPTS[script].is_lora else 2
    assert [row["step"] for row in rows(folder)] == [updates]
    assert rows(folder)[0]["epoch"] == (1.0 if SCRIPTS[script].is_lora else 1.3333)
    assert all(tensor.isfinite().all() for tensor in load_file(folder / SCRIPTS[script].trained).values())
    assert len(list((folder / "validation").glob("step-*.png"))) == 2
    drawn = len(list((folder / "validation" / "step-000000").iterdir()))
    assert drawn == (4 if SCRIPTS[script].is_lora else 1)
    wait_until(lambda: len(wandb_records(tmp_path)) > 5)  # wandb's service may still be writing


def blocks(readme, script: str) -> list[list[str]]:
    """The launches of a script that a README shows, as tokens, without the launcher."""
    text = readme.read_text(encoding="utf-8")
    commands = [block.split("```")[0] for block in text.split("```bash")[1:]]
    found = [command[command.index(script) :] for command in commands if f" {script} " in command]
    return [shlex.split(command.split("\n\n")[0].replace("\\\n", " ")) for command in found]


def test_the_first_page_s_command_is_understood(model, pictures, tmp_path):
    (tokens,) = blocks(REPOSITORY / "README.md", "text_to_image/train_text_to_image_lora.py")
    own = {"--pretrained_model_name_or_path": model, "--train_data_dir": pictures, "--output_dir": tmp_path / "out"}
    tokens = [token for token in tokens[1:] if token.partition("=")[0] not in own]
    args = load_script("sd_lora").parse_args([*tokens, *(f"{name}={value}" for name, value in own.items())])
    assert (args.cache_encodings, args.max_train_steps) == (True, 3000)


def test_readmes_show_the_same_commands():
    """Apart from names of models, data and output folders, which the guides choose."""

    def comparable(tokens):
        own = ("--dataset_name=", "--train_data_dir=", "--output_dir=", "--pretrained", "--resolution=")
        return sorted(token for token in tokens if not token.startswith(own))

    for name, command in COMMANDS.items():
        script = name.partition(",")[0]
        path = TORCH[script].path
        shown = [comparable(block) for block in blocks(path.parent / "README.md", path.name)]
        assert comparable(shlex.split(command)) in shown, f"{name}: {shown}"
