"""Prints every message that a user can meet, with its place in the code: errors, warnings, notes in the log.

    python tests/messages.py [errors|warnings|notes|parts]

Parts are all other texts of several words: clauses that messages are made of, help texts, the model card.
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
FILES = [*sorted((REPOSITORY / "src").rglob("*.py")), *(script.path for script in SCRIPTS.values())]


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


def shown(tree, names: set[str]) -> list[ast.Call]:
    """The calls of functions of these names."""
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call) and node.args]
    return [call for call in calls if getattr(call.func, "attr", getattr(call.func, "id", "")) in names]


def messages(kind: str):
    """(place, text) of each call that shows a user its first argument."""
    for path in FILES:
        for call in shown(ast.parse(path.read_text()), KINDS[kind]):
            if (text := text_of(call.args[0])) != f"{{{ast.unparse(call.args[0])}}}":  # made elsewhere: among the parts
                yield f"{path.relative_to(REPOSITORY)}:{call.lineno}", text


def parts():
    """(place, text) of each text of three words or more that is neither a docstring nor within the messages above."""
    for path in FILES:
        tree = ast.parse(path.read_text())
        seen = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
        seen |= {id(inner) for call in shown(tree, set().union(*KINDS.values())) for inner in ast.walk(call)}
        for node in ast.walk(tree):
            if id(node) in seen or not isinstance(node, ast.JoinedStr | ast.Constant):
                continue
            seen |= {id(inner) for inner in ast.walk(node)}
            if len((text := text_of(node)).split()) > 2:
                yield f"{path.relative_to(REPOSITORY)}:{node.lineno}", text


if __name__ == "__main__":
    for kind in sys.argv[1:] or [*KINDS, "parts"]:
        print(f"# {kind}")
        for place, text in parts() if kind == "parts" else messages(kind):
            print(f"{place}: {text}")
