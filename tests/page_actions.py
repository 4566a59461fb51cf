"""What the tests of the page share: its names in the DOM, what one does with it, and the browsers."""

import contextlib
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from browsers import Browser, Page
from harness import ROOT, append, eventually, growing_pauses

Serve = Callable[..., Any]
Watch = Callable[..., Page]

SOURCE = ROOT / "static" / "index.html"
LINES = "[...document.querySelectorAll('#auditBox .line')]"
TEXTS = f"{LINES}.map(line => line.textContent)"
RECEIVED = "📡 New audit data received: {} bytes"
LATE = "🔌 WebSocket disconnected - Reconnecting in 5 seconds..."

# What scrolls, and its first line that is in view with the height at which it stands.
SCROLLER = """[...document.querySelectorAll('#auditBox, #auditBox *')].concat(document.scrollingElement)
    .find(box => box.scrollHeight > box.clientHeight + 1 && getComputedStyle(box).overflowY !== 'visible')"""
TOP = "Math.max(0, document.querySelector('#auditBox').getBoundingClientRect().top)"
FIRST = f"""(() => {{
    const line = {LINES}.find(line => line.getBoundingClientRect().bottom > {TOP} + 1);
    return [line.textContent, Math.round(line.getBoundingClientRect().top)];
}})()"""
AT_REST = f"""new Promise(done => {{
    let before = "", frames = 0;
    requestAnimationFrame(function look() {{
        const now = JSON.stringify({FIRST});
        frames = now === before ? frames + 1 : 0;
        before = now;
        frames < 10 ? requestAnimationFrame(look) : done(true);
    }});
}})"""
BUTTONS = (
    "[...document.querySelectorAll('button')].filter(button => button.getClientRects().length)"
)
NEWER = "(button => button.hidden ? '' : button.textContent)(document.querySelector('#newer'))"
NAME = """(thing => thing.getAttribute('aria-label')
    || [...thing.labels || []].map(label => label.textContent).join(' ') || thing.textContent)"""
COUNT = "document.querySelector('#count').textContent"
COVER = "document.querySelector('#above').textContent"
TOLD = "document.querySelector('#told').textContent"
SHOWS = "document.querySelector('#status').dataset.shows"
HERE = "((document.querySelector('#auditBox .here') || 0).textContent)"
BOX = "document.querySelector('#auditBox')"
STATE = "document.querySelector('#status').dataset.state"
CENTRE = "(at => [at.x + at.width / 2, at.y + at.height / 2])({}.getBoundingClientRect())"


def shows(page: Page, expected: list[str], timeout: float = 15) -> None:
    """Exactly these lines, in the end."""
    end, pauses = time.monotonic() + timeout, growing_pauses()
    while (shown := page.js(TEXTS)) != expected and time.monotonic() < end:
        time.sleep(next(pauses))
    assert shown == expected


def ends_with(page: Page, line: str, timeout: float = 15) -> None:
    """The last line, and the last thing that is in view."""
    page.wait(
        f"""(last => last && last.textContent === {line!r} && last.getBoundingClientRect().bottom <= innerHeight
            && last.getBoundingClientRect().top >= {TOP})({LINES}.pop())""",
        timeout,
    )


def frames(page: Page, count: int = 3) -> None:
    page.js(
        f"new Promise(done => (function f(n) {{ n ? requestAnimationFrame(() => f(n - 1)) : done() }})({count}))"
    )


def click(page: Page, name: str) -> None:
    """With the mouse, so that the button must be there to be hit."""
    button = f"{BUTTONS}.find(button => {NAME}(button).includes({name!r}))"
    page.wait(f"!!{button}")
    page.mouse(*page.js(CENTRE.format(button)))


def fill(page: Page, field: str, text: str) -> None:
    """What a paste leaves in the field, which has the focus then."""
    page.js(
        f"""(box => {{
            box.focus();
            box.value = {text!r};
            box.dispatchEvent(new Event('input', {{ bubbles: true }}));
        }})(document.querySelector({field!r}))"""
    )


def search(page: Page, query: str) -> None:
    fill(page, "#searchBox", query)
    page.press("Enter")


def said(page: Page) -> list[str]:
    return [text for _, text in page.console]


def says(page: Page, text: str) -> None:
    """Wait until the console says it."""
    with contextlib.suppress(AssertionError):
        eventually(lambda: text in said(page))
    assert text in said(page)


def entries(*texts: str) -> list[str]:
    return [f"[2025-12-17T17:40:{number % 60:02d}Z] {text}" for number, text in enumerate(texts)]


def write(log: Path, lines: list[str]) -> list[str]:
    append(log, "".join(f"{line}\n" for line in lines))
    return lines


def numbered(start: int, stop: int) -> list[str]:
    return [f"[2025-12-17T17:40:37Z] entry {number}" for number in range(start, stop)]


def watching(browser: Browser) -> Iterator[Watch]:
    """Opens windows that connect; at the end none may have had an error, unless the test expects trouble."""
    pages: list[tuple[Page, bool]] = []

    def open_page(url: str, trouble: bool = False) -> Page:
        page = browser.page()
        pages.append((page, trouble))
        page.resize(1000, 700)
        page.goto(url)
        page.wait(f"{STATE} === 'live'")
        return page

    yield open_page
    for page, _ in pages:
        page.close()
    calm = [page for page, trouble in pages if not trouble]
    assert [
        entry
        for page in calm
        for entry in page.console
        if entry[0] in ("error", "assert", "dialog")
    ] == []
    assert [error for page in calm for error in page.errors] == []


def number_in_view(page: Page) -> int:
    return int(page.js(FIRST)[0].split()[-1])


def scroll_up(page: Page, pixels: int) -> None:
    x, y = page.js(CENTRE.format("document.querySelector('#auditBox')"))
    before = page.js(FIRST)
    page.mouse(x, min(y, 500), -pixels)
    page.wait(f"{FIRST}[0] !== {before[0]!r}")
    page.wait(AT_REST)


def violations(page: Page) -> list[str]:
    return [
        text
        for _, text in page.console
        if re.search("content.security.policy|violates", text, re.IGNORECASE)
    ]


def arrives(page: Page, address: str) -> None:
    """The browser ends at the clean address, connected and without a word about the policy."""
    live = "document.querySelector('#status')?.dataset.state === 'live'"
    ready = f"location.href === {address!r} && {live}"

    def there() -> Any:
        with contextlib.suppress(RuntimeError):  # between two pages there is none to ask
            return page.js(ready)
        return False

    eventually(there, seconds=20)
    assert page.js("getComputedStyle(document.body).margin !== '8px'")  # the styles apply
    assert violations(page) == []
