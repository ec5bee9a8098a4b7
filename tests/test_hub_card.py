"""The model card says what the run was and nothing that it should not; old stacks read the tokenizer too."""

import json
import re
from html import escape

import pytest
import torch
import yaml
from conftest import load_script
from huggingface_hub import ModelCard
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from safetensors.torch import save_file
from test_single_file import ONE
from transformers import AutoTokenizer, CLIPTokenizer

from t2i_training.report import hub
from t2i_training.run.export import keep_vocabulary_files

HOSTILE = [
    "<script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    "[click](javascript:alert(1))",
    "![x](https://tracker.example/a.png)",
    "# heading | of a | table",
    "`code` **bold** _italic_ ~gone~ $x$",
    "a\n---\nlicense: mit\n---\n# b",
    "&lt;b&gt; \\",
    "@everyone see https://example.org",
    "``` fenced ``",
    "`",
    "- 1. www.example.org",
    "| a |",
    "a ---",
]


def draw(folder, prompts) -> None:
    """A grid, and the images it was made of."""
    folder.mkdir(parents=True, exist_ok=True)
    folder.with_suffix(".png").touch()
    for i, prompt in enumerate(prompts):
        note = PngInfo()
        note.add_itxt("prompt", prompt)
        Image.new("RGB", (8, 8)).save(folder / f"{i:02d}.png", pnginfo=note)


@pytest.fixture
def card(sd_flags, tmp_path):
    """card(flags, **options): (YAML head, body) of the card of a run with these flags."""

    def write(changes=None, **options) -> tuple[dict, str]:
        args = load_script("sd").parse_args(sd_flags(**changes or {}))
        for step in (0, 4):
            draw(tmp_path / "out" / "validation" / f"step-{step:06d}", args.validation_prompts or [])
        defaults = {"base_model": args.pretrained_model_name_or_path, "title": "A title", "tags": ["a-tag"]}
        hub.write_card(args, **defaults | {"usage": "\nprint(1)\n", "steps": 4, "seed": 3, "precision": "no"} | options)
        text = (tmp_path / "out" / "README.md").read_text()
        empty, head, body = text.split("---\n", 2)
        assert empty == ""
        return yaml.safe_load(head), body

    return write


def test_card_of_a_run_on_hub_names(card):
    changes = {"pretrained_model_name_or_path": "someone/model", "dataset_name": "someone/pictures"}
    head, body = card(changes | {"validation_prompts": ["a red bird"], "learning_rate": 1e-5})
    assert head == {
        "base_model": "someone/model", "datasets": ["someone/pictures"], "inference": True,
        "tags": ["a-tag", "text-to-image", "diffusers", "diffusers-training"],
        "library_name": "diffusers", "license": "creativeml-openrail-m",
    }  # fmt: skip
    for line in (
        "# A title",
        "Fine-tuned from `someone/model`",
        "- `a red bird`",
        "print(1)",
        "| data | `someone/pictures` |",
        "| weight updates | `4` |",
        "| learning rate | `1e-05 (constant)` |",
        "| batch size x accumulation | `2 x 1` |",
        "| seed | `3` |",
    ):
        assert line in body
    assert "(validation/step-000004.png)" in body  # the newest grid, which holds the base model's row too


def test_card_is_one_that_the_hub_reads(card, tmp_path):
    card({"pretrained_model_name_or_path": "someone/model"})
    assert ModelCard.load(tmp_path / "out" / "README.md").data.base_model == "someone/model"


def test_metadata_adds_and_replaces(card):
    """The decoder names its prior, and has a licence of its own."""
    head, _ = card(prior=["someone/prior"], license="apache-2.0")
    assert (head["prior"], head["license"]) == (["someone/prior"], "apache-2.0")


def test_licence_is_that_of_a_base_that_lies_here(card, tmp_path):
    (tmp_path / "base").mkdir()
    for text, expected in (
        ("apache-2.0", "apache-2.0"),
        ("openrail++", "openrail++"),
        ("[a, b]", "creativeml-openrail-m"),
    ):
        (tmp_path / "base" / "README.md").write_text(f"---\nlicense: {text}\n---\n")
        assert card(base_model=str(tmp_path / "base"))[0]["license"] == expected


def test_what_the_objective_was(card):
    _, body = card({"snr_gamma": 5, "use_ema": True, "noise_offset": 0.1})
    for line in ("| snr gamma | `5.0` |", "| use ema | `True` |", "| noise offset | `0.1` |"):
        assert line in body
    assert "caption dropout" not in body


def test_local_paths_never_appear(card, model, pictures, tmp_path):
    """Of a local folder its own name stands there, of where it lies nothing; the hub takes names only."""
    head, body = card({"validation_prompts": ["a"]})
    assert "base_model" not in head
    assert "datasets" not in head
    text = str(head) + body
    for path in (model, pictures, tmp_path):
        assert str(path) not in text
        assert str(path.parent) not in text
    assert f"| base model | `{model.name}` |" in body
    assert f"| data | `{pictures.name}` |" in body


def test_local_folder_that_looks_like_a_hub_name(card, model, monkeypatch):
    monkeypatch.chdir(model.parent.parent)
    name = f"{model.parent.name}/{model.name}"
    head, body = card({"pretrained_model_name_or_path": name})
    assert "base_model" not in head
    assert name not in body


def code(markdown: str) -> str:
    """The text of Markdown that is one code span from end to end."""
    fence = re.match("`+", markdown)[0]
    text = markdown.removeprefix(fence).removesuffix(fence)
    assert markdown == fence + text + fence
    assert fence not in re.findall("`+", text), "the span ends early"
    return text[1:-1] if text[0] == text[-1] == " " else text


def test_prompts_are_inert(card):
    """Whatever a prompt holds, it is one list entry of code, that anything shows as it was typed."""
    _, body = card({"validation_prompts": HOSTILE})
    lines = [line for line in body.splitlines() if line.startswith("- ")]
    assert [code(line.removeprefix("- ")) for line in lines] == [" ".join(prompt.split()) for prompt in HOSTILE]
    assert "\n---\n" not in body
    assert "&#" not in body


def test_prompts_as_a_browser_shows_them(card):
    html = pytest.importorskip("markdown_it").MarkdownIt("gfm-like", {"linkify": False}).render
    _, body = card({"validation_prompts": HOSTILE})
    shown = re.findall("<li>(.*?)</li>", html(body), re.DOTALL)
    assert [re.sub("^<code>|</code>$", "", entry) for entry in shown] == [
        escape(" ".join(prompt.split())) for prompt in HOSTILE
    ]


def test_names_in_the_table_stay_in_their_cell(card):
    html = pytest.importorskip("markdown_it").MarkdownIt("gfm-like", {"linkify": False}).render
    for name in ("a | b", r"a\| <b>", "``|` c", "1. @a [x](javascript:y) www.example.org"):
        _, body = card(base_model=name)
        cells = re.findall("<td>(.*?)</td>", html(body))
        assert cells[:2] == ["base model", f"<code>{escape(name)}</code>"]
        assert len(cells) == 16


def test_a_data_set_of_the_scripts_own(card, monkeypatch):
    """A script without --dataset_name and --train_data_dir, since it opens a data set itself."""
    script = load_script("sd")
    monkeypatch.setattr(script.flags, "add_data_source_args", lambda parser: None)
    head, body = card({"train_data_dir": None})
    assert "| data | opened by the script itself |" in body
    assert "datasets" not in head
    assert "None" not in body


@pytest.mark.parametrize(
    "name", ["x\nlicense: mit", "a: b", "someone/pictures\n---\n# owned", "[a, b]", "<b>x</b>", "../secret/place"]
)
def test_names_cannot_break_out_of_the_head(card, name, tmp_path):
    """What is no hub name does not get into the YAML head, and into the table only as text."""
    head, body = card(base_model=name)
    assert "base_model" not in head
    assert head["license"] == "creativeml-openrail-m"
    assert "<b>" not in body
    assert "secret" not in body
    assert body.count("\n# ") == 1


def test_strange_metadata_stays_a_string(card):
    head, _ = card(prior=["a: b\nlicense: mit", "'\"", "---"])
    assert head["prior"] == ["a: b\nlicense: mit", "'\"", "---"]
    assert head["license"] == "creativeml-openrail-m"


def test_adapters_of_another_prediction_type_say_how_to_sample(card):
    """They bring no scheduler; a full run exports its own."""
    line = 'pipe.scheduler.register_to_config(prediction_type="v_prediction")'
    usage = load_script("sd_lora").CARD["usage"]
    body = card({"prediction_type": "v_prediction"}, tags=["lora"], usage=usage)[1]
    assert f'pipe.load_lora_weights("path/to/this/folder")\n{line}\npipe("' in body
    assert "| prediction type | `v_prediction` |" in body
    assert "prediction" not in card(tags=["lora"], usage=usage)[1]
    assert "<" not in load_script("sd").CARD["usage"], "a pipeline's folder says it all"


def test_models_in_single_files(card, tmp_path):
    """Loaded by the method for such files; their paths stay private."""
    usage = load_script("sd_lora").CARD["usage"]
    save_file({name: torch.zeros(shape) for name, shape in ONE.items()}, tmp_path / "base.safetensors")
    (tmp_path / "vae.ckpt").touch()
    flags = {"pretrained_model_name_or_path": tmp_path / "base.safetensors"}
    _, body = card(flags, usage=usage, base_model=str(tmp_path / "base.safetensors"))
    assert 'pipe = StableDiffusionPipeline.from_single_file("path/to/the/model.safetensors")\npipe.load_lora' in body
    flags = {"pretrained_vae_model_name_or_path": tmp_path / "vae.ckpt"}
    _, body = card(flags, usage=usage)
    assert '\npipe.vae = pipe.vae.from_single_file("path/to/the/vae.ckpt")\npipe.load_lora_weights' in body
    assert "| VAE | `vae.ckpt` |" in body
    _, body = card({"pretrained_vae_model_name_or_path": "stabilityai/sd-vae-ft-mse"}, usage=usage)
    assert '\npipe.vae = pipe.vae.from_pretrained("stabilityai/sd-vae-ft-mse")\n' in body
    assert str(tmp_path) not in body


def test_token_is_not_on_the_card(card):
    head, body = card({"push_to_hub": True, "hub_token": "hf_secret"})
    assert "hf_secret" not in str(head) + body


def test_card_without_prompts_shows_no_grid(card):
    _, body = card()
    assert "validation/" not in body


@pytest.mark.parametrize(
    ("name", "is_one"),
    [
        ("someone/model", True), ("gpt2", True), ("a.b-c_d/e.f", True), ("a/b/c", False), ("/abs/path", False),
        ("./here", False), ("a b", False), ("", False), ("someone/model\n", False), ("https://x.org/a", False),
    ],
)  # fmt: skip
def test_hub_names(name, is_one):
    assert hub.is_hub_name(name) is is_one


# --- vocab.json and merges.txt


@pytest.fixture
def tokenizer(tmp_path):
    """A CLIPTokenizer with merges, in the one file that transformers 5 writes."""
    symbols = [*"abcdefghijklmnopqrstuvwxyz", "é", "<|startoftext|>", "<|endoftext|>"]
    symbols += [f"{symbol}</w>" for symbol in symbols[:26]] + ["ca", "cat</w>", "bi", "rd</w>", "bird</w>"]
    (tmp_path / "vocab.json").write_text(json.dumps({symbol: i for i, symbol in enumerate(symbols)}))
    (tmp_path / "merges.txt").write_text("#version: 0.2\nc a\nca t</w>\nb i\nr d</w>\nbi rd</w>\n")
    files = {"vocab": str(tmp_path / "vocab.json"), "merges": str(tmp_path / "merges.txt")}
    tokenizer = CLIPTokenizer(**files, model_max_length=16)
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    assert (tmp_path / "tokenizer" / "tokenizer.json").exists()
    return tokenizer


TEXT = "a cat, a bird and abirdcat"


def test_tokenizer_loads_from_the_old_files_alone(tokenizer, tmp_path):
    folder = tmp_path / "tokenizer"
    keep_vocabulary_files(folder)
    expected = tokenizer(TEXT).input_ids
    assert AutoTokenizer.from_pretrained(folder)(TEXT).input_ids == expected
    (folder / "tokenizer.json").unlink()
    old = CLIPTokenizer(vocab=str(folder / "vocab.json"), merges=str(folder / "merges.txt"), model_max_length=16)
    assert old(TEXT).input_ids == expected
    assert CLIPTokenizer.from_pretrained(folder)(TEXT).input_ids == expected
    cat = tokenizer.convert_tokens_to_ids("cat</w>")
    assert cat in expected  # merges are at work here


def test_old_files_are_those_the_tokenizer_came_from(tokenizer, tmp_path):
    keep_vocabulary_files(tmp_path / "tokenizer")
    folder = tmp_path / "tokenizer"
    assert json.loads((folder / "vocab.json").read_text()) == json.loads((tmp_path / "vocab.json").read_text())
    assert (folder / "merges.txt").read_text() == (tmp_path / "merges.txt").read_text()


def test_folder_without_tokenizer_json_is_left_alone(tmp_path):
    keep_vocabulary_files(tmp_path)
    assert list(tmp_path.iterdir()) == []
