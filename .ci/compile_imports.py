"""Compile the library files that a run imports, on all cores: ``python .ci/compile_imports.py`` after an install.

pip installs without compiling: of the 20,000 Python files that are installed, a run imports a quarter. Without this,
both ranks of the first run would compile the same files while they start. Where PYTHONDONTWRITEBYTECODE is set, every
process would compile them again; Python does read the bytecode that is kept here.

``.ci/imported_packages.txt`` lists the packages. Modules of other packages are compiled when they are first imported.
To write the list anew:

    export PYTHONPROFILEIMPORTTIME=1
    (make demo; .venv/bin/python -m pytest --collect-only) 2>&1 | .venv/bin/python .ci/compile_imports.py --record
"""

from __future__ import annotations

import compileall
import os
import sys
import sysconfig
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

LIST = Path(__file__).with_name("imported_packages.txt")
SITE_PACKAGES = Path(sysconfig.get_path("purelib"))


def compile_packages(packages: Iterable[str]) -> None:
    """Compile the modules of packages, without those of their subpackages.

    A file that cannot be compiled is left as it is: some are written for another Python version, and of a folder that
    is read-only nothing can be kept. Whoever imports it then compiles it.
    """
    folders = [SITE_PACKAGES.joinpath(*package.split(".")) for package in packages]
    files = [path for folder in folders if os.access(folder, os.W_OK) for path in sorted(folder.glob("*.py"))]
    with ProcessPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        for _ in pool.map(partial(compileall.compile_file, quiet=2), files, chunksize=16):
            pass


def imported_packages(report: Iterable[str]) -> set[str]:
    """Find the installed packages with modules that ``python -X importtime`` reports."""
    modules = {line.rpartition("|")[2].strip() for line in report if line.startswith("import time:")}
    packages = {module.rpartition(".")[0] for module in modules} - {""}
    return {package for package in packages if SITE_PACKAGES.joinpath(*package.split(".")).is_dir()}


def main() -> None:
    """Compile the listed packages, or write the list."""
    if sys.argv[1:] == ["--record"]:
        LIST.write_text("\n".join(sorted(imported_packages(sys.stdin))) + "\n")
    else:
        compile_packages(LIST.read_text().split())


if __name__ == "__main__":
    main()
