"""metrics.jsonl, a row for each logging interval, and the curves that are drawn of it."""

import json
import math
import shutil
from pathlib import Path

from .. import files
from ..log import logger

METRICS = "metrics.jsonl"


def keep_metrics_until(file: Path, step: int) -> None:
    """Drop the rows after `step`, which a resumed run writes again, and a half-written last line."""
    rows = []
    if file.exists() and step > 0:
        rows = [row for row in read_metrics(file.parent) if row["step"] <= step]
    files.write_text(file, "".join(json.dumps(row) + "\n" for row in rows))


def set_metrics_aside(file: Path, step: int) -> None:
    """Keep a copy under another name if there are rows after `step`."""
    if file.exists() and any(row["step"] > step for row in read_metrics(file.parent)):
        copy = shutil.copy2(file, files.free_name(file))
        logger.warning(f"{file} has rows of another course than the one resumed: all as they were are kept in {copy}")


def read_metrics(output_dir) -> list[dict]:
    """The rows of metrics.jsonl, in order; a last line cut short by a crash is left out, as is what is no row."""
    rows = []
    for line in (Path(output_dir) / METRICS).read_bytes().splitlines():
        try:
            row = json.loads(line)
            norm = row["grad_norm"]
            if type(row["step"]) is not int or not all(map(_is_number, (row["loss"], row["lr"], norm or 0.0))):
                raise ValueError
            rows.append(row)
        except (ValueError, KeyError, TypeError, RecursionError):
            logger.warning(f"{METRICS}: left out a damaged line")
    return rows


def _is_number(value) -> bool:
    return type(value) in (int, float) and abs(value) < 1e300  # and not nan


def draw_curves(output_dir) -> Path | None:
    """training_curves.png: loss (raw and smoothed), learning rate and gradient norm over the steps."""
    rows = read_metrics(output_dir)
    if not rows:
        return None
    figure, path = _figure(rows), Path(output_dir) / "training_curves.png"
    with files.whole(path) as file:
        figure.savefig(file, dpi=100, format="png")
    return path


def _figure(rows: list[dict]):
    from matplotlib.figure import Figure  # not pyplot: it would pick a display and a global state

    steps, losses = [row["step"] for row in rows], [row["loss"] for row in rows]
    smooth, smoothed = 0.0, []
    for i, loss in enumerate(losses, 1):
        smooth = 0.9 * smooth + 0.1 * loss
        smoothed.append(smooth / (1 - 0.9**i))  # as Adam corrects it: the first values do not linger
    figure = Figure(figsize=(12, 3.4), layout="constrained")
    panels = figure.subplots(1, 3)
    panels[0].plot(steps, losses, color="0.75", linewidth=0.8, label="interval mean")
    panels[0].plot(steps, smoothed, color="tab:blue", label="smoothed")
    panels[0].legend(frameon=False)
    for panel, title in zip(panels, ("loss", "lr", "grad_norm"), strict=True):
        if title != "loss":
            panel.plot(steps, [math.nan if row[title] is None else row[title] for row in rows], color="tab:blue")
        panel.set(title={"lr": "learning rate", "grad_norm": "gradient norm"}.get(title, title), xlabel="step")
        panel.spines[["top", "right"]].set_visible(False)
    return figure
