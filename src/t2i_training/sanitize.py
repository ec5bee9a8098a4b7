"""Makes foreign texts (file names, captions, errors of libraries) safe for the terminal, logs and the model card."""

import os
import re


def printable(text: str) -> str:
    """`text` on one line, control characters and line breaks as escapes (\\x1b), so that it cannot forge a log line."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)


def redact(text: str, *tokens: str | None) -> str:
    """Replace `tokens`, and the token of the environment or the stored login, in `text`: a server may repeat them."""
    from huggingface_hub import get_token

    for token in (*tokens, get_token()):
        if token:
            text = text.replace(token, "***")
    return text


def reason(error: BaseException | str, *tokens: str | None) -> str:
    """What an error says, as one line for the user."""
    return printable(redact(" ".join(str(error).split()), *tokens))


def is_hub_name(name: str) -> bool:
    """Whether `name` can be a repository on the hub, and is no folder here."""
    return bool(re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", name)) and not os.path.exists(name)
