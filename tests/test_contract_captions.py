"""Contract: what is done to a caption. Resumed, cached, on two processes and in JAX it is the same."""

import json
from collections import Counter
from functools import partial

import numpy as np
import pytest
import tiny
import torch
from conftest import SAMPLING_STEPS, load_script
from PIL import Image
from runs import LARGE_EPSILON, assert_alike, interrupt, outcome, rows
from safetensors import safe_open
from safetensors.torch import load_file
from scripts import SCRIPTS
from test_data import options, visits

from t2i_training.data import captions, draws
from t2i_training.model import networks

TAGS = "zwx, fox, red fur, snow"
READERS = ["sd", "sd_lora", "prior", "prior_lora"]  # the torch scripts that read captions
CHANGES = {
    "caption_prefix": "photo of", "caption_suffix": "at night", "shuffle_caption": True, "keep_tokens": 1,
    "caption_tag_dropout_rate": 0.3, "caption_dropout": 0.2, "num_repeats": 2,
}  # fmt: skip
OF_SD = {"max_token_length": 150, "clip_skip": 2}
RUN = {"max_train_steps": 3, "checkpointing_steps": 3, "train_batch_size": 4, "center_crop": True, **LARGE_EPSILON,
       "learning_rate": 1e-4}  # fmt: skip


def picks(draw_of, caption=TAGS, **changes) -> list[str]:
    return [captions.pick_caption(caption, draw, options(**changes)) for draw in draw_of]


# --- what a visit reads


def test_prefix_and_suffix():
    both = {"caption_prefix": "photo of", "caption_suffix": "at night"}
    (draw,) = visits(1)
    assert picks([draw], "a fox", **both) == ["photo of a fox at night"]
    assert picks([draw], "", **both) == ["photo of at night"]
    assert picks([draw], "", caption_prefix="photo of") == ["photo of"]
    assert picks([draw], ["a fox"], caption_suffix="at night") == ["a fox at night"]
    assert set(picks(visits(50), "a fox", caption_dropout=0.5, **both)) == {"", "photo of a fox at night"}


def test_tags_are_shuffled_but_the_first():
    seen = Counter(picks(visits(3000), shuffle_caption=True, keep_tokens=1))
    assert len(seen) == 6, "all orders of the other three"
    assert all(caption.startswith("zwx, ") for caption in seen)
    assert all(abs(count - 500) < 82 for count in seen.values())  # 4 standard deviations
    assert set(picks(visits(20), shuffle_caption=True, keep_tokens=9)) == {TAGS}
    both = {"caption_prefix": "photo,", "caption_suffix": "night"}
    assert all(
        c.startswith("photo, ") and c.endswith(" night") for c in picks(visits(20), shuffle_caption=True, **both)
    )


def test_tags_are_left_out_at_the_rate_asked_for():
    seen = [caption.split(", ") for caption in picks(visits(3000), caption_tag_dropout_rate=0.25, keep_tokens=1)]
    assert all(caption[0] == "zwx" for caption in seen)
    for tag in ("fox", "red fur", "snow"):
        assert abs(sum(tag not in caption for caption in seen) - 750) < 95  # 4 standard deviations
    assert all(caption == [tag for tag in TAGS.split(", ") if tag in caption] for caption in seen), "in their order"
    assert "" in picks(visits(200), "fox", caption_tag_dropout_rate=0.9)


def test_odd_tags():
    (draw,) = visits(1)
    assert picks([draw], " a ,, b,c , ", caption_tag_dropout_rate=1e-9) == ["a, b, c"]
    assert picks([draw], "a fox", shuffle_caption=True) == ["a fox"]
    assert picks([draw], "", shuffle_caption=True) == [""]


def test_a_flag_shifts_no_other_draw():
    """Which tags are left out does not depend on their order, and neither on which captions are dropped."""
    thinned = picks(visits(200), caption_tag_dropout_rate=0.5)
    shuffled = picks(visits(200), caption_tag_dropout_rate=0.5, shuffle_caption=True)
    assert [sorted(caption.split(", ")) for caption in thinned] == [sorted(c.split(", ")) for c in shuffled]
    dropped = picks(visits(200), caption_tag_dropout_rate=0.5, caption_dropout=0.5)
    assert all(caption in ("", other) for caption, other in zip(dropped, thinned, strict=True))


def test_what_does_nothing_is_refused(refused):
    line = refused("sd", keep_tokens=1)
    assert "--keep_tokens does nothing without --shuffle_caption or --caption_tag_dropout_rate" in line
    assert "--max_token_length must be 75, 150 or 225, not 100" in refused("sd", max_token_length=100)
    assert "unrecognized arguments: --clip_skip" in refused("prior", clip_skip=2)
    assert "unrecognized arguments: --caption_prefix" in refused("decoder", caption_prefix="a")


# --- what the text encoder reads


@pytest.fixture(scope="session")
def deep_model(model, tmp_path_factory):
    """The tiny Stable Diffusion with a text encoder of three layers."""
    from transformers import CLIPTextConfig, CLIPTextModel

    folder = tiny.make_smaller(model, tmp_path_factory.mktemp("models") / "deep")
    config = CLIPTextConfig.from_pretrained(folder / "text_encoder")
    config.num_hidden_layers = 3
    torch.manual_seed(0)
    CLIPTextModel(config).save_pretrained(folder / "text_encoder")
    return folder


def test_long_captions_are_read_in_chunks(model):
    from transformers import CLIPTokenizer

    tokenizer = CLIPTokenizer.from_pretrained(model / "tokenizer")  # a token is a byte, and a chunk 14 of them
    start, end = 512, 513
    letters = [tokenizer.convert_tokens_to_ids(f"{letter}</w>") for letter in "abcdefghijklmnopqrstuvwxyz"]

    def chunks(caption, number=2):
        return captions.tokenize_in_chunks(tokenizer, caption, number).tolist()

    assert chunks(" ".join("abcdefghijklmnopqrst")) == [
        [start, *letters[:14], end], [start, *letters[14:20], *[end] * 9],
    ]  # fmt: skip
    assert chunks("a b") == [[start, *letters[:2], *[end] * 13], [start, *[end] * 15]]
    assert chunks(" ".join("abcdefghijklmn"))[1] == [start, *[end] * 15]
    assert chunks(" ".join("abcdefghijklmnopqrstuvwxyz" * 2)) == [
        [start, *letters[:14], end], [start, *letters[14:26], *letters[:2], end],
    ]  # fmt: skip
    assert chunks("") == [[start, *[end] * 15]] * 2
    assert chunks("a b", 1) == [captions.tokenize(tokenizer, "a b").tolist()]


def test_chunks_that_are_padded_with_another_token(model):
    """As SD 2's are: each piece ends with its end token, and padding follows."""
    from transformers import CLIPTokenizer

    tokenizer = CLIPTokenizer.from_pretrained(model / "tokenizer", pad_token="!")
    pad = tokenizer.pad_token_id
    (first, second) = captions.tokenize_in_chunks(tokenizer, "a", 2).tolist()
    assert first[:3] == [512, tokenizer.convert_tokens_to_ids("a</w>"), 513]
    assert (first[3:], second) == ([pad] * 13, [512, 513, *[pad] * 14])


def test_states_of_chunks_are_joined(deep_model):
    """As kohya's scripts join them: of the start and end states of chunks, the first and the last are kept."""
    from transformers import CLIPTextModel

    encoder = CLIPTextModel.from_pretrained(deep_model / "text_encoder")
    input_ids = torch.randint(0, 512, (2, 3, 16), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        joined = networks.encode_text(encoder, input_ids)
        parts = [encoder(input_ids[:, k])[0] for k in range(3)]
        expected = [parts[0][:, :15], parts[1][:, 1:15], parts[2][:, 1:]]
        alone = networks.encode_text(encoder, input_ids[:, :1])
    assert joined.shape == (2, 44, 16)
    torch.testing.assert_close(joined, torch.cat(expected, 1))
    assert torch.equal(alone, parts[0])


def test_clip_skip(deep_model):
    """2 is the last layer but one, through the final norm; diffusers calls it 1. The encoder itself stays whole."""
    from transformers import CLIPTextModel

    encoder = CLIPTextModel.from_pretrained(deep_model / "text_encoder")
    shorter = networks.skip_layers(encoder, 2)
    input_ids = torch.randint(0, 512, (2, 16), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        states = encoder(input_ids, output_hidden_states=True).hidden_states
        norm = getattr(encoder, "text_model", encoder).final_layer_norm
        torch.testing.assert_close(shorter(input_ids)[0], norm(states[-2]))
        assert not torch.allclose(shorter(input_ids)[0], encoder(input_ids)[0])
    assert (len(list(shorter.named_parameters())), encoder.config.num_hidden_layers) == (2 * 16 + 4, 3)
    shared = dict(encoder.named_parameters())
    assert all(tensor is shared[name] for name, tensor in shorter.named_parameters()), "no second copy"
    assert networks.skip_layers(encoder, 1) is encoder
    with pytest.raises(SystemExit, match="--clip_skip 4: the text encoder has 3 layers, so 3 is the most"):
        networks.skip_layers(encoder, 4)


@pytest.mark.parametrize("clip_skip", [1, 2])
def test_flax_reads_what_torch_reads(deep_model, clip_skip):
    flax_networks = pytest.importorskip("t2i_training.sd_flax.networks")
    from transformers import CLIPTextModel

    from t2i_training.sd_flax import pipeline as flax_pipeline

    encoder = CLIPTextModel.from_pretrained(deep_model / "text_encoder")
    twin = flax_networks.skip_layers(flax_networks.load_text_encoder(deep_model / "text_encoder"), clip_skip)
    input_ids = torch.randint(0, 512, (2, 2, 16), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = networks.encode_text(networks.skip_layers(encoder, clip_skip), input_ids)
    states = torch.from_numpy(flax_pipeline.encode_text(twin, input_ids.numpy()).__array__().copy())
    torch.testing.assert_close(states, expected, rtol=1e-4, atol=1e-5)
    if clip_skip == 2:
        with pytest.raises(SystemExit, match="--clip_skip 4: the text encoder has 3 layers"):
            flax_networks.skip_layers(flax_networks.load_text_encoder(deep_model / "text_encoder"), 4)


def test_validation_images_are_those_of_the_card(command, deep_model, tmp_path):
    """With the line that it has for --clip_skip, and not without."""
    out = tmp_path / "out"
    changes = {"pretrained_model_name_or_path": deep_model, "max_train_steps": 1, "validation_prompts": ["a red fox"]}
    load_script("sd").main(command("sd", output_dir=out, clip_skip=2, **changes))
    with Image.open(out / "validation" / "step-000001" / "00.png") as file:
        drawn = np.asarray(file).astype(int)
    code = (out / "README.md").read_text().partition("```python\n")[2].partition("\npipe(")[0]
    code = code.replace("path/to/this/folder", str(out))
    assert code.splitlines()[-1].endswith("# --clip_skip=2")
    differences = []
    for lines in (code, code.rpartition("\n")[0]):
        exec(lines, names := {})
        options = {"height": 32, "width": 32, "num_inference_steps": SAMPLING_STEPS}
        image = names["pipe"]("a red fox", generator=torch.Generator().manual_seed(3), **options).images[0]
        differences.append(abs(np.asarray(image) - drawn).max())
    assert differences[0] <= 1, "rounded alike, but for what a batch of two changes"
    assert differences[1] > 1


# --- what the result says of it


def test_cards_and_headers_say_it(changed, tmp_path):
    out = tmp_path / "out"
    load_script("sd_lora").main(changed("sd_lora", output_dir=out, max_train_steps=1, save_kohya=True))
    card = (out / "README.md").read_text()
    assert ".encoder.layers[-1:]  # --clip_skip=2\npipe(" in card
    assert "trained on captions of up to 150 tokens. diffusers' pipelines read 75 of a prompt" in card
    for row in ("caption prefix | photo of", "shuffle caption | True", "keep tokens | 1", "clip skip | 2"):
        assert f"| {row} |" in card.replace("`", "")
    with safe_open(out / "kohya_lora_weights.safetensors", "pt") as file:
        header = file.metadata()
    assert (header["ss_clip_skip"], header["ss_max_token_length"]) == ("2", "150")


# --- whole runs


@pytest.fixture(scope="session")
def tagged(tmp_path_factory):
    """Images with several tags in their captions, some longer than a chunk."""
    folder = tiny.make_pictures(tmp_path_factory.mktemp("data") / "tagged")
    lines = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]
    for number, line in enumerate(lines):
        line["text"] = ", ".join([f"image {number}", "red", "in the snow", "blue sky"][: 2 + number % 3])
    (folder / "metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


@pytest.fixture(scope="session")
def changed(command, tagged, deep_model):
    """changed(script, **changes): tokens of a run with everything that can be done to captions."""

    def make(script, **more):
        of_sd = {"pretrained_model_name_or_path": deep_model, **OF_SD} if script.startswith("sd") else {}
        views = {} if script.startswith("sd") else {"center_crop": None}
        return command(script, train_data_dir=tagged, **RUN | CHANGES | of_sd | views | more)

    return make


@pytest.mark.parametrize("script", READERS)
def test_resumed_and_cached(changed, script, tmp_path):
    """Bit for bit as uninterrupted, and as without the cache."""
    main, trained = load_script(script).main, SCRIPTS[script].trained
    main(changed(script, output_dir=tmp_path / "plain"))
    main(changed(script, output_dir=tmp_path / "cached", cache_encodings=True))
    for update in (1, 2, 3):
        with interrupt(1, last=update == 3):
            main(changed(script, output_dir=tmp_path / "pieces", cache_encodings=True, resume_from_checkpoint="latest"))
    assert outcome(tmp_path / "pieces", 3, trained, 10) == outcome(tmp_path / "cached", 3, trained, 10)
    assert_alike(tmp_path / "cached", tmp_path / "plain", trained)
    stores = {path.parent.name.partition("-")[0] for path in (tmp_path / "cached").glob("encodings/*/*.safetensors")}
    assert stores == {"images"}, "captions that change are encoded as they come"


@pytest.mark.parametrize("script", ["sd", "prior"])
def test_two_processes(changed, server, script, tmp_path):
    whole = changed(script, output_dir=tmp_path / "one", cache_encodings=True)
    load_script(script).main(whole)
    shared = changed(script, output_dir=tmp_path / "two", cache_encodings=True, train_batch_size=2)
    run = server.start(shared, tmp_path, script, processes=2)
    assert run.wait_for_all() == [0, 0], run.output()
    assert_alike(tmp_path / "two", tmp_path / "one", SCRIPTS[script].trained)


def test_captions_that_stay_are_cached_as_they_are_read(command, tagged, tmp_path):
    """With prefix and suffix, once for all repeats; a warm run with another prefix encodes captions anew."""
    common = {"train_data_dir": tagged, "cache_encodings": True, "encodings_dir": tmp_path / "cache", **RUN}
    script = load_script("sd")
    script.main(command("sd", caption_prefix="a", num_repeats=3, **common))
    held = {path: load_file(path)["keys"] for path in tmp_path.glob("cache/captions-*/*.safetensors")}
    assert sum(map(len, held.values())) == tiny.PICTURES
    script.main(command("sd", caption_prefix="b", **common))
    assert sum(len(load_file(p)["keys"]) for p in tmp_path.glob("cache/captions-*/*.safetensors")) == 2 * tiny.PICTURES


def test_repeats_draw_for_themselves_and_are_encoded_once(command, pictures, tmp_path, monkeypatch, caplog):
    script, seen = load_script("sd"), []
    monkeypatch.setattr(draws, "generator", partial(spy, draws.generator, seen))
    out = tmp_path / "out"
    with caplog.at_level("INFO", "t2i_training"):
        script.main(
            command("sd", output_dir=out, num_repeats=3, num_train_epochs=1, max_train_steps=None, cache_encodings=True)
        )
    assert [row["epoch"] for row in rows(out)][-1] == 1.0
    assert len(rows(out)) == 3 * tiny.PICTURES // 2
    noises = [visit for visit in seen if visit[2] == "noise"]
    assert len(noises) == len(set(noises)) == 3 * tiny.PICTURES
    assert sum(len(load_file(path)["keys"]) for path in out.glob("encodings/images-*/*")) <= tiny.PICTURES * 4
    assert "18 samples of 6 images, 2 an update, 9 updates (1.0 epochs)" in caplog.text
    assert f"inspected {tiny.PICTURES} samples" in caplog.text


def spy(generator, seen, seed, epoch, index, name):
    seen.append((epoch, index, name))
    return generator(seed, epoch, index, name)
