#!/usr/bin/env bash
# Name what is missing before anything is installed, with the command that installs it.
set -u
python=${1:-}
install() { if command -v apt-get >/dev/null; then echo "sudo apt-get install -y $1"; elif command -v dnf >/dev/null; then echo "sudo dnf install -y $2"; else echo "your package manager's package $1"; fi; }
fail=0
if [ -z "$python" ]; then
    echo "missing: Python 3.11 or newer. Install it with: $(install 'python3 python3-venv' python3)" >&2
    exit 2
fi
if ! "$python" -c 'import ensurepip, venv' 2>/dev/null; then
    echo "missing: venv for $python. Install it with: $(install python3-venv python3)" >&2
    fail=2
fi
if ! command -v git >/dev/null; then
    echo "missing: git. Install it with: $(install git git)" >&2
    fail=2
fi
if ! command -v c++ >/dev/null && ! command -v g++ >/dev/null; then
    echo "missing: a C++ compiler. Install it with: $(install g++ gcc-c++)" >&2
    fail=2
fi
free=$(df -Pk . | awk 'NR==2 {print int($4 / 1048576)}')
if [ "$free" -lt 6 ]; then
    echo "only $free GiB free here; the environment, the corpus and a sweep need about 6" >&2
    fail=2
fi
exit $fail
