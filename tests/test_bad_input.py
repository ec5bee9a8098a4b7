"""What cannot work ends within seconds, with a non-zero status and one line that names the flag, file or row."""

import importlib.util
import json
import shutil

import datasets
import pytest
import tiny
from conftest import flags, held, load_script
from PIL import Image


@pytest.fixture(scope="module")
def world(model, v_model, tmp_path_factory):
    """Paths that the tables below name in braces: good and broken models and data sets."""
    root = tmp_path_factory.mktemp("bad")
    (root / "empty_folder").mkdir()
    (root / "a_file").write_text("not a folder")
    (root / "not_a_pipeline").mkdir()
    (root / "not_a_pipeline" / "notes.txt").write_text("nothing to load here")

    table = {"picture": [_image(i) for i in range(3)], "words": ["one", "two", "three"], "number": [1, 2, 3]}
    features = datasets.Features(
        {"picture": datasets.Image(), "words": datasets.Value("string"), "number": datasets.Value("int64")}
    )
    whole = datasets.Dataset.from_dict(table, features=features)
    _write(whole, root / "renamed", "train")
    _write(whole, root / "no_train_split", "test")
    _write(whole.select([]), root / "no_rows", "train")
    empty_caption = [{"words": "one"}, {"words": None}, {"words": "three"}]
    _write(whole.map(lambda row, i: empty_caption[i], with_indices=True), root / "null_caption", "train")
    words = datasets.Sequence(datasets.Value("string"))
    lists = whole.map(lambda row, i: {"words": [[], ["a"], ["b", None]][i]}, with_indices=True)
    _write(lists.cast_column("words", words), root / "null_in_list", "train")

    unreadable = tiny.make_pictures(root / "unreadable")
    (unreadable / "4.png").write_bytes(b"this is no image")
    missing = tiny.make_pictures(root / "missing_picture")
    (missing / "2.png").unlink()
    broken = tiny.make_pictures(root / "broken_metadata")
    (broken / "metadata.jsonl").write_text('{"file_name": "0.png", "text": \n')
    (root / "config.yaml").write_text("resolutoin: 64\n")
    (root / "broken.yaml").write_text("resolution: [64\n")
    (root / "list.yaml").write_text("- resolution\n")
    (root / "words.yaml").write_text("resolution: large\n")
    (root / "switch.yaml").write_text("use_ema: 3\n")
    broken_model = shutil.copytree(model, root / "broken_model")
    weights = broken_model / "unet" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    return {path.name.replace(".", "_"): path for path in root.iterdir()} | {"v_model": v_model, "root": root}


def _image(i: int) -> Image.Image:
    return Image.new("RGB", (40, 32), (40 * i, 100, 200))


def _write(dataset, folder, split):
    folder.mkdir()
    dataset.to_parquet(folder / f"{split}.parquet")


def stop(tokens: list[str], capsys) -> tuple[int, str]:
    """(exit status, the one line) of a run in this process that must not go through."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        load_script("sd").main(tokens)
    code = stopped.value.code
    if isinstance(code, str):  # Python prints it and exits with 1
        assert "\n" not in code
        return 1, code
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1, lines
    return code, lines[0].partition(": ")[2]


NO_MODEL = {"pretrained_model_name_or_path": "{root}/nowhere"}
USAGE_ERRORS = {  # refused before torch is imported: exit status 2
    "no model": ({"pretrained_model_name_or_path": None}, "required: --pretrained_model_name_or_path"),
    "model folder missing": (NO_MODEL, "--pretrained_model_name_or_path {root}/nowhere: there is no such folder"),
    "not a pipeline": (
        {"pretrained_model_name_or_path": "{not_a_pipeline}"},
        "--pretrained_model_name_or_path {not_a_pipeline} holds no model_index.json: it is no pipeline of diffusers",
    ),
    "variant missing": ({"variant": "fp16"}, " has no weights of --variant=fp16; leave the flag out"),
    "no data": ({"train_data_dir": None}, "no data: give --dataset_name, or --train_data_dir"),
    "no images": ({"train_data_dir": "{empty_folder}"}, "--train_data_dir {empty_folder} is empty"),
    "data folder missing": ({"train_data_dir": "{root}/gone"}, "--train_data_dir {root}/gone: there is no such folder"),
    "data set missing": (
        {"train_data_dir": None, "dataset_name": "{root}/gone"},
        "--dataset_name {root}/gone: there is no such folder",
    ),
    "unknown flag": ({"resolutoin": 64}, "unrecognized arguments: --resolutoin 64"),
    "not a number": ({"resolution": "large"}, "argument --resolution: invalid int value: 'large'"),
    "interpolation": ({"image_interpolation_mode": "cubic"}, "argument --image_interpolation_mode: invalid choice"),
    "precision": ({"mixed_precision": "fp8"}, "argument --mixed_precision: invalid choice: 'fp8'"),
    "prediction type": (
        {"prediction_type": "velocity"},
        "--prediction_type must be epsilon or v_prediction, not 'velocity'",
    ),
    "resolution": (
        {"resolution": 35},
        "--resolution must be a multiple of 8, not 35; the nearest is 32",
    ),
    "resolution below 8": ({"resolution": 3}, "--resolution must be a multiple of 8, not 3; the nearest is 8"),
    "resolution 0": ({"resolution": 0}, "--resolution must be positive, not 0"),
    "batch size": ({"train_batch_size": 0}, "--train_batch_size must be positive, not 0"),
    "epochs": ({"num_train_epochs": -1}, "--num_train_epochs must be positive, not -1"),
    "steps": ({"max_train_steps": 0}, "--max_train_steps must be positive, not 0"),
    "accumulation": ({"gradient_accumulation_steps": 0}, "--gradient_accumulation_steps must be positive, not 0"),
    "samples": ({"max_train_samples": 0}, "--max_train_samples must be positive, not 0"),
    "checkpointing": ({"checkpointing_steps": 0}, "--checkpointing_steps must be positive, not 0"),
    "limit": ({"checkpoints_total_limit": 0}, "--checkpoints_total_limit must be positive, not 0"),
    "validation epochs": ({"validation_epochs": 0}, "--validation_epochs must be positive, not 0"),
    "logging": ({"logging_steps": 0}, "--logging_steps must be positive, not 0"),
    "gamma": ({"snr_gamma": -5.0}, "--snr_gamma must be positive, not -5.0"),
    "clipping": ({"max_grad_norm": 0.0}, "--max_grad_norm must be positive, not 0.0"),
    "learning rate": ({"learning_rate": -1e-4}, "--learning_rate must be finite and not negative, not -0.0001"),
    "learning rate nan": ({"learning_rate": "nan"}, "--learning_rate must be finite and not negative, not nan"),
    "warm-up": ({"lr_warmup_steps": -1}, "--lr_warmup_steps must be finite and not negative, not -1"),
    "workers": ({"dataloader_num_workers": -1}, "--dataloader_num_workers must be finite and not negative, not -1"),
    "seed": ({"seed": -1}, "--seed must be finite and not negative, not -1"),
    "huge seed": ({"seed": 2**63}, "--seed must be below 2**63"),
    "offset": ({"noise_offset": -0.1}, "--noise_offset must be finite and not negative, not -0.1"),
    "perturbation": ({"input_perturbation": -0.1}, "--input_perturbation must be finite and not negative, not -0.1"),
    "weight decay": ({"adam_weight_decay": -1.0}, "--adam_weight_decay must be finite and not negative, not -1.0"),
    "epsilon": ({"adam_epsilon": 0.0}, "--adam_epsilon must be positive, not 0.0"),
    "beta1": ({"adam_beta1": 1.0}, "--adam_beta1 must be at least 0 and below 1, not 1.0"),
    "beta2": ({"adam_beta2": -0.1}, "--adam_beta2 must be at least 0 and below 1, not -0.1"),
    "dropout": ({"caption_dropout": 1.5}, "--caption_dropout must be at least 0 and below 1, not 1.5"),
    "infinite": ({"max_grad_norm": "nan"}, "--max_grad_norm must be positive, not nan"),
    "schedule": ({"lr_scheduler": "cosinus"}, "--lr_scheduler must be one of linear, cosine, "),
    "schedule rules": ({"lr_scheduler": "piecewise_constant"}, "takes its rules after a colon"),
    "DREAM, v flag": (
        {"dream_training": True, "prediction_type": "v_prediction"},
        "--dream_training needs epsilon prediction",
    ),
    "DREAM, v model": (
        {"dream_training": True, "pretrained_model_name_or_path": "{v_model}"},
        "--dream_training needs epsilon prediction",
    ),
    "DREAM's p alone": ({"dream_detail_preservation": 2.0}, "--dream_detail_preservation does nothing without"),
    "offload alone": ({"offload_ema": True}, "--offload_ema does nothing without --use_ema"),
    "foreach alone": ({"foreach_ema": True}, "--foreach_ema does nothing without --use_ema"),
    "hub name alone": ({"hub_model_id": "me/model"}, "--hub_model_id does nothing without --push_to_hub"),
    "token alone": ({"hub_token": "secret"}, "--hub_token does nothing without --push_to_hub"),
    "tracker": ({"report_to": "tensorbord"}, "--report_to must be one of tensorboard, wandb, comet_ml, all"),
    "token and wandb": (
        {"report_to": "wandb", "push_to_hub": True, "hub_token": "secret"},
        "--report_to wandb together with --hub_token could publish the token; log in with `hf auth login`",
    ),
    "token and all": (
        {"report_to": "all", "push_to_hub": True, "hub_token": "secret"},
        "--report_to all together with --hub_token could publish the token",
    ),
    "resume from nothing": (
        {"resume_from_checkpoint": "checkpoint-7"},
        "--resume_from_checkpoint checkpoint-7: no such checkpoint, in ",
    ),
    "output is a file": ({"output_dir": "{a_file}"}, "--output_dir {a_file} is a file"),
    "config missing": ({"config": "{root}/none.yaml"}, "--config {root}/none.yaml: "),
    "config unknown flag": ({"config": "{config_yaml}"}, "this script has no flag 'resolutoin'"),
    "config broken": ({"config": "{broken_yaml}"}, "--config {broken_yaml}: "),
    "config a list": ({"config": "{list_yaml}"}, "expected lines of the form `flag: value`"),
    "config wrong type": ({"config": "{words_yaml}"}, "argument --resolution: invalid int value: 'large'"),
    "config wrong switch": ({"config": "{switch_yaml}"}, "use_ema must be true or false, not 3"),
}


def own_data(folder: str, **changes) -> dict:
    """A data set with the columns image, words and number."""
    own = {"train_data_dir": None, "dataset_name": folder, "image_column": "picture", "caption_column": "words"}
    return own | changes


RUN_ERRORS = {  # found once data and models are opened: exit status 1
    "image column": (
        own_data("{renamed}", image_column="image"),
        "--image_column 'image' is not a column; there are: picture, words, number",
    ),
    "image column without images": (
        own_data("{renamed}", image_column="words"),
        "--image_column 'words' holds string, not images; columns with images: picture",
    ),
    "caption column": (
        own_data("{renamed}", caption_column="text"),
        "--caption_column 'text' is not a column; there are: picture, words, number",
    ),
    "caption of wrong type": (
        own_data("{renamed}", caption_column="number"),
        "--caption_column 'number' holds int64; it must hold strings or lists of strings",
    ),
    "caption missing": (own_data("{null_caption}"), "row 1: it has no caption; all in "),
    "caption list": (own_data("{null_in_list}"), "row 0: its list of captions is empty; all in "),
    "no train split": (
        own_data("{no_train_split}"),
        "--dataset_name {no_train_split} has no split named train, only: test",
    ),
    "no rows": (own_data("{no_rows}"), "--dataset_name {no_rows}: "),
    "no such configuration": (own_data("{renamed}", dataset_config_name="winter"), "'winter'"),
    "broken metadata": (
        {"train_data_dir": "{broken_metadata}"},
        "--train_data_dir {broken_metadata}: metadata.jsonl line 1: the line is not JSON",
    ),
    "data set unknown": ({"train_data_dir": None, "dataset_name": "nobody/nothing"}, "--dataset_name nobody/nothing: "),
    "more samples than there are": (
        {"max_train_samples": 7},
        "--max_train_samples 7 is more than the 6 samples there are",
    ),
    "unreadable image": (
        {"train_data_dir": "{unreadable}"},
        "row 4 ({unreadable}/4.png, metadata.jsonl line 5): not an image",
    ),
    "image missing": (
        {"train_data_dir": "{missing_picture}"},
        "row 2 ({missing_picture}/2.png, metadata.jsonl line 3): No such file: 2.png",
    ),
    "model unknown": (
        {"pretrained_model_name_or_path": "nobody/nothing"},
        "--pretrained_model_name_or_path nobody/nothing: ",
    ),
}


def _filled(value, world):
    return value.format(**world) if isinstance(value, str) else value


@pytest.mark.parametrize("case", USAGE_ERRORS)
def test_usage_error_is_one_line(case, world, sd_flags, capsys, tmp_path):
    changes, expected = USAGE_ERRORS[case]
    tokens = sd_flags(**{name: _filled(value, world) for name, value in changes.items()})
    status, line = stop(tokens, capsys)
    assert status == 2
    assert expected.format(**world) in line
    assert "secret" not in line
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("case", RUN_ERRORS)
def test_fault_in_data_or_model_is_one_line(case, world, sd_flags, capsys):
    changes, expected = RUN_ERRORS[case]
    tokens = sd_flags(**{name: _filled(value, world) for name, value in changes.items()})
    status, line = stop(tokens, capsys)
    assert status == 1
    assert line.startswith("error: ")
    assert expected.format(**world) in line
    assert len(line) < 900


@pytest.mark.parametrize(
    ("flag", "package"),
    [("use_8bit_adam", "bitsandbytes"), ("enable_xformers_memory_efficient_attention", "xformers")],
)
def test_flag_whose_package_is_missing(flag, package, sd_flags, capsys):
    if importlib.util.find_spec(package):
        pytest.skip(f"{package} is installed")
    status, line = stop(sd_flags(**{flag: True}), capsys)
    assert status == 2
    assert f"--{flag} needs the package {package}: pip install {package}" in line


@pytest.mark.parametrize("tracker", ["comet_ml", "aim", "clearml", "dvclive", "mlflow", "swanlab", "trackio"])
def test_tracker_whose_package_is_missing(tracker, sd_flags, capsys):
    if importlib.util.find_spec(tracker):
        pytest.skip(f"{tracker} is installed")
    status, line = stop(sd_flags(report_to=tracker), capsys)
    assert status == 2
    assert f"--report_to {tracker} needs the package {tracker}: pip install {tracker}" in line


@pytest.fixture(scope="module")
def earlier(model, pictures, tmp_path_factory):
    """The output folder of a finished run with checkpoints and images."""
    folder = tmp_path_factory.mktemp("earlier") / "out"
    load_script("sd").main(
        flags(
            pretrained_model_name_or_path=model, train_data_dir=pictures, output_dir=folder, resolution=32,
            train_batch_size=2, max_train_steps=2, lr_warmup_steps=0, seed=3, report_to="tensorboard",
            logging_steps=1, checkpointing_steps=1, validation_prompts=["a cat"],
        )
    )  # fmt: skip
    return folder


def contents(folder) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file() and path.name != ".lock")
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


AGAIN = {
    "same command again": ({}, "holds checkpoints of an earlier run: continue it with --resume_from_checkpoint latest"),
    "another seed": ({"resume_from_checkpoint": "latest", "seed": 4}, "--seed 4 differs from the checkpoint's, 3"),
    "no such checkpoint": ({"resume_from_checkpoint": "checkpoint-9"}, "no such checkpoint"),
    "average that was not kept": ({"resume_from_checkpoint": "latest", "use_ema": True}, "--use_ema"),
    "wrong column": ({"resume_from_checkpoint": "latest", "caption_column": "words"}, "--caption_column 'words'"),
    "unreadable image": (
        {"resume_from_checkpoint": "latest", "train_data_dir": "{unreadable}", "max_train_steps": 9},
        "row 4 ({unreadable}/4.png, metadata.jsonl line 5)",
    ),
    "not a pipeline": (
        {"resume_from_checkpoint": "latest", "pretrained_model_name_or_path": "{not_a_pipeline}"},
        "{not_a_pipeline}",
    ),
}


@pytest.mark.parametrize("case", AGAIN)
def test_nothing_earlier_in_the_output_folder_is_lost(case, earlier, world, sd_flags, capsys, tmp_path):
    changes, expected = AGAIN[case]
    folder = shutil.copytree(earlier, tmp_path / "out")
    before = contents(folder)
    tokens = sd_flags(**{name: _filled(value, world) for name, value in changes.items()})
    _, line = stop(tokens, capsys)
    assert expected.format(**world) in line
    after = contents(folder)
    before.pop(".inspected_pictures.json")  # of other images by now
    assert {path: data for path, data in after.items() if path in before} == before


def test_a_damaged_checkpoint_asked_for_by_name_is_refused(earlier, sd_flags, capsys, tmp_path):
    folder = shutil.copytree(earlier, tmp_path / "out")
    weights = folder / "checkpoint-2" / "unet" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    status, line = stop(sd_flags(resume_from_checkpoint="checkpoint-2"), capsys)
    assert status == 1
    wanted = "unet/diffusion_pytorch_model.safetensors is damaged"
    assert line == f"error: --resume_from_checkpoint checkpoint-2: {wanted}"


LAUNCHES = {  # as a user sees it: status and everything on stderr
    "usage": (
        {"resolution": 35},
        2,
        "train_text_to_image.py: error: --resolution must be a multiple of 8, not 35; the nearest is 32",
    ),
    "unreadable image": (
        {"train_data_dir": "{unreadable}", "max_train_steps": 9},
        1,
        "error: 1 of 6 samples cannot be used; row 4 ({unreadable}/4.png, metadata.jsonl line 5): not an image",
    ),
}


@pytest.mark.parametrize("case", LAUNCHES)
def test_launch_ends_with_the_line(case, world, sd_flags, server, tmp_path):
    changes, status, expected = LAUNCHES[case]
    run = server.start(sd_flags(**{name: _filled(value, world) for name, value in changes.items()}), tmp_path)
    assert run.wait() == status
    output = run.output()
    assert "Traceback" not in output
    last = output.rstrip("\n").rpartition("\n")[2]
    assert last.startswith(expected.format(**world)), output
    if case == "usage":
        assert output == expected.format(**world) + "\n"


def test_output_folder_in_use_by_another_process(sd_flags, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "model_index.json").write_text(json.dumps({"kept": True}))
    with held(tmp_path / "out"):
        status, line = stop(sd_flags(), capsys)
    assert (status, line) == (1, f"error: --output_dir {tmp_path / 'out'} is in use by another run")
    assert contents(tmp_path / "out") == {"model_index.json": b'{"kept": true}'}
