"""The package's rooms, and which of them may import from which: by subject, and never in a circle."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest
from scripts import REPOSITORY, SCRIPTS

PACKAGE = REPOSITORY / "src" / "t2i_training"
# Each imports from those before it alone.
GROUND = ["sanitize", "errors", "log", "bar", "device", "distributed", "stopping", "library_errors", "files"]
MAY_IMPORT = {  # besides what is in the room itself
    "cli": {"ground", "sources"},
    "sources": {"ground"},
    "data": {"ground", "sources"},
    "encodings": {"ground", "data"},
    "model": {"ground", "sources", "cli"},  # cli: model/single_file is a command too
    "run": {"ground", "sources", "cli"},
    "report": {"ground", "cli", "data", "model", "run"},
    "sd_flax": {"ground", "sources", "cli", "data", "encodings", "model", "run", "report"},
}
CHANGING = {"add", "append", "clear", "discard", "extend", "insert", "pop", "popitem", "remove", "setdefault", "update"}
MODULES = sorted(path.relative_to(PACKAGE).as_posix() for path in PACKAGE.rglob("*.py"))


def room_of(name: str) -> str:
    return name.partition("/")[0] if "/" in name else "ground"


def imports(path: Path) -> list[tuple[int, str]]:
    """(line, module) of each import from the package, anywhere in a file: "log", "data/images"."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            place = path.parents[node.level - 1] / (node.module or "").replace(".", "/")
            places = [place / alias.name for alias in node.names] if place.is_dir() else [place]
            found += [(node.lineno, place.relative_to(PACKAGE).as_posix()) for place in places]
    return [(line, name) for line, name in found if (PACKAGE / f"{name}.py").exists() or (PACKAGE / name).is_dir()]


@pytest.mark.parametrize("module", MODULES)
def test_imports_follow_the_rules(module):
    room, name = room_of(module), module.removesuffix(".py")
    for line, other in imports(PACKAGE / module):
        if room == "ground":
            allowed = GROUND[: GROUND.index(name)]
            assert other in allowed, f"{module} line {line} imports {other}; it may import {allowed}"
        else:
            allowed = MAY_IMPORT[room] | {room}
            assert room_of(other) in allowed, f"{module} line {line} imports {other}; {room}/ may import from {allowed}"


def test_every_room_has_its_rule_and_its_sentence():
    rooms = {path.parent for path in PACKAGE.glob("*/__init__.py")}
    assert {room.name for room in rooms} == MAY_IMPORT.keys()
    for room in rooms:
        assert ast.get_docstring(ast.parse((room / "__init__.py").read_text())), room
    assert {name.removesuffix(".py") for name in MODULES if "/" not in name} == {"__init__", *GROUND}


def test_the_command_line_costs_nothing_heavy():
    ground = ("files.py", "library_errors.py", "stopping.py")
    light = [name for name in MODULES if name.startswith(("cli/", "sources/")) or name in ground]
    modules = [f"t2i_training.{name.removesuffix('.py').removesuffix('/__init__').replace('/', '.')}" for name in light]
    heavy = "{'torch', 'accelerate', 'diffusers', 'transformers', 'datasets', 'jax', 'numpy', 'tqdm'}"
    program = f"import sys, {', '.join(modules)}; print(sorted({heavy} & {{*sys.modules}}))"
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert result.stdout == "[]\n"


def test_state_that_outlives_a_run_is_what_libraries_force():
    """Each has its reason beside it. What belongs to a run belongs to an object that its `main` has made."""
    rebound, filled = set(), set()
    for name in MODULES:
        module = ast.parse((PACKAGE / name).read_text())
        rebound |= {(name, x) for node in ast.walk(module) if isinstance(node, ast.Global) for x in node.names}
        own = [ast.unparse(node.targets[0]) for node in module.body if isinstance(node, ast.Assign)]
        for node in ast.walk(module):
            if isinstance(node, ast.Attribute) and ast.unparse(node.value) in own and node.attr in CHANGING:
                filled.add((name, ast.unparse(node.value)))
            if isinstance(node, ast.Subscript) and isinstance(node.ctx, ast.Store | ast.Del):
                filled |= {(name, ast.unparse(node.value))} if ast.unparse(node.value) in own else set()
    assert rebound == {("distributed.py", "_group"), ("sd_flax/networks/layers.py", "_as_written")}
    assert filled == {("run/output_folder.py", "_locks")}


def test_nothing_rewrites_the_arguments():
    """What a run settles besides them, such as its seed, has a name of its own. `cli` alone makes them."""
    files = [PACKAGE / name for name in MODULES if room_of(name) != "cli" and name != "sources/names.py"]
    for path in [*files, *(script.path for script in SCRIPTS.values())]:
        for node in ast.walk(ast.parse(path.read_text())):
            targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
            names = [name for target in filter(None, targets) for name in ast.walk(target)]
            assert not [name for name in names if ast.unparse(name).startswith(("args.", "self.args."))], path
            assert not (isinstance(node, ast.Call) and ast.unparse(node).startswith("setattr(args")), path


@pytest.mark.parametrize("module", [name for name in MODULES if room_of(name) != "cli"])
def test_shared_code_never_asks_which_script_it_serves(module):
    """Scripts have different flags: what depends on one is an argument. `cli` checks those that a script has."""
    calls = [node for node in ast.walk(ast.parse((PACKAGE / module).read_text())) if isinstance(node, ast.Call)]
    asked = [
        call
        for call in calls
        if ast.unparse(call.func) in ("getattr", "hasattr") and "args" in ast.unparse(call.args[0])
    ]
    assert [ast.unparse(call) for call in asked if isinstance(call.args[1], ast.Constant)] == []
