"""Hashes everything that a cached encoding depends on: code, settings, networks and tokenizers."""

import ast
import builtins
import concurrent.futures
import functools
import hashlib
import inspect
import json
import os
import sys
import sysconfig
import textwrap

import numpy as np
import torch

from ..data import captions

_PACKAGE = os.path.dirname(os.path.dirname(__file__)) + os.sep
_INSTALLED = tuple(sysconfig.get_paths()[name] for name in ("stdlib", "platstdlib", "purelib", "platlib"))


def fingerprint(thing) -> str:
    """Hash a function's code and the arguments that `partial` binds to it.

    Of networks it hashes configuration, weights and precision, of tokenizers vocabulary and length.
    """
    if isinstance(thing, functools.partial):
        parts = [*code(thing.func), *(f"{name} {fingerprint(bound)}" for name, bound in thing.keywords.items())]
    elif inspect.isfunction(thing):
        parts = code(thing)
    elif hasattr(thing, "state_dict"):  # a network of PyTorch or sd_flax
        config = thing.config.to_dict() if hasattr(thing.config, "to_dict") else dict(thing.config)
        config = {k: str(v) for k, v in config.items() if not k.startswith("_") and k != "transformers_version"}
        weights = thing.state_dict()
        with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as threads:
            hashes = threads.map(fingerprint, weights.values())
        own = code(type(thing)) if _is_ours(inspect.getfile(type(thing))) else []
        # The weights' dtype need not be the dtype that the network computes in.
        parts = [
            *own,
            str(thing.dtype),
            json.dumps(config, sort_keys=True),
            *map(str, zip(weights, hashes, strict=True)),
        ]
    elif isinstance(thing, np.ndarray):
        parts = [str(thing.dtype), str(thing.shape), hashlib.sha256(np.ascontiguousarray(thing)).hexdigest()]
    elif isinstance(thing, torch.Tensor):
        values = thing.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
        parts = [str(thing.dtype), str(tuple(thing.shape)), hashlib.sha256(values).hexdigest()]
    elif hasattr(thing, "get_vocab"):
        # Its tokens show padding, merges and splitting rules.
        probe = captions.tokenize(thing, "Of 3 images, one: a café!").tolist()
        parts = [json.dumps(thing.get_vocab(), sort_keys=True), str(thing.model_max_length), str(probe)]
    else:
        parts = [repr(thing)]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:32]


def code(thing) -> list[str]:
    """The source of a function or class, and of everything it uses from the user's files and this package.

    Users edit the scripts, and encodings made before an edit must not be used after it. Comments, docstrings and line
    breaks do not count, nor do installed libraries and imports inside a function.
    """
    thing = inspect.unwrap(thing)
    found = {}
    try:
        own = ast.parse(textwrap.dedent(inspect.getsource(thing))).body
    except SyntaxError:  # e.g. a lambda within an expression
        return [inspect.getsource(thing)]
    for statement in own:
        _collect(statement, vars(sys.modules[thing.__module__]) if inspect.isclass(thing) else thing.__globals__, found)
    return sorted(found)


def _collect(statement, names: dict, found: dict[str, None]) -> None:
    """Add a statement's source to `found`, and that of the statements that define what it refers to in `names`."""
    text = _without_docstrings(statement)
    if text in found:
        return
    found[text] = None
    for node in ast.walk(statement):
        if isinstance(node, ast.Name):
            _collect_definition(names, node.id, found)
        elif isinstance(node, ast.Attribute):
            owner = _module(node.value, names)
            if owner is not None:
                _collect_definition(vars(owner), node.attr, found)


def _module(node, names: dict):
    """The module that an expression such as `images` or `package.images` stands for; None for anything else."""
    if isinstance(node, ast.Attribute):
        owner = _module(node.value, names)
        value = getattr(owner, node.attr, None)
    else:
        value = names.get(node.id) if isinstance(node, ast.Name) else None
    return value if inspect.ismodule(value) else None


def _collect_definition(names: dict, name: str, found: dict[str, None]) -> None:
    value = names.get(name)
    if name not in names or inspect.ismodule(value) or hasattr(builtins, name):
        return
    home = getattr(inspect.unwrap(value) if callable(value) else value, "__module__", None)
    if (inspect.isfunction(value) or inspect.isclass(value)) and home != names.get("__name__") and home in sys.modules:
        names, name = vars(sys.modules[home]), value.__name__  # it was imported from there
    file = names.get("__file__")
    if file and _is_ours(file):
        for statement in _statements(file):
            if name in _defined_by(statement):
                _collect(statement, names, found)


def _is_ours(file: str) -> bool:
    """Whether a module belongs to this package or the user, not to an installed library."""
    return file.startswith(_PACKAGE) or not os.path.abspath(file).startswith(_INSTALLED)


@functools.cache
def _statements(file: str) -> list[ast.stmt]:
    with open(file, encoding="utf-8") as source:
        return ast.parse(source.read()).body


def _defined_by(statement) -> set[str]:
    if isinstance(statement, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        return {statement.name}
    return {node.id for node in ast.walk(statement) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}


def _without_docstrings(statement) -> str:
    tree = ast.parse(ast.unparse(statement))
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) and ast.get_docstring(node):
            node.body = node.body[1:] or [ast.Pass()]
    return ast.unparse(tree)
