"""--push_to_hub, --hub_model_id and --hub_token against a local server, through the real client."""

import hub_server
import pytest
from conftest import flags, launch
from safetensors.torch import load

TOKEN = "hf_" + "SecretOfThisTest" * 2
EXPORTED = {
    "model_index.json",
    "scheduler/scheduler_config.json",
    "text_encoder/config.json",
    "text_encoder/model.safetensors",
    "tokenizer/merges.txt",
    "tokenizer/tokenizer.json",
    "tokenizer/tokenizer_config.json",
    "tokenizer/vocab.json",
    "unet/config.json",
    "unet/diffusion_pytorch_model.safetensors",
    "vae/config.json",
    "vae/diffusion_pytorch_model.safetensors",
}
PICTURES = {f"validation/step-{step:06d}{rest}" for step in (0, 2) for rest in (".png", "/00.png", "/01.png")}


def push(hub, model, pictures, output_dir, **changes):
    """A launch of two updates that pushes to `hub`."""
    defaults = {
        "pretrained_model_name_or_path": model, "train_data_dir": pictures, "output_dir": output_dir,
        "resolution": 32, "train_batch_size": 2, "max_train_steps": 2, "lr_warmup_steps": 0, "seed": 3,
        "report_to": "tensorboard", "logging_steps": 1, "push_to_hub": True,
    }  # fmt: skip
    environment = {"HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1", "HF_TOKEN": ""}
    environment |= {"HF_HUB_DISABLE_TELEMETRY": "1"} | changes.pop("env", {})
    return launch("sd", flags(**defaults | changes), env=environment, cwd=output_dir.parent, timeout=120)


def contents(folder) -> dict[str, bytes]:
    """Every file below `folder`, hidden ones too."""
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def pushed(model, pictures, tmp_path_factory):
    """(hub, completed launch, output folder) of a run with checkpoints, logs, pictures and a token on its command."""
    output_dir = tmp_path_factory.mktemp("push") / "my-model"
    with hub_server.running(TOKEN) as hub:
        done = push(
            hub, model, pictures, output_dir, hub_token=TOKEN, checkpointing_steps=1,
            validation_prompts=["a cat", "a dog"],
        )  # fmt: skip
        yield hub, done, output_dir


def test_weights_card_pictures_and_curves_arrive_and_nothing_else(pushed):
    hub, done, output_dir = pushed
    assert done.returncode == 0, done.stderr
    arrived = hub.repositories["tester/my-model"]
    assert set(arrived) == EXPORTED | PICTURES | {"README.md", "training_curves.png"}
    local = contents(output_dir)
    assert all(arrived[path] == local[path] for path in arrived)
    assert {"checkpoint-1/manifest.json", "checkpoint-2/manifest.json", "run_config.yaml", ".lock"} <= set(local)
    assert any(path.startswith("logs/") for path in local)
    assert "conv_in.weight" in load(arrived["unet/diffusion_pytorch_model.safetensors"])
    assert arrived["README.md"].startswith(b"---\n")
    assert b"validation/step-000002.png" in arrived["README.md"]


def test_repository_is_named_after_the_output_folder(pushed):
    hub, _, output_dir = pushed
    assert output_dir.name == "my-model"
    assert list(hub.repositories) == ["tester/my-model"]


def test_repository_is_created_before_anything_is_trained(pushed):
    hub, _, _ = pushed
    assert hub.requests[0] == ("POST", "/api/repos/create")
    assert hub.requests.count(("POST", "/api/repos/create")) == 1


def test_token_is_in_no_byte_of_the_output_and_in_nothing_printed(pushed):
    _, done, output_dir = pushed
    files = contents(output_dir)
    assert len(files) > 30
    assert [path for path, data in files.items() if TOKEN.encode() in data] == []
    assert TOKEN not in done.stdout + done.stderr
    assert b"hub_token" not in files["run_config.yaml"]


def test_rejected_token_ends_the_run_in_one_line_before_training(model, pictures, tmp_path):
    wrong = "hf_" + "WrongTokenOfThisTest" * 2
    with hub_server.running(TOKEN) as hub:
        done = push(hub, model, pictures, tmp_path / "out", hub_token=wrong)
    assert done.returncode == 1
    lines = done.stderr.strip().splitlines()
    assert lines[-1].startswith("error: --push_to_hub:")
    assert "Traceback" not in done.stderr
    assert "401" in lines[-1]
    assert wrong not in done.stdout + done.stderr
    assert set(contents(tmp_path / "out")) == {".lock", ".inspected_pictures.json"}
    assert hub.repositories == {}


def test_refused_upload_is_one_line_and_keeps_the_trained_model(model, pictures, tmp_path):
    """--hub_model_id names the repository; the token comes from the environment, as after a login."""
    with hub_server.running(TOKEN, refuse_commits=True) as hub:
        done = push(hub, model, pictures, tmp_path / "out", hub_model_id="atelier/portraits", env={"HF_TOKEN": TOKEN})
    assert list(hub.repositories) == ["atelier/portraits"]
    assert ("POST", "/api/models/atelier/portraits/commit/main") in hub.requests
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("error: --push_to_hub:")
    assert "403" in last
    assert str(tmp_path / "out") in last
    files = contents(tmp_path / "out")
    assert set(files) >= EXPORTED | {"README.md", "training_curves.png"}
    assert [path for path, data in files.items() if TOKEN.encode() in data] == []
    assert TOKEN not in done.stdout + done.stderr
