#!/usr/bin/env bash
# Makes the environment if needed and runs every test; arguments go to pytest.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../environment.sh"
.venv/bin/ruff check .
exec .venv/bin/python -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder "$@"
