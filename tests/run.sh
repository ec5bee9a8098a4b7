#!/usr/bin/env bash
# Makes the environment if needed and runs the tests: all but the slow ones, with --quick what one runs after each edit
# (a minute), with --all everything. Other arguments go to pytest.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../environment.sh"
.venv/bin/ruff check .
TMPDIR=$(mktemp -d) # of its own, so that nothing stays behind, whatever a test leaves
export TMPDIR
trap 'rm -rf "$TMPDIR"' EXIT
.venv/bin/python -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder "$@"
