"""Runs a training script as it is and times its weight updates: `driver.py CONNECTION SCRIPT FLAGS...`, see runs.py.

The script does not know of it: torch calls a hook after each step of any optimizer. There this process tells how long
the updates took that it was asked for, and waits until more are asked for. So several runs can take turns, and every
script is measured by the same clock at the same place.
"""

import os
import runpy
import sys
import time
from multiprocessing.connection import Connection


def time_caching() -> list[float]:
    """Of the one call that makes encodings, or finds them: the list that its seconds will be in."""
    from t2i_training import encodings

    cached, seconds = encodings.cached, []

    def timed(*args):
        began = time.perf_counter()
        result = cached(*args)
        seconds.append(time.perf_counter() - began)
        return result

    encodings.cached = timed
    return seconds


def main() -> None:
    descriptor, script = sys.argv[1:3]
    sys.argv = sys.argv[2:]
    sys.path[0] = os.path.dirname(script)  # as `python SCRIPT` has it
    import torch
    from torch.optim.optimizer import register_optimizer_step_post_hook

    asked, times = 1, []  # the first update belongs to the start; times[0] is when this turn began
    parent = Connection(int(descriptor))
    caching = time_caching() if "--cache_encodings" in sys.argv else []

    def after_update(*_):
        nonlocal asked, times
        asked -= 1
        if not asked and torch.cuda.is_initialized():
            torch.cuda.synchronize()  # at the ends of a turn alone: the script may run ahead of the device within it
        times.append(time.perf_counter())
        if not asked:
            parent.send((times, sum(caching)))
            asked = parent.recv()
            times = [time.perf_counter()]

    register_optimizer_step_post_hook(after_update)
    runpy.run_path(script, run_name="__main__")


if __name__ == "__main__":
    main()
