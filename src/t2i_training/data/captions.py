"""Captions: chooses one per visit, tokenizes it, and warns of captions that are too long."""

import re
from collections import Counter
from collections.abc import Callable

import numpy as np
import torch

from .. import sanitize
from ..log import logger
from .dataset import describe

_COUNTED = 20_000  # captions to tokenize for the warning; takes seconds
_WORD = re.compile(r"\w+")


def pick_caption(caption: str | list[str], draw: Callable[[str], np.random.Generator], dropout: float) -> str:
    """The caption of this visit: a random one if there are several, and an empty one with probability `dropout`."""
    if dropout and draw("caption_dropout").random() < dropout:
        return ""  # arXiv:2207.12598: without such samples fine-tuning erodes classifier-free guidance
    return caption if isinstance(caption, str) else caption[draw("caption").integers(len(caption))]


def tokenize(tokenizer, caption: str) -> torch.Tensor:
    """(tokens,) int64, padded and cut to the tokenizer's length (77 for CLIP)."""
    options = {"max_length": tokenizer.model_max_length, "padding": "max_length", "truncation": True}
    return tokenizer(caption, **options, return_tensors="pt").input_ids[0]


def report_cuts(tokenizer, dataset, args, accelerator):
    """Warn, on the main process, how many captions are longer than the tokenizer's maximum. Returns `tokenizer`.

    A caption with fewer bytes than the maximum is short enough, one with more words too long; others are tokenized, up
    to _COUNTED.
    """
    limit = tokenizer.model_max_length
    if not accelerator.is_main_process or limit > 1_000_000:
        return tokenizer
    counts, rows = Counter(), {}
    for row, caption in enumerate(dataset[args.caption_column]):
        for text in [caption] if isinstance(caption, str) else caption:
            counts[text] += 1
            rows.setdefault(text, row)
    room = limit - tokenizer.num_special_tokens_to_add()
    long = [text for text in counts if len(text.encode(errors="replace")) > room]
    cut = [text for text in long if len(_WORD.findall(text)) > room]
    known = set(cut)
    unsure = [text for text in long if text not in known]
    for first in range(0, min(len(unsure), _COUNTED), 1000):
        batch = unsure[first : first + 1000]
        cut += [text for text, ids in zip(batch, _token_ids(tokenizer, batch)) if len(ids) > limit]
    if cut:
        first = min(cut, key=rows.get)
        (ids,) = _token_ids(tokenizer, [first[: 20 * limit]])
        tail = sanitize.printable(tokenizer.decode(ids[: limit - 1], skip_special_tokens=True))[-40:]
        least = "at least " if len(unsure) > _COUNTED else ""
        number = f"{least}{sum(counts[text] for text in cut)} of {counts.total()} captions"
        logger.warning(
            f"{number} are longer than the {limit} tokens that the text encoder reads; the rest is cut off, "
            f"e.g. of {describe(dataset, args.image_column, rows[first])} what follows '...{tail}'"
        )
    return tokenizer


def _token_ids(tokenizer, captions: list[str]) -> list[list[int]]:
    return tokenizer(captions, verbose=False).input_ids


def text_mask(tokenizer, input_ids: torch.Tensor) -> torch.Tensor:
    """(tokens,) bool: True up to and including the first end token, False on the padding after it."""
    ends = (input_ids == tokenizer.eos_token_id).cumsum(0)
    return ends - (input_ids == tokenizer.eos_token_id).long() < 1


def all_captions(dataset, args) -> list[str]:
    """All captions that `pick_caption` may return, sorted, so that all processes agree."""
    captions = dataset[args.caption_column]
    texts = {text for caption in captions for text in ([caption] if isinstance(caption, str) else caption)}
    return sorted(texts | ({""} if args.caption_dropout else set()))
