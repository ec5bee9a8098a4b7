"""--cache_encodings: what frozen networks give, computed once and kept on disk."""
