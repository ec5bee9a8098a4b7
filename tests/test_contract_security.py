"""What comes from strangers (checkpoints, models, data, settings) runs no code, reaches no file that is not its own,
and drives no terminal. `Bomb` makes a file, the crater, wherever its pickle is loaded."""

import contextlib
import hashlib
import json
import os
import pickle
import shutil

import pytest
import tiny
import torch
from conftest import load_script
from PIL import Image
from safetensors.torch import save_file
from scripts import SCRIPTS

from t2i_training import errors, files, library_errors, sanitize
from t2i_training.data import inspection
from t2i_training.data.dataset import check_caption_column, open_dataset
from t2i_training.encodings.store import Store
from t2i_training.model import lora
from t2i_training.run import checkpoint, lifecycle, output_folder

ANSI = "\x1b[2J\x1b]0;owned\x07\x9b31m\u202e\r"


class Bomb:
    def __init__(self, crater):
        self.crater = crater

    def __reduce__(self):
        return (open, (str(self.crater), "w"))


@pytest.fixture
def crater(tmp_path):
    """Where a bomb's crater would be. It is shown to be a live one after each test that has found none."""
    path = tmp_path / "crater"
    yield path
    assert not path.exists()
    pickle.loads(pickle.dumps(Bomb(path)))
    assert path.exists()


def plainly(bomb, file):
    file.write_bytes(pickle.dumps(bomb, protocol=2))


def evil_code(crater) -> str:
    return f"open({str(crater)!r}, 'w')\nfrom diffusers import UNet2DConditionModel as Evil\n"


def stop_text(function, *args, **options) -> str:
    """The one line, fit for a terminal, that a call ends the run with."""
    with pytest.raises(SystemExit) as stop:
        function(*args, **options)
    message = str(stop.value)
    assert message.startswith("error: ")
    assert message.isprintable()
    assert len(message) < 3000
    return message


def sign(folder, **changes) -> None:
    """Let the manifest of a checkpoint say that all is in order with the files that are there now."""
    manifest = json.loads((folder / "manifest.json").read_text()) | changes
    manifest.pop("digest", None)
    paths = [path for path in folder.rglob("*") if path.is_file() and path.name != "manifest.json"]
    manifest.setdefault("files", {})
    if "files" not in changes:
        manifest["files"] = {path.relative_to(folder).as_posix(): size_and_hash(path) for path in paths}
    (folder / "manifest.json").write_text(json.dumps(manifest))


def size_and_hash(path) -> list:
    return [path.stat().st_size, hashlib.sha256(path.read_bytes()).hexdigest()]


# --- checkpoints


@pytest.fixture
def trained(finished, tmp_path):
    """A copy of the output folder of a run of two updates with two checkpoints."""
    return shutil.copytree(finished("sd", max_train_steps=2, checkpointing_steps=1), tmp_path / "out")


def resume(trained, command, **changes):
    options = {"max_train_steps": 3, "checkpointing_steps": 1, "resume_from_checkpoint": "latest"}
    load_script("sd").main(command("sd", output_dir=trained, **options | changes))


def test_other_pickles_beside_a_checkpoints_own_are_not_loaded(trained, command, crater):
    """All names that accelerate knows; optimizer.bin, which is ours, is looked at in test_contract_checkpoints.py."""
    names = ["scheduler.bin", "sampler.bin", "scaler.pt", "dl_state_dict.bin", "custom_checkpoint_0.pkl"]
    names += ["random_states_0.pkl", "pytorch_model.bin", "unet/diffusion_pytorch_model.bin"]
    for i, name in enumerate(names):
        (torch.save if i % 2 else plainly)(Bomb(crater), trained / "checkpoint-2" / name)
    sign(trained / "checkpoint-2")
    resume(trained, command)
    assert (trained / "checkpoint-3" / "manifest.json").is_file()


@pytest.mark.parametrize("name", ["../../outside.bin", "{outside}", "unet/../../../outside.bin", "", ".", ".."])
def test_manifest_that_leads_elsewhere_is_refused(trained, name, tmp_path):
    outside = tmp_path / "outside.bin"
    outside.write_bytes(b"its hash is right")
    folder = trained / "checkpoint-2"
    assert checkpoint.verify(folder) is None
    written = json.loads((folder / "manifest.json").read_text())["files"]
    sign(folder, files=written | {name.format(outside=outside): size_and_hash(outside)})
    assert "manifest.json is of another format" in checkpoint.verify(folder)


@pytest.mark.parametrize(
    "changes",
    [
        {"files": {}}, {"step": True}, {"step": -1}, {"step": 7}, {"step": 1.0}, {"samples_seen": "4"}, {"seed": "x"},
        {"samples_seen": -2}, {"unreported": [1]}, {"unreported": [["a", "b"]]}, {"dataset_size": None}, {"seed": -1},
    ],
)  # fmt: skip
def test_manifest_that_no_run_has_written_is_refused(trained, changes):
    sign(trained / "checkpoint-2", **changes)
    assert checkpoint.verify(trained / "checkpoint-2").startswith("manifest.json ")


@pytest.mark.parametrize("text", ["[" * 100_000, '{"a":' * 100_000, "1" * 100_000, '{"format": 1e999}'])
def test_manifest_that_is_no_fun_to_parse_is_passed_over(trained, text):
    (trained / "checkpoint-2" / "manifest.json").write_text(text)
    assert "manifest.json" in checkpoint.verify(trained / "checkpoint-2")


def test_manifest_vouches_for_itself(trained):
    """A flipped digit of the seed would give other draws, and nobody would notice."""
    file = trained / "checkpoint-2" / "manifest.json"
    file.write_text(file.read_text().replace('"seed": 3', '"seed": 2'))
    assert checkpoint.verify(trained / "checkpoint-2") == "manifest.json is damaged"


def test_rotation_deletes_nothing_through_a_link(trained, command, tmp_path):
    """checkpoint-1 was moved to another disk, and a link left in its place."""
    elsewhere = tmp_path / "other disk"
    (trained / "checkpoint-1").rename(elsewhere)
    (trained / "checkpoint-1").symlink_to(elsewhere, target_is_directory=True)
    before = {path.relative_to(elsewhere) for path in elsewhere.rglob("*")}
    resume(trained, command, checkpoints_total_limit=1)
    assert {path.relative_to(elsewhere) for path in elsewhere.rglob("*")} == before
    assert {path.name for path in trained.glob("checkpoint-*")} == {"checkpoint-1", "checkpoint-3"}
    assert (trained / "checkpoint-1").is_symlink()


def test_links_are_removed_and_what_they_lead_to_is_not(tmp_path):
    elsewhere = tmp_path / "elsewhere"
    (elsewhere / "step-000000").mkdir(parents=True)
    (elsewhere / "step-000000" / "mine.png").touch()
    for name in ("a", ".checkpoint-1.partial"):
        (tmp_path / name).symlink_to(elsewhere)
        files.remove_folder(tmp_path / name)
        assert not os.path.lexists(tmp_path / name)
    for target in (elsewhere, tmp_path / "nowhere"):
        (tmp_path / "unet").unlink() if (tmp_path / "unet").is_symlink() else None
        shutil.rmtree(tmp_path / "unet", ignore_errors=True)
        (tmp_path / "unet").symlink_to(target)
        (tmp_path / "new").mkdir()
        files.replace_folder(tmp_path / "new", tmp_path / "unet")
        assert not (tmp_path / "unet").is_symlink()
    (tmp_path / "out" / "validation").mkdir(parents=True)
    (tmp_path / "out" / "validation" / "step-000001").symlink_to(elsewhere)
    output_folder._remove_validation(tmp_path / "out")
    assert list((tmp_path / "out" / "validation").iterdir()) == []
    assert (elsewhere / "step-000000" / "mine.png").exists()


def test_adapters_are_no_pickle(tmp_path, crater):
    plainly(Bomb(crater), tmp_path / lora.WEIGHTS_NAME)
    message = stop_text(lora.load_networks, torch.nn.Linear(2, 2), tmp_path)
    assert f"error: {tmp_path} does not fit this model: " in message


# --- models

WEIGHTS = {  # (script, flag of the model, network) -> what its weights are called in the two formats
    ("sd", "model", "unet"): ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin"),
    ("sd_lora", "model", "text_encoder"): ("model.safetensors", "pytorch_model.bin"),
    ("prior", "prior_model", "prior"): ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin"),
    ("prior_lora", "prior_model", "image_encoder"): ("model.safetensors", "pytorch_model.bin"),
    ("decoder", "decoder_model", "unet"): ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin"),
    ("decoder", "prior_model", "image_encoder"): ("model.safetensors", "pytorch_model.bin"),
    ("decoder_lora", "decoder_model", "movq"): ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin"),
}


@pytest.fixture
def load(command, tmp_path):
    """load(script, folder, part): have the script load its models, of which that in the flag of `part` lies there."""

    def call(script, folder, part=None):
        base = part or SCRIPTS[script].base
        flag = "model" if base == "model" else f"{base}_model"
        flag = f"pretrained_{flag}_name_or_path"
        args = load_script(script).parse_args(command(script, output_dir=tmp_path / "out", **{flag: folder}))
        lifecycle.resolve_seed(args, {})
        accelerator = lifecycle.start(args)
        pipeline, *_ = load_script(script).load_models(args, accelerator)
        load_script(script).freeze(args, pipeline, accelerator)

    return call


@pytest.mark.parametrize("save", [torch.save, plainly])
@pytest.mark.parametrize(("script", "name", "part"), WEIGHTS)
def test_weights_that_are_a_pickle_run_no_code(script, name, part, save, load, request, crater, tmp_path):
    folder = shutil.copytree(request.getfixturevalue(name), tmp_path / "model")
    safe, pickled = WEIGHTS[script, name, part]
    (folder / part / safe).unlink()
    save(Bomb(crater), folder / part / pickled)
    assert "model_name_or_path" in stop_text(load, script, folder, name.removesuffix("_model"))


CODE = {  # how a model folder may ask for its code to be run -> (file, change of its JSON)
    "a component": ("model_index.json", {"unet": ["evil", "Evil"]}),
    "a component of that name": ("model_index.json", {"unet": ["unet", "Evil"]}),
    "a pipeline": ("model_index.json", {"_class_name": ["evil", "Evil"]}),
    "an automatic class": ("text_encoder/config.json", {"auto_map": {"AutoModel": "evil.Evil"}}),
    "a tokenizer": ("tokenizer/tokenizer_config.json", {"auto_map": {"AutoTokenizer": ["evil.Evil", None]}}),
    "a library's function": ("model_index.json", {"unet": ["subprocess", "Popen"]}),
}


@pytest.mark.parametrize("how", CODE)
def test_code_in_a_model_folder_is_not_run(how, load, model, crater, tmp_path, capsys):
    folder, (name, change) = shutil.copytree(model, tmp_path / "model"), CODE[how]
    for place in ("evil.py", "unet/evil.py", "unet/unet.py", "text_encoder/evil.py", "tokenizer/evil.py"):
        (folder / place).write_text(evil_code(crater))
    (folder / name).write_text(json.dumps(json.loads((folder / name).read_text()) | change))
    if name == "model_index.json":
        with pytest.raises(SystemExit) as stop:
            load("sd", folder)
        assert "error: --pretrained_model_name_or_path" in capsys.readouterr().err + str(stop.value)
    else:  # what is asked for by the class of its own is loaded as that
        load("sd", folder)


# --- data


def open_data(command, **flags):
    return open_dataset(load_script("sd").parse_args(command("sd", **flags)), seed=0)


@pytest.mark.parametrize("flag", ["dataset_name", "train_data_dir"])
def test_code_in_a_data_set_is_not_run(flag, command, crater, tmp_path):
    folder = tiny.make_pictures(tmp_path / "pictures", 2)
    for name in ("pictures.py", "dataset.py", "__init__.py"):
        (folder / name).write_text(evil_code(crater))
    for name in ("data.pkl", "train.pkl", "state.pt"):
        plainly(Bomb(crater), folder / name)
    options = {"train_data_dir": None} | {flag: folder}
    assert len(open_data(command, **options)) == 2
    (folder / "metadata.jsonl").rename(folder / "other.jsonl")
    with contextlib.suppress(SystemExit):
        open_data(command, **options)


@pytest.mark.parametrize("name", ["../outside.png", "{outside}"])
def test_a_csv_leads_nowhere_else_either(name, command, tmp_path):
    """metadata.csv is read by the library."""
    folder, outside = tmp_path / "pictures", tmp_path / "outside.png"
    folder.mkdir()
    for path in (outside, folder / "0.png"):
        Image.new("RGB", (9, 9)).save(path)
    (folder / "metadata.csv").write_text(f"file_name,text\n{name.format(outside=outside)},a\n0.png,b\n")
    with contextlib.suppress(SystemExit):
        assert not any("outside" in str(row["image"]) for row in open_data(command, train_data_dir=folder))


def lines(folder, *rows) -> None:
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def inspect(command, tmp_path, folder):
    args = load_script("sd").parse_args(command("sd", train_data_dir=folder, output_dir=tmp_path / "out"))
    accelerator = lifecycle.start(args)
    return inspection.inspect(args, accelerator, open_dataset(args, seed=0), args.caption_column)


def test_names_and_captions_drive_no_terminal(command, tmp_path, caplog):
    folder = tiny.make_pictures(tmp_path / "pictures", 2)
    evil = f"{ANSI}\nerror: forged"
    for name in (f"unlisted{evil}.png", f"broken{evil}.png"):
        (folder / name).write_bytes(b"")
    lines(
        folder, {"file_name": "0.png", "text": evil, evil: 1}, {"file_name": f"broken{evil}.png", "text": "a"},
        {"file_name": f"missing{evil}.png", "text": "a"}, {"file_name": f"../{evil}.png", "text": "a"},
        {"file_name": "1.png", "text": {evil: evil}},
    )  # fmt: skip
    message = stop_text(inspect, command, tmp_path, folder)
    assert "\\x1b[2J" in message
    assert len(caplog.records) > 4
    assert [record.getMessage() for record in caplog.records if not record.getMessage().isprintable()] == []
    stop_text(open_data, command, train_data_dir=folder, image_column=evil)
    stop_text(inspection_of_column, command, folder, evil)


def inspection_of_column(command, folder, column):
    check_caption_column(open_data(command, train_data_dir=folder), column)


def test_endless_names_are_cut(command, tmp_path, caplog):
    folder, much = tiny.make_pictures(tmp_path / "pictures", 2), "x" * 1_000_000
    lines(folder, {"file_name": "0.png", much: 1, "text": much}, {"file_name": f"../{much}", "text": "b"})
    stop_text(inspect, command, tmp_path, folder)
    stop_text(open_data, command, train_data_dir=folder, image_column="photo")
    assert max(len(record.getMessage()) for record in caplog.records) < 3000


def test_columns_of_our_own_cannot_be_forged(command, tmp_path):
    folder = tiny.make_pictures(tmp_path / "pictures", 2)
    forged = {"_faults": '{"": "forged"}', "_line": "forged", "_faults_file_name": "1.png", "_line_file_name": "1.png"}
    lines(folder, {"file_name": "0.png", "text": "a"} | forged, {"file_name": "1.png", "text": "b"})
    dataset, _ = inspect(command, tmp_path, folder)
    assert dataset["_line"] == ["metadata.jsonl line 1", "metadata.jsonl line 2"]


def test_a_library_s_colours_do_not_reach_the_terminal():
    with pytest.raises(SystemExit) as stop, library_errors.readable_errors("--flag", "value"):
        raise ValueError(f"\x1b[1mbold\x1b[0m{ANSI}")
    assert str(stop.value).isprintable()
    with pytest.raises(SystemExit) as stop:
        raise errors.RunError(f"a\nb{ANSI}")
    assert str(stop.value).isprintable()


def test_printable_text_stays_as_it_is():
    text = "ein Bär, 熊, 🐻 - 'quoted' \\ and  spaced"
    assert sanitize.printable(text) == text
    assert sanitize.printable("a\x00\x1b\n\u2028\udcff") == "a\\x00\\x1b\\n\\u2028\\udcff"


# --- settings


def usage_error(tokens, capsys) -> str:
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        load_script("sd").parse_args(tokens)
    assert stop.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert len(line) < 1000
    assert line.isprintable()
    return line


LAUGHS = "a0: &a0 [lol]\n" + "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 12))
SETTINGS = {  # a file of settings -> what is said of it
    "output_dir: !!python/object/apply:os.system ['touch {crater}']\n": "not readable as YAML in line 1",
    "seed: !!python/object/new:os.system ['touch {crater}']\n": "not readable as YAML in line 1",
    "!!python/name:os.system : 1\n": "not readable as YAML in line 1",
    "seed: 2024-13-45\n": "not readable as YAML",
    "seed: !!bool perhaps\n": "not readable as YAML",
    "seed: !!timestamp never\n": "not readable as YAML",
    "seed: !!int ''\n": "not readable as YAML",
    "[" * 100_000: "not readable as YAML",
    LAUGHS + "seed: *a11\n": "this script has no flag 'a0'",
    f"seed: &a0 [lol]\nresolution: &a1 [{'*a0, ' * 9}]\n" + "".join(
        f"{name}: &a{i + 2} [{f'*a{i + 1}, ' * 9}]\n" for i, name in enumerate(
            ["rank", "revision", "variant", "output_dir", "report_to", "logging_dir", "cache_dir", "learning_rate"])
    ): "seed must be one value",
    "? [*a]\n: 1\n": "not readable as YAML in line 1",
    "output_dir: !!set {a, b}\n": "output_dir must be one value",
    "output_dir: !!binary aGk=\n": "output_dir must be one value",
    'output_dir: "a\\0b"\n': "--output_dir holds",
    'validation_prompts: ["a\\ud800"]\n': "--validation_prompts holds",
    '"\\e[2J": 1\n': "this script has no flag",
}  # fmt: skip


@pytest.mark.parametrize("text", SETTINGS, ids=lambda text: text[:20])
def test_settings_run_no_code_and_end_in_one_line(text, sd_flags, crater, tmp_path, capsys):
    (tmp_path / "run.yaml").write_text(text.replace("{crater}", str(crater)))
    tokens = [*sd_flags(output_dir=None, seed=None), "--config", str(tmp_path / "run.yaml")]
    assert SETTINGS[text] in usage_error(tokens, capsys)


def test_laughs_of_one_flag_are_cut(sd_flags, tmp_path, capsys):
    """Nine lists of nine lists of ...: ten lines that would be printed as gigabytes."""
    nested = "&a0 [x]"
    for i in range(1, 12):
        nested = f"&a{i} [{nested}{f', *a{i - 1}' * 8}]"
    (tmp_path / "run.yaml").write_text(f"seed: {nested}\n")
    assert "seed must be one value" in usage_error([*sd_flags(), "--config", str(tmp_path / "run.yaml")], capsys)


def test_prompt_in_another_encoding_is_refused_before_training(sd_flags, capsys):
    assert "--validation_prompts holds" in usage_error(sd_flags(validation_prompts=["a", "b\udcff"]), capsys)


# --- encodings


@pytest.fixture
def store(tmp_path):
    """A store that holds one shard in order, of two keys."""
    store = Store(tmp_path / "store")
    store.add([b"k" * 16, b"l" * 16], {"x": torch.arange(6.0).view(2, 3)})
    return store


ODD = {  # what is in a shard besides the tensors of `store`
    "no keys": {"x": torch.zeros(2, 3)},
    "keys without shape": {"keys": torch.tensor(3, dtype=torch.uint8)},
    "keys of another type": {"keys": torch.zeros(2, 16), "x": torch.zeros(2, 3)},
    "keys of a type that NumPy lacks": {"keys": torch.zeros(2, 16, dtype=torch.bfloat16)},
    "keys of no bytes": {"keys": torch.zeros(1_000_000, 0, dtype=torch.uint8)},
    "fewer rows than keys": {"keys": torch.full((2, 16), 107, dtype=torch.uint8), "x": torch.zeros(1, 3)},
    "a tensor without rows": {"keys": torch.full((2, 16), 107, dtype=torch.uint8), "x": torch.tensor(1.0)},
}


@pytest.mark.parametrize("how", ODD)
def test_odd_shards_are_removed(how, store, tmp_path):
    """Their names are right, so only a stranger can have made them."""
    (path,) = store.folder.glob("*.safetensors")
    save_file(ODD[how], tmp_path / "odd")
    digest = hashlib.sha256((tmp_path / "odd").read_bytes()).hexdigest()[:32]
    shutil.move(tmp_path / "odd", store.folder / f"{digest}.safetensors")
    store.scan()
    store.verify([b"k" * 16])
    assert [file.name for file in store.folder.iterdir()] == [path.name]
    assert store.missing([b"k" * 16, b"m" * 16]) == [1]
    assert store.read(b"l" * 16)["x"].tolist() == [3, 4, 5]


def test_odd_names_in_a_store_are_left_alone(store):
    names = [".0123456789abcdef.partial", ".hidden"]  # a file just begun, and one that is not ours
    for name in names:
        (store.folder / name).touch()
    (store.folder / "folder.safetensors").mkdir()
    os.mkfifo(store.folder / "pipe.safetensors")  # opening it would wait for ever
    store.remove_stale(3600)
    store.scan()
    assert {path.name for path in store.folder.glob(".*")} == set(names)
    assert store.read(b"k" * 16)["x"].tolist() == [0, 1, 2]


# --- model card


def test_control_characters_do_not_reach_the_card():
    from t2i_training.report.hub import literal

    for text in (ANSI, f"a{ANSI}b", "\x00", "\u2028", "\udcff"):
        assert literal(text).isprintable()
        literal(text).encode()
