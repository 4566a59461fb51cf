"""Garbage by the hundred, from a seed that is named; AUDIT_STREAM_REQUESTS=100000 sends more."""

import collections
import itertools
import os
import random
import re
import struct
from concurrent.futures import ThreadPoolExecutor

from harness import API, FIRST, KEY, RIGHT, add, append, eventually, exchange, said_by

SEED = 20251217
REQUESTS = int(os.environ.get("AUDIT_STREAM_REQUESTS") or 1500)
TARGETS = [
    "/",
    *API,
    "/metrics",
    "/healthz",
    "/ws/audit",
    "/other",
    "//",
    "*",
    "http://evil.example/",
    "/%2e%2e/",
]
PARTS = [
    b"\r\n",
    b"\n",
    b"\r",
    b"\0",
    b"\x1b[31m",
    b" ",
    b"\t",
    b":",
    b"%",
    b"%00",
    b"%ff",
    b"?",
    b"&",
    b"=",
    b"#",
]
PARTS += [b";", b"\x85"]
PARTS += [
    b"\xff\xfe",
    "é✅".encode(),
    b"-1",
    b"1e999",
    b"9" * 40,
    b"nan",
    b"/../",
    b'"',
    b"(",
    b"[",
    b"{1,9999}",
    b",",
]
PARTS += [
    b"a" * 9000,
    b"token=",
    b"since=",
    b"q=",
    b"before=",
    b"points=",
    b"HTTP/1.1",
    b"GET",
    b"chunked",
]
VALUES = {
    "Host": ["127.0.0.1", "localhost:80", "evil.example", "[::1]", "", "a b"],
    "Origin": ["http://127.0.0.1", "null", "http://evil.example"],
    "Authorization": [RIGHT, "Bearer x", "Basic eA=="],
    "User-Agent": ["Mozilla/5.0 (X11)", "curl/8", ""],
    "Cookie": ["a=b", "; ; =", "audit_stream_80=x"],
    "Range": [
        "bytes=0-9",
        "bytes=-5",
        "bytes=9-1",
        "bytes=0-1,3-4",
        "lines=1-2",
        "bytes=99999999999999999999-",
    ],
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
QUERIES = [
    "",
    "?q=entry",
    "?q=a(b&case=1&limit=3",
    "?points=7",
    "?time=2025",
    "?since=1.2",
    "?bytes=10",
    "?token=x",
]


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
    fields = [
        "Host: 127.0.0.1",
        f"Authorization: {RIGHT}",
        "Upgrade: websocket",
        "Connection: Upgrade",
    ]
    fields += [f"Sec-WebSocket-Key: {KEY}", "Sec-WebSocket-Version: 13"]
    fields += dice.choice(([], ["Sec-WebSocket-Protocol: audit.v1.json"]))
    since = "".join(
        dice.choice("0123456789.-_abcXYZ%&=+;") for _ in range(dice.choice((0, 3, 40, 400)))
    )
    start = "\r\n".join([f"GET /ws/audit?since={since} HTTP/1.1", *fields, "", ""]).encode()
    frames = b""
    for _ in range(dice.randrange(1, 12)):
        payload = dice.randbytes(dice.choice((0, 1, 2, 60, 125)))
        claimed = dice.choice((len(payload),) * 6 + (126, 127))
        extended = dice.choice((b"", struct.pack(">H", len(payload)), struct.pack(">Q", 2**40)))
        opcode = dice.choice(
            (0x81, 0x82, 0x01, 0x00, 0x80, 0x88, 0x89, 0x8A, 0x83, 0xC1, 0xF1, dice.randrange(256))
        )
        frames += (
            bytes([opcode, claimed | dice.choice((0x80,) * 5 + (0,))])
            + extended
            + bytes(4)
            + payload
        )
    frames = mutated(frames, dice, dice.choice((0, 0, 1, 5)))
    return [start, frames] if dice.random() < 0.8 else [start + frames]


def test_garbage_by_the_hundred_leaves_it_alive_and_quiet(serve, log, view, secret):
    append(log, FIRST)
    server = serve(log, "--token-file", secret, "--rate-limit", 0)
    viewer = view(server, json=True, headers={"Authorization": RIGHT}).wait(FIRST[-50:])
    eventually(lambda: server.get("/healthz")[0] == 200)
    sockets = server.sockets()
    kinds = [random_request] * 4 + [random_frames]
    # frames before the handshake is answered may get a frame, as the library does it
    known = re.compile(rb"$|HTTP/1\.1 (101|200|206|303|4\d\d|503|505) |[\x88\x8a]")

    def attempt(number):
        """Return the status, and what there is to say if the answer is none that we know."""
        parts = kinds[number % len(kinds)](random.Random(f"{SEED}-{number}"))
        answer = exchange(server, *parts)
        strange = None if known.match(answer) else (SEED, number, parts, answer)
        return answer[9:12], strange

    with ThreadPoolExecutor(12) as pool:
        tries = list(pool.map(attempt, range(REQUESTS)))
    added = add(log, "afterwards")

    assert [strange for _, strange in tries if strange] == []
    statuses = collections.Counter(status for status, _ in tries)
    assert min(statuses[status] for status in (b"101", b"200", b"400", b"404", b"")) >= 10, statuses
    viewer.wait(added, 2).joined()
    assert server.get("/", Authorization=RIGHT)[0] == 200
    assert said_by(server) == "", f"the seed is {SEED}"
    eventually(
        lambda: server.sockets() <= sockets,
        seconds=15,
        message=f"{server.sockets()} sockets, not {sockets}",
    )
    assert server.peak() < 150 * 2**20


def test_pipelined_requests_are_dropped_without_a_word(serve, log):
    server = serve(log, "--rate-limit", 0)
    tails = [b"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n", b"\x88\x80\0\0\0\0" * 2, b"\xff" * 20]
    requests = [
        f"GET {path} HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n".encode()
        for path in ("/", "/other", "/ws/audit")
    ]

    with ThreadPoolExecutor(12) as pool:
        list(
            pool.map(
                lambda parts: exchange(server, b"".join(parts)),
                [*itertools.product(requests, tails)] * 10,
            )
        )

    assert server.get("/")[0] == 200 and said_by(server) == ""
