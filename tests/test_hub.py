"""--push_to_hub, --hub_model_id and --hub_token against a local server, through the real client."""

import shutil

import hub_server
import pytest
import test_guide_commands
import torch
from conftest import flags
from hub_server import COMMIT, TOKEN
from safetensors.torch import load, load_file
from scripts import ADAPTERS

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
written = test_guide_commands.written  # a fixture
PICTURES = {f"validation/step-{step:06d}{rest}" for step in (0, 2) for rest in (".png", "/00.png", "/01.png")}


@pytest.fixture(scope="module")
def start(server):
    """start(tokens, folder, script, hub's options): (hub, status, printed) of a run in a process of its own."""

    def start(tokens, folder, script="sd", *, token="", options=None, environment=None):
        environment = {"HF_TOKEN": token, "HF_HUB_OFFLINE": "0"} | (environment or {})
        with hub_server.running(TOKEN, server.hub_port, **options or {}) as hub:
            run = server.start(tokens, folder, script, environment=environment)
            return hub, run.wait(), run.output()

    return start


@pytest.fixture(scope="module")
def push(start, model, pictures):
    """push(output_dir, hub's options, **changes): the hub, and a run of two updates that has pushed to it."""

    def push(output_dir, options=None, token="", **changes):
        defaults = {
            "pretrained_model_name_or_path": model, "train_data_dir": pictures, "output_dir": output_dir,
            "resolution": 32, "train_batch_size": 2, "max_train_steps": 2, "lr_warmup_steps": 0, "seed": 3,
            "report_to": "tensorboard", "logging_steps": 1, "push_to_hub": True,
        }  # fmt: skip
        return start(flags(**defaults | changes), output_dir.parent, token=token, options=options)

    return push


def contents(folder) -> dict[str, bytes]:
    """Every file below `folder`, hidden ones too."""
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def pushed(push, tmp_path_factory):
    """(hub, output folder, printed) of a run with checkpoints, logs, images and a token on its command."""
    output_dir = tmp_path_factory.mktemp("push") / "my-model"
    changes = {"hub_token": TOKEN, "checkpointing_steps": 1, "validation_prompts": ["a cat", "a dog"]}
    hub, status, printed = push(output_dir, **changes)
    assert status == 0, printed
    return hub, output_dir, printed


def test_weights_card_pictures_and_curves_arrive_and_nothing_else(pushed):
    hub, output_dir, _ = pushed
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
    hub, output_dir, _ = pushed
    assert output_dir.name == "my-model"
    assert list(hub.repositories) == ["tester/my-model"]


def test_repository_is_created_before_anything_is_trained(pushed):
    hub, _, _ = pushed
    assert hub.requests[0] == ("POST", "/api/repos/create")
    assert hub.requests.count(("POST", "/api/repos/create")) == 1


def test_token_is_in_no_byte_of_the_output_and_in_nothing_printed(pushed):
    _, output_dir, printed = pushed
    files = contents(output_dir)
    assert len(files) > 30
    assert [path for path, data in files.items() if TOKEN.encode() in data] == []
    assert TOKEN not in printed
    assert b"hub_token" not in files["run_config.yaml"]


def test_rejected_token_ends_the_run_in_one_line_before_training(push, tmp_path):
    wrong = "hf_" + "WrongTokenOfThisTest" * 2
    hub, status, printed = push(tmp_path / "out", hub_token=wrong)
    assert status == 1
    last = printed.strip().splitlines()[-1]
    assert last.startswith("error: --push_to_hub:")
    assert "Traceback" not in printed
    assert "401" in last
    assert wrong not in printed
    assert set(contents(tmp_path / "out")) == {".lock", ".inspected_pictures.json"}
    assert hub.repositories == {}


def test_refused_upload_is_one_line_and_keeps_the_trained_model(push, tmp_path):
    """--hub_model_id names the repository; the token comes from the environment, as after a login."""
    changes = {"hub_model_id": "atelier/portraits", "token": TOKEN}
    hub, status, printed = push(tmp_path / "out", {"refuse_commits": True}, **changes)
    assert list(hub.repositories) == ["atelier/portraits"]
    assert ("POST", "/api/models/atelier/portraits/commit/main") in hub.requests
    assert status == 1
    assert "Traceback" not in printed
    last = printed.strip().splitlines()[-1]
    assert last.startswith("error: --push_to_hub:")
    assert "403" in last
    assert str(tmp_path / "out") in last
    files = contents(tmp_path / "out")
    assert set(files) >= EXPORTED | {"README.md", "training_curves.png"}
    assert [path for path, data in files.items() if TOKEN.encode() in data] == []
    assert TOKEN not in printed


def test_guides_command_that_pushes(written, start, tmp_path):
    """The decoder's LoRA command with all that is written."""
    script, tokens = written("decoder_lora")
    assert "--push_to_hub" in tokens
    launcher = {"ACCELERATE_MIXED_PRECISION": "fp16"}
    hub, status, printed = start(tokens, tmp_path, script, token=TOKEN, environment=launcher)
    assert status == 0, printed
    arrived = hub.repositories["tester/kandi22-decoder-naruto-lora"]
    pictures = {f"validation/step-00000{step}.png" for step in (0, 6)}
    assert {path for path in arrived if path.count("/") < 2 and "/0" not in path} == {
        ADAPTERS, "README.md", "training_curves.png", *pictures
    }  # fmt: skip
    own = load_file(tmp_path / "kandi22-decoder-naruto-lora" / ADAPTERS)
    pushed = load(arrived[ADAPTERS])
    assert set(pushed) == set(own)
    assert all(torch.equal(pushed[name], own[name]) for name in own)
    card = arrived["README.md"].decode()
    assert "- lora\n" in card
    assert str(tmp_path) not in card


def test_no_folder_of_this_machine_is_uploaded(start, command, tmp_path):
    """A decoder's card names its prior; here that is a folder, which the card that stays has to name."""
    tokens = command("decoder", output_dir=tmp_path / "out", max_train_steps=1, push_to_hub=True)
    prior = tokens[tokens.index("--pretrained_prior_model_name_or_path") + 1]
    hub, status, printed = start(tokens, tmp_path, "decoder", token=TOKEN)
    assert status == 0, printed
    arrived = hub.repositories["tester/out"]
    assert [path for path, data in arrived.items() if prior.encode() in data] == []
    assert f"prior:\n- {prior}\n" in (tmp_path / "out" / "README.md").read_text()
    assert "the uploaded card names no prior" in printed


# Bases that the hub has


DOWNLOADS = {
    "sd": {"pretrained_model_name_or_path": "someone/base"},
    "sd_lora": {"pretrained_model_name_or_path": "someone/base"},
    "sd_flax": {"pretrained_model_name_or_path": "someone/small"},
    "decoder": {
        "pretrained_prior_model_name_or_path": "someone/prior",
        "pretrained_decoder_model_name_or_path": "someone/decoder",
    },
    "prior_lora": {
        "pretrained_prior_model_name_or_path": "someone/prior",
        "pretrained_decoder_model_name_or_path": "someone/decoder",
    },
}


@pytest.fixture(scope="module")
def public(guarded_model, small_model, prior_model, decoder_model):
    return {
        "public": {
            "someone/base": guarded_model, "someone/small": small_model, "someone/prior": prior_model,
            "someone/decoder": decoder_model,
        }
    }  # fmt: skip


def downloads(hub) -> set[str]:
    return {path.partition(f"/resolve/{COMMIT}/")[2] for method, path in hub.requests if method == "GET"} - {""}


SLOW = pytest.mark.slow("10 s to compile: the other scripts hold what is downloaded")


@pytest.mark.parametrize("script", [pytest.param(s, marks=SLOW if s == "sd_flax" else ()) for s in DOWNLOADS])
def test_a_base_by_its_name_on_the_hub(script, public, start, command, tmp_path):
    """It is downloaded, what training or the export needs of it; the second start needs no hub."""
    if script == "sd_flax":
        pytest.importorskip("jax")
    environment = {"JAX_PLATFORMS": "cpu"} if script == "sd_flax" else {}
    names = {**DOWNLOADS[script], "cache_dir": tmp_path / "cache", "max_train_steps": 1}
    tokens = command(script, output_dir=tmp_path / "out", **names)
    hub, status, printed = start(tokens, tmp_path, script, options=public, environment=environment)
    assert status == 0, printed
    found = {name for name in downloads(hub) if name.endswith((".safetensors", "preprocessor_config.json"))}
    unet, vae = "unet/diffusion_pytorch_model.safetensors", "vae/diffusion_pytorch_model.safetensors"
    text, image = "text_encoder/model.safetensors", "image_encoder/model.safetensors"
    expected = {
        "sd": {unet, vae, text, "safety_checker/model.safetensors", "feature_extractor/preprocessor_config.json"},
        "sd_lora": {unet, vae, text},
        "sd_flax": {unet, vae, text},
        "decoder": {unet, "movq/diffusion_pytorch_model.safetensors", image},
        "prior_lora": {
            "prior/diffusion_pytorch_model.safetensors", text, image, "image_processor/preprocessor_config.json"
        },
    }  # fmt: skip
    assert found == expected[script]
    if script == "sd":
        assert (tmp_path / "out" / "safety_checker" / "model.safetensors").is_file()
        tokens = command(script, output_dir=tmp_path / "again", **names)
        hub, status, printed = start(tokens, tmp_path, script)  # of a hub that has it no more
        assert status == 0, printed
        assert not downloads(hub)


def test_a_base_that_the_hub_does_not_have(public, start, command, tmp_path):
    tokens = command("sd", pretrained_model_name_or_path="someone/bse", output_dir=tmp_path / "out")
    _, status, printed = start(tokens, tmp_path, "sd", options=public)
    assert status == 1
    (line,) = [line for line in printed.splitlines() if "error" in line]
    assert line.startswith(
        "error: --pretrained_model_name_or_path someone/bse: there is no such folder, and no such model on"
    )


def test_a_vae_by_its_name_on_the_hub(public, model, start, command, tmp_path):
    """A VAE's repository, or a pipeline's, whose other networks are left there."""
    shutil.copytree(model / "vae", tmp_path / "vae")
    options = {"public": public["public"] | {"someone/vae": tmp_path / "vae"}}
    for name, file in (("someone/vae", ""), ("someone/base", "vae/")):
        changes = {"pretrained_vae_model_name_or_path": name, "cache_dir": tmp_path / "cache", "max_train_steps": 1}
        tokens = command("sd_lora", output_dir=tmp_path / name.replace("/", "-"), **changes)
        hub, status, printed = start(tokens, tmp_path, "sd_lora", options=options)
        assert status == 0, printed
        weights = {path for path in downloads(hub) if path.endswith(".safetensors")}
        assert weights == {f"{file}diffusion_pytorch_model.safetensors"}


def test_a_repository_of_single_files(public, start, command, tmp_path):
    (tmp_path / "single").mkdir()
    (tmp_path / "single" / "Anime_v2.safetensors").write_bytes(b"x")
    options = {"public": {"someone/single": tmp_path / "single"}}
    tokens = command("sd", pretrained_model_name_or_path="someone/single", output_dir=tmp_path / "out")
    _, status, printed = start(tokens, tmp_path, "sd", options=options)
    assert status == 1
    said = "is no pipeline, but holds single files: download one, Anime_v2.safetensors perhaps, and name that file"
    assert f"error: --pretrained_model_name_or_path someone/single {said}" in printed
