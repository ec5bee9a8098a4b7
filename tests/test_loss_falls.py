"""Learning, in seconds: beside a run that learns nothing, a run's loss is the lower one, update by update.

Both see the same samples, noise and timesteps, so that a small fall is no accident. test_learning.py looks at what was
learned, and has the prior's full run.
"""

import numpy as np
import pytest
from conftest import load_script
from runs import rows

RATE = {"sd": 1e-3, "sd_lora": 1e-2, "prior_lora": 1e-2, "decoder": 1e-3, "decoder_lora": 1e-2}
UPDATES, LAST = 24, 10


@pytest.mark.parametrize("script", RATE)
def test_loss_falls(script, command, tmp_path):
    losses = []
    for rate in (RATE[script], 0):
        folder = tmp_path / str(rate)
        options = {"max_train_steps": UPDATES, "learning_rate": rate, "cache_encodings": True}
        load_script(script).main(command(script, output_dir=folder, **options))
        losses.append(np.array([row["loss"] for row in rows(folder)]))
    learning, still = losses
    assert learning[0] == still[0]
    assert (learning[-LAST:] < still[-LAST:]).all(), learning / still
