"""What a run tells its user: progress, metrics, curves, validation images, the model card."""
