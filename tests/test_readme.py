"""What the pages point at is there."""

import ast
import re

import pytest
from scripts import REPOSITORY

PAGES = sorted(
    page
    for page in [*REPOSITORY.rglob("README.md"), *REPOSITORY.glob("docs/*.md"), REPOSITORY / "CONTRIBUTING.md"]
    if not any(part[0] == "." for part in page.relative_to(REPOSITORY).parts)
)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(REPOSITORY)))
def test_relative_links_resolve(page):
    """And so do the sections that they name, by GitHub's rule: lower case, hyphens for spaces, no punctuation."""
    for target, section in re.findall(r"\]\(([^)#]*)#?([^)]*)\)", page.read_text()):
        if not target.startswith("http"):
            file = page.parent / target if target else page
            assert file.exists(), f"{page} points at {target}"
            if section:
                titles = re.findall(r"^#+ (.*)", file.read_text(), re.MULTILINE)
                names = {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}
                assert section in names, f"{page} points at {target}#{section}"


def test_annotated_tree_is_the_tree():
    """Every room and module of the package has its line in the tree, and every line its room or module."""
    text = (REPOSITORY / "docs" / "architecture.md").read_text()
    tree = text[text.index("src/t2i_training/  ") : text.index("text_to_image/           the")]
    named, room = set(), ""
    for indent, name in re.findall(r"^( +)(\w+(?:\.py|/)) ", tree, re.MULTILINE):
        room = room if len(indent) == 4 else ""
        named.add(room + name)
        room = name if len(indent) == 2 and name.endswith("/") else room
    package = REPOSITORY / "src" / "t2i_training"
    modules = {path.relative_to(package).as_posix() for path in package.rglob("*.py") if path.name != "__init__.py"}
    modules = {path for path in modules if not path.startswith("sd_flax/networks/")}
    rooms = {
        path.relative_to(package).as_posix() + "/" for path in package.rglob("*/") if (path / "__init__.py").exists()
    }
    assert named == modules | rooms - {"./"}


def names_in(path) -> set[str]:
    """Functions, classes and methods: "find_checkpoint", "CheckpointManager.save"."""
    found = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            inner = node.body if isinstance(node, ast.ClassDef) else []
            found |= {node.name, *(f"{node.name}.{x.name}" for x in inner if isinstance(x, ast.FunctionDef))}
    return found


def test_functions_that_the_architecture_names_exist():
    package, script = REPOSITORY / "src" / "t2i_training", REPOSITORY / "text_to_image" / "train_text_to_image.py"
    text = (REPOSITORY / "docs" / "architecture.md").read_text()
    named = re.findall(r"`((?:\w+/)*\w+)\.((?:[A-Z]\w+\.)?\w+)`", text)
    named = [(module, name) for module, name in named if name != "py" and module != "datasets"]
    assert len(named) > 40
    for module, name in named:
        assert name in names_in(package / f"{module}.py"), f"{module}.{name}"
    assert {"main", "encode", "make_sample", "compute_loss", "read_image", "encode_captions"} <= names_in(script)
