"""--cache_encodings: a disk cache of the frozen networks' outputs."""
