"""Recognises what may be in place of a file: a dangling link, a Git LFS pointer, a server's error page."""

import os
import re

POINTER = "a Git LFS pointer in place of it: run `git lfs pull` where it was cloned"
_WEB_PAGE = re.compile(r"(<!--.*?-->\s*)*<(!doctype html|html|head|body)", re.DOTALL)


def link_to_nothing(path: str | os.PathLike) -> str | None:
    """Message for a dangling link; None for anything else."""
    return f"a link to nothing: {os.readlink(path)}" if os.path.islink(path) and not os.path.exists(path) else None


def is_pointer(head: bytes) -> bool:
    return head.startswith(b"version https://git-lfs")


def is_web_page(text: str) -> bool:
    return _WEB_PAGE.match(text.strip().lower()) is not None


def of_content(head: bytes) -> str | None:
    """Message by a file's first thousand bytes, with what to do; None if the file may be genuine."""
    if is_pointer(head):
        return POINTER
    text = head.decode("utf-8-sig", errors="ignore").lstrip()
    if is_web_page(text):
        return "a web page, saved in its place: download it again"
    if text.lower().startswith(("<?xml", "<error")):
        return "an XML text, as servers send it with an error, saved in its place: download it again"
    return None
