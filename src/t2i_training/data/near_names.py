"""Suggests the file that was probably meant by a name that does not exist."""

import difflib
import posixpath
import re
import unicodedata
import urllib.parse
from collections import Counter
from collections.abc import Iterable, Iterator


def did_you_mean(missing: Iterable[str], at_hand: Iterable[str]) -> Iterator[str | None]:
    """For each missing relative path the existing file that was probably meant, if any."""
    missing, at_hand, by_key = list(missing), list(at_hand), {}
    if not missing:
        return
    for name in at_hand:
        for key in _keys(name):
            by_key.setdefault(key, []).append(name)
    stems = Counter(_stem(name) for name in at_hand)
    for tried, name in enumerate(missing):
        found = next((by_key[key] for key in _keys(name) if key in by_key), [])
        if not found and tried < 20:  # takes seconds with many files
            found = [other for other in at_hand if _is_typo(_stem(name), _stem(other)) and stems[_stem(other)] == 1]
        yield max(found[:50], key=lambda other: difflib.SequenceMatcher(None, name, other).ratio()) if found else None


def _stem(name: str) -> str:
    return posixpath.splitext(posixpath.basename(name))[0].casefold()


def _keys(name: str) -> list[tuple]:
    """Normalised forms of a name, the most specific first; equal forms probably mean the same file."""
    plain = unicodedata.normalize("NFKC", urllib.parse.unquote(name)).strip().casefold()
    for wrong in ("cp1252", "latin-1", "cp437"):  # UTF-8 decoded with another encoding
        try:
            plain = plain if plain.isascii() else name.encode(wrong).decode("utf-8").casefold()
        except UnicodeError:
            continue
    base, whole = posixpath.basename(plain), posixpath.splitext(plain)[0]
    stem = posixpath.splitext(base)[0]
    loose = re.sub(r"[\W_]+", "", stem)
    numbers = re.sub(r"0+(?=\d)", "", re.sub(r"(?<=\d)[\W_]+(?=\d)", ".", stem))
    keys = [("path", plain), ("base", base), ("path stem", whole), ("stem", stem), ("stem", base)]
    keys += [("loose", loose)] if loose else []
    return [*keys, ("numbers", re.sub(r"[^\w.]|_", "", numbers))] if stem else keys


def _is_typo(name: str, other: str) -> bool:
    """Whether two names differ by one letter too many, too few or two swapped. A replaced letter may be intended."""
    if min(len(name), len(other)) < 5 or re.sub(r"\D", "", name) != re.sub(r"\D", "", other):
        return False
    if len(name) == len(other) and sorted(name) != sorted(other):
        return False
    return abs(len(name) - len(other)) < 2 and difflib.SequenceMatcher(None, name, other).ratio() >= 0.8
