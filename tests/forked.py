"""Python commands in processes of their own that start at once: forks of one that has imported what training needs.

From scratch a process spends some three seconds in imports before its first line, and tests of many ranks start many.
"""

from __future__ import annotations

import atexit
import concurrent.futures
import contextlib
import faulthandler
import functools
import importlib
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys

IMPORTS = ("torch", "torch._dynamo", "torch.distributed", "PIL.Image", "matplotlib.figure", "sklearn.datasets")
IMPORTS += ("nfkernels.cli", "nfkernels.models", "nfkernels.integrations", "nfkernels.training.commands")


class Process:
    """``python *command`` in an environment and a folder. Of ``subprocess.Popen`` it has what tests use."""

    def __init__(self, command: list[str], *, env: dict[str, str], cwd: object = None) -> None:
        order = {"command": command, "env": env, "cwd": os.path.abspath(cwd or os.getcwd())}
        pipes = [os.pipe() for _ in range(3)]
        socket.send_fds(_server(), [json.dumps(order).encode()], [write for _, write in pipes])
        for _, write in pipes:
            os.close(write)
        self.stdout, self.stderr, self._told = (os.fdopen(read, encoding="utf-8") for read, _ in pipes)
        self.pid = int(self._told.readline())
        self.returncode: int | None = None

    def poll(self) -> int | None:
        if self.returncode is None and select.select([self._told], [], [], 0)[0]:
            self.returncode = os.waitstatus_to_exitcode(int(self._told.readline()))
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def communicate(self, timeout: float) -> tuple[str, str]:
        """What it wrote to its end, and the status."""
        with concurrent.futures.ThreadPoolExecutor(3) as readers:
            out, err, told = (readers.submit(stream.read) for stream in (self.stdout, self.stderr, self._told))
            try:
                found = out.result(timeout), err.result(timeout)
                status = told.result(timeout)
            except concurrent.futures.TimeoutError:
                os.kill(self.pid, signal.SIGABRT)  # it tells where each of its threads is
                raise TimeoutError(f"still running after {timeout} s:\n{err.result(20)}") from None
        if self.returncode is None:
            self.returncode = os.waitstatus_to_exitcode(int(status))
        return found


@functools.cache
def _server() -> socket.socket:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with theirs:
        command = [sys.executable, "-W", "ignore", __file__, str(theirs.fileno())]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        process = subprocess.Popen(command, env=environment, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL)
    atexit.register(lambda: (ours.close(), process.wait(20)))
    return ours


# --- in the server ----------------------------------------------------------------------------------------------------


def serve(orders: socket.socket) -> list[str]:
    """Forks at every order and tells its process id, then its status. Returns in the forks, with their command."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    while True:
        message, streams, *_ = socket.recv_fds(orders, 2**20, 3)
        if not message:  # the tests have ended
            os._exit(0)
        if os.fork():
            for stream in streams:
                os.close(stream)
            continue
        orders.close()
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        out, err, told = streams
        if child := os.fork():
            os.close(out)
            os.close(err)
            os.write(told, f"{child}\n".encode())
            os.write(told, f"{os.waitpid(child, 0)[1]}\n".encode())
            os._exit(0)
        os.close(told)
        os.dup2(out, 1)
        os.dup2(err, 2)
        os.close(out)
        os.close(err)
        os.setsid()
        sys.stdout, sys.stderr = (
            os.fdopen(number, "w", 1 if number == 2 else -1, encoding="utf-8") for number in (1, 2)
        )
        order = json.loads(message)
        faulthandler.enable(all_threads=True)
        os.environ.clear()
        os.environ.update(order["env"])
        os.chdir(order["cwd"])
        return order["command"]


def become(command: list[str]) -> None:
    kind, *rest = command
    sys.path[0] = "" if kind in ("-c", "-m") else os.path.dirname(os.path.abspath(kind))
    sys.path[1:1] = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
    if kind == "-m":
        sys.argv = rest
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    elif kind == "-c":
        sys.argv = ["-c", *rest[1:]]
        exec(compile(rest[0], "<string>", "exec"), {"__name__": "__main__"})
    else:
        sys.argv = command
        runpy.run_path(kind, run_name="__main__")


if __name__ == "__main__":
    received = socket.socket(fileno=int(sys.argv[1]))
    for name in IMPORTS:
        with contextlib.suppress(ImportError):  # whoever needs it will tell
            importlib.import_module(name)
    sys.modules["torch"].set_num_threads(1)
    become(serve(received))
