"""Systems that lack what Linux has: macOS does everything without it, Windows is told at once."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from harness import FIRST, SCRIPT, add, append, environment, said_by

# Python runs a module of this name before the script.
LIKE_MACOS = """
import ctypes, fcntl, os, resource, select, socket

LACKING = {
    fcntl: "F_SETPIPE_SZ F_GETPIPE_SZ F_OFD_SETLK F_ADD_SEALS",
    os: "O_TMPFILE O_PATH copy_file_range eventfd fdatasync memfd_create pidfd_open pipe2"
        " posix_fadvise posix_fallocate splice",
    resource: "prlimit RLIMIT_OFILE RLIMIT_RTPRIO",
    select: "epoll",
    socket: "TCP_INFO TCP_CORK TCP_QUICKACK TCP_USER_TIMEOUT SOCK_CLOEXEC SOCK_NONBLOCK"
        " SO_PEERCRED SO_PASSCRED SO_BINDTODEVICE",
}
for module, names in LACKING.items():
    for name in names.split():
        if hasattr(module, name):
            delattr(module, name)

class Library(ctypes.CDLL):
    def __getattr__(self, name):
        if name.startswith(("inotify_", "prctl", "fallocate")):
            raise AttributeError(name)
        return super().__getattr__(name)

ctypes.CDLL = Library
"""
LIKE_WINDOWS = """
import builtins

real = builtins.__import__

def only_what_windows_has(name, names=None, *rest, **more):
    asks = (names or {}).get("__name__")
    if asks == "__main__" and name in ("fcntl", "grp", "pwd", "resource", "termios"):
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)
    return real(name, names, *rest, **more)

builtins.__import__ = only_what_windows_has
"""


@pytest.fixture
def lacking(tmp_path: Path) -> Callable[[str], dict[str, str]]:
    """The environment of a Python that runs this code first."""

    def variables(code: str) -> dict[str, str]:
        folder = tmp_path / "python"
        folder.mkdir()
        (folder / "sitecustomize.py").write_text(code)
        others = os.environ.get("PYTHONPATH", "")
        return {"PYTHONPATH": f"{folder}{os.pathsep}{others}".rstrip(os.pathsep)}

    return variables


def test_without_what_macos_lacks_it_streams_and_searches(
    serve: Callable[..., Any],
    view: Callable[..., Any],
    log: Path,
    lacking: Callable[[str], dict[str, str]],
) -> None:
    append(log, FIRST)
    server = serve(log, "--interval", 0.2, "--initial", 131072, env=lacking(LIKE_MACOS))
    viewer = view(server, json=True).wait(FIRST)
    remarks = said_by(server).splitlines()

    added = add(log, "a", 2000)
    viewer.wait(added)
    log.rename(f"{log}.1")
    added += add(log, "b")
    viewer.wait(added)
    found = [server.get(f"/api/search?q={query}") for query in ("b:", "/^b:.*%5Cd/")]
    resumed = view(server, json=True, since=viewer.cursor).wait(lambda it: it.frames)
    others = [server.get(path)[0] for path in ("/", "/api/audit", "/healthz", "/metrics")]

    assert viewer.joined() == FIRST + added and viewer.reasons() == ["rotated"]
    assert [status for status, _, _ in found] == [200, 200]
    assert all(body.count(b'"start"') == 10 for _, _, body in found)
    assert resumed.frames[0]["resumed"] and others == [200] * 4
    assert server.stop() == 0 and len(remarks) <= 1  # that there are no events


def test_without_fcntl_the_start_is_one_clear_line(
    log: Path, lacking: Callable[[str], dict[str, str]]
) -> None:
    command = [sys.executable, "-W", "error", str(SCRIPT), "--log", str(log), "--port", "0"]
    variables = environment(**lacking(LIKE_WINDOWS))

    finished = subprocess.run(command, capture_output=True, text=True, timeout=20, env=variables)

    assert (finished.returncode, finished.stdout) == (1, "")
    assert len(finished.stderr.splitlines()) == 1 and "fcntl" in finished.stderr
