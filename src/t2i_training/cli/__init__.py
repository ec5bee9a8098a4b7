"""The command line: flags, --config, and the checks that need no torch."""
