"""Several servers on copies of one log behind NGINX: restarts, copies that lag, two logs."""

import collections
import itertools
import json
import selectors
import socket
import threading
import time

import pytest
from harness import (
    FIRST,
    KEY,
    TOKEN,
    append,
    cookie_of,
    eventually,
    free_port,
)
from proxies import BELOW, nginx_before
from websockets.sync.client import connect

RETRY_S = 0.3  # a page waits for five seconds, and a server is away for longer
AHEAD_S = (1, 2, 5, 10, 20)  # as the page does it


class Reader:
    """What one page does, without showing anything: its cursor, and the text that came."""

    def __init__(self):
        self.socket = None
        self.due = 0.0  # when to connect
        self.received = b""
        self.cursor, self.start, self.text = "", None, bytearray()
        self.late = self.waits = 0  # servers that were behind us, in a row and in all
        self.shaken = False

    def take(self, data):
        """Return False if the connection is of no more use."""
        self.received += data
        if not self.shaken:
            head, end, rest = self.received.partition(b"\r\n\r\n")
            if not end:
                return True
            if not head.startswith(b"HTTP/1.1 101 "):
                return False
            self.shaken, self.received = True, rest
        while message := self.next_message():
            opcode, payload = message
            if opcode == 8 or (opcode == 1 and not self.read(json.loads(payload))):
                return False
        return True

    def next_message(self):
        data = self.received
        if len(data) < 2:
            return None
        size, at = data[1], 2
        if size > 125:
            at = 4 if size == 126 else 10
            size = int.from_bytes(data[2:at], "big")
        if len(data) < at + size:
            return None
        self.received = data[at + size :]
        return data[0] & 15, data[at : at + size]

    def read(self, frame):
        kind = frame["type"]
        if kind == "snapshot":
            if self.cursor and frame["reason"] == "ahead" and self.late < len(AHEAD_S):
                self.due = time.monotonic() + AHEAD_S[self.late]
                self.late += 1
                self.waits += 1
                return False
            assert frame["resumed"] or not self.cursor, frame
            self.late = 0
            self.start = frame["start"] if self.start is None else self.start
        if kind in ("snapshot", "append"):
            assert frame["start"] == self.start + len(self.text), frame
            self.text += frame["text"].encode()
            self.cursor = frame["cursor"]
        states = ("ok", "unknown")  # of the proof, until all of it was read again
        assert kind in ("snapshot", "append", "checked") or frame["state"] in states, frame
        return True


class Readers(threading.Thread):
    """Many of them, in one thread."""

    def __init__(self, server, path, count):
        super().__init__(daemon=True)
        self.address, self.path = ("127.0.0.1", server.port), path
        self.readers = [Reader() for _ in range(count)]
        self.selector = selectors.DefaultSelector()
        self.over = threading.Event()
        self.errors, self.answers = [], collections.Counter()

    def run(self):
        try:
            while not self.over.is_set():
                self.turn()
        except BaseException as error:
            self.errors.append(error)
        for reader in self.readers:
            self.part(reader)

    def turn(self):
        now = time.monotonic()
        for reader in self.readers:
            if not reader.socket and reader.due < now:
                self.join_stream(reader)
        for key, _ in self.selector.select(0.05):
            reader = key.data
            try:
                data = reader.socket.recv(1 << 20)
            except BlockingIOError:
                continue
            except OSError:
                data = b""
            if not data or not reader.take(data):
                self.answers[bytes(reader.received[9:12]) if not reader.shaken else b"101"] += 1
                self.part(reader)
                reader.due = max(reader.due, time.monotonic() + RETRY_S)

    def join_stream(self, reader):
        since = f"?since={reader.cursor}" if reader.cursor else ""
        fields = ["Host: localhost", "Upgrade: websocket", "Connection: Upgrade"]
        fields += [f"Sec-WebSocket-Key: {KEY}", "Sec-WebSocket-Version: 13"]
        fields += ["Sec-WebSocket-Protocol: audit.v1.json"]
        request = "\r\n".join([f"GET {self.path}/ws/audit{since} HTTP/1.1", *fields, "", ""])
        reader.socket = socket.create_connection(self.address, 15)
        reader.socket.sendall(request.encode())
        reader.socket.setblocking(False)
        reader.shaken, reader.received = False, b""
        self.selector.register(reader.socket, selectors.EVENT_READ, reader)

    def part(self, reader):
        if reader.socket:
            self.selector.unregister(reader.socket)
            reader.socket.close()
            reader.socket = None

    def at(self, end):
        """How many have all text up to an offset."""
        if self.errors:
            raise self.errors[0]
        return sum(
            reader.start is not None and reader.start + len(reader.text) == end
            for reader in self.readers
        )


class Copies(threading.Thread):
    """Writes the same lines to several files, to some of them later."""

    def __init__(self, paths, late_s):
        super().__init__(daemon=True)
        self.paths, self.late_s = paths, late_s
        self.over = threading.Event()

    def run(self):
        numbers, begun = itertools.count(), time.monotonic()
        owed = [collections.deque() for _ in self.paths]
        while not self.over.is_set() or any(owed):
            now = time.monotonic()
            if not self.over.is_set():
                entry = "".join(f"line {next(numbers)} – ✅ {now - begun:.3f}\n" for _ in range(7))
                for each, late_s in zip(owed, self.late_s, strict=True):
                    each.append((now + late_s, entry))
            for path, each in zip(self.paths, owed, strict=True):
                while each and each[0][0] <= now:
                    append(path, each.popleft()[1])
            time.sleep(0.2)


@pytest.mark.parametrize(
    ("count", "every_s", "rounds", "late_s"),
    [
        pytest.param(60, 1.5, 4, (0, 0, 1.5), id="60"),
        pytest.param(500, 5, 8, (0, 0, 0.3), id="500", marks=pytest.mark.slow),
        pytest.param(100, 5, 6, (0, 0, 12), id="late", marks=pytest.mark.slow),
    ],
)
def test_viewers_of_three_replicas_get_every_line_once_while_one_after_the_other_restarts(
    count, every_s, rounds, late_s, serve, nginx, tmp_path
):
    copies = [tmp_path / f"{number}" / "app.log" for number in range(3)]
    for path in copies:
        path.parent.mkdir()
        append(path, FIRST)
    ports = [free_port() for _ in copies]
    servers = [serve(path, port=port, dev=False) for path, port in zip(copies, ports, strict=True)]
    readers = Readers(nginx(*servers), BELOW, count)
    writer = Copies(copies, late_s)
    readers.start()
    eventually(lambda: readers.at(len(FIRST.encode())) == count, 30)

    writer.start()
    for number in range(rounds):
        which = number % 3
        began = time.monotonic()
        kill = servers[which].kill if number % 2 else servers[which].stop
        kill()
        time.sleep(every_s * 0.4)
        servers[which] = serve(copies[which], port=ports[which], dev=False)
        time.sleep(max(0, began + every_s - time.monotonic()))
    writer.over.set()
    writer.join()
    size = copies[0].stat().st_size

    try:
        eventually(lambda: readers.at(size) == count, 60)
    finally:
        readers.over.set()
        readers.join()
    whole = copies[0].read_bytes()
    assert {path.read_bytes() for path in copies} == {whole}
    assert {bytes(reader.text) == whole[reader.start :] for reader in readers.readers} == {True}
    assert set(readers.answers) == {b"101"}, readers.answers  # and nobody was refused
    assert late_s[2] < 1 or sum(reader.waits for reader in readers.readers) > 0


def test_a_viewer_for_whom_a_replica_has_no_place_is_sent_on(serve, view, nginx, log):
    append(log, FIRST)
    full, other = serve(log, "--max-viewers", 1), serve(log)
    view(full)
    behind = nginx(full, other)

    viewers = [view(behind, json=True) for _ in range(6)]
    added = append(log, "for all of them\n").decode()

    for viewer in viewers:
        viewer.wait(added)


def test_two_logs_below_one_nginx_do_not_log_each_other_out(serve, tmp_path):
    servers, tokens = {}, {}
    for path in ("/one", "/two"):
        folder = tmp_path / path[1:]
        folder.mkdir()
        tokens[path] = f"{TOKEN}-of-{path[1:]}"
        (folder / "token").write_text(tokens[path])
        append(folder / "app.log", f"this is {path}\n")
        options = ("--token-file", folder / "token", "--trust-proxy")
        servers[path] = [serve(folder / "app.log", *options)]

    with nginx_before(tmp_path, servers) as behind:
        jar, seen = {}, []
        for path in ("/one", "/two", "/one"):
            answer = behind(path).get(f"{path}/?token={tokens[path]}", Cookie=joined(jar))
            name, _, value = cookie_of(answer[1])[0].partition("=")
            jar[name] = value
            seen.append([look(behind(each), each, jar) for each in servers][: len(jar)])

    assert seen == [["this is /one\n"], *[["this is /one\n", "this is /two\n"]] * 2]
    written = (tmp_path / "access.log").read_text()
    assert written.count('"GET /one/" 303') == 2 and TOKEN not in written, written


def joined(jar):
    return "; ".join(f"{name}={value}" for name, value in jar.items())


def look(server, path, jar):
    """Return what the log has, over HTTP and the WebSocket."""
    _, _, body = server.get(f"{path}/api/audit", Cookie=joined(jar))
    if b"this" in body:
        with connect(server.ws, additional_headers={"Cookie": joined(jar)}) as viewer:
            assert viewer.recv(timeout=10).encode() == body
    return body.decode()
