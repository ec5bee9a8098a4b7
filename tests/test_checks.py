"""From a command line and a configuration file to checked arguments; a usage error is one line and status 2."""

import os

import pytest
import yaml
from conftest import flags, load_script

from t2i_training.cli import checks, config_file


@pytest.fixture
def parse(sd_flags, model, pictures, tmp_path):
    """parse(*tokens, **changes): the arguments of a command line that is complete but for these."""
    return lambda *tokens, **changes: load_script("sd").parse_args([*sd_flags(**changes), *tokens])


@pytest.fixture
def refused(capsys):
    """refused(function, ...): the one line on stderr with which a usage error ends the process."""

    def run(function, *args, **options) -> str:
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            function(*args, **options)
        assert stop.value.code == 2
        lines = capsys.readouterr().err.splitlines()
        assert len(lines) == 1
        return lines[0]

    return run


@pytest.fixture
def config(tmp_path):
    """config(text): a file with it; returns its path."""

    def write(text: str) -> str:
        (tmp_path / "run.yaml").write_text(text)
        return str(tmp_path / "run.yaml")

    return write


# --- --config


def test_config_supplies_any_flag(config, model, pictures):
    """Required ones, switches, lists, numbers as YAML and people write them; a prompt may begin with a dash."""
    path = config(
        f"pretrained_model_name_or_path: {model}\ntrain_data_dir: {pictures}\nlearning_rate: 1e-5\nuse_ema: true\n"
        "random_flip: false\nresolution: 64\nmixed_precision: no\nreport_to: none\nseed:\n"
        "validation_prompts: [a cat, --a dash, 7]\n"
    )
    args = load_script("sd").parse_args(["--config", path])
    assert (args.pretrained_model_name_or_path, args.train_data_dir) == (str(model), str(pictures))
    assert (args.learning_rate, args.use_ema, args.random_flip, args.resolution) == (1e-5, True, False, 64)
    assert (args.mixed_precision, args.report_to, args.seed) == ("no", "none", None)
    assert args.validation_prompts == ["a cat", "--a dash", "7"]
    assert args.train_batch_size == 16  # what the file leaves out keeps its default


def test_command_line_wins(config, parse):
    path = config("learning_rate: 1e-5\nmax_train_steps: 9\nsnr_gamma: 5\nvalidation_prompts: [a, b]\n")
    args = parse("--config", path, "--learning_rate", "3e-5", "--validation_prompts", "c", max_train_steps=None)
    assert (args.learning_rate, args.max_train_steps, args.snr_gamma) == (3e-5, 9, 5.0)
    assert args.validation_prompts == ["c"]


def test_command_line_turns_off_what_the_file_turns_on(config, parse):
    path = config("use_ema: true\nforeach_ema: true\nrandom_flip: true\n")
    args = parse("--config", path, "--use_ema=false", "--foreach_ema=false", "--center_crop=false")
    assert (args.use_ema, args.foreach_ema, args.random_flip, args.center_crop) == (False, False, True, False)


def test_one_prompt_needs_no_list(config, parse):
    assert parse("--config", config("validation_prompts: a red bird\n")).validation_prompts == ["a red bird"]


@pytest.mark.parametrize("spelling", ["--config={}"])
def test_config_in_every_spelling(config, parse, spelling):
    assert parse(spelling.format(config("snr_gamma: 5\n"))).snr_gamma == 5


def test_empty_config_changes_nothing(config, parse):
    path, args = config("# nothing yet\n"), parse()
    assert vars(parse("--config", path)) == vars(args) | {"config": path, "typed": args.typed | {"config"}}


def test_what_is_typed_is_known(config, parse):
    """Be it a default's value, on the command line or in a file: it comes before a launcher and a checkpoint."""
    assert parse(seed=None).typed == parse("--seed=0").typed - {"seed"}
    typed = parse("--config", config("use_ema: false\nallow_tf32: true\nlr_scheduler: constant\n"), seed=None).typed
    assert {"allow_tf32", "lr_scheduler", "pretrained_model_name_or_path"} <= typed
    assert not {"seed", "use_ema"} & typed


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("learning_rat: 1\n", "this script has no flag 'learning_rat'"),
        ("config: other.yaml\n", "this script has no flag 'config'"),
        ("help: true\n", "this script has no flag 'help'"),
        ("1: 2\n", "this script has no flag 1"),
        ("resolution: large\n", "argument --resolution: invalid int value: 'large'"),
        ("resolution: 64.5\n", "argument --resolution: invalid int value: '64.5'"),
        ("learning_rate: fast\n", "argument --learning_rate: invalid float value: 'fast'"),
        ("mixed_precision: fp8\n", "argument --mixed_precision: invalid choice: 'fp8'"),
        ("resolution: true\n", "resolution must be one value, not True"),
        ("resolution: [1, 2]\n", "resolution must be one value, not [1, 2]"),
        ("use_ema: 1\n", "use_ema must be true or false, not 1"),
        ("use_ema: 'true'\n", "use_ema must be true or false, not 'true'"),
        ("validation_prompts: [{a: b}]\n", "validation_prompts must be a list of values, not [{'a': 'b'}]"),
        ("- a\n- b\n", "expected lines of the form `flag: value`"),
        ("seed: 1\nresolution: [1\n", "not readable as YAML in line 3"),
        ("a: b: c\n", "not readable as YAML in line 1"),
    ],
)
def test_bad_config_names_file_and_key(config, parse, refused, text, reason):
    path = config(text)
    assert f"error: --config {path}: {reason}" in refused(parse, "--config", path)


def test_config_that_cannot_be_read(parse, refused, tmp_path):
    assert "/none.yaml: No such file or directory" in refused(parse, "--config", str(tmp_path / "none.yaml"))
    assert f"--config {tmp_path}: Is a directory" in refused(parse, "--config", str(tmp_path))
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\xfa")
    assert "binary.yaml: not readable as YAML" in refused(parse, "--config", str(tmp_path / "binary.yaml"))


def test_values_of_a_config_are_checked_like_others(config, parse, refused):
    assert "--snr_gamma must be positive, not -5.0" in refused(parse, "--config", config("snr_gamma: -5\n"))


@pytest.mark.parametrize("text", ["hub_token: [hf_secret]\n", "hub_token: hf_secret: x\n", "hub_token: {a: hf_secret}"])
def test_no_error_text_shows_a_token(config, parse, refused, text):
    assert "hf_secret" not in refused(parse, "--config", config(text))


def test_public_config_holds_everything_but_secrets(config, parse):
    path = config("push_to_hub: true\nhub_token: hf_secret\nhub_model_id: me/model\n")
    args = parse("--config", path, validation_prompts=["a"])
    public = config_file.public_config(args)
    assert args.hub_token == "hf_secret"
    assert "hf_secret" not in str(public)
    assert set(vars(args)) - set(public) == {"hub_token", "config", "typed"}
    assert (public["hub_model_id"], public["validation_prompts"]) == ("me/model", ["a"])


def test_public_config_comes_back_through_config(config, parse):
    """As run_config.yaml does: strings that look like something else, dashes, line ends and accents included."""
    prompts = ["- no", "null", "1e5", "a: b # c", "zwei\nZeilen", "--seed", "été 🦊", "'", ""]
    changes = {
        "validation_prompts": prompts, "mixed_precision": "no", "revision": "1e5", "variant": "null", "use_ema": True,
        "snr_gamma": 5.0, "noise_offset": 0.1, "learning_rate": 1.2345678901234567e-05, "tracker_project_name": "-x",
    }  # fmt: skip
    project = changes.pop("tracker_project_name")
    tokens = [*flags(**{name: value for name, value in changes.items() if name != "validation_prompts"})]
    path = config("validation_prompts: " + yaml.safe_dump(prompts, default_flow_style=True, allow_unicode=True))
    # Of the hub: revisions and variants are not for a folder.
    model = {"learning_rate": None, "pretrained_model_name_or_path": "someone/model"}
    args = parse(*tokens, f"--tracker_project_name={project}", f"--config={path}", **model)
    assert args.validation_prompts == prompts
    again = load_script("sd").parse_args(["--config", config(yaml.safe_dump(config_file.public_config(args)))])
    assert config_file.public_config(again) == config_file.public_config(args)


# --- rules

NUMBERS_FROM_ZERO = {  # every other number has to be positive, but for resolution and local_rank
    "learning_rate", "lr_warmup_steps", "dataloader_num_workers", "noise_offset", "input_perturbation", "seed",
    "adam_weight_decay", "adam_beta1", "adam_beta2", "caption_dropout", "dream_detail_preservation",
    "caption_tag_dropout_rate", "keep_tokens",
}  # fmt: skip


@pytest.fixture
def numbers(monkeypatch) -> dict:
    """The types of all flags that take a number."""
    monkeypatch.setattr(checks, "parse", lambda parser, *_: parser)
    parser = load_script("sd").parse_args()
    monkeypatch.undo()
    kinds = {action.dest: getattr(action.type, "kind", action.type) for action in parser._actions}
    return {name: kind for name, kind in kinds.items() if kind in (int, float)}


def test_every_number_has_a_lower_bound(numbers, parse, refused):
    del numbers["local_rank"], numbers["max_token_length"]  # it has three values
    assert len(numbers) == 29
    for name in numbers:
        assert f"error: --{name} must " in refused(parse, f"--{name}=-1")
        if name in NUMBERS_FROM_ZERO:
            parse("--dream_training", "--shuffle_caption", f"--{name}=0")
        else:
            assert f"error: --{name} must be positive, not 0" in refused(parse, f"--{name}=0")


def test_no_number_may_be_nan(numbers, parse, refused):
    for name in (name for name, kind in numbers.items() if kind is float):
        assert f"error: --{name} must " in refused(parse, f"--{name}=nan")


@pytest.mark.parametrize("name", ["adam_beta1", "adam_beta2", "caption_dropout", "caption_tag_dropout_rate"])
def test_shares_are_below_one(name, parse, refused):
    assert f"--{name} must be at least 0 and below 1, not 1.0" in refused(parse, f"--{name}=1")
    parse(f"--{name}=0.9999")


def test_resolution_is_a_multiple_of_8(parse, refused):
    for resolution, nearest in ((1, 8), (12, 16), (500, 496), (511, 512)):
        message = refused(parse, resolution=resolution)
        assert f"--resolution must be a multiple of 8, not {resolution}; the nearest is {nearest}" in message
    assert parse(resolution=8).resolution == 8


def test_seed_fits_a_checkpoint(parse, refused):
    assert "--seed must be below 2**63" in refused(parse, seed=2**63)
    assert parse(seed=2**63 - 1).seed == 2**63 - 1


@pytest.mark.parametrize(
    ("flag", "value", "needed"),
    [
        ("offload_ema", True, "use_ema"),
        ("foreach_ema", True, "use_ema"),
        ("hub_model_id", "me/model", "push_to_hub"),
        ("hub_token", "hf_secret", "push_to_hub"),
        ("dream_detail_preservation", 0.5, "dream_training"),
        ("dream_detail_preservation", 0, "dream_training"),
        ("dataset_config_name", "winter", "dataset_name"),
        ("encodings_dir", "somewhere", "cache_encodings"),
        ("cache_crops", 5, "cache_encodings"),
    ],
)
def test_flag_that_would_do_nothing(flag, value, needed, parse, refused):
    message = refused(parse, **{flag: value})
    assert f"--{flag} does nothing without --{needed}: add --{needed}, or leave --{flag} out" in message
    assert "hf_secret" not in message
    parse(**{flag: value, needed: "me/pictures" if needed == "dataset_name" else True})


@pytest.mark.parametrize("name", ["linear", "cosine", "cosine_with_restarts", "polynomial", "constant"])
def test_lr_schedules(name, parse):
    assert parse(lr_scheduler=name).lr_scheduler == name


def test_piecewise_constant_wants_rules(parse, refused):
    assert parse(lr_scheduler="piecewise_constant:1:1000,0.1:2000,0.01")
    for name in (
        "piecewise_constant",
        "piecewise_constant:",
        "piecewise_constant:0.1",
        "piecewise_constant:1:x,2",
        "piecewise_constant:1.2.3:10,1",
    ):
        assert "e.g. piecewise_constant:1:1000,0.1:2000,0.01" in refused(parse, lr_scheduler=name)
    assert "--lr_scheduler must be one of linear, cosine, " in refused(parse, lr_scheduler="warm")


@pytest.mark.parametrize("name", ["constant", "piecewise_constant:1:1000,0.1"])
def test_schedules_without_a_warm_up(parse, refused, name):
    message = refused(parse, lr_scheduler=name, lr_warmup_steps=100)
    assert f"--lr_warmup_steps does nothing with --lr_scheduler {name.partition(':')[0]}" in message
    for steps in (0, 500):  # the guides', and the default
        assert parse(lr_scheduler=name, lr_warmup_steps=steps).lr_warmup_steps == steps
    assert parse(lr_scheduler="constant_with_warmup", lr_warmup_steps=100).lr_warmup_steps == 100


@pytest.mark.parametrize(
    "name", ["output_dir", "train_data_dir", "pretrained_model_name_or_path", "resume_from_checkpoint", "revision"]
)
def test_an_empty_value_is_refused(parse, refused, name):
    """As of an environment variable that is not set: the output would go into the working directory."""
    assert f"--{name} is empty" in refused(parse, f"--{name}=")


def test_a_mistyped_flag(parse, refused):
    assert "unrecognized arguments: --learning_rte=1 (did you mean --learning_rate?)" in refused(
        parse, "--learning_rte=1"
    )
    assert "did you mean" not in refused(parse, "--xyz=1")


def test_folder_without_captions(parse, refused, tmp_path):
    """Nothing is imported yet."""
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "0.txt").touch()
    assert "pictures holds no images" in refused(parse, train_data_dir=tmp_path / "pictures")
    (tmp_path / "pictures" / "1.png").touch()
    message = refused(parse, train_data_dir=tmp_path / "pictures")
    assert "pictures holds no captions: write each into a file beside its image, e.g. 0001.txt for 0001.jpg" in message
    (tmp_path / "pictures" / "train").mkdir()
    (tmp_path / "pictures" / "train" / "metadata.csv").touch()
    assert parse(train_data_dir=tmp_path / "pictures")


def test_files_in_place_of_folders(parse, refused, tmp_path):
    (tmp_path / "model.safetensors").touch()
    assert "model.safetensors cannot be read: it is empty: fetch it again" in refused(
        parse, pretrained_model_name_or_path=tmp_path / "model.safetensors"
    )
    assert "model.safetensors is a file" in refused(parse, train_data_dir=tmp_path / "model.safetensors")


def test_prediction_types(parse, refused):
    for name in ("epsilon", "v_prediction"):
        assert parse(prediction_type=name).prediction_type == name
    for name in ("sample", "v"):
        assert "--prediction_type must be epsilon or v_prediction" in refused(parse, prediction_type=name)


def test_dream_is_for_epsilon(parse, refused, v_model):
    """Told by the flag, or by the scheduler of a model that lies here; the flag overrides the model."""
    parse(dream_training=True)
    message = "--dream_training needs epsilon prediction, and this is a v_prediction run"
    assert message in refused(parse, dream_training=True, prediction_type="v_prediction")
    assert message in refused(parse, dream_training=True, pretrained_model_name_or_path=v_model)
    parse(dream_training=True, pretrained_model_name_or_path=v_model, prediction_type="epsilon")


def test_token_and_tracker_that_shows_the_configuration(parse, refused):
    for tracker in ("wandb", "all"):
        message = refused(parse, report_to=tracker, push_to_hub=True, hub_token="hf_secret")
        assert f"--report_to {tracker} together with --hub_token could publish the token" in message
        assert "hf_secret" not in message
    parse(report_to="tensorboard", push_to_hub=True, hub_token="hf_secret")


def test_several_trackers(parse, refused, monkeypatch):
    """As accelerate takes them, though as one string, which run_config.yaml gives back."""
    found = {"wandb", "tensorboard", "fcntl"}
    monkeypatch.setattr(checks.importlib.util, "find_spec", lambda name: True if name in found else None)
    assert parse(report_to="wandb,tensorboard").report_to == "wandb,tensorboard"
    assert parse(report_to="wandb, tensorboard,wandb").report_to == "wandb,tensorboard"
    assert "--report_to aim needs the package aim: pip install aim" in refused(parse, report_to="tensorboard,aim")
    assert "--report_to must be one of tensorboard, wandb, " in refused(parse, report_to="tensorboard,")
    for name in ("all", "none"):
        assert f"--report_to {name} stands alone, not in 'wandb,{name}'" in refused(parse, report_to=f"wandb,{name}")
    message = refused(parse, report_to="tensorboard,wandb", push_to_hub=True, hub_token="hf_secret")
    assert "--report_to tensorboard,wandb together with --hub_token could publish the token" in message


PUBLISHED = {  # what a published script's checkpoint holds -> the way out
    ("unet/config.json", "optimizer.bin", "scheduler.bin", "random_states_0.pkl"): "copy its unet/ over that in a",
    ("prior/config.json", "optimizer.bin", "random_states_0.pkl"): "copy its prior/ over that in a",
    ("pytorch_lora_weights.safetensors", "optimizer.bin", "scheduler.bin"): "",
    ("model.safetensors",): "",
    ("pytorch_model/mp_rank_00_model_states.pt",): "",
}  # fmt: skip


@pytest.mark.parametrize("files", PUBLISHED, ids="+".join)
def test_a_published_scripts_checkpoint(files, parse, refused, tmp_path):
    folder = tmp_path / "out" / "checkpoint-500"
    for name in files:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("{}")
    said = f"{folder} has no manifest.json: another script wrote it, whose optimizer and position cannot be continued"
    for wanted in ("latest", "checkpoint-500", str(folder)):
        message = refused(parse, resume_from_checkpoint=wanted)
        assert f"--resume_from_checkpoint {wanted}: {said} here; move it away" in message
        assert PUBLISHED[files] in message
    assert "move it away, to start from the beginning" in refused(parse, resume_from_checkpoint="latest")
    parse()
    for number in (400, 600):  # with ours before it, and after it
        (tmp_path / "out" / f"checkpoint-{number}").mkdir()
        (tmp_path / "out" / f"checkpoint-{number}" / "manifest.json").write_text("{}")
        if number == 400:
            message = refused(parse, resume_from_checkpoint="latest")
            assert "move it away, to continue from the last checkpoint of these scripts" in message
    parse(resume_from_checkpoint="latest")


def test_a_folder_of_notes_is_no_checkpoint(parse, tmp_path):
    (tmp_path / "out" / "checkpoint-500").mkdir(parents=True)
    (tmp_path / "out" / "checkpoint-500" / "notes.txt").write_text("mine")
    parse(resume_from_checkpoint="latest")


def test_earlier_run_is_not_overwritten(parse, refused, tmp_path):
    (tmp_path / "out" / "checkpoint-5").mkdir(parents=True)
    parse()  # somebody else's folder is not in the way
    (tmp_path / "out" / "checkpoint-5" / "manifest.json").write_text("{}")
    assert "continue it with --resume_from_checkpoint latest, or choose another folder" in refused(parse)
    for wanted in ("latest", "checkpoint-5", str(tmp_path / "out" / "checkpoint-5")):
        parse(resume_from_checkpoint=wanted)
    assert "--resume_from_checkpoint checkpoint-6: no such" in refused(parse, resume_from_checkpoint="checkpoint-6")


def test_paths_that_are_not_there(parse, refused, tmp_path):
    gone = str(tmp_path / "gone")
    assert "no data: give --dataset_name, or --train_data_dir" in refused(parse, train_data_dir=None)
    for flag in ("train_data_dir", "dataset_name", "pretrained_model_name_or_path"):
        assert f"--{flag} {gone}: there is no such folder" in refused(parse, **{flag: gone})
    (tmp_path / "file").write_text("")
    assert f"--output_dir {tmp_path / 'file'} is a file" in refused(parse, output_dir=tmp_path / "file")
    parse(pretrained_model_name_or_path="someone/model", dataset_name="someone/pictures")  # the hub is asked later


def test_output_inside_the_data(parse, refused, tmp_path):
    """Its validation images would be found by the next run."""
    (tmp_path / "metadata.jsonl").touch()
    for flag in ("train_data_dir", "dataset_name"):
        flags = {"train_data_dir": None, flag: tmp_path, "output_dir": tmp_path / "out"}
        assert f"--output_dir {tmp_path / 'out'} is inside --{flag}" in refused(parse, **flags)


@pytest.mark.parametrize("flag", ["train_data_dir", "dataset_config_name"])
def test_folder_of_captioned_pictures_has_no_parts(flag, parse, refused, pictures):
    flags = {"train_data_dir": None, "dataset_name": pictures, flag: pictures}
    message = f"--{flag} does nothing here: {pictures} is read as a folder of captioned images"
    assert message in refused(parse, **flags)
    parse(train_data_dir=None, dataset_name=pictures)


def test_checks_create_nothing(parse, tmp_path):
    parse()
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    "tokens", [["--hub-token", "s3cret"], ["--hub_tokn=s3cret"], ["--hub_tokne", "hf_abcdefghijkl"]]
)
def test_a_mistyped_token_is_not_repeated(tokens, sd_flags, capsys):
    with pytest.raises(SystemExit):
        load_script("sd").parse_args([*sd_flags(), *tokens])
    message = capsys.readouterr().err
    assert "unrecognized arguments: --hub" in message
    assert "s3cret" not in message
    assert "abcdefghijkl" not in message
