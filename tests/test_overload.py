"""Slow, stuck and many viewers; a machine that runs out of things."""

import contextlib
import gzip
import itertools
import resource
import socket
import time
from pathlib import Path

import pytest
from harness import FIRST, add, append, eventually, free_port, lines, start

MIB = 2**20


@pytest.fixture
def many_files():
    """As many open files as this process may have."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    yield hard
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def check_it_serves(server, viewer, log, seconds=1):
    """A line arrives and a page is answered in time."""
    asked = time.monotonic()
    added = add(log, f"check {asked}")
    viewer.wait(added, seconds)
    assert server.get("/")[0] == 200
    assert time.monotonic() - asked < seconds
    return added


@pytest.mark.slow
def test_a_minute_of_nothing_ends_a_viewer_and_slowness_does_not(serve, view, log):
    """The one slow test: whatever else takes a minute waits beside it."""
    append(log, lines(10))
    server = serve(log, "--initial", 100, dev=False)
    others = server.sockets()
    with open(log, "ab", buffering=0) as old, contextlib.ExitStack() as stack:
        stuck = [stack.enter_context(server.upgrade(receive_buffer=4096)) for _ in range(3)]
        slow = [
            view(server, json=True, receive_buffer=4096, pace=2000).wait(lines(1, 9))
            for _ in range(2)
        ]
        idle = view(server, json=True).wait(lines(1, 9))
        began, seen = time.monotonic(), {}

        old.write(lines(60_000, 10).encode())
        log.rename(f"{log}.1")
        added = add(log, "new")
        size = idle.wait(added) and log.stat().st_size
        for moment in (25, 50, 75):
            time.sleep(began + moment - time.monotonic())
            seen[moment] = server.sockets() - others
            if moment == 25:
                old.write(b"late\n")
        eventually(lambda: server.sockets() - others == 3, seconds=15)
        for viewer in slow:
            viewer.hurry()
        added += append(log, "marker\n").decode()

        for viewer in (idle, *slow):
            viewer.wait("late\n", 20).wait("marker\n", 20).joined()
            assert viewer.texts() == [lines(60_001, 9) + "late\n", added]
    assert seen[25] == seen[50] == len(stuck) + 3
    checked = [
        moment
        for moment, frame in zip(idle.times, idle.frames, strict=True)
        if frame["type"] == "checked"
    ]
    assert len(checked) >= 4 and min(b - a for a, b in itertools.pairwise(checked)) > 9.5
    assert {(frame["size"], frame["end"]) for frame in idle.of("checked")} == {(size, size)}


def test_a_stuck_viewer_does_not_hold_up_the_stop(serve, log):
    append(log, FIRST)
    server = serve(log, dev=False)
    with contextlib.ExitStack() as stack:
        for _ in range(5):
            stack.enter_context(server.upgrade(receive_buffer=4096))
        append(log, lines(200_000))

        assert server.stop(within=2) == 0


def test_unpacking_a_gigabyte_does_not_hold_up_the_stop(serve, view, log):
    append(log, FIRST)
    packed = gzip.compress(lines(100_000, 20).encode()) * 120  # now: a log is not empty for long
    server = serve(log, "--initial", 131072)
    cursor = view(server, json=True).wait(FIRST).cursor
    log.write_bytes(b"")
    Path(f"{log}.1.gz").write_bytes(packed)
    added = add(log, "new")
    view(server).wait(added)
    files = Path(f"/proc/{server.process.pid}/fd")

    with server.upgrade(query=f"?since={cursor}"):
        eventually(lambda: any("(deleted)" in str(path.resolve()) for path in files.iterdir()))

    assert server.stop() == 0


def test_connections_that_come_and_go_leave_nothing_behind(serve, view, log):
    append(log, lines(2000))
    server = serve(log, dev=False)
    protocols = itertools.cycle([(), ("Sec-WebSocket-Protocol: audit.v1.json",)])

    def come_and_go(times):
        for _ in range(times):
            with contextlib.ExitStack() as stack:
                for _ in range(50):
                    stack.enter_context(server.upgrade(*next(protocols))).recv(100)
                append(log, lines(10))
        eventually(lambda: server.sockets() == sockets, message="connections are left")
        return server.memory()

    sockets = server.sockets()
    before = come_and_go(32)
    after = come_and_go(32)

    assert after - before < 4 * MIB


def test_no_free_descriptor_is_no_end(serve, view, log, many_files):
    server, viewer = start(serve, view, log, prefix=("prlimit", "--nofile=64:64"), dev=False)
    expected = FIRST

    with contextlib.ExitStack() as stack:
        for _ in range(150):
            stack.enter_context(knock(server))
        expected += add(log, "before")
        viewer.wait(expected)
        for tag in "abc":
            log.rename(f"{log}.{'cba'.index(tag) + 1}")
            expected += add(log, tag)
    viewer.wait(expected, 20)
    newcomer = eventually(lambda: connected(view, server), 20)
    newcomer.wait(expected[-40:])
    expected += check_it_serves(server, viewer, log)

    assert viewer.joined() == expected
    assert len(server.errors()) < 4000


def knock(server):
    """A connection that has been begun, whether the server takes it or not."""
    client = socket.socket()
    client.setblocking(False)
    client.connect_ex((server.host, server.port))
    return client


def connected(view, server):
    with contextlib.suppress(OSError, EOFError, TimeoutError):
        return view(server, json=True)
    return None


def test_thousands_of_silent_connections_stop_nothing(serve, view, log, many_files):
    server, viewer = start(serve, view, log, dev=False)
    count = min(3000, many_files - 500)

    with contextlib.ExitStack() as stack:
        clients = [stack.enter_context(knock(server)) for _ in range(count)]
        for client in clients[::3]:
            with contextlib.suppress(OSError):
                client.send(b"GET / HTTP/1.1\r\nHost: 127.")
        check_it_serves(server, viewer, log)
        memory = server.memory()

    check_it_serves(server, viewer, log)
    assert memory < 128 * MIB and len(server.errors()) < 4000


def test_a_full_disk_under_its_own_output_stops_nothing(serve, view, log):
    server, viewer = start(serve, view, log, output="/dev/full", port=free_port())

    log.rename(f"{log}.1")
    viewer.wait(lambda it: it.states() == ["missing"])
    viewer.wait(added := add(log, "new"))
    server.raw(b"\xff" * 100_000)
    added += check_it_serves(server, viewer, log)

    assert viewer.joined() == FIRST + added
    assert server.stop() == 0


def test_a_pause_of_the_process_loses_nothing(serve, view, log):
    server, viewer = start(serve, view, log)

    with server.looking_away():
        added = add(log, "a")
        log.rename(f"{log}.1")
        added += add(log, "b")
        for _ in range(50):
            server.connect().close()
    added += check_it_serves(server, viewer, log, seconds=3)

    assert viewer.joined() == FIRST + added


def test_its_own_log_stays_small(serve, view, log):
    server, viewer = start(serve, view, log, dev=False)
    before = len(server.errors())

    for number in range(30):
        server.get(f"/no/such/path/{number}/%1b")
        server.raw(b"GET / HTTP/1.1\r\nHost: \x1b[31m\r\nX-Fake: entry\r\n\r\n")
        log.rename(f"{log}.1")
        viewer.wait(add(log, f"round {number}"))
        view(server).close()

    assert len(server.errors()) - before < 4000
    assert "\x1b" not in server.errors() and "round" not in server.errors()
