#!/bin/sh
# Prints the Python to use, or an error that says what this machine lacks.
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
       python3 is: $(python3 --version 2>/dev/null || echo not there)). Install one, e.g. \`apt-get install python3 python3-venv\`, or name it:
       \`make demo PYTHON=/path/to/python3.12\`."

"$python" -c 'import ensurepip, venv' 2>/dev/null ||
    lacks "$python cannot make virtual environments. On Debian and Ubuntu: \`apt-get install python3-venv\`."

# DeepSpeed's builds call CXX, or c++ if it is not set. No other compiler counts, even if there is one.
compiler=${CXX:-c++}
command -v "${compiler%% *}" >/dev/null 2>&1 ||
    lacks "no C++ compiler was found: there is no command ${compiler%% *}${CXX:+, which CXX names}; DeepSpeed builds its
       optimisers with it. On Debian and Ubuntu: \`apt-get install g++\`${CXX:+ and \`unset CXX\`}."

header=$("$python" -c 'import sysconfig; print(sysconfig.get_path("include"))')/Python.h
[ -f "$header" ] ||
    lacks "$header is missing; DeepSpeed's optimisers are built against it. On Debian and Ubuntu: \`apt-get install python3-dev\`."

echo "$python"
