"""Measure the page in Chromium: python tests/bench_page.py [FOLDER]

With a FOLDER that holds another version of the program, the same is measured of that one in turns.
"""

import contextlib
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import harness
from browsers import Chromium, ChromiumPage
from harness import ROOT, Server, append, lines

MIB = 2**20
# Runs in each page before its own script: when its first line is drawn, its longest task, its frames.
WATCHER = """
window.seen = {first: 0, longest: 0, frames: []};
new PerformanceObserver((list) => {
  for (const task of list.getEntries()) seen.longest = Math.max(seen.longest, task.duration);
}).observe({type: "longtask", buffered: true});
new MutationObserver((_, observer) => {
  if (!document.querySelector("#auditBox .line")) return;
  seen.first = performance.now();
  observer.disconnect();
}).observe(document, {childList: true, subtree: true});
requestAnimationFrame(function look(now) {
  seen.frames.push(now - (seen.last || now));
  seen.last = now;
  requestAnimationFrame(look);
});
"""


@contextlib.contextmanager
def serving(program: Path, log: Path) -> Iterator[Server]:
    harness.SCRIPT = program / "audit_stream.py"
    with tempfile.TemporaryDirectory() as folder:
        server = Server(log, folder=Path(folder), dev=False)
        try:
            yield server
        finally:
            server.stop()


def opened(chromium: Chromium, server: Server) -> ChromiumPage:
    page = chromium.page()
    page.cdp("Page.addScriptToEvaluateOnNewDocument", source=WATCHER)
    page.goto(server.url)
    page.wait("seen.first")
    return page


def opening(chromium: Chromium, program: Path, folder: Path) -> dict[str, float]:
    """Return when the first lines of a log of 1 GiB are there, in ms from the address."""
    log = folder / "large"
    if not log.exists():
        piece = lines(100_000)
        for _ in range(1024 * MIB // len(piece.encode())):
            append(log, piece)
    times = []
    with serving(program, log) as server:
        for _ in range(7):
            page = opened(chromium, server)
            times.append(float(page.js("seen.first")))
            page.close()
    return {"first lines of 1 GiB, median, ms": sorted(times)[3], "the same, most": max(times)}


def burst(chromium: Chromium, program: Path, folder: Path) -> dict[str, float]:
    """Return the longest task while 300,000 lines come at once, in ms, and the heap after it."""
    log = folder / "burst"
    log.write_text(lines(100))
    with serving(program, log) as server:
        page = opened(chromium, server)
        page.wait("document.querySelector('#status').dataset.state === 'live'")
        time.sleep(1)
        page.js("seen.longest = 0")
        append(log, lines(300_000, 100) + "the last line\n")
        page.wait("document.querySelector('#auditBox').textContent.includes('the last line')", 60)
        time.sleep(2)
        longest = float(page.js("seen.longest"))
        page.cdp("HeapProfiler.collectGarbage")
        heap = page.cdp("Runtime.getHeapUsage")["usedSize"]
        page.close()
    return {"longest task in a burst, ms": longest, "heap after it, MiB": heap / MIB}


def stream(chromium: Chromium, program: Path, folder: Path) -> dict[str, float]:
    """Return the 99th percentile of the time between frames at 1,000 lines a second."""
    log = folder / "stream"
    log.write_text(lines(100))
    with serving(program, log) as server:
        page = opened(chromium, server)
        time.sleep(1)
        page.js("seen.frames.length = 0")
        number = 100
        begun = time.monotonic()
        while time.monotonic() < begun + 15:
            append(log, lines(50, number))
            number += 50
            time.sleep(max(0, begun + (number - 100) / 1000 - time.monotonic()))
        frames = sorted(page.js("seen.frames"))
        page.close()
    at = frames[int(0.99 * len(frames))]
    return {"frames at 1,000 lines a second, p99, ms": at, "the same, most": frames[-1]}


def main() -> None:
    programs = [ROOT, *map(Path, sys.argv[1:2])]
    chromium = Chromium()
    measures: list[Callable[[Chromium, Path, Path], dict[str, float]]] = [opening, burst, stream]
    try:
        with tempfile.TemporaryDirectory() as folder:
            for measure in measures:
                results = [measure(chromium, program, Path(folder)) for program in programs]
                for what in results[0]:
                    figures = "".join(f"{result[what]:>10.1f}" for result in results)
                    print(f"{what:<44}{figures}", flush=True)
    finally:
        chromium.quit()


if __name__ == "__main__":
    main()
