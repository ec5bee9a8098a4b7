"""The command line: flags, --config, and what can be refused before torch is imported."""
