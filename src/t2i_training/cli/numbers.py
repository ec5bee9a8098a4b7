"""Types of flags for argparse: numbers within their range, refused in words."""

import argparse
import math
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
