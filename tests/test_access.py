"""The doors: who gets in, under which name and from which page, how often, and what bad input gets."""

import base64
import collections
import contextlib
import copy
import functools
import hashlib
import html
import html.parser
import http.client
import http.server
import itertools
import json
import os
import pty
import random
import re
import shutil
import signal
import socket
import ssl
import struct
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from browsers import BROWSERS, unavailable
from conftest import KEY, SCRIPT, add, append, environment, eventually, free_port, lines
from websockets.exceptions import InvalidStatus
from websockets.sync.client import connect

TOKEN, OTHER = "Zr0qVt7-example-token", "another-example-token"
RIGHT = f"Bearer {TOKEN}"
FIRST = lines(20)
API = ("/api/audit", "/api/search?q=entry", "/api/timeline", "/api/seek?time=2025-12-17T17:40:37Z", "/api/receipt")
PATHS = ("/", *API, "/metrics", "/other")
SEED = 20251217


def handshake(server, *fields, host=None, path="/ws/audit", query="", source=None):
    """The status of a request for a WebSocket."""
    asked = [f"Host: {host or f'127.0.0.1:{server.port}'}", "Upgrade: websocket", "Connection: Upgrade"]
    asked += [f"Sec-WebSocket-Key: {KEY}", "Sec-WebSocket-Version: 13", *fields]
    request = "\r\n".join([f"GET {path}{query} HTTP/1.1", *asked, "", ""])
    with socket.create_connection((server.host, server.port), 15, (source, 0) if source else None) as client:
        client.sendall(request.encode("utf-8"))
        return int(client.recv(65536).split()[1])


def ask(server, path="/", source="127.0.0.1", **headers):
    """Status and headers, asked from that address."""
    connection = http.client.HTTPConnection(server.host, server.port, timeout=15, source_address=(source, 0))
    with contextlib.closing(connection):
        connection.request("GET", path, headers={name.replace("_", "-"): text for name, text in headers.items()})
        answer = connection.getresponse()
        answer.read()
        return answer.status, answer.headers


def said_by(server):
    """Standard error, without what asyncio's debug mode remarks on a machine that is busy with something else."""
    return "".join(line for line in server.errors().splitlines(True) if "Executing <" not in line)


def status(server, path="/", **headers):
    return server.get(path, **headers)[0]


def launch(*arguments, env=None, **options):
    """A start that is to fail: the one line on standard error, with the exit code."""
    command = [sys.executable, "-W", "error", str(SCRIPT), "--port", "0", *map(str, arguments)]
    chosen = {"stdin": subprocess.DEVNULL, "capture_output": True} | options
    finished = subprocess.run(command, timeout=10, env=environment(**(env or {})), **chosen)
    said = finished.stderr.decode()
    assert not finished.stdout and len(said.splitlines()) == 1 and "Traceback" not in said, (finished.stdout, said)
    return finished.returncode, said


@pytest.fixture
def secret(tmp_path):
    path = tmp_path / "token"
    path.write_text(f"{TOKEN}\n")
    return path


@pytest.fixture
def locked(serve, log, secret):
    append(log, FIRST)
    return serve(log, "--token-file", secret)


@pytest.fixture
def unlocked(serve, log):
    append(log, FIRST)
    return serve(log)


def cookie_of(headers):
    """Name=value of the cookie in an answer, and its attributes."""
    (cookie,) = headers.get_all("Set-Cookie")
    pair, *attributes = cookie.split("; ")
    return pair, set(attributes)


# -- the token ---------------------------------------------------------------------------------------


def test_the_token_is_in_a_file_or_the_environment_or_the_credentials(serve, log, secret, tmp_path):
    (tmp_path / "other").write_text(OTHER)
    directory, other = {"CREDENTIALS_DIRECTORY": str(tmp_path)}, {"AUDIT_STREAM_TOKEN": OTHER}
    sources = [
        (["--token-file", secret], {}),
        ([], {"AUDIT_STREAM_TOKEN": TOKEN}),
        ([], directory),
        (["--token-file", secret], other),
        (["--token-file", secret], {"CREDENTIALS_DIRECTORY": "/nonexistent"}),
        ([], {"AUDIT_STREAM_TOKEN": TOKEN, "CREDENTIALS_DIRECTORY": str(tmp_path / "nothing")}),
    ]

    servers = [serve(log, *options, env=variables) for options, variables in sources]

    for server in servers:
        statuses = [status(server, Authorization=f"Bearer {token}") for token in (TOKEN, OTHER)]
        assert (statuses, status(server)) == ([200, 401], 401)
        assert TOKEN not in server.url and said_by(server) == ""


@pytest.mark.parametrize("host", ["0.0.0.0", "::"])
def test_elsewhere_than_on_loopback_a_token_is_made(host, serve, log):
    servers = [serve(log, "--host", host) for _ in range(2)]

    tokens = [re.fullmatch(r"http://[^/]+/\?token=(\S{16,})", server.url)[1] for server in servers]

    for server, token in zip(servers, tokens, strict=True):
        server.host = "127.0.0.1"
        answers = [status(server), status(server, Authorization=f"Bearer {token}"), status(server, f"/?token={token}")]
        assert answers == [401, 200, 303]
    assert tokens[0] != tokens[1]


def test_without_a_token_it_is_open_where_that_is_wanted(serve, log):
    servers = [serve(log), serve(log, "--host", "0.0.0.0", "--no-auth")]
    servers[1].host = "127.0.0.1"

    assert [status(server) for server in servers] == [200, 200]
    assert not any("token" in server.url for server in servers)


@pytest.mark.parametrize("content", ["", "\n", " \t\r\n"], ids=repr)
def test_an_empty_token_is_one_clear_line(content, log, secret):
    secret.write_text(content)

    starts = [
        launch("--log", log, "--token-file", secret),
        launch("--log", log, env={"AUDIT_STREAM_TOKEN": content}),
        launch("--log", log, env={"CREDENTIALS_DIRECTORY": str(secret.parent)}),
    ]

    assert [code for code, _ in starts] == [1, 1, 1]
    assert all("token" in said and "empty" in said for _, said in starts)


def test_a_token_file_that_cannot_be_read_is_one_clear_line(log, tmp_path):
    for path in (tmp_path / "nowhere", tmp_path):
        code, said = launch("--log", log, "--token-file", path)

        assert code == 1 and str(path) in said


@pytest.mark.parametrize("put", [lambda path: path.symlink_to(path), Path.mkdir], ids=["loop", "folder"])
def test_a_credential_that_cannot_be_read_does_not_open_the_server(put, log, secret):
    secret.unlink()
    put(secret)

    code, said = launch("--log", log, env={"CREDENTIALS_DIRECTORY": str(secret.parent)})

    assert code == 1 and str(secret) in said


def test_a_short_token_is_warned_about_and_works(serve, log, secret):
    secret.write_text("short\n")

    server = serve(log, "--token-file", secret)

    assert status(server, Authorization="Bearer short") == 200
    said = said_by(server)
    assert len(said.splitlines()) == 1 and "16" in said and "short\n" not in said


def test_everything_but_healthz_needs_the_token(locked):
    for method, path in itertools.product(("GET", "HEAD", "POST"), PATHS):
        without, wrong = (
            locked.get(path, method=method),
            locked.get(path, method=method, Cookie="audit_stream=1; token=2"),
        )
        inside = locked.get(path, method=method, Authorization=RIGHT)

        assert (without[0], wrong[0]) == (401, 401) and inside[0] != 401, f"{method} {path}"
        assert path == "/" or method == "HEAD" or json.loads(without[2])["error"]
    assert status(locked, "/healthz") == 200
    assert handshake(locked) == handshake(locked, "Origin: http://evil.example", host="evil.example") == 401


def test_the_page_of_a_stranger_is_a_form_with_one_password_field(locked):
    code, headers, body = locked.get("/")

    fields = re.findall(rb"<(?:input|textarea|select)\b[^>]*>", body)
    assert code == 401 and headers["Content-Type"].startswith("text/html")
    assert len(fields) == 1 and re.search(rb'type="?password', fields[0])
    assert b"entry" not in body and b"<form" in body


def test_the_websocket_takes_bearer_cookie_and_address(locked):
    pair, _ = cookie_of(locked.get(f"/?token={TOKEN}")[1])
    ways = [(f"Authorization: {RIGHT}", ""), (f"Cookie: {pair}", ""), ("X: y", f"?token={TOKEN}")]

    assert [handshake(locked, field, query=query) for field, query in ways] == [101] * len(ways)
    assert handshake(locked, f"Authorization: Bearer {OTHER}") == handshake(locked, query=f"?token={OTHER}") == 401


# -- the cookie --------------------------------------------------------------------------------------


def test_an_address_with_the_token_becomes_a_cookie_and_a_clean_address(locked):
    code, headers, body = locked.get(f"/?token={TOKEN}")

    pair, attributes = cookie_of(headers)
    name, _, value = pair.partition("=")
    hashes = [hashlib.new(kind, TOKEN.encode()).hexdigest() for kind in ("md5", "sha1", "sha256")]
    assert (code, headers["Location"]) == (303, "./")
    assert attributes == {"HttpOnly", "SameSite=Lax", "Path=/"}
    assert str(locked.port) in name and len(value) >= 32
    assert not any(known in value for known in (TOKEN, base64.b64encode(TOKEN.encode()).decode(), *hashes))
    assert TOKEN.encode() not in body


def test_a_wrong_or_misplaced_token_gets_no_cookie_and_no_way_out(locked):
    targets = [f"/?token={OTHER}", "/?token=", "/?token", f"/?tokens={TOKEN}", f"/?x=/?token={TOKEN}"]
    elsewhere = [f"//evil.example/?token={TOKEN}", f"/\\evil.example/?token={TOKEN}", f"/x/?token={TOKEN}"]

    answers = [locked.get(target) for target in targets + elsewhere]

    assert [code for code, _, _ in answers[: len(targets)]] == [401] * len(targets)
    assert all(code in (401, 404) for code, _, _ in answers)
    assert not any("Set-Cookie" in headers or "Location" in headers for _, headers, _ in answers)


def test_the_cookie_is_of_the_address_and_opens_everything_on_every_replica(serve, locked, log, secret):
    replica, stranger = serve(log, "--token-file", secret), serve(log, env={"AUDIT_STREAM_TOKEN": OTHER})
    host = "audit.example:9443"
    ways = [{"Authorization": RIGHT}, {}]

    pairs = {
        cookie_of(server.get("/" if way else f"/?token={TOKEN}", Host=host, **way)[1])[0]
        for server, way in itertools.product((locked, replica), ways)
    }

    (pair,) = pairs
    foreign, _ = cookie_of(stranger.get(f"/?token={OTHER}", Host=host)[1])
    assert "9443" in pair.partition("=")[0] and foreign != pair
    for server in (locked, replica):
        assert [status(server, path, Host=host, Cookie=pair) for path in API[:4]] == [200] * 4
        assert handshake(server, f"Cookie: {pair}", f"Origin: http://{host}", host=host) == 101
        assert status(server, Host=host, Cookie=foreign) == 401
        assert status(server, Host="audit.example:9444", Cookie=pair) == 401
    assert status(stranger, Host=host, Cookie=pair) == 401


def test_a_wrong_bearer_on_the_page_gets_no_cookie(locked):
    code, headers, _ = locked.get("/", Authorization=f"Bearer {OTHER}")

    assert code == 401 and "Set-Cookie" not in headers


HOSTILE = [
    'foo={"a":1}',
    "a,b=1",
    "=",
    ";;;",
    'quoted="a; b"',
    'open="',
    "$Version=1; $Path=/",
    "no-value",
    "a=b=c=d",
    "expires=Thu, 01 Jan 1970 00:00:00 GMT",
    "k\xe9=\xff\xfe",
    "a\tb = c\t",
    "x=" + "y" * 4000,
]


def test_foreign_cookies_do_not_hide_ours(locked):
    ours, _ = cookie_of(locked.get(f"/?token={TOKEN}")[1])
    name = ours.partition("=")[0]

    for foreign in (*HOSTILE, f"{name}=planted", f"{name}=", f"x{ours}"):
        for cookies in (f"{foreign}; {ours}", f"{ours}; {foreign}", f"a=b;{foreign};{ours};c=d"):
            assert status(locked, Cookie=cookies) == 200, cookies[:80]
    doubled = f"GET / HTTP/1.1\r\nHost: 127.0.0.1:{locked.port}\r\nCookie: a=b\r\nCookie: {ours}\r\n\r\n"
    assert locked.raw(doubled.encode()).startswith(b"HTTP/1.1 200 ")


# -- wrong tokens ------------------------------------------------------------------------------------


def test_a_doubled_authorization_gets_400(locked):
    for values in ((RIGHT, RIGHT), (RIGHT, f"Bearer {OTHER}"), ("", RIGHT)):
        fields = "".join(f"Authorization: {value}\r\n" for value in values)
        request = f"GET /api/audit HTTP/1.1\r\nHost: 127.0.0.1\r\n{fields}\r\n"

        assert locked.raw(request.encode()).startswith(b"HTTP/1.1 400 ")


STRANGE = [
    *(value.encode() for value in ("", "Bearer", "Bearer ", "Bearer é", "Bearer ✅", "bearer", "Basic OmE=", "x y")),
    *(b"Bearer " + value for value in (b"\xff\xfe\x80", b"\xc3", b"a" * 8000, b"%00", b"a b", RIGHT.encode())),
    *(f"{RIGHT}{more}".encode() for more in ("x", ",", " x", f",{RIGHT}", "é")),
]


def test_strange_tokens_are_wrong_tokens(locked, serve, log, secret):
    for number, value in enumerate(STRANGE):
        fields = {"Authorization": value, "Cookie": b"audit_stream_%d=" % locked.port + value}
        requests = [
            b"GET / HTTP/1.1\r\nHost: 127.0.0.1:%d\r\n%s: %s\r\n\r\n" % (locked.port, name.encode(), text)
            for name, text in fields.items()
        ]
        quoted = "".join(f"%{byte:02x}" for byte in value[:2000])
        requests += [
            f"GET /?token={text} HTTP/1.1\r\nHost: 127.0.0.1:{locked.port}\r\n\r\n".encode()
            for text in (quoted, quoted[:-1], f"{quoted}%", f"%zz{quoted}")
        ]

        for request in requests:
            answer = locked.raw(request)
            assert not answer or answer.split()[1] in (b"401", b"429", b"400", b"414", b"431"), (number, request[:200])
            assert b"Set-Cookie" not in answer
    assert status(locked, Authorization=RIGHT) == 200 and said_by(locked) == ""


def test_ten_wrong_tokens_a_minute_and_no_more(locked):
    pair, _ = cookie_of(locked.get(f"/?token={TOKEN}")[1])
    unharmed = [status(locked), status(locked, Cookie=pair[:-1]), status(locked, "/api/audit"), handshake(locked)]
    guesses = itertools.cycle(
        [
            lambda: status(locked, "/api/audit", Authorization=f"Bearer {OTHER}"),
            lambda: status(locked, f"/?token={OTHER}"),
            lambda: handshake(locked, query=f"?token={OTHER}"),
        ]
    )

    harmless = [unharmed for _ in range(5)]
    statuses = [next(guesses)() for _ in range(15)]
    code, headers, body = locked.get("/metrics", Authorization=f"Bearer {OTHER}")

    assert harmless == [[401, 401, 401, 401]] * 5
    assert statuses == [401] * 10 + [429] * 5
    assert code == 429 and 1 <= int(headers["Retry-After"]) <= 60 and json.loads(body)["error"]
    assert status(locked, Authorization=RIGHT) == status(locked, "/api/audit", Cookie=pair) == 200
    assert status(locked, f"/?token={TOKEN}") == 303 and handshake(locked, query=f"?token={TOKEN}") == 101
    assert ask(locked, "/", "127.0.0.2", Authorization=f"Bearer {OTHER}")[0] == 401


def test_a_changed_token_ends_the_old_viewers(locked, log, view, secret):
    old, _ = cookie_of(locked.get(f"/?token={TOKEN}")[1])
    viewers = [view(locked, json=bool(number), headers={"Authorization": RIGHT}) for number in range(2)]

    locked.process.send_signal(signal.SIGHUP)
    unchanged = add(log, "unchanged")
    for viewer in viewers:
        viewer.wait(unchanged)
    before = [status(locked, Authorization=RIGHT) for _ in range(3)]  # by the end of these the signal was heeded
    secret.write_text(OTHER)
    locked.process.send_signal(signal.SIGHUP)

    assert before == [200] * 3
    assert [viewer.closed() for viewer in viewers] == [1008, 1008]
    assert status(locked, Authorization=RIGHT) == status(locked, Cookie=old) == 401
    assert status(locked, Authorization=f"Bearer {OTHER}") == 200
    new, _ = cookie_of(locked.get(f"/?token={OTHER}")[1])
    assert new.partition("=")[0] == old.partition("=")[0] and new != old
    view(locked, headers={"Cookie": new}).wait(unchanged)


@pytest.mark.parametrize("spoil", [Path.unlink, lambda path: path.write_text("\n")], ids=["gone", "empty"])
def test_a_token_file_that_is_lost_opens_nothing(spoil, locked, secret):
    spoil(secret)
    locked.process.send_signal(signal.SIGHUP)
    eventually(lambda: said_by(locked))

    assert status(locked) == status(locked, Authorization="Bearer ") == handshake(locked, query="?token=") == 401


def test_a_credential_that_is_lost_opens_nothing(serve, log, secret):
    append(log, FIRST)
    server = serve(log, env={"CREDENTIALS_DIRECTORY": str(secret.parent)})
    assert secret.name == "token" and status(server) == 401

    secret.unlink()
    server.process.send_signal(signal.SIGHUP)

    assert [status(server, "/api/audit") for _ in range(5)] == [401] * 5
    assert status(server, Authorization=RIGHT) == 200


def test_the_token_is_nowhere_to_be_seen(serve, log, secret, view):
    append(log, FIRST)
    server = serve(log, "--token-file", secret, env={"PYTHONASYNCIODEBUG": "1"})
    targets = [f"{path}{'&' if '?' in path else '?'}token={TOKEN}" for path in (*PATHS, "/healthz", "/ws/audit")]

    answers = [server.get(target) for target in targets]
    answers += [server.get(path, Authorization=RIGHT) for path in PATHS]
    raw = [
        server.raw(f"GET {target} HTTP/1.1\r\nHost: 127.0.0.1\r\nCookie: {TOKEN}\r\n{field}\r\n\r\n".encode())
        for target in (f"/\x1b[31m?token={TOKEN}", f"/?token={TOKEN}", "/" + TOKEN * 1000)
        for field in (f"Authorization: {RIGHT}\r\nAuthorization: {RIGHT}", f"X: {TOKEN * 1000}", f"Range: {TOKEN}")
    ]
    viewer = view(server, headers={"Authorization": RIGHT}).wait(FIRST[-50:])
    process = Path(f"/proc/{server.process.pid}")
    seen = [(process / name).read_bytes() for name in ("cmdline", "environ")]
    seen += [str(headers).encode() + body for _, headers, body in answers] + [viewer.text.encode(), *raw]
    server.stop()

    assert not any(TOKEN.encode() in text for text in seen)
    assert TOKEN not in said_by(server) + server.url


# -- Origin, Host, Sec-Fetch-Site --------------------------------------------------------------------

EVIL = ("http://evil.example", "null", "", "file://", "chrome-extension://abcdef", "://", "http://", "//127.0.0.1")


def test_a_websocket_comes_from_the_own_origin(unlocked):
    port = unlocked.port
    own = f"127.0.0.1:{port}"
    accepted = {
        own: [f"http://{own}"],
        f"LOCALHOST:{port}": [f"http://localhost:{port}"],
        f"localhost:{port}": [f"HTTP://LOCALHOST:{port}"],
        "localhost": ["http://localhost", "http://localhost:80"],
        "localhost:80": ["http://localhost", "http://localhost:80"],
        f"[::1]:{port}": [f"http://[::1]:{port}"],
    }
    refused = {
        own: [
            *(f"http://{host}:{port}" for host in ("localhost", "127.0.0.2", "[::1]", "")),
            *("http://127.0.0.1", f"http://127.0.0.1:{port + 1}"),
            *(f"http://{own}{more}" for more in ("/", "/x", ".evil.example", "@evil.example", "0", " ", "?", "#")),
            *(f"{scheme}://{own}" for scheme in ("https", "ws", "file", "httpx", "xhttp")),
            *(f"http://{before}{own}" for before in ("evil.example/", "user@", "evil.example:80@", "x.")),
            f"http://evil.example http://{own}",
            f"http://evil.example, http://{own}",
            own,
            *EVIL,
        ],
        "localhost": ["http://localhost:8080", "http://localhost:443", "https://localhost", "https://localhost:80"],
        "localhost:443": ["https://localhost", "https://localhost:443", "http://localhost"],
    }

    got = {
        (host, origin): handshake(unlocked, f"Origin: {origin}", host=host)
        for table in (accepted, refused)
        for host, origins in table.items()
        for origin in origins
    }

    expected = {(host, origin): 101 for host, origins in accepted.items() for origin in origins}
    trimmed = {f"http://{own} "}  # white space around a value is none of it
    expected |= {(host, it): 101 if it in trimmed else 403 for host, origins in refused.items() for it in origins}
    assert got == expected
    assert handshake(unlocked) == 101
    assert handshake(unlocked, f"Origin: http://{own}", f"Origin: http://{own}") == 400
    assert handshake(unlocked, f"Origin: http://{own}", "Origin: http://evil.example") == 400


def test_further_origins_may_be_allowed(serve, log):
    server = serve(log, "--allow-origin", "https://ops.example", "--allow-origin", "http://wiki.example:8080")
    right = ("https://ops.example", "https://ops.example:443", "http://wiki.example:8080", server.url[:-1])
    wrong = (
        *(f"https://{host}" for host in ("ops.example:8443", "ops.example.evil", "x.ops.example", "opsxexample")),
        *("http://ops.example", "http://wiki.example", "https://wiki.example:8080", *EVIL),
    )

    assert {origin: handshake(server, f"Origin: {origin}") for origin in right} == dict.fromkeys(right, 101)
    assert {origin: handshake(server, f"Origin: {origin}") for origin in wrong} == dict.fromkeys(wrong, 403)


def test_the_origin_counts_with_the_token_too(locked):
    evil = "Origin: http://evil.example"
    pair, _ = cookie_of(locked.get(f"/?token={TOKEN}")[1])

    for credential in (f"Authorization: {RIGHT}", f"Cookie: {pair}"):
        assert handshake(locked, credential, f"Origin: {locked.url[:-1]}") == 101
        assert handshake(locked, credential, evil) == 403
        assert handshake(locked, credential, "Origin: http://evil.example:80", host="evil.example") in (101, 401)
    assert handshake(locked, evil, query=f"?token={TOKEN}") == 403


GOOD_HOSTS = ["127.0.0.1", "127.0.0.1:1", "192.0.2.7:8080", "[::1]", "[2001:DB8::7]:65535", "localhost", "LocalHost:99"]
GOOD_HOSTS += [socket.gethostname(), f"{socket.gethostname().upper()}:8080", "audit.example", "Audit.Example:8443"]
EVIL_HOSTS = ["evil.example", "127.0.0.1.evil.example", "localhost.evil.example:8080", "x.audit.example", "x.localhost"]
EVIL_HOSTS += ["audit.example.evil", "audit_example", "auditXexample", "evil.example.:80", "localhostx", "1.evil"]
ODD_HOSTS = ["127.1", "2130706433", "0x7f000001", "0177.0.0.1", "127.0.0.1.1", "256.0.0.1", "[localhost]", "[::1"]
ODD_HOSTS += ["%6cocalhost", "localhost%00", "evil@localhost", "localhost@evil", "localhost/../evil", "localhost, evil"]
ODD_HOSTS += ["localhost evil", "localhost:80:80", "localhost:99999", "[::1]x", "::1"]


def test_an_open_server_answers_to_its_own_names_only(serve, log):
    append(log, FIRST)
    server = serve(log, "--allow-host", "AUDIT.example", "--allow-host", "second.example")

    for host in (*GOOD_HOSTS, "second.example"):
        assert status(server, "/healthz", Host=host) == status(server, "/api/audit", Host=host) == 200, host
        assert handshake(server, f"Origin: http://{host.lower()}", host=host) == 101, host
    for host, path in itertools.product(EVIL_HOSTS, (*PATHS, "/healthz", "/ws/audit")):
        assert status(server, path, Host=host) == 403, f"{path} at {host}"
    for host in EVIL_HOSTS:
        assert handshake(server, f"Origin: http://{host}", host=host) == 403, host
    for host in ODD_HOSTS:
        assert {status(server, "/api/audit", Host=host), handshake(server, host=host)} <= {400, 403}, host


def test_a_request_from_another_site_gets_403(unlocked):
    for path in (*API, "/metrics", "/healthz", "/other"):
        assert status(unlocked, path, Sec_Fetch_Site="cross-site") == 403, path
        for harmless in ("same-origin", "none"):
            assert status(unlocked, path, Sec_Fetch_Site=harmless) in (200, 404), path
    assert status(unlocked, "/", Sec_Fetch_Site="cross-site") == 200
    own = f"Origin: http://127.0.0.1:{unlocked.port}"
    assert handshake(unlocked, own, "Sec-Fetch-Site: cross-site") == 101
    assert handshake(unlocked, "Origin: http://evil.example", "Sec-Fetch-Site: same-origin") == 403


def test_the_first_fault_decides(unlocked, locked, serve, log):
    few = serve(log, "--rate-limit", 1)
    faults = {
        "Host: evil.example\r\nHost: evil.example": b"400",
        "Host: evil.example": b"403",
        "Host: 127.0.0.1": b"401",
    }

    def answers(server, method="POST", path="/other"):
        request = f"{method} {path} HTTP/1.1\r\n{{}}\r\nSec-Fetch-Site: cross-site\r\n\r\n"
        return [server.raw(request.format(fault).encode()).split()[1] for fault in faults]

    assert answers(unlocked) == [b"400", b"403", b"405"]
    assert answers(locked) == [b"400", b"401", b"401"]
    assert answers(unlocked, "GET")[2] == b"403"
    assert status(few, "/healthz") in (200, 503) and answers(few) == [b"400", b"429", b"429"]


# -- headers -----------------------------------------------------------------------------------------

FIXED = {
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
}


class Inline(html.parser.HTMLParser):
    """The script and style elements of a page, and whatever would need 'unsafe-inline'."""

    def __init__(self, page):
        super().__init__()
        self.texts, self.loose, self._inside = {"script": [], "style": []}, [], ""
        self.feed(page.decode())

    def handle_starttag(self, tag, attrs):
        self._inside = tag if tag in self.texts else ""
        self.loose += [name for name, _ in attrs if name == "style" or name.startswith("on")]

    def handle_data(self, data):
        if self._inside:
            self.texts[self._inside].append(data)

    def handle_endtag(self, tag):
        self._inside = ""

    def hashes(self, kind):
        digests = (hashlib.sha256(text.encode()).digest() for text in self.texts[kind])
        return {f"'sha256-{base64.b64encode(digest).decode()}'" for digest in digests}


def policy_of(headers):
    directives = (directive.split() for directive in headers["Content-Security-Policy"].split(";"))
    return {name: set(values) for name, *values in directives}


def every_kind_of_answer(server):
    """Answers to authorised and unauthorised requests -> {expected status: (headers, body)}."""
    inside = functools.partial(server.get, Authorization=RIGHT)
    found = {
        200: inside("/"),
        206: inside("/api/audit", Range="bytes=0-9"),
        303: server.get(f"/?token={TOKEN}"),
        400: inside("/api/search?q="),
        401: server.get("/"),
        403: inside("/api/audit", Sec_Fetch_Site="cross-site"),
        404: inside("/other"),
        405: inside("/", method="DELETE"),
        412: inside("/api/audit", If_Match='"other"'),
        416: inside("/api/audit", Range="bytes=999999-"),
        426: inside("/ws/audit"),
        503: inside("/ws/audit", Upgrade="websocket", Connection="Upgrade", Sec_WebSocket_Version="13"),
    }
    more = [inside(path) for path in ("/api/audit", "/metrics", "/healthz")]
    more += [inside("/", Host=host) for host in ("a; script-src *", "audit.example")]
    more += [server.get("/", Authorization=f"Bearer {OTHER}") for _ in range(11)]
    more += [server.get("/", method="HEAD"), inside("/ws/audit", method="POST")]
    assert {status: answer[0] for status, answer in found.items()} == {status: status for status in found}
    assert 429 in [answer[0] for answer in more]
    return list(found.values()) + more


def test_every_answer_says_what_browsers_may_do_with_it(serve, log, secret):
    append(log, FIRST)
    server = serve(log, "--token-file", secret, "--max-viewers", 1)

    with server.upgrade(f"Authorization: {RIGHT}"):
        answers = every_kind_of_answer(server)
    answers.append(server.get("/ws/audit", Authorization=RIGHT, Upgrade="websocket", Sec_WebSocket_Version="7"))

    (_, _, page), (_, _, form) = (server.get("/", **way) for way in ({"Authorization": RIGHT}, {}))
    for code, headers, body in answers:
        assert {name: headers.get_all(name) for name in FIXED} == {name: [text] for name, text in FIXED.items()}, code
        once = ("Content-Security-Policy", "Content-Type", "Content-Length", "Date")
        assert all(len(headers.get_all(name, [])) == 1 for name in once), (code, headers.items())
        assert "Strict-Transport-Security" not in headers
        policy = policy_of(headers)
        assert policy["default-src"] == policy["base-uri"] == policy["frame-ancestors"] == {"'none'"}
        assert not any("unsafe" in source or source == "*" for sources in policy.values() for source in sources)
        for kind in ("script", "style"):
            of_both = Inline(page).hashes(kind) | Inline(form).hashes(kind)
            assert Inline(body).hashes(kind) <= policy[f"{kind}-src"] <= of_both | {"'none'"}, (code, kind)
    assert len(Inline(page).texts["script"]) == len(Inline(form).texts["script"]) == 1
    assert Inline(page).loose == Inline(form).loose == []


def test_the_policy_names_the_address_of_the_websocket(locked):
    for host in (f"127.0.0.1:{locked.port}", "audit.example:9443", "audit.example"):
        policy = policy_of(locked.get("/", Host=host, Authorization=RIGHT)[1])

        assert policy["connect-src"] == {"'self'", f"ws://{host}"}


# -- TLS ---------------------------------------------------------------------------------------------


def openssl(*arguments):
    return subprocess.run(["openssl", *map(str, arguments)], check=True, capture_output=True, timeout=20).stdout


@pytest.fixture(scope="module")
def certificates(tmp_path_factory):
    """The files NAME.cert and NAME.key of two certificates, in one folder."""
    folder = tmp_path_factory.mktemp("certificates")
    for name in ("first", "second"):
        kind = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-days", 2, "-subj", f"/CN={name}")
        names = ("-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1")
        files = ("-keyout", folder / f"{name}.key", "-out", folder / f"{name}.cert")
        openssl("req", "-x509", *kind, *names, *files)
    openssl("ec", "-in", folder / "first.key", "-aes256", "-passout", "pass:example", "-out", folder / "locked.key")
    (folder / "garbage").write_bytes(b"no certificate\n" * 10)
    return folder


@pytest.fixture
def tls_files(certificates, tmp_path):
    """A certificate and a key that a test may replace."""
    return [Path(shutil.copy(certificates / f"first.{kind}", tmp_path / kind)) for kind in ("cert", "key")]


@pytest.fixture
def encrypted(serve, log, tls_files, secret):
    append(log, FIRST)
    cert, key = tls_files
    return serve(log, "--tls-cert", cert, "--tls-key", key, "--token-file", secret)


def trusting(folder, name="first"):
    return ssl.create_default_context(cafile=folder / f"{name}.cert")


def https(server, context, path="/", **headers):
    connection = http.client.HTTPSConnection("127.0.0.1", server.port, timeout=15, context=context)
    with contextlib.closing(connection):
        connection.request("GET", path, headers={name.replace("_", "-"): text for name, text in headers.items()})
        answer = connection.getresponse()
        answer.read()
        return answer.status, answer.headers


def shown(server):
    """The certificate that the server shows now."""
    pem = ssl.get_server_certificate(("127.0.0.1", server.port), timeout=15)
    return pem.replace("\r", "").strip()


def test_tls_is_1_2_or_newer(encrypted, certificates):
    address = f"127.0.0.1:{encrypted.port}"
    client = ["openssl", "s_client", "-connect", address, "-cipher", "DEFAULT@SECLEVEL=0"]

    tries = [
        subprocess.run([*client, f"-{version}"], input=b"", capture_output=True, timeout=15)
        for version in ("tls1", "tls1_1", "tls1_2", "tls1_3")
    ]

    assert encrypted.url == f"https://{address}/"
    assert [each.returncode for each in tries] == [1, 1, 0, 0]
    assert not any(b"no protocols available" in each.stderr for each in tries)  # the client would have
    assert encrypted.raw(b"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n").find(b" 200 ") == -1
    assert https(encrypted, trusting(certificates), Authorization=RIGHT)[0] == 200


def test_under_tls_everything_is_for_tls_only(encrypted, certificates):
    context = trusting(certificates)
    own = f"https://127.0.0.1:{encrypted.port}"

    answers = [https(encrypted, context, path) for path in (f"/?token={TOKEN}", "/", "/other", "/ws/audit")]
    pair, attributes = cookie_of(answers[0][1])
    websocket = functools.partial(connect, f"wss://127.0.0.1:{encrypted.port}/ws/audit", ssl=context)
    with websocket(additional_headers={"Cookie": pair}, origin=own) as viewer:
        first = viewer.recv(timeout=10)
    with pytest.raises(InvalidStatus) as refused:
        websocket(additional_headers={"Cookie": pair}, origin=own.replace("https", "http"))

    assert attributes == {"HttpOnly", "SameSite=Lax", "Path=/", "Secure"}
    for code, headers in answers:
        (transport,) = headers.get_all("Strict-Transport-Security")
        assert int(re.search(r"max-age=(\d+)", transport)[1]) > 0, code
        assert f"wss://127.0.0.1:{encrypted.port}" in policy_of(headers)["connect-src"]
    assert FIRST.endswith(first) and refused.value.response.status_code == 403


def test_a_renewed_certificate_is_taken_up_on_sighup(encrypted, certificates, tls_files):
    pem = {name: (certificates / f"{name}.cert").read_text().strip() for name in ("first", "second")}
    before = shown(encrypted)
    context = trusting(certificates)
    headers = {"Authorization": RIGHT}

    with connect(f"wss://127.0.0.1:{encrypted.port}/ws/audit", ssl=context, additional_headers=headers) as viewer:
        viewer.recv(timeout=10)
        for file, kind in zip(tls_files, ("cert", "key"), strict=True):
            shutil.copy(certificates / f"second.{kind}", file)
        encrypted.process.send_signal(signal.SIGHUP)
        eventually(lambda: shown(encrypted) == pem["second"])
        added = add(encrypted.log, "still here")

        assert before == pem["first"]
        assert viewer.recv(timeout=10) == added
        assert https(encrypted, trusting(certificates, "second"), **headers)[0] == 200


SPOILED = {
    "mismatch": ("second.cert", "first.key"),
    "other key": ("first.cert", "second.key"),
    "garbage certificate": ("garbage", "first.key"),
    "garbage key": ("first.cert", "garbage"),
    "no certificate": (None, "first.key"),
    "no key": ("first.cert", None),
    "encrypted key": ("first.cert", "locked.key"),
    "only a key": ("first.key", "first.key"),
}


def test_files_that_do_not_load_leave_the_certificate_as_it_is(encrypted, certificates, tls_files):
    context = trusting(certificates)

    for name, files in SPOILED.items():
        said = len(said_by(encrypted))
        for target, source in zip(tls_files, files, strict=True):
            target.unlink(missing_ok=True)
            if source:
                shutil.copy(certificates / source, target)
        encrypted.process.send_signal(signal.SIGHUP)
        words = eventually(lambda said=said: said_by(encrypted)[said:], message=f"not a word about {name}")

        assert len(words.splitlines()) == 1 and any(str(file) in words for file in tls_files), (name, words)
        assert https(encrypted, context, Authorization=RIGHT)[0] == 200, name


def test_a_bad_certificate_does_not_keep_an_old_token_valid(encrypted, certificates, tls_files, secret):
    context = trusting(certificates)
    shutil.copy(certificates / "garbage", tls_files[0])
    secret.write_text(OTHER)

    encrypted.process.send_signal(signal.SIGHUP)

    eventually(lambda: https(encrypted, context, Authorization=RIGHT)[0] == 401, message="the old token still opens")
    assert https(encrypted, context, Authorization=f"Bearer {OTHER}")[0] == 200


@pytest.mark.parametrize("files", SPOILED.values(), ids=SPOILED)
def test_a_certificate_that_cannot_be_used_is_one_clear_line(files, certificates, log):
    cert, key = (certificates / (name or "nowhere") for name in files)
    master, slave = pty.openpty()
    try:
        terminal = ["setsid", "--ctty", "--wait", sys.executable, str(SCRIPT), "--log", str(log), "--port", "0"]
        command = [*terminal, "--tls-cert", str(cert), "--tls-key", str(key)]

        finished = subprocess.run(command, stdin=slave, capture_output=True, text=True, timeout=20, env=environment())

        os.set_blocking(master, False)
        with pytest.raises(BlockingIOError):  # nobody was asked for a pass phrase
            os.read(master, 100)
    finally:
        os.close(master)
        os.close(slave)
    assert (finished.returncode, finished.stdout) == (1, "")
    assert len(finished.stderr.splitlines()) == 1 and "Traceback" not in finished.stderr
    assert str(cert) in finished.stderr or str(key) in finished.stderr


# -- limits ------------------------------------------------------------------------------------------


def test_a_viewer_too_many_gets_503_until_one_leaves(serve, log):
    server = serve(log, "--max-viewers", 2)

    with contextlib.ExitStack() as stack:
        first = stack.enter_context(server.upgrade())
        stack.enter_context(server.upgrade())
        full = [handshake(server) for _ in range(3)]
        page = status(server)
        first.close()

        eventually(lambda: handshake(server) == 101)
    assert full == [503] * 3 and page == 200


def test_answers_are_limited_by_the_minute_and_the_address(serve, log):
    server = serve(log, "--rate-limit", 60)

    accepted = [handshake(server) for _ in range(80)]
    refused = [handshake(server, "Origin: http://evil.example") for _ in range(10)]
    statuses = [status(server, path) for path in itertools.islice(itertools.cycle(("/healthz", "/", "/other")), 48)]
    code, headers, body = eventually(lambda: (answer := server.get("/metrics"))[0] == 429 and answer)
    elsewhere = ask(server, source="127.0.0.2")[0]
    wait = int(headers["Retry-After"])
    eventually(lambda: status(server) == 200, seconds=wait + 1)

    assert accepted == [101] * 80 and refused == [403] * 10 and set(statuses) == {503, 200, 404}
    assert code == 429 and json.loads(body)["error"] and 1 <= wait <= 60
    assert elsewhere == 200


def test_the_limit_of_answers_is_600_unless_told_otherwise(serve, log):
    usual, unlimited = serve(log, dev=False), serve(log, "--rate-limit", 0, dev=False)

    statuses = [[status(server, "/healthz") for _ in range(600)] for server in (usual, unlimited)]

    assert statuses == [[503] * 600] * 2
    eventually(lambda: status(usual, "/healthz") == 429, message="no end")
    assert [status(unlimited, "/healthz") for _ in range(100)] == [503] * 100


FORWARDED = "203.0.113.7"


def used_up(server, source="127.0.0.1", **headers):
    """Ask until that is too much; is it too much for another X-Forwarded-For, too?"""
    for _ in range(4):
        ask(server, "/healthz", source, **headers)
    assert ask(server, "/healthz", source, **headers)[0] == 429
    return ask(server, "/healthz", source, X_Forwarded_For="198.51.100.9")[0] == 429


def test_only_a_trusted_proxy_names_the_client(serve, log):
    trust = ([], ["--trust-proxy"], ["--trust-proxy", "127.0.0.2"])
    nobody, loopback, one = (serve(log, "--rate-limit", 3, *more) for more in trust)

    assert used_up(nobody, X_Forwarded_For=FORWARDED)
    assert not used_up(loopback, X_Forwarded_For=FORWARDED)
    assert used_up(one, X_Forwarded_For=FORWARDED)
    assert not used_up(one, "127.0.0.2", X_Forwarded_For=FORWARDED)


def test_the_last_forwarded_address_counts(serve, log):
    server = serve(log, "--rate-limit", 3, "--trust-proxy")
    invented = (f"10.0.0.{number}, {FORWARDED}" for number in range(10))

    statuses = [status(server, "/healthz", X_Forwarded_For=value) for value in invented]
    doubled = "".join(f"X-Forwarded-For: {address}\r\n" for address in ("10.1.1.1", FORWARDED))
    strange = [status(server, "/healthz", X_Forwarded_For=value) for value in ("", ",", "x", "::1%lo", "é", "1" * 4000)]

    assert statuses == [503] * 3 + [429] * 7
    assert server.raw(f"GET /healthz HTTP/1.1\r\nHost: localhost\r\n{doubled}\r\n".encode()).split()[1] == b"429"
    assert set(strange) <= {503, 429}


def test_only_a_trusted_proxy_names_the_scheme(serve, log, secret):
    plain, proxied = (serve(log, "--token-file", secret, *more) for more in ([], ["--trust-proxy"]))
    secure = {"X_Forwarded_Proto": "https", "Host": "audit.example"}
    fields = [f"Authorization: {RIGHT}", "X-Forwarded-Proto: https"]
    origins = ("http://audit.example", "https://audit.example")

    attributes = [cookie_of(server.get(f"/?token={TOKEN}", **secure)[1])[1] for server in (plain, proxied)]
    statuses = [
        [handshake(server, *fields, f"Origin: {origin}", host="audit.example") for origin in origins]
        for server in (plain, proxied)
    ]

    assert ["Secure" in each for each in attributes] == [False, True]
    assert statuses == [[101, 403], [403, 101]]
    assert "wss://audit.example" in policy_of(proxied.get("/", **secure)[1])["connect-src"]


def ended(client):
    """Has the server closed this connection? It was sent nothing else."""
    client.setblocking(False)
    try:
        return client.recv(1) == b""
    except BlockingIOError:
        return False
    except ConnectionError:
        return True


def test_of_too_many_silent_connections_the_oldest_goes(serve, log, view):
    append(log, FIRST)
    server = serve(log, prefix=("prlimit", "--nofile=128:128"))
    viewer = view(server).wait(FIRST[-50:])
    assert len(said_by(server).splitlines()) == 1 and re.search(r"\d+ viewers", said_by(server))

    with contextlib.ExitStack() as stack:
        clients = []
        for number in range(150):
            clients.append(stack.enter_context(server.connect()))
            clients[-1].sendall(b"GET /healthz HTTP/1.1\r\nHost: 127.0.0.1\r\n")
            if number % 10 == 0:
                assert status(server) == 200
        eventually(lambda: ended(clients[0]), seconds=4)
        added = add(log, "meanwhile")
        viewer.wait(added)
        page = status(server)
        clients[-1].setblocking(True)
        clients[-1].sendall(b"\r\n")

        assert page == 200 and clients[-1].recv(100).startswith(b"HTTP/1.1 200 ")
        assert server.sockets() < 128


def test_slow_clients_get_their_page_and_half_requests_an_end(locked):
    whole = locked.get("/", Authorization=RIGHT)[2]
    with contextlib.ExitStack() as stack:
        halves = [stack.enter_context(locked.connect()) for _ in range(12)]
        for number, client in enumerate(halves[:9]):
            client.sendall(b"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\n"[: 4 * number])
        slow = stack.enter_context(locked.connect(receive_buffer=2048))
        slow.sendall(f"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\nAuthorization: {RIGHT}\r\n\r\n".encode())
        answer = bytearray()
        while piece := slow.recv(1000):
            answer += piece
            time.sleep(0.05)  # 20 kB/s
        for client in halves:
            client.settimeout(15)

        assert answer.partition(b"\r\n\r\n")[2] == whole
        assert [client.recv(100) for client in halves] == [b""] * len(halves)


def test_processes_share_a_port_if_they_may(serve, log, secret):
    port = free_port()
    options = ("--reuse-port", "--token-file", secret)
    pair = [serve(log, *options, port=port) for _ in range(2)]

    began = {of(samples(pair[0]), "start_time") for _ in range(60)}
    pair[0].stop()
    later = [status(pair[1], Authorization=RIGHT) for _ in range(20)]

    assert len(began) == 2 and later == [200] * 20


def test_processes_with_tokens_of_their_own_do_not_share_a_port(log):
    code, said = launch("--log", log, "--host", "0.0.0.0", "--reuse-port")

    assert code == 2 and "--reuse-port" in said


# -- /metrics ----------------------------------------------------------------------------------------

SAMPLE = re.compile(
    r'(audit_stream_[a-z0-9_]+)(\{(?:[a-z_]+="(?:[^"\\\n]|\\[\\"n])*",?)*\})? (-?[0-9.e+-]+|NaN|[+-]Inf)'
)


def samples(server):
    """{name with labels: value}, of a text whose every sample follows the TYPE of its family."""
    code, headers, body = server.get("/metrics", Authorization=RIGHT)
    assert code == 200 and headers["Content-Type"].startswith("text/plain") and body.endswith(b"\n")
    values, family, seen = {}, "", set()
    for line in body.decode().splitlines():
        if declared := re.fullmatch(r"# TYPE (audit_stream_[a-z0-9_]+) (counter|gauge)", line):
            family, kind = declared.groups()
            assert family not in seen and (kind == "counter") == family.endswith("_total")
            seen.add(family)
        elif not line.startswith("# HELP "):
            name, labels, value = SAMPLE.fullmatch(line).groups()
            assert name == family and name + (labels or "") not in values, line
            values[name + (labels or "")] = float(value)
    return values


def of(values, *words):
    """The sum of the samples whose names have all these words."""
    return sum(value for name, value in values.items() if all(word in name for word in words))


def test_metrics_tell_what_happens(locked, log, view):
    before, clock = samples(locked), time.time()
    viewer = view(locked, json=True, headers={"Authorization": RIGHT}).wait(FIRST[-50:])
    added = add(log, "counted", 7)
    viewer.wait(added)
    locked.get("/api/search?q=entry", Authorization=RIGHT)
    locked.get("/api/audit")
    during = eventually(lambda: of(now := samples(locked), "viewers", "live") == 1 and now)
    log.rename(f"{log}.1")
    more = add(log, "new", 5)
    viewer.wait(more)
    after = samples(locked)
    viewer.close()

    def moved(*words, since=before):
        return of(after, *words) - of(since, *words)

    assert of(before, "viewers") == 0 and of(during, "viewers") == 1
    assert moved("lines") == 12 and moved("bytes", "read") == len((added + more).encode())
    assert moved("bytes", "sent") >= len((added + more).encode())
    assert moved("search") >= 1 and moved("refused") == 1
    assert moved("generation", since=during) == moved("generation", "rotated", since=during) == 1
    assert of(after, "behind") == 0
    assert clock - 60 < of(after, "start_time") < clock
    assert of(after, "build_info") == 1 and any('version="' in name for name in after if "build_info" in name)
    assert all(after.get(name, 0) >= value for name, value in before.items() if "_total" in name)
    eventually(lambda: of(samples(locked), "viewers") == 0)


# -- garbage -----------------------------------------------------------------------------------------

TARGETS = ["/", *API, "/metrics", "/healthz", "/ws/audit", "/other", "//", "*", "http://evil.example/", "/%2e%2e/"]
PARTS = [b"\r\n", b"\n", b"\r", b"\0", b"\x1b[31m", b" ", b"\t", b":", b"%", b"%00", b"%ff", b"?", b"&", b"=", b"#"]
PARTS += [b";", b"\x85"]
PARTS += [b"\xff\xfe", "é✅".encode(), b"-1", b"1e999", b"9" * 40, b"nan", b"/../", b'"', b"(", b"[", b"{1,9999}", b","]
PARTS += [b"a" * 9000, b"token=", b"since=", b"q=", b"before=", b"points=", b"HTTP/1.1", b"GET", b"chunked"]
VALUES = {
    "Host": ["127.0.0.1", "localhost:80", "evil.example", "[::1]", "", "a b"],
    "Origin": ["http://127.0.0.1", "null", "http://evil.example"],
    "Authorization": [RIGHT, "Bearer x", "Basic eA=="],
    "Cookie": ["a=b", "; ; =", "audit_stream_80=x"],
    "Range": ["bytes=0-9", "bytes=-5", "bytes=9-1", "bytes=0-1,3-4", "lines=1-2", "bytes=99999999999999999999-"],
    "If-Match": ["*", '"x"', "x", 'W/"x"'],
    "Sec-Fetch-Site": ["cross-site", "same-origin", "?"],
    "X-Forwarded-For": ["1.2.3.4", "x, y", "::"],
    "X-Forwarded-Proto": ["https", "gopher"],
    "Upgrade": ["websocket", "h2c", "websocket, x"],
    "Connection": ["Upgrade", "keep-alive", "close, upgrade"],
    "Sec-WebSocket-Key": [KEY, "x", ""],
    "Sec-WebSocket-Version": ["13", "8", "x"],
    "Sec-WebSocket-Protocol": ["audit.v1.json", "x, audit.v1.json", ", ,"],
    "Sec-WebSocket-Extensions": ["permessage-deflate", "x; y=z", ";;"],
    "Content-Length": ["0", "5", "-1", "+0", "99999999999999999999"],
    "Transfer-Encoding": ["chunked", "identity"],
    "Expect": ["100-continue"],
}
QUERIES = ["", "?q=entry", "?q=a(b&case=1&limit=3", "?points=7", "?time=2025", "?since=1.2", "?bytes=10", "?token=x"]


def mutated(data, dice, times):
    for _ in range(times):
        at, length = dice.randrange(len(data) + 1), dice.choice((0, 0, 1, 5, 50))
        inserted = dice.choice((b"", dice.randbytes(3), dice.choice(PARTS), data[at : at + 20]))
        data = data[:at] + inserted + data[at + length :]
    return data


def random_request(dice):
    """A request that is about right, or not at all."""
    host = f"Host: {dice.choice(VALUES['Host'][:2])}"
    names = dice.sample(list(VALUES), k=dice.choice((0, 0, 1, 1, 2, 5)))
    fields = [host, f"Authorization: {RIGHT}"] if dice.random() < 0.9 else []
    fields += [f"{name}: {dice.choice(VALUES[name])}" for name in names]
    method = dice.choice(("GET",) * 12 + ("HEAD", "POST", "OPTIONS", "TRACE", "get", "PRI"))
    version = dice.choice(("HTTP/1.1",) * 20 + ("HTTP/1.0", "HTTP/2.0", "HTTP/0.9", "x"))
    target = dice.choice(TARGETS) + dice.choice(QUERIES)
    request = "\r\n".join([f"{method} {target} {version}", *fields, "", ""]).encode()
    return [mutated(request, dice, dice.choice((0, 0, 0, 1, 1, 1, 2, 30)))]


def random_frames(dice):
    """A handshake that succeeds, and then frames that are about right, or not at all."""
    fields = ["Host: 127.0.0.1", f"Authorization: {RIGHT}", "Upgrade: websocket", "Connection: Upgrade"]
    fields += [f"Sec-WebSocket-Key: {KEY}", "Sec-WebSocket-Version: 13"]
    fields += dice.choice(([], ["Sec-WebSocket-Protocol: audit.v1.json"]))
    since = "".join(dice.choice("0123456789.-_abcXYZ%&=+;") for _ in range(dice.choice((0, 3, 40, 400))))
    start = "\r\n".join([f"GET /ws/audit?since={since} HTTP/1.1", *fields, "", ""]).encode()
    frames = b""
    for _ in range(dice.randrange(1, 12)):
        payload = dice.randbytes(dice.choice((0, 1, 2, 60, 125)))
        claimed = dice.choice((len(payload),) * 6 + (126, 127))
        extended = dice.choice((b"", struct.pack(">H", len(payload)), struct.pack(">Q", 2**40)))
        opcode = dice.choice((0x81, 0x82, 0x01, 0x00, 0x80, 0x88, 0x89, 0x8A, 0x83, 0xC1, 0xF1, dice.randrange(256)))
        frames += bytes([opcode, claimed | dice.choice((0x80,) * 5 + (0,))]) + extended + bytes(4) + payload
    frames = mutated(frames, dice, dice.choice((0, 0, 1, 5)))
    return [start, frames] if dice.random() < 0.8 else [start + frames]


def exchange(server, first, *later):
    """What is answered to each part until the server closes: for that it is shown the end, unless it was quicker."""
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


def test_garbage_by_the_hundred_leaves_it_alive_and_quiet(serve, log, view, secret):
    append(log, FIRST)
    server = serve(log, "--token-file", secret, "--rate-limit", 0)
    viewer = view(server, json=True, headers={"Authorization": RIGHT}).wait(FIRST[-50:])
    eventually(lambda: server.get("/healthz")[0] == 200)
    sockets = server.sockets()
    kinds = [random_request] * 4 + [random_frames]

    def attempt(number):
        parts = kinds[number % len(kinds)](random.Random(f"{SEED}-{number}"))
        return number, parts, exchange(server, *parts)

    with ThreadPoolExecutor(12) as pool:
        tries = list(pool.map(attempt, range(1500)))
    added = add(log, "afterwards")

    # frames before the handshake is answered may get a frame, as the library does it
    known = re.compile(rb"$|HTTP/1\.1 (101|200|206|303|4\d\d|503|505) |[\x88\x8a]")
    assert [(SEED, *each) for each in tries if not known.match(each[2])] == []
    statuses = collections.Counter(answer[9:12] for _, _, answer in tries)
    assert min(statuses[status] for status in (b"101", b"200", b"400", b"404", b"")) >= 10, statuses
    viewer.wait(added, 2).joined()
    assert server.get("/", Authorization=RIGHT)[0] == 200
    assert said_by(server) == "", f"the seed is {SEED}"
    eventually(lambda: server.sockets() <= sockets, seconds=15, message=f"{server.sockets()} sockets, not {sockets}")


def test_pipelined_requests_are_dropped_without_a_word(serve, log):
    server = serve(log, "--rate-limit", 0)
    tails = [b"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n", b"\x88\x80\0\0\0\0" * 2, b"\xff" * 20]
    requests = [f"GET {path} HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n".encode() for path in ("/", "/other", "/ws/audit")]

    with ThreadPoolExecutor(12) as pool:
        list(pool.map(lambda parts: exchange(server, b"".join(parts)), [*itertools.product(requests, tails)] * 10))

    assert server.get("/")[0] == 200 and said_by(server) == ""


# -- NGINX -------------------------------------------------------------------------------------------

BELOW = "/logs/audit"
CONFIGURATION = """
daemon off; pid {folder}/pid; error_log {folder}/error.log; worker_processes 1; {user}
events {{ worker_connections 256; }}
http {{
    access_log off;
    client_body_temp_path {folder}/body; proxy_temp_path {folder}/proxy; fastcgi_temp_path {folder}/fastcgi;
    uwsgi_temp_path {folder}/uwsgi; scgi_temp_path {folder}/scgi;
    map $http_upgrade $connection_upgrade {{ default upgrade; '' close; }}
    server {{
        listen 127.0.0.1:{port};
        location {below}/ {{
            proxy_pass http://127.0.0.1:{upstream}/;
            proxy_http_version 1.1;
            proxy_set_header Host $http_host;
            proxy_set_header Upgrade $http_upgrade;
            proxy_set_header Connection $connection_upgrade;
            proxy_set_header X-Forwarded-For $remote_addr;
            proxy_set_header X-Forwarded-Proto $scheme;
            proxy_buffering off;
            proxy_read_timeout 120s;
        }}
    }}
}}
"""


@pytest.fixture
def nginx(tmp_path):
    """Starts NGINX in front of a server; the server as one reaches it through that."""
    program = shutil.which("nginx", path=f"{os.environ.get('PATH', '')}:/usr/sbin")
    if not program:
        unavailable("nginx is not installed")
    with contextlib.ExitStack() as stack:

        def start(server):
            behind = copy.copy(server)
            behind.port, user = free_port(), "user root;" if os.geteuid() == 0 else ""
            file = tmp_path / "nginx.conf"
            places = {"folder": tmp_path, "below": BELOW, "port": behind.port, "upstream": server.port}
            file.write_text(CONFIGURATION.format(user=user, **places))
            process = subprocess.Popen([program, "-e", str(tmp_path / "error.log"), "-c", str(file)])
            stack.callback(process.wait, 10)
            stack.callback(process.terminate)
            eventually(behind.listens)
            return behind

        yield start


def test_behind_nginx_below_a_path_all_is_as_without(serve, nginx, log, secret):
    append(log, FIRST)
    behind = nginx(serve(log, "--token-file", secret, "--trust-proxy"))
    own = f"http://127.0.0.1:{behind.port}"

    code, headers, _ = behind.get(f"{BELOW}/?token={TOKEN}")
    pair, _ = cookie_of(headers)
    page = behind.get(f"{BELOW}/", Cookie=pair)
    ranged = behind.get(f"{BELOW}/api/audit", Cookie=pair, Range="bytes=0-9")
    url = f"ws://127.0.0.1:{behind.port}{BELOW}/ws/audit"
    with connect(url, origin=own, additional_headers={"Cookie": pair}) as viewer:
        received = viewer.recv(timeout=10)
        added = add(log, "through NGINX")
        fresh = viewer.recv(timeout=10)

    assert (code, headers["Location"]) == (303, "./") and str(behind.port) in pair.partition("=")[0]
    assert page[0] == 200 and b"auditBox" in page[2]
    assert policy_of(page[1])["connect-src"] == {"'self'", own.replace("http", "ws")}
    assert ranged[0] == 206 and ranged[2] == FIRST.encode()[:10]
    assert FIRST.endswith(received) and fresh == added
    below = functools.partial(handshake, behind, f"Cookie: {pair}", path=f"{BELOW}/ws/audit")
    assert below(f"Origin: {own}", "X-Forwarded-Proto: https") == 101
    assert below(f"Origin: {own.replace('http', 'https')}", "X-Forwarded-Proto: https") == 403
    assert below("Origin: http://evil.example") == below(f"Origin: http://127.0.0.1:{behind.port + 1}") == 403
    invented = ({"X_Forwarded_For": f"10.9.8.{number}", "Authorization": "Bearer x"} for number in range(11))
    assert [status(behind, f"{BELOW}/", **fields) for fields in invented] == [401] * 10 + [429]


INNER = "GET /smuggled HTTP/1.1\r\nHost: 127.0.0.1\r\nX: "
CHUNKED = f"0\r\n\r\n{INNER}"
SMUGGLED = {
    "CL.TE": (f"Content-Length: {len(CHUNKED)}\r\nTransfer-Encoding: chunked", CHUNKED),
    "TE.CL": ("Transfer-Encoding: chunked\r\nContent-Length: 4", f"{len(INNER):x}\r\n{INNER}\r\n0\r\n\r\n"),
    "TE.TE": ("Transfer-Encoding: chunked\r\nTransfer-Encoding: x", CHUNKED),
    "TE with a tab": (f"Transfer-Encoding:\tchunked\r\nContent-Length: {len(CHUNKED)}", CHUNKED),
    "TE with a space": (f"Transfer-Encoding : chunked\r\nContent-Length: {len(CHUNKED)}", CHUNKED),
    "CL.0": (f"Content-Length: {len(INNER)}", INNER),
    "CL.CL": (f"Content-Length: 0\r\nContent-Length: {len(INNER)}", INNER),
    "no handshake": ("Upgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Version: 99", INNER),
    "line feed": (f"X: y\n\n{INNER}", ""),
    "in a header": (f"X: y\rContent-Length: {len(INNER)}", INNER),
}


def test_nothing_is_smuggled_through_nginx(serve, nginx, log):
    append(log, FIRST)
    server = serve(log, "--trust-proxy", "--rate-limit", 0)
    behind = nginx(server)
    not_found = 'status="404"'

    for name, (fields, body) in SMUGGLED.items():
        for method, path in itertools.product(("GET", "POST"), ("/", "/ws/audit")):
            start = f"{method} {BELOW}{path} HTTP/1.1\r\nHost: 127.0.0.1:{behind.port}\r\n"
            exchange(behind, f"{start}{fields}\r\n\r\n{body}".encode())
            after = [behind.get(f"{BELOW}/api/audit") for _ in range(2)]

            assert {(code, text) for code, _, text in after} == {(200, FIRST.encode())}, name
    assert of(samples(server), not_found) == 0  # nobody asked for /smuggled
    assert behind.get(f"{BELOW}/smuggled")[0] == 404 and of(samples(server), "refused") >= 1


# -- browsers ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["chromium", "firefox"])
def browser(request):
    started = BROWSERS[request.param]()
    yield started
    started.quit()


@pytest.fixture
def window(browser):
    page = browser.page()
    yield page
    page.close()


class OtherSite(http.server.BaseHTTPRequestHandler):
    """A page of someone else; its path is the address of the link on it."""

    def do_GET(self):
        link = html.escape(self.path[1:])
        body = f"<!DOCTYPE html><title>other</title><link rel=icon href=data:,><a href='{link}'>the log</a>".encode()
        self.send_response(200)
        self.send_header("Content-Type", "text/html")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


@pytest.fixture
def other_site():
    """The port of a web server for pages of other origins."""
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), OtherSite) as site:
        thread = threading.Thread(target=site.serve_forever, args=(0.02,))
        thread.start()
        yield site.server_port
        site.shutdown()
        thread.join()


ATTEMPTS = """(async url => {
    const within = promise => Promise.race([promise, new Promise(done => setTimeout(done, 5000, 'nothing'))])
    const load = (kind, path) => within(new Promise(done => {
        const element = document.createElement(kind)
        element.onload = () => done('loaded')
        element.onerror = () => done('refused')
        element.src = url + path
        document.body.append(element)
    }))
    const read = options => within(fetch(url + 'api/audit', options).then(reply => reply.text()).catch(() => 'refused'))
    const socket = new WebSocket(url.replace('http', 'ws') + 'ws/audit')
    const opened = within(new Promise(done => {
        socket.onopen = socket.onmessage = () => done('opened')
        socket.onerror = () => done('refused')
    }))
    const frame = document.createElement('iframe')
    frame.src = url
    const framed = await within(new Promise(done => {
        frame.onload = () => done('')
        document.body.append(frame)
    }))
    let inside = 'refused'
    try { inside = frame.contentDocument && frame.contentDocument.body.innerText || 'refused' } catch (error) {}
    return {
        fetch: await read({ credentials: 'include' }),
        opaque: await read({ credentials: 'include', mode: 'no-cors' }),
        header: await read({ headers: { 'X-Other': 'y' } }),
        socket: await opened,
        image: await load('img', 'api/audit'),
        script: await load('script', 'api/audit'),
        page: await load('script', ''),
        metrics: await load('script', 'metrics'),
        frame: inside,
    }
})(%r)"""


def test_a_page_of_another_origin_cannot_read_the_log(browser, window, serve, log, secret, other_site):
    append(log, FIRST)
    opened, locked = serve(log), serve(log, "--token-file", secret)
    window.goto(f"{locked.url}?token={TOKEN}")
    window.wait("document.querySelector('#status').dataset.state === 'live'")
    own = window.js("fetch('api/audit').then(reply => reply.text())")

    tried = {}
    for host, server in itertools.product(("127.0.0.1", "localhost"), (opened, locked)):
        window.goto(f"http://{host}:{other_site}/")
        tried[host, server.port] = window.js(ATTEMPTS % server.url, timeout=60)

    assert own == FIRST
    for where, attempts in tried.items():
        assert {name: result for name, result in attempts.items() if result not in ("refused", "")} == {}, where
    assert of(samples(opened), "viewers") == of(samples(locked), "viewers") == 0


def violations(page):
    return [text for _, text in page.console if re.search("content.security.policy|violates", text, re.IGNORECASE)]


def arrives(page, address):
    """The browser ends at the clean address, connected and without a word about the policy."""
    ready = f"location.href === {address!r} && document.querySelector('#status')?.dataset.state === 'live'"

    def there():
        with contextlib.suppress(RuntimeError):  # between two pages there is none to ask
            return page.js(ready)

    eventually(there, seconds=20)
    assert page.js("getComputedStyle(document.body).margin !== '8px'")  # the styles apply
    assert violations(page) == []


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
def test_a_link_with_a_token_on_another_site_works(host, browser, window, locked, other_site):
    window.goto(f"http://{host}:{other_site}/{locked.url}?token={TOKEN}")
    x, y = window.js("(at => [at.x + at.width / 2, at.y + at.height / 2])(document.links[0].getBoundingClientRect())")

    window.mouse(x, y)

    arrives(window, locked.url)
    assert window.js("document.cookie") == "" and window.js("document.referrer") in ("", f"http://{host}:{other_site}/")


def test_the_page_lives_below_a_path_of_nginx(browser, window, serve, nginx, log, secret):
    append(log, FIRST)
    behind = nginx(serve(log, "--token-file", secret, "--trust-proxy"))
    address = f"http://127.0.0.1:{behind.port}{BELOW}/"

    window.goto(f"{address}?token={TOKEN}")

    arrives(window, address)


def test_the_form_takes_the_token(browser, window, locked):
    window.goto(locked.url)

    window.js("document.querySelector('input').focus()")
    window.type("wrong-token")
    window.press("Enter")
    window.wait("/token/i.test(document.querySelector('output, [role=alert], [role=status]').textContent)")
    after = window.js("location.href")
    window.js("document.querySelector('input').value = ''")
    window.type(TOKEN)
    window.press("Enter")

    arrives(window, locked.url)
    assert after == locked.url and TOKEN not in said_by(locked)
