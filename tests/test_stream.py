"""The WebSocket: the first frame, everything after it, in bursts, for the slow and the many."""

import contextlib
import functools
import hashlib
import json
import random
import statistics
import subprocess
import sys
import threading
import time

import pytest
from harness import append, eventually, lines, run
from websockets.sync.client import connect

MIB = 2**20


def received(count):
    return lambda viewer: viewer.received >= count


def sha256(data):
    return hashlib.sha256(data if isinstance(data, bytes) else data.encode()).hexdigest()


# the first frame


LINE = len(lines(1).encode())


@pytest.mark.parametrize(
    ("content", "initial", "expected"),
    [
        (lines(3), 1000, lines(3)),
        (lines(100), 10 * LINE, lines(10, start=90)),
        (lines(100), 10 * LINE - 1, lines(9, start=91)),
        (lines(3000), 131072, lines(131072 // LINE, start=3000 - 131072 // LINE)),
        (lines(3) + "unfinished", 1000, lines(3)),
        ("one\n\rtwo\u2028\v\f\x1c\u0085\n", 14, "\rtwo\u2028\v\f\x1c\u0085\n"),
        ("\n\n\n", 2, "\n\n"),
    ],
    ids=[
        "small",
        "exact",
        "one byte less",
        "largest",
        "unfinished",
        "only newlines end lines",
        "empty lines",
    ],
)
def test_the_first_frame_is_the_end_of_the_log(content, initial, expected, serve, view, log):
    written = append(log, content)
    server = serve(log, "--initial", initial, "--interval", 60)

    plain, snapshot = (
        view(server, json=json).wait(lambda it: it.frames).frames[0] for json in (False, True)
    )

    assert plain == snapshot["text"] == expected
    end = written.rindex(b"\n") + 1
    place = (snapshot["start"], snapshot["end"], snapshot["size"])
    assert place == (end - len(expected.encode()), end, len(written))


@pytest.mark.parametrize("character", ["x", "é", "😀"])
def test_of_a_longer_last_line_the_first_frame_is_the_end(character, serve, view, log):
    append(log, f"{lines(2)}{character * 3000}\n")
    server = serve(log, "--initial", 1001)

    viewer = view(server).wait(lambda it: it.frames)

    assert f"{character * 3000}\n".endswith(viewer.text)
    assert 990 <= len(viewer.text.encode()) <= 1001


def test_the_snapshot_says_what_it_is(serve, view, log):
    append(log, lines(2))

    snapshot = view(serve(log), json=True).wait(lambda it: it.frames).frames[0]

    assert snapshot["generation"] and snapshot["cursor"]
    assert {name: snapshot[name] for name in snapshot if name not in ("generation", "cursor")} == {
        "type": "snapshot",
        "log": log.name,
        "resumed": False,
        "reason": None,
        "start": 0,
        "end": 2 * LINE,
        "size": 2 * LINE,
        "text": lines(2),
    }


def test_nothing_is_compressed(serve, view, log):
    viewer = view(serve(log))

    assert "Sec-WebSocket-Extensions" not in viewer.connection.response.headers


# what is appended


def test_eight_viewers_get_every_line_once(serve, view, log):
    append(log, lines(5))
    server = serve(log)
    viewers = [view(server, json=bool(number % 2)) for number in range(8)]

    for number in range(5, 35):
        append(log, lines(1, start=number))
        time.sleep(random.random() / 50)

    for viewer in viewers:
        viewer.wait("entry 00000034 ").wait(lambda it: it.text.endswith("\n"))
        assert viewer.text == lines(35)
    assert all(viewer.joined() for viewer in viewers[1::2])


def test_the_first_frame_and_the_later_ones_join_whatever_is_written(serve, view, log):
    append(log, lines(100))
    server = serve(log)
    enough = threading.Event()
    written = [100]

    def write():
        while not enough.is_set():
            append(log, lines(1, start=written[0]))
            written[0] += 1

    writer = threading.Thread(target=write)
    writer.start()
    try:
        viewers = [view(server, json=bool(number % 2)) for number in range(12)]
    finally:
        enough.set()
        writer.join()

    for viewer in viewers:
        viewer.wait(f"entry {written[0] - 1:08d} ").wait(lambda it: it.text.endswith("\n"))
        assert lines(written[0]).endswith(viewer.text) and viewer.text.startswith("[")
    assert all(viewer.joined() for viewer in viewers[1::2])


def by_option(log):
    assert run("--log", log, "--append", "Fixed database issue").returncode == 0


def by_shell(log):
    subprocess.run(["sh", "-c", 'echo "Fixed database issue" >> "$1"', "sh", str(log)], check=True)


def by_program(log):
    append(log, "Fixed database issue\n")


def test_an_entry_arrives_whoever_writes_it(serve, view, log):
    append(log, lines(1))
    viewer = view(serve(log)).wait(lines(1))

    for number, write in enumerate((by_option, by_shell, by_program), start=1):
        write(log)
        viewer.wait(
            lambda it, number=number: it.text.count("Fixed database issue\n") == number, seconds=3
        )


@pytest.mark.skipif(sys.platform != "linux", reason="needs inotify")
def test_an_entry_arrives_at_once(serve, view, log):
    append(log, lines(1))
    viewer = view(serve(log, "--interval", 60, dev=False)).wait(lines(1))
    delays = []

    for number in range(20):
        written = time.monotonic()
        append(log, f"marker {number}\n")
        viewer.wait(f"marker {number}\n")
        delays.append(viewer.times[-1] - written)
        time.sleep(0.03)

    assert statistics.median(delays) < 0.02


CONTENTS = {
    "characters": "plain é ✅ 😀\n".encode(),
    "other line ends": "a\rb\r\nc\u2028d\u2029e\u0085f\vg\fh\x1ci\n".encode(),
    "control": bytes(range(32)) + b"\x7f\n",
    "escapes": "\x1b]0;x\x07\x1b[2J\u202e<img src=x onerror=alert(1)>\n".encode(),
    "empty lines": b"\n\n\n\nx\n\n",
    "nul": b"a\0b\0\n\0\n",
    "byte order mark": "\ufeffa\n\ufeffb\n".encode(),
    "utf-16": "one\ntwo\n".encode("utf-16") + b"\n",
    "invalid": b"\xff\xfe\xc3\nok \xe2\x82\n\xed\xa0\x80 \xf4\x90\x80\x80\n\xe2\x82",
    "random": random.Random(1).randbytes(50_000),
}


def test_any_content_arrives_as_it_is(serve, view, log):
    log.touch()
    server = serve(log, "--initial", 131072)
    viewers = [view(server), view(server, json=True).wait(lambda it: it.frames)]
    written = b""

    for name, content in CONTENTS.items():
        written += append(log, content + f"\nend of {name}\n".encode())
        viewers += [view(server), view(server, json=True)]
        for viewer in viewers:
            viewer.wait(f"\nend of {name}\n")

    for viewer in viewers:
        assert viewer.text == written.decode(errors="replace")
    for viewer in viewers[1::2]:
        frames = [frame for frame in viewer.frames if "start" in frame]
        assert [frame["start"] for frame in frames] == [
            0,
            *(frame["end"] for frame in frames[:-1]),
        ]


def test_an_unfinished_line_waits_for_its_end(serve, view, log):
    append(log, lines(1))
    viewer = view(serve(log, "--interval", 60)).wait(lines(1))

    for piece in ("unfin", "ished", " – ", "b", "y", "t", "e", "s\n"):
        append(log, piece)
        time.sleep(0.03)
    viewer.wait("bytes\n")

    assert viewer.frames == [lines(1), "unfinished – bytes\n"]


def test_an_unfinished_line_is_sent_after_the_interval(serve, view, log):
    append(log, lines(1))
    viewer = view(serve(log, "--interval", 0.5)).wait(lines(1))

    written = time.monotonic()
    append(log, "unfinished")
    viewer.wait("unfinished", seconds=3)
    append(log, " no more\n")
    viewer.wait("no more\n")

    assert viewer.frames == [lines(1), "unfinished", " no more\n"]
    assert viewer.times[1] - written >= 0.5


def test_a_character_is_never_split(serve, view, log):
    append(log, lines(1))
    viewer = view(serve(log, "--interval", 0.2), json=True).wait(lines(1))
    emoji = "😀".encode()

    for cut in (1, 2, 3):
        append(log, f"cut after {cut}: ".encode() + emoji[:cut])
        viewer.wait(f"cut after {cut}: ")
        append(log, emoji[cut:] + b"\n")
        viewer.wait(f"cut after {cut}: 😀\n")

    assert [frame["text"] for frame in viewer.of("append")][1::2] == ["😀\n"] * 3
    assert viewer.joined()


def test_a_long_line_comes_in_bounded_pieces(serve, view, log):
    append(log, lines(1))
    server = serve(log)
    viewers = [view(server).wait(lines(1)), view(server, json=True).wait(lines(1))]
    written = lines(1).encode()

    for content in (
        "x" + "😀" * 200_000,
        "\x01" * 400_000,
        b"\xff" * 400_000,
        '"\\' * 200_000,
        "end",
    ):
        written += append(log, content) + append(log, "\n")

    for viewer in viewers:
        assert viewer.wait("\nend\n").text == written.decode(errors="replace")
    assert max(frame["end"] - frame["start"] for frame in viewers[1].of("append")) <= 131072


# bursts, slow viewers, many viewers


def test_a_burst_arrives_whole(serve, view, log):
    append(log, lines(10))
    server = serve(log, "--initial", 131072, dev=False)
    viewers = [view(server), view(server), view(server, json=True)]

    written = lines(300_010)
    for start in range(10, 300_010, 1000):
        append(log, lines(1000, start))

    for viewer in viewers:
        viewer.wait(received(len(written.encode())), 30)
        assert sha256(viewer.text) == sha256(written)
    assert viewers[2].joined()


def test_viewers_that_never_read_cost_neither_memory_nor_time(serve, view, log):
    append(log, lines(1000))
    server = serve(log, dev=False)
    chunk = lines(100_000)
    with contextlib.ExitStack() as stack:
        for number in range(10):
            stack.enter_context(
                server.upgrade(*["Sec-WebSocket-Protocol: audit.v1.json"] * (number % 2))
            )
        before, delays = server.memory(), []

        for _ in range(24):
            append(log, chunk)
            asked = time.monotonic()
            server.get("/healthz")
            delays.append(time.monotonic() - asked)
        asked = time.monotonic()
        viewer = view(server).wait(lambda it: it.frames)
        append(log, "marker\n")
        viewer.wait("marker\n")
        delays.append(viewer.times[-1] - asked)

    assert log.stat().st_size > 200_000_000
    assert server.peak() - before < 64 * MIB
    assert statistics.median(delays) < 0.1 and max(delays) < 5


def test_a_slow_viewer_gets_every_byte_in_the_end(serve, view, log):
    append(log, lines(1))
    server = serve(log, dev=False)
    quick, slow = view(server, json=True), view(server, json=True, receive_buffer=4096)
    slow.wait(lines(1)).hold()

    written = lines(1) + "".join(
        append(log, lines(10_000, start)).decode() for start in range(1, 100_000, 10_000)
    )
    quick.wait(received(len(written.encode())))
    slow.release()
    slow.wait(received(len(written.encode())), 30)
    append(log, "marker\n")

    for viewer in (quick, slow):
        assert viewer.wait("marker\n").joined() == written + "marker\n"


@pytest.mark.parametrize("json", [True, False])
def test_who_falls_behind_one_small_message_after_the_other_gets_every_byte(json, serve, view, log):
    append(log, lines(1))
    server = serve(log, dev=False)
    quick, slow = view(server, json=True), view(server, json=json, receive_buffer=4096)
    slow.wait(lines(1)).hold()

    written = lines(1)
    for start in range(1, 12_000, 200):
        written += append(log, lines(200, start)).decode()
        quick.wait(received(len(written.encode())))
    slow.release()
    append(log, "marker\n")

    for viewer in (quick, slow):
        viewer.wait("marker\n", 30)
        joined = viewer.joined() if viewer.json else viewer.text
        assert joined == written + "marker\n"


def test_what_a_viewer_sends_is_ignored(serve, view, log):
    append(log, lines(1))
    viewer = view(serve(log)).wait(lines(1))

    for _ in range(50):
        viewer.connection.send("x" * 1024)
        viewer.connection.send(b"x" * 1024)
    viewer.connection.ping().wait(5)
    append(log, "marker\n")
    viewer.wait("marker\n")

    assert viewer.text == lines(1) + "marker\n"


def test_nothing_follows_a_close_frame(serve, view, log):
    append(log, lines(1))
    server = serve(log)
    viewer = view(server).wait(lines(1))
    leaving = [server.upgrade() for _ in range(20)]

    for number, client in enumerate(leaving):
        append(log, lines(1, 2 * number))
        viewer.wait(lines(1, 2 * number))
        client.sendall(b"\x88\x80\0\0\0\0")  # RFC 6455, 5.5.1; the connection stays open
        append(log, lines(1, 2 * number + 1))
        viewer.wait(lines(1, 2 * number + 1))

    for client in leaving:
        received = b"".join(iter(functools.partial(client.recv, 65536), b""))
        client.close()
        assert received.endswith(b"\x88\x00")


def test_a_long_message_ends_the_connection(serve, view, log):
    server = serve(log)
    viewer, other = view(server), view(server)

    viewer.connection.send("x" * 1025)

    assert viewer.closed() == 1009
    append(log, "marker\n")
    other.wait("marker\n")


def test_an_idle_server_does_nothing(serve, log):
    append(log, lines(10))
    server = serve(log, dev=False)
    fresh = server.memory()
    with contextlib.ExitStack() as stack:
        for _ in range(100):
            stack.enter_context(server.upgrade())
        eventually(lambda: 'viewers{state="live"} 100' in server.get("/metrics")[2].decode())
        before = server.cpu()

        time.sleep(5)

        assert server.cpu() - before < 0.5  # a loop that spins takes ten times as much
    assert fresh < 64 * MIB


def test_a_huge_line_takes_little_memory(serve, view, log):
    append(log, lines(1))
    server = serve(log, "--interval", 0.2, dev=False)
    viewer = view(server, json=True).wait(lines(1))
    before = server.memory()

    for start in range(0, 12_500_000, 125_000):
        append(log, "".join(f"{number:08d}" for number in range(start, start + 125_000)))
    append(log, "\n")
    viewer.wait(received(log.stat().st_size), 30)

    assert sha256(viewer.joined()) == sha256(log.read_bytes())
    assert log.stat().st_size > 100_000_000 and server.peak() - before < 64 * MIB


def test_viewers_may_offer_other_protocols(serve, log):
    append(log, lines(1))
    server = serve(log)

    with connect(server.ws, subprotocols=["other", "audit.v1.json"], proxy=None) as connection:
        first = json.loads(connection.recv(5))

    assert (connection.subprotocol, first["type"]) == ("audit.v1.json", "snapshot")
