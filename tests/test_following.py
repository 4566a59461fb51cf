"""Whatever happens to the file: the text that arrives is the text that was written."""

import contextlib
import gzip
import itertools
import os
import shutil
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest
from harness import (
    FIRST,
    NO_INOTIFY,
    Server,
    Viewer,
    add,
    append,
    copied_and_truncated,
    lines,
    pack,
    rotated,
    rotated_to_dates,
    shift,
    start,
)

MIB = 2**20
NO_OVERRIDE = () if os.getuid() else ("setpriv", "--bounding-set", "-dac_override,-dac_read_search")
CHANGES = []
CUT = "truncated rewritten"  # it cannot be known which


def change(*reasons):
    """Something that happens to the log; returns what a viewer must get of it."""

    def note(function):
        CHANGES.append(pytest.param(function, reasons, id=function.__name__))
        return function

    return note


@change()
def grows(log):
    return add(log, "a") + add(log, "b")


@change("rotated")
def renamed_and_created(log):
    added = add(log, "a")
    log.rename(f"{log}.1")
    return added + add(log, "b")


@change("rotated", "rotated", "rotated")
def rotated_three_times(log):
    return rotated(log, "bcd", count=100)


@change("rotated", "rotated", "rotated")
def rotated_to_all_kinds_of_dates(log):
    return rotated_to_dates(log, "-.-")


@change("rotated", "rotated", "rotated")
def rotated_and_packed_each_time(log):
    added = add(log, "a")
    for tag in "bcd":
        shift(log)
        pack(Path(f"{log}.1"))
        added += add(log, tag)
    return added


@change("rotated", "rotated")
def rotated_and_the_middle_one_empty(log):
    added = add(log, "a")
    shift(log)
    log.touch()
    shift(log)
    return added + add(log, "b")


@change("rotated", "rotated")
def rotated_with_identical_lines(log):
    added = append(log, "same\n" * 1000)
    shift(log)
    added += append(log, "same\n" * 1000)
    shift(log)
    return (added + append(log, "same\n" * 1000)).decode()


@change("rotated")
def deleted_and_recreated_shorter(log):
    log.unlink()
    return add(log, "a", 1)


@change("rotated")
def deleted_and_recreated_equally_long(log):
    log.unlink()
    return append(log, "x" * (len(FIRST.encode()) - 1) + "\n").decode()


@change("rotated")
def deleted_and_recreated_longer(log):
    added = add(log, "a")
    log.unlink()
    return added + add(log, "b", 200)


@change("rotated")
def replaced_by_a_new_file(log):
    new = Path(f"{log}.new")
    added = add(log, "a") + add(new, "b", 200)
    new.replace(log)
    return added


@change("rotated")
def replaced_by_a_copy_while_the_old_one_keeps_a_name(log):
    log.rename(f"{log}.1")
    shutil.copy(f"{log}.1", log)
    return log.read_text() + add(log, "a")


@change()
def replaced_by_an_identical_copy(log):
    shutil.copy(log, f"{log}.new")
    os.replace(f"{log}.new", log)
    return add(log, "a")


@change()
def edited_by_a_copy_with_more_lines(log):
    copy = Path(shutil.copy(log, f"{log}.new"))
    added = add(copy, "a")
    copy.replace(log)
    return added + add(log, "b")


@change("truncated")
def truncated(log):
    os.truncate(log, 0)
    return add(log, "t")


@change(CUT)
def cut_and_continued(log):
    os.truncate(log, FIRST.encode().rfind(b"\n", 0, -1) + 1)
    return add(log, "0")


@change(CUT)
def truncated_and_grown_longer(log):
    os.truncate(log, 0)
    return add(log, "a", 200)


@change(CUT)
def truncated_and_grown_equally_long(log):
    os.truncate(log, 0)
    return append(log, "x" * (len(FIRST.encode()) - 1) + "\n").decode()


@change("rewritten")
def edited_in_place(log):
    with open(log, "r+b") as file:
        file.seek(60)
        file.write(b"####")
    return log.read_bytes().decode() + add(log, "a")  # the line in which the change lies


change("truncated")(copied_and_truncated)


@change(CUT)
def copied_and_truncated_and_grown_longer(log):
    added = add(log, "a")
    shutil.copy(log, f"{log}-20251217")
    os.truncate(log, 0)
    return added + add(log, "b", 300)


@change("truncated", "rotated", "rotated")
def copied_and_truncated_and_renamed_twice(log):
    added = add(log, "a")
    shutil.copy(log, f"{log}.1")
    os.truncate(log, 0)
    for tag in "bc":
        added += add(log, tag)
        shift(log)
    return added + add(log, "d")


@change("truncated rotated", "rotated")
def copied_and_truncated_and_renamed_and_packed(log):
    added = add(log, "a")
    shutil.copy(log, f"{log}.1")
    os.truncate(log, 0)
    added += add(log, "b")
    shift(log)
    pack(Path(f"{log}.1"))
    return added + add(log, "c")


@change("rotated", "rotated")
def rotated_with_packed_copies_beside_the_files(log):
    added = add(log, "a")
    for tag in "bc":
        shift(log)
        added += add(log, tag)
    for number in (1, 2):
        Path(f"{log}.{number}.gz").write_bytes(gzip.compress(Path(f"{log}.{number}").read_bytes()))
    return added


@pytest.fixture(scope="module", params=["live", "away", "polling"])
def followed(request, tmp_path_factory):
    """One server for all changes, for each of three ways to notice them; a viewer of them all."""
    log = tmp_path_factory.mktemp("followed") / "AUTO_REPAIR_AUDIT.log"
    prefix = NO_INOTIFY if request.param == "polling" else ()
    folder = tmp_path_factory.mktemp("server")
    server = Server(log, "--initial", 131072, "--interval", 0.3, folder=folder, prefix=prefix)
    witness = Viewer(server, json=True)
    yield (
        server,
        server.looking_away if request.param == "away" else contextlib.nullcontext,
        witness,
    )
    witness.close()
    server.check()


@pytest.mark.parametrize(("happens", "reasons"), CHANGES)
def test_the_text_is_what_was_written_when_the_log(happens, reasons, followed, view):
    server, meanwhile, witness = followed
    log = server.log
    for path in log.parent.iterdir():
        path.unlink()
    first = append(log, lines(20, start=1000 * len(witness.frames))).decode()
    witness.wait(first)
    viewer = view(server, json=True).wait(first)

    with meanwhile():
        added = happens(log)
    append(log, "marker\n")
    viewer.wait("marker\n")

    assert viewer.joined() == first + added + "marker\n"
    assert len(viewer.reasons()) == len(reasons)
    assert all(
        got in allowed.split() for got, allowed in zip(viewer.reasons(), reasons, strict=True)
    )


def test_a_plain_viewer_gets_the_same_text(serve, view, log):
    append(log, FIRST)
    server = serve(log, "--initial", 131072)
    viewer, expected = view(server).wait(FIRST), FIRST

    for happens in (
        renamed_and_created,
        replaced_by_an_identical_copy,
        truncated,
        deleted_and_recreated_longer,
    ):
        expected += happens(log)
        viewer.wait(expected)

    assert viewer.text == expected


@pytest.mark.parametrize("how", ["live", "polling"])
def test_many_quick_rotations_lose_no_line(how, serve, view, log):
    _, viewer = start(serve, view, log, how)
    written = FIRST

    for number in range(40):
        shift(log)
        written += add(log, f"round {number}")
    append(log, "marker\n")
    viewer.wait("marker\n")

    assert viewer.joined() == written + "marker\n"


def test_a_cut_end_is_not_sent_again(serve, view, log):
    _, viewer = start(serve, view, log)

    os.truncate(log, len(FIRST.encode()) - 20)
    viewer.wait(lambda it: it.reasons())
    added = append(log, "\n").decode() + add(log, "0")
    viewer.wait(added)

    assert viewer.joined() == FIRST + added
    assert [(frame["reason"], frame["start"]) for frame in viewer.of("generation")] == [
        ("truncated", len(FIRST.encode()) - 20)
    ]


def test_an_edit_is_told_and_what_was_sent_before_it_is_not_sent_again(serve, view, log):
    append(log, lines(1000))
    viewer = view(serve(log, "--interval", 0.3), json=True).wait("entry 00000999 ")
    size = log.stat().st_size

    for number, place in enumerate((10, size - 2000), start=1):
        with open(log, "r+b") as file:
            file.seek(place)
            file.write(b"#")
        viewer.wait(lambda it, number=number: len(it.reasons()) == number)
        viewer.wait(lambda it, number=number: it.text.count("entry 00000999 ") == number + 1)
    append(log, "marker\n")
    viewer.wait("marker\n")

    # The last 4 KiB do not tell where the first edit is, but the first 4 KiB are another ones.
    assert [(frame["reason"], frame["start"]) for frame in viewer.of("generation")] == [
        ("rewritten", 0),
        ("rewritten", log.read_bytes().rfind(b"\n", 0, size - 2000) + 1),
    ]


@pytest.mark.parametrize("create", [True, False], ids=["at once", "later"])
def test_late_lines_of_a_renamed_log_arrive_once(create, serve, view, log):
    server, viewer = start(serve, view, log)
    with open(log, "ab", buffering=0) as old:
        log.rename(f"{log}.1")
        if create:
            add(log, "new")
            viewer.wait("new: entry 9 ")
        for number in range(5):
            old.write(f"late {number}\n".encode())
            viewer.wait(f"late {number}\n")
            append(log, f"new {number}\n") if create else None
            time.sleep(0.4)
    append(log, "marker\n")
    viewer.wait("marker\n")

    viewer.joined()
    assert viewer.texts() == [Path(f"{log}.1").read_text(), log.read_text()]
    assert viewer.reasons() == ["rotated"]


@pytest.mark.parametrize("how", ["live", "away"])
def test_a_line_unfinished_at_the_rotation_stays_with_its_file(how, serve, view, log):
    server, viewer = start(serve, view, log)

    with server.looking_away() if how == "away" else contextlib.nullcontext():
        append(log, "unfinished")
        log.rename(f"{log}.1")
        added = add(log, "new")
    viewer.wait("unfinished").wait(added)

    viewer.joined()
    assert viewer.texts() == [FIRST + "unfinished", added]


def test_a_link_to_a_file_that_is_named_like_a_rotated_one_is_read_once(serve, view, log):
    append(Path(f"{log}-20251217"), FIRST)
    log.symlink_to(f"{log}-20251217")
    viewer = view(serve(log, "--initial", 131072), json=True).wait(FIRST)

    added = add(log, "a")
    viewer.wait(added)
    added += add(log, "b")
    viewer.wait(added)

    assert viewer.joined() == FIRST + added


def test_a_rotated_file_that_comes_back_goes_on(serve, view, log):
    server, viewer = start(serve, view, log)
    log.rename(f"{log}.1")
    added = add(log, "b")
    viewer.wait(added)

    Path(f"{log}.1").rename(log)
    for tag in "cd":
        added += add(log, tag)
        viewer.wait(added)
    late = view(server, json=True, since=viewer.cursor)
    last = add(log, "e")

    late.wait(last)
    assert viewer.wait(last).text == FIRST + added + last
    assert late.text == last


def test_a_line_that_was_never_finished_is_not_lost_with_its_file(serve, view, log):
    log.touch()
    viewer = view(serve(log), json=True)
    viewer.wait(lambda it: it.frames)

    append(log, "unfinished")
    log.unlink()
    added = add(log, "a")
    viewer.wait(added)

    assert viewer.text == "unfinished" + added


def test_a_lagging_viewer_gets_what_only_the_copy_has(serve, view, log):
    server, viewer = start(serve, view, log, dev=False)
    slow = view(server, json=True, receive_buffer=4096).wait(lambda it: it.frames)
    slow.hold()
    log.rename(f"{log}.1")
    much = append(log, lines(60_000, 500)).decode()
    viewer.wait(much[-200:])
    late = append(Path(f"{log}.1"), "written late\n").decode()
    viewer.wait(late)

    os.rename(f"{log}.1", f"{log}.2")
    shutil.copy(log, f"{log}.1")
    os.truncate(log, 0)
    slow.release()
    slow.wait(lambda it: "truncated" in it.reasons(), 20)

    assert slow.text.replace(late, "").endswith(much) and not slow.of("skip")


def test_a_viewer_that_comes_before_a_rewrite_is_noticed_gets_all_of_it_once(serve, view, log):
    server, _ = start(serve, view, log, "polling")

    log.write_text(lines(100, 5000))
    viewers = [view(server, json=json) for json in (True, False)]
    last = add(log, "last")

    for viewer in viewers:
        assert viewer.wait(last).text == lines(100, 5000) + last


# the log is not there, or is no log


def test_a_log_that_appears_later_is_shown_from_its_start(serve, view, tmp_path):
    log = tmp_path / "later" / "even later" / "log"
    server = serve(log, "--interval", 0.3)
    viewer = view(server, json=True).wait(lambda it: it.states() == ["missing"])

    log.parent.mkdir(parents=True)
    written = add(log, "a", 100)
    viewer.wait(written)

    assert viewer.text == written
    assert (viewer.states(), viewer.reasons()) == (["missing", "ok"], [])
    assert [frame["type"] for frame in viewer.frames][-2:] == ["state", "append"]


def test_a_missing_log_is_told_and_its_return_is_a_rotation(serve, view, log):
    server, viewer = start(serve, view, log)

    log.rename(f"{log}.1")
    viewer.wait(lambda it: it.states() == ["missing"])
    late = add(Path(f"{log}.1"), "late")
    viewer.wait(late)
    status = server.get("/healthz")[0], server.get("/api/audit")[0]
    newcomer = view(server, json=True).wait(lambda it: it.states() == ["missing"])
    written = add(log, "new")

    assert viewer.wait(written).joined() == FIRST + late + written
    assert (viewer.states(), viewer.reasons(), status) == (
        ["missing", "ok"],
        ["rotated"],
        (503, 503),
    )
    assert newcomer.wait(written).states() == ["missing", "ok"]
    assert server.get("/healthz")[0] == 200


def test_a_rotation_is_no_time_without_a_log(serve, view, log):
    _, viewer = start(serve, view, log)

    for _ in range(5):
        viewer.wait(f"{viewer.text}{renamed_and_created(log)}")

    assert viewer.states() == []


def test_the_folder_may_go_and_come_back(serve, view, tmp_path):
    log = tmp_path / "folder" / "log"
    log.parent.mkdir()
    _, viewer = start(serve, view, log)
    expected = FIRST

    for tag in "abc":
        shutil.rmtree(log.parent)
        log.parent.mkdir()
        expected += add(log, tag)
        viewer.wait(expected)

    assert viewer.joined() == expected
    assert viewer.reasons() == ["rotated"] * 3


OBSTACLES = {
    "directory": os.mkdir,
    "fifo": os.mkfifo,
    "socket": lambda path: os.mknod(path, stat.S_IFSOCK | 0o600),
    "device": lambda path: path.symlink_to("/dev/zero"),
    "loop": lambda path: path.symlink_to(path.name),
    "dangling link": lambda path: path.symlink_to("nowhere"),
}


def test_what_is_no_log_blocks_nothing(serve, view, log, tmp_path):
    server, viewer = start(serve, view, log)
    expected = FIRST

    for name, put in OBSTACLES.items():
        told = len(viewer.states())
        log.rename(f"{log}.1")
        put(log)
        viewer.wait(lambda it, told=told: len(it.states()) > told)
        asked = time.monotonic()
        status, _, body = server.get("/healthz")
        waited = time.monotonic() - asked
        log.rename(tmp_path / f"aside, {name}")
        expected += add(log, name)
        viewer.wait(expected)

        trouble, ok = viewer.of("state")[told:]
        known = {"dangling link": ["missing"], "loop": ["missing", "unreadable"]}
        assert trouble["state"] in known.get(name, ["unreadable"]) and ok["state"] == "ok"
        assert trouble["detail"] and str(tmp_path) not in trouble["detail"] + body.decode()
        assert status == 503 and waited < 1

    assert viewer.joined() == expected


@pytest.mark.parametrize("obstacle", ["directory", "fifo", "loop"])
def test_it_starts_with_what_is_no_log(obstacle, serve, view, log, tmp_path):
    OBSTACLES[obstacle](log)
    server = serve(log, "--interval", 0.3)
    viewer = view(server, json=True).wait(lambda it: it.of("state"))

    log.rename(tmp_path / "aside")
    written = add(log, "new")

    assert viewer.wait(written).text == written
    assert viewer.states()[-1] == "ok"


def test_a_log_that_may_no_longer_be_read_is_read_on(serve, view, log):
    server, viewer = start(serve, view, log, prefix=NO_OVERRIDE)

    log.chmod(0)
    written = add(log, "a")
    viewer.wait(written)
    log.rename(f"{log}.1")
    written += add(log, "b")
    viewer.wait("b: entry 9 ")

    assert viewer.joined() == FIRST + written


def test_a_new_log_that_may_not_be_read_is_read_later(serve, view, log):
    server, viewer = start(serve, view, log, prefix=NO_OVERRIDE)
    new = Path(f"{log}.new")
    written = add(new, "new")
    new.chmod(0)

    log.rename(f"{log}.1")
    new.rename(log)
    viewer.wait(lambda it: it.states() == ["unreadable"])
    written += add(log, "more")
    status = server.get("/healthz")[0]
    log.chmod(0o644)
    viewer.wait(written)

    assert viewer.joined() == FIRST + written
    assert (status, viewer.states(), viewer.reasons()) == (503, ["unreadable", "ok"], ["rotated"])


# links


@pytest.mark.parametrize("how", ["live", "away"])
def test_a_link_is_followed_and_may_turn_to_another_file(how, serve, view, log, tmp_path):
    targets = [tmp_path / name / "target" for name in "abc"]
    for target in targets:
        target.parent.mkdir()
    log.symlink_to(targets[0])
    server, viewer = start(serve, view, log)
    expected = FIRST

    for target in targets[1:]:
        with server.looking_away() if how == "away" else contextlib.nullcontext():
            expected += add(log, f"more before {target.parent.name}") + add(
                target, target.parent.name
            )
            Path(f"{log}.link").symlink_to(target)
            os.replace(f"{log}.link", log)
        viewer.wait(expected)

    assert viewer.joined() == expected
    assert viewer.reasons() == ["rotated", "rotated"]


# holes and room


def check_hole(viewer, expected):
    assert viewer.joined().replace("\0", "") == expected
    assert viewer.text.count("\0") < 16384
    assert viewer.of("skip") and {frame["reason"] for frame in viewer.of("skip")} == {"hole"}


def test_a_hole_is_skipped(serve, view, log):
    server, viewer = start(serve, view, log, dev=False)
    before = server.memory()

    os.truncate(log, len(FIRST.encode()) + 2**31)
    added = append(log, "\n").decode() + add(log, "a")
    viewer.wait(added, seconds=5)

    check_hole(viewer, FIRST + added)
    assert server.peak() - before < 50 * MIB
    assert sum(frame["end"] - frame["start"] for frame in viewer.of("skip")) > 2**31 - 16384


def test_a_writer_that_goes_on_where_it_was_leaves_a_hole(serve, view, log):
    server, viewer = start(serve, view, log)
    with open(log, "r+b", buffering=0) as writer:
        writer.seek(0, os.SEEK_END)
        writer.write(lines(1000, 20).encode())
        viewer.wait("entry 00001019 ").wait(lambda it: it.text.endswith("\n"))

        os.truncate(log, 0)
        writer.write(b"0: after the hole\n")
        viewer.wait("0: after the hole\n")

    check_hole(viewer, lines(1020) + "0: after the hole\n")
    assert viewer.reasons()[0] in CUT.split()


def test_a_huge_log_is_opened_at_its_end(serve, view, log):
    log.touch()
    os.truncate(log, 10 * 2**30)
    append(log, "\n" + FIRST)
    server = serve(log, "--initial", 131072, dev=False)

    asked = time.monotonic()
    viewer = view(server).wait(FIRST)

    assert viewer.times[0] - asked < 1 and viewer.text.lstrip("\0\n") == FIRST
    assert server.peak() < 64 * MIB


@pytest.mark.parametrize("early", [True, False], ids=["before the start", "later"])
def test_room_that_a_writer_took_is_no_log(early, serve, view, log):
    expected = "".join(f"entry {number}\n" for number in range(300))
    with open(log, "wb", buffering=0) as writer:
        if early:
            os.posix_fallocate(writer.fileno(), 0, 2**20)
        viewer = view(serve(log, "--interval", 0.2), json=True).wait(lambda it: it.frames)
        if not early:
            os.posix_fallocate(writer.fileno(), 0, 2**20)
        for line in expected.splitlines(True):
            writer.write(line.encode())
            time.sleep(0.001)
        viewer.wait("entry 299\n")
        os.ftruncate(writer.fileno(), len(expected))
        writer.write(b"marker\n")
        viewer.wait("marker\n")

    assert viewer.joined() == expected + "marker\n"


# slow viewers and files that go


@pytest.mark.parametrize(
    "happens", [renamed_and_created, deleted_and_recreated_longer, rotated_three_times]
)
def test_a_viewer_that_lags_gets_the_rest_of_a_file_that_is_gone(happens, serve, view, log):
    server, quick = start(serve, view, log, dev=False)
    slow = view(server, json=True, receive_buffer=4096).wait(FIRST)
    slow.hold()

    written = append(log, lines(50_000, 20)).decode() + happens(log)
    quick.wait(written[-20:], 20)
    for path in log.parent.glob(f"{log.name}.*"):
        path.unlink()
    slow.release()
    slow.wait(written[-20:], 30)

    assert slow.joined() == quick.joined() == FIRST + written


def test_a_viewer_that_lags_is_told_where_bytes_are_gone(serve, view, log):
    server, quick = start(serve, view, log, dev=False)
    slow = view(server, json=True, receive_buffer=4096).wait(FIRST)
    slow.hold()

    written = FIRST + append(log, lines(50_000, 20)).decode()
    quick.wait("entry 00050019 ")
    os.truncate(log, 0)
    added = add(log, "new")
    quick.wait(added)
    slow.release()
    slow.wait(added, 20)

    got = slow.joined()
    assert set(slow.reasons()) <= set(CUT.split()) and got.endswith(added)
    assert written.startswith(got.removesuffix(added))


@pytest.mark.skipif(not shutil.which("chattr"), reason="no chattr")
def test_an_append_only_log_is_followed(serve, view, log):
    _, viewer = start(serve, view, log)
    if subprocess.run(["chattr", "+a", log], capture_output=True).returncode:
        pytest.skip("chattr +a does not work here")
    try:
        added = add(log, "a")
        viewer.wait(added)
    finally:
        subprocess.run(["chattr", "-a", log], check=True)

    assert viewer.text == FIRST + added


def test_more_events_than_the_kernel_keeps_lose_nothing(serve, view, log):
    server, viewer = start(serve, view, log)
    names = [log.with_name(f"noise {number}") for number in range(2)]

    with server.looking_away():
        for _, name in zip(range(10_000), itertools.cycle(names), strict=False):
            name.touch()
            name.unlink()
        added = renamed_and_created(log)
    viewer.wait(added)

    assert viewer.joined() == FIRST + added


NEIGHBOUR = """
import itertools, os, pathlib, sys
for number in itertools.count():
    path = pathlib.Path(sys.argv[1], f"state.{number}.tmp")
    path.touch()
    path.unlink() if sys.argv[2] == "goes" else path.replace(path.with_name("state"))
    if number == 20_000:
        print("busy", flush=True)
"""


@pytest.mark.parametrize("what", ["goes", "is renamed"])
@pytest.mark.parametrize("happens", [rotated_three_times, copied_and_truncated])
def test_a_busy_neighbour_in_the_folder_delays_no_rotation(what, happens, serve, view, log):
    _, viewer = start(serve, view, log)
    command = [sys.executable, "-c", NEIGHBOUR, log.parent, what]

    with subprocess.Popen(command, stdout=subprocess.PIPE) as neighbour:
        try:
            neighbour.stdout.readline()
            added = happens(log)
            viewer.wait(added)
        finally:
            neighbour.kill()

    assert viewer.joined() == FIRST + added
