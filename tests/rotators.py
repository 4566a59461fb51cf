"""Real programs write and rotate a log, three viewers look on: each line comes once, or is told.

python3 tests/rotators.py [--only NAME …] [--way kill|stop|blind …] [--jobs N] [--tools FOLDER]

The ways: `kill` kills the server and starts it again; `stop` stops it for some seconds, so that
several rotations fall between two looks; `blind` gives it no file events. Viewer A stays connected,
B leaves and returns with its cursor, C is plain. Programs from PyPI and npm are installed into a
temporary folder, unless --tools names one to keep. What cannot be had is skipped, with a word.
"""

import argparse
import bz2
import concurrent.futures
import contextlib
import gzip
import json
import lzma
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from harness import NO_INOTIFY, Server, Viewer, eventually, free_port
from rotating_programs import JARS, SETUPS, WRITERS, Place, SetUp, have
from websockets.exceptions import WebSocketException

PYPI = ["concurrent-log-handler", "loguru"]
NPM = [
    "winston",
    "winston-daily-rotate-file",
    "pino",
    "pino-roll",
    "rotating-file-stream",
    "log4js",
]
WAYS = ("kill", "stop", "blind")
LASTS = {"kill": 10.0, "stop": 8.0, "blind": 11.0}  # seconds of writing
PACE = 200  # times a second, 2 lines each
NEAR = 60  # lines: between which neighbours a gap has to be told
AT_THE_CUT = 150  # lines that copytruncate may lose at a time
UNREACHABLE = (OSError, EOFError, WebSocketException)
LINE = re.compile(r"^line (\d{7}) .*END\r?$", re.MULTILINE)


def line(number: int) -> bytes:
    return b"line %07d %b END\n" % (number, b"0123456789" * 3 + b"abcdefghi"[: number % 10])


# the programs


class Writing:
    """The writer, fed with numbered lines, and the rotations beside it."""

    def __init__(self, setup: SetUp, place: Place) -> None:
        self.setup, self.place, self.count = setup, place, 0
        self.over = threading.Event()
        if setup.prepare:
            setup.prepare(place)
        self.writers = [self.writer() for _ in range(setup.writers)]
        self.threads = [threading.Thread(target=self.feed), threading.Thread(target=self.rotate)]
        for thread in self.threads:
            thread.start()

    def writer(self) -> subprocess.Popen[bytes]:
        paths = str(self.place.tools / "pip")
        command = ["env", f"PYTHONPATH={paths}", *map(str, self.setup.writer(self.place))]
        options: dict[str, Any] = {
            "stdin": subprocess.PIPE,
            "stdout": subprocess.DEVNULL,
            "bufsize": 0,
        }
        with open(self.place.folder / "writer", "ab") as errors:
            return subprocess.Popen(command, stderr=errors, cwd=self.place.logs, **options)

    def feed(self) -> None:
        begun = time.monotonic()
        turn = 0
        while not self.over.wait(max(0, begun + turn / PACE - time.monotonic())):
            turn += 1
            pipe = self.writers[turn % len(self.writers)].stdin
            assert pipe
            with contextlib.suppress(BrokenPipeError):
                pipe.write(b"".join(line(self.count + number) for number in range(2)))
            self.count += 2

    def rotate(self) -> None:
        begun = time.monotonic()
        while self.setup.rotate and not self.over.wait(max(0, begun + 1 - time.monotonic())):
            begun = time.monotonic()
            self.setup.rotate(self.place)

    def end(self) -> None:
        self.over.set()
        for thread in self.threads:
            thread.join()
        for writer in self.writers:
            assert writer.stdin
            writer.stdin.close()
        for process in self.writers:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(5)
            process.kill()
            process.wait()
        time.sleep(0.3 if self.place.helpers else 0)
        for process in self.place.helpers:
            process.terminate()
            process.wait()


def on_disk(place: Place) -> set[int]:
    """The numbers of the lines that lie in any file."""
    numbers: set[int] = set()
    for path in place.folder.rglob("*"):
        if path.is_file():
            numbers.update(map(int, LINE.findall(unpacked(path).decode(errors="replace"))))
    return numbers


def unpacked(path: Path) -> bytes:
    if path.suffix == ".zst":
        return subprocess.run(["zstd", "-dcq", path], stdout=subprocess.PIPE, check=True).stdout
    opener: Any = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}.get(path.suffix, open)
    try:
        with opener(path, "rb") as file:
            return bytes(file.read())
    except (OSError, EOFError):
        return path.read_bytes()


# the viewers


class Visitor:
    """A JSON viewer through all its connections, each with the cursor of the one before."""

    def __init__(self, visit_s: float | None) -> None:
        self.visit_s = visit_s
        self.visits: list[list[dict[str, Any]]] = []
        self.cursor: str | None = None
        self.tries = 0  # with a cursor that is ahead
        self.viewer: Viewer | None = None
        self.opened = 0.0

    def look(self, server: Server) -> None:
        """One step of its life: connect, or leave when it is time."""
        if self.viewer is None:
            self.connect(server)
        elif self.viewer.over or self.ahead(self.viewer.frames) or self.is_due():
            self.leave()

    def is_due(self) -> bool:
        return self.visit_s is not None and time.monotonic() - self.opened > self.visit_s

    def connect(self, server: Server) -> None:
        with contextlib.suppress(*UNREACHABLE):
            self.viewer = Viewer(server, json=True, since=self.cursor)
            self.opened = time.monotonic()

    def leave(self) -> None:
        if self.viewer:
            self.viewer.close()
            frames, self.viewer = self.viewer.frames, None
            if self.ahead(frames):
                self.tries += 1
                return
            self.tries = 0
            self.visits.append(frames)
            with contextlib.suppress(StopIteration):
                self.cursor = next(
                    str(frame["cursor"]) for frame in reversed(frames) if "cursor" in frame
                )

    def ahead(self, frames: list[dict[str, Any]]) -> bool:
        """Is it refused as ahead? Like the page, it tries again before it takes that for a gap."""
        return self.tries < 4 and any(frame.get("reason") == "ahead" for frame in frames[:1])

    def frames(self) -> list[dict[str, Any]]:
        visit = self.viewer.frames if self.viewer else []
        return [frame for frames in (*self.visits, visit) for frame in frames]


class Plain:
    """A plain viewer; a new one where the server went."""

    def __init__(self) -> None:
        self.viewers: list[Viewer] = []

    def look(self, server: Server) -> None:
        if not self.viewers or self.viewers[-1].over:
            with contextlib.suppress(*UNREACHABLE):
                self.viewers.append(Viewer(server))

    def frames(self) -> list[str]:
        return list(self.viewers[-1].frames) if self.viewers else []

    def leave(self) -> None:
        for viewer in self.viewers:
            viewer.close()


class Watching(threading.Thread):
    """The viewers' lives, in a thread of their own."""

    def __init__(self, server: Server) -> None:
        super().__init__()
        self.server, self.over = server, threading.Event()
        self.always, self.returning, self.plain = Visitor(None), Visitor(0.3), Plain()

    def run(self) -> None:
        while not self.over.wait(0.05):
            for viewer in (self.always, self.returning, self.plain):
                viewer.look(self.server)

    def end(self) -> None:
        self.over.set()
        self.join()
        for viewer in (self.always, self.returning, self.plain):
            viewer.leave()


# what came, judged


class Came(NamedTuple):
    """The lines that one viewer got, and what it was told."""

    places: dict[int, int]  # of each line, when it came first
    repeated: int
    told: dict[int, str]  # when it was told that something is missing, and how
    seams: list[int]  # a cut or a rewrite was told, or a hole


def came(frames: list[dict[str, Any]]) -> Came:
    places: dict[int, int] = {}
    repeated, told, seams = 0, dict[int, str](), []
    rest: dict[str, str] = {}
    for at, frame in enumerate(frames):
        refused = frame["type"] == "snapshot" and not frame["resumed"]
        if (refused and frame["reason"]) or frame.get("gap"):
            told[at] = str(frame.get("gap") or f"refused: {frame['reason']}")
        if frame["type"] == "skip" or frame.get("reason") in ("truncated", "rewritten"):
            seams.append(at)
        if "text" in frame:
            name = frame["generation"]
            text = ("" if refused else rest.get(name, "")) + frame["text"]
            whole = text.rfind("\n") + 1
            rest[name] = text[whole:]
            for number in map(int, LINE.findall(text[:whole].replace("\0", ""))):
                repeated += number in places and not refused
                places.setdefault(number, at)
    return Came(places, repeated, told, seams)


def runs(numbers: list[int]) -> Iterator[tuple[int, int]]:
    """The stretches of numbers that follow each other."""
    first = last = None
    for number in numbers:
        if first is None or last is None or number != last + 1:
            if first is not None and last is not None:
                yield first, last
            first = number
        last = number
    if first is not None and last is not None:
        yield first, last


def around(places: dict[int, int], first: int, last: int) -> tuple[int, int]:
    """Between which frames these lines would have come."""
    before = [places[number] for number in range(first - NEAR, first) if number in places]
    after = [places[number] for number in range(last + 1, last + NEAR) if number in places]
    return min([*before, *after], default=0), max([*before, *after, *([] if after else [1 << 60])])


def judge(setup: SetUp, way: str, got: Came, count: int, disk: set[int]) -> dict[str, int]:
    """How many lines are missing, told or not, on disk or gone; how many came twice.

    Before the first look that found a line nothing is known of a log. Without file events and with
    rotated files that lie elsewhere nobody can find out that there was one by then.
    """
    kinds = "lost|lost on disk|told|told on disk|at the cut|before the first look|repeated|false"
    found = dict.fromkeys(kinds.split("|"), 0)
    elsewhere = not setup.listed and (setup.cuts or not setup.renames)
    unknowable = way == "blind" and elsewhere
    found["repeated"] = got.repeated
    missing = list(runs([number for number in range(count) if number not in got.places]))
    gaps = [around(got.places, *run) for run in missing]
    for (first, last), (low, high) in zip(missing, gaps, strict=True):
        there = sum(number in disk for number in range(first, last + 1))
        gone = last + 1 - first - there
        told = any(low <= at <= high for at in got.told)
        if setup.cuts and not told and not (there and setup.listed) and there + gone <= AT_THE_CUT:
            found["at the cut"] += there + gone
            continue
        if unknowable and not told and last < min(got.places, default=0):
            found["before the first look"] += there + gone
            continue
        found["told" if told else "lost"] += gone
        found["told on disk" if told else "lost on disk"] += there
    found["false"] = len(false_gaps(got, count))
    return found


def false_gaps(got: Came, count: int) -> list[str]:
    """What was told where no line is missing."""
    missing = runs([number for number in range(count) if number not in got.places])
    gaps = [around(got.places, *run) for run in missing]
    told = got.told.items()
    return [words for at, words in told if not any(low <= at <= high for low, high in gaps)]


def verdict(setup: SetUp, way: str, found: dict[str, int]) -> str:
    """`ok …` or what is wrong, in words."""
    words = [f"{found[kind]} {kind}" for kind in found if found[kind]]
    wrong = found["lost"] + found["lost on disk"] + found["repeated"]
    if setup.listed or (setup.renames and way == "stop"):
        sure = setup.keeps and not setup.cuts
        wrong += found["told on disk"] + (found["told"] + found["false"] if sure else 0)
    if not words:
        return "exact"
    return ("WRONG: " if wrong and setup.followed else "ok: ") + ", ".join(words)


# one run


def settled(watching: Watching, count: int, seconds: float) -> None:
    """Until everybody has the last line, or nothing comes any more."""
    deadline, last = time.monotonic() + seconds, b"%07d" % (count - 1)
    watching.returning.visit_s = None
    seen: tuple[int, ...] = ()
    quiet = time.monotonic()
    while time.monotonic() < deadline:
        if not watching.always.viewer and not watching.over.is_set():
            deadline = max(deadline, time.monotonic() + 3)  # a busy machine: it has yet to start
            time.sleep(0.1)
            continue
        sizes = tuple(
            len(viewer.frames()) for viewer in (watching.always, watching.returning, watching.plain)
        )
        if sizes != seen:
            seen, quiet = sizes, time.monotonic()
        ended = time.monotonic() - quiet
        if ended > 0.8 and all(
            last.decode() in str(it.frames()[-4:]) for it in (watching.always, watching.returning)
        ):
            return
        time.sleep(0.1)


def mishap(server: Server, way: str, start: Any) -> Server:
    """What happens in the middle of a run; the server that runs from then on."""
    if way == "kill":
        server.kill()
        time.sleep(1.4)
        return start()
    if way == "stop":
        with server.looking_away():
            time.sleep(2.6)
    return server


def play(setup: SetUp, way: str, folder: Path, tools: Path) -> dict[str, str]:
    """One set-up in one way: a verdict on each viewer, and on the server."""
    place = Place(folder, folder / setup.log, tools)
    place.logs.mkdir()
    port, servers = free_port(), tempfile.mkdtemp(dir=folder)
    prefix = NO_INOTIFY if way == "blind" else ()

    def start() -> Server:
        options: dict[str, Any] = {"folder": Path(servers), "port": port, "prefix": prefix}
        for _ in range(3):  # a busy machine
            with contextlib.suppress(AssertionError):
                return Server(place.log, "--rate-limit", 0, dev=False, **options)
        raise AssertionError("the server does not start")

    server = start()
    watching = Watching(server)
    watching.start()
    eventually(
        lambda: watching.always.frames() and watching.returning.frames() and watching.plain.viewers
    )
    writing = Writing(setup, place)
    begun, lasts = time.monotonic(), LASTS[way]
    time.sleep(lasts * 0.45)
    server = watching.server = mishap(server, way, start)
    time.sleep(max(0, begun + lasts - time.monotonic()))
    writing.end()
    settled(watching, writing.count, 9)
    disk = on_disk(place)
    watching.end()
    results = results_of(setup, way, watching, writing.count, disk)
    with contextlib.suppress(AssertionError):
        server.stop(within=20)
        server.check()
        return results
    return results | {"server": f"WRONG: {server.errors()[-500:]}"}


def described(setup: SetUp, way: str, got: Came, count: int, disk: set[int]) -> str:
    """The verdict, and which lines are missing."""
    words = verdict(setup, way, judge(setup, way, got, count, disk))
    missing = runs([number for number in range(count) if number not in got.places])
    spans = [f"{first}-{last}" for first, last in missing]
    words += "".join(f" [{told}]" for told in sorted(set(got.told.values())))
    some = " ".join(spans[:4]) + (" …" if len(spans) > 4 else "")
    return words + (f" ({some} of {count})" if spans else "")


def results_of(
    setup: SetUp, way: str, watching: Watching, count: int, disk: set[int]
) -> dict[str, str]:
    results = {}
    got = came(watching.always.frames())
    count = max(disk | got.places.keys(), default=-1) + 1  # what was never written is not lost
    if len(disk) < count // 3 and setup.keeps:
        results["rig"] = f"WRONG: only {len(disk)} of {count} lines are on disk"
    for name, viewer in (("A", watching.always), ("B", watching.returning)):
        results[name] = described(setup, way, came(viewer.frames()), count, disk)
    results["C"] = plain_verdict(setup, watching.plain, got)
    return results


def plain_verdict(setup: SetUp, plain: Plain, other: Came) -> str:
    """A plain viewer gets what A gets, from its first line on."""
    lost = repeated = 0
    for at, viewer in enumerate(plain.viewers):
        numbers = list(map(int, LINE.findall(viewer.text.replace("\0", ""))))
        repeated += len(numbers) - len(set(numbers))
        first = numbers[0] + (NEAR if setup.writers > 1 else 0) if at and numbers else 0
        known = range(first, max(numbers, default=0))
        lost += sum(number in other.places for number in set(known) - set(numbers))
    words = ([f"{lost} lost"] if lost else []) + ([f"{repeated} repeated"] if repeated else [])
    return ("WRONG: " if setup.followed else "ok: ") + ", ".join(words) if words else "exact"


# all runs


def install(tools: Path) -> None:
    """What pip, npm and javac bring; what they cannot bring, the set-ups will miss."""
    tools.mkdir(parents=True, exist_ok=True)
    commands = {
        "pip": [sys.executable, "-m", "pip", "install", "-q", "--target", tools / "pip", *PYPI]
    }
    commands["npm"] = [
        "npm",
        "install",
        "--silent",
        "--no-audit",
        "--no-fund",
        "--prefix",
        tools / "npm",
        *NPM,
    ]
    jars = f"{JARS}/slf4j-api.jar:{JARS}/log4j-api.jar"
    commands["java"] = ["javac", "-cp", jars, "-d", tools / "java", WRITERS / "Writer.java"]
    for name, command in commands.items():
        if not (tools / name).exists() and shutil.which(str(command[0])):
            subprocess.run(
                command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, timeout=300
            )


def run_one(name: str, way: str, tools: Path) -> dict[str, str]:
    """In a process of its own."""
    command = [sys.executable, __file__, "--single", name, way, str(tools)]
    options: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, start_new_session=True, **options) as process:
        try:
            said, errors = process.communicate(timeout=120)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            return {"rig": "WRONG: it never ended"}
    if process.returncode:
        return {"rig": f"WRONG: {errors.strip().splitlines()[-1]}"}
    return dict(json.loads(said))


def single(name: str, way: str, tools: Path) -> int:
    with tempfile.TemporaryDirectory() as folder:
        print(json.dumps(play(SETUPS[name], way, Path(folder), tools)))
    return 0


def report(name: str, way: str, results: dict[str, str]) -> bool:
    """One row; is anything wrong in it?"""
    wrong = any(text.startswith("WRONG") for text in results.values())
    words = (
        sorted(set(results.values()))
        if len(set(results.values())) == 1
        else [f"{k} {v}" for k, v in results.items()]
    )
    print(f"{'!' if wrong else ' '} {name:30} {way:6} {'; '.join(words)}", flush=True)
    return wrong


def run_all(names: list[str], ways: list[str], jobs: int, tools: Path) -> int:
    install(tools)
    missing = {name: have(SETUPS[name], tools) for name in names}
    runs = [(name, way) for name in names if not missing[name] for way in ways]
    wrong = 0
    with concurrent.futures.ThreadPoolExecutor(jobs) as pool:
        for (name, way), results in zip(
            runs, pool.map(lambda run: run_one(*run, tools), runs), strict=True
        ):
            wrong += report(name, way, results)
    for name, need in missing.items():
        if need:
            print(f"- {name:33} skipped: no {need}")
    print(f"{len(runs)} runs, {wrong} wrong, {sum(map(bool, missing.values()))} set-ups skipped")
    return 1 if wrong else 0


def main() -> int:
    if sys.argv[1:2] == ["--single"]:
        return single(sys.argv[2], sys.argv[3], Path(sys.argv[4]))
    parser = argparse.ArgumentParser(description="Drive real programs that rotate a log.")
    parser.add_argument(
        "--only", nargs="+", metavar="NAME", help="set-ups whose name contains one of these"
    )
    parser.add_argument("--way", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--jobs", type=int, default=4)
    parser.add_argument("--tools", type=Path, help="a folder that keeps what pip and npm brought")
    parser.add_argument("--list", action="store_true")
    options = parser.parse_args()
    names = [
        name for name in SETUPS if not options.only or any(part in name for part in options.only)
    ]
    if options.list:
        print("\n".join(names))
        return 0
    with tempfile.TemporaryDirectory() as folder:
        return run_all(names, options.way, options.jobs, options.tools or Path(folder))


if __name__ == "__main__":
    sys.exit(main())
