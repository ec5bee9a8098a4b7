"""What a run says of itself to its killer, in memory that they share."""

import mmap
import time

import numpy as np

PHASES = (
    "start-up", "inspection", "loading", "caching", "restoring", "step", "checkpoint", "rotation", "validation",
    "export", "end",
)  # fmt: skip


class Board:
    """What a run says of itself: its phase, and per phase how often it was entered, for how long, and its changes.

    A change is an operation on files in the output folder, about to happen.
    """

    def __init__(self):
        self._memory = mmap.mmap(-1, 4096)
        self._now = np.frombuffer(self._memory, np.int64, 1)
        self.entries = np.frombuffer(self._memory, np.int64, len(PHASES), 1024)
        self.changes = np.frombuffer(self._memory, np.int64, len(PHASES), 2048)
        self.seconds = np.frombuffer(self._memory, np.float64, len(PHASES), 3072)
        self.entries[0] = 1
        self._since = time.monotonic()

    @property
    def phase(self) -> str:
        return PHASES[self._now[0]]

    def enter(self, phase: str) -> None:
        now = time.monotonic()
        self.seconds[self._now[0]] += now - self._since
        self._since, self._now[0] = now, PHASES.index(phase)
        self.entries[self._now[0]] += 1

    def wrap(self, owner, name: str, phase: str, after: str | None = None) -> None:
        """Mark calls of `owner.name`; then it is `after`, by default what it was before."""
        call = getattr(owner, name)

        def marked(*arguments, **options):
            before = self.phase
            self.enter(phase)
            try:
                return call(*arguments, **options)
            finally:
                if after or self.phase == phase:  # or another thread has entered one since
                    self.enter(after or before)

        setattr(owner, name, marked)

    def wrap_all(self, script) -> None:
        from t2i_training.data import inspection
        from t2i_training.encodings import cache
        from t2i_training.report import validation
        from t2i_training.report.progress import Progress
        from t2i_training.run import checkpoint

        self.wrap(inspection, "inspect", "inspection", "loading")
        self.wrap(cache, "precompute", "caching")
        self.wrap(checkpoint.CheckpointManager, "restore", "restoring")
        self.wrap(Progress, "open", "loading", "step")
        self.wrap(checkpoint.CheckpointManager, "save", "checkpoint")
        self.wrap(checkpoint.CheckpointManager, "_put_in_place", "checkpoint")  # in a thread, while steps are taken
        self.wrap(checkpoint.CheckpointManager, "_rotate", "rotation")
        self.wrap(validation, "validate", "validation")
        self.wrap(script, "export_atomically", "export", "end")
