"""What is wrong with a data folder, judging by the names of its files, and what to do. Imports no torch."""

import difflib
import json
import os
import posixpath
import re
import shlex

from . import data_files
from .data_files import CAPTIONS, IMAGES, METADATA, STORED, Listing

_EVERYDREAM = {  # file -> what does the same here
    "multiply.txt": "name the folder 3_NAME for 3 repeats, give --repeats_from_folders",
    "flip_p.txt": "give --random_flip",
    "cond_dropout.txt": "give --caption_dropout",
    "local.yaml": "write its tags into the captions, or give --caption_suffix",
    "global.yaml": "write its tags into the captions, or give --caption_suffix",
}
_NAME = re.compile(r"^[0-9-]*-|_.*|\.\w+$")  # what is no caption in a file's name: numbers, and what follows a _
_LINE = '{"file_name": "0001.jpg", "text": "a red fox"}'


def refusal(root: str, args) -> str | None:
    """What is wrong with a data folder, judging by file names, and what to do; None if it may be valid.

    Captions are asked for where --caption_column has a value.
    """
    of_a_table = "is read as a data set, not as images and caption files: leave --caption_extension out"
    if any(os.path.isfile(os.path.join(root, name)) for name in STORED) or data_files.declares_configs(root):
        return of_a_table if args.caption_extension else None
    listing = data_files.list_files(root)
    if not listing.metadata() and not listing.images() and listing.zips:
        try:
            data_files.add_zips(listing)
        except data_files.BadData as error:
            return f"cannot be read: {error}"
    for name in METADATA:
        if os.path.isdir(os.path.join(root, name)):
            return f"cannot be read: {name} is a folder"
    if found := listing.metadata():
        if args.caption_extension:
            return f"holds {found[0]}, which is read: leave --caption_extension out, or move that file away"
        training, others = data_files.training_files(found)
        return None if training else _only_other_splits(root, others)
    if data_files.is_table(listing):
        return of_a_table if args.caption_extension else None
    images, captions = listing.images(), args.caption_column is not None
    if fault := _everydream(listing, images):
        return fault
    if images and not captions:
        return None
    if not listing.files:
        return "is empty"
    if not images and (not captions or data_files.archives(listing) or not _near_miss(listing)):
        return f"holds no images{data_files.archives(listing)}"
    return _lack_of_captions(listing, images, args)


def _only_other_splits(root: str, names: list[str]) -> str:
    splits = ", ".join(sorted({data_files.split_of(name) for name in names}))
    folder = os.path.join(root, posixpath.dirname(names[0]))
    return f"has no split named train, only: {splits}; to train on one of them, name its folder, e.g. {folder}"


def _everydream(listing: Listing, images: list[str]) -> str | None:
    """A file that tells EveryDream what to do with the images of a folder, and what does the same here."""
    stems = {posixpath.splitext(name)[0] for name in images}
    for name in listing.files if images else ():
        stem, base = posixpath.splitext(name)[0], posixpath.basename(name).lower()
        if base in _EVERYDREAM and stem not in stems:
            return f"holds EveryDream's {name}, which is not read: {_EVERYDREAM[base]}, and remove the file"
    return None


def _lack_of_captions(listing: Listing, images: list[str], args) -> str | None:
    """What to do about images without captions; None if there are any captions."""
    suffix, beside = data_files.caption_files(listing, args.caption_extension)
    named = next((folder for image in images if (folder := data_files.repeated_folder(image))), None)
    if beside or (named and args.repeats_from_folders):
        return None
    if args.caption_extension:
        others = {posixpath.splitext(name)[1] for name in data_files.caption_files(listing)[1].values()}
        there = f"; there are {', '.join(others)}: leave --caption_extension out" if others else ""
        return f"holds no {suffix} beside its images{there}"
    if elsewhere := _captions_elsewhere(listing, images):
        return elsewhere
    if meant := _near_miss(listing):
        return f"holds no metadata.jsonl, with a line for each image such as {_LINE}{meant}"
    advice = _names_as_captions(listing, images)
    if named:
        advice = f"; its folders' names, such as {named[1]}, are captions with --repeats_from_folders"
    return (
        "holds no captions: write each into a file beside its image, e.g. 0001.txt for 0001.jpg, or all into a "
        f"metadata.jsonl, with a line for each image such as {_LINE}{advice}"
    )


def _captions_elsewhere(listing: Listing, images: list[str]) -> str | None:
    """Captions that are not where they are looked for, or not in a file that is read."""
    stems = {posixpath.splitext(name)[0] for name in images}
    bases = {posixpath.basename(stem) for stem in stems}
    for suffix in (*CAPTIONS, ".yaml", ".yml", ".json"):
        texts = [name for name in listing.having((suffix,)) if posixpath.splitext(posixpath.basename(name))[0] in bases]
        if not texts or len(texts) * 2 < len(images):
            continue
        found = f"has captions in {suffix} files such as {texts[0]}"
        if suffix in CAPTIONS:
            return f"{found}, but not beside its images: move each into the folder of its image"
        return f"{found}, which are not read: write each caption into a .txt file in its place"
    return None


def _names_as_captions(listing: Listing, images: list[str]) -> str:
    """A command, where most file names hold several words, as EveryDream and AUTOMATIC1111 have them."""
    if sum(" " in _NAME.sub("", posixpath.basename(name)) for name in images) * 2 < len(images) or listing.zips:
        return ""
    kinds = json.dumps(sorted({posixpath.splitext(name)[1] for name in images}))
    program = (
        'import pathlib, re; [path.with_suffix(".txt").write_text(re.sub("^[0-9-]*-", "", path.stem)'
        f'.partition("_")[0], "utf-8") for path in pathlib.Path().rglob("*") if path.suffix in {kinds}]'
    )
    return f"; this makes captions of its file names: {_command(listing, program)}"


def _command(listing: Listing, program: str) -> str:
    return f"cd {shlex.quote(listing.root)} && python -c {shlex.quote(program)}"


def _near_miss(listing: Listing) -> str:
    """A file that was probably meant as metadata, and what to do with it; "" if there is none."""
    names = sorted(listing.files, key=lambda name: (name.count("/"), name))
    for name in names:
        base = posixpath.basename(name).lower()
        alike = re.match(r"_?meta[-_ ]?data", base) or difflib.get_close_matches(base, METADATA, 1, 0.8)
        if alike and not base.endswith((*IMAGES, ".md", ".py")):
            return f"; {name} {_what_to_do(name, base, listing)}"
    suffixes = (".jsonl", ".ndjson", ".csv", ".tsv", ".json", ".parquet", ".xlsx", ".xls", ".ods")
    other = next((name for name in names if name.lower().endswith(suffixes)), None)
    if other is None:
        return ""
    if re.match(rb'\{\s*"[^"]+":\s*\{', _start(listing.files[other])):  # as kohya's meta_cap.json
        program = (
            'import json; open("metadata.jsonl", "w").writelines(json.dumps({"file_name": name, "text": '
            '", ".join(filter(None, [entry.get("caption"), entry.get("tags")]))}) + "\\n" for name, entry in '
            f"json.load(open({json.dumps(other)})).items())"
        )
        return f"; if {other} lists the images, this makes a metadata.jsonl of it: {_command(listing, program)}"
    return f"; if {other} lists the images, it {_what_to_do(other, other.lower(), listing)}"


def _what_to_do(name: str, base: str, listing: Listing) -> str:
    if base.endswith((".xlsx", ".xls", ".ods")):
        return "must be saved as metadata.csv (CSV UTF-8)"
    if base.endswith((".gz", ".zip", ".bz2", ".xz")):
        return "must be unpacked"
    if "csv" in base or "tsv" in base:
        return "must be named metadata.csv"
    if "parquet" in base:
        return "must be named metadata.parquet"
    start = _start(listing.files[name])
    if start.startswith(b"[") or (start.startswith(b"{") and b"}" not in start.partition(b"\n")[0]):
        return "must become metadata.jsonl, with each entry as one line, {...}, without a list around them"
    return "must be named metadata.jsonl"


def _start(path: str) -> bytes:
    try:
        with open(path, "rb") as file:
            return file.read(1000).removeprefix(b"\xef\xbb\xbf").lstrip()
    except OSError:
        return b""
