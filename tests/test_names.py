"""Names of models and data sets: what is written like a path and is none, is said at once."""

import errno
import os
from types import SimpleNamespace

import pytest
from conftest import load_script

from t2i_training import library_errors
from t2i_training.sources import names

MODEL, DATA = "pretrained_model_name_or_path", "dataset_name"


@pytest.fixture
def parse(sd_flags, tmp_path, monkeypatch):
    """parse(**changes): arguments of a script in an empty working directory."""
    (tmp_path / "cwd").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")
    return lambda **changes: load_script("sd").parse_args(sd_flags(**changes))


@pytest.fixture
def refused(parse, capsys):
    def run(flag: str, value: str) -> str:
        with pytest.raises(SystemExit) as stop:
            parse(**{"train_data_dir": None if flag == DATA else "."} | {flag: value})
        assert stop.value.code == 2
        (line,) = capsys.readouterr().err.splitlines()
        return line

    return run


PATHS = (
    "./sd", "../sd", "/sd", "sd/", "a/b/", "a/b/c", "models\\sd", "C:\\models\\sd", "model.safetensors", "a/model.ckpt",
    "my model", "pictures.zip", "data/train.csv", "~no_such_user/sd", "a..b", "a" * 300 + "/b/c",
)  # fmt: skip


@pytest.mark.parametrize("value", PATHS)
@pytest.mark.parametrize("flag", [MODEL, DATA])
def test_a_path_that_is_none(flag, value, refused):
    kind = "file" if value in ("model.safetensors", "a/model.ckpt", "pictures.zip", "data/train.csv") else "folder"
    assert f"--{flag} {value}: there is no such {kind}" in refused(flag, value)


@pytest.mark.parametrize(
    "value", ["sd-turbo", "someone/model", "stable-diffusion-v1-5/stable-diffusion-v1-5", "a_b/C.d-1"]
)
def test_a_name_is_left_to_the_hub(value, parse):
    assert vars(parse(**{MODEL: value, DATA: value, "train_data_dir": None}))[DATA] == value


@pytest.mark.parametrize(
    ("value", "meant"),
    [
        ("picturs", "pictures"), ("Pictures2/", "pictures"), ("./pictuers", "pictures"),
        ("models/stable-difusion", "models/stable-diffusion"), ("modles/stable-diffusion/", "models/stable-diffusion"),
    ],
)  # fmt: skip
def test_did_you_mean(value, meant, refused):
    for name in ("pictures", "models/stable-diffusion"):
        os.makedirs(name)
    for flag in (MODEL, DATA):
        assert refused(flag, value).endswith(f"--{flag} {value}: there is no such folder; did you mean {meant}?")


@pytest.mark.parametrize("value", ["sd15", "runwayml/sd-v1-5", "picture-set/train", "csv"])
def test_what_is_no_misspelling(value, parse):
    """Numbers differ, or the owner's name does, which is the hub's; a reader of `datasets`."""
    for name in ("sd14", "runwayml/sd-v1-4", "picture-sets/train", "csvs"):
        os.makedirs(name)
    parse(**{DATA: value, "train_data_dir": None})


@pytest.mark.parametrize(
    "start", ["https://huggingface.co/", "huggingface.co/datasets/", "http://www.hf.co/", "hf://datasets/"]
)
def test_an_address(start, refused):
    assert "is a URL: use the hub's name, someone/thing" in refused(MODEL, f"{start}someone/thing/tree/main")


def test_an_address_of_a_file(refused):
    start = "https://huggingface.co/someone/thing/resolve/main/model.safetensors"
    for value in (start, f"{start}?download=true"):
        assert f"--{MODEL} {value} is a URL: download the file and name it" in refused(MODEL, value)
    value = "https://civitai.com/models/4384"
    assert f"--{MODEL} {value} is a URL of no hub: download the file that it leads to" in refused(MODEL, value)


def test_home_is_expanded(parse, monkeypatch, model, pictures):
    """The shell leaves it alone behind `--flag=`, and a folder named ~ is nobody's wish."""
    monkeypatch.setenv("HOME", str(model.parent))
    args = parse(**{MODEL: "~/sd", "output_dir": "~/out", "cache_dir": "~/cache", "cache_encodings": True})
    found = (args.pretrained_model_name_or_path, args.output_dir, args.cache_dir)
    assert found == tuple(f"{model.parent}/{name}" for name in ("sd", "out", "cache"))


# The hub


def test_a_data_set_that_is_nowhere(sd_flags):
    tokens = sd_flags(train_data_dir=None, dataset_name="nobody/nothing")
    message = "^error: --dataset_name nobody/nothing: there is no such folder, and no copy in the cache; HF_HUB_OFFLINE"
    with pytest.raises(SystemExit, match=message):
        load_script("sd").main(tokens)


def fail(args, error, **options) -> str:
    with pytest.raises(SystemExit) as stop, names.hub_errors(args, MODEL, **options):
        raise error
    return stop.value.code


def test_what_the_hub_says(monkeypatch, tmp_path):
    httpx = pytest.importorskip("httpx")
    from huggingface_hub import constants, errors

    args = SimpleNamespace(pretrained_model_name_or_path="a/b", cache_dir=None)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    response = httpx.Response(404, request=httpx.Request("GET", "http://hub"))
    start = f"error: --{MODEL} a/b: "
    assert fail(args, ConnectionError("no route")) == (
        f"{start}there is no such folder, and the hub cannot be reached (no route)"
    )
    assert f"{start}there is no such folder, and no such model on the hub" in fail(
        args, errors.RepositoryNotFoundError("x", response=response)
    )
    assert "`hf auth login`" in fail(args, errors.GatedRepoError("x", response=response))
    assert f"{start}the hub has no such revision" in fail(args, errors.RevisionNotFoundError("x", response=response))
    with names.hub_errors(args, MODEL, cached=True):
        raise ConnectionError("no route")


@pytest.mark.parametrize("number", [errno.EACCES, errno.EROFS, errno.ENOSPC, errno.ENOTDIR])
def test_a_cache_that_cannot_be_written(number, tmp_path, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HOME", str(tmp_path))
    error = OSError(number, os.strerror(number), str(tmp_path / "datasets" / "x.lock"))
    args = SimpleNamespace(pretrained_model_name_or_path="a/b", cache_dir=None)
    hint = f"; downloads and prepared data are kept in {tmp_path}: give --cache_dir a folder with room to write in"
    assert fail(args, error).endswith(hint)
    wrapped = RuntimeError("of a library")
    wrapped.__cause__ = error
    assert library_errors.cache_hint(wrapped) == hint
    assert library_errors.cache_hint(OSError(number, os.strerror(number), "/data/mine.csv")) == ""
