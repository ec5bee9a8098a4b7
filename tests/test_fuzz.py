"""Whatever stands in a file that we parse, the answer is the right one or the documented clear exit.

python -m pytest tests/test_fuzz.py                    # a few dozen examples each, always the same ones
FUZZ=5000 python -m pytest tests/test_fuzz.py          # so many examples each, others in every run

The long form ends with a line for each parser: how many examples, in how many seconds, and how many of them failed.
"""

import contextlib
import functools
import io
import json
import os
import re
import shutil
import struct
import time
import warnings
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import PIL
import pytest
import torch
import yaml
from accelerate import PartialState
from bad_samples import data_args
from conftest import load_script
from diffusers import UNet2DConditionModel
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from PIL import Image

from t2i_training import files, sanitize
from t2i_training.cli import checks, config_file
from t2i_training.data import image_folder, images, inspection
from t2i_training.data.dataset import open_dataset
from t2i_training.encodings.store import Store
from t2i_training.model import lora
from t2i_training.report import hub
from t2i_training.run import checkpoint, manifest, output_folder

FUZZ = int(os.environ.get("FUZZ", "0"))
OFTEN = settings(
    max_examples=FUZZ or 40, derandomize=not FUZZ, deadline=None, database=None, print_blob=False,
    suppress_health_check=[*HealthCheck],
)  # fmt: skip
ran = {}  # test -> [examples, those that failed, seconds]


def fuzz(**strategies):
    """hypothesis's `given`, so many times; counted."""

    def decorate(test):
        @functools.wraps(test)
        def counted(*arguments, **options):
            counts = ran.setdefault(test.__name__, [0, 0, 0.0])
            counts[0], counts[1], began = counts[0] + 1, counts[1] + 1, time.perf_counter()
            test(*arguments, **options)
            counts[1], counts[2] = counts[1] - 1, counts[2] + time.perf_counter() - began

        return OFTEN(given(**strategies)(counted))

    return decorate


@pytest.fixture(scope="module", autouse=True)
def table(request):
    yield
    if FUZZ:
        lines = [f"{name:32} {n:7} examples {bad:5} failed {spent:7.1f} s" for name, (n, bad, spent) in ran.items()]
        with request.config.pluginmanager.getplugin("capturemanager").global_and_fixture_disabled():
            print("", *lines, sep="\n")


ANY_TEXT = st.text(st.characters(), max_size=20)  # lone surrogates, control characters, all scripts
SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | ANY_TEXT
JSON = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(ANY_TEXT, inner, max_size=4),
    max_leaves=8,
)


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("fuzz")


def one_clear_line(stop: SystemExit, printed: str = "") -> None:
    message = printed if stop.code == 2 else stop.code  # argparse prints it, elsewhere Python does
    assert isinstance(message, str)
    assert "error: " in message
    assert message.removesuffix("\n").isprintable()


# --- --config


@pytest.fixture(scope="module")
def types() -> dict:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checks, "parse", lambda parser, *_: parser)
        actions = load_script("sd").parse_args()._actions
        return {a.dest: (type(a.default), getattr(a.type, "kind", a.type)) for a in actions}


FLAGS = st.sampled_from([
    "adam_beta1", "cache_crops", "cache_encodings", "caption_column", "checkpointing_steps", "dataset_name",
    "hub_model_id", "hub_token", "learning_rate", "lr_scheduler", "max_train_steps", "mixed_precision", "noise_offset",
    "output_dir", "prediction_type", "push_to_hub", "report_to", "resolution", "resume_from_checkpoint", "seed",
    "snr_gamma", "torch_compile", "train_batch_size", "use_ema", "validation_prompts",
])  # fmt: skip
PLAUSIBLE = st.sampled_from(
    [0, 1, 8, 64, -1, 0.5, 1e-4, "1e-4", "no", "bf16", "none", True, False, None, "a", ["a", "b"]]
)
MAPPINGS = st.dictionaries(FLAGS, PLAUSIBLE | JSON, max_size=3).map(
    lambda values: yaml.safe_dump(values, allow_unicode=True).encode(errors="surrogatepass")
)
TAGS = st.builds(
    "{}: !!{} {}\n".format,
    FLAGS,
    st.sampled_from(["int", "float", "bool", "timestamp", "binary", "set", "omap", "null", "merge"]),
    ANY_TEXT,
).map(lambda text: text.encode(errors="surrogatepass"))
YAML_LIKE = st.text(st.sampled_from("seed:- [],{}&a*!!int'\"#|>?%@`\n\t012.eE_~"), max_size=40).map(str.encode)


@fuzz(content=MAPPINGS | TAGS | YAML_LIKE | st.binary(max_size=60))
def test_config(content, place, model, pictures, types):
    file, printed = place / "run.yaml", io.StringIO()
    file.write_bytes(content)
    tokens = [f"--pretrained_model_name_or_path={model}", f"--train_data_dir={pictures}", f"--config={file}"]
    try:
        with contextlib.redirect_stderr(printed):
            args = load_script("sd").parse_args(tokens)
    except SystemExit as stop:
        return one_clear_line(stop, printed.getvalue())
    for name, value in config_file.public_config(args).items():  # none of another type than its flag's
        default, kind = types.get(name, (list, list))
        assert value is None or isinstance(value, kind or (bool if default is bool else str | list)) or value == 0
    file.write_text(yaml.safe_dump(config_file.public_config(args)))  # and it comes back as it is
    with contextlib.redirect_stderr(printed):
        again = load_script("sd").parse_args([f"--config={file}"])
    assert config_file.public_config(again) == config_file.public_config(args)


# --- checkpoints


@pytest.fixture(scope="module")
def saved(place) -> Path:
    """A checkpoint as far as `verify` is concerned."""
    path = place / "saved" / "checkpoint-4"
    (path / "unet").mkdir(parents=True)
    (path / "optimizer.bin").write_bytes(bytes(range(50)))
    (path / "unet" / "config.json").write_text("{}")
    position = {"step": 4, "samples_seen": 8, "seed": 3, "dataset_size": 6, "unreported": [[1.5, 2.0]]}
    manifest.write_manifest(path, position)
    assert checkpoint.verify(path) is None
    PartialState()  # the log asks it for the rank
    return path


def damaged(saved, name: str, content: bytes) -> Path:
    copy = saved.parent.parent / "copy" / saved.name
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(saved, copy)
    (copy / name).write_bytes(content)
    return copy


def flip(content: bytes, bit: int) -> bytes:
    flipped = bytearray(content)
    flipped[bit // 8 % len(content)] ^= 1 << bit % 8
    return bytes(flipped)


@fuzz(bit=st.integers(0, 100_000), name=st.sampled_from(["manifest.json", "optimizer.bin", "unet/config.json"]))
def test_flipped_bit_in_a_checkpoint(bit, name, saved):
    copy = damaged(saved, name, flip((saved / name).read_bytes(), bit))
    if checkpoint.verify(copy) is not None:
        return
    assert name == "manifest.json"  # and all that it says is as it was: a blank, or the name of the digest, has changed
    old, new = checkpoint.read_manifest(saved), checkpoint.read_manifest(copy)
    assert {**new, "digest": 0}.items() >= {**old, "digest": 0}.items()


MANIFESTS = st.fixed_dictionaries(
    {"format": st.just(1) | SCALARS, "step": st.just(4) | SCALARS},
    optional={
        "samples_seen": st.integers() | SCALARS, "seed": st.integers() | SCALARS, "unreported": JSON,
        "files": st.dictionaries(st.sampled_from(["optimizer.bin", "../x", "/etc/passwd", "a\0b"]) | ANY_TEXT, JSON),
        "digest": JSON,
    },
)  # fmt: skip


@fuzz(content=st.binary(max_size=60) | JSON.map(json.dumps).map(str.encode) | MANIFESTS.map(json.dumps).map(str.encode))
def test_manifest(content, saved):
    copy = damaged(saved, "manifest.json", content)
    fault = checkpoint.verify(copy)
    assert fault is not None, "no hash can be guessed"
    assert fault.isprintable()
    for wanted in ("latest", "checkpoint-4"):
        try:
            found = checkpoint.find_checkpoint(copy.parent, wanted, SimpleNamespace(is_main_process=True))
        except SystemExit as stop:
            one_clear_line(stop)
        else:
            assert found == (None, {})


# --- metadata.jsonl

NAMES = st.sampled_from(["0.png", "1.png", "../0.png", "/etc/passwd", "a/../../b.png", "", "a\0.png", "C:\\a", "~/a"])
ROWS = st.dictionaries(
    st.sampled_from(["file_name", "text", "image_file_name", "image", "_line", "_faults", "_faults_file_name", ""])
    | ANY_TEXT,
    NAMES | JSON, max_size=4,
)  # fmt: skip
GOOD = st.builds(lambda name, text: {"file_name": name, "text": text}, NAMES, ANY_TEXT | st.lists(ANY_TEXT))
LINES = (ROWS | GOOD | JSON).map(json.dumps).map(str.encode) | st.binary(max_size=40)


@pytest.fixture(scope="module")
def root(place) -> Path:
    """A folder of two images."""
    root = place / "pictures"
    root.mkdir()
    for name in ("0.png", "1.png"):
        Image.new("RGB", (9, 7)).save(root / name)
    return root


def inspected(root, metadata: bytes, out: Path) -> tuple:
    """(data set, images) of the folder's rows that can be used."""
    (root / image_folder.METADATA).write_bytes(metadata)
    args = data_args(train_data_dir=str(root), output_dir=str(out), skip_bad_samples=True)
    out.mkdir(exist_ok=True)
    accelerator = SimpleNamespace(is_main_process=True, process_index=0, num_processes=1)
    return inspection.inspect(args, accelerator, open_dataset(args, seed=0), "text")


@fuzz(lines=st.lists(LINES, max_size=5), end=st.sampled_from([b"\n", b"\r\n", b"\n\n"]))
def test_metadata(lines, end, root, place):
    try:
        dataset, pictures = inspected(root, end.join(lines), place / "out")
    except SystemExit as stop:
        return one_clear_line(stop)
    assert len(dataset) == len(pictures) > 0
    for row in dataset:
        assert Path(row["image"]["path"]).parent == root
        assert row["image"]["bytes"] is None
        assert inspection.caption_fault(row["text"]) is None
        assert row[image_folder.LINE].startswith("metadata.jsonl line ")


# --- what is remembered of images

DIGEST = "0123456789abcdef" * 2
ENTRIES = st.tuples(st.just(DIGEST) | JSON, st.just(9) | JSON, st.just(7) | JSON).map(list) | JSON


@fuzz(
    content=st.binary(max_size=60)
    | st.builds(lambda entry, other: {"pictures": {"0.png": entry, "1.png": other}}, ENTRIES, ENTRIES)
    | st.builds(lambda pictures: {"pictures": pictures}, JSON)
    | JSON
)
def test_memo(content, root, place):
    """It is taken as it is or not at all; no image is refused for it."""
    if isinstance(content, dict):
        content.setdefault("pillow", PIL.__version__)
        if isinstance(pictures := content.get("pictures"), dict):
            for path, status in [(path, path.stat()) for path in root.glob("*.png") if path.name in pictures]:
                pictures[f"{path}:{status.st_size}:{status.st_mtime_ns}"] = pictures.pop(path.name)
    (place / "out").mkdir(exist_ok=True)
    memo = content if isinstance(content, bytes) else json.dumps(content).encode()
    (place / "out" / inspection.MEMO).write_bytes(memo)
    metadata = b"".join(b'{"file_name": "%d.png", "text": "a"}\n' % i for i in range(2))
    _, pictures = inspected(root, metadata, place / "out")
    assert len(pictures) == 2
    for picture in pictures:
        assert len(bytes.fromhex(picture.digest)) == 16
        assert type(picture.width) is type(picture.height) is int
        assert min(picture.width, picture.height) > 0


# --- EXIF

UPRIGHT = np.arange(18, dtype=np.uint8).reshape(2, 3, 3) * 14
TURNS = [np.rot90(side, turns) for side in (UPRIGHT, UPRIGHT[:, ::-1]) for turns in range(4)]
TAGS_OF_TIFF = st.tuples(
    st.just(274) | st.integers(0, 65535), st.integers(0, 14), st.integers(0, 2) | st.integers(0, 2**32 - 1),
    st.integers(0, 9) | st.integers(0, 2**32 - 1),
)  # fmt: skip


def tiff(order: str, tags: list[tuple], rest: bytes) -> bytes:
    """A directory of tags: each a number, a type, a count and a value or its place."""
    head = (b"II" if order == "<" else b"MM") + struct.pack(order + "HIH", 42, 8, len(tags))
    return head + b"".join(struct.pack(order + "HHII", *tag) for tag in tags) + rest


@fuzz(
    exif=st.binary(max_size=60)
    | st.builds(tiff, st.sampled_from("<>"), st.lists(TAGS_OF_TIFF, max_size=4), st.binary(max_size=30)),
    prefix=st.sampled_from([b"", b"Exif\0\0"]), kind=st.sampled_from(["PNG", "JPEG", "WEBP"]),
    min_shape=st.none() | st.just((1, 1)),
)  # fmt: skip
def test_exif(exif, prefix, kind, min_shape):
    """The image comes out, turned as it says or not at all."""
    file = io.BytesIO()
    Image.fromarray(UPRIGHT).save(file, kind, exif=prefix + exif, lossless=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # as where images are inspected and read
        picture, size = images.decode_with_size(file.getvalue(), min_shape)
    assert (picture.mode, size) == ("RGB", picture.size)
    assert size in ((3, 2), (2, 3))
    if kind == "PNG":
        assert any(np.array_equal(np.asarray(picture), turned) for turned in TURNS)


# --- adapters


@pytest.fixture(scope="module")
def adapters(model, place) -> tuple:
    """(network with adapters, the folder that holds them, what is in their file)."""
    network = UNet2DConditionModel.from_pretrained(model, subfolder="unet")
    args, accelerator = SimpleNamespace(rank=1), SimpleNamespace(device="cpu", mixed_precision="no")
    lora.add_adapters(network, args, 0, accelerator, ("to_q",))
    lora.save_networks(network, place / "adapters")
    return network, place / "adapters", (place / "adapters" / lora.WEIGHTS_NAME).read_bytes()


HEADERS = st.dictionaries(
    ANY_TEXT | st.just("__metadata__"),
    st.fixed_dictionaries({
        "dtype": st.sampled_from(["F32", "F8_E4M3", "BF16", "I64", "BOOL", "F4"]) | JSON,
        "shape": st.lists(st.integers(-1, 9), max_size=3) | JSON,
        "data_offsets": st.lists(st.integers(0, 80), min_size=2, max_size=2) | JSON,
    }) | JSON, max_size=3,
).map(lambda header: json.dumps(header).encode())  # fmt: skip


def weights_file(header: bytes, rest: bytes = b"") -> bytes:
    return len(header).to_bytes(8, "little") + header + rest


@example(damage=weights_file(b'{"": {"dtype": "\\u001b[2J", "shape": [], "data_offsets": [0, 0]}}'))
@fuzz(
    damage=st.tuples(st.lists(st.integers(0, 30_000), max_size=3), st.none() | st.integers(0, 6_000))
    | st.builds(weights_file, HEADERS, st.binary(max_size=80))
    | st.binary(max_size=60)
)
def test_adapters(damage, adapters):
    """They are read or refused in a line; a value may be another, for that the checkpoint's hashes are there."""
    network, folder, content = adapters
    if isinstance(damage, tuple):
        bits, cut = damage
        damage = functools.reduce(flip, bits, content)[:cut]
    (folder / lora.WEIGHTS_NAME).write_bytes(damage)
    try:
        lora.load_networks(network, folder)
    except SystemExit as stop:
        return one_clear_line(stop)
    assert len(damage) == len(content)


# --- encodings


def kept(place) -> tuple[Store, Path, bytes]:
    shutil.rmtree(place / "store", ignore_errors=True)
    store = Store(place / "store")
    store.add([b"k" * 16, b"l" * 16], {"x": torch.arange(6.0).view(2, 3)})
    (path,) = store.folder.glob("*.safetensors")
    return store, path, path.read_bytes()


@fuzz(bits=st.lists(st.integers(0, 10_000), min_size=1, max_size=3), cut=st.none() | st.integers(0, 200))
def test_damaged_shard(bits, cut, place):
    store, path, content = kept(place)
    for bit in bits:
        content = flip(content, bit)
    path.write_bytes(content[:cut])
    look_into(store, path)


@fuzz(
    content=st.binary(max_size=80)
    | st.builds(lambda n, b: n.to_bytes(8, "little") + b, st.integers(0, 90), st.binary())
)
def test_random_shard(content, place):
    store, path, _ = kept(place)
    path.write_bytes(content)
    look_into(store, path)


def look_into(store, path) -> None:
    """Nothing is read that is not what was written."""
    whole = files.sha256(path)[:32] == path.stem
    store.scan()
    store.verify([b"k" * 16, b"l" * 16])
    assert store.missing([b"k" * 16, b"l" * 16]) == ([] if whole else [0, 1])
    if whole:
        assert store.read(b"l" * 16)["x"].tolist() == [3, 4, 5]


# --- metrics.jsonl

ROW_INDEX = {"step": 2, "loss": 0.5, "lr": 1e-4, "grad_norm": None}
METRICS = st.dictionaries(st.sampled_from(list(ROW_INDEX)), JSON).map(lambda row: json.dumps(ROW_INDEX | row).encode())


@fuzz(lines=st.lists(METRICS | JSON.map(json.dumps).map(str.encode) | st.binary(max_size=30), max_size=5))
def test_metrics(lines, place):
    file = place / output_folder.METRICS
    file.write_bytes(b"\n".join([json.dumps(ROW_INDEX).encode(), *lines]))
    rows = output_folder.read_metrics(place)
    assert rows[0] == ROW_INDEX
    for row in rows:
        assert type(row["step"]) is int
        assert row["loss"] - row["lr"] - (row["grad_norm"] or 0.0) < float("inf")
    output_folder._keep_metrics_until(file, 2)
    assert all(row["step"] <= 2 for row in output_folder.read_metrics(place))


# --- texts


@fuzz(text=ANY_TEXT | st.text(st.sampled_from("<>[]()`*_~$|\\#!@:{}&;0123 \n\x1b")))
def test_literal(text):
    """One code span from end to end, that shows the text: by CommonMark 0.31, 6.1."""
    shown, markdown = sanitize.printable(" ".join(text.split())), hub.literal(text)
    assert markdown.isprintable()
    if not shown:
        assert markdown == "(empty)"
        return
    fence = re.match("`+", markdown)[0]
    content = markdown.removeprefix(fence).removesuffix(fence)
    assert markdown == fence + content + fence
    assert fence not in re.findall("`+", content)
    padded = content[0] == content[-1] == " " and content.strip()
    assert (content[1:-1] if padded else content) == shown


@fuzz(text=ANY_TEXT)
def test_printable(text):
    shown = sanitize.printable(text)
    assert shown.isprintable()
    assert sanitize.printable(shown) == shown
    assert shown == text or not text.isprintable()
