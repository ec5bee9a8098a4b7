"""Plots metrics.jsonl as training_curves.png."""

import math
from pathlib import Path

from .. import files
from ..run.output_folder import read_metrics


def plot_curves(output_dir) -> Path | None:
    """training_curves.png: loss (raw and smoothed), learning rate and gradient norm over the steps."""
    rows = read_metrics(output_dir)
    if not rows:
        return None
    figure, path = _figure(rows), Path(output_dir) / "training_curves.png"
    with files.atomic_write(path) as file:
        figure.savefig(file, dpi=100, format="png")
    return path


def _figure(rows: list[dict]):
    from matplotlib.figure import Figure  # pyplot would look for a display and keep global state

    steps, losses = [row["step"] for row in rows], [row["loss"] for row in rows]
    smooth, smoothed = 0.0, []
    for i, loss in enumerate(losses, 1):
        smooth = 0.9 * smooth + 0.1 * loss
        smoothed.append(smooth / (1 - 0.9**i))  # with Adam's bias correction, so that the first values do not linger
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
