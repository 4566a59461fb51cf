"""A fork server: an interpreter that has imported what a program imports, and starts it by fork.

Each start is a process of its own, with its own streams and arguments, and ends as any Python does.
All that is saved is the imports: nine tenths of a start, of a thousand starts.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import IO

LARGEST = 2**16  # bytes of a request
DESCRIPTORS = 256  # more than it has open


class ForkServer:
    """The interpreter that forks; it ends with this process."""

    def __init__(self, *flags: str, module: Path, variables: dict[str, str]) -> None:
        """Import what `module` imports, in an interpreter with these flags and variables."""
        self._requests, theirs = socket.socketpair(type=socket.SOCK_SEQPACKET)
        with theirs:
            command = [sys.executable, *flags, __file__, module.stem, str(theirs.fileno())]
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
                cwd=module.parent,
                env=variables,
            )

    def start(self, *arguments: str, out: int, err: int) -> ForkedProcess:
        """Run the module with these arguments and streams; OSError if the fork server has ended."""
        reading, writing = os.pipe()
        status = open(reading, "rb", buffering=0)  # noqa: SIM115 - closed when the process has ended
        try:
            socket.send_fds(self._requests, [json.dumps(arguments).encode()], [out, err, writing])
        except OSError:
            status.close()
            raise
        finally:
            os.close(writing)
        return ForkedProcess(status)

    def close(self) -> None:
        self._requests.close()
        self._process.wait()


class ForkedProcess:
    """What subprocess.Popen is for a child: this one's parent is a fork of the fork server."""

    def __init__(self, status: IO[bytes]) -> None:
        """Read the number of the process from this pipe; how it ended comes later."""
        self._status = status
        number = status.readline()
        if not number:
            status.close()
            raise ChildProcessError("the fork server has ended: it cannot import the module")
        self.pid = int(number)
        self.returncode: int | None = None

    def poll(self) -> int | None:
        return self._ended_within(0)

    def wait(self, timeout: float | None = None) -> int:
        """Return how it ended; TimeoutExpired after so many seconds."""
        code = self._ended_within(timeout)
        if code is None:
            raise subprocess.TimeoutExpired(str(self.pid), timeout or 0)
        return code

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def _ended_within(self, seconds: float | None) -> int | None:
        if self.returncode is None and select.select([self._status], [], [], seconds)[0]:
            with self._status:
                self.returncode = os.waitstatus_to_exitcode(int(self._status.readline()))
        return self.returncode


def main() -> None:
    """Import what the module does; be the module in each process that answers a request."""
    module, requests = sys.argv[1:]
    sys.path[0] = os.getcwd()
    importlib.import_module(module)
    del sys.modules[module]
    arguments = forked(socket.socket(fileno=int(requests)))
    if arguments is not None:
        sys.argv[1:] = arguments
        runpy.run_module(module, run_name="__main__", alter_sys=True)


def forked(requests: socket.socket) -> list[str] | None:
    """Fork for each request; return its arguments in the new process, None after the last."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for those that wait
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # control-C is for the tests
    while True:
        request, descriptors, _, _ = socket.recv_fds(requests, LARGEST, 3)
        if not request:
            requests.close()
            return None
        if not os.fork():
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            *streams, status = descriptors
            if child := os.fork():
                tell_how_it_ends(child, status)
            signal.signal(signal.SIGINT, signal.default_int_handler)
            for number, stream in enumerate(streams, 1):
                os.dup2(stream, number)
            requests.detach()
            os.closerange(3, DESCRIPTORS)
            return list(json.loads(request))
        for descriptor in descriptors:
            os.close(descriptor)


def tell_how_it_ends(child: int, status: int) -> None:
    """Write what ForkedProcess reads, and end."""
    os.write(status, b"%d\n" % child)
    os.write(status, b"%d\n" % os.waitpid(child, 0)[1])
    os._exit(0)


if __name__ == "__main__":
    main()
