"""How many viewers, answers and silent connections there may be, and what /metrics says of them."""

import contextlib
import itertools
import json
import re
import time

from harness import (
    FIRST,
    RIGHT,
    add,
    append,
    eventually,
    free_port,
    handshake,
    launch,
    of,
    said_by,
    samples,
    status,
)


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
    statuses = [
        status(server, path)
        for path in itertools.islice(itertools.cycle(("/healthz", "/", "/other")), 48)
    ]
    code, headers, body = eventually(
        lambda: (answer := server.get("/metrics"))[0] == 429 and answer
    )
    elsewhere = status(server, source="127.0.0.2")
    wait = int(headers["Retry-After"])
    eventually(lambda: status(server) == 200, seconds=wait + 1)

    assert accepted == [101] * 80 and refused == [403] * 10 and set(statuses) == {503, 200, 404}
    assert code == 429 and json.loads(body)["error"] and 1 <= wait <= 60
    assert elsewhere == 200


def test_the_limit_of_answers_is_600_unless_told_otherwise(serve, log):
    usual, unlimited = serve(log, dev=False), serve(log, "--rate-limit", 0, dev=False)

    statuses = [[status(server, "/healthz") for _ in range(600)] for server in (usual, unlimited)]

    assert statuses == [[503] * 600] * 2
    assert any(status(usual, "/healthz") == 429 for _ in range(600))  # some came back meanwhile
    assert [status(unlimited, "/healthz") for _ in range(100)] == [503] * 100


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
        slow.sendall(
            f"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\nAuthorization: {RIGHT}\r\n\r\n".encode()
        )
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


# -- /metrics --------------------------------------------------------------------------------------


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
    assert moved("lines") == 12 and moved("stream_read_bytes") == len((added + more).encode())
    assert moved("bytes", "sent") >= len((added + more).encode())
    assert moved("search") >= 1 and moved("refused") == 1
    assert moved("generation", since=during) == moved("generation", "rotated", since=during) == 1
    assert of(after, "behind") == 0
    assert clock - 60 < of(after, "start_time") < clock
    assert of(after, "build_info") == 1 and any(
        'version="' in name for name in after if "build_info" in name
    )
    assert all(after.get(name, 0) >= value for name, value in before.items() if "_total" in name)
    eventually(lambda: of(samples(locked), "viewers") == 0)
