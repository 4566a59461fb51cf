"""Writes pictures of the page in its main states: python tests/gallery.py FOLDER

Each picture is one state, taken in Chromium from the real server. Without a FOLDER, it writes only the
picture of the README, `tests/page.png`.
"""

import contextlib
import os
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

from browsers import Chromium, ChromiumPage
from harness import Server, append
from page_actions import LINES, SHOWS, click, frames, search

TASKS = (
    "INFO Auto-repair: Created PostgreSQL database quantum",
    "INFO Auto-repair: Restarted Grafana container",
    "INFO Weekly self-heal: Completed – ✅ All checks passed",
    "WARN disk /var is at 91 %",
    "INFO sudo: op1 : TTY=pts/0 ; COMMAND=/usr/bin/systemctl restart nginx",
    "INFO Retrained xgboost model fraud-7 (auc=0.931)",
    "DEBUG heartbeat ok",
    "INFO Auto-repair: Rotated the credentials of service billing",
    "ERROR Auto-repair: database ledger does not answer on port 5432",
)
JSON_LINE = (
    '{"level":"warning","user":"op1","action":"login","source":"10.1.4.7","attempts":3,"ok":true}'
)
TRACE = (
    "Traceback (most recent call last):",
    '  File "/opt/repair/run.py", line 31, in repair',
    "    connect(host)",
    "ConnectionRefusedError: [Errno 111] Connection refused",
)


def entries(count: int, now: datetime) -> str:
    """An uneven day: quiet at night, a burst of errors in the morning."""
    lines, at = [], now - timedelta(hours=20.5)
    for number in range(count):
        at += timedelta(seconds=(number * 7919) % 37 + (900 if number == count // 3 else 0))
        task = TASKS[(number * number + number // 7) % len(TASKS)]
        if count * 0.6 < number < count * 0.63 and number % 2:
            task = TASKS[-1]
        lines.append(f"[{at.isoformat()[:19]}Z] {task}")
        if task == TASKS[-1] and number % 5 == 0:
            lines += TRACE
        if number % 211 == 0:
            lines.append(f"[{at.isoformat()[:19]}Z] {JSON_LINE}")
    return "".join(f"{line}\n" for line in lines)


def unfolded(page: ChromiumPage) -> None:
    search(page, "attempts")
    page.wait("document.querySelector('#count').dataset.total > 0")
    frames(page, 20)
    area = page.js(f"{LINES}.slice(-5)[0].getBoundingClientRect()")
    page.mouse(area["x"] + 10, area["y"] + 8)
    page.wait("!!document.querySelector('.details')")


def filtered(page: ChromiumPage) -> None:
    search(page, "database !xgboost")
    page.wait("document.querySelector('#count').dataset.total > 0")
    page.press("n", "n", "n")


def context(page: ChromiumPage) -> None:
    filtered(page)
    frames(page, 20)
    page.press("Enter")
    page.wait("!document.querySelector('#back').hidden")


def held(page: ChromiumPage) -> None:
    page.press("PageUp", "PageUp")


def no_match(page: ChromiumPage) -> None:
    search(page, "kubernetes OR docker")
    page.wait("!document.querySelector('#empty').hidden")


def ranged(page: ChromiumPage) -> None:
    area = page.js("document.querySelector('#picture').getBoundingClientRect()")
    places = [(area["x"] + share * area["width"], area["y"] + 20) for share in (0.55, 0.6, 0.66)]
    page.drag(*places, pause_s=0.02)
    page.wait("!document.querySelector('#range').hidden")


STATES: dict[str, Callable[[ChromiumPage], None]] = {
    "live": lambda page: None,
    "held": held,
    "filtered": filtered,
    "no-match": no_match,
    "context": context,
    "levels": lambda page: click(page, "errors"),
    "unfolded": unfolded,
    "range": ranged,
    "menu": lambda page: click(page, "Menu"),
    "help": lambda page: page.press("?"),
    "about": lambda page: page.press("i"),
}
SIZES = {"telephone": (360, 640), "4k": (3840, 2160), "zoom-400": (320, 256)}


def picture(page: ChromiumPage, folder: Path, name: str) -> None:
    frames(page, 20)
    time.sleep(0.2)
    (folder / f"{name}.png").write_bytes(page.screenshot())
    print(name)


def opened(
    browser: Chromium, url: str, scheme: str = "dark", size: tuple[int, int] = (1440, 900)
) -> ChromiumPage:
    page = browser.page()
    page.cdp(
        "Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}]
    )
    page.resize(*size)
    page.goto(url)
    page.wait(
        f"{LINES}.length > 8 && /errors \\d/.test(document.querySelector('#errors').textContent)"
    )
    return page


def start(stack: contextlib.ExitStack) -> tuple[Chromium, Server, Path]:
    """A browser, and a server that follows a log of one day."""
    home = Path(stack.enter_context(tempfile.TemporaryDirectory()))
    log = home / "AUTO_REPAIR_AUDIT.log"
    log.write_text(entries(4000, datetime.now(UTC)))
    server = Server(log, "--interval", "0.2", folder=home)
    stack.callback(server.kill)
    browser = Chromium()
    stack.callback(browser.quit)
    return browser, server, log


def for_readme() -> None:
    with contextlib.ExitStack() as stack:
        browser, server, log = start(stack)
        page = opened(browser, server.url, size=(960, 420))
        search(page, "auto-repair !xgboost")
        page.wait("document.querySelector('#count').dataset.total > 0")
        for task in (TASKS[1], TASKS[7], TASKS[0]):
            append(log, f"[{datetime.now(UTC).isoformat()[:19]}Z] {task}\n")
            time.sleep(1)
        picture(page, Path(__file__).parent, "page")


def main(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        browser, server, log = start(stack)
        home = log.parent

        for name, enter in STATES.items():
            page = opened(browser, server.url)
            append(log, f"[{datetime.now(UTC).isoformat()[:19]}Z] {TASKS[0]}\n")
            enter(page)
            picture(page, folder, name)
            page.close()
        for name, size in SIZES.items():
            page = opened(browser, server.url, size=size)
            picture(page, folder, name)
            page.close()
        page = opened(browser, server.url, scheme="light")
        filtered(page)
        picture(page, folder, "light")
        page.close()
        events(browser, server, log, folder)
        strangers(browser, stack, home, folder)


def events(browser: Chromium, server: Server, log: Path, folder: Path) -> None:
    """What happens to a log: rotated, missing, altered; and a server that is gone."""
    page = opened(browser, server.url)
    log.rename(log.with_name(log.name + ".1"))
    log.write_text(entries(12, datetime.now(UTC)))
    page.wait("!!document.querySelector('.seam')")
    picture(page, folder, "seam")

    log.unlink()
    page.wait(f"{SHOWS} === 'missing'")
    picture(page, folder, "missing")

    log.write_text(entries(12, datetime.now(UTC)))
    page.wait(f"{SHOWS} === 'live'")
    with open(log, "r+b") as file:
        file.seek(-80, os.SEEK_END)
        file.write(b"okay okay okay okay!")
    append(log, f"[{datetime.now(UTC).isoformat()[:19]}Z] {TASKS[1]}\n")
    page.wait(f"{SHOWS} === 'altered'")
    picture(page, folder, "altered")
    page.js("document.querySelector('#dismiss').click() || 1")

    server.kill()
    page.wait(f"{SHOWS} === 'reconnecting'")
    picture(page, folder, "reconnecting")
    page.close()


def strangers(browser: Chromium, stack: contextlib.ExitStack, home: Path, folder: Path) -> None:
    """An empty log, and the login form."""
    empty = home / "EMPTY.log"
    empty.touch()
    for name, variables in (
        ("empty", {}),
        ("login", {"AUDIT_STREAM_TOKEN": "a-token-for-a-picture"}),
    ):
        place = home / name
        place.mkdir()
        server = Server(empty, folder=place, env=variables)
        stack.callback(server.kill)
        page = browser.page()
        page.cdp(
            "Emulation.setEmulatedMedia",
            features=[{"name": "prefers-color-scheme", "value": "dark"}],
        )
        page.resize(1440, 900)
        page.goto(f"http://127.0.0.1:{server.port}/")
        frames(page, 30)
        picture(page, folder, name)
        page.close()


if __name__ == "__main__":
    if len(sys.argv) > 2:
        sys.exit(__doc__)
    if len(sys.argv) == 2:
        main(Path(sys.argv[1]))
    else:
        for_readme()
