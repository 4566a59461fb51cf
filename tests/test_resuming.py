"""A cursor goes on where it was, on any process that has the same bytes; else it says so."""

import contextlib
import gzip
import os
import shutil
import threading
import time
from pathlib import Path

import pytest
from harness import (
    NO_INOTIFY,
    add,
    append,
    copied_and_truncated,
    lines,
    pack,
    rotated,
    rotated_to_dates,
    shift,
)

FIRST = lines(200)
END = lines(1, 19_999)


def watch(server, view, until=FIRST[-40:], **options):
    return view(server, json=True, **options).wait(until)


def cursor_at_the_end(serve, view, log):
    """A server, and the cursor of a viewer that has seen the whole log."""
    server = serve(log)
    viewer = watch(server, view)
    viewer.close()
    return server, viewer.cursor


def the_same(server, serve, log):
    return server


def restarted(server, serve, log):
    assert server.stop() == 0
    return serve(log)


def killed(server, serve, log):
    server.kill()
    return serve(log)


def a_copy_elsewhere(server, serve, log):
    elsewhere = shutil.copytree(
        log.parent, log.parent.with_name("elsewhere"), copy_function=shutil.copy2
    )
    return serve(elsewhere / log.name)


# what is written while nobody watches -> how many rotations that is
MEANWHILE = {
    "grown": (lambda log: add(log, "a"), 0),
    "grown much": (lambda log: append(log, lines(20_000, 1000)).decode(), 0),
    "rotated at the cursor": (lambda log: shift(log) or add(log, "b"), 1),
    "rotated": (rotated, 1),
    "rotated twelve times": (lambda log: rotated(log, "bcdefghijklm"), 12),
    "rotated and packed": (lambda log: rotated(log, "bcd", packed=(3, 2)), 3),
    "rotated and all packed": (lambda log: rotated(log, packed=(1,)), 1),
    "rotated to dates": (lambda log: rotated_to_dates(log, "--"), 2),
    "rotated to dates with dots": (lambda log: rotated_to_dates(log, ".."), 2),
    "copied and truncated": (copied_and_truncated, 1),
}


@pytest.fixture
def log(tmp_path):
    """In a folder that can be copied."""
    (tmp_path / "here").mkdir()
    return tmp_path / "here" / "AUTO_REPAIR_AUDIT.log"


@pytest.mark.parametrize(("happens", "rotations"), MEANWHILE.values(), ids=MEANWHILE)
def test_a_cursor_goes_on_where_it_was_on_any_server(happens, rotations, serve, view, log):
    end = len(append(log, FIRST))
    server, cursor = cursor_at_the_end(serve, view, log)

    added = happens(log)
    places = [place(server, serve, log) for place in (the_same, a_copy_elsewhere)]
    viewers = [view(place, json=True, since=cursor) for place in places]
    for path in {place.log for place in places}:
        append(path, "marker\n")

    for viewer in viewers:
        assert viewer.wait("marker\n").joined() == added + "marker\n"
        assert (
            viewer.frames[0]["resumed"],
            viewer.frames[0]["reason"],
            viewer.frames[0]["start"],
        ) == (True, None, end)
        assert len(viewer.reasons()) == rotations


@pytest.mark.parametrize("place", [the_same, restarted])
def test_a_cursor_waits_for_a_log_that_is_away(place, serve, view, log):
    append(log, FIRST)
    server, cursor = cursor_at_the_end(serve, view, log)

    added = add(log, "a")
    log.rename(f"{log}.1")
    viewer = watch(place(server, serve, log), view, until=added, since=cursor)
    added += add(log, "new")

    assert viewer.wait(added).joined() == added
    assert viewer.frames[0]["resumed"] and viewer.reasons() == ["rotated"]


def test_a_cursor_is_good_however_many_rotated_files_are_still_read(serve, view, log):
    for number in range(70):
        append(Path(f"{log}.{number + 1}"), lines(1, 70 - number))
    append(log, FIRST)
    server = serve(log, "--rate-limit", 0)
    viewer = watch(server, view)

    for number in range(5):
        shift(log)
        viewer.wait(add(log, f"after rotation {number}", 1))
        again = view(server, json=True, since=viewer.cursor).wait(lambda it: it.frames)
        again.close()

        assert (again.frames[0]["resumed"], again.frames[0]["reason"]) == (True, None)


def test_every_cursor_on_the_way_is_good(serve, view, log):
    append(log, FIRST)
    server = serve(log, "--initial", 131072)
    viewer, written = watch(server, view), FIRST

    for tag in "abc":
        written += add(log, tag, 3)
        viewer.wait(written)
        log.rename(f"{log}.{'cba'.index(tag) + 1}")
        written += add(log, f"{tag} rotated", 3)
        viewer.wait(written)
    other, seen = serve(log), 0

    for frame in [frame for frame in viewer.frames if "cursor" in frame]:
        seen += len(frame.get("text", ""))
        rest = written[seen:]
        for place in (server, other):
            resumed = view(place, json=True, since=frame["cursor"])
            assert resumed.wait(lambda it, rest=rest: it.text == rest and it.frames).frames[0][
                "resumed"
            ]
            resumed.joined()
            resumed.close()


def test_a_reconnecting_viewer_misses_nothing_of_a_burst_with_kills(serve, view, log):
    append(log, FIRST)
    over = threading.Event()

    def write():
        for number in range(200, 20_000, 20):
            append(log, lines(20, number))
            if number % 5000 == 0:
                log.rename(f"{log}.{4 - number // 5000}")
            time.sleep(0.001)
        over.set()

    writer = threading.Thread(target=write)
    server, text, cursor = serve(log, "--initial", 131072, dev=False), "", None
    writer.start()

    while True:
        last = over.is_set()
        viewer = view(server, json=True, since=cursor)
        viewer.wait(lambda it: it.frames)
        if last:
            viewer.wait(lambda it, text=text: (text + it.text).endswith(END))
        else:
            viewer.wait(lambda it: len(it.frames) > 3 or over.is_set())
        server.kill()
        viewer.closed()
        text, cursor = text + viewer.joined(), viewer.cursor
        if last:
            break
        server = serve(log, dev=False)
    writer.join()

    assert text == FIRST + lines(19_800, 200)


def test_who_leaves_between_two_files_gets_only_the_second_one(serve, view, log):
    append(log, FIRST)
    viewer = view(serve(log), json=True).wait(lambda it: it.frames)
    viewer.close()
    log.rename(f"{log}.1")
    append(log, "new\n")
    server = serve(log)

    first = view(server, json=True, since=viewer.cursor).wait("new\n")
    second = view(server, json=True, since=first.of("generation")[0]["cursor"]).wait("new\n")

    assert second.text == "new\n"


@pytest.mark.parametrize("rotations", [0, 1, 2])
def test_identical_lines_are_told_apart_by_the_process_that_saw_them(rotations, serve, view, log):
    append(log, "same\n" * 500)
    server = serve(log, "--initial", 131072)
    follower = watch(server, view, until="same\n" * 500)
    viewer = watch(server, view, until="same\n" * 500)
    viewer.close()

    expected = append(log, "same\n" * 300).decode()
    for number in range(rotations, 0, -1):
        log.rename(f"{log}.{number}")
        expected += append(log, "same\n" * 800).decode()
        follower.wait("same\n" * 500 + expected)
    resumed = view(server, json=True, since=viewer.cursor)
    append(log, "marker\n")
    resumed.wait("marker\n")

    assert resumed.joined() == expected + "marker\n"
    assert resumed.frames[0]["resumed"] and len(resumed.reasons()) == rotations


def test_identical_lines_of_one_file_are_resumed_anywhere(serve, view, log):
    append(log, "same\n" * 500)
    server = serve(log, "--initial", 131072)
    viewer = watch(server, view, until="same\n" * 500)
    viewer.close()
    append(log, "same\n" * 300)

    for place in (restarted, a_copy_elsewhere):
        resumed = watch(place(server, serve, log), view, until="same\n" * 300, since=viewer.cursor)
        assert resumed.joined() == "same\n" * 300 and resumed.frames[0]["resumed"]


@pytest.mark.parametrize("place", [the_same, restarted, killed])
def test_late_lines_of_a_rotated_file_arrive_once_after_a_resume(place, serve, view, log):
    append(log, FIRST)
    server = serve(log)
    with open(log, "ab", buffering=0) as old:
        viewer = watch(server, view)
        log.rename(f"{log}.1")
        viewer.wait(add(log, "new", 3))
        old.write(b"late, seen\n")
        viewer.wait("late, seen\n").close()

        old.write(b"late, while away\n")
        added = add(log, "while away", 3)
        resumed = view(place(server, serve, log), json=True, since=viewer.cursor)
        resumed.wait("late, while away\n").wait(added)
        old.write(b"late again\n")
        append(log, "marker\n")
        resumed.wait("late again\n").wait("marker\n")

    assert resumed.frames[0]["resumed"]
    assert sorted(resumed.text.splitlines()) == sorted(
        ["late, while away", "late again", *added.splitlines(), "marker"]
    )


@pytest.mark.parametrize("how", ["live", "polling"])
def test_a_cursor_goes_on_right_after_a_copy_and_a_cut(how, serve, view, log):
    append(log, FIRST)
    server = serve(log, "--interval", 0.5, prefix=NO_INOTIFY if how == "polling" else ())
    cursor = watch(server, view).cursor

    shutil.copy(log, f"{log}.1")
    os.truncate(log, 0)
    viewer = view(server, json=True, since=cursor)
    added = add(log, "b")

    assert viewer.wait(added).text == added


def test_an_unfinished_last_line_of_a_rotated_file_is_sent_once(serve, view, log):
    append(log, FIRST)
    server = serve(log, "--interval", 0.3)
    viewer = watch(server, view)
    append(log, "unfinished")
    viewer.wait("unfinished")
    log.rename(f"{log}.1")
    viewer.wait(add(log, "b"))
    assert server.stop() == 0

    server = serve(log, "--interval", 0.3)
    resumed = view(server, json=True, since=viewer.cursor).wait(lambda it: it.frames)
    time.sleep(1)  # an interval and more: it would come now
    added = add(log, "c")

    assert resumed.wait(added).text == added


def test_seventy_rotations_in_half_a_minute_leave_a_good_cursor(serve, view, log):
    append(log, FIRST)
    server = serve(log)
    viewer = watch(server, view)

    for number in range(70):
        shift(log)
        viewer.wait(add(log, f"round {number}", 1))
    resumed = view(server, json=True, since=viewer.cursor)
    added = add(log, "last")

    assert resumed.wait(added).text == added
    assert resumed.of("snapshot")[0]["resumed"]


def test_files_with_the_same_first_line_hide_no_packed_one(serve, view, log):
    banner = "# the same banner\n"
    append(log, banner)
    server = serve(log, "--initial", 131072)
    viewer = watch(server, view, banner)
    viewer.wait(append(log, "day 0\n").decode())
    assert server.stop() == 0
    for day in (1, 2):
        shift(log)
        append(log, f"{banner}day {day}\n")
    pack(Path(f"{log}.1"))
    pack(Path(f"{log}.2"))
    server = serve(log, "--initial", 131072)
    witness = watch(server, view, "day 2")
    shift(log)
    append(log, banner)
    witness.wait(lambda it: it.text.count(banner) == 2)
    shift(log)
    witness.wait(append(log, banner + "day 4\n").decode())

    resumed = view(server, json=True, since=viewer.cursor)

    assert resumed.wait("day 4\n").text == f"{banner}day 1\n{banner}day 2\n{banner}{banner}day 4\n"


def test_a_fifo_named_like_a_packed_file_blocks_nothing(serve, view, log):
    append(log, FIRST)
    server, cursor = cursor_at_the_end(serve, view, log)
    log.write_text("something else\n")
    os.mkfifo(f"{log}.1.gz")

    viewer = view(server, json=True, since=cursor).wait(lambda it: it.frames)

    assert not viewer.of("snapshot")[0]["resumed"]
    assert server.stop(within=2) == 0


def test_a_line_written_late_while_no_server_ran_is_not_lost(serve, view, log):
    append(log, FIRST)
    server = serve(log)
    viewer = watch(server, view)
    with open(log, "ab", buffering=0) as old:
        log.rename(f"{log}.1")
        viewer.wait(add(log, "new", 3))
        viewer.close()
        server.stop()

        old.write(b"late, no server\n")
        resumed = watch(serve(log), view, until="late, no server\n", since=viewer.cursor)

    assert resumed.text == "late, no server\n"


def test_an_empty_new_log_is_resumed_from_the_end_of_the_old_one(serve, view, log):
    append(log, FIRST)
    server = serve(log)
    viewer = watch(server, view)
    log.rename(f"{log}.1")
    log.touch()
    viewer.wait(lambda it: it.reasons() == ["rotated"]).close()
    server.stop()

    added = add(log, "new")
    resumed = watch(serve(log), view, until=added, since=viewer.cursor)

    assert resumed.joined() == added
    assert resumed.frames[0]["resumed"]


def test_a_resume_is_checked_against_the_file_not_the_reader(serve, view, log):
    append(log, FIRST)
    server = serve(log)
    sleepy = serve(log, "--interval", 1, prefix=NO_INOTIFY)
    watch(sleepy, view)
    viewer = watch(server, view)
    added = add(log, "a")
    viewer.wait(added)

    resumed = view(sleepy, json=True, since=viewer.cursor).wait(lambda it: it.frames)
    added = add(log, "b")
    resumed.wait(added)

    assert resumed.frames[0]["resumed"] and resumed.joined() == added


# cursors that are no good


def refused(viewer, log):
    """The reason; and the viewer has the end of the log, as a new one has."""
    snapshot = viewer.wait(lambda it: it.frames).frames[0]
    assert snapshot["resumed"] is False and snapshot["reason"]
    written = log.read_bytes()
    assert snapshot["end"] == len(written) and 0 < len(snapshot["text"].encode()) <= 1000
    assert written.decode().endswith(snapshot["text"])
    return snapshot["reason"]


FORGED = [
    "x",
    "v1.5.AAAA",
    "-1",
    "9" * 400,
    "é\0\n",
    "../../etc/passwd",
    "A" * 4000,
    "[[",
    '{"a": 1}',
    "v1.0.-.-",
]


def test_a_forged_cursor_gets_a_snapshot_and_a_reason(serve, view, log, tmp_path):
    append(log, FIRST)
    server, cursor = cursor_at_the_end(serve, view, log)
    other = tmp_path / "other.log"
    append(other, add(other, "other", 500))
    foreign = watch(serve(other), view, until="entry 499 ").cursor
    broken = [cursor[:-3], cursor[3:], cursor * 2, cursor.swapcase()]
    altered = [
        cursor[:place] + ("1" if character == "0" else "0") + cursor[place + 1 :]
        for place, character in enumerate(cursor)
    ]

    for forged in [*FORGED, foreign, *broken]:
        viewer = view(server, json=True, since=forged)
        refused(viewer, log)
        viewer.close()
    for forged in altered:  # not each character need be part of the proof
        viewer = view(server, json=True, since=forged).wait(lambda it: it.frames)
        if not (viewer.frames[0]["resumed"] and viewer.frames[0]["start"] == len(FIRST.encode())):
            refused(viewer, log)
        viewer.close()

    viewer = view(server, json=True, since=cursor).wait(lambda it: it.frames)
    assert viewer.frames[0]["resumed"] and server.errors().count("\n") < 5


def edited(log):
    with open(log, "r+b") as file:
        file.seek(-100, os.SEEK_END)
        file.write(b"####")


def deleted(log):
    log.unlink()
    add(log, "new", 300)


def truncated(log):
    os.truncate(log, 0)
    add(log, "new", 2000)


@pytest.mark.parametrize("happens", [edited, deleted, truncated])
def test_a_cursor_of_bytes_that_are_gone_is_refused(happens, serve, view, log):
    append(log, FIRST)
    _, cursor = cursor_at_the_end(serve, view, log)

    happens(log)

    refused(view(serve(log), json=True, since=cursor), log)


def test_a_cursor_beyond_the_end_is_ahead_until_the_file_has_caught_up(serve, view, log, tmp_path):
    append(log, FIRST)
    copy = Path(shutil.copy(log, tmp_path / "copy.log"))
    added = add(log, "a")
    cursor = watch(serve(log), view, until=added[-40:]).cursor
    replica = serve(copy)

    reason = refused(view(replica, json=True, since=cursor), copy)
    append(copy, added)
    again = view(replica, json=True, since=cursor)
    append(copy, "marker\n")

    assert reason == "ahead"
    assert again.wait("marker\n").text == "marker\n" and again.frames[0]["resumed"]


def test_a_cursor_of_an_empty_log_never_leaves_a_silent_gap(serve, view, log):
    log.touch()
    server = serve(log)
    viewer = view(server, json=True).wait(lambda it: it.frames)
    viewer.close()
    server.stop()

    written = append(log, lines(100)).decode()
    resumed = view(serve(log), json=True, since=viewer.cursor).wait(written[-40:])
    append(log, "marker\n")
    resumed.wait("marker\n")

    assert resumed.frames[0]["reason"] or resumed.joined() == written + "marker\n"


def test_many_siblings_and_forged_cursors_are_bounded_work(serve, view, log):
    append(log, FIRST)
    server, cursor = cursor_at_the_end(serve, view, log)
    written = append(log, lines(30_000, 1000))
    packed = gzip.compress(written, 1)
    for number in range(1, 100):
        append(Path(f"{log}.{number}.gz"), packed)
    stale = cursor.replace(cursor[-5:], "AAAAA")

    asked = time.monotonic()
    with contextlib.ExitStack() as stack:
        for _ in range(5):
            stack.callback(view(server, json=True, since=stale).close)
        delay = time.monotonic()
        server.get("/healthz")
        delay = time.monotonic() - delay

    assert delay < 1 and time.monotonic() - asked < 10
