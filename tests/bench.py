"""Measure the server beside a baseline, in one run: python3 tests/bench.py

Each figure stands next to that of something simple on the same machine at the same time: the ratio
is what can be compared between machines.
"""

import contextlib
import ctypes
import gzip
import json
import multiprocessing
import os
import resource
import selectors
import socket
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

from harness import KEY, Server, append, eventually, lines
from websockets.sync.client import connect

MIB = 2**20
IN_MODIFY = 2
END = b"the end of the burst\n"
REQUEST = (
    "GET /ws/audit HTTP/1.1\r\nHost: 127.0.0.1\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
    f"Sec-WebSocket-Key: {KEY}\r\nSec-WebSocket-Version: 13\r\n\r\n"
).encode()


@contextlib.contextmanager
def serving(*options: object) -> Iterator[tuple[Server, Path]]:
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log"
        append(log, lines(10))
        server = Server(log, *options, folder=Path(folder), dev=False)
        try:
            yield server, log
        finally:
            server.check()


def report(what: str, ours: float, baseline: float, unit: str, beside: str) -> None:
    print(
        f"{what:<44} {ours:>9.2f} {unit:<3} {baseline:>9.2f} {unit:<3}"
        f" {ours / baseline:>7.2f} x  {beside}"
    )


# From write() until the line is in the hands of a reader.


def delays(log: Path, read: Callable[[], object], count: int = 300) -> list[float]:
    times = []
    for number in range(count):
        began = time.perf_counter()
        append(log, lines(1, number))
        read()
        times.append(1000 * (time.perf_counter() - began))
        time.sleep(0.025)
    return sorted(times)


def latency() -> None:
    with contextlib.ExitStack() as stack:
        server, log = stack.enter_context(serving())
        viewer = stack.enter_context(server.upgrade())
        viewer.recv(65536)
        ours = delays(log, lambda: viewer.recv(65536))
        port = stack.enter_context(baseline(follow, log))
        reader = stack.enter_context(socket.create_connection(("127.0.0.1", port)))
        reader.recv(1)
        bare = delays(log, lambda: reader.recv(65536))
        tail = stack.enter_context(
            subprocess.Popen(
                ["tail", "-n1", "-F", log], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
            )
        )
        assert tail.stdout
        pipe = tail.stdout.fileno()
        os.read(pipe, 65536)
        theirs = delays(log, lambda: os.read(pipe, 65536))
        tail.terminate()
    for name, place in (("p50", 0.5), ("p95", 0.95), ("max", 0.999)):
        at = int(place * len(ours))
        what = f"append to reader, {name}"
        report(what, ours[at], bare[at], "ms", "an inotify event and a send")
        report(what, ours[at], theirs[at], "ms", "tail -F through a pipe")


def follow(listener: socket.socket, path: Path) -> None:
    """The baseline of one line: wait for the kernel's event, read, send."""
    libc = ctypes.CDLL(None)
    events = libc.inotify_init1(0)
    libc.inotify_add_watch(events, os.fsencode(path), IN_MODIFY)
    client, _ = listener.accept()
    client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    with open(path, "rb", buffering=0) as log:
        log.seek(0, os.SEEK_END)
        client.sendall(b"!")
        while os.read(events, 4096):
            client.sendall(log.read())


# One line to very many.


def fan_out(viewers: int, messages: int = 100) -> None:
    """Measure the processor time of a message, beside a program that does nothing but send it."""
    message = lines(1).encode()

    def whole(last: bytes) -> bool:
        return message in last  # a ping may stand behind it

    with contextlib.ExitStack() as stack:
        server, log = stack.enter_context(serving("--rate-limit", 0))
        clients = [stack.enter_context(server.upgrade()) for _ in range(viewers)]
        ready(clients, lambda last: b"\n" in last)
        before = server.cpu()
        for _ in range(messages):
            append(log, message)
            ready(clients, whole)
        ours = (server.cpu() - before) / messages

    with baseline(send, (viewers, message)) as port, contextlib.ExitStack() as stack:
        address = ("127.0.0.1", port)
        clients = [stack.enter_context(socket.create_connection(address)) for _ in range(viewers)]
        for _ in range(messages):
            clients[0].sendall(b"!")
            ready(clients, whole)
        clients[0].shutdown(socket.SHUT_WR)
        theirs = float(clients[0].recv(100)) / messages
    what = f"processor time of a line to {viewers} viewers"
    report(what, 1000 * ours, 1000 * theirs, "ms", "nothing but send")


def send(listener: socket.socket, what: tuple[int, bytes]) -> None:
    """The baseline of many viewers: who came first gives the word, and all get the message."""
    viewers, message = what
    clients = [listener.accept()[0] for _ in range(viewers)]
    for client in clients:
        client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    before = time.process_time()
    while clients[0].recv(1):
        for client in clients:
            client.send(message)
    clients[0].sendall(str(time.process_time() - before).encode())


# Many bytes to some, some bytes to many.


def ready(clients: list[socket.socket], done: Callable[[bytes], bool]) -> None:
    """Read from all at once until done(the last bytes) is true of each."""
    with selectors.DefaultSelector() as selector:
        last = {selector.register(client, selectors.EVENT_READ).fd: b"" for client in clients}
        while last:
            for key, _ in selector.select():
                data = key.fileobj.recv(MIB)  # type: ignore[union-attr]
                assert data, "closed"
                last[key.fd] = (last[key.fd] + data)[-4096:]
                if done(last[key.fd]):
                    selector.unregister(key.fileobj)
                    del last[key.fd]


def timed(action: Callable[[], object]) -> float:
    began = time.perf_counter()
    action()
    return time.perf_counter() - began


def send_file(listener: socket.socket, path: Path) -> None:
    """The baseline of a burst: whoever connects gets the file."""

    def send(client: socket.socket) -> None:
        with client, open(path, "rb") as file:
            client.sendfile(file)
            client.recv(1)

    while True:
        threading.Thread(target=send, args=listener.accept()[:1]).start()


def answer(listener: socket.socket, reply: bytes) -> None:
    """The baseline of a storm: whoever connects and asks gets an answer."""
    clients = []
    while True:
        client, _ = listener.accept()
        client.recv(4096)
        client.sendall(reply)
        clients.append(client)


@contextlib.contextmanager
def baseline(target: Callable[..., None], argument: object) -> Iterator[int]:
    with socket.create_server(("127.0.0.1", 0), backlog=4096) as listener:
        process = multiprocessing.get_context("fork").Process(
            target=target, args=(listener, argument), daemon=True
        )
        process.start()
        yield listener.getsockname()[1]
        process.kill()
        process.join()


def burst(viewers: int) -> None:
    data = lines(290_000).encode() + END
    with contextlib.ExitStack() as stack:
        server, log = stack.enter_context(serving())
        clients = [stack.enter_context(server.upgrade()) for _ in range(viewers)]
        writer = threading.Thread(target=append, args=(log, data))
        writer.start()
        ours = timed(lambda: ready(clients, lambda last: last.endswith(END)))
        writer.join()
        port = stack.enter_context(baseline(send_file, log))
        clients = [
            stack.enter_context(socket.create_connection(("127.0.0.1", port)))
            for _ in range(viewers)
        ]
        theirs = timed(lambda: ready(clients, lambda last: last.endswith(END)))
    report(
        f"{len(data) / 1e6:.0f} MB to {viewers} viewers",
        1000 * ours,
        1000 * theirs,
        "ms",
        "the file over TCP",
    )


def storm(stack: contextlib.ExitStack, port: int, count: int) -> float:
    """Seconds until so many connections, all begun at once, have their answer."""

    def come() -> None:
        clients = []
        for _ in range(count):
            client = stack.enter_context(socket.socket())
            client.setblocking(False)
            client.connect_ex(("127.0.0.1", port))
            clients.append(client)
        for client in clients:
            client.setblocking(True)
            client.sendall(REQUEST)
        ready(clients, lambda last: last.endswith(b"database\n"))

    return timed(come)


def viewers_at_once(count: int = 2000) -> None:
    with contextlib.ExitStack() as stack:
        server, _ = stack.enter_context(serving())
        fresh = server.memory()
        ours = storm(stack, server.port, count)
        grown = server.memory() - fresh
        port = stack.enter_context(baseline(answer, lines(10).encode()))
        theirs = storm(stack, port, count)
    report(f"{count} viewers at once", 1000 * ours, 1000 * theirs, "ms", "accept, read, answer")
    print(f"{'memory':<44} {fresh / MIB:>9.1f} MiB fresh, {grown / count / 1024:.1f} KiB a viewer")


def idle(viewers: int = 100, seconds: int = 10) -> None:
    with contextlib.ExitStack() as stack:
        server, _ = stack.enter_context(serving())
        for _ in range(viewers):
            stack.enter_context(server.upgrade())
        time.sleep(1)
        before = server.cpu()
        time.sleep(seconds)
        spent = server.cpu() - before
    print(
        f"{f'idle with {viewers} viewers':<44}"
        f" {1000 * spent / seconds:>9.2f} ms of processor time a second"
    )


# The whole of a large log.

NEEDLE = b"[2025-12-17T17:40:38Z] A needle in the middle\n"
C_LOCALE = {"LC_ALL": "C.UTF-8", "PATH": os.environ["PATH"]}


def large(signs: str, size: int = 1024 * MIB) -> None:
    """Search and count, in a log whose lines hold these signs."""
    with serving("--rate-limit", 0) as (server, log):
        piece = lines(100_000).replace("– ✅", signs).encode()
        for number in range(size // len(piece)):
            append(log, NEEDLE if number == size // len(piece) // 2 else piece)
        what = f"{log.stat().st_size / MIB:.0f} MiB, {signs} in every line"
        subprocess.run(["cat", log], stdout=subprocess.DEVNULL, check=True)  # into the page cache
        eventually(lambda: is_idle(server), 60)  # all that was just appended is published

        found: list[int] = []
        ours = timed(lambda: found.extend(search_all(server, "NEEDLE")))
        theirs = timed(lambda: grep("-aic", "NEEDLE", log))
        with open(log, "rb") as file:
            assert len(found) == 1
            assert os.pread(file.fileno(), len(NEEDLE), found[0]) == NEEDLE
        report(f"a word searched in {what}", ours, theirs, "s", "grep -ic")

        patient = timed(lambda: list(search_all(server, "needle !grafana")))
        theirs = timed(lambda: grep("-aicP", "^(?=.*needle)(?!.*grafana)", log))
        report("the same for one term without another", patient, theirs, "s", "grep -icP")

        for query, pattern in (("needle", "needle"), ("postgresql", "postgresql"), ("9", "9")):
            counts: list[int] = []
            ours = timed(lambda q=query, to=counts: to.append(count_all(server, q)))
            rows: list[int] = []
            theirs = timed(lambda p=pattern, to=rows: to.append(grep("-aic", p, log)))
            assert counts == rows
            report(f"{counts[0]} matches counted in 200 stretches", ours, theirs, "s", "grep -ic")

        beside_searches(server, log)
        first = timed(lambda: first_frame(server))
        peak = server.peak() / MIB
        print(
            f"{'its first frame, the memory':<44} {1000 * first:>9.2f} ms  {peak:.1f} MiB at most"
        )


def is_idle(server: Server) -> bool:
    """Return True if it does next to nothing for a while."""
    spent = server.cpu()
    time.sleep(0.3)
    return server.cpu() - spent < 0.01


def grep(option: str, pattern: str, log: Path) -> int:
    command = ["grep", option, pattern, log]
    counted = subprocess.run(command, stdout=subprocess.PIPE, env=C_LOCALE, check=True)
    return int(counted.stdout)


def beside_searches(server: Server, log: Path) -> None:
    """Measure how long an appended line takes while three searches run."""
    over = threading.Event()

    def search_on() -> None:
        while not over.is_set():
            list(search_all(server, "needle !grafana"))

    searches = [threading.Thread(target=search_on) for _ in range(3)]
    for search in searches:
        search.start()
    with connect(server.ws, proxy=None) as viewer:
        viewer.recv()
        times = delays(log, viewer.recv, 100)
    over.set()
    for search in searches:
        search.join()
    middle, most = times[len(times) // 2], times[-1]
    print(f"{'append to reader beside 3 searches, p50, max':<44} {middle:>9.2f} ms {most:>9.2f} ms")


def past(files: int = 8, size: int = 128 * MIB) -> None:
    """Search through packed files, each unpacked for it."""
    with serving("--rate-limit", 0) as (server, log):
        piece = lines(size // len(lines(1).encode())).encode()
        for number in range(1, files + 1):
            with gzip.open(f"{log}.{number}.gz", "wb", 6) as packed:
                packed.write(piece + NEEDLE)
        listed = json.loads(server.get("/api/files")[2])["files"]
        generations = [file["generation"] for file in listed if file["packed"]]
        found: list[int] = []

        def search_files() -> None:
            for generation in generations:
                found.extend(search_all(server, "NEEDLE", generation=generation))

        ours = timed(search_files)
        command = ["zgrep", "-aic", "NEEDLE", *(f"{log}.{n}.gz" for n in range(1, files + 1))]
        theirs = timed(lambda: subprocess.run(command, stdout=subprocess.PIPE, env=C_LOCALE))
        assert len(found) == files
        report(
            f"{files} packed files of {size / MIB:.0f} MiB searched", ours, theirs, "s", "zgrep -ic"
        )


def first_frame(server: Server) -> None:
    with connect(server.ws, proxy=None) as viewer:
        viewer.recv()


def search_all(server: Server, query: str, **more: object) -> Iterator[int]:
    """Yield the offsets of all that match, as the page asks for them."""
    for answer in answers(server, "/api/search", {"q": query, **more}):
        yield from (match["start"] for match in answer["matches"])


def count_all(server: Server, query: str) -> int:
    pages = answers(server, "/api/counts", {"q": query})
    return sum(number for answer in pages for *_, number in answer["stretches"])


def answers(server: Server, path: str, query: dict[str, object]) -> Iterator[dict[str, Any]]:
    """Yield what each call answers, down to the beginning of the file."""
    before = 1
    while before:
        status, headers, body = server.get(f"{path}?{urlencode(query)}")
        if status == 503:
            time.sleep(int(headers["Retry-After"]) / 10)
            continue
        answer = json.loads(body)
        yield answer
        before = answer["scanned"][0]
        query = {**query, "before": before}


# Receipts.


def proof(size: int = 10 * 1024 * MIB) -> None:
    """Ask for a receipt of a large log, and measure the stream beside it; all in the page cache."""
    with serving("--rate-limit", 0) as (server, log):
        piece = lines(1_000_000).encode()
        for _ in range(size // len(piece)):
            append(log, piece)
        subprocess.run(["cat", log], stdout=subprocess.DEVNULL, check=True)
        eventually(lambda: is_idle(server), 60)

        receipt: list[str] = []
        ours = timed(lambda: receipt.append(receipt_of(server)))
        openssl: list[bytes] = []
        command = ["openssl", "dgst", "-sha256", "-r", log]
        theirs = timed(lambda: openssl.append(subprocess.check_output(command)))
        assert receipt == [openssl[0].split()[0].decode()]
        name = f"a receipt of {log.stat().st_size / MIB:.0f} MiB"
        report(name, ours, theirs, "s", "openssl dgst -sha256")
        print(f"{'the memory':<44} {server.peak() / MIB:>9.1f} MiB at most")

        over = threading.Event()

        def read_on() -> None:
            while not over.is_set():
                receipt_of(server)

        with connect(server.ws, proxy=None) as viewer:
            viewer.recv()
            alone = delays(log, viewer.recv, 400)
            reading = threading.Thread(target=read_on)
            reading.start()
            beside = delays(log, viewer.recv, 400)
            over.set()
            reading.join()
    for name, place in (("p50", 0.5), ("p99", 0.99)):
        at = int(place * len(alone))
        report(f"append to reader beside a pass, {name}", beside[at], alone[at], "ms", "no pass")


def receipt_of(server: Server) -> str:
    """Return the digest of all that is there, once all of it was read."""
    while True:
        status, _, body = server.get("/api/receipt")
        if status == 200:
            return str(json.loads(body)["sha256"])
        assert status == 202, body


def main() -> None:
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    latency()
    for viewers in (1000, 5000):
        fan_out(viewers)
    for viewers in (1, 20):
        burst(viewers)
    viewers_at_once()
    for signs in ("– ✅", "- ok"):
        large(signs)
    past()
    proof()
    idle()


if __name__ == "__main__":
    main()
