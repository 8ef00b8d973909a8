"""`make demo` on a machine that lacks something: the error comes before anything is installed."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import REPO

THIS_PYTHON = f'exec "{sys.executable}" "$@"'
# Fails every check of its version, as a Python that is too old does.
OLD_PYTHON = '[ "$1" = --version ] && echo Python 3.9.2 && exit 0; exit 1'
# Has no ensurepip, as on Debian without python3-venv.
BARE_PYTHON = f'case "$2" in *ensurepip*) exit 1;; esac; {THIS_PYTHON}'


def run_check(folder: Path, commands: dict[str, str], **env: str) -> subprocess.CompletedProcess[str]:
    """Run .ci/check_machine.sh with these commands alone on the PATH."""
    for name, script in commands.items():
        (folder / name).write_text(f"#!{shutil.which('sh')}\n{script}\n")
        (folder / name).chmod(0o755)
    clean = {name: value for name, value in os.environ.items() if name not in ("CXX", "PYTHON")}
    return subprocess.run(
        [str(shutil.which("sh")), str(REPO / ".ci/check_machine.sh")],
        env={**clean, **env, "PATH": str(folder)},
        capture_output=True,
        text=True,
    )


@pytest.mark.parametrize(
    ("commands", "env", "chosen"),
    [
        ({"python3": THIS_PYTHON, "c++": ""}, {}, "python3"),
        ({"python3": OLD_PYTHON, "python3.12": THIS_PYTHON, "c++": ""}, {}, "python3.12"),
        ({"python3": OLD_PYTHON, "mine": THIS_PYTHON, "c++": ""}, {"PYTHON": "mine"}, "mine"),
        ({"python3": THIS_PYTHON, "ccache": ""}, {"CXX": "ccache g++-12"}, "python3"),
    ],
)
def test_the_first_suitable_python_is_printed(tmp_path, commands, env, chosen):
    done = run_check(tmp_path, commands, **env)
    assert (done.returncode, done.stdout, done.stderr) == (0, f"{chosen}\n", "")


@pytest.mark.parametrize(
    ("commands", "env", "fault", "suggestion"),
    [
        ({"c++": ""}, {}, "no Python 3.10 or newer was found", "apt-get install python3 python3-venv"),
        ({"python3": OLD_PYTHON}, {}, "python3 is: Python 3.9.2", "make demo PYTHON=/path/to/python3.12"),
        ({"python3": THIS_PYTHON}, {"PYTHON": "none"}, "looked for: none", "PYTHON=/path/to/python3.12"),
        ({"python3": BARE_PYTHON, "c++": ""}, {}, "cannot make virtual environments", "apt-get install python3-venv"),
        ({"python3": THIS_PYTHON}, {}, "there is no command c++", "apt-get install g++"),
        # Builds of extensions take the compiler in CXX, and no other.
        ({"python3": THIS_PYTHON, "c++": ""}, {"CXX": "icpx -O2"}, "no command icpx, which CXX names", "unset CXX"),
        # Builds do not search for clang++.
        ({"python3": THIS_PYTHON, "clang++": ""}, {}, "there is no command c++", "apt-get install g++"),
    ],
)
def test_what_is_missing_is_reported_with_what_to_do(tmp_path, commands, env, fault, suggestion):
    done = run_check(tmp_path, commands, **env)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("error: ") and fault in done.stderr and suggestion in done.stderr
    assert "not found\n" not in done.stderr  # the shell's own error


def test_make_stops_at_the_error_and_leaves_nothing_behind(tmp_path):
    (tmp_path / "bin").mkdir()
    for name in ("sh", "make"):
        (tmp_path / "bin" / name).symlink_to(str(shutil.which(name)))
    for name in ("Makefile", "setup.py", "requirements-demo.txt", "bridgetower/__init__.py", ".ci/check_machine.sh"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(REPO / name, tmp_path / name)
    before = sorted(tmp_path.rglob("*"))
    done = subprocess.run(
        ["make", "demo"], cwd=tmp_path, env={"PATH": str(tmp_path / "bin")}, capture_output=True, text=True
    )
    assert done.returncode == 2 and "no Python 3.10 or newer" in done.stderr
    assert sorted(tmp_path.rglob("*")) == before
