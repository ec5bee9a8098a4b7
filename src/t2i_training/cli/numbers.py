"""Types of flags for argparse: numbers within their range, and shapes, refused in words."""

import argparse
import math
import re
from collections.abc import Callable


def _number(kind: type, fault: Callable[[int | float], str]) -> Callable[[str], int | float]:
    """An argparse type: numbers of a `kind`. `fault(n)` says what a number must be, or returns "" if it is valid."""

    def parse(text: str):
        value = kind(text)
        if wanted := fault(value):
            raise argparse.ArgumentTypeError(f"must be {wanted}")
        return value

    parse.kind, parse.__name__ = kind, kind.__name__  # argparse then says: invalid int value
    return parse


def positive(kind: type) -> Callable:
    return _number(kind, lambda n: "" if n > 0 else f"positive, not {n}")


def not_negative(kind: type) -> Callable:
    return _number(kind, lambda n: "" if 0 <= n < math.inf else f"finite and not negative, not {n}")


def _seed_fault(n: int) -> str:
    return "below 2**63" if n >= 2**63 else "" if n >= 0 else f"finite and not negative, not {n}"


def _side_fault(n: int) -> str:
    """A side in pixels; VAEs and UNets halve it three times."""
    if n <= 0:
        return f"positive, not {n}"
    return f"a multiple of 8, not {n}; the nearest is {max(8, round(n / 8) * 8)}" if n % 8 else ""


def _length_fault(n: int) -> str:
    """A caption's length in tokens; CLIP reads 75 at a time."""
    return "" if n in (75, 150, 225) else f"75, 150 or 225, not {n}"


share = _number(float, lambda n: "" if 0 <= n < 1 else f"at least 0 and below 1, not {n}")
seed, multiple_of_8 = _number(int, _seed_fault), _number(int, _side_fault)
token_length = _number(int, _length_fault)


def bucket_shapes(text: str) -> str:
    """Shapes in the form "height,width;height,width"; the text without spaces."""
    pairs = "".join(text.split()).strip(";").split(";")
    for pair in pairs:
        if not re.fullmatch(r"\d+,\d+", pair):
            raise argparse.ArgumentTypeError(f'must be "height,width;height,width", not {text!r}')
        for side in map(int, pair.split(",")):
            if fault := _side_fault(side):
                raise argparse.ArgumentTypeError(f"{pair}: a side must be {fault}")
    if twice := next((pair for pair in pairs if pairs.count(pair) > 1), None):
        raise argparse.ArgumentTypeError(f"names {twice} twice")
    return ";".join(pairs)


bucket_shapes.kind = str
