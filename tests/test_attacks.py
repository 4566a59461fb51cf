"""What clients may make the server hold: a bound in every phase, and honest slow ones live on."""

import contextlib
import gzip
import itertools
import json
import os
import resource
import signal
import socket
import ssl
import struct
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from harness import KEY, append, environment, eventually, lines
from websockets.sync.client import connect
from websockets.typing import Subprotocol

MIB = 2**20
TOKEN = "Zr0qVt7-example-token"
JSON = "Sec-WebSocket-Protocol: audit.v1.json\r\n"
JSON_FRAMES = Subprotocol("audit.v1.json")
HANDSHAKE = (
    "Upgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Version: 13\r\n"
    f"Sec-WebSocket-Key: {KEY}\r\n"
)


def request(path, fields=""):
    return f"GET {path} HTTP/1.1\r\nHost: 127.0.0.1\r\n{fields}\r\n".encode()


def frame(opcode, data=b""):
    return bytes([0x80 | opcode, 0x80 | len(data), 0, 0, 0, 0]) + data


@pytest.fixture(autouse=True)
def many_files():
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.fixture
def certificate(tmp_path):
    """The options for TLS."""
    key, cert = tmp_path / "key", tmp_path / "cert"
    kind = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-subj", "/CN=x"]
    command = ["openssl", "req", "-x509", *kind, "-days", "2", "-keyout", str(key)]
    subprocess.run([*command, "-out", str(cert)], check=True, capture_output=True, timeout=20)
    return "--tls-cert", cert, "--tls-key", key


class Crowd:
    """Connections that send something and read nothing."""

    def __init__(self, server):
        self.server = server
        self.clients = []

    def send(self, count, data, receive_buffer=2048):
        for _ in range(count):
            client = socket.socket()
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
            client.settimeout(5)
            self.clients.append(client)
            with contextlib.suppress(OSError):
                client.connect((self.server.host, self.server.port))
                client.sendall(data)

    def left(self):
        """How many the server has not closed."""
        return self.server.sockets()


@pytest.fixture
def crowd():
    """Makes a crowd in front of a server."""
    crowds = []

    def gather(server):
        crowds.append(Crowd(server))
        return crowds[-1]

    yield gather
    for client in itertools.chain.from_iterable(each.clients for each in crowds):
        client.close()


def healthz(server, context=None):
    """The status of /healthz, and how long it took."""
    began = time.monotonic()
    with socket.create_connection((server.host, server.port), 15) as client:
        if context:
            client = context.wrap_socket(client)
        client.sendall(request("/healthz"))
        status = int(client.recv(4096).split()[1])
        client.close()
    return status, time.monotonic() - began


def check_it_lives(server, most, context=None):
    """It answers as always, and never held more than that many bytes."""
    status, took = healthz(server, context)

    assert status == 200 and took < 5  # on a quiet machine 0.01
    assert server.peak() < most, f"{server.peak() / MIB:.0f} MiB"


def start(serve, log, *options, count=20_000):
    append(log, lines(count))
    return serve(log, "--rate-limit", 0, *options, dev=False)


# before the request is complete


def test_half_hellos_cost_little_and_the_oldest_go(serve, log, crowd, certificate):
    server = start(serve, log, *certificate)
    context = ssl._create_unverified_context()

    crowd(server).send(5000, b"\x16\x03\x01\x02\x00")

    check_it_lives(server, 400 * MIB, context)
    assert server.sockets() < 4200
    server.host = "127.0.0.1"


def test_large_half_hellos_are_cut_off(serve, log, crowd, certificate):
    server = start(serve, log, *certificate)
    hello = b"\x16\x03\x01\x40\x00\x01\x00\xff\xff\x03\x03" + bytes(16378)
    rest = (b"\x16\x03\x01\x40\x00" + bytes(16384)) * 8

    crowd(server).send(500, hello + rest)

    eventually(lambda: server.sockets() < 20, 30)
    check_it_lives(server, 150 * MIB, ssl._create_unverified_context())


def test_requests_that_do_not_end_are_cut_off(serve, log, crowd):
    server = start(serve, log)
    headers = "".join(f"h{number:03d}: {'a' * 8170}\r\n" for number in range(120))

    crowd(server).send(500, request("/", headers)[:-2])

    eventually(lambda: server.sockets() < 20, 30)
    check_it_lives(server, 150 * MIB)


# answers


@pytest.mark.parametrize("headers", ["", "Range: bytes=0-1048575\r\n"], ids=["64 KiB", "1 MiB"])
def test_answers_that_nobody_reads_share_64_mib(headers, serve, log, crowd):
    server = start(serve, log)

    crowd(server).send(1000, request("/api/audit", headers))

    check_it_lives(server, 300 * MIB)
    code, fields, body = server.get("/api/audit", Range="bytes=0-1048575")
    assert code == 206 or (code, json.loads(body)["error"][:3]) == (503, "too")
    assert code == 206 or int(fields["Retry-After"]) > 0
    eventually(lambda: server.get("/api/audit", Range="bytes=0-1048575")[0] == 206, 20)


def test_searches_that_nobody_reads_share_it_too(serve, log, crowd):
    server = start(serve, log)

    crowd(server).send(300, request("/api/search?q=entry&limit=1000"))

    check_it_lives(server, 300 * MIB)


def test_answered_connections_that_stay_do_not_fill_the_table(serve, log, crowd, tmp_path):
    (tmp_path / "token").write_text(TOKEN)
    limits = ("prlimit", "--nofile=1024:1024")
    append(log, lines(10))
    server = serve(
        log, "--token-file", tmp_path / "token", "--rate-limit", 0, prefix=limits, dev=False
    )

    crowd(server).send(1500, request("/api/audit"))

    check_it_lives(server, 100 * MIB)
    assert server.sockets() < 400 and "Too many open files" not in server.errors()


@pytest.mark.parametrize(("size", "pace"), [(200_000, 20_000), (2**20, 90_000)])
def test_a_slow_download_is_delivered_to_its_end(size, pace, serve, log):
    server = start(serve, log)
    head = request("/api/audit", f"Range: bytes=0-{size - 1}\r\n")

    with server.connect(receive_buffer=4096) as client:
        client.sendall(head)
        answer = bytearray()
        began = time.monotonic()
        while piece := client.recv(4096):
            answer += piece
            time.sleep(max(0.0, began + len(answer) / pace - time.monotonic()))

    assert time.monotonic() - began > 9
    assert answer.partition(b"\r\n\r\n")[2] == log.read_bytes()[:size]


@pytest.mark.slow
def test_a_download_that_stands_still_ends(serve, log):
    server = start(serve, log)
    others = server.sockets()

    with server.connect(receive_buffer=4096) as client:
        client.sendall(request("/api/audit", "Range: bytes=0-1048575\r\n"))
        eventually(lambda: server.sockets() > others)

        eventually(lambda: server.sockets() == others, seconds=25)


# viewers


def test_pings_whose_pongs_are_not_read_end_the_viewer(serve, log, crowd):
    server = start(serve, log)
    others = server.sockets()

    for _ in range(5):
        crowd(server).send(1, request("/ws/audit", HANDSHAKE) + frame(9, b"x" * 125) * 40_000)

    eventually(lambda: server.sockets() <= others)
    check_it_lives(server, 100 * MIB)
    assert len(server.errors()) < 2000


def test_floods_of_small_messages_hold_up_nobody(serve, log, crowd):
    server = start(serve, log)
    tiny = [frame(1, b"x"), frame(2), frame(9), frame(10)]

    for one in tiny * 3:
        crowd(server).send(1, request("/ws/audit", HANDSHAKE) + one * 40_000)
        status, took = healthz(server)
        assert status == 200 and took < 5  # on a quiet machine 0.05, unbounded 2 each

    check_it_lives(server, 100 * MIB)


def test_a_crowd_that_floods_leaves_time_for_everybody_else(serve, log, crowd):
    server = start(serve, log)
    crowd(server).send(600, request("/ws/audit", HANDSHAKE) + frame(9, b"x" * 125) * 450)

    spent, began = server.cpu(), time.monotonic()
    time.sleep(1)
    share = (server.cpu() - spent) / (time.monotonic() - began)

    assert share < 0.7  # unbounded it is all of a core
    check_it_lives(server, 100 * MIB)


def test_one_large_message_gets_1009_and_small_talk_is_heard_out(serve, log, view):
    server = start(serve, log)
    talkative, large = view(server, json=True), view(server, json=True)

    large.connection.send("x" * 100_000)
    for _ in range(200):
        talkative.connection.send("hello")
    added = append(log, "after\n").decode()

    assert large.closed() == 1009
    talkative.wait(added)


def test_a_client_that_pings_and_resets_writes_nothing_to_our_log(serve, log):
    server = start(serve, log)

    for _ in range(5):
        client = server.upgrade()
        with contextlib.suppress(OSError):
            client.settimeout(1)
            client.send(frame(9) * 40_000)
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        client.close()
    check_it_lives(server, 100 * MIB)

    assert "socket.send" not in server.errors()


def test_viewers_over_tls_cost_less_than_64_kib_each(serve, log, certificate):
    server = start(serve, log, *certificate)
    context = ssl._create_unverified_context()
    before, count = server.memory(), 500

    with contextlib.ExitStack() as stack:
        for _ in range(count):
            client = socket.create_connection((server.host, server.port), 15)
            client = stack.enter_context(context.wrap_socket(client))
            client.sendall(request("/ws/audit", HANDSHAKE + JSON))
            assert client.recv(4096).startswith(b"HTTP/1.1 101 ")
        cost = (server.memory() - before) / count

    assert cost < 64 * 1024, f"{cost / 1024:.0f} KiB"


def test_viewers_that_come_and_go_leave_no_garbage(serve, log):
    """Collecting it would stop the loop: what the library leaves is let go of at once."""
    server = start(serve, log, count=10)

    def come_and_go(times):
        for number in range(times):
            path, fields = (("/ws/audit", HANDSHAKE), ("/healthz", ""))[number % 2]
            with server.connect() as client:
                client.sendall(request(path, fields))
                client.recv(4096)
        eventually(lambda: server.sockets() == sockets)
        return server.memory()

    sockets = server.sockets()
    come_and_go(500)
    before = come_and_go(10)
    after = come_and_go(3000)

    assert after - before < MIB, f"{(after - before) / 1024:.0f} KiB"


def test_thousands_of_viewers_that_read_nothing_do_not_hold_up_the_stop(serve, log, crowd):
    server = start(serve, log, count=10)
    crowd(server).send(3000, request("/ws/audit", HANDSHAKE + JSON))
    append(log, lines(2000))

    began = time.monotonic()
    server.process.send_signal(signal.SIGTERM)

    assert server.process.wait(10) == 0
    assert time.monotonic() - began < 2.5


# websites and cursors


def test_a_foreign_page_cannot_use_up_the_requests_of_the_user(serve, log):
    append(log, lines(10))
    server = serve(log, "--rate-limit", 20)
    foreign = (
        {"Sec_Fetch_Site": "cross-site"},
        {"Origin": "http://evil.example"},
        {"Host": "evil.example"},
    )

    statuses = [
        server.get(path, **fields)[0]
        for fields in foreign
        for path in ("/api/audit", "/", "/api/audit")
        for _ in range(20)
    ]

    assert set(statuses) <= {200, 403, 429} and statuses.count(429) > 100
    assert [server.get("/api/audit")[0] for _ in range(15)] == [200] * 15


def test_long_cursors_cost_more_than_honest_ones(serve, log):
    append(log, lines(10))
    server = serve(log, "--rate-limit", 10, "--max-viewers", 1000)

    def resume(parts):
        cursor = "~".join([f"1.{'a' * 20}"] * parts)
        with server.connect() as client:
            client.sendall(request(f"/ws/audit?since={cursor}", HANDSHAKE))
            return int(client.recv(4096).split()[1])

    honest = [resume(3) for _ in range(100)]
    forged = [resume(30) for _ in range(3)]

    assert honest == [101] * 100 and forged[0] == 101 and forged[-1] == 429


# output


def test_a_full_disk_below_standard_error_does_not_spoil_the_exit_code(log, tmp_path):
    """Python 3.13 says 120 if it cannot flush."""
    append(log, lines(10))
    command = [sys.executable, "-W", "error", str(Path(__file__).parent.parent / "audit_stream.py")]
    with open("/dev/full", "w") as full:
        process = subprocess.Popen(
            [*command, "--log", str(log), "--port", "0"],
            stdout=full,
            stderr=full,
            env=environment(),
        )
    eventually(lambda: any(fd.startswith("socket") for fd in open_files(process)))
    log.rename(f"{log}.1")
    time.sleep(2.5)  # it has a word to say about that, and nowhere to put it

    process.terminate()

    assert process.wait(10) == 0


def open_files(process):
    for path in Path(f"/proc/{process.pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):
            yield os.readlink(path)


# the log's folder

SMALL_DISK = 'mount -t tmpfs -o size=64m tmpfs "$0" && TMPDIR="$0" exec "$@"'


def test_packed_bombs_beside_the_log_are_bounded_work(serve, log, tmp_path):
    """60 files of 150 MiB, where half of 64 MiB may be used: not each of them is tried out."""
    bomb = gzip.compress(bytes(10 * MIB)) * 15
    for number in range(1, 61):
        Path(f"{log}.{number}.gz").write_bytes(bomb)
    log.touch()
    disk = tmp_path / "disk"
    disk.mkdir()
    prefix = ("unshare", "--user", "--map-root-user", "--mount", "sh", "-c", SMALL_DISK, str(disk))

    server = serve(log, prefix=prefix, dev=False)
    at_the_start = written(server)
    append(log, lines(10))
    with server.upgrade(JSON.strip(), query="?since=1000." + "a" * 24) as viewer:
        answer = viewer.recv(65536)

    assert b'"resumed": false' in answer
    assert at_the_start < 300 * MIB and written(server) - at_the_start < 300 * MIB


def test_packed_bombs_that_begin_like_the_log_hold_up_only_who_asks(serve, log, tmp_path):
    append(log, lines(100))
    server = serve(log, dev=False)
    with connect(server.ws, subprotocols=[JSON_FRAMES], proxy=None) as viewer:
        cursor = json.loads(viewer.recv())["cursor"]
    server.stop()
    bomb = gzip.compress(lines(100).encode()) + gzip.compress((b"x" * 99 + b"\n") * 100_000) * 20
    Path(f"{log}.1.gz").write_bytes(bomb)
    for number in range(2, 30):
        os.link(f"{log}.1.gz", f"{log}.{number}.gz")
    log.unlink()
    append(log, "a new log\n")
    server = serve(log, dev=False)
    answers = []

    def resume():
        address = f"{server.ws}?since={cursor}"
        with connect(address, subprotocols=[JSON_FRAMES], proxy=None, close_timeout=0.1) as viewer:
            answers.append(json.loads(viewer.recv(60)))

    with connect(server.ws, proxy=None) as viewer:
        viewer.recv()
        resuming = threading.Thread(target=resume)
        resuming.start()
        eventually(lambda: written(server) > 50 * MIB, 60)
        append(log, "a line beside it\n")
        assert viewer.recv(10) == "a line beside it\n"
        assert not answers
        resuming.join()

    assert [answer["type"] for answer in answers] == ["snapshot"]
    assert written(server) < 1100 * MIB


def test_forged_cursors_unpack_what_lies_beside_the_log_once(serve, log):
    packed = gzip.compress(lines(10_000).encode(), 1) * 20
    for number in range(1, 4):
        Path(f"{log}.{number}.gz").write_bytes(packed)
    damaged = Path(f"{log}.4.gz")
    damaged.write_bytes(packed[:-1])
    append(log, lines(10))
    server = serve(log, dev=False)

    for digit in range(10):
        with server.upgrade(JSON.strip(), query=f"?since=1000.{digit}{'a' * 23}") as viewer:
            assert b'"resumed": false' in viewer.recv(65536)

    assert written(server) < 5 * len(lines(10_000).encode()) * 20


def written(server):
    """Return the bytes that a process has written so far."""
    return int(Path(f"/proc/{server.process.pid}/io").read_text().split()[3])


def test_a_link_that_goes_again_and_again_ends_nothing(serve, view, log):
    target = log.with_name("target")
    append(target, lines(10))
    log.symlink_to(target.name)
    server = serve(log)
    viewer = view(server, json=True).wait(lines(1, 9))

    ends = time.monotonic() + 4
    while time.monotonic() < ends:
        log.unlink()
        log.symlink_to(target.name)
        time.sleep(0.0005)  # the removal itself wakes the follower

    assert server.process.poll() is None
    viewer.wait(append(target, "after all\n").decode())


def test_its_own_secrets_are_never_served_as_a_log(serve, log, tmp_path, certificate):
    token = tmp_path / "token"
    token.write_text(TOKEN)
    Path(f"{log}.1").symlink_to(token)
    log.symlink_to(token)
    server = serve(log, "--token-file", token, "--interval", 0.2)
    over_tls = serve(tmp_path / "other.log", "--interval", 0.2, *certificate)
    over_tls.log.symlink_to(certificate[3])
    bearer = {"Authorization": f"Bearer {TOKEN}"}

    answers = [server.get(path, **bearer) for path in ("/api/audit", "/api/search?q=a", "/healthz")]
    log.unlink()
    append(log, lines(10))
    listed = eventually(lambda: (it := server.get("/api/files", **bearer))[0] == 200 and it[2])
    files = [each for each in json.loads(listed)["files"] if each["name"] != log.name]
    pieces = [server.get(f"/api/audit?generation={each['generation']}", **bearer) for each in files]

    assert [code for code, _, _ in answers] == [503] * 3
    assert b"a secret of this server" in answers[0][2]
    assert TOKEN.encode() not in b"".join(body for _, _, body in answers + pieces)
    assert len(pieces) == 1 and pieces[0][0] != 200
    with ssl._create_unverified_context().wrap_socket(over_tls.connect()) as client:
        client.sendall(request("/api/audit"))
        assert b"PRIVATE" not in client.recv(65536)
