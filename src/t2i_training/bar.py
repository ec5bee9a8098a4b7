"""Progress bars of the work before training: inspecting images and encoding them."""

import sys
import time

from tqdm.auto import tqdm

from .log import logger


class Bar(tqdm):
    """A bar on the terminal, on rank 0 only; if stderr is not a terminal, a log line every minute."""

    def __init__(self, accelerator, **options):
        self._in_log, self._logged = not sys.stderr.isatty(), time.monotonic()
        options |= {"leave": False} if self._in_log else {}
        super().__init__(disable=not accelerator.is_main_process, dynamic_ncols=True, **options)

    def update(self, n=1):
        super().update(n)
        now = time.monotonic()
        if self._in_log and not self.disable and now - self._logged > 60:
            left = self.format_interval(self.format_dict["elapsed"] * (self.total - self.n) / self.n)
            logger.info(f"{self.desc}: {self.n} of {self.total}, {left} left")
            self._logged = now

    def display(self, *arguments, **options):
        return None if self._in_log else super().display(*arguments, **options)

    def clear(self, *arguments, **options):
        return None if self._in_log else super().clear(*arguments, **options)
