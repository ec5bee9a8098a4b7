"""Prints every message that a user can meet, with its place in the code: errors, warnings, notes in the log.

    python tests/messages.py [errors|warnings|notes]

Names in braces stand for values. Read the list as a whole after adding messages: does each name the thing and its
place, and say what to do?
"""

import ast
import sys

from scripts import REPOSITORY, SCRIPTS

KINDS = {
    "errors": {"error", "RunError", "Unfit", "BadData", "BadSample", "UnreadableImage", "ArgumentTypeError", "refusal"},
    "warnings": {"warning", "warn"},
    "notes": {"info"},
}


def text_of(node) -> str:
    """An expression as text: f-strings without quotes, both branches of a condition."""
    if isinstance(node, ast.Constant):
        return str(node.value)
    if isinstance(node, ast.JoinedStr):
        return "".join(text_of(part) for part in node.values)
    if isinstance(node, ast.FormattedValue):
        return f"{{{ast.unparse(node.value)}}}"
    if isinstance(node, ast.IfExp):
        return f"[{text_of(node.body)} | {text_of(node.orelse)}]"
    if isinstance(node, ast.BinOp):
        return text_of(node.left) + text_of(node.right)
    return f"{{{ast.unparse(node)}}}"


def messages(kind: str):
    """(place, text) of each call that shows a user its first argument."""
    for path in [*sorted((REPOSITORY / "src").rglob("*.py")), *(script.path for script in SCRIPTS.values())]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and node.args:
                name = getattr(node.func, "attr", getattr(node.func, "id", ""))
                if name in KINDS[kind] and (text := text_of(node.args[0])).strip("{}[]| ") != ast.unparse(node.args[0]):
                    yield f"{path.relative_to(REPOSITORY)}:{node.lineno}", text


if __name__ == "__main__":
    for kind in sys.argv[1:] or KINDS:
        print(f"# {kind}")
        for place, text in messages(kind):
            print(f"{place}: {text}")
