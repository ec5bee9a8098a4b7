"""Lists the files of a data folder: images, metadata, splits. Imports no torch.

A zip counts as if it were unpacked in place; a member has a path such as zip://0001.png::/data/images.zip, as in fsspec
and `datasets`.
"""

import difflib
import functools
import os
import posixpath
import re
import shlex
import stat
import unicodedata
import zipfile
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

METADATA = ("metadata.jsonl", "metadata.csv", "metadata.parquet")
STORED = ("state.json", "dataset_dict.json")  # written by `save_to_disk`
IMAGES = (
    ".avif", ".bmp", ".gif", ".heic", ".heif", ".jfif", ".jp2", ".jpe", ".jpeg", ".jpg", ".jxl", ".png", ".ppm",
    ".psd", ".svg", ".tga", ".tif", ".tiff", ".webp",
)  # fmt: skip
_TABLES = (  # read by `datasets`, as tables or archives
    ".arrow", ".csv", ".json", ".jsonl", ".parquet", ".tsv",
    ".tar", ".gz", ".tgz", ".bz2", ".xz", ".zst", ".7z", ".rar",
)  # fmt: skip
_ARCHIVES = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst", ".7z", ".rar", ".001")  # are not read
_CAPTIONS = (".txt", ".caption")
_SPLITS = {  # name of a folder -> its split, as in `datasets`
    "train": "train", "training": "train", "test": "test", "testing": "test", "eval": "test", "evaluation": "test",
    "validation": "validation", "valid": "validation", "val": "validation", "dev": "validation",
}  # fmt: skip
_LINE = '{"file_name": "0001.jpg", "text": "a red fox"}'


def local_folder(args) -> str | None:
    """The local data folder, if there is one and no --dataset_config_name is given."""
    if args.dataset_name is None:
        return args.train_data_dir
    place = os.path.join(args.dataset_name, args.train_data_dir) if args.train_data_dir else args.dataset_name
    return place if os.path.isdir(place) and not args.dataset_config_name else None


class BadData(ValueError):
    """Data that cannot be read at all; the message is one line for the user, with the way out."""


@dataclass
class Listing:
    """The files below a folder: {path relative to it, in Unicode's form NFC: path to open}."""

    root: str
    files: dict[str, str] = field(default_factory=dict)
    zips: list[str] = field(default_factory=list)  # zips on the disk; `list_files` does not open them

    def having(self, suffixes: tuple[str, ...]) -> list[str]:
        return [name for name in self.files if name.lower().endswith(suffixes)]

    def metadata(self) -> list[str]:
        return [name for name in self.files if posixpath.basename(name) in METADATA]


def list_files(root: str) -> Listing:
    """All files below, in a fixed order. Follows links, skips hidden files."""
    listing = Listing(os.path.abspath(root))
    above = {listing.root: frozenset()}  # folder -> the resolved folders above it
    for place, folders, names in os.walk(listing.root, followlinks=True):
        real, outer = os.path.realpath(place), above.pop(place)
        if real in outer:  # a link to a folder above
            folders[:] = []
            continue
        folders[:] = sorted(name for name in folders if not name.startswith((".", "__")))
        above |= dict.fromkeys((os.path.join(place, name) for name in folders), outer | {real})
        for path in (os.path.join(place, name) for name in sorted(names) if not name.startswith(".")):
            listing.files.setdefault(relative(path, listing.root), path)
            if path.lower().endswith(".zip"):
                listing.zips.append(path)
    return listing


def relative(path: str, root: str) -> str:
    """An absolute path below `root` as a key of `Listing.files`, in NFC: macOS stores é as e and an accent."""
    name = path[len(root.rstrip(os.sep)) + 1 :]
    return name if name.isascii() else unicodedata.normalize("NFC", name)


def add_zips(listing: Listing) -> None:
    """Add the members of all zips; a file on the disk wins over a member of the same name. Raises BadData.

    If several zips in one folder have their own metadata, each counts as a folder with the zip's name.
    """
    contents = {path: _members(path, listing.root) for path in listing.zips}
    own = Counter(os.path.dirname(path) for path, shown in contents.items() if _has_metadata(shown))
    holders = {}
    for path, shown in contents.items():
        several = own[os.path.dirname(path)] > 1 and _has_metadata(shown)
        folder = path if several else os.path.dirname(path)
        for name, filename in shown:
            target = os.path.normpath(os.path.join(folder, name.replace("\\", "/")))
            if any(part.startswith((".", "__")) for part in name.split("/")) or not target.startswith(folder + os.sep):
                continue
            key = relative(target, listing.root)
            kept = listing.files.setdefault(key, f"zip://{filename}::{path}")
            if kept.startswith("zip://") and (other := holders.setdefault(key, path)) != path:
                zips = " and ".join(relative(each, listing.root) for each in (other, path))
                raise BadData(f"{zips} both hold {key}: unpack them into folders of their own")


def _members(path: str, root: str) -> list[tuple[str, str]]:
    """(intended name, name in the zip) of each file in it."""
    try:
        with zipfile.ZipFile(path) as archive:
            members = [member for member in archive.infolist() if not member.is_dir()]
    except (OSError, zipfile.BadZipFile, NotImplementedError, ValueError) as error:
        raise BadData(f"{relative(path, root)} cannot be read as a zip: {error}") from None
    if any(member.flag_bits & 1 for member in members):
        raise BadData(f"{relative(path, root)} is encrypted: unpack it")
    return [(name, member.filename) for member in members for name in _names(member)]


def _has_metadata(shown: list[tuple[str, str]]) -> bool:
    return any(posixpath.basename(name) in METADATA for name, _ in shown)


def _names(member: zipfile.ZipInfo) -> list[str]:
    """A member's name. Some tools write UTF-8 without marking it: then the decoded name comes first."""
    if not member.filename.isascii() and not member.flag_bits & 0x800:
        try:
            return [member.filename.encode("cp437").decode("utf-8"), member.filename]
        except UnicodeError:
            pass
    return [member.filename]


def split_of(name: str) -> str | None:
    """The split of a relative path, by the names of its folders."""
    return next((_SPLITS[part] for part in name.lower().split("/")[:-1] if part in _SPLITS), None)


def training_files(names: Iterable[str]) -> tuple[list[str], list[str]]:
    """(files of the training split, files of other splits). Files in folders with other names are for training."""
    names = list(names)
    others = [name for name in names if split_of(name) not in (None, "train")]
    left_out = set(others)
    return [name for name in names if name not in left_out], others


def is_table(listing: Listing) -> bool:
    """Whether `datasets` should read the folder: without metadata, and with as many tables or archives as images."""
    return not listing.metadata() and 0 < len(listing.having(_TABLES)) >= len(listing.having(IMAGES))


def refusal(root: str, captions: bool) -> str | None:
    """What is wrong with a data folder, judging by file names, and what to do; None if it may be valid.

    `captions` says whether the script needs captions.
    """
    if any(os.path.isfile(os.path.join(root, name)) for name in STORED) or declares_configs(root):
        return None
    listing = list_files(root)
    if not listing.metadata() and not listing.having(IMAGES) and listing.zips:
        try:
            add_zips(listing)
        except BadData as error:
            return f"cannot be read: {error}"
    for name in METADATA:
        if os.path.isdir(os.path.join(root, name)):
            return f"cannot be read: {name} is a folder"
    found, images = listing.metadata(), listing.having(IMAGES)
    if found:
        training, others = training_files(found)
        return None if training else _only_other_splits(root, others)
    if is_table(listing) or (images and not captions):
        return None
    if not listing.files:
        return "is empty"
    if not images and (not captions or archives(listing) or not _near_miss(listing)):
        return f"holds no images{archives(listing)}"
    beside = _captions_beside(listing, images)
    return beside or f"holds no metadata.jsonl, with a line for each image such as {_LINE}{_near_miss(listing)}"


def archives(listing: Listing) -> str:
    """A hint to unpack archives that are not read; "" if there are none."""
    inner = [name for name in listing.having((".zip",)) if listing.files[name].startswith("zip://")]
    found = sorted([*listing.having(_ARCHIVES), *inner])
    return f"; unpack {', '.join(found[:5])}: such archives are not read" if found else ""


def _only_other_splits(root: str, names: list[str]) -> str:
    splits = ", ".join(sorted({split_of(name) for name in names}))
    folder = os.path.join(root, posixpath.dirname(names[0]))
    return f"has no split named train, only: {splits}; to train on one of them, name its folder, e.g. {folder}"


def declares_configs(root: str) -> bool:
    """Whether a dataset card (README.md) assigns files to configurations and splits."""
    try:
        with open(os.path.join(root, "README.md"), encoding="utf-8", errors="replace") as file:
            head = file.read(100_000)
    except OSError:
        return False
    card = re.match(r"---\s*\n(.*?)\n---", head, re.DOTALL)
    return card is not None and re.search(r"^configs:", card[1], re.MULTILINE) is not None


def _captions_beside(listing: Listing, images: list[str]) -> str | None:
    stems = {posixpath.splitext(name)[0] for name in images}
    bases = {posixpath.basename(stem) for stem in stems}
    for suffix in _CAPTIONS:
        texts = listing.having((suffix,))
        found = sum(posixpath.splitext(name)[0] in stems for name in texts)
        if not images or found * 2 < len(images):
            elsewhere = [name for name in texts if posixpath.splitext(posixpath.basename(name))[0] in bases]
            if images and len(elsewhere) * 2 >= len(images):
                return (
                    f"has captions in {suffix} files such as {elsewhere[0]}, which are not read yet: write them into a "
                    f"metadata.jsonl, with a line for each image such as {_LINE}"
                )
            continue
        kinds = sorted({posixpath.splitext(name)[1] for name in images})
        program = (
            "import json, pathlib; "
            'open("metadata.jsonl", "w").writelines(json.dumps({"file_name": path.as_posix(), "text": '
            f'path.with_suffix("{suffix}").read_text("utf-8-sig").strip()}}) + "\\n" for path in '
            f'sorted(pathlib.Path().rglob("*")) if path.suffix in {kinds} and path.with_suffix("{suffix}").exists())'
        ).replace("'", '"')
        unpack = "unpack the zip first, then " if listing.files[texts[0]].startswith("zip://") else ""
        return (
            f"has captions in {suffix} files beside its images, which are not read yet; this makes a metadata.jsonl "
            f"of them: {unpack}cd {shlex.quote(listing.root)} && python -c '{program}'"
        )
    return None


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
    return f"; if {other} lists the images, it {_what_to_do(other, other.lower(), listing)}" if other else ""


def _what_to_do(name: str, base: str, listing: Listing) -> str:
    if base.endswith((".xlsx", ".xls", ".ods")):
        return "must be saved as metadata.csv (CSV UTF-8)"
    if base.endswith((".gz", ".zip", ".bz2", ".xz")):
        return "must be unpacked"
    if "csv" in base or "tsv" in base:
        return "must be named metadata.csv"
    if "parquet" in base:
        return "must be named metadata.parquet"
    try:
        with open(listing.files[name], "rb") as file:
            start = file.read(1000).removeprefix(b"\xef\xbb\xbf").lstrip()
    except OSError:
        start = b""
    if start.startswith(b"[") or (start.startswith(b"{") and b"}" not in start.partition(b"\n")[0]):
        return "must become metadata.jsonl, with each entry as one line, {...}, without a list around them"
    return "must be named metadata.jsonl"


# --- reading


@functools.lru_cache(maxsize=8)
def _archive(path: str, stamp: int, process: int) -> zipfile.ZipFile:
    """An open zip, one per process: forked processes would share its file position."""
    return zipfile.ZipFile(path)


def stamped(path: str) -> str:
    """A path with the file's size and time, which change with its content; for a member those of the zip."""
    place = path.rpartition("::")[2] if path.startswith("zip://") else path
    if place.startswith("hf://"):  # the URL contains the commit
        return path
    status = os.stat(place)
    return f"{path}:{status.st_size}:{status.st_mtime_ns}"


def read_bytes(path: str) -> bytes:
    """A file's content. Raises OSError, and for a member of a zip zipfile's errors."""
    if not path.startswith("zip://"):
        mode = os.stat(path).st_mode
        if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):  # opening it could block forever
            raise OSError("it is not a file, but a pipe, socket or device")
        with open(path, "rb") as file:
            return file.read()
    member, _, archive = path.removeprefix("zip://").rpartition("::")
    if archive.startswith("hf://"):
        import fsspec

        with fsspec.open(path, "rb") as file:
            return file.read()
    return _archive(archive, os.stat(archive).st_mtime_ns, os.getpid()).read(member)
