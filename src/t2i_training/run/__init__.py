"""The frame of a run: its start and end, its output folder, checkpoints and export."""
