"""The vocabulary of OpenAI's CLIP, which every Stable Diffusion reads captions with; single files do not contain it.

merges.txt.gz holds the 48,894 byte-pair merges that CLIP uses, in their order (under the MIT licence beside it); the
49,408 entries of the vocabulary follow from them (arXiv:2103.00020, section 2.4; arXiv:1508.07909).
"""

import functools
import gzip
from pathlib import Path

ENDS = ("<|startoftext|>", "<|endoftext|>")


@functools.cache
def merges() -> tuple[str, ...]:
    """The merges as merges.txt has them, e.g. "i n"."""
    return tuple(gzip.decompress(Path(__file__).with_name("merges.txt.gz").read_bytes()).decode().splitlines())


@functools.cache
def vocabulary() -> dict[str, int]:
    """Token -> id: the 256 bytes within a word and at its end, the merged ones, and start and end of a text."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]  # stand for themselves; other bytes for 256 + i
    symbols = [chr(byte) for byte in printable] + [chr(256 + i) for i in range(256 - len(printable))]
    tokens = [
        *symbols,
        *(f"{symbol}</w>" for symbol in symbols),
        *(merge.replace(" ", "") for merge in merges()),
        *ENDS,
    ]
    return {token: i for i, token in enumerate(tokens)}
