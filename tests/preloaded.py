"""Starts Python programs that need not import anything: a server that has done it forks for each.

To import torch, DeepSpeed and transformers takes a process 5 to 15 seconds of a core, and the tests start over a
hundred. ``python preloaded.py ADDRESS SCRIPT ...`` is ``python SCRIPT ...`` by the server at that address: the program
gets the caller's environment, folder, files, signals and limit of a file's size, and the caller its exit status. One
thing is shared that processes of their own would not share: the seed of Python's hashes.
"""

from __future__ import annotations

import atexit
import gc
import json
import os
import resource
import runpy
import selectors
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

# What pretrain/train.py and its like import beyond their settings.
_MODULES = (
    "pretrain.assemble",
    "pretrain.assemble_data",
    "finetune.assemble",
    "finetune.evaluation",
    "bridgetower.engine.run",
    "bridgetower.interop.huggingface",
    # What an engine imports when it is built, torch's compiler among it.
    "deepspeed.runtime.zero.muon.muon_optimizer",
    "deepspeed.ops.op_builder.all_ops",
    "fire",
)
_PASSED_ON = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


class Server:
    """A server process, from its start to `stop`."""

    def __init__(self, environment: dict[str, str]) -> None:
        """Start it; programs may be asked for at once, and wait until it is ready."""
        self._folder = tempfile.TemporaryDirectory(prefix="preloaded")
        self.address = str(Path(self._folder.name) / "socket")
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(self.address)
        listener.listen(64)
        # It ends when its standard input does: with the process that has started it, however that ends.
        self.process = subprocess.Popen(
            [sys.executable, __file__, "--serve", str(listener.fileno())],
            stdin=subprocess.PIPE,
            pass_fds=[listener.fileno()],
            env=environment,
            cwd=Path(__file__).resolve().parent.parent,
        )
        listener.close()

    def stop(self) -> None:
        """End it and what it runs."""
        self.process.communicate()
        self._folder.cleanup()


class _Program(NamedTuple):
    """What a caller asked for."""

    pid: int
    exit: int
    """Can be read when the program has ended."""
    caller: socket.socket


def serve(listener: socket.socket) -> list[str]:
    """Start what callers ask for, until standard input ends.

    Returns: in a new process, the program's arguments.
    """
    waiting = selectors.DefaultSelector()
    waiting.register(sys.stdin, selectors.EVENT_READ)
    waiting.register(listener, selectors.EVENT_READ)
    while True:
        key, _ = waiting.select()[0]  # one at a time: it may make others void
        if key.fileobj is listener:
            caller = listener.accept()[0]
            request, files = _receive(caller)
            pid = os.fork()
            if pid == 0:
                for other in list(waiting.get_map().values()):
                    _close(other.fileobj)
                caller.close()
                return _become(request, files)
            for file in files:
                os.close(file)
            program = _Program(pid, os.pidfd_open(pid), caller)
            waiting.register(program.exit, selectors.EVENT_READ, program)
            waiting.register(caller, selectors.EVENT_READ, program)
            caller.sendall(f"{pid}\n".encode())
        elif key.data is None:
            for other in waiting.get_map().values():
                if other.data is not None:
                    signal.pidfd_send_signal(other.data.exit, signal.SIGKILL)
            os._exit(0)
        elif key.fileobj is key.data.caller:
            signal.pidfd_send_signal(key.data.exit, signal.SIGKILL)  # who asked for it is gone
            waiting.unregister(key.data.caller)
        else:
            _, status = os.waitpid(key.data.pid, 0)
            waiting.unregister(key.data.exit)
            os.close(key.data.exit)
            if key.data.caller in waiting.get_map():
                waiting.unregister(key.data.caller)
                key.data.caller.sendall(f"{os.waitstatus_to_exitcode(status)}\n".encode())
            key.data.caller.close()


def _close(opened: Any) -> None:
    if isinstance(opened, socket.socket):
        opened.close()
    elif opened is not sys.stdin:
        os.close(opened)


def _receive(caller: socket.socket) -> tuple[dict[str, Any], list[int]]:
    text, files, _, _ = socket.recv_fds(caller, 1 << 16, 3)
    while not text.endswith(b"\n"):
        text += caller.recv(1 << 16)
    return json.loads(text), files


def _become(request: dict[str, Any], files: list[int]) -> list[str]:
    for number, file in enumerate(files):
        os.dup2(file, number)
        os.close(file)
    os.environ.clear()
    os.environ.update(request["environment"])
    for number in request["ignored"]:
        signal.signal(number, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, request["file_limit"])
    os.chdir(request["folder"])
    return list(request["arguments"])


def ask(address: str, *arguments: str) -> int:
    """Have the server run a program. Returns: its exit code, negative for a signal."""
    request = {
        "arguments": arguments,
        "environment": dict(os.environ),
        "folder": str(Path.cwd()),
        "file_limit": resource.getrlimit(resource.RLIMIT_FSIZE),
        "ignored": [number for number in _PASSED_ON if signal.getsignal(number) is signal.SIG_IGN],
    }
    with socket.socket(socket.AF_UNIX) as server:
        server.connect(address)
        text = json.dumps(request).encode() + b"\n"
        sent = socket.send_fds(server, [text], [0, 1, 2])
        server.sendall(text[sent:])
        answer = server.makefile()
        pid = int(answer.readline())

        def pass_on(number: int, _: FrameType | None) -> None:
            with suppress(ProcessLookupError):
                os.kill(pid, number)

        for number in _PASSED_ON:
            signal.signal(number, pass_on)
        return int(answer.readline())


def _end_as(code: int) -> None:
    """End this process as the program did."""
    if code < 0:
        signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    sys.exit(code)


def _main(arguments: list[str]) -> None:
    if arguments[0] != "--serve":
        _end_as(ask(*arguments))
    # As a program's own folder is first, which this one's must not be.
    sys.path[0] = str(Path(__file__).resolve().parent.parent)
    gc.disable()  # all of it stays
    for module in _MODULES:
        __import__(module)
    gc.freeze()  # its memory stays shared
    gc.enable()
    gc.set_threshold(10_000, 20, 20)
    sys.argv = serve(socket.socket(fileno=int(arguments[1])))
    sys.path[0] = str(Path(sys.argv[0]).resolve().parent)
    code: Any = 1
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
        code = 0
    except SystemExit as end:
        code = end.code
        if isinstance(code, str):
            sys.stderr.write(f"{code}\n")
    except BaseException:
        sys.excepthook(*sys.exc_info())
    # As at any end of a program; but it need not take apart, module by module, what the server has imported.
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code if isinstance(code, int) else int(code is not None))


if __name__ == "__main__":
    _main(sys.argv[1:])
