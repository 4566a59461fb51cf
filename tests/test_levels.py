"""Levels: what stands out, what the chips count and filter, what e and E go to."""

from pathlib import Path

import pytest
from browsers import Page
from page_actions import (
    COUNT,
    HERE,
    LINES,
    TEXTS,
    TOLD,
    Serve,
    Watch,
    click,
    entries,
    frames,
    search,
    shows,
    write,
)

# line -> the level that its writer means
LEVELS = {
    "[2025-12-17T17:40:37Z] ERROR disk gone": "error",
    "\x1b[1;31mERROR\x1b[0m disk gone": "error",
    "2025-12-17 17:40:37 \x1b[33mWARN\x1b[0m low": "warning",
    "java.lang.OutOfMemoryError: heap": "error",
    "ValueError: bad payload": "error",
    "java.lang.IllegalStateException: no": "error",
    "INFO done, 0 errors": "info",
    '{"level":"info","msg":"no error","errors":0}': "info",
    '{"level":"info","error":null}': "info",
    '{"level":"error","msg":"gone"}': "error",
    '{"level":50,"msg":"pino"}': "error",
    "time=2025-12-17T17:40:37Z level=warning msg=low": "warning",
    "W1217 17:40:37.123456 1 klog.go:1] low": "warning",
    "[2025-12-17T17:40:37Z] Auto-repair: Created database": "",
    "It says: no terrors here": "",
    "DEBUG nothing": "debug",
}


def levels(page: Page) -> dict[str, str]:
    shown = page.js(f"{LINES}.map(line => [line.textContent, line.dataset.level || ''])")
    return {text: level for text, level in shown}


@pytest.fixture
def page(serve: Serve, log: Path, watch: Watch) -> Page:
    write(log, list(LEVELS))
    page = watch(serve(log).url)
    page.wait(f"{LINES}.length === {len(LEVELS)}")
    return page


def test_a_line_has_the_level_that_its_writer_means(page: Page) -> None:
    wanted = {
        text.replace("\x1b[1;31m", "").replace("\x1b[33m", "").replace("\x1b[0m", ""): level
        for text, level in LEVELS.items()
    }

    assert levels(page) == wanted


def test_only_the_level_word_and_the_bar_are_coloured(page: Page) -> None:
    line = "document.querySelector('.line[data-level=error]')"
    colour = f"getComputedStyle({line}).color"
    plain = "getComputedStyle(document.querySelector('.line:not([data-level])')).color"

    assert page.js(colour) == page.js(plain)
    assert page.js(f"{line}.querySelector('.level-error').textContent") == "ERROR"
    assert page.js(f"getComputedStyle({line}).borderLeftColor") != page.js(plain)


def test_the_chips_count_what_is_in_the_log_and_what_arrives_and_filter_it(
    page: Page, log: Path
) -> None:
    errors = sum(level == "error" for level in LEVELS.values())
    page.wait("/^errors \\d+$/.test(document.querySelector('#errors').textContent)")

    write(log, ["[2025-12-17T17:40:37Z] ERROR one more", "[2025-12-17T17:40:37Z] INFO nothing"])
    page.wait(f"{LINES}.length === {len(LEVELS) + 2}")
    counted = int(page.js("document.querySelector('#errors').textContent").split()[1])
    click(page, "errors")

    own = f"{LINES}.filter(line => !line.classList.contains('rest'))"  # not the entry that a trace belongs to
    page.wait(
        f"{own}.length === {errors + 1} && {own}.every(line => line.dataset.level === 'error')"
    )
    assert page.js("document.querySelector('#errors').getAttribute('aria-pressed')") == "true"
    assert abs(counted - errors - 1) <= 1
    page.wait("/level=error/.test(location.hash)")
    click(page, "errors")
    page.wait(f"{LINES}.length === {len(LEVELS) + 2}")


def test_what_came_while_the_server_was_away_is_counted_too(
    serve: Serve, log: Path, watch: Watch
) -> None:
    written = write(log, entries("ERROR disk gone", "INFO fine"))
    server = serve(log)
    page = watch(server.url, trouble=True)
    search(page, "disk")
    page.wait("document.querySelector('#errors').textContent === 'errors 1'")
    page.wait(f"/^1 match/.test({COUNT})")

    server.stop()
    written += write(log, entries("ERROR disk gone again", "WARN disk low"))
    serve(log, port=server.port)

    page.wait("document.querySelector('#errors').textContent === 'errors 2'")
    page.wait("document.querySelector('#warnings').textContent === 'warnings 1'")
    page.wait(f"/^3 matches/.test({COUNT})")
    shows(page, [line for line in written if "disk" in line])


def test_a_stack_trace_stays_with_its_entry_under_a_filter(
    serve: Serve, log: Path, watch: Watch
) -> None:
    trace = [
        "Traceback (most recent call last):",
        '  File "a.py", line 3, in f',
        "ValueError: bad payload",
    ]
    before, failed, after = entries("INFO fine", "ERROR job 7 failed", "INFO fine again")
    write(log, [before, failed, *trace, after])
    page = watch(serve(log).url)
    page.wait(f"{LINES}.length === 6")

    search(page, '"job 7"')
    shows(page, [failed, *trace])
    assert set(levels(page).values()) == {"error"}
    assert page.js(f"{LINES}.map(line => line.classList.contains('rest'))") == [
        False,
        True,
        True,
        True,
    ]
    search(page, "payload")

    shows(page, [failed, *trace])


def test_what_a_search_finds_far_up_keeps_its_stack_trace_too(
    serve: Serve, log: Path, watch: Watch
) -> None:
    trace = ["Traceback (most recent call last):", '  File "a.py", line 3', "ValueError: payload 9"]
    quiet = [f"[2025-12-17T17:40:37Z] INFO nothing happened {number}" for number in range(20_000)]
    first, second = entries("ERROR job 7 failed", "ERROR job 8 failed")
    write(log, [*quiet, first, *trace, *quiet, second, *quiet])
    page = watch(serve(log).url)
    page.wait(f"{LINES}.length > 50")

    search(page, '"job "')
    shows(page, [first, *trace, second])
    search(page, "payload")
    shows(page, [first, *trace])
    rest = f"{LINES}.map(line => line.classList.contains('rest'))"
    page.wait(f"JSON.stringify({rest}) === '[true,true,true,false]'")
    search(page, "job !8")
    shows(page, [first, *trace])


def test_e_goes_to_errors_and_not_to_lines_that_only_have_the_word(page: Page) -> None:
    page.press("Home")
    frames(page)
    seen = []
    for _ in range(4):
        page.press("e")
        frames(page, 4)
        seen.append(page.js(HERE))

    texts = page.js(TEXTS)
    severe = [text for text in texts if levels(page)[text] in ("error", "warning")]
    assert seen == severe[:4]
    page.press("E")
    page.wait(f"{HERE} === {severe[2]!r}")
    page.press("E", "E")
    page.wait(f"{HERE} === {severe[0]!r}")
    page.press("E")
    page.wait(f"/no earlier one/.test({TOLD})")
