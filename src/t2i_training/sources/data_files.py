"""Lists the files of a data folder: images, metadata, splits. Imports no torch.

A zip counts as if it were unpacked in place; a member has a path such as zip://0001.png::/data/images.zip, as in fsspec
and `datasets`.
"""

import functools
import os
import posixpath
import re
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
CAPTIONS = (".txt", ".caption")  # files beside images; the first is more usual
_REPEATS = re.compile(r"0*([1-9]\d{0,3})_.*")  # a folder whose images kohya's scripts repeat; no date
MASKS = ("-masklabel", "-condlabel")  # of OneTrainer, at the end of names
_SPLITS = {  # name of a folder -> its split, as in `datasets`
    "train": "train", "training": "train", "test": "test", "testing": "test", "eval": "test", "evaluation": "test",
    "validation": "validation", "valid": "validation", "val": "validation", "dev": "validation",
}  # fmt: skip


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

    def images(self) -> list[str]:
        return [name for name in self.having(IMAGES) if not _stem(name).endswith(MASKS)]

    def masks(self) -> list[str]:
        return [name for name in self.having(IMAGES) if _stem(name).endswith(MASKS)]

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


def below(path: str, root: str) -> str:
    """The part of an image's path that is below `root`; of a zip's member, as if it were unpacked there."""
    if path.startswith("zip://"):
        member, _, archive = path.removeprefix("zip://").rpartition("::")
        path = os.path.join(os.path.dirname(archive), member)
    return relative(path, root) if path.startswith(root.rstrip(os.sep) + os.sep) else path


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
    """Whether `datasets` should read the folder: without metadata or captions beside images, and with as many tables
    or archives as images. What is named as an image is no table but a note on it, such as a.json or a.png.json.
    """
    images = listing.images()
    names = {*images, *map(_stem, images)}
    tables = [name for name in listing.having(_TABLES) if _stem(name) not in names]
    return 0 < len(tables) >= len(images) and not listing.metadata() and not caption_files(listing)[1]


def caption_files(listing: Listing, wanted: str | None = None) -> tuple[str, dict[str, str]]:
    """(suffix, {image: the caption file beside it}); of the usual suffixes the one that more images have."""
    found = {suffix: _beside(listing, suffix) for suffix in ([wanted] if wanted else CAPTIONS)}
    suffix = max(found, key=lambda suffix: len(found[suffix]))
    return suffix, found[suffix]


def _beside(listing: Listing, suffix: str) -> dict[str, str]:
    by_stem = {name[: -len(suffix)]: name for name in listing.having((suffix.lower(),))}
    return {image: by_stem[_stem(image)] for image in listing.images() if _stem(image) in by_stem}


def _stem(name: str) -> str:
    return posixpath.splitext(name)[0]


def repeated_folder(name: str) -> tuple[int, str] | None:
    """(repeats, folder) of a file in a folder such as `10_zwx dog`; the innermost counts."""
    folders = name.replace(os.sep, "/").split("/")[-2::-1]
    return next(((int(found[1]), folder) for folder in folders if (found := _REPEATS.fullmatch(folder))), None)


def archives(listing: Listing) -> str:
    """A hint to unpack archives that are not read; "" if there are none."""
    inner = [name for name in listing.having((".zip",)) if listing.files[name].startswith("zip://")]
    found = sorted([*listing.having(_ARCHIVES), *inner])
    return f"; unpack {', '.join(found[:5])}: such archives are not read" if found else ""


def declares_configs(root: str) -> bool:
    """Whether a dataset card (README.md) assigns files to configurations and splits."""
    try:
        with open(os.path.join(root, "README.md"), encoding="utf-8", errors="replace") as file:
            head = file.read(100_000)
    except OSError:
        return False
    card = re.match(r"---\s*\n(.*?)\n---", head, re.DOTALL)
    return card is not None and re.search(r"^configs:", card[1], re.MULTILINE) is not None


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
