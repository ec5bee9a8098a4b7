"""What the READMEs point at is there."""

import re

import pytest
from scripts import REPOSITORY

ROOT = REPOSITORY
PAGES = sorted(p for p in ROOT.rglob("README.md") if not any(part[0] == "." for part in p.relative_to(ROOT).parts))


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
    """Every room and module of the package has its line in the README, and every line its room or module."""
    text = (REPOSITORY / "README.md").read_text()
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
