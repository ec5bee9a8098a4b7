"""Errors that end a run, each as one line for the user: what failed, and the way out. Imports no torch."""

from . import sanitize


class RunError(SystemExit):
    """Ends a run with exit status 1 and "error: <message>" on stderr, in --log_file too, and no stack trace."""

    def __init__(self, message: str):
        super().__init__(f"error: {sanitize.printable(message)}")


class Unfit(Exception):
    """Raised with one sentence on why a model cannot be used for a flag."""


def not_finite(name: str, samples: list[str], in_fp16: bool) -> str:
    """The message for a frozen network's output `name` that holds inf or nan for these samples."""
    advice = "the weights of a frozen network may be damaged, or too large"
    if in_fp16:  # up to 65504; the VAEs of some models exceed it within their layers
        advice = "a frozen network overflows in fp16: take --mixed_precision=bf16 or no, or a model with another VAE"
    return f"the frozen networks' {name} is not finite for {', '.join(samples)}: {advice}"
