"""Who gets in, under which name and from which page, and what a browser may do with the answer."""

import base64
import functools
import hashlib
import html
import html.parser
import http.client
import http.server
import itertools
import json
import re
import signal
import socket
import threading
from pathlib import Path

import pytest
from harness import (
    API,
    FIRST,
    OTHER,
    PATHS,
    RIGHT,
    TOKEN,
    add,
    append,
    cookie_of,
    eventually,
    handshake,
    launch,
    of,
    policy_of,
    said_by,
    samples,
    status,
)
from page_actions import CENTRE, arrives

# -- the token -------------------------------------------------------------------------------------


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
        answers = [
            status(server),
            status(server, Authorization=f"Bearer {token}"),
            status(server, f"/?token={token}"),
        ]
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


@pytest.mark.parametrize(
    "put", [lambda path: path.symlink_to(path), Path.mkdir], ids=["loop", "folder"]
)
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
    assert (
        handshake(locked)
        == handshake(locked, "Origin: http://evil.example", host="evil.example")
        == 401
    )


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
    assert (
        handshake(locked, f"Authorization: Bearer {OTHER}")
        == handshake(locked, query=f"?token={OTHER}")
        == 401
    )


# -- the cookie ------------------------------------------------------------------------------------


def test_an_address_with_the_token_becomes_a_cookie_and_a_clean_address(locked):
    code, headers, body = locked.get(f"/?token={TOKEN}")

    pair, attributes = cookie_of(headers)
    name, _, value = pair.partition("=")
    hashes = [hashlib.new(kind, TOKEN.encode()).hexdigest() for kind in ("md5", "sha1", "sha256")]
    assert (code, headers["Location"]) == (303, "./")
    assert attributes == {"HttpOnly", "SameSite=Lax", "Path=/"}
    assert str(locked.port) in name and len(value) >= 32
    assert not any(
        known in value for known in (TOKEN, base64.b64encode(TOKEN.encode()).decode(), *hashes)
    )
    assert TOKEN.encode() not in body


def test_a_wrong_or_misplaced_token_gets_no_cookie_and_no_way_out(locked):
    targets = [
        f"/?token={OTHER}",
        "/?token=",
        "/?token",
        f"/?tokens={TOKEN}",
        f"/?x=/?token={TOKEN}",
    ]
    elsewhere = [
        f"//evil.example/?token={TOKEN}",
        f"/\\evil.example/?token={TOKEN}",
        f"/x/?token={TOKEN}",
    ]

    answers = [locked.get(target) for target in targets + elsewhere]

    assert [code for code, _, _ in answers[: len(targets)]] == [401] * len(targets)
    assert all(code in (401, 404) for code, _, _ in answers)
    assert not any("Set-Cookie" in headers or "Location" in headers for _, headers, _ in answers)


def test_the_cookie_is_of_the_address_and_opens_everything_on_every_replica(
    serve, locked, log, secret
):
    replica, stranger = (
        serve(log, "--token-file", secret),
        serve(log, env={"AUDIT_STREAM_TOKEN": OTHER}),
    )
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
    doubled = (
        f"GET / HTTP/1.1\r\nHost: 127.0.0.1:{locked.port}\r\nCookie: a=b\r\nCookie: {ours}\r\n\r\n"
    )
    assert locked.raw(doubled.encode()).startswith(b"HTTP/1.1 200 ")


# -- wrong tokens ----------------------------------------------------------------------------------


def test_a_doubled_authorization_gets_400(locked):
    for values in ((RIGHT, RIGHT), (RIGHT, f"Bearer {OTHER}"), ("", RIGHT)):
        fields = "".join(f"Authorization: {value}\r\n" for value in values)
        request = f"GET /api/audit HTTP/1.1\r\nHost: 127.0.0.1\r\n{fields}\r\n"

        assert locked.raw(request.encode()).startswith(b"HTTP/1.1 400 ")


STRANGE = [
    *(
        value.encode()
        for value in (
            "",
            "Bearer",
            "Bearer ",
            "Bearer é",
            "Bearer ✅",
            "bearer",
            "Basic OmE=",
            "x y",
        )
    ),
    *(
        b"Bearer " + value
        for value in (b"\xff\xfe\x80", b"\xc3", b"a" * 8000, b"%00", b"a b", RIGHT.encode())
    ),
    *(f"{RIGHT}{more}".encode() for more in ("x", ",", " x", f",{RIGHT}", "é")),
]


def test_strange_tokens_are_wrong_tokens(locked, serve, log, secret):
    for number, value in enumerate(STRANGE):
        fields = {"Authorization": value, "Cookie": b"audit_stream_%d=" % locked.port + value}
        requests = [
            b"GET / HTTP/1.1\r\nHost: 127.0.0.1:%d\r\n%s: %s\r\n\r\n"
            % (locked.port, name.encode(), text)
            for name, text in fields.items()
        ]
        quoted = "".join(f"%{byte:02x}" for byte in value[:2000])
        requests += [
            f"GET /?token={text} HTTP/1.1\r\nHost: 127.0.0.1:{locked.port}\r\n\r\n".encode()
            for text in (quoted, quoted[:-1], f"{quoted}%", f"%zz{quoted}")
        ]

        for request in requests:
            answer = locked.raw(request)
            assert not answer or answer.split()[1] in (b"401", b"429", b"400", b"414", b"431"), (
                number,
                request[:200],
            )
            assert b"Set-Cookie" not in answer
    assert status(locked, Authorization=RIGHT) == 200 and said_by(locked) == ""


def test_ten_wrong_tokens_a_minute_and_no_more(locked):
    pair, _ = cookie_of(locked.get(f"/?token={TOKEN}")[1])
    unharmed = [
        status(locked),
        status(locked, Cookie=pair[:-1]),
        status(locked, "/api/audit"),
        handshake(locked),
    ]
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
    assert (
        status(locked, f"/?token={TOKEN}") == 303
        and handshake(locked, query=f"?token={TOKEN}") == 101
    )
    assert locked.get("/", source="127.0.0.2", Authorization=f"Bearer {OTHER}")[0] == 401


def test_a_changed_token_ends_the_old_viewers(locked, log, view, secret):
    old, _ = cookie_of(locked.get(f"/?token={TOKEN}")[1])
    viewers = [
        view(locked, json=bool(number), headers={"Authorization": RIGHT}) for number in range(2)
    ]

    locked.process.send_signal(signal.SIGHUP)
    unchanged = add(log, "unchanged")
    for viewer in viewers:
        viewer.wait(unchanged)
    before = [
        status(locked, Authorization=RIGHT) for _ in range(3)
    ]  # by the end of these the signal was heeded
    secret.write_text(OTHER)
    locked.process.send_signal(signal.SIGHUP)

    assert before == [200] * 3
    assert [viewer.closed() for viewer in viewers] == [1008, 1008]
    assert status(locked, Authorization=RIGHT) == status(locked, Cookie=old) == 401
    assert status(locked, Authorization=f"Bearer {OTHER}") == 200
    new, _ = cookie_of(locked.get(f"/?token={OTHER}")[1])
    assert new.partition("=")[0] != old.partition("=")[0]  # another token, another cookie
    view(locked, headers={"Cookie": new}).wait(unchanged)


@pytest.mark.parametrize(
    "spoil", [Path.unlink, lambda path: path.write_text("\n")], ids=["gone", "empty"]
)
def test_a_token_file_that_is_lost_opens_nothing(spoil, locked, secret):
    spoil(secret)
    locked.process.send_signal(signal.SIGHUP)
    eventually(lambda: said_by(locked))

    assert (
        status(locked)
        == status(locked, Authorization="Bearer ")
        == handshake(locked, query="?token=")
        == 401
    )


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
    targets = [
        f"{path}{'&' if '?' in path else '?'}token={TOKEN}"
        for path in (*PATHS, "/healthz", "/ws/audit")
    ]

    answers = [server.get(target) for target in targets]
    answers += [server.get(path, Authorization=RIGHT) for path in PATHS]
    raw = [
        server.raw(
            f"GET {target} HTTP/1.1\r\nHost: 127.0.0.1\r\n"
            f"Cookie: {TOKEN}\r\n{field}\r\n\r\n".encode()
        )
        for target in (f"/\x1b[31m?token={TOKEN}", f"/?token={TOKEN}", "/" + TOKEN * 1000)
        for field in (
            f"Authorization: {RIGHT}\r\nAuthorization: {RIGHT}",
            f"X: {TOKEN * 1000}",
            f"Range: {TOKEN}",
        )
    ]
    viewer = view(server, headers={"Authorization": RIGHT}).wait(FIRST[-50:])
    process = Path(f"/proc/{server.process.pid}")
    seen = [(process / name).read_bytes() for name in ("cmdline", "environ")]
    seen += [str(headers).encode() + body for _, headers, body in answers] + [
        viewer.text.encode(),
        *raw,
    ]
    server.stop()

    assert not any(TOKEN.encode() in text for text in seen)
    assert TOKEN not in said_by(server) + server.url


# -- Origin, Host, Sec-Fetch-Site ------------------------------------------------------------------

EVIL = (
    "http://evil.example",
    "null",
    "",
    "file://",
    "chrome-extension://abcdef",
    "://",
    "http://",
    "//127.0.0.1",
)


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
            *(
                f"http://{own}{more}"
                for more in ("/", "/x", ".evil.example", "@evil.example", "0", " ", "?", "#")
            ),
            *(f"{scheme}://{own}" for scheme in ("https", "ws", "file", "httpx", "xhttp")),
            *(
                f"http://{before}{own}"
                for before in ("evil.example/", "user@", "evil.example:80@", "x.")
            ),
            f"http://evil.example http://{own}",
            f"http://evil.example, http://{own}",
            own,
            *EVIL,
        ],
        "localhost": [
            "http://localhost:8080",
            "http://localhost:443",
            "https://localhost",
            "https://localhost:80",
        ],
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
    expected |= {
        (host, it): 101 if it in trimmed else 403
        for host, origins in refused.items()
        for it in origins
    }
    assert got == expected
    assert handshake(unlocked) == 101
    assert handshake(unlocked, f"Origin: http://{own}", f"Origin: http://{own}") == 400
    assert handshake(unlocked, f"Origin: http://{own}", "Origin: http://evil.example") == 400


def test_further_origins_may_be_allowed(serve, log):
    server = serve(
        log, "--allow-origin", "https://ops.example", "--allow-origin", "http://wiki.example:8080"
    )
    right = (
        "https://ops.example",
        "https://ops.example:443",
        "http://wiki.example:8080",
        server.url[:-1],
    )
    wrong = (
        *(
            f"https://{host}"
            for host in ("ops.example:8443", "ops.example.evil", "x.ops.example", "opsxexample")
        ),
        *("http://ops.example", "http://wiki.example", "https://wiki.example:8080", *EVIL),
    )

    assert {origin: handshake(server, f"Origin: {origin}") for origin in right} == dict.fromkeys(
        right, 101
    )
    assert {origin: handshake(server, f"Origin: {origin}") for origin in wrong} == dict.fromkeys(
        wrong, 403
    )


def test_the_origin_counts_with_the_token_too(locked):
    evil = "Origin: http://evil.example"
    pair, _ = cookie_of(locked.get(f"/?token={TOKEN}")[1])

    for credential in (f"Authorization: {RIGHT}", f"Cookie: {pair}"):
        assert handshake(locked, credential, f"Origin: {locked.url[:-1]}") == 101
        assert handshake(locked, credential, evil) == 403
        assert handshake(
            locked, credential, "Origin: http://evil.example:80", host="evil.example"
        ) in (101, 401)
    assert handshake(locked, evil, query=f"?token={TOKEN}") == 403


GOOD_HOSTS = [
    "127.0.0.1",
    "127.0.0.1:1",
    "192.0.2.7:8080",
    "[::1]",
    "[2001:DB8::7]:65535",
    "localhost",
    "LocalHost:99",
]
GOOD_HOSTS += [
    socket.gethostname(),
    f"{socket.gethostname().upper()}:8080",
    "audit.example",
    "Audit.Example:8443",
]
EVIL_HOSTS = [
    "evil.example",
    "127.0.0.1.evil.example",
    "localhost.evil.example:8080",
    "x.audit.example",
    "x.localhost",
]
EVIL_HOSTS += [
    "audit.example.evil",
    "audit_example",
    "auditXexample",
    "evil.example.:80",
    "localhostx",
    "1.evil",
]
ODD_HOSTS = [
    "127.1",
    "2130706433",
    "0x7f000001",
    "0177.0.0.1",
    "127.0.0.1.1",
    "256.0.0.1",
    "[localhost]",
    "[::1",
]
ODD_HOSTS += [
    "%6cocalhost",
    "localhost%00",
    "evil@localhost",
    "localhost@evil",
    "localhost/../evil",
    "localhost, evil",
]
ODD_HOSTS += ["localhost evil", "localhost:80:80", "localhost:99999", "[::1]x", "::1"]


def test_an_open_server_answers_to_its_own_names_only(serve, log):
    append(log, FIRST)
    server = serve(log, "--allow-host", "AUDIT.example", "--allow-host", "second.example")

    for host in (*GOOD_HOSTS, "second.example"):
        assert (
            status(server, "/healthz", Host=host) == status(server, "/api/audit", Host=host) == 200
        ), host
        assert handshake(server, f"Origin: http://{host.lower()}", host=host) == 101, host
    for host, path in itertools.product(EVIL_HOSTS, (*PATHS, "/healthz", "/ws/audit")):
        assert status(server, path, Host=host) == 403, f"{path} at {host}"
    for host in EVIL_HOSTS:
        assert handshake(server, f"Origin: http://{host}", host=host) == 403, host
    for host in ODD_HOSTS:
        assert {status(server, "/api/audit", Host=host), handshake(server, host=host)} <= {
            400,
            403,
        }, host


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

    def answers(server, method="POST", path="/other", site="cross-site"):
        request = f"{method} {path} HTTP/1.1\r\n{{}}\r\nSec-Fetch-Site: {site}\r\n\r\n"
        return [server.raw(request.format(fault).encode()).split()[1] for fault in faults]

    assert answers(unlocked) == [b"400", b"403", b"405"]
    assert answers(locked) == [b"400", b"401", b"401"]
    assert answers(unlocked, "GET")[2] == b"403"
    assert status(few, "/healthz") in (200, 503)
    assert answers(few, site="none") == [b"400", b"403", b"429"]  # a foreign name counts apart
    assert answers(few)[1:] == [b"429"] * 2


# -- headers ---------------------------------------------------------------------------------------

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
        503: inside(
            "/ws/audit", Upgrade="websocket", Connection="Upgrade", Sec_WebSocket_Version="13"
        ),
    }
    more = [inside(path) for path in ("/api/audit", "/metrics", "/healthz")]
    more += [inside("/", Host=host) for host in ("a; script-src *", "audit.example")]
    more += [server.get("/", Authorization=f"Bearer {OTHER}") for _ in range(11)]
    more += [server.get("/", method="HEAD"), inside("/ws/audit", method="POST")]
    assert {status: answer[0] for status, answer in found.items()} == {
        status: status for status in found
    }
    assert 429 in [answer[0] for answer in more]
    return list(found.values()) + more


def test_every_answer_says_what_browsers_may_do_with_it(serve, log, secret):
    append(log, FIRST)
    server = serve(log, "--token-file", secret, "--max-viewers", 1)

    with server.upgrade(f"Authorization: {RIGHT}"):
        answers = every_kind_of_answer(server)
    answers.append(
        server.get("/ws/audit", Authorization=RIGHT, Upgrade="websocket", Sec_WebSocket_Version="7")
    )

    (_, _, page), (_, _, form) = (server.get("/", **way) for way in ({"Authorization": RIGHT}, {}))
    for code, headers, body in answers:
        assert {name: headers.get_all(name) for name in FIXED} == {
            name: [text] for name, text in FIXED.items()
        }, code
        once = ("Content-Security-Policy", "Content-Type", "Content-Length", "Date")
        assert all(len(headers.get_all(name, [])) == 1 for name in once), (code, headers.items())
        assert "Strict-Transport-Security" not in headers
        policy = policy_of(headers)
        assert (
            policy["default-src"] == policy["base-uri"] == policy["frame-ancestors"] == {"'none'"}
        )
        assert not any(
            "unsafe" in source or source == "*" for sources in policy.values() for source in sources
        )
        for kind in ("script", "style"):
            of_both = Inline(page).hashes(kind) | Inline(form).hashes(kind)
            assert Inline(body).hashes(kind) <= policy[f"{kind}-src"] <= of_both | {"'none'"}, (
                code,
                kind,
            )
    assert len(Inline(page).texts["script"]) == len(Inline(form).texts["script"]) == 1
    assert Inline(page).loose == Inline(form).loose == []


def test_the_policy_names_the_address_of_the_websocket(locked):
    for host in (f"127.0.0.1:{locked.port}", "audit.example:9443", "audit.example"):
        policy = policy_of(locked.get("/", Host=host, Authorization=RIGHT)[1])

        assert policy["connect-src"] == {"'self'", f"ws://{host}"}


# -- in a browser ----------------------------------------------------------------------------------


class OtherSite(http.server.BaseHTTPRequestHandler):
    """A page of someone else; its path is the address of the link on it."""

    def do_GET(self):
        link = html.escape(self.path[1:])
        head = "<!DOCTYPE html><title>other</title><link rel=icon href=data:,>"
        body = f"{head}<a href='{link}'>the log</a>".encode()
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
    const nothing = () => new Promise(done => setTimeout(done, 5000, 'nothing'))
    const within = promise => Promise.race([promise, nothing()])
    const load = (kind, path) => within(new Promise(done => {
        const element = document.createElement(kind)
        element.onload = () => done('loaded')
        element.onerror = () => done('refused')
        element.src = url + path
        document.body.append(element)
    }))
    const ask = options => fetch(url + 'api/audit', options)
    const read = options => within(ask(options).then(reply => reply.text()).catch(() => 'refused'))
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
    try {
        inside = frame.contentDocument && frame.contentDocument.body.innerText || 'refused'
    } catch (error) {}
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


def test_a_page_of_another_origin_cannot_read_the_log(
    browser, window, serve, log, secret, other_site
):
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
        assert {
            name: result for name, result in attempts.items() if result not in ("refused", "")
        } == {}, where
    assert of(samples(opened), "viewers") == of(samples(locked), "viewers") == 0


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
def test_a_link_with_a_token_on_another_site_works(host, browser, window, locked, other_site):
    window.goto(f"http://{host}:{other_site}/{locked.url}?token={TOKEN}")
    x, y = window.js(CENTRE.format("document.links[0]"))

    window.mouse(x, y)

    arrives(window, locked.url)
    assert window.js("document.cookie") == "" and window.js("document.referrer") in (
        "",
        f"http://{host}:{other_site}/",
    )


def test_the_form_takes_the_token(browser, window, locked):
    window.goto(locked.url)

    window.js("document.querySelector('input').focus()")
    window.type("wrong-token")
    window.press("Enter")
    window.wait(
        "/token/i.test(document.querySelector('output, [role=alert], [role=status]').textContent)"
    )
    after = window.js("location.href")
    window.js("document.querySelector('input').value = ''")
    window.type(TOKEN)
    window.press("Enter")

    arrives(window, locked.url)
    assert after == locked.url and TOKEN not in said_by(locked)
