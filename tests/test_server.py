"""The command line, starting and stopping, and what comes over plain HTTP."""

import contextlib
import json
import os
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from harness import KEY, SCRIPT, append, environment, eventually, lines, run

JSON = "application/json"
MIB = 2**20


def reason(finished: subprocess.CompletedProcess[str]) -> str:
    """The one line on standard error."""
    assert finished.stdout == ""
    assert len(finished.stderr.splitlines()) == 1 and "Traceback" not in finished.stderr, (
        finished.stderr
    )
    return finished.stderr


# starting


@pytest.mark.parametrize(
    "options",
    [
        *(("--port", value) for value in ("-1", "65536", "http")),
        *(("--interval", value) for value in ("0", "-1", "nan", "inf")),
        *(("--initial", value) for value in ("-1", "131073", "1k")),
        ("--no-such-option",),
        ("surplus",),
    ],
    ids=" ".join,
)
def test_a_bad_value_is_one_clear_line(options, log):
    finished = run("--log", log, *options)

    assert finished.returncode == 2
    assert options[0].lstrip("-") in reason(finished)


def test_a_log_is_required():
    finished = run()

    assert finished.returncode == 2
    assert "--log" in reason(finished)


def test_a_taken_port_is_one_clear_line(log):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])

        finished = run("--log", log, "--port", port)

    assert finished.returncode == 1
    assert port in reason(finished)


@pytest.mark.parametrize("host", ["no.such.host.invalid", "a..b", "x" * 64])
def test_an_unknown_host_is_one_clear_line(host, log):
    finished = run("--log", log, "--port", 0, "--host", host)

    assert finished.returncode == 1
    assert host in reason(finished)


def test_a_log_with_any_name_is_followed(serve, view, tmp_path):
    log = Path(os.fsdecode(os.fsencode(tmp_path) + b"/l\xf6g \n.log"))
    append(log, "one\n")

    viewer = view(serve(log), json=True).wait("one\n")

    assert viewer.of("snapshot")[0]["log"] == "l\ufffdg \n.log"


@pytest.mark.parametrize(
    ("interpreter", "named"),
    [([], "index.html"), (["-S", "-I"], "pip")],
    ids=["page", "websockets"],
)
def test_a_missing_part_is_one_clear_line(interpreter, named, log, tmp_path):
    alone = shutil.copy(SCRIPT, tmp_path)
    command = [sys.executable, *interpreter, alone, "--log", log, "--port", "0"]

    finished = subprocess.run(
        command, capture_output=True, text=True, timeout=20, env=environment()
    )

    assert finished.returncode == 1
    assert named in reason(finished)


def test_version_is_a_line_on_standard_output():
    finished = run("--version")

    assert finished.returncode == 0
    assert re.search(r"\d+\.\d+", finished.stdout) and finished.stdout.count("\n") == 1


def test_the_first_line_is_the_address_of_an_open_port(serve, log):
    server = serve(log)

    status, headers, body = server.get("/")

    assert re.fullmatch(r"http://127\.0\.0\.1:\d+/", server.url)
    assert status == 200 and headers["Content-Type"].startswith("text/html") and b"auditBox" in body


@pytest.mark.skipif(not Path("/proc/net/if_inet6").exists(), reason="no IPv6 here")
@pytest.mark.parametrize(
    ("host", "client", "shown"),
    [("::1", "::1", r"\[::1\]"), ("::", "::1", r"[^\[\]/:]+"), ("0.0.0.0", "127.0.0.1", r"[^/:]+")],
)
def test_it_listens_where_it_is_told(host, client, shown, serve, log):
    server = serve(log, "--host", host)
    append(log, lines(1))
    server.host = client

    status, _, body = eventually(lambda: server.get("/healthz"))

    assert status in (200, 503) and body
    assert re.match(rf"http://{shown}:\d+/", server.url)


def test_demo_writes_an_entry_every_second(serve, log, view):
    server = serve(log, "--demo")
    viewer = view(server)

    viewer.wait(lambda it: it.text.count("\n") >= 3, seconds=8)

    assert all(
        re.match(r"\[\d{4}-\d\d-\d\dT[\d:.]+Z\] \w", line) for line in viewer.text.splitlines()
    )
    assert not log.exists()


# --append


def test_append_writes_a_dated_line_of_its_own(log):
    append(log, "unfinished")
    before = time.time()

    finished = [run("--log", log, "--append", text) for text in ("Auto-repair: ✅ one", "two  ")]

    assert [each.returncode for each in finished] == [0, 0]
    unfinished, *dated, end = log.read_bytes().decode().split("\n")
    entries = [
        re.fullmatch(r"\[(\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d)\.\d{6}Z\] (.*)", line) for line in dated
    ]
    assert (unfinished, end) == ("unfinished", "")
    assert [entry and entry[2] for entry in entries] == ["Auto-repair: ✅ one", "two  "]
    clock = {
        time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(before + second)) for second in range(20)
    }
    assert {entry and entry[1] for entry in entries} <= clock


def test_parallel_appends_stay_whole(log):
    append(log, "unfinished")
    texts = [f"writer {number:02d} " + "x" * 5000 for number in range(10)]
    command = [sys.executable, str(SCRIPT), "--log", str(log), "--append"]

    writers = [subprocess.Popen([*command, text], env=environment()) for text in texts]

    assert [writer.wait(20) for writer in writers] == [0] * len(texts)
    first, *written = log.read_text().splitlines()
    assert first == "unfinished"
    assert sorted(line.partition("] ")[2] for line in written) == texts


@pytest.mark.parametrize("text", ["a\nb", "a\rb", "a\n"], ids=repr)
def test_append_refuses_a_text_of_two_lines(text, log):
    finished = run("--log", log, "--append", text)

    assert finished.returncode == 2 and reason(finished)
    assert not log.exists()


def test_append_writes_all_or_nothing(log):
    before = append(log, "x" * 2000 + "\n")

    finished = run("--log", log, "--append", "y" * 2000, preexec_fn=lambda: limit_file_size(3000))

    assert finished.returncode == 1 and str(log) in reason(finished)
    assert log.read_bytes() == before


def limit_file_size(size):
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


def test_append_to_a_missing_folder_is_one_clear_line(tmp_path):
    finished = run("--log", tmp_path / "nowhere" / "log", "--append", "text")

    assert finished.returncode == 1
    assert "nowhere" in reason(finished)


# stopping


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGINT])
def test_the_stop_is_quick_whoever_is_connected(how, serve, view, log):
    append(log, lines(100_000))
    server = serve(log, "--initial", 100)
    viewers = [view(server, json=bool(number % 2)) for number in range(20)]
    with contextlib.ExitStack() as stack:
        stuck = [stack.enter_context(server.upgrade(receive_buffer=4096)) for _ in range(5)]
        silent = [stack.enter_context(server.connect()) for _ in range(10)]
        for client in silent[:5]:
            client.sendall(b"GET / HTTP/1.1\r\nHost: 127.")
        append(log, lines(100_000))
        for viewer in viewers:
            viewer.wait("entry 00099999", 20)

        code = server.stop(how, within=2)

        assert code == 0
        assert [viewer.closed() for viewer in viewers] == [1001] * len(viewers)
        assert len(stuck) == 5


# HTTP


def test_head_is_get_without_a_body(serve, log):
    append(log, lines(3))
    server = serve(log)

    for path, expected in {
        "/": 200,
        "/healthz": 200,
        "/api/audit": 200,
        "/other": 404,
        "/ws/audit": 426,
    }.items():
        got, headed = server.get(path), server.get(path, method="HEAD")
        raw = server.raw(f"HEAD {path} HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n".encode())

        assert headed[0] == got[0] == expected
        assert headed[1]["Content-Length"] == got[1]["Content-Length"] == str(len(got[2]))
        assert headed[1]["Content-Type"] == got[1]["Content-Type"]
        assert raw.endswith(b"\r\n\r\n") and raw.count(b"\r\n\r\n") == 1


def test_other_methods_get_405(serve, log):
    server = serve(log)
    paths = ("/", "/healthz", "/api/audit", "/ws/audit", "/other")

    answers = {
        (method, path): server.get(path, method=method)
        for method in ("POST", "PUT", "DELETE", "OPTIONS", "PATCH")
        for path in paths
    }

    for (_, path), (status, headers, body) in answers.items():
        assert status == 405 and {"GET", "HEAD"} <= set(re.split(r"\s*,\s*", headers["Allow"]))
        assert path in ("/", "/healthz") or json.loads(body)["error"]


def test_errors_are_one_sentence_of_json(serve, log, tmp_path):
    server = serve(log)
    paths = (
        "/index.html",
        "/static/index.html",
        "/../etc/passwd",
        "/%2e%2e/",
        "//",
        "/api",
        "/api/audit/",
        "/?a=/..",
    )

    answers = [(404, server.get(path)) for path in paths[:-1]]
    answers += [(426, server.get("/ws/audit")), (503, server.get("/api/audit"))]

    assert server.get(paths[-1])[0] == 200
    for expected, (status, headers, body) in answers:
        assert (status, headers.get_all("Content-Type")) == (expected, [headers["Content-Type"]])
        assert headers["Content-Type"].startswith(JSON)
        assert list(json.loads(body)) == ["error"] and str(tmp_path) not in body.decode()


BAD_HEADERS = {
    "no host": [],
    "empty host": ["Host: "],
    "space in host": ["Host: exa mple"],
    "port no number": ["Host: 127.0.0.1:http"],
    "bracket open": ["Host: [::1"],
    "user in host": ["Host: user@127.0.0.1"],
    "path in host": ["Host: 127.0.0.1/x"],
    "host": ["Host: 127.0.0.1", "Host: 127.0.0.1"],
    **{
        name: ["Host: 127.0.0.1", f"{name}: {value}", f"{name}: {value}"]
        for name, value in {
            "Origin": "http://127.0.0.1",
            "Authorization": "Bearer 0123456789abcdef",
            "Range": "bytes=0-1",
            "If-Match": '"a"',
        }.items()
    },
}


def test_missing_malformed_and_doubled_headers_get_400(serve, log):
    append(log, lines(1))
    server = serve(log)
    upgrade = [
        "Upgrade: websocket",
        "Connection: Upgrade",
        f"Sec-WebSocket-Key: {KEY}",
        "Sec-WebSocket-Version: 13",
    ]
    requests = {"/api/audit": [], "/": [], "/ws/audit": upgrade}

    answers = {
        (name, path): server.raw(
            "\r\n".join([f"GET {path} HTTP/1.1", *headers, *more, "", ""]).encode()
        )
        for name, headers in BAD_HEADERS.items()
        for path, more in requests.items()
    }

    for (name, path), answer in answers.items():
        assert answer.startswith(b"HTTP/1.1 400 "), f"{name}, {path}: {answer!r}"
        assert path == "/" or json.loads(answer.partition(b"\r\n\r\n")[2])["error"]


def test_a_doubled_cookie_is_read(serve, log):
    append(log, lines(1))

    answer = serve(log).raw(
        b"GET /api/audit HTTP/1.1\r\nHost: 127.0.0.1\r\nCookie: a=b\r\nCookie: c=d\r\n\r\n"
    )

    assert answer.startswith(b"HTTP/1.1 200 ")


def test_a_handshake_needs_a_key_of_16_bytes(serve, log):
    server = serve(log)
    fields = [
        "Host: 127.0.0.1",
        "Upgrade: websocket",
        "Connection: Upgrade",
        "Sec-WebSocket-Version: 13",
    ]
    keys = {"SGVsbG8sIHdvcmxkIQ==": 400, "no base 64!": 400, KEY: 101}

    for key, expected in keys.items():
        with server.connect() as client:
            request = ["GET /ws/audit HTTP/1.1", *fields, f"Sec-WebSocket-Key: {key}", "", ""]
            client.sendall("\r\n".join(request).encode())
            status = int(client.recv(4096).split()[1])

        assert status == expected, key


GARBAGE = [
    b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n" + bytes(500),
    b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    b"GET /\r\n\r\n",
    b"GET / HTTP/1.1\nHost: 127.0.0.1\n\n",
    b"\r\n\r\n\r\n",
    b"\xff" * 100_000,
    b"GET /" + b"a" * 20_000 + b" HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n",
    b"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\nX: " + b"a" * 20_000 + b"\r\n\r\n",
    b"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\n" + b"X: y\r\n" * 200 + b"\r\n",
    b"GET / HTTP/1.1\r\nHost : 127.0.0.1\r\n\r\n",
    b"GET /\x1b[31m\x00\xe9 HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n",
    b"POST / HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 5\r\n\r\nhello",
    b"POST / HTTP/1.1\r\nHost: 127.0.0.1\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    b"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\nGET / HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n",
]


def test_garbage_leaves_it_alive_and_quiet(serve, log):
    append(log, lines(1))
    server = serve(log, dev=False)
    before = server.errors()

    for garbage in GARBAGE * 20:
        server.raw(garbage)
        with server.connect() as client, contextlib.suppress(OSError):
            client.sendall(garbage)

    assert server.get("/healthz")[0] == 200
    assert server.errors() == before


@pytest.mark.parametrize(
    ("put", "word"),
    [(lambda log: None, "missing"), (os.mkdir, "director"), (os.mkfifo, "regular")],
    ids=["missing", "directory", "fifo"],
)
def test_healthz_gives_the_reason(put, word, serve, log, tmp_path):
    put(log)
    server = serve(log, "--interval", 0.2)

    ill = server.get("/healthz")
    if log.exists():
        log.rename(tmp_path / "aside")
    append(log, lines(1))
    well = eventually(lambda: (answer := server.get("/healthz"))[0] == 200 and answer)

    assert ill[0] == 503 and word in ill[2].decode() and str(tmp_path) not in ill[2].decode()
    assert well[2].strip() == b"ok"


# /api/audit


@pytest.mark.parametrize(
    "content", ["", lines(3), lines(3) + "unfinished", b"\xe9\r\n\0\xff\n"], ids=range(4)
)
def test_a_small_log_is_served_to_its_last_whole_line(content, serve, log):
    written = append(log, content)

    status, headers, body = serve(log).get("/api/audit")

    assert (status, headers["Content-Type"]) == (200, "text/plain; charset=utf-8")
    assert body == written[: written.rfind(b"\n") + 1]


@pytest.mark.parametrize("padding", range(3))
def test_the_end_of_a_large_log_is_served_from_the_start_of_a_line(padding, serve, log):
    whole = 65536 // len(lines(1).encode()) + padding - 1
    written = append(log, "x" * (65536 - whole * len(lines(1).encode())) + "\n" + lines(5000))

    _, _, body = serve(log).get("/api/audit")

    start = written.index(b"\n", len(written) - 65536 - 1) + 1
    assert body == written[start:]


SIZE = len(lines(100).encode())


RANGES = {
    "0-9": (0, 9),
    "5-5": (5, 5),
    "100-": (100, SIZE - 1),
    "-7": (SIZE - 7, SIZE - 1),
    "10-999999999": (10, SIZE - 1),
    "-999999999": (0, SIZE - 1),
    f"0-{2**64 - 1}": (0, SIZE - 1),
    f"-{2**63 - 1}": (0, SIZE - 1),
    f"{SIZE - 1}-": (SIZE - 1, SIZE - 1),
}


def test_a_range_is_those_bytes(serve, log):
    written = append(log, lines(100))
    server = serve(log)

    for asked, (first, last) in RANGES.items():
        status, headers, body = server.get("/api/audit", Range=f"bytes={asked}")

        assert (status, headers["Content-Range"]) == (206, f"bytes {first}-{last}/{SIZE}")
        assert (headers["Content-Length"], body) == (str(len(body)), written[first : last + 1])


def test_a_range_beyond_the_end_gets_416(serve, log):
    append(log, lines(100))
    server = serve(log)

    for asked in (f"{SIZE}-", "99999999999999999999-", "99999999-999999999", "-0"):
        status, headers, body = server.get("/api/audit", Range=f"bytes={asked}")

        assert (status, headers["Content-Range"]) == (416, f"bytes */{SIZE}")
        assert json.loads(body)["error"]


def test_a_range_is_at_most_a_mebibyte(serve, log):
    written = append(log, lines(20_000))
    server = serve(log)

    for asked in ("0-", "-1500000", "7-1500000"):
        status, headers, body = server.get("/api/audit", Range=f"bytes={asked}")

        first, last, size = map(int, re.findall(r"\d+", headers["Content-Range"]))
        assert (status, size, len(body)) == (206, len(written), MIB)
        assert body == written[first : last + 1]


def test_the_etag_names_the_generation(serve, log):
    append(log, lines(10))
    server, other = serve(log), serve(log)
    etag, elsewhere = (each.get("/api/audit")[1]["ETag"] for each in (server, other))

    same = server.get("/api/audit", If_Match=etag, Range="bytes=0-4")
    wrong = server.get("/api/audit", If_Match='"something-else"')
    append(log, lines(10))
    grown = server.get("/api/audit", If_Match=etag)
    log.rename(f"{log}.1")
    append(log, lines(10, start=500))
    rotated = eventually(
        lambda: (answer := server.get("/api/audit", If_Match=etag))[0] == 412 and answer
    )

    assert re.fullmatch(r'"[^"]+"', etag) and elsewhere == etag
    assert (same[0], grown[0]) == (206, 200)
    assert wrong[0] == 412 and json.loads(wrong[2])["error"]
    assert json.loads(rotated[2])["error"] and server.get("/api/audit")[1]["ETag"] != etag
