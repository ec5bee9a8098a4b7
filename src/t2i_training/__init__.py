"""Mechanisms shared by the training scripts: everything around a run, nothing of what a run optimises.

Each folder is a room with a subject; the modules beside them are the ground that all rooms stand on. Which room may
import from which is held by tests/test_rooms.py. Importing the package, `cli` or `sources` costs no torch: `--help` and
usage errors come at once.

Words:
    sample        an image with its caption: one row of the data set
    visit         one use of a sample, in one epoch; its crop, flip, caption, noise and timestep are drawn for it
    draw          a random number, or a tensor of them, that is a function of (seed, epoch, sample, name of the draw)
    micro-batch   what one forward and backward pass of a process takes: --train_batch_size samples
    update        one step of the optimizer, after --gradient_accumulation_steps micro-batches
    effective batch   samples of one update: processes x accumulation x --train_batch_size
    position      where a run stands: updates made, samples seen; a checkpoint's manifest holds it
    encoding      the output of a frozen network for an image or a caption
    view          one square of an image: which crop, mirrored or not
    shard         a file that holds some hundred encodings
    row           a row of the data set, counted from 0; or a line of metrics.jsonl
"""

__version__ = "0.1.0"
