"""Numbered checkpoints that are whole or absent.

A checkpoint is written into a hidden sibling folder. Then, while training goes on, it is synced to disk, described by a
manifest (position, seed, versions, size and SHA-256 of every file) and put in place by one rename. Old ones are removed
after that, and only folders that carry such a manifest. Killing a run at any moment therefore leaves the previous
checkpoints untouched.
"""

import copy
import re
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from accelerate.utils import broadcast_object_list

from ..distributed import wait
from ..errors import fail, readable_errors
from ..files import cannot_be_saved, make_readable, remove_folder, replace_folder, saving, set_aside
from ..log import logger
from ..stopping import end_loop, fail_after_step, heed_early_stop
from .export import forget_local_paths
from .manifest import MANIFEST, read_manifest, verify, write_manifest

_NAME = re.compile(r"checkpoint-(\d+)")
_LEFTOVER = re.compile(r"\.checkpoint-\d+\.(partial|removed)")


class CheckpointManager:
    """Saves, restores and rotates the checkpoints of one run.

    `save_models(folder)` is called on the main process and writes the trained networks; `load_models(folder)` is called
    on every process and reads them back in place. Optimizer and gradient scaler go through accelerate, which unpickles
    nothing without `weights_only`.
    """

    def __init__(self, accelerator, output_dir, total_limit: int | None, save_models: Callable, load_models: Callable):
        self.accelerator, self.output_dir, self.total_limit = accelerator, Path(output_dir), total_limit
        self.save_models, self._commit = save_models, None

        def before_save(_models, weights, folder):
            weights.clear()  # or accelerate would write model.safetensors next to ours
            if accelerator.is_main_process:
                save_models(Path(folder))

        def before_load(models, folder):
            models.clear()
            load_models(Path(folder))

        accelerator.register_save_state_pre_hook(before_save)
        accelerator.register_load_state_pre_hook(before_load)
        if accelerator.is_main_process:
            for leftover in self.output_dir.glob(".checkpoint-*"):
                if _LEFTOVER.fullmatch(leftover.name):
                    remove_folder(leftover)

    def save(self, position: dict) -> None:
        """Write checkpoint-<step>. `position` holds step, samples_seen and whatever else resuming has to know.

        Training waits until the files are written. Syncing and hashing them and the rename, which take as long again,
        go on in a thread meanwhile. If the disk fails there, the run ends after the step under way, and saves again.
        """
        accelerator, target = self.accelerator, self.output_dir / f"checkpoint-{position['step']}"
        partial = target.with_name(f".{target.name}.partial")
        if accelerator.is_main_process:  # weights and optimizer are the same on all
            self._finish_commit()
            with saving(target.name, partial):
                shutil.rmtree(partial, ignore_errors=True)
                partial.mkdir()
                if accelerator._models:
                    accelerator.save_state(str(partial))
                else:  # nothing is PyTorch's, on whose GPU accelerate would look for random numbers, and take memory
                    self.save_models(partial)
                for random_state in partial.glob("random_states_*.pkl"):
                    random_state.unlink()  # no draw comes from a global generator
                forget_local_paths(partial)
                make_readable(partial)
            pool = ThreadPoolExecutor(1)
            self._commit = pool.submit(self._put_in_place, partial, target, copy.deepcopy(position))
            pool.shutdown(wait=False)
        wait(accelerator)

    def __enter__(self):
        heed_early_stop()  # here, for there may be no step left to take

    def __exit__(self, kind, *_):
        """After the loop, or what ended it, the last checkpoint is in place. Without an error all processes wait."""
        failure = self._finish_commit()
        if kind is None:
            end_loop()
            if failure:
                fail(failure)
            wait(self.accelerator)

    def _finish_commit(self) -> str | None:
        """Why the last checkpoint could not be put in place, if so."""
        commit, self._commit = self._commit, None
        return commit and commit.result()

    def _put_in_place(self, partial: Path, target: Path, position: dict) -> str | None:
        try:
            write_manifest(partial, position)
            if target.exists() and not (target / MANIFEST).is_file():
                set_aside(target)  # it is the user's
            replace_folder(partial, target)
        except OSError as error:
            failure = cannot_be_saved(target.name, partial, error)
            fail_after_step(failure)
            return failure
        logger.info(f"saved {target}")
        self._rotate(keep=target)

    def _rotate(self, keep: Path) -> None:
        ours = [folder for folder in _ours(self.output_dir) if not folder.is_symlink()]
        surplus = len(ours) - self.total_limit if self.total_limit else 0
        for folder in [folder for folder in ours if folder != keep][: max(0, surplus)]:
            try:
                remove_folder(folder)
            except OSError as error:  # a file that is open elsewhere, on NFS: tried again after the next save
                logger.warning(f"{folder} cannot be removed: {error.strerror}")

    def restore(self, folder: Path | None) -> None:
        """Read networks, optimizer and scaler from the checkpoint that `find_checkpoint` returned, if there is one."""
        if folder is None:
            return
        scaler = self.accelerator.scaler
        if not (folder / "scaler.pt").is_file():  # it was saved in another precision: the scale begins anew
            self.accelerator.scaler = None
        with readable_errors("checkpoint", str(folder)):
            self.accelerator.load_state(str(folder))
        self.accelerator.scaler = scaler
        if self.accelerator.is_main_process and folder.resolve().parent == self.output_dir.resolve():
            _abandon_later_ones(folder)
            self._rotate(keep=folder)  # which a run that was killed after its last save has not done
        self.accelerator.step = 0  # accelerate counts micro-batches, and a checkpoint stands between two updates
        logger.info(f"resumed from {folder}")


def find_checkpoint(output_dir, wanted: str | None, accelerator) -> tuple[Path | None, dict]:
    """Folder and manifest of the checkpoint to resume from, or (None, {}); the same on every process.

    `wanted` is None, "latest", a name in the output folder, or a path. Of the numbered ones "latest" takes the newest
    that verifies, and warns about those it had to pass over. One asked for by name must verify, or the run exits.
    """
    found = [None]
    if wanted is not None and accelerator.is_main_process:
        found = [_latest(Path(output_dir)) if wanted == "latest" else _named(Path(output_dir), wanted)]
    wait(accelerator)  # the hashing of many gigabytes takes long
    folder = broadcast_object_list(found)[0]
    return folder, read_manifest(folder) if folder else {}


def _latest(output_dir: Path) -> Path | None:
    for removed in output_dir.glob(".checkpoint-*.removed"):  # whole: the run died between two renames
        original = output_dir / removed.name[1:].removesuffix(".removed")
        if not original.exists() and verify(removed) is None:
            removed.rename(original)
    for folder in reversed(_numbered(output_dir)):
        fault = verify(folder)
        if fault is None:
            return folder
        logger.warning(f"{folder} is not usable ({fault}); trying the one before")
    if damaged := _ours(output_dir):
        raise SystemExit(
            f"error: none of the {len(damaged)} checkpoints in {output_dir} is usable: move them away to start anew"
        )
    logger.info(f"no checkpoint in {output_dir}: starting from the beginning")
    return None


def _named(output_dir: Path, wanted: str) -> Path:
    inside = output_dir / wanted
    folder = inside if inside.is_dir() else Path(wanted)
    fault = verify(folder)
    if fault is not None:
        raise SystemExit(f"error: --resume_from_checkpoint {wanted}: {fault}")
    return folder


def _numbered(output_dir: Path) -> list[Path]:
    folders = [folder for folder in output_dir.glob("checkpoint-*") if _NAME.fullmatch(folder.name) and folder.is_dir()]
    return sorted(folders, key=_number)


def _number(folder: Path) -> int:
    return int(folder.name.removeprefix("checkpoint-"))


def _ours(output_dir: Path) -> list[Path]:
    """The numbered folders that carry a manifest, oldest first. Only these are ever removed, but for links."""
    return [folder for folder in _numbered(output_dir) if (folder / MANIFEST).is_file()]


def _abandon_later_ones(folder: Path) -> None:
    """After going back to `folder`, "latest" and the rotation must not meet the course that was left."""
    step = read_manifest(folder)["step"]  # not its name's: it may itself have been set aside
    for other in _ours(folder.parent):
        if other.name != folder.name and _number(other) >= step:
            what = "later than" if _number(other) > step else "of another course than"
            logger.warning(f"{other} is {what} the checkpoint resumed from; moved to {set_aside(other)}")


def size_of(args, network, average=None) -> int:
    """Bytes of a checkpoint of a PyTorch network: trained weights in fp32, their average, AdamW's two moments."""
    sizes = [parameter.numel() for parameter in network.parameters() if parameter.requires_grad]
    networks = 1 if average is None else 2
    if not args.use_8bit_adam:
        return 4 * (networks + 2) * sum(sizes)
    # bitsandbytes: a byte a value and a scale for 256 of them, but for small tensors, which stay in fp32
    moments = sum(2 * size + 8 * (size // 256) if size >= 4096 else 8 * size for size in sizes)
    return 4 * networks * sum(sizes) + moments


def announce_space(args, size: int, step: int, total: int) -> None:
    """Say how much disk the checkpoints of updates `step` to `total` will take, and warn if that is not there."""
    folder, limit = Path(args.output_dir), args.checkpoints_total_limit
    count = total // args.checkpointing_steps - step // args.checkpointing_steps
    if count == 0:
        return
    free, at_once, kept = shutil.disk_usage(folder).free, count, ""
    if limit is not None:  # an old one is removed once the new one is whole
        at_once, kept = max(0, min(count, limit + 1 - len(_ours(folder)))), f", of which {limit} are kept,"
    line = (
        f"{count} checkpoint{'s' * (count > 1)} of {_amount(size)}{kept} will take {_amount(at_once * size)} "
        f"of the {_amount(free)} that are free in {folder}"
    )
    if at_once * size <= free:
        logger.info(line)
    else:
        way = "make room" if limit == 1 else "keep fewer with --checkpoints_total_limit"
        logger.warning(f"{line}: they do not fit; {way}, or choose another --output_dir")


def _amount(size: int) -> str:
    return f"{size / 2**30:.1f} GiB" if size >= 2**30 else f"{size / 2**20:.1f} MiB"
