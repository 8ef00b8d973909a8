"""What `make demo` says on a machine that lacks something, before anything is installed."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import REPO

THIS_PYTHON = f'exec "{sys.executable}" "$@"'
# Says that it is old, as its version and as its exit code.
OLD_PYTHON = '[ "$1" = --version ] && echo Python 3.9.2 && exit 0; exit 1'
# Debian's before python3-venv is installed.
BARE_PYTHON = f'case "$2" in *ensurepip*) exit 1;; esac; {THIS_PYTHON}'


def check(folder: Path, commands: dict[str, str], **env: str) -> subprocess.CompletedProcess[str]:
    """Run it where these commands are the only ones, beside the shell's own."""
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
def test_the_first_python_that_will_do_is_printed(tmp_path, commands, env, chosen):
    done = check(tmp_path, commands, **env)
    assert (done.returncode, done.stdout, done.stderr) == (0, f"{chosen}\n", "")


@pytest.mark.parametrize(
    ("commands", "env", "wrong", "cure"),
    [
        ({"c++": ""}, {}, "no Python 3.10 or newer was found", "apt-get install python3 python3-venv"),
        ({"python3": OLD_PYTHON}, {}, "python3 is: Python 3.9.2", "make demo PYTHON=/path/to/python3.12"),
        ({"python3": THIS_PYTHON}, {"PYTHON": "none"}, "looked for: none", "PYTHON=/path/to/python3.12"),
        ({"python3": BARE_PYTHON, "c++": ""}, {}, "cannot make virtual environments", "apt-get install python3-venv"),
        ({"python3": THIS_PYTHON}, {}, "there is no command c++", "apt-get install g++"),
        # The builds take the compiler that CXX names, and no other.
        ({"python3": THIS_PYTHON, "c++": ""}, {"CXX": "icpx -O2"}, "no command icpx, which CXX names", "unset CXX"),
        # They do not look for clang++.
        ({"python3": THIS_PYTHON, "clang++": ""}, {}, "there is no command c++", "apt-get install g++"),
    ],
)
def test_what_is_missing_is_said_with_the_cure(tmp_path, commands, env, wrong, cure):
    done = check(tmp_path, commands, **env)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("error: ") and wrong in done.stderr and cure in done.stderr
    assert "not found\n" not in done.stderr  # the shell's own words


def test_make_stops_at_it_and_leaves_nothing_behind(tmp_path):
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
