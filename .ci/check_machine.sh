#!/bin/sh
# Prints the Python to use, or says what this machine lacks.
set -u

lacks() {
    printf 'error: %s\n' "$1" >&2
    exit 2
}

python=
for candidate in ${PYTHON:-python3 python3.14 python3.13 python3.12 python3.11 python3.10}; do
    if "$candidate" -c 'import sys; raise SystemExit(sys.version_info < (3, 10))' 2>/dev/null; then
        python=$candidate
        break
    fi
done
[ -n "$python" ] || lacks "no Python 3.10 or newer was found (looked for: ${PYTHON:-python3, python3.14 ... python3.10};
       python3 is: $(python3 --version 2>&1 | head -n 1)). Install one, e.g. \`apt-get install python3 python3-venv\`, or name it:
       \`make demo PYTHON=/path/to/python3.12\`."

"$python" -c 'import ensurepip, venv' 2>/dev/null ||
    lacks "$python cannot make virtual environments. On Debian and Ubuntu: \`apt-get install python3-venv\`."

compiler=${CXX:-}
for candidate in $compiler c++ g++ clang++; do
    if command -v "$candidate" >/dev/null 2>&1; then
        compiler=$candidate
        break
    fi
done
command -v "${compiler:-no-compiler}" >/dev/null 2>&1 ||
    lacks "no C++ compiler was found (looked for: ${CXX:-CXX is not set}, c++, g++, clang++); DeepSpeed builds its optimisers
       with it. On Debian and Ubuntu: \`apt-get install g++\`."

header=$("$python" -c 'import sysconfig; print(sysconfig.get_path("include"))')/Python.h
[ -f "$header" ] ||
    lacks "$header is missing; DeepSpeed's optimisers are built against it. On Debian and Ubuntu: \`apt-get install python3-dev\`."

echo "$python"
