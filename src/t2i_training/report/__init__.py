"""Reports a run: progress, metrics, curves, validation images, the model card."""
