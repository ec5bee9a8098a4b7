"""The cache's key changes with whatever its encodings are made by, and with nothing else."""

import ast
import importlib
import linecache
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from conftest import load_script
from transformers import CLIPTextConfig, CLIPTextModel

from t2i_training.data import captions, images
from t2i_training.encodings import fingerprint as package_file
from t2i_training.encodings.fingerprint import fingerprint

HELPERS = '''
"""Helpers."""
import math

SIDE = 8
UNUSED = 1


def enlarge(image):
    """Twice the size."""
    return image * SIDE  # a comment


class Blur:
    radius = 2

    def __call__(self, image):
        return image * self.radius


def unused():
    return UNUSED
'''
SCRIPT = '''
import functools
import math

import helpers
from helpers import Blur
from t2i_training.data import images

SCALE = 2
NAMES = {"a", "b", "c"}


def cut(image):
    return image[:SCALE]


@functools.lru_cache
def read_image(source, side):
    """What a network reads of an image."""
    return Blur()(helpers.enlarge(cut(images.decode(source, side))))


def compute_loss(batch):
    return math.sqrt(batch)
'''


@pytest.fixture
def mark(tmp_path, monkeypatch):
    """mark(**{file: (old, new)}): fingerprint of a reader of user's files, with these replacements made in them."""
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)

    def make(**changes):
        for name, text in (("helpers", HELPERS), ("script", SCRIPT)):
            old, new = changes.get(name, ("", ""))
            assert old in text
            (tmp_path / f"{name}.py").write_text(text.replace(old, new) if old else text)
            sys.modules.pop(name, None)
        importlib.invalidate_caches()
        linecache.clearcache()
        package_file._statements.cache_clear()
        try:
            return fingerprint(partial(importlib.import_module("script").read_image, side=3))
        finally:
            for name in ("helpers", "script"):
                sys.modules.pop(name, None)

    return make


@pytest.mark.parametrize(
    ("file", "old", "new"),
    [
        ("script", "What a network reads of an image.", "Another docstring"),
        ("script", "math.sqrt(batch)", "batch"),
        ("script", "SCALE = 2", "\n# a comment, and other line breaks\nSCALE = (\n    2\n)"),
        ("helpers", "# a comment", ""),
        ("helpers", "Twice the size.", "Of twice the size."),
        ("helpers", "UNUSED = 1", "UNUSED = 2"),
    ],
)
def test_what_does_not_matter_keeps_it(mark, file, old, new):
    assert mark(**{file: (old, new)}) == mark()


@pytest.mark.parametrize(
    ("file", "old", "new"),
    [
        ("script", "image[:SCALE]", "image[1:SCALE]"),
        ("script", "SCALE = 2", "SCALE = 3"),
        ("script", "decode(source, side)", "decode(source, 2 * side)"),
        ("helpers", "image * SIDE", "image + SIDE"),
        ("helpers", "SIDE = 8", "SIDE = 9"),
        ("helpers", "radius = 2", "radius = 3"),
        ("helpers", "image * self.radius", "image"),
    ],
)
def test_whatever_is_called_changes_it(mark, file, old, new):
    assert mark(**{file: (old, new)}) != mark()


@pytest.mark.parametrize(
    ("module", "old", "new", "reader"),
    [
        (images, "(width - W) // 2", "0", 0),
        (images, "LONGEST = 32", "LONGEST = 16", 0),
        (images, '"white"', '"black"', 0),
        (captions, '"truncation": True', '"truncation": False', 1),
    ],
)
def test_the_packages_own_work_counts(monkeypatch, module, old, new, reader):
    """As if somebody had edited it; a docstring there does not count."""
    script = load_script("sd")
    function = partial([script.read_image, script.read_caption][reader])
    before, read = fingerprint(function), package_file._statements
    source = Path(module.__file__).read_text()
    for text, differs in ((source.replace(old, new), True), (source.replace('    """', '    """More: ', 1), False)):
        assert text != source
        edited = ast.parse(text).body
        monkeypatch.setattr(
            package_file, "_statements", lambda file, edited=edited: edited if file == module.__file__ else read(file)
        )
        assert (fingerprint(function) != before) is differs


def test_a_function_that_is_bound_is_known_by_its_code():
    def read(source, transform):
        return transform(source)

    assert fingerprint(partial(read, transform=captions.pick_caption)) == fingerprint(
        partial(read, transform=captions.pick_caption)
    )
    assert fingerprint(partial(read, transform=captions.pick_caption)) != fingerprint(
        partial(read, transform=captions.text_mask)
    )


CONFIG = {
    "vocab_size": 9, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2,
}  # fmt: skip


def test_a_torch_network_counts_with_weights_config_and_precision():
    def make(**changes):
        torch.manual_seed(0)
        return CLIPTextModel(CLIPTextConfig(**CONFIG | changes))

    known = fingerprint(make())
    assert known == fingerprint(make())
    halved = make()
    halved.get_parameter(next(name for name, _ in halved.named_parameters())).data /= 2
    others = [halved, make().to(torch.bfloat16), make(layer_norm_eps=1e-3)]
    assert len({known, *map(fingerprint, others)}) == 4


def test_a_flax_network_counts_with_the_precision_it_computes_in():
    """Its weights stay in float32."""
    jnp, networks = pytest.importorskip("jax.numpy"), pytest.importorskip("t2i_training.sd_flax.networks")
    full, again, half = (networks.CLIPTextModel(CONFIG, dtype=t) for t in (jnp.float32, jnp.float32, jnp.bfloat16))
    assert fingerprint(full) == fingerprint(again)
    assert fingerprint(full) != fingerprint(half)
