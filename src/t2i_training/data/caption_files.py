"""Reads captions from files beside the images: 0001.txt for 0001.jpg, one caption a line."""

import posixpath
import re
from concurrent.futures import ThreadPoolExecutor
from functools import partial

from .. import sanitize
from ..log import logger
from ..sources import data_files
from . import images, near_names, text_files

_SHOWN = 5  # names in a message
_AT_ONCE = 16  # files that are read at once: on a network each takes milliseconds

Captions = dict[str, tuple[dict, str | None, str | None]]


def read(listing, names: list[str], args) -> tuple[Captions, str, list[str]]:
    """({image: (values by column, its caption file, why it cannot be used)}, what was read, the caption files).

    A file of several lines holds several captions. An image without a file cannot be used, except that with
    --repeats_from_folders the name of a folder such as `10_zwx dog` is the caption, as for kohya's scripts.
    """
    suffix, beside = data_files.caption_files(listing, args.caption_extension)
    folders = {image: data_files.repeated_folder(image) for image in names} if args.repeats_from_folders else {}
    everything, used = listing.having((suffix.lower(),)), set(beside.values())
    spare = [name for name in everything if name not in used]
    captions = _missing([image for image in names if not (beside.get(image) or folders.get(image))], suffix, spare)
    with_file = [image for image in names if image in beside]
    # The decoder's script has none of these flags.
    empty = any(vars(args).get(flag) for flag in ("caption_dropout", "caption_prefix", "caption_suffix"))
    read_file = partial(_read_file, listing, empty=empty)
    with ThreadPoolExecutor(_AT_ONCE) as threads:
        contents = dict(zip(with_file, threads.map(read_file, map(beside.get, with_file)), strict=True))
    blank, several, named = [], 0, 0
    for image in names:
        if image in contents:
            lines, fault = contents[image]
            blank += [beside[image]] if lines == [""] else []
            several += len(lines) > 1
            text = None if fault else lines if len(lines) > 1 else lines[0]
            captions[image] = {args.caption_column: text}, beside[image], fault
        elif image not in captions:
            named += 1
            captions[image] = {args.caption_column: folders[image][1].partition("_")[2]}, None, None
    _warn_of(spare, "has no image of its name, and is left out", "have no image of their names, and are left out")
    _warn_of(blank, "is empty", "are empty")
    said = f"of images and {suffix} files beside them" if beside else "of images"
    if named:
        said += f"; {named} without a caption file have the name of their folder as caption"
    if several:
        said += f"; {several} of them with several captions, one a line, of which each visit draws one"
    return captions, said, everything


def _missing(names: list[str], suffix: str, spare: list[str]) -> Captions:
    wanted, captions = [posixpath.splitext(image)[0] + suffix for image in names], {}
    for image, name, meant in zip(names, wanted, near_names.did_you_mean(wanted, spare), strict=True):
        advice = f"; did you mean {meant}?" if meant else ""
        fault = f"it has no caption: there is no {posixpath.basename(name)} beside it{advice}"
        captions[image] = {}, None, sanitize.printable(fault)[:900]
    return captions


def _read_file(listing, name: str, empty: bool) -> tuple[list[str], str | None]:
    """(captions, None) or ([], why the file cannot be used). An `empty` one is one empty caption, if allowed."""
    base = sanitize.printable(posixpath.basename(name))[:200]
    try:
        text = text_files.decode(text_files.without_mark(text_files.read(listing.files[name], base), base), base)
    except data_files.BadData as fault:
        if images.is_system_fault(fault.__cause__):  # which is not the file's
            raise
        return [], str(fault)
    if "\0" in text:
        return [], f"{base} holds a null character: write it again as text"
    lines = [line.strip() for line in re.split("\r\n|\r|\n", text) if line.strip()]
    if not lines and not empty:
        return [], f"{base} is empty: with --caption_dropout such images are trained with the empty caption"
    return lines or [""], None


def _warn_of(names: list[str], one: str, several: str) -> None:
    if names:
        shown = ", ".join(names[:_SHOWN]) + (", ..." if len(names) > _SHOWN else "")
        what = f"1 caption file {one}" if len(names) == 1 else f"{len(names)} caption files {several}"
        logger.warning(f"{what}: {sanitize.printable(shown)}")
