"""Captions: makes the one of a visit, tokenizes it, and warns of captions that are too long."""

import re
from collections.abc import Callable

import numpy as np
import torch

from .. import sanitize
from ..log import logger
from .dataset import describe

_COUNTED = 20_000  # captions to tokenize for the warning; takes seconds
_WORD = re.compile(r"\w+")


def pick_caption(caption: str | list[str], draw: Callable[[str], np.random.Generator], args) -> str:
    """The caption of this visit: empty with probability --caption_dropout, else one of those there are, with its tags
    shuffled and thinned out, between prefix and suffix.
    """
    if args.caption_dropout and draw("caption_dropout").random() < args.caption_dropout:
        return ""  # arXiv:2207.12598: without such samples fine-tuning erodes classifier-free guidance
    caption = caption if isinstance(caption, str) else caption[draw("caption").integers(len(caption))]
    return _between(_vary_tags(caption, draw, args) if vary(args) else caption, args)


def vary(args) -> bool:
    """Whether a caption is another at each visit, so that its encoding cannot be cached."""
    return args.shuffle_caption or args.caption_tag_dropout_rate > 0


def _vary_tags(caption: str, draw: Callable[[str], np.random.Generator], args) -> str:
    tags = [tag for tag in map(str.strip, caption.split(",")) if tag]
    kept, others = tags[: args.keep_tokens], tags[args.keep_tokens :]
    order = draw("caption_shuffle").permutation(len(others)) if args.shuffle_caption else range(len(others))
    numbers = draw("caption_tag_dropout").random(len(others))  # by a tag's place in the caption, whatever the order
    return ", ".join(kept + [others[i] for i in order if numbers[i] >= args.caption_tag_dropout_rate])


def _between(caption: str, args) -> str:
    return " ".join(part for part in (args.caption_prefix, caption, args.caption_suffix) if part)


def tokenize(tokenizer, caption: str) -> torch.Tensor:
    """(tokens,) int64, padded and cut to the tokenizer's length (77 for CLIP)."""
    options = {"max_length": tokenizer.model_max_length, "padding": "max_length", "truncation": True}
    return tokenizer(caption, **options, return_tensors="pt").input_ids[0]


def tokenize_in_chunks(tokenizer, caption: str, chunks: int) -> torch.Tensor:
    """(chunks, tokens) int64: a caption in pieces of the length that the text encoder reads (75 tokens for CLIP),
    each with a start and an end of its own; the rest is cut off. Pieces after the caption's end are empty captions.
    """
    if chunks == 1:
        return tokenize(tokenizer, caption)[None]
    room = tokenizer.model_max_length - 2
    ids = tokenizer(caption, add_special_tokens=False, truncation=True, max_length=chunks * room).input_ids
    rows = []
    for first in range(0, chunks * room, room):
        row = [tokenizer.bos_token_id, *ids[first : first + room], tokenizer.eos_token_id]
        rows.append(row + [tokenizer.pad_token_id] * (room + 2 - len(row)))
    return torch.tensor(rows)


def report_cuts(tokenizer, dataset, args, accelerator, chunks: int | None = None):
    """Warn, on the main process, how many captions are cut, being longer than `chunks` pieces of the tokenizer's
    maximum length, and how many validation prompts. Returns `tokenizer`.

    A caption with fewer bytes than tokens that are read is short enough, one with more words too long; others are
    tokenized, the longest first, up to _COUNTED.
    """
    limit = tokenizer.model_max_length
    if not accelerator.is_main_process or limit > 1_000_000:
        return tokenizer
    rows = {}
    for row, caption in enumerate(dataset[args.caption_column]):
        for text in [caption] if isinstance(caption, str) else caption:
            rows.setdefault(_between(text, args), row)
    room = (chunks or 1) * (limit - tokenizer.num_special_tokens_to_add())
    sizes = {text: len(text.encode(errors="replace")) for text in rows}
    long = sorted((text for text in rows if sizes[text] > room), key=sizes.get, reverse=True)
    lengths = {text: len(_WORD.findall(text)) for text in long[_COUNTED:]}  # at least
    for first in range(0, min(len(long), _COUNTED), 1000):
        batch = long[first : first + 1000]
        lengths |= {text: len(ids) for text, ids in zip(batch, _token_ids(tokenizer, batch))}
    if cut := [text for text in long if lengths[text] > room]:
        longest = max(cut, key=lengths.get)
        (ids,) = _token_ids(tokenizer, [longest])
        tail = sanitize.printable(tokenizer.decode(ids[:room]))[-40:]
        least = "at least " if len(long) > _COUNTED else ""
        number = f"{least}{len(cut)} of {len(rows)} different captions"
        more = ", or give --max_token_length" if chunks in (1, 2) else ""
        logger.warning(
            f"{number} are longer than the {room} tokens that are read, and the rest is cut off; the longest, of "
            f"{describe(dataset, args.image_column, rows[longest])}, has {lengths[longest]}, and what follows "
            f"'...{tail}' is lost: shorten them{more}"
        )
    prompts = list(dict.fromkeys(args.validation_prompts or ()))
    if long := [text for text, ids in zip(prompts, _token_ids(tokenizer, prompts)) if len(ids) > room]:
        shown = sanitize.printable(long[0])[:80]
        logger.warning(
            f"{len(long)} validation prompts are longer than these {room} tokens and cut off, e.g. '{shown}'"
        )
    return tokenizer


def _token_ids(tokenizer, captions: list[str]) -> list[list[int]]:
    return tokenizer(captions, add_special_tokens=False, verbose=False).input_ids if captions else []


def text_mask(tokenizer, input_ids: torch.Tensor) -> torch.Tensor:
    """(tokens,) bool: True up to and including the first end token, False on the padding after it."""
    ends = (input_ids == tokenizer.eos_token_id).cumsum(0)
    return ends - (input_ids == tokenizer.eos_token_id).long() < 1


def all_captions(dataset, args) -> list[str]:
    """All captions that `pick_caption` may return unless they `vary`, sorted, so that all processes agree."""
    captions = dataset[args.caption_column]
    texts = {text for caption in captions for text in ([caption] if isinstance(caption, str) else caption)}
    return sorted({_between(text, args) for text in texts} | ({""} if args.caption_dropout else set()))
