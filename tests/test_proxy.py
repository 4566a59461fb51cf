"""Behind a reverse proxy: which one is believed, NGINX below a path, smuggled requests."""

import contextlib
import functools
import itertools
import signal

import pytest
from harness import (
    FIRST,
    RIGHT,
    TOKEN,
    add,
    append,
    cookie_of,
    eventually,
    exchange,
    handshake,
    of,
    policy_of,
    samples,
    status,
)
from page_actions import arrives
from proxies import BELOW
from websockets.sync.client import connect

# -- who is believed -------------------------------------------------------------------------------

FORWARDED = "203.0.113.7"


def used_up(server, source="127.0.0.1", **headers):
    """Ask until that is too much; is it too much for another X-Forwarded-For, too?"""
    for _ in range(4):
        status(server, "/healthz", source=source, **headers)
    assert status(server, "/healthz", source=source, **headers) == 429
    return status(server, "/healthz", source=source, X_Forwarded_For="198.51.100.9") == 429


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
    strange = [
        status(server, "/healthz", X_Forwarded_For=value)
        for value in ("", ",", "x", "::1%lo", "é", "1" * 4000)
    ]

    assert statuses == [503] * 3 + [429] * 7
    assert (
        server.raw(f"GET /healthz HTTP/1.1\r\nHost: localhost\r\n{doubled}\r\n".encode()).split()[1]
        == b"429"
    )
    assert set(strange) <= {503, 429}


def test_only_a_trusted_proxy_names_the_scheme(serve, log, secret):
    plain, proxied = (serve(log, "--token-file", secret, *more) for more in ([], ["--trust-proxy"]))
    secure = {"X_Forwarded_Proto": "https", "Host": "audit.example"}
    fields = [f"Authorization: {RIGHT}", "X-Forwarded-Proto: https"]
    origins = ("http://audit.example", "https://audit.example")

    attributes = [
        cookie_of(server.get(f"/?token={TOKEN}", **secure)[1])[1] for server in (plain, proxied)
    ]
    statuses = [
        [
            handshake(server, *fields, f"Origin: {origin}", host="audit.example")
            for origin in origins
        ]
        for server in (plain, proxied)
    ]

    assert ["Secure" in each for each in attributes] == [False, True]
    assert statuses == [[101, 403], [403, 101]]
    assert "wss://audit.example" in policy_of(proxied.get("/", **secure)[1])["connect-src"]


# -- NGINX -----------------------------------------------------------------------------------------


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
    assert (
        below("Origin: http://evil.example")
        == below(f"Origin: http://127.0.0.1:{behind.port + 1}")
        == 403
    )
    invented = (
        {"X_Forwarded_For": f"10.9.8.{number}", "Authorization": "Bearer x"} for number in range(11)
    )
    assert [status(behind, f"{BELOW}/", **fields) for fields in invented] == [401] * 10 + [429]


INNER = "GET /smuggled HTTP/1.1\r\nHost: 127.0.0.1\r\nX: "
CHUNKED = f"0\r\n\r\n{INNER}"
SMUGGLED = {
    "CL.TE": (f"Content-Length: {len(CHUNKED)}\r\nTransfer-Encoding: chunked", CHUNKED),
    "TE.CL": (
        "Transfer-Encoding: chunked\r\nContent-Length: 4",
        f"{len(INNER):x}\r\n{INNER}\r\n0\r\n\r\n",
    ),
    "TE.TE": ("Transfer-Encoding: chunked\r\nTransfer-Encoding: x", CHUNKED),
    "TE with a tab": (f"Transfer-Encoding:\tchunked\r\nContent-Length: {len(CHUNKED)}", CHUNKED),
    "TE with a space": (f"Transfer-Encoding : chunked\r\nContent-Length: {len(CHUNKED)}", CHUNKED),
    "CL.0": (f"Content-Length: {len(INNER)}", INNER),
    "CL.CL": (f"Content-Length: 0\r\nContent-Length: {len(INNER)}", INNER),
    "no handshake": (
        "Upgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Version: 99",
        INNER,
    ),
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


def test_the_page_lives_below_a_path_of_nginx(browser, window, serve, nginx, log, secret):
    append(log, FIRST)
    behind = nginx(serve(log, "--token-file", secret, "--trust-proxy"))
    address = f"http://127.0.0.1:{behind.port}{BELOW}/"

    window.goto(f"{address}?token={TOKEN}")

    arrives(window, address)


def test_the_form_works_behind_a_password_of_nginx(browser, window, serve, nginx, log, secret):
    """The form must not say Authorization, which is the proxy's, nor be taken for its refusal."""
    append(log, FIRST)
    passwords = log.parent / "passwords"
    passwords.write_text("user:{PLAIN}pass\n")
    server = serve(log, "--token-file", secret, "--trust-proxy")
    version = "proxy_http_version 1.1;"
    with_password = f'{version} auth_basic "x"; auth_basic_user_file {passwords};'
    behind = nginx(server, replace=(version, with_password))

    window.goto(behind.url.replace("//", "//user:pass@") + "healthz")  # it remembers them
    window.goto(behind.url)
    window.wait("!!document.querySelector('#token')")
    window.js("document.querySelector('input').focus()")
    window.type("wrong-0123456789")
    window.press("Enter")
    window.wait("/not the token/.test(document.querySelector('output').textContent)")
    window.js("document.querySelector('input').value = ''")
    window.type(TOKEN)
    window.press("Enter")

    eventually(
        lambda: asked(window, "document.querySelector('#status').dataset.state") == "live", 20
    )
    assert window.js("location.href") == behind.url
    secret.write_text("another-token-0123456789")
    server.process.send_signal(signal.SIGHUP)
    window.wait("document.querySelector('#proof').textContent.includes('not signed in (401)')")


def asked(window, expression):
    with contextlib.suppress(RuntimeError):  # between two pages there is none to ask
        return window.js(expression)


HOST, UPGRADE = "proxy_set_header Host $http_host;", "proxy_set_header Upgrade $http_upgrade;"


@pytest.mark.parametrize(
    ("line", "viewers", "said"),
    [
        (HOST, 2, "refused (403): see --allow-host and --allow-origin"),
        (UPGRADE, 2, "the server answers, but the WebSocket does not open"),
        ("", 1, "the server has no free place (503)"),
    ],
    ids=["host", "upgrade", "place"],
)
def test_the_page_names_the_reason_for_a_refused_websocket(
    line, viewers, said, browser, window, serve, nginx, view, log
):
    append(log, FIRST)
    server = serve(log, "--trust-proxy", "--max-viewers", viewers, "--allow-host", "audit0")
    behind = nginx(server, replace=(line, ""))
    view(server)

    window.goto(behind.url)

    window.wait(f"document.querySelector('#proof').textContent.includes({said!r})")
    assert any(said in text for _, text in window.console), window.console
