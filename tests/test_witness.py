"""The browser as a witness: what was seen before is still there, or it says that it is not."""

import os
from pathlib import Path

from browsers import Page
from page_actions import LINES, SHOWS, Serve, Watch, click, ends_with, numbered, write

ALARM = "(bar => bar.hidden ? '' : bar.textContent)(document.querySelector('#alarm'))"
KEPT = "Object.keys(localStorage).some(key => key.startsWith('seen '))"
PROOF = "document.querySelector('#proof').textContent"


def seen(serve: Serve, log: Path, watch: Watch) -> tuple[Page, str]:
    """A page that has watched the log, and will come back to it."""
    write(log, numbered(0, 400))
    url = serve(log, "--interval", "0.2").url
    page = watch(url)
    ends_with(page, "[2025-12-17T17:40:37Z] entry 399")
    page.wait(KEPT, timeout=25)
    return page, url


def test_what_only_grew_is_unchanged_and_the_new_part_is_divided(
    serve: Serve, log: Path, watch: Watch
) -> None:
    page, url = seen(serve, log, watch)
    page.goto("about:blank")

    write(log, numbered(400, 410))
    page.goto(url)

    page.wait(f"/unchanged since you last looked/.test({PROOF})", timeout=25)
    page.wait("!!document.querySelector('.fresh')")
    first = page.js("document.querySelector('.fresh').nextSibling.textContent")
    assert first == "[2025-12-17T17:40:37Z] entry 400"
    assert page.js(ALARM) == ""


def test_an_edit_while_nobody_looked_is_red_and_stays(
    serve: Serve, log: Path, watch: Watch
) -> None:
    log.write_text("")
    page, url = seen(serve, log, watch)
    page.goto("about:blank")

    with open(log, "r+b") as file:
        file.seek(5000)
        file.write(b"X")
    page.goto(url)

    page.wait(f"{SHOWS} === 'altered'", timeout=25)
    page.goto(url)
    page.wait(f"{SHOWS} === 'altered'")
    click(page, "Dismiss")
    page.wait(f"{SHOWS} === 'live'")


def test_a_rotation_is_no_alarm_and_a_lost_old_file_none_either(
    serve: Serve, log: Path, watch: Watch
) -> None:
    page, url = seen(serve, log, watch)
    page.goto("about:blank")

    os.rename(log, f"{log}.1")
    write(log, [f"[2025-12-18T17:40:37Z] later {number}" for number in range(20)])
    page.goto(url)
    page.wait(f"/unchanged since you last looked/.test({PROOF})", timeout=25)
    assert page.js(ALARM) == ""
    page.wait(f"{LINES}.length > 20")


def test_a_first_visit_claims_nothing(serve: Serve, log: Path, watch: Watch) -> None:
    write(log, numbered(0, 20))
    page = watch(serve(log).url)
    page.wait(f"{LINES}.length === 20")

    page.wait(KEPT, timeout=25)

    assert "since you last looked" not in page.js(PROOF) and page.js(ALARM) == ""
