"""From a data set to batches: images and captions are opened, inspected, shuffled and loaded."""
