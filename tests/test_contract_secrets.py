"""A token for the hub is in no byte that a run leaves, whatever the script, the tracker and the way it ends.

Four are planted: the flag's, those of the two environment variables, and that of a stored login. `everything` is all
that was written: files, log, both outputs, the error. Pushing is in test_hub.py, usage errors also in test_checks.py.
"""

import importlib.util
import io
import json
import traceback
import zipfile
from pathlib import Path

import hub_server
import huggingface_hub
import pytest
from conftest import load_quick_flax_script, load_script
from huggingface_hub import constants
from scripts import SCRIPTS

FLAG, VARIABLE, OLD_VARIABLE, STORED = (f"hf_{word * 4}" for word in ("FromTheFlag", "Variable", "OldName", "Stored"))
TOKENS = (FLAG, VARIABLE, OLD_VARIABLE, STORED)


@pytest.fixture
def planted(monkeypatch, tmp_path):
    """Tokens in the environment and in the home's login file, as a login leaves it. Trackers are offline."""
    monkeypatch.setenv("HF_TOKEN", VARIABLE)
    monkeypatch.setenv("HUGGING_FACE_HUB_TOKEN", OLD_VARIABLE)
    monkeypatch.delenv("WANDB_DIR", raising=False)
    monkeypatch.setenv("COMET_START_ONLINE", "0")
    monkeypatch.setenv("COMET_OFFLINE_DIRECTORY", str(tmp_path / "out" / "comet"))
    file = Path(constants.HF_TOKEN_PATH)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(STORED)
    yield monkeypatch
    file.unlink()


@pytest.fixture
def run(command, capfd, caplog, monkeypatch, tmp_path):
    """run(script, **flags): (how it ended, everything it wrote as {place: bytes})."""

    def go(script, **changes):
        if script == "sd_flax":
            pytest.importorskip("flax")
            load_quick_flax_script(monkeypatch)
        capfd.readouterr()
        out = tmp_path / "out"
        tokens, error = command(script, output_dir=out, **changes), io.StringIO()
        ended = None
        try:
            load_script(script).main(tokens)
        except BaseException as exception:
            ended = exception
            traceback.print_exc(file=error)
        printed = capfd.readouterr()
        texts = {"stdout": printed.out, "stderr": printed.err, "log": caplog.text, "traceback": error.getvalue()}
        return ended, contents(out) | {name: text.encode() for name, text in texts.items()}

    return go


def contents(folder) -> dict[str, bytes]:
    """All files by their places, and those in archives."""
    files = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    return {place: content for name in files for place, content in unpacked(name, files[name])}


def unpacked(name: str, content: bytes) -> list[tuple[str, bytes]]:
    if not name.endswith(".zip"):
        return [(name, content)]
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        return [file for inner in archive.namelist() for file in unpacked(f"{name}/{inner}", archive.read(inner))]


def found(everything: dict[str, bytes]) -> list[tuple[str, str]]:
    """(place, token) of each that is in a name or in bytes, as it is or as UTF-16."""
    spellings = [(token, token.encode(coding)) for token in TOKENS for coding in ("utf-8", "utf-16-le")]
    return [(place, token) for place in everything for token, s in spellings if s in place.encode() + everything[place]]


def test_a_planted_token_is_found(tmp_path):
    assert len(found({"a": b"x" + FLAG.encode() + b"y", STORED: b"", "c": OLD_VARIABLE.encode("utf-16")})) == 3
    for name, inner in (("inner.zip", FLAG), ("outer.zip", None)):
        with zipfile.ZipFile(tmp_path / name, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("a", inner) if inner else archive.write(tmp_path / "inner.zip", "b.zip")
    assert sorted(found(contents(tmp_path))) == [("inner.zip/a", FLAG), ("outer.zip/b.zip/a", FLAG)]


SHORT = {"max_train_steps": 2, "checkpointing_steps": 1}


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_run_with_all_trackers_whose_upload_fails(script, run, planted):
    """The server repeats, in its refusal, the token that it was sent."""

    def refuse(**options):
        raise RuntimeError(f"401 for Authorization: Bearer {options['token'] or huggingface_hub.get_token()}")

    class Made:
        repo_id = "me/model"

    planted.setattr(huggingface_hub, "create_repo", lambda **options: Made)
    planted.setattr(huggingface_hub, "upload_folder", refuse)
    ended, everything = run(script, report_to="all", push_to_hub=True, **SHORT, **SCRIPTS[script].validates)
    assert str(ended).startswith("error: --push_to_hub: RuntimeError: 401 for Authorization: Bearer ***; ")
    names = ["tfevents", "README.md", "run_config.yaml", "metrics.jsonl", "checkpoint-2/manifest.json"]
    names += [".wandb"] if importlib.util.find_spec("wandb") else []
    names += ["messages.json"] if importlib.util.find_spec("comet_ml") else []
    for name in names:
        assert any(name in place for place in everything), name
    assert found(everything) == []


@pytest.mark.parametrize("script", SCRIPTS)
def test_an_error_in_the_middle_of_a_run(script, run, planted):
    """With a token on the command line, and a traceback."""
    from t2i_training.report.progress import Progress

    def add(progress, loss, batch):
        if progress.step == 1:
            raise RuntimeError("out of everything")
        return original(progress, loss, batch)

    original = Progress.add_micro_batch
    planted.setattr(huggingface_hub, "create_repo", lambda **options: type("Made", (), {"repo_id": "me/model"}))
    planted.setattr(Progress, "add_micro_batch", add)
    ended, everything = run(script, report_to="tensorboard", push_to_hub=True, hub_token=FLAG, **SHORT)
    assert str(ended) == "out of everything"
    assert b"Traceback" in everything["traceback"]
    assert any("checkpoint-1/" in place for place in everything)
    assert found(everything) == []


def test_a_hub_that_cannot_be_reached(run, planted):
    """The client's own error, of a name that cannot be resolved and of one that refuses."""
    planted.setattr(constants, "HF_HUB_OFFLINE", False)
    for address in ("http://127.0.0.1:9", "http://hub.invalid"):
        planted.setattr(huggingface_hub.hf_api.api, "endpoint", address)
        ended, everything = run("sd", push_to_hub=True, hub_token=FLAG, **SHORT)
        assert str(ended).startswith("error: --push_to_hub: ")
        assert found(everything) == []


PROGRAM = """
import json, os, sys
from conftest import load_script
from huggingface_hub import constants

constants.HF_TOKEN_PATH = sys.argv[1]
for token, flags in json.loads(sys.argv[2]):
    os.environ["HF_TOKEN"] = token
    try:
        load_script("sd").main(flags)
    except SystemExit as stop:
        print(stop, file=sys.stderr)
"""


def test_a_hub_that_repeats_the_token(command, server, tmp_path):
    """Downloads that the server refuses with the header that it was sent, as a careless proxy may."""
    model, out = ("--pretrained_model_name_or_path", "someone/model"), tmp_path / "out"
    pictures = command("sd", output_dir=out, dataset_name="someone/pictures", train_data_dir=None)
    runs = [(VARIABLE, [*command("sd", output_dir=out), *model]), ("", [*command("sd", output_dir=out), *model])]
    runs += [(VARIABLE, pictures), ("", pictures)]
    (tmp_path / "token").write_text(STORED)
    (tmp_path / "program.py").write_text(PROGRAM)
    tokens = [str(tmp_path / "token"), json.dumps(runs, default=str)]
    with hub_server.running("hf_another", server.hub_port) as hub:
        run = server.start(tokens, tmp_path, tmp_path / "program.py", environment={"HF_HUB_OFFLINE": "0"})
        assert run.wait() == 0, run.output()
    assert {"/api/models/someone/model", "/api/datasets/someone/pictures"} <= {place for _, place in hub.requests}
    errors = [line for line in run.output().splitlines() if line.startswith("error: ")]
    assert [line.split()[1:3] for line in errors] == [
        ["--pretrained_model_name_or_path", "someone/model:"], ["--pretrained_model_name_or_path", "someone/model:"],
        ["--dataset_name", "someone/pictures:"], ["--dataset_name", "someone/pictures:"],
    ], run.output()  # fmt: skip
    assert found(contents(out) | {"printed": run.output().encode()}) == []
    assert "Bearer ***" in errors[-1], "the server has repeated it"


@pytest.mark.parametrize(
    "tokens",
    [
        [f"–hub_token={FLAG}"], ["–hub_token", "s3cret"], ["hub_token=s3cret"], ["--hubtoken", "s3cret"],
        ["--hf_tokens=s3cret"], ["--token", FLAG], ["--push_to_hub", FLAG], ["--hub_token=s3cret\nx"],
    ],
)  # fmt: skip
def test_a_token_in_the_wrong_place(tokens, command, capsys):
    """An editor's dash, no dash, the name of another tool, a line too many."""
    with pytest.raises(SystemExit):
        load_script("sd").parse_args([*command("sd"), *tokens])
    message = capsys.readouterr().err
    assert "error: " in message
    assert "s3cret" not in message
    assert FLAG not in message


@pytest.mark.parametrize(
    "text", [f"hub_tokn: {FLAG}", f"hub_token {FLAG}: 1", "hub_token s3cret: 1", "hub_token=s3cret"]
)
def test_a_token_in_the_wrong_line_of_a_config(text, command, capsys, tmp_path):
    (tmp_path / "run.yaml").write_text(text + "\n")
    with pytest.raises(SystemExit):
        load_script("sd").parse_args([*command("sd"), f"--config={tmp_path / 'run.yaml'}"])
    message = capsys.readouterr().err
    assert "error: " in message
    assert "s3cret" not in message
    assert FLAG not in message


def test_a_line_end_behind_a_token_is_not_part_of_it(command, tmp_path):
    """As `hub_token: |` gives it; the client would refuse it in an error text that quotes it."""
    (tmp_path / "run.yaml").write_text(f"push_to_hub: true\nhub_token: |\n  {FLAG}\n")
    assert load_script("sd").parse_args([*command("sd"), f"--config={tmp_path / 'run.yaml'}"]).hub_token == FLAG
