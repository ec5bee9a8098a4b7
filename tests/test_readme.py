"""What the READMEs point at is there."""

import re

import pytest
import tiny

PAGES = sorted(path for path in tiny.REPOSITORY.rglob("README.md") if ".venv" not in path.parts)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(tiny.REPOSITORY)))
def test_relative_links_resolve(page):
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text()):
        if not target.startswith("http"):
            assert (page.parent / target).exists(), f"{page} points at {target}"


def test_annotated_tree_is_the_tree():
    """Every module of the package has its line in the README, and every line its module."""
    text = (tiny.REPOSITORY / "README.md").read_text()
    tree = text[text.index("src/t2i_training/  ") : text.index("text_to_image/           the")]
    named = set(re.findall(r"^  (\w+\.py)", tree, re.MULTILINE))
    modules = {path.name for path in (tiny.REPOSITORY / "src" / "t2i_training").glob("*.py")}
    assert named == modules - {"__init__.py"}
