# Sourced by the two README commands: makes .venv on first use, and again when the requirements have changed.
# PYTHON chooses the interpreter, default python3; it must be 3.11 or newer.
cd "$(dirname "${BASH_SOURCE[0]}")"
PYTHON=${PYTHON:-python3}
"$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 11) and f"Python 3.11 or newer is needed, this is {sys.version.split()[0]}")'
stamp=$("$PYTHON" -c 'import hashlib, sys; print(sys.version, hashlib.sha256(b"".join(open(f, "rb").read() for f in sys.argv[1:])).hexdigest())' \
    setup.py requirements.txt requirements_flax.txt requirements_test.txt environment.sh)
if [ "$(cat .venv/stamp 2>/dev/null)" != "$stamp" ]; then
    echo "installing into .venv (a few minutes, several GB with torch's CUDA libraries)"
    "$PYTHON" -m venv --clear .venv
    .venv/bin/python -m pip install --quiet --disable-pip-version-check -r requirements_test.txt -e .
    echo "$stamp" > .venv/stamp
fi
