"""Every GPU measurement of the project in one call: speed, memory, compiling, recomputing, DeepSpeed, data loading.

python benchmarks/gpu/measure.py --out=benchmarks/results/gpu_h100.json [--minutes=8] [--small] [--device=auto]
    [--sections=NAME,NAME]

Each section is a process of its own, so that a section that dies or takes too long costs the others nothing. The file
is written after each section. benchmarks/gpu/README.md says what is measured, and how to install without a network.
"""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import signal
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

import fire
import torch
from fire.decorators import SetParseFn
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the project need not be installed

from benchmarks.gpu.plan import Request, Section, fastest, plan, seconds_for
from bridgetower.config.cli import parse_bool, parse_whole, refuse_unknown, run_command
from bridgetower.config.overrides import unknown_name
from bridgetower.errors import EXIT_FAILED, ConfigError
from bridgetower.io.files import write_atomically

_FLAGS = {
    "out": "JSON file for the results (required)",
    "minutes": "time for all sections together (default 8); a section that does not fit into what is left is skipped",
    "small": "true runs every path with small shapes, which takes a CPU a minute (default false)",
    "device": "cuda or cpu (default auto: cuda; with --small cuda where there is one)",
    "sections": "names of sections, separated by commas (default all)",
}
_USAGE = "Usage: python benchmarks/gpu/measure.py --out=FILE.json [flags]\n\nFlags:\n" + "\n".join(
    f"  --{name}  {meaning}" for name, meaning in _FLAGS.items()
)
# Pairs per second on an H100, minimum and target: 35 and 50 % of its bf16 peak at the least operations known for a step
# (docs/performance.md).
TARGETS = {"base": (850, 1_210), "large": (245, 350)}


def main(
    *unexpected: str,
    out: str = "",
    minutes: str = "8",
    small: str = "false",
    device: str = "auto",
    sections: str = "",
    **unknown: str,
) -> None:
    """Measure, write after each section, and print a table."""
    refuse_unknown(unexpected, unknown, list(_FLAGS), _USAGE)
    begin, is_small = time.monotonic(), parse_bool("small", small)
    setting: dict[str, Any] = {"minutes": parse_whole("minutes", minutes, 1), "small": is_small}
    if not out:
        raise ConfigError("--out is missing. Name the file for the results: --out=benchmarks/results/gpu_h100.json.")
    setting["device"] = _choose_device(device, is_small)
    chosen = plan(is_small)
    names = [section.name for section in chosen]
    requested = [name.strip() for name in sections.split(",") if name.strip()] or names
    for name in requested:
        if name not in names:
            raise ConfigError(f"--sections: {unknown_name('section', name, names)}")
    # Figures are worth nothing without the machine that they belong to.
    chosen = [section for section in chosen if section.name in ("machine", *requested)]
    file = Path(out).absolute()
    file.parent.mkdir(parents=True, exist_ok=True)
    # A terminated call exits in order, and so leaves no process on the GPU.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    _finish(run_sections(chosen, setting, begin, file))


def run_sections(
    sections: Sequence[Section], setting: Mapping[str, Any], begin: float, file: Path
) -> dict[str, dict[str, Any]]:
    """Run sections one after another, and write the file after each; skip a section that no longer fits.

    Args:
        setting: ``minutes`` for all sections, ``small``, ``device``.
        begin: start of the minutes, on ``time.monotonic``.

    Returns: ``rows``, ``seconds`` and ``error`` (empty, or why the section did not finish) of each section.
    """
    results: dict[str, dict[str, Any]] = {}
    end = begin + 60 * setting["minutes"]
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        context = start_server()
        for index, section in enumerate(sections):
            left = end - time.monotonic()
            seconds = seconds_for(section, sections[index:], left)
            if seconds:
                options = section.options(results)
                request = Request(section.measure, setting["device"], setting["small"], seconds, **options)
                print(f"{section.name}, at most {seconds:.0f} s ...", flush=True)
                results[section.name] = run_section(context, request, Path(folder) / str(index))
            else:
                needs = f"it takes about {section.seconds:.0f} s"
                reason = f"skipped: {needs}, and {max(0.0, left):.0f} s of --minutes={setting['minutes']} are left"
                print(f"{section.name} {reason}", flush=True)
                results[section.name] = {"seconds": 0.0, "error": reason, "rows": []}
            content = {"setting": setting, "seconds": time.monotonic() - begin, "sections": results}
            write_atomically(file, json.dumps(content, indent=1).encode() + b"\n")
    return results


def _choose_device(device: str, small: bool) -> str:
    if device not in ("auto", "cuda", "cpu"):
        raise ConfigError(f"--device={device} is not known. Use auto, cuda or cpu.")
    has_gpu = device != "cpu" and torch.cuda.is_available()
    if not has_gpu and (device == "cuda" or not small):
        why = "--device=cpu excludes it" if device == "cpu" else f"torch {torch.__version__} sees none"
        raise ConfigError(
            f"A GPU is needed, and {why}: base and large would take a CPU hours. Run it on a machine with one "
            "(benchmarks/gpu/README.md), or use --small --device=cpu, which runs every path in a minute."
        )
    return "cuda" if has_gpu else "cpu"


def start_server() -> ForkServerContext:
    """Start a server whose processes have all libraries imported. It never touches CUDA, so its forks can use it."""
    paths = [str(Path(__file__).resolve().parents[2]), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing here comes from a hub; do not wait for one
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["benchmarks.gpu.sections"])
    return context


def run_section(context: ForkServerContext, request: Request, folder: Path) -> dict[str, Any]:
    """Measure a section in a process of its own, which is killed when its time is over.

    Returns: ``rows``, ``seconds``, ``error``, and with an error the end of the process's output as ``log``.
    """
    folder.mkdir()
    request_path, result_path, log = folder / "request.json", folder / "result.json", folder / "log"
    request.write(request_path)
    start = time.monotonic()
    process = context.Process(target=_serve, args=(request_path, result_path, log))
    process.start()
    assert process.pid is not None
    try:
        process.join(request.seconds)
        is_late = process.is_alive()
    finally:
        # Including all processes that it has started.
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
        process.kill()
        process.join()
    result: dict[str, Any] = json.loads(result_path.read_text()) if result_path.exists() else {"rows": [], "error": ""}
    result["seconds"] = time.monotonic() - start
    if is_late:
        result["error"] = f"killed after {request.seconds:.0f} s, its time limit; rows measured before are kept"
    elif process.exitcode:
        result["error"] = f"its process died with exit code {process.exitcode} (-9: probably out of memory)"
    if result["error"]:
        result["log"] = log.read_text()[-2000:] if log.exists() else ""
    return result


def _serve(request_path: Path, result_path: Path, log: Path) -> None:
    """Run a section's process in a process group of its own, with its output in a file."""
    os.setsid()
    with log.open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    from benchmarks.gpu import sections  # imports torch, which the server has imported already

    sections.serve(request_path, result_path)


def _finish(results: Mapping[str, Mapping[str, Any]]) -> None:
    _print(results)
    if any(result["error"] for result in results.values()):
        sys.exit(EXIT_FAILED)


def _print(results: Mapping[str, Mapping[str, Any]]) -> None:
    table = Table(title="Steps of pretraining, forward and backward", title_justify="left")
    for column in (
        "section",
        "what",
        "pairs",
        "pairs/s",
        "ms",
        "GFLOP per pair",
        "of peak",
        "peak GB",
        "kept MB per pair",
    ):
        table.add_column(column, justify="left" if column in ("section", "what") else "right")
    table.add_column("")
    keys = {
        "micro_batch": "{:d}",
        "pairs_per_second": "{:,.1f}",
        "step_ms": "{:,.1f}",
        "gflop_per_pair": "{:,.1f}",
        "mfu": "{:.1%}",
        "peak_gb": "{:.1f}",
        "kept_mb_per_pair": "{:,.0f}",
    }
    for name, result in results.items():
        for row in result["rows"]:
            cells = (form.format(row[key]) if row.get(key) is not None else "" for key, form in keys.items())
            table.add_row(name, row["what"], *cells, row.get("error") or row.get("note", ""))
        if result["error"]:
            table.add_row(name, "[red]error[/red]", *[""] * len(keys), result["error"].splitlines()[0][:300])
    console = Console()
    # A log is not as wide as a terminal, and must not be cut off.
    (console if console.is_terminal else Console(width=200)).print(table)
    for size, (minimum, target) in TARGETS.items():
        loader = "pipeline" if size == "base" else "pipeline_large"
        # The target is for the rate with data loading; the rate of the step alone shows what loading costs.
        for what, names in (("the step alone", (f"steps_{size}", f"compiled_{size}")), ("from JPEGs", (loader,))):
            rows = [row for name in names for row in fastest(results, name) if row["model"].startswith(size)]
            if rows:
                best = max(rows, key=lambda row: float(row["pairs_per_second"]))
                rate = f"{size}, {what}: {best['pairs_per_second']:,.0f} pairs/s, {best['what']}"
                print(f"{rate}; minimum {minimum:,} from JPEGs on an H100, target {target:,}")


if __name__ == "__main__":
    run_command(lambda: fire.Fire(SetParseFn(str)(main)))
