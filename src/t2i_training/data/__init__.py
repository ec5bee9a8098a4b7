"""From a data set to batches: images and captions opened, inspected, drawn from and loaded."""
