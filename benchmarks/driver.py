"""Runs a training script as it is and times its weight updates: `driver.py CONNECTION SCRIPT FLAGS...`, see runs.py.

The script does not know of it: torch calls a hook after each step of any optimizer, and what takes the step of the Flax
script is wrapped, which is waited for, and JAX tells how long it compiles. There this process tells how long
the updates took that it was asked for, and waits until more are asked for. So several runs can take turns, and every
script is measured by the same clock at the same place.
"""

import os
import runpy
import sys
import time
from multiprocessing.connection import Connection

import runs


def time_caching() -> list[float]:
    """Of the one call that makes encodings, or finds them: the list that its seconds will be in."""
    from t2i_training.encodings import cache

    cached, seconds = cache.precompute, []

    def timed(*args, **options):
        began = time.perf_counter()
        result = cached(*args, **options)
        seconds.append(time.perf_counter() - began)
        return result

    cache.precompute = timed
    return seconds


def time_compilation() -> list[float]:
    """Seconds that JAX spends on tracing, lowering and compiling, as they come."""
    import jax

    seconds = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda event, duration, **_: seconds.append(duration) if event.startswith("/jax/core/compile") else None
    )
    return seconds


def after_flax_updates(hook) -> None:
    """Call `hook` when an update of the Flax script is done."""
    import jax

    from t2i_training.sd_flax import train_state

    step = train_state.TrainState.step

    def stepped(trained, *inputs):
        result = jax.block_until_ready(step(trained, *inputs))
        hook()
        return result

    train_state.TrainState.step = stepped


def main() -> None:
    descriptor, script = sys.argv[1:3]
    sys.argv = sys.argv[2:]
    sys.path[0] = os.path.dirname(script)  # as `python SCRIPT` has it
    import torch
    from torch.optim.optimizer import register_optimizer_step_post_hook

    flax = os.path.basename(script) == runs.FLAX_FILE
    compiling = time_compilation() if flax else []
    asked, times = 1, []  # the first update belongs to the start; times[0] is when this turn began
    parent = Connection(int(descriptor))
    caching = time_caching() if "--cache_encodings" in sys.argv else []

    def after_update(*_):
        nonlocal asked, times
        asked -= 1
        on_gpu = torch.cuda.is_initialized()
        if not asked and on_gpu:
            torch.cuda.synchronize()  # at the ends of a turn alone: the script may run ahead of the device within it
        times.append(time.perf_counter())
        if not asked:
            parent.send((times, sum(caching), sum(compiling), torch.cuda.max_memory_allocated() if on_gpu else 0))
            asked = parent.recv()
            if on_gpu:
                torch.cuda.reset_peak_memory_stats()
            times = [time.perf_counter()]

    if flax:
        after_flax_updates(after_update)
    else:
        register_optimizer_step_post_hook(after_update)
    runpy.run_path(script, run_name="__main__")


if __name__ == "__main__":
    main()
