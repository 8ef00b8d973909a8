"""Start Python programs that need not import anything: a server that has imported everything forks for each of them.

``python preloaded.py ADDRESS SCRIPT ...`` runs ``python SCRIPT ...`` by the server at that address. The program gets
the caller's environment, working directory, standard streams, ignored signals and file size limit, and the caller ends
with its exit status. Unlike processes of their own, all programs have the same seed of Python's hashes.

What it saves: `pretrain/train.py tiny` with one step costs 7.7 core-seconds on its own and 1.2 from here, both with
bytecode on disk. The suite has some 75 such starts and as many lighter ones: a third of its time.
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

# What pretrain/train.py and similar scripts import once their settings are read.
_MODULES = (
    "pretrain.assemble",
    "pretrain.assemble_data",
    "finetune.assemble",
    "finetune.evaluation",
    "bridgetower.engine.run",
    "bridgetower.interop.huggingface",
    # DeepSpeed imports these when it builds an engine, and with them torch's compiler.
    "deepspeed.runtime.zero.muon.muon_optimizer",
    "deepspeed.ops.op_builder.all_ops",
    "fire",
)
_FORWARDED_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


class Server:
    """The server process, from its start until `stop`."""

    def __init__(self, environment: dict[str, str]) -> None:
        """Start the server. Programs may be requested at once; they wait until it has imported everything."""
        self._folder = tempfile.TemporaryDirectory(prefix="preloaded")
        self.address = str(Path(self._folder.name) / "socket")
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(self.address)
        listener.listen(64)
        # The server ends when its standard input closes, so it never outlives the process that started it.
        self.process = subprocess.Popen(
            [sys.executable, __file__, "--serve", str(listener.fileno())],
            stdin=subprocess.PIPE,
            pass_fds=[listener.fileno()],
            env=environment,
            cwd=Path(__file__).resolve().parent.parent,
        )
        listener.close()

    def stop(self) -> None:
        """Stop the server and kill the programs that still run."""
        self.process.communicate()
        self._folder.cleanup()


class _Program(NamedTuple):
    """A running program."""

    pid: int
    exit: int
    """File descriptor of the process (pidfd), readable once the program has ended."""
    caller: socket.socket
    """Connection to the process that requested the program."""


def serve(listener: socket.socket) -> list[str]:
    """Fork a process for each request, until standard input closes.

    The server itself never returns from here.

    Returns: in a forked process, the script of its program and the script's arguments.
    """
    waiting = selectors.DefaultSelector()
    waiting.register(sys.stdin, selectors.EVENT_READ)
    waiting.register(listener, selectors.EVENT_READ)
    while True:
        key, _ = waiting.select()[0]  # one event per turn: handling it may close what another event refers to
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
            signal.pidfd_send_signal(key.data.exit, signal.SIGKILL)  # the caller has died
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
    """Read a request and the caller's three standard streams."""
    text, files, _, _ = socket.recv_fds(caller, 1 << 16, 3)
    while not text.endswith(b"\n"):
        text += caller.recv(1 << 16)
    return json.loads(text), files


def _become(request: dict[str, Any], files: list[int]) -> list[str]:
    """Make this process what the request describes. Returns: script and arguments of its program."""
    for stream, file in enumerate(files):
        os.dup2(file, stream)
        os.close(file)
    os.environ.clear()
    os.environ.update(request["environment"])
    for ignored in request["ignored"]:
        signal.signal(ignored, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, request["file_limit"])
    os.chdir(request["folder"])
    return list(request["arguments"])


def ask(address: str, *arguments: str) -> int:
    """Have the server run a program, and wait for it. Returns: its exit code, negative for a signal."""
    request = {
        "arguments": arguments,
        "environment": dict(os.environ),
        "folder": str(Path.cwd()),
        "file_limit": resource.getrlimit(resource.RLIMIT_FSIZE),
        "ignored": [one for one in _FORWARDED_SIGNALS if signal.getsignal(one) is signal.SIG_IGN],
    }
    with socket.socket(socket.AF_UNIX) as server:
        server.connect(address)
        text = json.dumps(request).encode() + b"\n"
        sent = socket.send_fds(server, [text], [0, 1, 2])
        server.sendall(text[sent:])
        answer = server.makefile()
        pid = int(answer.readline())

        def forward(signal_number: int, _: FrameType | None) -> None:
            with suppress(ProcessLookupError):
                os.kill(pid, signal_number)

        for forwarded in _FORWARDED_SIGNALS:
            signal.signal(forwarded, forward)
        return int(answer.readline())


def _end_as(code: int) -> None:
    """End this process with the exit code, or by the signal, with which the program ended."""
    if code < 0:
        signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    sys.exit(code)


def _main(arguments: list[str]) -> None:
    if arguments[0] != "--serve":
        _end_as(ask(*arguments))
    # Python puts the folder of the script first; the server must import from the repository instead.
    sys.path[0] = str(Path(__file__).resolve().parent.parent)
    gc.disable()  # nothing that is imported here is ever freed
    for module in _MODULES:
        __import__(module)
    gc.freeze()  # so that collections in forked processes do not copy these pages
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
    # End as Python does, but without destroying module by module what the server has imported.
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code if isinstance(code, int) else int(code is not None))


if __name__ == "__main__":
    _main(sys.argv[1:])
