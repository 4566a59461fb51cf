"""A cut or rewritten log goes on at the start of a line, with all that is new and nothing twice."""

import contextlib
import os
import subprocess
import time

import pytest
from harness import NO_INOTIFY, add, append, eventually, lines

PROVED = 4096  # the first and the last bytes that were sent, by which a change is found
CUT = {"truncated", "rewritten"}  # which one it is, depends on when the server looks


def numbered(tag, count, width=64, start=0):
    """Lines that all begin alike, each of `width` bytes."""
    entries = (
        f"[2025-12-17T17:40:37Z] {tag} {number:05} " for number in range(start, start + count)
    )
    return "".join(entry.ljust(width - 1, ".") + "\n" for entry in entries)


FIRST = numbered("OLD", 200)


def start(serve, view, log, how="live", first=FIRST, interval=0.3, **options):
    """A server with a viewer that has seen the first lines."""
    append(log, first)
    prefix = NO_INOTIFY if how == "polling" else ()
    server = serve(log, "--initial", 131072, "--interval", interval, prefix=prefix, **options)
    return server, view(server, json=True).wait(first)


def away(server, how):
    return server.looking_away() if how == "away" else contextlib.nullcontext()


@pytest.mark.slow  # a generation is looked at for half a minute after its end
def test_a_log_that_is_emptied_again_and_again_costs_no_descriptors(serve, view, log):
    server, viewer = start(serve, view, log)
    before = len(os.listdir(f"/proc/{server.process.pid}/fd"))

    for number in range(20):
        os.truncate(log, 0)
        append(log, f"emptied {number}\n")
        viewer.wait(f"emptied {number}\n")

    eventually(lambda: len(os.listdir(f"/proc/{server.process.pid}/fd")) <= before + 2, 90)


def ended(viewer):
    """Why and where each generation went on."""
    return [(frame["reason"], frame["start"]) for frame in viewer.of("generation")]


def overwrite(log, text):
    """In place, in one go: `cp new log`, `echo … > log`."""
    with open(log, "wb", buffering=0) as file:
        file.write(text.encode())


def check(viewer, how, expected, reason, begins):
    """The text; and why and where the last generation went on, where one look saw all of it."""
    assert viewer.joined() == expected
    if how == "away":
        assert ended(viewer) == [(reason, begins)]
    assert {reason for reason, _ in ended(viewer)} <= CUT
    if how != "polling":  # there nobody can know what was written between the last look and the cut
        assert [frame["gap"] for frame in viewer.of("generation") if frame["gap"]] == []


WAYS = pytest.mark.parametrize("how", ["live", "away", "polling"])


@WAYS
@pytest.mark.parametrize(
    ("old", "new"), [(200, 180), (200, 200), (1000, 1050), (1000, 30), (30, 1000)]
)
def test_a_log_replaced_in_place_is_sent_from_its_first_line(old, new, how, serve, view, log):
    server, viewer = start(serve, view, log, how, numbered("OLD", old))

    with away(server, how):
        overwrite(log, numbered("NEW", new))
    viewer.wait(f"NEW {new - 1:05} ").wait(lambda it: it.text.endswith("\n"))

    reason = "truncated" if new < old else "rewritten"
    check(viewer, how, numbered("OLD", old) + numbered("NEW", new), reason, 0)


@WAYS
def test_lines_of_varying_width_are_replaced_whole(how, serve, view, log):
    def varying(tag, count):
        return "".join(numbered(tag, 1, 48 + number * 37 % 40, number) for number in range(count))

    server, viewer = start(serve, view, log, how, varying("OLD", 250))

    with away(server, how):
        overwrite(log, varying("NEW", 250))
    viewer.wait("NEW 00249 ").wait(lambda it: it.text.endswith("\n"))

    check(viewer, how, varying("OLD", 250) + varying("NEW", 250), "rewritten", 0)


SMALL = [
    ("entry 1\n", "entry 2\n", "rewritten"),
    ("entry 1\nentry 2\n", "entry 3\n", "truncated"),
    ("entry 1\n", "entry 2\nentry 3\n", "rewritten"),
    (numbered("OLD", 9), numbered("NEW", 1), "truncated"),
    ("entry é1\n", "entry è1\n", "rewritten"),
]


@WAYS
@pytest.mark.parametrize(("old", "new", "reason"), SMALL)
def test_the_first_line_of_a_small_log_that_is_emptied_comes_whole(
    old, new, reason, how, serve, view, log
):
    server, viewer = start(serve, view, log, how, old)

    with away(server, how):
        overwrite(log, new)
    viewer.wait(old + new)

    check(viewer, how, old + new, reason, 0)


def test_a_plain_viewer_sees_whole_lines_after_a_cut(serve, view, log):
    append(log, FIRST)
    server = serve(log, "--initial", 131072, "--interval", 0.3)
    viewer, expected = view(server).wait(FIRST), FIRST

    for number in range(5):
        overwrite(log, numbered(f"ROUND {number}", 3))
        expected += numbered(f"ROUND {number}", 3)
        viewer.wait(expected)

    assert viewer.text == expected


def test_a_change_in_the_last_lines_goes_on_at_the_start_of_its_line(serve, view, log):
    _, viewer = start(serve, view, log)
    size = len(FIRST)

    with open(log, "r+b") as file:
        file.seek(size - 10 * 64 + 40)
        file.write(b"#")
    viewer.wait(lambda it: it.text.count("00199") == 2).wait(lambda it: it.text.endswith("\n"))

    assert ended(viewer) == [("rewritten", size - 10 * 64)]
    assert viewer.joined() == FIRST + log.read_text()[-10 * 64 :]


def test_a_change_in_the_first_lines_goes_on_at_the_beginning(serve, view, log):
    _, viewer = start(serve, view, log)

    with open(log, "r+b") as file:
        file.seek(100)
        file.write(b"#")
    viewer.wait(lambda it: it.text.count("00199") == 2).wait(lambda it: it.text.endswith("\n"))

    assert ended(viewer) == [("rewritten", 0)]
    assert viewer.joined() == FIRST + log.read_text()


@pytest.mark.parametrize("how", ["live", "away"])
def test_a_cut_that_changes_nothing_before_it_goes_on_at_the_end(how, serve, view, log):
    server, viewer = start(serve, view, log, how)
    kept = len(FIRST) - 10 * 64

    with away(server, how):
        os.truncate(log, kept)
    viewer.wait(lambda it: it.reasons())
    added = add(log, "0")
    viewer.wait(added)

    check(viewer, how, FIRST + added, "truncated", kept)
    assert ended(viewer) == [("truncated", kept)]


def test_a_cut_within_a_line_and_other_bytes_go_on_at_the_start_of_that_line(serve, view, log):
    server, viewer = start(serve, view, log)
    kept = len(FIRST) - 10 * 64 + 30

    with server.looking_away():
        os.truncate(log, kept)
        append(log, "is how it goes on\n")
    viewer.wait("is how it goes on\n")

    assert viewer.joined() == FIRST + log.read_text()[kept - 30 :]
    assert ended(viewer) == [("truncated", kept - 30)]


@pytest.mark.parametrize("how", ["away", "polling"])
def test_a_log_that_is_written_over_from_its_start_shows_what_is_new(how, serve, view, log):
    server, viewer = start(serve, view, log, how)

    expected = FIRST
    for number in range(3):
        with away(server, how), open(log, "r+b", buffering=0) as file:
            file.write(numbered(f"RING {number}", 3).encode())
        expected += log.read_text()
        viewer.wait(expected)

    assert viewer.joined() == expected
    assert ended(viewer) == [("rewritten", 0)] * 3


# trimmed to its last lines


def trim(log, count):
    """kept="$(tail -n 20 log)"; echo "$kept" > log"""
    kept = subprocess.run(["tail", "-n", str(count), log], capture_output=True, check=True).stdout
    with open(log, "wb", buffering=0) as file:
        file.write(kept)
    return kept


@WAYS
@pytest.mark.parametrize("count", [1, 20, 90, 150])
def test_a_log_trimmed_to_its_last_lines_goes_on_behind_them(count, how, serve, view, log):
    server, viewer = start(serve, view, log, how)

    with away(server, how):
        kept = trim(log, count)
        added = add(log, "new") if how == "away" else ""
    viewer.wait(lambda it: it.reasons())
    added += add(log, "newer")
    viewer.wait(added)

    check(viewer, how, FIRST + added, "truncated", len(kept))


def test_a_ring_of_lines_sends_each_new_line_once(serve, view, log):
    first = numbered("LINE", 100)
    server, viewer = start(serve, view, log, first=first)
    expected = first

    for number in range(100, 130):
        with server.looking_away():
            append(log, numbered("LINE", 1, start=number))
            trim(log, 100)
        expected += numbered("LINE", 1, start=number)
        viewer.wait(expected)

    assert viewer.joined() == expected


def test_a_trimmed_log_is_resumed_behind_what_was_sent(serve, view, log):
    server, viewer = start(serve, view, log)
    viewer.close()

    trim(log, 20)
    added = add(log, "new")
    resumed = view(serve(log), json=True, since=viewer.cursor).wait(added)

    refused = not resumed.frames[0]["resumed"]
    assert refused or resumed.text == added


# viewers that are behind


@pytest.mark.parametrize("same", ["", "1", "[2025-12-17T17:40:37Z] the same line\n"])
def test_a_slow_viewer_behind_two_cuts_gets_all_of_the_present_file(same, serve, view, log):
    first = numbered("OLD", 20)
    append(log, first)
    server = serve(log, "--initial", 131072, "--interval", 0.3, dev=False)
    quick = view(server, json=True).wait(first)
    slow = view(server, json=True, receive_buffer=4096).wait(first)
    slow.hold()
    quick.wait(append(log, lines(60_000, 20)).decode()[-60:], 20)

    for tag in ("second", "third"):
        overwrite(log, f"{same}{tag} life: {tag}\n")
        quick.wait(f"{tag} life: {tag}\n")
    last = add(log, "last")
    quick.wait(last)
    slow.release()
    slow.wait(last, 20)

    slow.joined()
    assert slow.text.endswith(f"\n{same}third life: third\n{last}")
    assert quick.text.endswith(
        f"{same}second life: second\n{same}third life: third\n{last}"
    ) or same.endswith("\n")


def test_a_cursor_of_a_file_that_was_cut_twice_is_refused_or_right(serve, view, log):
    server, viewer = start(serve, view, log)
    viewer.close()

    for tag in ("SECOND", "THIRD"):
        overwrite(log, numbered(tag, 300))
        view(server, json=True).wait(f"{tag} 00299 ").close()
    resumed = view(server, json=True, since=viewer.cursor).wait("THIRD 00299 ")

    assert not resumed.frames[0]["resumed"] or resumed.text == numbered("THIRD", 300)


# unfinished lines


def test_an_unfinished_line_comes_an_interval_after_its_first_byte(serve, view, log):
    _, viewer = start(serve, view, log, first="start\n", interval=0.5)

    begun, dots = time.monotonic(), 0
    while time.monotonic() < begun + 4:
        append(log, ".")
        dots += 1
        time.sleep(0.05)
        if "." in viewer.text:
            break
    waited = time.monotonic() - begun
    append(log, "done\n")
    viewer.wait("done\n")

    assert waited < 2
    assert viewer.joined() == f"start\n{'.' * dots}done\n"


def test_a_progress_line_is_followed_while_it_is_written(serve, view, log):
    _, viewer = start(serve, view, log, first="start\n", interval=0.3)

    for step in range(40):
        append(log, f"\r{step} %")
        time.sleep(0.05)
    append(log, "\n")
    viewer.wait("39 %\n")

    assert viewer.joined() == "start\n" + "".join(f"\r{step} %" for step in range(40)) + "\n"
    assert len(viewer.of("append")) >= 3


def test_checked_names_the_bytes_of_an_unfinished_line(serve, view, log):
    append(log, "start\n")
    viewer = view(serve(log, "--interval", 30), json=True).wait("start\n")

    deadline = time.monotonic() + 20
    while not viewer.of("checked") and time.monotonic() < deadline:
        append(log, ".")  # not due for 30 s
        time.sleep(1)

    checked = viewer.of("checked")[0]
    assert checked["end"] == 6 and checked["size"] == 6 + checked["unfinished"] > 6


def test_checked_has_nothing_unfinished_where_all_was_sent(serve, view, log):
    append(log, "start\n")
    viewer = view(serve(log, "--interval", 0.3), json=True).wait("start\n")

    append(log, "unfinished")
    viewer.wait("unfinished").wait(lambda it: it.of("checked"), 25)

    checked = viewer.of("checked")[-1]
    assert (checked["size"], checked["end"], checked["unfinished"]) == (16, 16, 0)


# NULs where a line begins


@pytest.mark.parametrize("count", [1024, 8192, 300_000])
def test_nuls_after_a_crash_are_one_seam_and_the_line_begins_behind_them(count, serve, view, log):
    _, viewer = start(serve, view, log)
    end = len(FIRST)

    append(log, bytes(count) + b"after the crash\n")
    viewer.wait("after the crash\n")

    assert [(frame["start"], frame["end"]) for frame in viewer.of("skip")] == [(end, end + count)]
    assert viewer.joined() == FIRST + "after the crash\n"


def test_a_nul_within_a_line_is_text(serve, view, log):
    _, viewer = start(serve, view, log)

    append(log, b"a\0b\n")
    viewer.wait("b\n")

    assert viewer.joined() == FIRST + "a\0b\n" and not viewer.of("skip")
