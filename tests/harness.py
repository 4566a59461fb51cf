"""What the tests share: the server as a real process, a log, viewers that remember what came."""

import atexit
import contextlib
import functools
import gzip
import http.client
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlencode, urlsplit

from fork_server import ForkedProcess, ForkServer
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import connect
from websockets.typing import Subprotocol

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "audit_stream.py"
KEY = "dGhlIHNhbXBsZSBub25jZQ=="
FORBID_INOTIFY = 'echo 0 > /proc/sys/user/max_inotify_instances; exec "$@"'
NO_INOTIFY = ("unshare", "--user", "--map-root-user", "sh", "-c", FORBID_INOTIFY, "sh")
ACCESS = "audit_stream: access "  # how the lines of the access record begin
FOREIGN_VARIABLES = (
    "AUDIT_STREAM_TOKEN",
    "CREDENTIALS_DIRECTORY",
    "NOTIFY_SOCKET",
    "WATCHDOG_USEC",
)


def eventually(
    condition: Callable[[], Any], seconds: float = 10, message: str = "it never happened"
) -> Any:
    """What condition() returns, as soon as that is true; AssertionError after so many seconds."""
    deadline = time.monotonic() + seconds
    pauses = growing_pauses()
    while not (result := condition()):
        assert time.monotonic() < deadline, f"{message} (waited {seconds} s)"
        time.sleep(next(pauses))
    return result


def growing_pauses() -> Iterator[float]:
    """Seconds between two looks: to look costs both sides, so the longer it takes, the fewer."""
    pause = 0.01
    while True:
        yield pause
        pause = min(0.1, 1.2 * pause)


def append(path: Path, text: str | bytes) -> bytes:
    """Write at the end of a file in one go, as a program would; the bytes written."""
    data = text.encode() if isinstance(text, str) else text
    with open(path, "ab", buffering=0) as file:
        view = memoryview(data)
        while view:
            view = view[file.write(view) :]
    return data


def lines(count: int, start: int = 0) -> str:
    entry = "[2025-12-17T17:40:37Z] Auto-repair: entry {:08d} – ✅ checked PostgreSQL database\n"
    return "".join(entry.format(number) for number in range(start, start + count))


FIRST = lines(20)  # what a log holds when a test begins


def add(path: Path, tag: str, count: int = 10) -> str:
    """Lines that begin with another byte than those of `lines`."""
    return append(
        path, "".join(f"{tag}: entry {number} – ✅\n" for number in range(count))
    ).decode()


def shift(log: Path) -> None:
    """log.1 becomes log.2 and so on, as logrotate does it."""
    for number in range(63, 0, -1):
        for packed in ("", ".gz"):
            with contextlib.suppress(FileNotFoundError):
                os.rename(f"{log}.{number}{packed}", f"{log}.{number + 1}{packed}")
    log.rename(f"{log}.1")


def pack(path: Path) -> None:
    with gzip.open(f"{path}.gz", "wb") as packed:
        packed.write(path.read_bytes())
    path.unlink()


def rotated(log: Path, tags: str = "b", packed: tuple[int, ...] = (), count: int = 10) -> str:
    """Once for each tag; these rotated files are packed in the end; what was written."""
    added = add(log, "a")
    for tag in tags:
        shift(log)
        added += add(log, tag, count)
    for number in packed:
        pack(Path(f"{log}.{number}"))
    return added


def numbered_files(log: Path, files: int, count: int) -> list[bytes]:
    """A log and the files before it, the oldest of them packed; what is in each, oldest first."""
    contents = []
    for number in range(files):
        if number:
            shift(log)
        contents.append(append(log, lines(count, number * 1000)))
    pack(Path(f"{log}.{files - 1}"))
    return contents


def rotated_to_dates(log: Path, separators: str) -> str:
    added = add(log, "a")
    for day, (separator, tag) in enumerate(zip(separators, "bcd", strict=False), 17):
        log.rename(f"{log}{separator}202512{day}")
        added += add(log, tag)
    return added


def copied_and_truncated(log: Path) -> str:
    added = add(log, "a")
    shutil.copy(log, f"{log}.1")
    os.truncate(log, 0)
    return added + add(log, "b")


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


def environment(**variables: str) -> dict[str, str]:
    """Return our own environment without what would change how the script starts, and these."""
    others = {name: value for name, value in os.environ.items() if name not in FOREIGN_VARIABLES}
    return others | {"PYTHONDONTWRITEBYTECODE": ""} | variables


def run(*arguments: object, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run the script to its end."""
    words = list(map(str, arguments))
    if options:
        options = {"cwd": SCRIPT.parent, "env": environment()} | options
        command = [*python(), *words]
        return subprocess.run(command, capture_output=True, text=True, timeout=20, **options)

    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        process = fork_server().start(*words, out=out.fileno(), err=err.fileno())
        code = process.wait(20)
        out.seek(0)
        err.seek(0)
        return subprocess.CompletedProcess(words, code, out.read(), err.read())


def flags(dev: bool) -> list[str]:
    return [*(("-X", "dev") if dev else ()), "-W", "error"]


def python(dev: bool = True) -> list[str]:
    """How the script is started: as a module, which Python keeps compiled. It halves a start."""
    return [sys.executable, *flags(dev), "-m", SCRIPT.stem]


@functools.cache
def fork_server(dev: bool = True) -> ForkServer:
    """Return what starts the script where no other program and no variable has to come before."""
    server = ForkServer(*flags(dev), module=SCRIPT, variables=environment())
    atexit.register(server.close)
    return server


class Server:
    """One process of the server, reachable when the constructor returns."""

    def __init__(
        self,
        log: Path,
        *options: object,
        folder: Path,
        dev: bool = True,
        port: int = 0,
        env: dict[str, str] | None = None,
        prefix: tuple[str, ...] = (),
        output: str | None = None,
    ) -> None:
        """Start it; `prefix` runs before the interpreter (prlimit …).

        `output` takes both output streams and needs a port.
        """
        self.log = log
        self.expected_to_die = False
        self._out, self._err = (Path(output or folder / name) for name in ("stdout", "stderr"))
        chosen = () if "--demo" in options else ("--log", str(log))
        arguments = [*chosen, "--port", str(port), *map(str, options)]
        self.process: subprocess.Popen[bytes] | ForkedProcess
        with open(self._out, "ab") as out, open(self._err, "ab") as err:
            if not prefix and not env:
                streams = {"out": out.fileno(), "err": err.fileno()}
                self.process = fork_server(dev).start(*arguments, **streams)
            else:
                self.process = subprocess.Popen(
                    [*prefix, *python(dev), *arguments],
                    stdin=subprocess.DEVNULL,
                    stdout=out,
                    stderr=err,
                    cwd=SCRIPT.parent,
                    env=environment(**env or {}),
                )
        try:
            self.url = f"http://127.0.0.1:{port}/" if output else self._announced()
            parts = urlsplit(self.url)
            self.host, self.port = parts.hostname or "", parts.port or 80
            self.ws = f"ws://{parts.netloc}/ws/audit"
            if output:
                eventually(self.listens, message="the port never opened")
        except BaseException:
            self.kill()
            raise

    def _announced(self) -> str:
        def first_line() -> str:
            assert self.process.poll() is None, (
                f"exit code {self.process.returncode}: {self.errors()}"
            )
            line, newline, _ = self._out.read_text().partition("\n")
            return line if newline else ""

        return str(eventually(first_line, message="no URL on standard output"))

    def listens(self) -> bool:
        try:
            self.connect().close()
        except OSError:
            return False
        return True

    def errors(self) -> str:
        """Return standard error without the access record."""
        said = self._err.read_text(errors="replace") if self._err.is_file() else ""
        return "".join(line for line in said.splitlines(True) if not line.startswith(ACCESS))

    def record(self) -> list[str]:
        """Return the lines of the access record, without what they all begin with."""
        said = self._err.read_text(errors="replace").splitlines()
        return [line.removeprefix(ACCESS) for line in said if line.startswith(ACCESS)]

    def output(self) -> str:
        return self._out.read_text(errors="replace")

    def memory(self) -> int:
        """Resident bytes."""
        return int(Path(f"/proc/{self.process.pid}/statm").read_text().split()[1]) * os.sysconf(
            "SC_PAGE_SIZE"
        )

    def peak(self) -> int:
        """The most resident bytes so far."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return 1024 * int(status.partition("VmHWM:")[2].split()[0])

    def cpu(self) -> float:
        """Processor seconds of all threads."""
        spent = Path(f"/proc/{self.process.pid}/task").glob("*/schedstat")
        return sum(int(file.read_text().split()[0]) for file in spent) / 1e9

    def sockets(self) -> int:
        count = 0
        for path in Path(f"/proc/{self.process.pid}/fd").iterdir():
            with contextlib.suppress(FileNotFoundError):
                count += os.readlink(path).startswith("socket:")
        return count

    def connect(
        self, receive_buffer: int | None = None, source: str | None = None
    ) -> socket.socket:
        """A bare TCP connection, from the address `source`."""
        family = socket.AF_INET6 if ":" in self.host else socket.AF_INET
        client = socket.socket(family, socket.SOCK_STREAM)
        if receive_buffer:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        client.settimeout(15)
        try:
            if source:
                client.bind((source, 0))
            client.connect((self.host, self.port))
        except OSError:
            client.close()
            raise
        return client

    def get(
        self, path: str, *, method: str = "GET", source: str | None = None, **headers: str
    ) -> tuple[int, http.client.HTTPMessage, bytes]:
        """`If_Match="…"` is the header If-Match; `source` is the address that asks."""
        connection = http.client.HTTPConnection(
            self.host, self.port, timeout=15, source_address=(source, 0) if source else None
        )
        with contextlib.closing(connection):
            fields = {name.replace("_", "-"): text for name, text in headers.items()}
            connection.request(method, path, headers=fields)
            answer = connection.getresponse()
            return answer.status, answer.headers, answer.read()

    def raw(self, request: bytes) -> bytes:
        """What comes back for these bytes until the server closes."""
        with self.connect() as client, contextlib.suppress(ConnectionResetError):
            client.sendall(request)
            return b"".join(iter(lambda: client.recv(65536), b""))
        return b""

    def websocket_request(
        self, *fields: str, host: str | None = None, path: str = "/ws/audit"
    ) -> bytes:
        asked = [f"Host: {host or f'127.0.0.1:{self.port}'}", "Upgrade: websocket"]
        asked += ["Connection: Upgrade", f"Sec-WebSocket-Key: {KEY}", "Sec-WebSocket-Version: 13"]
        return "\r\n".join([f"GET {path} HTTP/1.1", *asked, *fields, "", ""]).encode()

    def upgrade(
        self, *headers: str, query: str = "", receive_buffer: int | None = None
    ) -> socket.socket:
        """A WebSocket of which only the handshake has been read."""
        client = self.connect(receive_buffer)
        client.sendall(self.websocket_request(*headers, path=f"/ws/audit{query}"))
        answer = b""
        while not answer.endswith(b"\r\n\r\n"):
            piece = client.recv(1)
            assert piece, f"no handshake: {answer!r}"
            answer += piece
        assert answer.startswith(b"HTTP/1.1 101 "), answer
        return client

    def is_stopped(self) -> bool:
        """Return True after SIGSTOP, proc_pid_stat(5)."""
        stat = Path(f"/proc/{self.process.pid}/stat").read_text()
        return stat.rpartition(")")[2].split()[0] == "T"

    @contextlib.contextmanager
    def looking_away(self) -> Iterator[None]:
        """The process stands still meanwhile."""
        self.process.send_signal(signal.SIGSTOP)
        eventually(self.is_stopped)
        try:
            yield
        finally:
            self.process.send_signal(signal.SIGCONT)

    def stop(self, how: int = signal.SIGTERM, within: float = 2) -> int:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGCONT)
            self.process.send_signal(how)
        try:
            return self.process.wait(within)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
            raise AssertionError(
                f"still running {within} s after the signal: {self.errors()}"
            ) from None

    def kill(self) -> None:
        self.expected_to_die = True
        self.process.kill()
        self.process.wait()

    def check(self) -> None:
        """Stop it, if it still runs; it must have nothing to be ashamed of."""
        code = self.stop()
        if not self.expected_to_die:
            assert code == 0, f"exit code {code}: {self.errors()}"
            assert "Traceback" not in self.errors() and "Warning" not in self.errors(), (
                self.errors()
            )


class HeldSocket(socket.socket):
    """A socket whose reader can be slow (bytes a second) or stopped."""

    pace: int | None = None

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.gate = threading.Event()
        self.gate.set()

    def recv(self, size: int, *flags: int) -> bytes:
        self.gate.wait()
        data = super().recv(min(size, max(self.pace // 4, 256)) if self.pace else size, *flags)
        if self.pace:
            time.sleep(len(data) / self.pace)
        return data


class Viewer:
    """A WebSocket client; a thread notes what comes and when."""

    def __init__(
        self,
        server: Server,
        *,
        json: bool = False,
        since: str | None = None,
        receive_buffer: int | None = None,
        pace: int | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        self.json = json
        self.frames: list[Any] = []
        self.times: list[float] = []
        self.received = 0  # bytes of log
        self.over = False
        self._text = ""
        self._read = 0
        self._news = threading.Condition()
        self._stack = contextlib.ExitStack()
        self._socket = HeldSocket(
            socket.AF_INET6 if ":" in server.host else socket.AF_INET, socket.SOCK_STREAM
        )
        self._socket.pace = pace
        if receive_buffer:
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        self._stack.callback(self._socket.close)
        self._socket.connect((server.host, server.port))
        self.connection = self._stack.enter_context(
            connect(
                server.ws + (f"?{urlencode({'since': since})}" if since is not None else ""),
                sock=self._socket,
                subprotocols=[Subprotocol("audit.v1.json")] if json else None,
                additional_headers=headers,
                max_size=2**20 - 1,
                ping_interval=None,
                close_timeout=1,
            )
        )
        self._thread = threading.Thread(target=self._collect, daemon=True)
        self._thread.start()

    def _collect(self) -> None:
        with contextlib.suppress(ConnectionClosed):
            for message in self.connection:
                self._note(message)
        with self._news:
            self.over = True
            self._news.notify_all()

    def _note(self, message: Any) -> None:
        frame = json.loads(message) if self.json else message
        with self._news:
            self.frames.append(frame)
            self.times.append(time.monotonic())
            text = frame if isinstance(frame, str) else frame.get("text", "")
            self.received += len(text.encode())
            self._news.notify_all()

    @property
    def text(self) -> str:
        fresh = self.frames[self._read :]
        self._read += len(fresh)
        self._text += "".join(
            frame if isinstance(frame, str) else frame.get("text", "") for frame in fresh
        )
        return self._text

    @property
    def cursor(self) -> str:
        return next(str(frame["cursor"]) for frame in reversed(self.frames) if "cursor" in frame)

    def of(self, kind: str) -> list[dict[str, Any]]:
        return [frame for frame in self.frames if frame["type"] == kind]

    def joined(self) -> str:
        """Return the text, once the JSON frames join: no gap, no overlap, bytes that add up."""
        snapshot, *later = [frame for frame in self.frames if "cursor" in frame]
        assert snapshot["type"] == "snapshot" and snapshot["end"] - snapshot["start"] == len(
            snapshot["text"].encode()
        )
        current, ends = snapshot["generation"], {snapshot["generation"]: snapshot["end"]}
        for frame in later:
            if frame["type"] == "generation":
                current = frame["generation"]
                ends[current] = frame["start"]
                continue
            name = frame.get("generation", current)
            assert frame["start"] == ends[name] < frame["end"], (
                f"{frame!r:.300} does not join {ends}"
            )
            assert frame["type"] != "append" or frame["end"] - frame["start"] == len(
                frame["text"].encode()
            ), frame
            ends[name] = frame["end"]
        return self.text

    def texts(self) -> list[str]:
        """The text of each generation, in the order of their first appearance."""
        texts: dict[str, str] = {}
        for frame in self.frames:
            if "generation" in frame:
                texts[frame["generation"]] = texts.get(frame["generation"], "") + frame.get(
                    "text", ""
                )
        return list(texts.values())

    def states(self) -> list[str]:
        return [frame["state"] for frame in self.of("state")]

    def reasons(self) -> list[str]:
        """Why generations ended."""
        return [frame["reason"] for frame in self.of("generation")]

    def wait(self, wanted: str | Callable[["Viewer"], Any], seconds: float = 10) -> "Viewer":
        """Until the text contains `wanted`, or wanted(self) is true."""

        def holds() -> Any:
            return wanted in self.text if isinstance(wanted, str) else wanted(self)

        with self._news:
            if not self._news.wait_for(lambda: holds() or self.over, seconds) or not holds():
                last = "\n".join(repr(frame)[-300:] for frame in self.frames[-5:])
                end = (
                    f"closed with {self.connection.close_code}"
                    if self.over
                    else f"nothing for {seconds} s"
                )
                raise AssertionError(f"{end}; {len(self.frames)} frames, the last ones:\n{last}")
        return self

    def closed(self, seconds: float = 10) -> int:
        """The close code, once the connection has ended."""
        self._thread.join(seconds)
        assert self.over, f"still open after {seconds} s"
        return self.connection.close_code or 1006

    def hold(self) -> None:
        self._socket.gate.clear()

    def release(self) -> None:
        self._socket.gate.set()

    def hurry(self) -> None:
        self._socket.pace = None

    def close(self) -> None:
        self.release()
        self.hurry()
        self._stack.close()
        self._thread.join(5)


def start(
    serve: Callable[..., Server],
    view: Callable[..., "Viewer"],
    log: Path,
    how: str = "live",
    **options: Any,
) -> tuple[Server, "Viewer"]:
    """A server with a viewer that has seen the first lines."""
    append(log, FIRST)
    options.setdefault("prefix", NO_INOTIFY if how == "polling" else ())
    server = serve(log, "--initial", 131072, "--interval", 0.3, **options)
    return server, view(server, json=True).wait(FIRST)


# -- requests, and who makes them ------------------------------------------------------------------

TOKEN, OTHER = "Zr0qVt7-example-token", "another-example-token"
RIGHT = f"Bearer {TOKEN}"
API = (
    "/api/audit",
    "/api/search?q=entry",
    "/api/timeline",
    "/api/seek?time=2025-12-17T17:40:37Z",
    "/api/receipt",
)
PATHS = ("/", *API, "/metrics", "/other")


def handshake(
    server: Server,
    *fields: str,
    host: str | None = None,
    path: str = "/ws/audit",
    query: str = "",
    source: str | None = None,
) -> int:
    """The status of a request for a WebSocket."""
    with server.connect(source=source) as client:
        client.sendall(server.websocket_request(*fields, host=host, path=path + query))
        return int(client.recv(65536).split()[1])


def said_by(server: Server) -> str:
    """Return standard error without what asyncio's debug mode remarks on a busy machine."""
    return "".join(line for line in server.errors().splitlines(True) if "Executing <" not in line)


def status(server: Server, path: str = "/", **headers: str) -> int:
    return server.get(path, **headers)[0]


def launch(
    *arguments: object, env: dict[str, str] | None = None, **options: Any
) -> tuple[int, str]:
    """A start that is to fail: the one line on standard error, with the exit code."""
    command = [sys.executable, "-W", "error", str(SCRIPT), "--port", "0", *map(str, arguments)]
    chosen: Any = {"stdin": subprocess.DEVNULL, "capture_output": True} | options
    finished = subprocess.run(command, timeout=10, env=environment(**(env or {})), **chosen)
    said = finished.stderr.decode()
    assert not finished.stdout and len(said.splitlines()) == 1 and "Traceback" not in said, (
        finished.stdout,
        said,
    )
    return finished.returncode, said


def cookie_of(headers: http.client.HTTPMessage) -> tuple[str, set[str]]:
    """Name=value of the cookie in an answer, and its attributes."""
    (cookie,) = headers.get_all("Set-Cookie", [])
    pair, *attributes = cookie.split("; ")
    return pair, set(attributes)


def policy_of(headers: http.client.HTTPMessage) -> dict[str, set[str]]:
    directives = (directive.split() for directive in headers["Content-Security-Policy"].split(";"))
    return {name: set(values) for name, *values in directives}


SAMPLE = re.compile(
    r'(audit_stream_[a-z0-9_]+)(\{(?:[a-z_]+="(?:[^"\\\n]|\\[\\"n])*",?)*\})?'
    r" (-?[0-9.e+-]+|NaN|[+-]Inf)"
)


def samples(server: Server) -> dict[str, float]:
    """{name with labels: value}, of a text whose every sample follows the TYPE of its family."""
    code, headers, body = server.get("/metrics", Authorization=RIGHT)
    assert code == 200 and headers["Content-Type"].startswith("text/plain") and body.endswith(b"\n")
    values: dict[str, float] = {}
    family, seen = "", set()
    for line in body.decode().splitlines():
        if declared := re.fullmatch(r"# TYPE (audit_stream_[a-z0-9_]+) (counter|gauge)", line):
            family, kind = declared.groups()
            assert family not in seen and (kind == "counter") == family.endswith("_total")
            seen.add(family)
        elif not line.startswith("# HELP "):
            assert (sample := SAMPLE.fullmatch(line)), line
            name, labels, value = sample.groups()
            assert name == family and name + (labels or "") not in values, line
            values[name + (labels or "")] = float(value)
    return values


def of(values: dict[str, float], *words: str) -> float:
    """The sum of the samples whose names have all these words."""
    return sum(value for name, value in values.items() if all(word in name for word in words))


def exchange(server: Server, first: bytes, *later: bytes) -> bytes:
    """Send part after part; return what is answered until the server closes.

    For that it is shown the end, unless it was quicker.
    """
    answer = bytearray()
    with server.connect() as client, contextlib.suppress(ConnectionError):
        client.sendall(first)
        for part in later:
            answer += client.recv(65536)
            client.sendall(part)
        client.settimeout(0.1)
        with contextlib.suppress(TimeoutError):
            while piece := client.recv(65536):
                answer += piece
        client.settimeout(15)
        client.shutdown(socket.SHUT_WR)
        while piece := client.recv(65536):
            answer += piece
    return bytes(answer)


# -- reads that fail -------------------------------------------------------------------------------

FAULTS = """
import os, time
real = os.pread

def pread(fd, size, offset):
    data = real(fd, size, offset)
    with open(os.environ["FAULTS"]) as file:
        fault = file.read().split()
    if fault[:1] == ["slow"] and size >= 65536:
        time.sleep(float(fault[1]))
    if fault[:1] == ["flip"] and offset <= int(fault[1]) < offset + len(data) and size >= 65536:
        open(os.environ["FAULTS"], "w").close()
        at = int(fault[1]) - offset
        data = data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]
    return data

os.pread = pread
"""


def faulty(control: Path) -> dict[str, str]:
    return {"PYTHONPATH": str(control.parent), "FAULTS": str(control)}
