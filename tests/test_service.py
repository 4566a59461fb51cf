"""audit-stream.service: what systemd thinks of it, and what the server tells systemd."""

import itertools
import os
import re
import shlex
import shutil
import signal
import socket
import struct
import subprocess
import sys
import time

import pytest
from browsers import unavailable
from harness import ROOT, add, append, lines

UNIT = ROOT / "audit-stream.service"
PYTHON = "/opt/audit-stream/venv/bin/python"


@pytest.fixture
def analyze():
    program = shutil.which("systemd-analyze")
    if not program:
        unavailable("systemd-analyze is not installed")

    def run(*arguments):
        return subprocess.run([program, *arguments], capture_output=True, text=True, timeout=60)

    return run


def test_systemd_has_nothing_to_say_about_the_unit(analyze, tmp_path):
    unit = tmp_path / UNIT.name
    unit.write_text(UNIT.read_text().replace(f"ExecStart={PYTHON}", f"ExecStart={sys.executable}"))

    finished = analyze("verify", str(unit))

    assert (finished.returncode, finished.stdout, finished.stderr) == (0, "", "")


def test_the_unit_is_exposed_to_little(analyze):
    finished = analyze("security", "--offline=true", str(UNIT))

    score = re.search(r"Overall exposure level for \S+: ([\d.]+)", finished.stdout)
    assert score and float(score[1]) <= 1.2, finished.stdout + finished.stderr


def test_the_command_of_the_unit_starts_a_locked_server(serve, log, tmp_path):
    append(log, lines(1))
    (tmp_path / "token").write_text("of-the-credential-store\n")
    command = re.search(r"^ExecStart=(.*)", UNIT.read_text(), re.MULTILINE)[1]
    python, *flags = shlex.split(command.replace("%d", str(tmp_path)).replace("${LOG}", str(log)))
    options = flags[flags.index("/opt/audit-stream/audit_stream.py") + 1 :]

    server = serve(log, *options, "--port", 0)

    assert python == PYTHON
    assert (server.get("/healthz")[0], server.get("/")[0]) == (200, 401)
    assert server.get("/", Authorization="Bearer of-the-credential-store")[0] == 200


# -- sd_notify(3) ----------------------------------------------------------------------------------


class Manager:
    """The side of systemd: a datagram socket that notes who said what and when."""

    def __init__(self, address):
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
        self.socket.bind(address)
        self.said = []

    def hear(self, wanted, seconds=10):
        """The sender of this assignment, as soon as it comes."""
        deadline = time.monotonic() + seconds
        while (left := deadline - time.monotonic()) > 0:
            self.socket.settimeout(left)
            data, [(_, _, credentials)], *_ = self.socket.recvmsg(4096, 512)
            self.said += [(time.monotonic(), line) for line in data.decode().split("\n") if line]
            if wanted in data.decode().split("\n"):
                return struct.unpack("3i", credentials)[0]
        raise AssertionError(f"no {wanted} in {seconds} s: {self.said}")


@pytest.fixture(params=["path", "abstract"])
def manager(request, tmp_path_factory):
    """A manager, and how it is called in NOTIFY_SOCKET."""
    name = (
        str(tmp_path_factory.mktemp("notify") / "socket")
        if request.param == "path"
        else f"@audit-{os.getpid()}"
    )
    listening = Manager(name.replace("@", "\0"))
    listening.socket.settimeout(10)
    yield listening, name
    listening.socket.close()


def test_systemd_hears_of_the_start_the_checks_and_the_stop(manager, serve, view, log):
    systemd, name = manager
    server = serve(log, env={"NOTIFY_SOCKET": name, "WATCHDOG_USEC": "1000000"})  # and no log yet

    senders = {systemd.hear("READY=1")}
    reachable = server.listens()
    senders |= {systemd.hear("WATCHDOG=1") for _ in range(4)}
    viewer = view(server).wait(append(log, lines(1)).decode())
    senders |= {systemd.hear("WATCHDOG=1") for _ in range(4)}
    viewer.wait(add(log, "last"))
    server.process.send_signal(signal.SIGTERM)
    senders.add(systemd.hear("STOPPING=1"))

    assert reachable and senders == {server.process.pid}
    assert systemd.said[-1][1] == "STOPPING=1"
    fed = [moment for moment, line in systemd.said if line in ("READY=1", "WATCHDOG=1")]
    assert max(after - before for before, after in itertools.pairwise(fed)) < 1


def test_a_stopped_process_feeds_no_watchdog(manager, serve, log):
    systemd, name = manager
    server = serve(log, env={"NOTIFY_SOCKET": name, "WATCHDOG_USEC": "400000"})
    systemd.hear("WATCHDOG=1")

    with server.looking_away():
        systemd.socket.setblocking(False)
        with pytest.raises(BlockingIOError):
            for _ in range(1000):
                systemd.socket.recv(4096)
        systemd.socket.settimeout(1)
        with pytest.raises(TimeoutError):
            systemd.socket.recv(4096)

    systemd.hear("WATCHDOG=1")


@pytest.mark.parametrize("put", [os.mkdir, os.mkfifo], ids=["folder", "fifo"])
def test_the_watchdog_is_fed_while_there_is_no_log_to_read(put, serve, log, tmp_path):
    put(log)
    systemd = Manager(str(tmp_path / "notify"))
    with systemd.socket:
        serve(log, env={"NOTIFY_SOCKET": str(tmp_path / "notify"), "WATCHDOG_USEC": "1000000"})

        for _ in range(4):
            systemd.hear("WATCHDOG=1", seconds=2)


@pytest.mark.parametrize(
    "address", ["", "/nonexistent/socket", "@nobody-listens-here", "relative", "vsock:2:1"]
)
def test_a_systemd_that_is_not_there_does_no_harm(address, serve, log):
    append(log, lines(1))

    server = serve(log, env={"NOTIFY_SOCKET": address})

    assert server.get("/healthz")[0] == 200 and "NOTIFY" not in server.errors()
