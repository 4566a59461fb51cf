"""Calls that fail end neither the server nor a viewer; nothing is held longer than needed."""

import contextlib
import errno
import itertools
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
from browsers import unavailable
from faults import Faults, build_shim
from harness import Server, Viewer, add, append, eventually, lines, shift

FIRST = lines(20)
LAG = 36  # seconds: what was rotated is read for 30


@pytest.fixture(scope="session")
def shim(tmp_path_factory):
    """A library that lets system calls fail."""
    return build_shim(tmp_path_factory.mktemp("shim")) or unavailable("cc is not installed")


@pytest.fixture
def log(tmp_path):
    (tmp_path / "logs").mkdir()
    return tmp_path / "logs" / "log"


@pytest.fixture
def faults(serve, log, shim, tmp_path_factory):
    """Faults, and a server that has them, of a log with its first lines."""
    append(log, FIRST)
    faults = Faults(shim, log.parent, tmp_path_factory.mktemp("faults") / "control")
    options = ("--initial", 131072, "--interval", 0.3)
    faults.server = serve(log, *options, env=faults.variables, dev=False)
    return faults


def start(faults, view, log):
    return view(faults.server, json=True).wait(FIRST)


def busy(log, viewer, seconds=2.5):
    """Lines and rotations all the time; what was written."""
    written, deadline, number = "", time.monotonic() + seconds, 0
    while time.monotonic() < deadline:
        number += 1
        written += add(log, f"round {number}", 3)
        if number % 20 == 0:
            shift(log)
        time.sleep(0.02)
    return written


SOMETIMES = {
    "reads": {"reads": 100},
    "short reads": {"short": 300},
    "opens, no more files": {"opens": 100, "because": errno.ENFILE},
    "opens, access": {"opens": 100, "because": errno.EACCES},
    "stats": {"stats": 100, "because": errno.EIO},
    "stats and opens, no such file": {"opens": 100, "stats": 100, "because": errno.ENOENT},
    "all of it": {"reads": 50, "short": 100, "opens": 50, "stats": 50},
}


@pytest.mark.parametrize("what", SOMETIMES.values(), ids=SOMETIMES)
def test_calls_that_fail_now_and_then_lose_nothing(what, faults, view, log):
    viewer = start(faults, view, log)

    faults.happen(**what)
    written = busy(log, viewer)
    faults.nothing()
    written += append(log, "marker\n").decode()
    viewer.wait("marker\n", 15)

    came, wanted = viewer.joined().splitlines(), (FIRST + written).splitlines()
    unread = {frame["gap"] for frame in viewer.of("generation")} - {None}
    assert len(came) == len(set(came)) and set(viewer.reasons()) == {"rotated"}
    assert came == wanted or (unread and set(came) <= set(wanted))


# What happens before the process looks, and while it stands still at one of the calls of that look:
# the log is a(ppended to), c(opied), e(mptied), u(nlinked), r(enamed).
SLOW = pytest.mark.slow
ROTATIONS = [
    ("aca", "ceacecea"),
    ("ra", "cerarace"),
    pytest.param("rara", "aracacerar", marks=SLOW),
    pytest.param("acua", "accu", marks=SLOW),
    pytest.param("ara", "acecer", marks=SLOW),
    pytest.param("acecea", "ceacecea", marks=SLOW),
]
MOMENTS = 60  # that many calls of a look are intercepted


@pytest.mark.parametrize("before, meanwhile", ROTATIONS)
def test_a_rotation_at_any_moment_of_a_look_loses_nothing(before, meanwhile, faults, view, log):
    viewer, written = start(faults, view, log), FIRST
    numbers = itertools.count(100)
    stopped = 0

    def step(kind):
        number = next(numbers)
        rotated = log.with_name(f"log.2026-11-27_10-{number // 60:02}-{number % 60:02}")
        if kind == "a":
            return add(log, f"step {number}", 3)
        elif kind == "c":
            shutil.copy(log, rotated)
        elif kind == "e":
            os.truncate(log, 0)
        elif kind == "u":
            log.unlink()
        elif log.exists():
            log.rename(rotated)
        return ""

    for moment in range(1, MOMENTS):
        with faults.server.looking_away():
            written += "".join(map(step, before))
            faults.happen(stop_at=moment)
        with contextlib.suppress(AssertionError):
            eventually(faults.server.is_stopped, 0.5)
            stopped += 1
        written += "".join(map(step, meanwhile))
        faults.nothing()
        faults.server.process.send_signal(signal.SIGCONT)
        last = step("a")
        written += last
        viewer.wait(last)

    assert stopped > MOMENTS / 2
    assert viewer.joined() == written
    assert not any(frame["gap"] for frame in viewer.of("generation"))


def test_short_reads_are_neither_the_end_of_the_file_nor_a_rewrite(faults, view, log):
    viewer = start(faults, view, log)

    faults.happen(short=500)
    written = append(log, lines(20_000, 20)).decode()
    viewer.wait("entry 00020019 ", 20).wait(lambda it: it.text.endswith("\n"))

    assert viewer.joined() == FIRST + written
    assert viewer.reasons() == []


@pytest.mark.parametrize("error", [errno.EIO, errno.ESTALE])
def test_reads_that_all_fail_for_a_while_are_told_and_pass(error, faults, view, log):
    viewer = start(faults, view, log)

    faults.happen(reads=1000, of=error)
    written = add(log, "meanwhile")
    viewer.wait(lambda it: it.states()[-1:] == ["unreadable"])
    detail = viewer.of("state")[-1]["detail"]
    faults.nothing()
    viewer.wait(written)

    assert viewer.states()[-2:] == ["unreadable", "ok"] and detail
    assert viewer.joined() == FIRST + written and viewer.reasons() == []


def test_a_viewer_that_comes_while_reads_fail_is_told_and_gets_its_bytes(faults, view, log):
    witness = start(faults, view, log)
    cursor = witness.cursor

    faults.happen(reads=1000)
    added = add(log, "a")
    witness.wait(lambda it: it.states()[-1:] == ["unreadable"])
    new = view(faults.server, json=True)
    returning = view(faults.server, json=True, since=cursor)
    plain = view(faults.server)
    for viewer in (new, returning):
        viewer.wait(lambda it: "unreadable" in it.states())
    faults.nothing()
    more = add(log, "b")

    for viewer in (new, returning, plain):
        viewer.wait(more)
    assert returning.text == added + more and returning.of("snapshot")[0]["resumed"]
    assert new.text.endswith(added + more) and plain.text.endswith(added + more)


def test_a_viewer_that_catches_up_while_reads_fail_is_told_and_gets_the_rest(faults, view, log):
    server = faults.server
    slow = view(server, json=True, receive_buffer=4096).wait(FIRST)
    quick = view(server, json=True).wait(FIRST)
    slow.hold()
    written = append(log, lines(60_000, 20)).decode()
    quick.wait("entry 00060019 ", 20)

    faults.happen(reads=1000)
    slow.release()
    slow.wait(lambda it: "unreadable" in it.states(), 15)
    faults.nothing()
    slow.wait(lambda it: it.text.endswith(written[-200:]), 20)

    assert slow.joined() == FIRST + written


def test_a_lack_of_descriptors_lets_no_file_go_that_is_still_read(faults, view, log):
    viewer = start(faults, view, log)
    log.unlink()
    written = add(log, "a")
    viewer.wait(written)

    faults.happen(opens=1000, because=errno.ENFILE)
    log.rename(f"{log}.1")
    written += add(log, "b")
    viewer.wait(lambda it: it.states() == ["unreadable"])
    faults.nothing()
    viewer.wait(written)

    assert viewer.joined() == FIRST + written and viewer.states() == ["unreadable", "ok"]


def test_an_unreadable_log_with_viewers_leaves_the_other_answers_alive(faults, view, log):
    viewer = start(faults, view, log)

    faults.happen(reads=1000, stats=1000)
    viewer.wait(lambda it: "unreadable" in it.states() or "missing" in it.states())
    statuses = [faults.server.get(path)[0] for path in ("/healthz", "/metrics", "/")]
    faults.nothing()
    eventually(lambda: faults.server.get("/healthz")[0] == 200)

    assert statuses == [503, 200, 200]


# file systems


@pytest.fixture
def mounted(tmp_path):
    """A folder, and the same behind a mount that goes by paths, as sshfs does."""
    if os.getuid() or not os.path.exists("/dev/fuse"):
        pytest.skip("a mount of FUSE needs root and a kernel that has it")
    if not shutil.which("bindfs"):
        unavailable("bindfs is not installed")
    inside, outside = tmp_path / "inside", tmp_path / "outside"
    inside.mkdir()
    outside.mkdir()
    process = subprocess.Popen(
        ["bindfs", "-f", "-o", "direct_io", outside, inside], stderr=subprocess.PIPE
    )
    try:
        eventually(lambda: os.path.ismount(inside) or process.poll() is not None)
        if process.poll() is not None:
            pytest.skip("bindfs cannot mount here")
        yield inside, outside, process
    finally:
        subprocess.run(["umount", "-l", inside], capture_output=True)
        process.kill()
        process.communicate()


def test_a_rotation_behind_a_path_based_mount_is_seen(mounted, serve, view):
    inside, outside, _ = mounted
    log = outside / "log"
    append(log, FIRST)
    viewer = view(serve(inside / "log", "--interval", 0.3), json=True).wait("entry 00000019 ")

    written = ""
    for tag in "abc":
        log.rename(f"{log}.1") if tag != "a" else None
        written += add(log, tag)
        viewer.wait(f"{tag}: entry 9 ", 8)

    assert viewer.wait(lambda it: it.text.endswith("\n")).text.endswith(written)


def test_a_file_system_that_dies_does_not_end_the_server(mounted, serve, view):
    inside, outside, process = mounted
    append(outside / "log", FIRST)
    server = serve(inside / "log", "--interval", 0.3)
    viewer = view(server, json=True).wait("entry 00000019 ")

    process.kill()
    viewer.wait(lambda it: "unreadable" in it.states())
    time.sleep(11)  # what is told every 10 s goes by the file too
    newcomer = view(server, json=True).wait(lambda it: "unreadable" in it.states())

    assert server.process.poll() is None and not viewer.over and not newcomer.over
    assert server.get("/healthz")[0] == 503


# what is held


def deleted_files(server):
    """Open files that have no name any more."""
    found = []
    for path in Path(f"/proc/{server.process.pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):
            found.append(os.readlink(path))
    return [path for path in found if path.endswith("(deleted)")]


class Later:
    """What is looked at only after LAG seconds, all at once."""

    def __init__(self, folder):
        self.folder, self.stack = folder, contextlib.ExitStack()

    def serve(self, name):
        (self.folder / name).mkdir()
        (self.folder / f"{name}-server").mkdir()
        log = self.folder / name / "log"
        append(log, FIRST)
        options = ("--initial", 131072, "--interval", 0.3)
        server = Server(log, *options, folder=self.folder / f"{name}-server", dev=False)
        self.stack.callback(server.check)
        return server, log

    def view(self, server, **options):
        viewer = Viewer(server, json=True, **options)
        self.stack.callback(viewer.close)
        return viewer.wait(FIRST)


def lagging_and_gone(later):
    """A viewer that lags over eight deleted files, and leaves."""
    server, log = later.serve("lagging")
    quick, slow = later.view(server), later.view(server, receive_buffer=4096)
    slow.hold()
    quick.wait(append(log, lines(30_000, 20)).decode()[-60:], 20)
    for number in range(8):
        log.unlink()
        quick.wait(add(log, f"round {number}"))
    slow.close()
    return server


def turned_back(later):
    """A link that was turned to a newer file, which is then the log for long."""
    server, log = later.serve("turned")
    old = log.rename(log.with_name("old"))
    log.symlink_to(old)
    viewer = later.view(server)
    written = FIRST + append(old, "to the old one\n").decode()
    viewer.wait(written)
    new = log.with_name("new")
    written += append(new, "to the new one\n").decode()
    log.with_name("link").symlink_to(new)
    log.with_name("link").replace(log)
    viewer.wait(written)
    return viewer, log, old, written


def written_on(later):
    """A rotated file that grows all the time, beside a log that does not."""
    server, log = later.serve("late")
    viewer = later.view(server)
    log.rename(f"{log}.1")
    log.touch()
    viewer.wait(lambda it: it.reasons() == ["rotated"])
    return viewer, log


@pytest.fixture(scope="module")
def later(tmp_path_factory):
    later = Later(tmp_path_factory.mktemp("later"))
    with later.stack:
        later.server = lagging_and_gone(later)
        later.turned, (later.grown, log) = turned_back(later), written_on(later)
        later.late, deadline = "", time.monotonic() + LAG
        while time.monotonic() < deadline:
            later.late += append(Path(f"{log}.1"), f"late line {len(later.late)}\n").decode()
            time.sleep(1)
        yield later


def test_a_lagging_viewer_that_left_keeps_no_file_open(later):
    eventually(lambda: not deleted_files(later.server), 60 - LAG, "deleted files are still open")


def test_a_link_that_is_turned_back_much_later_sends_nothing_again(later):
    viewer, log, old, written = later.turned

    log.with_name("link").symlink_to(old)
    log.with_name("link").replace(log)
    added = append(old, "to the old one again\n").decode()
    viewer.wait(added)

    assert viewer.text == written + added


def test_a_rotated_file_is_read_as_long_as_it_grows_and_that_is_told(later):
    viewer = later.grown.wait(lambda it: it.text.endswith(later.late), 5)

    assert viewer.joined() == FIRST + later.late
    assert [frame["state"] for frame in viewer.of("state") if frame["detail"]][:1] == ["ok"]


@pytest.mark.slow
def test_a_viewer_that_lags_keeps_no_file_that_others_need_for_more_than_a_minute(serve, view, log):
    append(log, FIRST)
    server = serve(
        log,
        "--initial",
        131072,
        "--interval",
        0.3,
        dev=False,
        prefix=("prlimit", "--nofile=100:100"),
    )
    quick, slow = (
        view(server, json=True).wait(FIRST),
        view(server, json=True, pace=2000, receive_buffer=4096),
    )
    slow.wait(FIRST)
    written = append(log, lines(50_000, 20)).decode()
    quick.wait(written[-60:], 20)

    for number in range(120):
        log.unlink()
        written += add(log, f"round {number}", 3)
        quick.wait(f"round {number}: entry 2", 75)  # else it may be gone before anybody looked

    assert quick.joined() == FIRST + written
    eventually(lambda: len(deleted_files(server)) < 20, 75)


# the unusual


def test_a_log_that_has_no_name_left_is_told(serve, view, log):
    file = os.open(log, os.O_RDWR | os.O_CREAT | os.O_APPEND)
    os.write(file, FIRST.encode())
    log.unlink()
    log.symlink_to(f"/proc/{os.getpid()}/fd/{file}")
    try:
        viewer = view(serve(log, "--initial", 131072, "--interval", 0.3), json=True).wait(FIRST)
        state = viewer.wait(lambda it: it.of("state")).of("state")[0]
        os.write(file, b"more\n")
        viewer.wait("more\n")
    finally:
        os.close(file)

    assert state["state"] == "ok" and state["detail"]


@pytest.mark.parametrize(
    ("encoding", "word"),
    [("utf-16", "UTF-16"), ("latin-1", "not UTF-8"), ("cp1251", "not UTF-8"), ("gbk", "not UTF-8")],
)
def test_a_log_that_is_not_utf_8_is_told(encoding, word, serve, view, log):
    text = {
        "latin-1": "Prüfung läuft: Größe geändert\n",
        "cp1251": "Проверка базы данных\n",
        "gbk": "数据库检查完成\n",
    }
    log.write_bytes((text.get(encoding, "entry\n") * 50).encode(encoding))
    viewer = view(serve(log, "--interval", 0.3), json=True)

    state = viewer.wait(lambda it: it.of("state")).of("state")[0]

    assert state["state"] == "ok"
    assert ("UTF-16" if encoding == "utf-16" else "not UTF-8") in state["detail"]
