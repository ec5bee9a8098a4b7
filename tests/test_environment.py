"""environment.sh: the tested releases, with uv or with pip, and a way on where one of them cannot be had."""

import os
import shutil
import subprocess
import sys

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from scripts import REPOSITORY

FILES = ["environment.sh", "setup.py", "constraints.txt", *(path.name for path in REPOSITORY.glob("req*.txt"))]
# As PYTHON: its environments come without pip, which takes seconds to be copied.
PYTHON = f"""#!/bin/bash
[ "$1 $2" != "-m venv" ] || set -- -m venv --without-pip "${{@:3}}"
exec {sys.executable} "$@"
"""
# As uv: it writes down what it is asked for, and can serve no constraint whose release is 99.
UV = """#!/bin/bash
echo "$UV_NATIVE_TLS $UV_DEFAULT_INDEX $*" >> asked
[[ "$*" != *constraints.txt* ]] || ! grep -q ==99 constraints.txt
"""


@pytest.fixture
def source(tmp_path):
    """source(**environment): (what uv was asked for, what was said) when it is sourced in a copy of the project."""
    for name in FILES:
        shutil.copy(REPOSITORY / name, tmp_path)
    for name, text in (("python", PYTHON), ("uv", UV)):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)

    def run(**environment):
        environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "PYTHON": str(tmp_path / "python")} | environment
        (tmp_path / "asked").write_text("")
        command = ["bash", "-c", "set -euo pipefail; source ./environment.sh"]
        done = subprocess.run(command, cwd=tmp_path, env=os.environ | environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return (tmp_path / "asked").read_text().splitlines(), done.stdout

    return run


def requirements() -> list[Requirement]:
    lines = [line for path in REPOSITORY.glob("req*.txt") for line in path.read_text().splitlines()]
    return [Requirement(line) for line in lines if line and line[0] not in "#-"]


def test_every_requirement_has_its_tested_release():
    lines = (REPOSITORY / "constraints.txt").read_text().splitlines()
    pins = dict(line.split("==") for line in lines)
    pins = {canonicalize_name(name): version for name, version in pins.items()}
    assert len(requirements()) > 20
    for requirement in requirements():
        assert pins[canonicalize_name(requirement.name)] in requirement.specifier, requirement


def test_nothing_is_installed_twice_but_for_another_wish(source, tmp_path):
    (asked,), said = source(PIP_INDEX_URL="https://mirror.example/simple")
    assert asked.startswith("1 https://mirror.example/simple pip install --quiet --compile-bytecode ")
    assert asked.endswith(" --python .venv/bin/python -r requirements_test.txt -e . -c constraints.txt")
    assert said.startswith("installing into .venv (")
    assert source() == ([], "")
    (asked,), _ = source(T2I_NEWEST="1")
    assert asked.endswith(" -e .")
    (tmp_path / "constraints.txt").write_text("torch==2.14.1\n")
    assert len(source(T2I_NEWEST="1")[0]) == 1, "they are of what it is made of"


def test_a_release_that_cannot_be_had_is_no_dead_end(source, tmp_path):
    (tmp_path / "constraints.txt").write_text("torch==99.0\n")
    asked, said = source()
    assert [line.endswith("constraints.txt") for line in asked] == [True, False]
    assert said.endswith(
        "the releases of constraints.txt could not be installed: trying what requirements.txt allows\n"
    )
    assert source() == ([], ""), "and it is a whole environment"
