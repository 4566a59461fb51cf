"""Which file follows which is decided by evidence, not by names; what nobody can know is told."""

import bz2
import contextlib
import gzip
import itertools
import lzma
import os
import shutil
import subprocess
import threading
import time
from pathlib import Path

import pytest
from harness import NO_INOTIFY, add, append, lines, pack, shift

FIRST = lines(20)
NO_OVERRIDE = () if os.getuid() else ("setpriv", "--bounding-set", "-dac_override,-dac_read_search")
PACKERS = {"": lambda data: data, ".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress}


def start(serve, view, log, how="live", **options):
    """A server with a viewer that has seen the first lines."""
    append(log, FIRST)
    options.setdefault("prefix", NO_INOTIFY if how == "polling" else ())
    server = serve(log, "--initial", 131072, "--interval", 0.3, **options)
    return server, view(server, json=True).wait(FIRST)


def away(server, how):
    """Several things happen between two looks, with file events or without."""
    return contextlib.nullcontext() if how == "live" else server.looking_away()


def gaps(viewer):
    """What generation frames say about missing lines."""
    return [frame["gap"] for frame in viewer.of("generation") if frame["gap"] is not None]


def told(viewer):
    """Was it said that lines may be missing?"""
    refused = any(frame["reason"] and not frame["resumed"] for frame in viewer.of("snapshot"))
    return refused or bool(gaps(viewer)) or bool(viewer.of("skip"))


def finished(viewer, log):
    """Once everything has come: the text without the last line."""
    append(log, "marker\n")
    return viewer.wait("marker\n").joined().removesuffix("marker\n")


def once(text, written):
    """No line twice, none that was not written."""
    came = text.splitlines()
    return len(came) == len(set(came)) and set(came) <= set(written.splitlines())


def rename_to(log, name, tag, count=10):
    """One rotation, between lines of the old and of the new file; what was written."""
    added = add(log, f"before {tag}", count)
    log.rename(log.with_name(name))
    return added + add(log, f"after {tag}", count)


# what was sent is not sent again


@pytest.mark.parametrize("place", ["the same server", "another"])
def test_a_log_that_was_renamed_and_is_missing_comes_once_to_those_who_return(
    place, serve, view, log
):
    server, viewer = start(serve, view, log)
    viewer.close()

    shift(log)
    written = add(log, "a")
    if place == "another":
        server.stop()
        server = serve(log, "--interval", 0.3)
    view(server, json=True).wait(written)
    shift(log)
    resumed = view(server, json=True, since=viewer.cursor).wait(written)
    written += add(log, "b")

    assert resumed.wait("b: entry 9 ").wait(lambda it: it.text.endswith("\n")).text == written
    assert gaps(resumed) == []


ORDERS = {
    "numbers that rise": ["log.1", "log.2", "log.3", "log.4"],
    "an index behind a date, past ten": [f"log.2026-11-27.{number}" for number in range(13)],
    "a clock that is set back": [
        "log-20261127-120000",
        "log-20261127-130000",
        "log-20261127-110000",
    ],
    "days first, over the end of a month": [
        "log-30102026",
        "log-31102026",
        "log-01112026",
        "log-02112026",
    ],
    "names that nobody has heard of": ["aside", "log.saved.by.hand", "@4000000069a1.s"],
    "numbers, then dates": ["log.1", "log-20261127", "log.2"],
}


@pytest.fixture
def log(tmp_path):
    return tmp_path / "log"


@pytest.mark.parametrize("how", ["live", "away"])
@pytest.mark.parametrize("names", ORDERS.values(), ids=ORDERS)
def test_each_file_is_sent_once_whatever_it_is_renamed_to(names, how, serve, view, log):
    server, viewer = start(serve, view, log)
    written = FIRST

    with away(server, how):
        for number, name in enumerate(names):
            written += rename_to(log, name, f"rotation {number}")
            if how == "live":
                viewer.wait(f"after rotation {number}: entry 9 ")

    assert finished(viewer, log) == written
    assert (viewer.reasons(), gaps(viewer)) == (["rotated"] * len(names), [])


def test_an_old_dated_file_beside_numbered_ones_is_not_sent_at_each_rotation(serve, view, log):
    old = log.with_name("log-20251217")
    add(old, "last year")
    os.utime(old, (time.time() - 30_000_000,) * 2)
    _, viewer = start(serve, view, log)
    written = FIRST

    for number in range(3):
        shift(log)
        written += add(log, f"rotation {number}")
        viewer.wait(f"rotation {number}: entry 9 ")

    assert finished(viewer, log) == written
    assert gaps(viewer) == []


@pytest.mark.parametrize("how", ["live", "away", "polling"])
def test_a_backup_copy_beside_the_log_is_not_sent_as_a_newer_file(how, serve, view, log):
    server, viewer = start(serve, view, log, how)
    shutil.copy(log, log.with_name("log.2026-11-27"))

    with away(server, how):
        written = add(log, "a")
        shift(log)
        written += add(log, "b")

    assert finished(viewer, log) == FIRST + written
    assert (viewer.reasons(), gaps(viewer)) == (["rotated"], [])


@pytest.mark.parametrize("how", ["live", "away"])
def test_a_file_that_is_renamed_twice_in_a_rotation_is_sent_once(how, serve, view, log):
    server, viewer = start(serve, view, log)
    written = FIRST

    for number in range(3):
        with away(server, how):
            written += add(log, f"before {number}")
            log.rename(f"{log}.0")
            written += add(log, f"after {number}")
            Path(f"{log}.0").rename(f"{log}.2026112718000{number}")
        viewer.wait(f"after {number}: entry 9 ")

    assert finished(viewer, log) == written
    assert (viewer.reasons(), gaps(viewer)) == (["rotated"] * 3, [])


@pytest.mark.parametrize("how", ["live", "away", "polling"])
def test_a_link_and_an_unlink_are_a_rotation_too(how, serve, view, log):
    server, viewer = start(serve, view, log, how)
    written = FIRST

    with away(server, how):
        for number in (2, 1):
            written += add(log, f"before {number}")
            os.link(log, f"{log}.{number}")
            log.unlink()
            written += add(log, f"after {number}")

    assert finished(viewer, log) == written
    assert gaps(viewer) == []


@pytest.mark.parametrize("how", ["live", "away"])
def test_a_log_moved_away_and_back_then_copied_and_cut_is_sent_once(how, serve, view, log):
    server, viewer = start(serve, view, log)

    with away(server, how):
        written = add(log, "a")
        os.rename(log, f"{log}.1")
        os.rename(f"{log}.1", log)
        shutil.copy(log, f"{log}.1")
        os.truncate(log, 0)
        written += add(log, "b")
        shift(log)
        written += add(log, "c")

    assert finished(viewer, log) == FIRST + written
    assert gaps(viewer) == []


@pytest.mark.parametrize("how", ["away", "polling"])
@pytest.mark.parametrize("name", ["log.1", "aside"])
def test_a_log_copied_and_cut_and_then_renamed_is_sent_whole(name, how, serve, view, log):
    server, viewer = start(serve, view, log, how)

    with server.looking_away():
        written = add(log, "a")
        shutil.copy(log, log.with_name("log.1"))
        os.truncate(log, 0)
        written += add(log, "b")
        if name == "log.1":
            log.with_name("log.1").rename(log.with_name("log.2"))
        log.rename(log.with_name(name))
        last = add(log, "c")
    viewer.wait(last)

    assert viewer.text == FIRST + written + last or (how == "polling" and told(viewer))


@pytest.mark.parametrize("how", ["away", "polling"])
@pytest.mark.parametrize("first", ["log.2", "aside", "deleted"])
def test_a_new_log_copied_and_cut_before_a_look_is_read_from_its_copy(first, how, serve, view, log):
    server, viewer = start(serve, view, log, how)

    with server.looking_away():
        written = add(log, "a")
        log.unlink() if first == "deleted" else log.rename(log.with_name(first))
        written += add(log, "b")
        shutil.copy(log, log.with_name("log.1"))
        os.truncate(log, 0)
        last = add(log, "c")
    viewer.wait(last)

    assert viewer.text == FIRST + written + last or told(viewer)


@pytest.mark.parametrize("how", ["live", "away", "polling"])
@pytest.mark.parametrize("renamed", [True, False], ids=["from a temporary name", "from the log"])
def test_files_that_are_packed_to_another_name_come_once(renamed, how, serve, view, log):
    server, viewer = start(serve, view, log, how)
    written = FIRST

    for turn in range(4):
        with server.looking_away() if how != "live" and turn % 2 else contextlib.nullcontext():
            for number in (3 * turn, 3 * turn + 1, 3 * turn + 2):
                written += add(log, f"round {number}", 100)
                aside = log
                if renamed:  # as logback does it; else as Python's handler with a rotator
                    aside = log.rename(log.with_name(f"log{number}991.tmp"))
                packed = gzip.compress(aside.read_bytes())
                log.with_name(f"log.2026-11-27_10-00-{10 + number}.gz").write_bytes(packed)
                aside.unlink()
            written += add(log, f"turn {turn}")
        viewer.wait(f"turn {turn}: entry 9 ")

    assert finished(viewer, log) == written
    assert gaps(viewer) == []


@pytest.mark.parametrize("packed", [True, False], ids=["packed", "plain"])
@pytest.mark.parametrize("removed", [True, False], ids=["removed", "cut"])
@pytest.mark.parametrize("history", ["ac|eac|eac|e", "ac|eaceac|e", "a|ce|ac|e|ace|", "aceac|eace"])
def test_a_copy_of_what_nobody_has_read_yet_comes_once(history, removed, packed, serve, view, log):
    """It is appended to, copied, and ended (removed or cut); at each `|` the server looks."""
    server, viewer = start(serve, view, log, "live")
    written, last = FIRST, "entry"
    numbers = itertools.count(10)

    for steps in history.split("|"):
        with server.looking_away():
            for step in steps:
                if step == "a":
                    last = f"round {next(numbers)}: entry 99 "
                    written += add(log, last.partition(":")[0], 100)
                elif step == "e" and removed:
                    log.unlink()
                elif step == "e":
                    os.truncate(log, 0)
                else:
                    copy = log.with_name(f"log.2026-11-27_10-00-{last[6:8]}{'.gz' * packed}")
                    data = log.read_bytes()
                    copy.write_bytes(gzip.compress(data) if packed else data)
        if log.exists() and log.stat().st_size:
            viewer.wait(last)
        time.sleep(0.1)  # so that it looks at a log that is empty or missing, too

    assert finished(viewer, log) == written
    assert gaps(viewer) == []


@pytest.mark.parametrize("how", ["live", "away", "polling"])
def test_a_copy_that_goes_again_before_a_rotation_ends_nothing(how, serve, view, log):
    server, viewer = start(serve, view, log, how)

    with away(server, how):
        written = add(log, "before")
        shutil.copy(log, log.with_name("log.2026-11-27"))
        log.with_name("log.2026-11-27").unlink()
        for number in (1, 2):
            shift(log)
            written += add(log, f"after {number}")
    viewer.wait("after 2: entry 9 ")

    assert finished(viewer, log) == FIRST + written
    assert gaps(viewer) == []


@pytest.mark.parametrize("how", ["away", "polling"])
@pytest.mark.parametrize("names", ["log.2026-11-27.{}", "log-{:02}-aside"])
def test_a_hard_link_that_leads_to_one_file_after_another_is_a_rotation(
    names, how, serve, view, log
):
    append(log.with_name(names.format(10)), FIRST)
    os.link(log.with_name(names.format(10)), log)
    prefix = NO_INOTIFY if how == "polling" else ()
    server = serve(log, "--initial", 131072, "--interval", 0.3, prefix=prefix)
    viewer, written = view(server, json=True).wait(FIRST), FIRST

    with server.looking_away():
        for number in (11, 12, 13):  # rotatelogs -L
            written += add(log, f"before {number}")
            append(log.with_name(names.format(number)), "")
            log.unlink()
            os.link(log.with_name(names.format(number)), log)
            written += add(log, f"after {number}")
    viewer.wait("after 13: entry 9 ")

    whole = finished(viewer, log) == written and gaps(viewer) == []
    assert whole or ("aside" in names and gaps(viewer))


@pytest.mark.parametrize("how", ["away", "polling"])
@pytest.mark.parametrize("names", ["log.{}.txt", "other-{}"])
def test_a_link_that_leads_to_one_file_after_another_is_a_rotation(names, how, serve, view, log):
    append(log.with_name(names.format(10)), FIRST)
    log.symlink_to(log.with_name(names.format(10)))
    prefix = NO_INOTIFY if how == "polling" else ()
    server = serve(log, "--initial", 131072, "--interval", 0.3, prefix=prefix)
    viewer, written = view(server, json=True).wait(FIRST), FIRST

    with server.looking_away():
        for number in (11, 12, 13):  # pino-roll, cronolog
            written += add(log, f"before {number}")
            log.unlink()
            log.symlink_to(log.with_name(names.format(number)))
            written += add(log, f"after {number}")
    viewer.wait("after 13: entry 9 ")

    came = finished(viewer, log)
    assert came == written or (once(came, written) and gaps(viewer))


def make_room(log):
    """log.1 becomes log.2 and so on; the log stays."""
    for number, packed in itertools.product(range(9, 0, -1), ("", ".gz")):
        with contextlib.suppress(FileNotFoundError):
            os.rename(f"{log}.{number}{packed}", f"{log}.{number + 1}{packed}")


def renamed(log):
    make_room(log)
    log.rename(f"{log}.1")


def renamed_and_packed(log):
    renamed(log)
    pack(Path(f"{log}.1"))


def renamed_twice(log):
    """With an empty file in between."""
    renamed(log)
    log.touch()
    renamed(log)


def renamed_to_what_nobody_knows(log):
    log.rename(log.with_name(f"aside {time.monotonic()}"))


def linked_and_removed(log):
    make_room(log)
    os.link(log, f"{log}.1")
    log.unlink()


def copied_and_cut(log):
    make_room(log)
    shutil.copy(log, f"{log}.1")
    os.truncate(log, 0)


EVENTS = [
    *(renamed, renamed_and_packed, renamed_twice, linked_and_removed, copied_and_cut),
    renamed_to_what_nobody_knows,
]


@pytest.mark.parametrize("how", ["away", "polling"])
def test_any_two_things_in_one_look_lose_and_repeat_nothing(how, serve, view, tmp_path):
    log = tmp_path / "logs" / "log"
    log.parent.mkdir()
    prefix = NO_INOTIFY if how == "polling" else ()
    server = serve(log, "--initial", 131072, "--interval", 0.3, prefix=prefix)
    witness, wrong = view(server, json=True), {}

    pairs = list(itertools.product(EVENTS, EVENTS))
    if how == "polling":  # nobody can know of a file that has no name that tells
        pairs = [pair for pair in pairs if renamed_to_what_nobody_knows not in pair]
    for number, (one, two) in enumerate(pairs):
        for path in log.parent.iterdir():
            path.unlink()
        first = append(log, lines(20, 1000 * number)).decode()
        witness.wait(first)
        viewer = view(server, json=True).wait(first)
        with server.looking_away():
            written = add(log, f"{number} a")
            one(log)
            written += add(log, f"{number} b")
            two(log)
            written += add(log, f"{number} c")
        came = finished(viewer, log)
        if came != first + written or gaps(viewer):
            wrong[one.__name__, two.__name__] = viewer.reasons()
        viewer.close()

    assert not wrong


# listed names, over a restart and without file events


NAMES = {
    "number": ["log.2", "log.1"],
    "dates": ["log-20261126", "log-20261127"],
    "dates with dots": ["log.2026-11-26", "log.2026-11-27"],
    "date and index": ["log.2026-11-27.9", "log.2026-11-27.10"],
    "date, dash, index": ["log-20261127-9", "log-20261127-10"],
    "seconds": ["log-1795808000", "log-1795808001"],
    "times": ["log.2026-11-27T09:59:59", "log.2026-11-27T10:00:00"],
}
BEFORE_EXTENSION = {
    "number before the extension": ["app.2.log", "app.1.log"],
    "date before the extension": ["app-2026-11-26.log", "app-2026-11-27.log"],
    "time before the extension": [
        "app-2026-11-26T10-00-00.000.log",
        "app-2026-11-26T10-00-01.000.log",
    ],
    "date and index before the extension": ["app-2026-11-27-9.log", "app-2026-11-27-10.log"],
}


def rotated_to(log, names, packed):
    """The older file under the first name, the newer one under the second."""
    written = add(log, "a")
    for name, tag in zip(names, "bc", strict=True):
        path = log.with_name(name)
        log.rename(path)
        written += add(log, tag)
        if packed:
            Path(f"{path}{packed}").write_bytes(PACKERS[packed](path.read_bytes()))
            path.unlink()
    return written


# each name, plain and packed; and each way to pack
NAMED = [(name, packed) for name in (NAMES | BEFORE_EXTENSION) for packed in ("", ".gz")]
NAMED += [("number", packed) for packed in PACKERS if packed not in ("", ".gz")]


@pytest.mark.parametrize(("name", "packed"), NAMED)
def test_a_restart_goes_on_through_rotated_files_named(name, packed, serve, view, tmp_path):
    names = (NAMES | BEFORE_EXTENSION)[name]
    log = tmp_path / ("app.log" if names[0].startswith("app") else "log")
    server, viewer = start(serve, view, log)
    viewer.close()
    server.stop()

    written = rotated_to(log, names, packed)
    resumed = view(serve(log), json=True, since=viewer.cursor).wait(lambda it: it.frames)

    assert finished(resumed, log) == written
    assert (resumed.frames[0]["resumed"], gaps(resumed)) == (True, [])


@pytest.mark.parametrize("packed", PACKERS)
@pytest.mark.parametrize("name", ["number", "date and index", "time before the extension"])
def test_without_file_events_listed_names_tell_what_lay_between(
    name, packed, serve, view, tmp_path
):
    names = (NAMES | BEFORE_EXTENSION)[name]
    log = tmp_path / ("app.log" if names[0].startswith("app") else "log")
    server, viewer = start(serve, view, log, "polling")

    with server.looking_away():
        written = rotated_to(log, names, packed)

    assert finished(viewer, log) == FIRST + written
    assert gaps(viewer) == []


@pytest.mark.parametrize("how", ["away", "polling"])
def test_packed_files_that_are_a_little_older_than_the_last_line_are_no_old_copies(
    how, serve, view, log
):
    server, viewer = start(serve, view, log, how)
    written = FIRST

    with server.looking_away():
        for number in range(3):
            written += add(log, f"rotation {number}")
            seen = log.stat().st_mtime_ns
            shift(log)
            written += append(Path(f"{log}.1"), f"told late {number}\n").decode()
            pack(Path(f"{log}.1"))
            os.utime(f"{log}.1.gz", ns=(seen - 5_000_000,) * 2)
        written += add(log, "last")

    assert finished(viewer, log) == written
    assert gaps(viewer) == []


def test_names_against_times_after_a_restart_are_a_told_gap(serve, view, log):
    server, viewer = start(serve, view, log)
    viewer.close()
    server.stop()

    written = ""
    for number in (1, 2, 3):  # a larger number should be older
        written += add(log, f"rotation {number}")
        log.rename(f"{log}.{number}")
        time.sleep(0.05)
    written += add(log, "last")
    resumed = view(serve(log), json=True, since=viewer.cursor).wait("last: entry 9 ")

    assert once(resumed.text, written)
    assert resumed.text == written or told(resumed)


@pytest.mark.parametrize("how", ["live", "polling"])
@pytest.mark.parametrize("packed", [".gz", ".xz"])
def test_files_that_are_packed_while_the_log_is_empty_do_not_come_again(
    packed, how, serve, view, log
):
    server, viewer = start(serve, view, log, how)
    written = FIRST

    for number in range(5):
        shift(log)
        log.touch()
        viewer.wait(lambda it, number=number: len(it.reasons()) == number + 1)
        if number:
            path = Path(f"{log}.2")
            Path(f"{path}{packed}").write_bytes(PACKERS[packed](path.read_bytes()))
            path.unlink()
        time.sleep(0.7)  # at least one look at the empty log
        written += add(log, f"round {number}")
        viewer.wait(f"round {number}: entry 9 ")

    assert viewer.joined() == written
    assert (viewer.reasons(), gaps(viewer)) == (["rotated"] * 5, [])


def test_a_cursor_of_nothing_is_followed_by_all_that_was_sent_since(serve, view, log):
    server = serve(log, "--interval", 0.3)
    witness = view(server, json=True).wait(lambda it: it.frames)
    early = view(server, json=True).wait(lambda it: it.frames)
    early.close()

    written = add(log, "a")
    witness.wait(written)
    for tag in "bc":
        log.rename(log.with_name(f"aside {tag}"))
        written += add(log, tag)
        witness.wait(written)
    resumed = view(server, json=True, since=early.cursor).wait("c: entry 9 ")

    assert resumed.wait(lambda it: it.text.endswith("\n")).text == written
    assert resumed.frames[0]["resumed"] and gaps(resumed) == []


UNKNOWN = {
    "zst": ["zstd", "-q", "--rm"],
    "lz4": ["lz4", "-q", "--rm", "-m"],
    "Z": ["compress", "-f"],
    "zip": ["zip", "-q", "-m", "log.1.zip"],
}


@pytest.mark.parametrize("how", ["live", "away", "polling"])
@pytest.mark.parametrize("extension", UNKNOWN)
def test_what_is_packed_in_an_unknown_way_is_a_told_gap_and_no_text(
    extension, how, serve, view, log
):
    command = UNKNOWN[extension]
    if not shutil.which(command[0]):
        pytest.skip(f"{command[0]} is not installed")
    server, viewer = start(serve, view, log, how)
    written = FIRST

    for turn in range(2):
        with away(server, "away" if turn else how):
            for number in range(3):
                written += add(log, f"turn {turn}, {number}", 100)
                for older in range(9, 0, -1):
                    with contextlib.suppress(FileNotFoundError):
                        old, new = (f"{log}.{n}.{extension}" for n in (older, older + 1))
                        os.rename(old, new)
                log.rename(f"{log}.1")
                log.touch()
                subprocess.run([*command, "log.1"], cwd=log.parent, check=True)
            written += add(log, f"turn {turn} last")
        viewer.wait(f"turn {turn} last: entry 9 ")

    came = finished(viewer, log)
    assert once(came, written)
    assert came == written or gaps(viewer)


# a piece of the chain is missing


def broken(path):
    """A packed file that is cut short."""
    pack(path)
    with open(f"{path}.gz", "r+b") as file:
        file.truncate(Path(f"{path}.gz").stat().st_size // 2)


def packed_unknown(path):
    path.rename(f"{path}.zst")


def unreadable(path):
    path.chmod(0)


def too_large(path):
    pack(path)
    with gzip.open(f"{path}.gz", "ab", compresslevel=1) as packed:
        for _ in range(1040):
            packed.write(bytes(2**20))


MISSING = [
    broken,
    packed_unknown,
    unreadable,
    Path.unlink,
    pytest.param(too_large, marks=pytest.mark.slow),
]


def chain(log, tags="bcd"):
    """Three rotations; what lies in each file but the first of them, oldest first."""
    written = [add(log, "a", 3)]
    for tag in tags:
        shift(log)
        written.append(add(log, tag, 3))
    return written


@pytest.mark.parametrize("spoil", MISSING)
def test_a_file_missing_in_the_chain_is_told_where_it_is_missing(spoil, serve, view, log):
    server, viewer = start(serve, view, log)
    viewer.close()
    server.stop()

    rest, lost, kept, last = chain(log)
    written_s = os.stat(f"{log}.2").st_mtime
    spoil(Path(f"{log}.2"))
    if spoil is too_large:
        os.utime(f"{log}.2.gz", (written_s, written_s))
    resumed = view(serve(log, prefix=NO_OVERRIDE), json=True, since=viewer.cursor).wait(last, 60)

    assert (
        resumed.frames[0]["resumed"]
        and resumed.text == rest + kept + last
        and lost not in resumed.text
    )
    behind = [frame for frame in resumed.frames if frame["type"] == "generation"]
    assert [bool(frame["gap"]) for frame in behind] == [True, False]


def test_no_room_to_unpack_is_a_told_gap(serve, view, log):
    server, viewer = start(serve, view, log)
    viewer.close()
    server.stop()

    rest, lost, kept, last = chain(log)
    append(Path(f"{log}.2"), lines(2000, 500))
    pack(Path(f"{log}.2"))
    server = serve(log, prefix=("prlimit", "--fsize=16384"))
    resumed = view(server, json=True, since=viewer.cursor).wait(last)

    assert resumed.text == rest + kept + last and len(gaps(resumed)) == 1


@pytest.mark.parametrize("how", ["away", "polling"])
@pytest.mark.parametrize("spoil", [broken, packed_unknown, unreadable, Path.unlink])
def test_a_file_missing_between_two_looks_is_told(spoil, how, serve, view, log):
    prefix = (*(NO_INOTIFY if how == "polling" else ()), *NO_OVERRIDE)
    server, viewer = start(serve, view, log, prefix=prefix)

    with server.looking_away():
        rest, lost, kept, last = chain(log)
        spoil(Path(f"{log}.2"))
    viewer.wait(last)

    known = how == "away" and spoil in (
        packed_unknown,
        unreadable,
    )  # by its events, and root may open it
    if not (known and lost in viewer.text):
        assert viewer.text == FIRST + rest + kept + last
        assert len(gaps(viewer)) == 1


def test_without_file_events_names_that_nobody_knows_are_a_told_gap(serve, view, log):
    server, viewer = start(serve, view, log, "polling")

    with server.looking_away():
        rest = add(log, "a")
        log.rename(log.with_name("aside 1"))
        add(log, "b")
        log.rename(log.with_name("aside 2"))
        last = add(log, "c")
    viewer.wait(last)

    assert viewer.text == FIRST + rest + last
    assert len(gaps(viewer)) == 1


@pytest.mark.parametrize("how", ["away", "polling"])
def test_a_log_that_was_deleted_twice_between_two_looks_has_a_told_gap(how, serve, view, log):
    server, viewer = start(serve, view, log, how)

    with server.looking_away():
        rest = add(log, "a")
        log.unlink()
        add(log, "b")
        log.unlink()
        last = add(log, "c")
    viewer.wait(last)

    assert viewer.text == FIRST + rest + last
    assert len(gaps(viewer)) == 1


@pytest.mark.parametrize("how", ["away", "polling"])
def test_copied_and_truncated_to_a_name_that_nobody_knows_is_a_told_gap(how, serve, view, log):
    server, viewer = start(serve, view, log, how)

    with server.looking_away():
        copied = add(log, "a", 100)
        shutil.copy(log, log.with_name("aside"))
        os.truncate(log, 0)
        last = add(log, "b")
    viewer.wait(last)

    found = how == "away" and copied in viewer.text  # by the event of the copy
    assert viewer.text == FIRST + (copied if found else "") + last
    assert len(gaps(viewer)) == (0 if found else 1)


def test_a_cursor_older_than_all_that_is_kept_is_refused(serve, view, log):
    server, viewer = start(serve, view, log)
    viewer.close()
    server.stop()

    for number in range(70):
        shift(log) if number < 60 else log.unlink()
        add(log, f"rotation {number}", 1)
    Path(f"{log}.60").unlink(missing_ok=True)
    resumed = view(serve(log), json=True, since=viewer.cursor).wait(lambda it: it.frames)

    assert resumed.frames[0]["resumed"] is False and resumed.frames[0]["reason"]


# a cursor is worth all that was sent


def test_an_empty_log_and_an_empty_rotated_file_do_not_reset_a_cursor(serve, view, log):
    server, viewer = start(serve, view, log)
    for _ in range(2):
        shift(log)
        log.touch()
    viewer.close()
    server.stop()
    server, cursors = serve(log), [viewer.cursor]

    newcomer = view(server, json=True).wait(lambda it: it.frames)
    cursors.append(newcomer.cursor)
    for visit in range(6):
        visitor = view(server, json=True, since=cursors[visit]).wait(lambda it: it.frames)
        assert visitor.frames[0]["resumed"] and visitor.text == ""
        cursors.append(visitor.cursor)
        visitor.close()
    last = view(server, json=True, since=cursors[-1]).wait(lambda it: it.frames)
    added = add(log, "at last")

    assert last.wait(added).text == added and newcomer.wait(added).text == added
    assert gaps(last) == gaps(newcomer) == []


def test_a_log_that_never_appears_does_not_reset_a_cursor(serve, view, log):
    server, viewer = start(serve, view, log)
    log.rename(f"{log}.1")
    viewer.close()
    server.stop()
    server, cursor = serve(log), viewer.cursor

    for _ in range(5):
        visitor = view(server, json=True, since=cursor).wait(lambda it: it.frames)
        assert visitor.frames[0]["resumed"] and visitor.text == ""
        cursor = visitor.cursor
        visitor.close()
    last = view(server, json=True, since=cursor).wait(lambda it: it.frames)
    added = add(log, "at last")

    assert last.wait(added).text == added


@pytest.mark.parametrize("how", ["away", "polling"])
@pytest.mark.parametrize("begun", ["missing", "empty"])
def test_a_log_that_appears_and_is_rotated_before_a_look_is_read_from_its_beginning(
    begun, how, serve, view, log
):
    if begun == "empty":
        log.touch()
    server = serve(log, "--interval", 0.3, prefix=NO_INOTIFY if how == "polling" else ())
    viewer = view(server, json=True).wait(lambda it: it.frames)

    with server.looking_away():
        written = add(log, "a")
        for tag in "bc":
            shift(log)
            written += add(log, tag)
    viewer.wait("c: entry 9 ")

    assert finished(viewer, log) == written
    assert gaps(viewer) == []


@pytest.mark.parametrize("how", ["away", "polling"])
def test_an_empty_log_that_is_copied_and_truncated_before_a_look_is_read_from_the_copy(
    how, serve, view, log
):
    log.touch()
    server = serve(log, "--interval", 0.3, prefix=NO_INOTIFY if how == "polling" else ())
    viewer = view(server, json=True).wait(lambda it: it.frames)

    with server.looking_away():
        written = add(log, "a")
        shutil.copy(log, f"{log}.1")
        os.truncate(log, 0)
        written += add(log, "b")
    viewer.wait("b: entry 9 ")

    assert finished(viewer, log) == written


def test_late_lines_of_an_older_rotated_file_arrive_after_a_restart(serve, view, log):
    server, viewer = start(serve, view, log)
    with open(log, "ab", buffering=0) as old:
        for tag in "ab":
            shift(log)
            viewer.wait(add(log, tag))
        viewer.close()
        server.stop()

        old.write(b"while no server ran\n")
        resumed = view(serve(log), json=True, since=viewer.cursor).wait("while no server ran\n")
        old.write(b"and later\n")
        resumed.wait("and later\n")
        added = add(log, "new")
        resumed.wait(added)

    lines_of = sorted(resumed.text.splitlines())
    assert lines_of == sorted(["while no server ran", "and later", *added.splitlines()])


def test_a_cursor_is_honoured_while_the_folder_changes_at_every_moment(serve, view, log):
    server, viewer = start(serve, view, log)
    viewer.close()
    for name in ("log.30", "log.32"):
        add(log.with_name(name), name, 1)
        os.utime(log.with_name(name), (time.time() - 1_000_000,) * 2)
    over = threading.Event()

    def churn():
        for source, target in itertools.cycle([("log.30", "log.31"), ("log.31", "log.30")]):
            if over.wait(0.002):
                return
            log.with_name(source).rename(log.with_name(target))

    thread = threading.Thread(target=churn)
    thread.start()
    try:
        added = add(log, "a")
        resumed = view(server, json=True, since=viewer.cursor).wait(added, 5)
    finally:
        over.set()
        thread.join()

    assert resumed.frames[0]["resumed"] and resumed.text == added


# names of generations


def test_a_generation_is_named_by_its_first_two_lines_in_every_process(serve, view, tmp_path):
    names = {}
    for folder, second in (("a", "day 1\n"), ("b", "day 2\n"), ("c", "day 1\n")):
        log = tmp_path / folder / "log"
        log.parent.mkdir()
        append(log, f"# the same header\n{second}more in {folder}\n")
        names[folder] = view(serve(log), json=True).wait("more in").frames[0]["generation"]

    assert names["a"] == names["c"] != names["b"]


def test_an_ordinary_rotation_deletion_and_restart_have_no_gap(serve, view, log):
    server, viewer = start(serve, view, log)
    for tag, happen in (("a", shift), ("b", Path.unlink), ("c", shift)):
        happen(log)
        viewer.wait(add(log, tag))
    viewer.close()
    server.stop()

    shift(log)
    added = add(log, "d")
    resumed = view(serve(log), json=True, since=viewer.cursor).wait(added)

    assert [frame["gap"] for frame in viewer.of("generation")] == [None] * 3
    assert [frame["gap"] for frame in resumed.of("generation")] == [None] and resumed.text == added
