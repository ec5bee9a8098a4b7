"""What lies in a file's place: a link to nothing, a Git LFS pointer, what a server sent with an error."""

import os
import re

POINTER = "a Git LFS pointer in place of it: run `git lfs pull` where it was cloned"
_WEB_PAGE = re.compile(r"(<!--.*?-->\s*)*<(!doctype html|html|head|body)", re.DOTALL)


def link_to_nothing(path: str | os.PathLike) -> str | None:
    """What is wrong with a link whose target is not there; None of anything else."""
    return f"a link to nothing: {os.readlink(path)}" if os.path.islink(path) and not os.path.exists(path) else None


def is_pointer(head: bytes) -> bool:
    return head.startswith(b"version https://git-lfs")


def is_web_page(text: str) -> bool:
    return _WEB_PAGE.match(text.strip().lower()) is not None


def of_content(head: bytes) -> str | None:
    """By a file's first thousand bytes, and with the way out; None if it may be what it should be."""
    if is_pointer(head):
        return POINTER
    text = head.decode("utf-8-sig", errors="ignore").lstrip()
    if is_web_page(text):
        return "a web page, saved in its place: download it again"
    if text.lower().startswith(("<?xml", "<error")):
        return "an XML text, as servers send it with an error, saved in its place: download it again"
    return None
