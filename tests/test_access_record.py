"""Who may come in by which name, who looked, and what a page is told that was refused."""

import contextlib
import copy
import http.server
import json
import re
import signal
import socket
import threading
import urllib.error
import urllib.request
from pathlib import Path

import pytest
from browsers import BROWSERS
from harness import KEY, append, eventually, lines

ALICE, BOB = "alice-0123456789-token", "bob-0123456789-token"
NOBODY = "nameless-0123456789"


@pytest.fixture
def tokens(tmp_path):
    path = tmp_path / "tokens"
    path.write_text(f"alice {ALICE}\n\n  bob\t{BOB}  \n{NOBODY}\n")
    return path


@pytest.fixture
def named(serve, log, tokens):
    append(log, lines(20))
    return serve(log, "--token-file", tokens)


def bearer(token):
    return {"Authorization": f"Bearer {token}"}


def cookie(server, token, host):
    (value,) = server.get(f"/?token={token}", Host=host)[1].get_all("Set-Cookie")
    return value.partition(";")[0]


def handshake(server, *fields, query=""):
    asked = [f"Host: 127.0.0.1:{server.port}", "Upgrade: websocket", "Connection: Upgrade"]
    asked += [f"Sec-WebSocket-Key: {KEY}", "Sec-WebSocket-Version: 13", *fields]
    with server.connect() as client:
        client.sendall("\r\n".join([f"GET /ws/audit{query} HTTP/1.1", *asked, "", ""]).encode())
        return int(client.recv(65536).split()[1])


def fields_of(line):
    """The fields of a line of the record."""
    found = re.findall(r'(\w+)=("(?:[^"\\]|\\.)*"|\S+)', line)
    return {name: json.loads(text) if text[0] == '"' else text for name, text in found}


# tokens


def test_several_tokens_open_it_each_under_its_name(named):
    for token in (ALICE, BOB, NOBODY):
        pair = cookie(named, token, f"127.0.0.1:{named.port}")

        assert named.get("/", **bearer(token))[0] == named.get("/", Cookie=pair)[0] == 200
        assert handshake(named, f"Authorization: Bearer {token}") == 101
    for wrong in ("alice", "bob", f"alice {ALICE}", f"bob\t{BOB}", ALICE[:-1], ""):
        assert named.get("/", **bearer(wrong))[0] == 401, wrong


def test_a_token_that_goes_takes_its_viewers_along_and_no_others(named, view, tokens):
    alice, bob = (view(named, headers=bearer(token)) for token in (ALICE, BOB))
    old = cookie(named, BOB, f"127.0.0.1:{named.port}")
    by_cookie = view(named, headers={"Cookie": old})

    tokens.write_text(f"{ALICE}\nbob new-{BOB}\n")
    named.process.send_signal(signal.SIGHUP)

    assert bob.closed() == by_cookie.closed() == 1008
    alice.wait(append(named.log, "still here\n").decode())
    assert named.get("/", **bearer(BOB))[0] == named.get("/", Cookie=old)[0] == 401
    assert named.get("/", **bearer(f"new-{BOB}"))[0] == 200


def test_two_logs_on_one_host_do_not_log_each_other_out(serve, log, tmp_path):
    """As behind one NGINX: the same Host, the same path of the cookie, two tokens."""
    first, second = (serve(log, env={"AUDIT_STREAM_TOKEN": token}) for token in (ALICE, BOB))
    replica = serve(log, env={"AUDIT_STREAM_TOKEN": ALICE})
    host = "audit.example"

    pairs = [cookie(server, token, host) for server, token in ((first, ALICE), (second, BOB))]

    assert pairs[0].partition("=")[0] != pairs[1].partition("=")[0]
    for server in (first, second, replica):
        assert server.get("/", Host=host, Cookie="; ".join(pairs))[0] == 200
    assert first.get("/", Host=host, Cookie=pairs[1])[0] == 401


# the record


def test_the_record_says_who_came_and_went(named, view):
    viewer = view(named, json=True, headers=bearer(ALICE)).wait(lambda it: it.frames)
    again = view(named, json=True, since=viewer.cursor, headers=bearer(NOBODY))
    again.wait(lambda it: it.frames)
    viewer.close()
    again.close()

    record = eventually(lambda: len(it := named.record()) == 4 and [fields_of(one) for one in it])
    came, resumed, *left = record
    left = sorted(left, key=lambda each: "name" in each)
    who = {"client": "127.0.0.1"}
    assert came == {"event": "came", **who, "name": "alice", "resumed": "false"}
    assert resumed == {"event": "came", **who, "resumed": "true"}
    assert [each.get("name") for each in left] == [None, "alice"]
    for each in left:
        assert each["event"] == "left" and int(each["seconds"]) < 60 and int(each["bytes"]) > 200
    assert named.errors() == ""


def test_refused_tokens_are_recorded_and_none_is_shown(named):
    named.get("/", **bearer(f"{ALICE}x"))
    handshake(named, query=f"?token={BOB}y")
    named.get("/")

    assert [fields_of(one) for one in named.record()] == [
        {"event": "refused", "client": "127.0.0.1"}
    ] * 2
    everything = Path(named._err).read_text()
    assert ALICE not in everything and BOB not in everything


def test_only_a_trusted_proxy_names_the_user(serve, log, view, tokens):
    append(log, lines(1))
    proxied, plain = (serve(log, "--token-file", tokens, *more) for more in (["--trust-proxy"], []))
    strange = 'eve "the root" name=x'
    fields = bearer(BOB) | {"X-Forwarded-User": strange, "X-Forwarded-For": "203.0.113.9"}

    for server in (proxied, plain):
        view(server, headers=fields).wait(lambda it: it.frames)

    assert fields_of(proxied.record()[0])["name"] == strange
    assert fields_of(proxied.record()[0])["client"] == "203.0.113.9"
    assert fields_of(plain.record()[0])["name"] == "bob"


# what changes something


@pytest.mark.parametrize("path", ["/api/review", "/api/record?event=accepted&detail=x"])
def test_only_the_own_page_may_post(path, named):
    own = f"http://127.0.0.1:{named.port}"
    refused = [
        {"Origin": "http://evil.example"},
        {"Origin": "null"},
        {"Origin": own, "Sec_Fetch_Site": "same-site"},
        {"Sec_Fetch_Site": "cross-site"},
    ]

    statuses = [named.get(path, method="POST", **bearer(BOB), **way)[0] for way in refused]
    code, headers, _ = named.get(path, **bearer(BOB))

    assert statuses == [403] * len(refused)
    assert (code, headers["Allow"]) == (405, "POST")
    own_page = {"Origin": own, "Sec_Fetch_Site": "same-origin"}
    assert named.get(path, method="POST", **bearer(BOB), **own_page)[0] not in (401, 403, 405)
    assert named.get(path, method="POST", **own_page)[0] == 401


def test_a_page_that_was_refused_hears_why(serve, log):
    append(log, lines(1))
    server = serve(log, "--max-viewers", 1, "--allow-origin", "https://ops.example")
    own = f"http://127.0.0.1:{server.port}"

    def why(origin):
        return server.get(f"/ws/audit?origin={origin}")[0]

    assert [why(own), why("https://ops.example"), why("http://behind.example")] == [426, 426, 403]
    with server.upgrade():
        assert [why(own), why("http://behind.example")] == [503, 403]
        assert server.get("/ws/audit")[0] == 426


def test_the_origin_of_a_query_opens_no_websocket(serve, log):
    server = serve(log)
    query = f"?origin=http://127.0.0.1:{server.port}"

    assert handshake(server, "Origin: http://evil.example", query=query) == 403


# the form, behind a proxy that has a password of its own


class Guard(http.server.BaseHTTPRequestHandler):
    """A proxy with auth_basic, as NGINX has it: it wants Authorization for itself."""

    upstream = 0

    def do_GET(self):
        if self.headers.get("Authorization") != "Basic dXNlcjpwYXNz":
            self.send_response(401)
            self.send_header("WWW-Authenticate", 'Basic realm="x"')
            self.send_header("Content-Length", "0")
            return self.end_headers()
        names = ("Host", "Cookie", "Authorization", "Sec-Fetch-Site")
        fields = {name: self.headers[name] for name in names if self.headers[name]}
        address = f"http://127.0.0.1:{self.upstream}{self.path}"
        asked = urllib.request.Request(address, None, fields, method=self.command)
        opener = urllib.request.build_opener(NoRedirect)
        with contextlib.closing(opener.open(asked)) as answer:
            self.send_response(answer.status)
            for name, value in answer.headers.items():
                if name not in ("Date", "Connection", "Server"):
                    self.send_header(name, value)
            self.end_headers()
            self.wfile.write(answer.read())

    do_HEAD = do_GET

    def log_message(self, *_):
        pass


class NoRedirect(urllib.request.HTTPErrorProcessor):
    def http_response(self, _, response):
        return response


@pytest.fixture
def guarded(named):
    """The server behind such a proxy."""
    guard = type("Guard", (Guard,), {"upstream": named.port})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), guard) as proxy:
        thread = threading.Thread(target=proxy.serve_forever, args=(0.02,))
        thread.start()
        behind = copy.copy(named)
        behind.port = proxy.server_port
        yield behind
        proxy.shutdown()
        thread.join()


@pytest.fixture(scope="module")
def firefox():
    started = BROWSERS["firefox"]()
    yield started
    started.quit()


def test_the_form_works_behind_a_proxy_with_a_password(firefox, guarded):
    """Not in Chromium: after a 401 it asks for the proxy's password again, in a dialog."""
    page = firefox.page()
    with contextlib.closing(contextlib.ExitStack()) as stack:
        stack.callback(page.close)
        page.goto(f"http://user:pass@127.0.0.1:{guarded.port}/healthz")  # it remembers them
        page.goto(f"http://127.0.0.1:{guarded.port}/")
        page.wait("!!document.querySelector('#token')")
        page.js("document.querySelector('input').focus()")
        page.type("wrong-0123456789")
        page.press("Enter")
        page.wait("/not the token/.test(document.querySelector('output').textContent)")
        page.js("document.querySelector('input').value = ''")
        page.type(ALICE)
        page.press("Enter")

        eventually(lambda: js(page, "!!document.querySelector('#auditBox')"), 15)
        assert "token" not in js(page, "location.href")


def js(page, expression):
    with contextlib.suppress(RuntimeError):  # between two pages there is none to ask
        return page.js(expression)


def test_nobody_is_asked_twice(named):
    """A refusal closes the connection properly: no reset, so that the answer can be read."""
    with named.connect() as client:
        client.sendall(b"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n")
        answer = b""
        while piece := client.recv(4096):
            answer += piece
        client.shutdown(socket.SHUT_WR)

    assert answer.startswith(b"HTTP/1.1 401 ") and answer.endswith(b"</script>\n")
    with pytest.raises(urllib.error.HTTPError, match="401"):
        urllib.request.urlopen(named.url)
