# Sourced by the two README commands: makes .venv on first use, and again when what it is made of has changed.
# PYTHON chooses the interpreter, default python3; it must be 3.11 or newer. The releases that were tested together are
# installed, which constraints.txt names; T2I_NEWEST=1 takes today's instead. When the tests have passed with those:
# .venv/bin/python -m pip freeze --exclude-editable | grep -Ev '^(nvidia-|cuda-|uv==)' > constraints.txt
cd "$(dirname "${BASH_SOURCE[0]}")"
PYTHON=${PYTHON:-python3}
"$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 11) and f"Python 3.11 or newer is needed, this is {sys.version.split()[0]}")'

quiet=$([ -t 2 ] || echo --quiet) # in a terminal the installers show how far they are
with_uv() { # modules are compiled as pip does it; a company's certificates and package index hold as they do for pip
    local uv index
    index=${PIP_INDEX_URL:-$("$PYTHON" -m pip config get global.index-url 2>/dev/null || true)}
    uv=$(command -v uv) || uv=$PWD/.venv/bin/uv
    [ -x "$uv" ] || .venv/bin/python -m pip install --quiet --disable-pip-version-check uv || return
    UV_NATIVE_TLS=1 ${index:+env UV_DEFAULT_INDEX="$index"} "$uv" pip install $quiet --compile-bytecode --python .venv/bin/python "$@"
}
with_pip() { .venv/bin/python -m pip install $quiet --disable-pip-version-check "$@"; }

install_packages() { # with uv in a minute, else with pip in several; the tested releases, else what can be had
    local tool packages=(-r requirements_test.txt -e .)
    for tool in with_uv with_pip; do
        if [ -z "${T2I_NEWEST:-}" ]; then
            "$tool" "${packages[@]}" -c constraints.txt && return
            echo "the releases of constraints.txt could not be installed: trying what requirements.txt allows"
        fi
        "$tool" "${packages[@]}" && return
        [ "$tool" = with_pip ] || echo "uv could not install: pip tries, which takes minutes longer"
    done
    return 1
}

stamp=$("$PYTHON" -c 'import hashlib, sys; print(*sys.argv[1:2], sys.version, hashlib.sha256(b"".join(open(f, "rb").read() for f in sys.argv[2:])).hexdigest())' \
    "newest=${T2I_NEWEST:-}" setup.py requirements.txt requirements_flax.txt requirements_test.txt constraints.txt environment.sh)
if [ "$(cat .venv/stamp 2>/dev/null)" != "$stamp" ]; then
    echo "installing into .venv (one to five minutes, several GB with torch's CUDA libraries)"
    "$PYTHON" -m venv --clear .venv
    install_packages
    echo "$stamp" > .venv/stamp
fi
