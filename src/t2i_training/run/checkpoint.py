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

import torch
from accelerate.utils import broadcast_object_list

from ..distributed import barrier
from ..errors import RunError
from ..files import apply_umask, cannot_be_saved, move_aside, remove_folder, replace_folder, saving
from ..library_errors import readable_errors
from ..log import logger
from .export import strip_local_paths
from .manifest import MANIFEST, read_manifest, verify, write_manifest

OPTIMIZER, SCALER = "optimizer.bin", "scaler.pt"
_NAME = re.compile(r"checkpoint-(\d+)")
_LEFTOVER = re.compile(r"\.checkpoint-\d+\.(partial|removed)")


class CheckpointManager:
    """Saves, restores and rotates the checkpoints of one run.

    `save_models(folder)` is called on the main process and writes the trained networks; `load_models(folder)` is called
    on every process and reads them back in place. The state of a PyTorch `optimizer`, and of fp16's gradient scaler, is
    written beside them; if `optimizer` is None, `save_models` and `load_models` handle all state. If a checkpoint
    cannot be put in place, `stop` is asked to end the run.
    """

    def __init__(
        self,
        accelerator,
        stop,
        optimizer,
        output_dir,
        total_limit: int | None,
        save_models: Callable[[Path], None],
        load_models: Callable[[Path], None],
    ):
        self.accelerator, self.stop, self.optimizer = accelerator, stop, optimizer
        self.output_dir, self.total_limit = Path(output_dir), total_limit
        self.save_models, self.load_models, self._commit = save_models, load_models, None
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
                self.save_models(partial)
                if self.optimizer is not None:
                    position = position | {"optimizer": _class_name(self.optimizer)}
                    torch.save(self.optimizer.state_dict(), partial / OPTIMIZER)
                    if accelerator.scaler is not None:
                        torch.save(accelerator.scaler.state_dict(), partial / SCALER)
                strip_local_paths(partial)
                apply_umask(partial)
            pool = ThreadPoolExecutor(1)
            self._commit = pool.submit(self._put_in_place, partial, target, copy.deepcopy(position))
            pool.shutdown(wait=False)
        barrier(accelerator)

    def __enter__(self):
        pass

    def __exit__(self, kind, *_):
        """Wait until the last checkpoint is in place; after a loop without error, on all ranks."""
        failure = self._finish_commit()
        if kind is None:
            if failure:
                raise RunError(failure)
            barrier(self.accelerator)

    def _finish_commit(self) -> str | None:
        """Why the last checkpoint could not be put in place, if so."""
        commit, self._commit = self._commit, None
        return commit and commit.result()

    def _put_in_place(self, partial: Path, target: Path, position: dict) -> str | None:
        try:
            write_manifest(partial, position)
            if target.exists() and not (target / MANIFEST).is_file():
                move_aside(target)  # not written by these scripts: keep it
            replace_folder(partial, target)
        except OSError as error:
            failure = cannot_be_saved(target.name, partial, error)
            self.stop.fail_after_step(failure)
            return failure
        logger.info(f"saved {target}")
        self._rotate(keep=target)

    def _rotate(self, keep: Path) -> None:
        ours = [folder for folder in _ours(self.output_dir) if not folder.is_symlink()]
        surplus = len(ours) - self.total_limit if self.total_limit else 0
        for folder in [folder for folder in ours if folder != keep][: max(0, surplus)]:
            try:
                remove_folder(folder)
            except OSError as error:  # e.g. a file that is open elsewhere, on NFS: tried again after the next save
                logger.warning(f"{folder} cannot be removed: {error.strerror}")

    def restore(self, folder: Path | None) -> None:
        """Read networks, optimizer and scaler from the checkpoint that `find_checkpoint` returned, if there is one."""
        if folder is None:
            return
        with readable_errors("checkpoint", str(folder)):
            self.load_models(folder)
            if self.optimizer is not None:
                self._load_optimizer(folder)
        if self.accelerator.is_main_process and folder.resolve().parent == self.output_dir.resolve():
            _abandon_later_ones(folder)
            self._rotate(keep=folder)  # a run that was killed right after a save has not rotated
        logger.info(f"resumed from {folder}")

    def _load_optimizer(self, folder: Path) -> None:
        if not (folder / OPTIMIZER).is_file():
            raise RunError(f"{folder} was not saved by this script: there is no {OPTIMIZER}")
        # Read directly to the GPU: host memory would have to hold one copy per process.
        state = torch.load(folder / OPTIMIZER, map_location=self.accelerator.device, weights_only=True)
        names = {name for tensors in state["state"].values() for name in tensors}
        # Older manifests do not name the optimizer.
        older = "AdamW8bit" if names and "exp_avg" not in names else "AdamW"
        was, now = read_manifest(folder).get("optimizer", older), _class_name(self.optimizer)
        if was != now:
            raise RunError(
                f"the checkpoint was made with {was}, and this run's optimizer is {now}: "
                "add or remove --use_8bit_adam, as when the run began"
            )
        load_optimizer(self.optimizer, state)
        scaler = self.accelerator.scaler
        # Else the checkpoint was saved in another precision: start with a new scale.
        if scaler is not None and (folder / SCALER).is_file():
            scaler.load_state_dict(torch.load(folder / SCALER, weights_only=True))


def _class_name(optimizer) -> str:
    return type(getattr(optimizer, "optimizer", optimizer)).__name__  # unwrap accelerate's


def load_optimizer(optimizer, saved: dict) -> None:
    """Load the state dict `saved`, but keep the current hyperparameters (learning rate, betas, ...).

    Moments are copied into the memory format of their parameters. Fused AdamW walks both in memory order, so moments
    saved in channels-last on CUDA and loaded on a CPU, or the other way round, would be applied to the wrong weights.
    Raises ValueError if the number of parameters differs.
    """
    groups = optimizer.state_dict()["param_groups"]
    sizes = [[len(group["params"]) for group in each] for each in (groups, saved["param_groups"])]
    if sizes[0] != sizes[1]:
        raise ValueError(f"its optimizer has {sizes[1]} parameters, and this run's {sizes[0]}")
    optimizer.load_state_dict({"state": saved["state"], "param_groups": groups})
    for parameter, state in optimizer.state.items():
        for name, moment in state.items():
            # Not bitsandbytes' state: its step is a plain number, its moments are quantised in blocks.
            is_moment = isinstance(moment, torch.Tensor) and moment.is_floating_point()
            if is_moment and moment.shape == parameter.shape and moment.stride() != parameter.stride():
                state[name] = torch.empty_like(parameter, dtype=moment.dtype).copy_(moment)


def find_checkpoint(output_dir, wanted: str | None, accelerator) -> tuple[Path | None, dict]:
    """Folder and manifest of the checkpoint to resume from, or (None, {}); the same on every process.

    `wanted` is None, "latest", a name in the output folder, or a path. "latest" is the newest that verifies;
    newer ones that do not are named in a warning. A checkpoint asked for by name must verify, or the run exits.
    """
    found = [None]
    if wanted is not None and accelerator.is_main_process:
        found = [_latest(Path(output_dir)) if wanted == "latest" else _named(Path(output_dir), wanted)]
    barrier(accelerator)  # hashing many gigabytes takes long
    folder = broadcast_object_list(found)[0]
    return folder, read_manifest(folder) if folder else {}


def _latest(output_dir: Path) -> Path | None:
    for removed in output_dir.glob(".checkpoint-*.removed"):  # complete: the run was killed between two renames
        original = output_dir / removed.name[1:].removesuffix(".removed")
        if not original.exists() and verify(removed) is None:
            removed.rename(original)
    for folder in reversed(_numbered(output_dir)):
        fault = verify(folder)
        if fault is None:
            return folder
        logger.warning(f"{folder} is not usable ({fault}); trying the one before")
    if damaged := _ours(output_dir):
        raise RunError(
            f"none of the {len(damaged)} checkpoints in {output_dir} is usable: move them away to start anew"
        )
    logger.info(f"no checkpoint in {output_dir}: starting from the beginning")
    return None


def _named(output_dir: Path, wanted: str) -> Path:
    inside = output_dir / wanted
    folder = inside if inside.is_dir() else Path(wanted)
    fault = verify(folder)
    if fault is not None:
        raise RunError(f"--resume_from_checkpoint {wanted}: {fault}")
    return folder


def _numbered(output_dir: Path) -> list[Path]:
    folders = [folder for folder in output_dir.glob("checkpoint-*") if _NAME.fullmatch(folder.name) and folder.is_dir()]
    return sorted(folders, key=_number)


def _number(folder: Path) -> int:
    return int(folder.name.removeprefix("checkpoint-"))


def _ours(output_dir: Path) -> list[Path]:
    """The numbered folders with a manifest, oldest first. Rotation removes only these, and no symbolic links."""
    return [folder for folder in _numbered(output_dir) if (folder / MANIFEST).is_file()]


def _abandon_later_ones(folder: Path) -> None:
    """Rename checkpoints later than `folder`, so that "latest" and the rotation ignore them from now on."""
    step = read_manifest(folder)["step"]  # from the manifest: the folder itself may have been renamed
    for other in _ours(folder.parent):
        if other.name != folder.name and _number(other) >= step:
            what = "later than" if _number(other) > step else "of the same step as"
            logger.warning(f"{other} is {what} the checkpoint resumed from; moved to {move_aside(other)}")


def size_of(args, network, average=None) -> int:
    """Bytes of a checkpoint of a PyTorch network: trained weights in fp32, their average, AdamW's two moments."""
    sizes = [parameter.numel() for parameter in network.parameters() if parameter.requires_grad]
    networks = 1 if average is None else 2
    if not args.use_8bit_adam:
        return 4 * (networks + 2) * sum(sizes)
    # bitsandbytes: one byte per value and one scale per 256 values; tensors below 4096 values stay in fp32
    moments = sum(2 * size + 8 * (size // 256) if size >= 4096 else 8 * size for size in sizes)
    return 4 * networks * sum(sizes) + moments


def announce_space(args, size: int, step: int, total: int) -> None:
    """Log how much disk space the checkpoints from update `step` to `total` will take; warn if it is not there."""
    folder, limit = Path(args.output_dir), args.checkpoints_total_limit
    count = total // args.checkpointing_steps - step // args.checkpointing_steps
    if count == 0:
        return
    free, at_once, kept = shutil.disk_usage(folder).free, count, ""
    if limit is not None:  # an old one is removed only after the new one is complete
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
