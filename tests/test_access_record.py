"""Who may come in by which name, who looked, and what a page is told that was refused."""

import json
import re
import signal
import socket
import urllib.error
import urllib.request
from pathlib import Path

import pytest
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


def test_a_browser_with_the_password_of_a_proxy_is_not_told_401(named):
    """Chromium would forget the proxy's password at that, and ask for it again."""
    password, browser = {"Authorization": "Basic dXNlcjpwYXNz"}, {"User_Agent": "Mozilla/5.0 (X11)"}

    answers = [named.get("/", **fields) for fields in (password, browser, password | browser)]

    assert [code for code, _, _ in answers] == [401, 401, 403]
    assert {headers["WWW-Authenticate"] for _, headers, _ in answers} == {"Bearer"}
    assert named.get("/", **bearer(ALICE), **browser)[0] == 200


def test_nobody_is_asked_twice(named):
    """A refusal closes the connection properly: no reset, so that the answer can be read."""
    with named.connect() as client:
        client.sendall(b"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n")
        answer = b""
        while piece := client.recv(4096):
            answer += piece
        client.shutdown(socket.SHUT_WR)

    assert answer.startswith(b"HTTP/1.1 401 ") and answer.endswith(b"</script>\n")
    with pytest.raises(urllib.error.HTTPError, match="401") as refused:
        urllib.request.urlopen(named.url)
    refused.value.close()
