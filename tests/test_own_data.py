"""Scripts are copied and edited: a data set of the user's own, flags of their own."""

import importlib.util
import re
import sys

import datasets
import numpy as np
import pytest
import torch
import yaml
from conftest import load_script
from PIL import Image
from runs import rows
from scripts import REPOSITORY, SCRIPTS, TORCH

from t2i_training.data.dataset import check_dataset, image_file

SECTION = (REPOSITORY / "docs" / "data.md").read_text().split("## Your own data set, your own changes")[1]
SNIPPET = re.search(r"```python\n(.*?)```", SECTION, re.DOTALL)[1]


def edited(script: str, folder, *changes):
    """A module: the page's changes, and these (old, new), made in a copy of a script."""
    text = SCRIPTS[script].path.read_text()
    line = re.search(r"    flags\.add_data_source_args\(parser\).*\n", text)[0]
    replacements = [
        (line, ""),
        ("def main(", SNIPPET + "\n\ndef main("),
        *changes,
    ]
    for old, new in replacements:
        assert text.count(old) == 1
        text = text.replace(old, new)
    path = folder / f"my_{script}.py"
    path.write_text(text)
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = sys.modules[path.stem] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


RUN = {"train_data_dir": None, "max_train_steps": 2, "resolution": 32}


@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize("script", ["sd_lora", "decoder"])
def test_a_data_set_of_ones_own(command, script, cached, tmp_path):
    module, out = edited(script, tmp_path), tmp_path / "out"
    module.main(command(script, output_dir=out, cache_encodings=cached, **RUN))
    assert [row["step"] for row in rows(out)] == [1, 2]
    assert "| data | opened by the script itself |" in (out / "README.md").read_text()
    assert "train_data_dir" not in yaml.safe_load((out / "run_config.yaml").read_text())


@pytest.mark.parametrize("script", SCRIPTS)
def test_its_flags_go_from_every_script(command, script, tmp_path, capsys):
    if script == "sd_flax":
        pytest.importorskip("jax")
    module = edited(script, tmp_path)
    assert module.parse_args(command(script, **RUN)).image_column == "image"
    with pytest.raises(SystemExit):
        module.parse_args(command(script, dataset_name="x", **RUN))
    assert "unrecognized arguments: --dataset_name x" in capsys.readouterr().err


FLAGS = """    parser.add_argument("--my_rate", type=float, default=0.5)
    parser.add_argument("--my_path", type=pathlib.Path, default=pathlib.Path("a", "b"))
    parser.add_argument("--my_words", nargs="*", default=("a", "b"))
    parser.add_argument("--my_pair", nargs=2, type=int)
    parser.add_argument("--my_switch", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--no_such", action="store_false", dest="such")
    return checks.parse"""


def test_flags_of_ones_own(command, tmp_path):
    """They reach the script, run_config.yaml and the trackers, and that file can be given back as --config."""
    changes = [
        ("    return checks.parse", FLAGS),
        ("from functools", "import argparse\nimport pathlib\nfrom functools"),
    ]
    module, out = edited("sd_lora", tmp_path, *changes), tmp_path / "out"
    tokens = command("sd_lora", output_dir=out, **RUN | {"max_train_steps": 1, "report_to": "tensorboard"})
    module.main([*tokens, "--my_pair", "3", "4", "--no_such", "--my_rate=0.25", "--no-my_switch"])
    config = yaml.safe_load((out / "run_config.yaml").read_text())
    expected = {"my_rate": 0.25, "my_path": "a/b", "my_words": ["a", "b"], "my_pair": [3, 4], "my_switch": False}
    assert {name: config[name] for name in expected} == expected
    assert config["such"] is False
    again = module.parse_args(["--config", str(out / "run_config.yaml"), "--output_dir", str(tmp_path / "again")])
    assert (again.my_rate, str(again.my_path), list(again.my_words)) == (0.25, "a/b", ["a", "b"])
    assert (list(again.my_pair), again.my_switch, again.such) == ([3, 4], False, False)


@pytest.mark.parametrize("script", TORCH)
def test_small_pictures_are_counted(command, script, pictures, tmp_path, monkeypatch, caplog):
    """Of 40 x 32 pixels; the prior reads none at --resolution."""
    module = load_script(script)
    monkeypatch.setattr(module, "make_dataloader", lambda *_: exit("far enough"))
    for resolution, small in ((32, False), (40, not script.startswith("prior"))):
        caplog.clear()
        with pytest.raises(SystemExit):
            module.main(command(script, output_dir=tmp_path / "out", resolution=resolution))
        assert ("6 of 6 images are smaller than --resolution 40: enlarged" in caplog.text) is small


def test_ordinary_use_says_early_that_there_is_no_data(command, capsys):
    with pytest.raises(SystemExit) as stop:
        load_script("sd").parse_args(command("sd", train_data_dir=None))
    assert stop.value.code == 2
    assert "error: no data: give --dataset_name, or --train_data_dir with a folder of" in capsys.readouterr().err


def args(**changes):
    return type("Args", (), {"image_column": "image", **changes})


def pictures(mode="RGB"):
    return [Image.new(mode, (9, 8), colour) for colour in (1, 200)]


def two():
    yield from ({"image": picture, "text": "a"} for picture in pictures())


class Torch(torch.utils.data.Dataset):
    def __len__(self):
        return 2

    def __getitem__(self, i):
        return {"image": pictures()[i], "text": "a"}


GOOD = {
    "from_dict": lambda: datasets.Dataset.from_dict({"image": pictures(), "text": ["a", "b"]}),
    "grey": lambda: datasets.Dataset.from_dict({"image": pictures("L"), "text": ["a", "b"]}),
    "from_generator": lambda: datasets.Dataset.from_generator(two),
    "a list": lambda: list(two()),
    "of a torch data set": lambda: datasets.Dataset.from_list([Torch()[i] for i in range(2)]),
    "selected": lambda: datasets.Dataset.from_generator(two).shuffle(seed=1).select([1, 0]),
    "formatted": lambda: datasets.Dataset.from_generator(two).with_format("torch"),
    "mapped": lambda: datasets.Dataset.from_generator(two).map(lambda row: {"text": row["text"] * 2}),
    "pixels that are told to be images": lambda: datasets.Dataset.from_dict(
        {"image": [np.zeros((9, 8, 3), np.uint8)] * 2}, datasets.Features({"image": datasets.Image()})
    ),
}


@pytest.mark.parametrize("form", GOOD)
def test_forms_that_are_taken(form):
    dataset = check_dataset(GOOD[form](), args())
    assert len(dataset) == 2
    assert {type(image_file(dataset[i]["image"])) for i in range(2)} == {bytes}
    assert check_dataset(dataset, args()).features == dataset.features, "what is right stays as it is"


REFUSED = {
    "splits": (
        lambda: datasets.DatasetDict(train=GOOD["from_dict"](), test=GOOD["from_dict"]()),
        "error: the data set is of the type DatasetDict, not datasets.Dataset: choose one of its splits: train, test",
    ),
    "streaming": (
        lambda: GOOD["from_dict"]().to_iterable_dataset(),
        "error: the data set is of the type IterableDataset, not datasets.Dataset: samples are read in random order: "
        "open it without streaming=True; or datasets.Dataset.from_generator makes one of dictionaries with",
    ),
    "torch": (
        Torch,
        "error: the data set is of the type Torch, not datasets.Dataset: datasets.Dataset.from_generator makes",
    ),
    "nothing": (lambda: None, "error: the data set is of the type NoneType, not datasets.Dataset"),
    "an empty list": (lambda: [], "error: the data set is of the type list, not datasets.Dataset"),
    "images alone": (pictures, "error: the data set is of the type list, not datasets.Dataset"),
    "empty": (lambda: GOOD["from_dict"]().select([]), "error: the data set holds no samples"),
    "a transform": (
        lambda: GOOD["from_dict"]().with_transform(lambda rows: rows),
        "error: the data set's with_transform would not be used: change read_image, or use map",
    ),
    "another column": (
        lambda: GOOD["from_dict"]().rename_column("image", "photo"),
        "error: --image_column 'image' is not a column; there are: photo, text",
    ),
}


@pytest.mark.parametrize("form", REFUSED)
def test_forms_that_are_refused(form):
    make, message = REFUSED[form]
    with pytest.raises(SystemExit) as stop:
        check_dataset(make(), args())
    assert str(stop.value).startswith(message)
    assert "\n" not in str(stop.value)
