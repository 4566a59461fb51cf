"""A day in twenty minutes: rotations, viewers that come and go, what the server holds meanwhile.

python3 tests/soak.py [--minutes 20] [--keep 20] [--every 2]

300 lines a second; every two seconds a rotation to a numbered file, packed later. Viewer A stays, B
returns with its cursor, C is plain, a fresh one comes every 5 s, one reads 6 kB/s and one lags and
leaves. At the end: was each line sent once, and the figures of memory, descriptors and processor.
"""

import argparse
import contextlib
import os
import sys
import tempfile
import threading
import time
from pathlib import Path

from harness import Server, Viewer, append, pack
from rotators import Plain, Visitor, around, came, line, runs
from websockets.exceptions import WebSocketException

PACE = 100  # times a second, 3 lines each


class Log(threading.Thread):
    """Lines, and a rotation every so many seconds."""

    def __init__(self, log: Path, keep: int, every_s: float) -> None:
        super().__init__()
        self.log, self.keep, self.every_s = log, keep, every_s
        self.count = self.rotations = 0
        self.over = threading.Event()

    def run(self) -> None:
        begun, turn = time.monotonic(), 0
        rotated = begun
        while not self.over.wait(max(0, begun + turn / PACE - time.monotonic())):
            turn += 1
            append(self.log, b"".join(line(self.count + number) for number in range(3)))
            self.count += 3
            if time.monotonic() - rotated > self.every_s:
                rotated = time.monotonic()
                self.rotate()

    def rotate(self) -> None:
        """logrotate's order, with delaycompress."""
        self.rotations += 1
        for number in range(self.keep, 0, -1):
            for packed in ("", ".gz"):
                with contextlib.suppress(FileNotFoundError):
                    os.rename(f"{self.log}.{number}{packed}", f"{self.log}.{number + 1}{packed}")
        with contextlib.suppress(FileNotFoundError):
            os.unlink(f"{self.log}.{self.keep + 1}.gz")
        self.log.rename(f"{self.log}.1")
        if Path(f"{self.log}.2").exists():
            pack(Path(f"{self.log}.2"))


def open_files(server: Server) -> tuple[int, int]:
    """All descriptors, and those of files without a name."""
    names = []
    for path in Path(f"/proc/{server.process.pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):
            names.append(os.readlink(path))
    return len(names), sum(name.endswith("(deleted)") for name in names)


class Guests:
    """A fresh viewer every 5 s; one that lags for 10 s and leaves."""

    def __init__(self) -> None:
        self.fresh: list[tuple[float, Viewer]] = []
        self.lagging: tuple[float, Viewer] | None = None
        self.next_s, self.count = 0.0, 0

    def look(self, server: Server) -> None:
        now_s = time.monotonic()
        for begun_s, viewer in self.fresh[:]:
            if now_s - begun_s > 3:
                viewer.close()
                self.fresh.remove((begun_s, viewer))
        if now_s > self.next_s:
            self.next_s, self.count = now_s + 5, self.count + 1
            self.fresh.append((now_s, Viewer(server, json=True)))
        if self.lagging and now_s - self.lagging[0] > 10:
            self.lagging[1].close()
            self.lagging = None
        elif not self.lagging:
            viewer = Viewer(server, json=True, receive_buffer=4096)
            viewer.hold()
            self.lagging = now_s, viewer

    def leave(self) -> None:
        for _, viewer in [*self.fresh, *([self.lagging] if self.lagging else [])]:
            viewer.close()


def figures(server: Server, begun_s: float, log: Log) -> str:
    seconds, (files, deleted) = time.monotonic() - begun_s, open_files(server)
    memory, cpu = server.memory() / 2**20, server.cpu()
    return (
        f"{seconds:6.0f} s: {log.count:7} lines, {log.rotations:4} rotations, {memory:6.1f} MiB, "
        f"{files:4} descriptors ({deleted} of deleted files), processor {cpu:6.1f} s"
    )


def silent(visitor: Visitor, count: int) -> list[str]:
    """What is wrong with what came: lines twice, or lines missing without a word."""
    got = came(visitor.frames())
    missing = runs([number for number in range(count) if number not in got.places])
    spans = [(run, around(got.places, *run)) for run in missing]
    untold = [run for run, (low, high) in spans if not any(low <= at <= high for at in got.told)]
    wrong = [f"{first} to {last} missing" for first, last in untold]
    return wrong + ([f"{got.repeated} repeated"] if got.repeated else [])


def soak(minutes: float, keep: int, every_s: float, folder: Path) -> list[str]:
    """Print the figures as they come. Return what is wrong."""
    (folder / "logs").mkdir()
    log = Log(folder / "logs" / "log", keep, every_s)
    server = Server(log.log, "--rate-limit", 0, folder=folder, dev=False)
    always, returning, plain, guests = Visitor(None), Visitor(0.3), Plain(), Guests()
    slow = Viewer(server, json=True, pace=6000, receive_buffer=4096)
    for viewer in (always, returning, plain):
        viewer.look(server)
    begun_s = printed_s = time.monotonic()
    print(figures(server, begun_s, log), flush=True)
    log.start()

    while time.monotonic() - begun_s < 60 * minutes:
        time.sleep(0.05)
        with contextlib.suppress(OSError, WebSocketException):
            for viewer in (always, returning, plain, guests):
                viewer.look(server)
        if time.monotonic() - printed_s > min(60, 10 * minutes):
            printed_s = time.monotonic()
            print(figures(server, begun_s, log), flush=True)

    log.over.set()
    log.join()
    time.sleep(4)
    returning.leave()
    returning.look(server)
    time.sleep(2)
    print("all have left:")
    wrong = [f"A: {each}" for each in silent(always, log.count)]
    wrong += [f"B: {each}" for each in silent(returning, log.count)]
    for viewer in (always, returning, plain, guests):
        viewer.leave()
    slow.close()
    if minutes >= 5:
        time.sleep(65)
    print(figures(server, begun_s, log), flush=True)
    server.check()
    return wrong


def main() -> int:
    parser = argparse.ArgumentParser(description="Rotations and viewers for a long time.")
    parser.add_argument("--minutes", type=float, default=20)
    parser.add_argument("--keep", type=int, default=20, help="rotated files")
    parser.add_argument("--every", type=float, default=2, help="seconds between rotations")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        wrong = soak(options.minutes, options.keep, options.every, Path(folder))
    print("\n".join(wrong) or "each line once")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
