"""The page as its reader has it: in real browsers, by its stable names, against the real server."""

import os
import re
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from browsers import WEBKITS, Browser, ChromiumPage, Page, unavailable
from harness import append, eventually, free_port
from page_actions import (
    AT_REST,
    BUTTONS,
    COUNT,
    FIRST,
    LATE,
    LINES,
    NAME,
    NEWER,
    RECEIVED,
    SCROLLER,
    SHOWS,
    SOURCE,
    STATE,
    TEXTS,
    TOP,
    Serve,
    Watch,
    click,
    ends_with,
    entries,
    frames,
    number_in_view,
    numbered,
    said,
    says,
    scroll_up,
    search,
    shows,
    watching,
    write,
)

# -- the log as it grows ---------------------------------------------------------------------------


def test_the_page_connects_by_itself_and_shows_the_end_of_the_log(
    serve: Serve, log: Path, watch: Watch
) -> None:
    written = write(log, numbered(0, 5000))
    server = serve(log)

    page = watch(server.url)

    ends_with(page, written[-1])
    page.wait(f"{LINES}.length > 60")  # the first frame has 1,000 bytes: less than 30 lines
    shown = page.js(TEXTS)
    assert shown == written[-len(shown) :]
    assert log.name in page.js("document.body.innerText")
    offset = sum(len(line) + 1 for line in written[: -len(shown)])
    assert page.js(f"Number({LINES}[0].dataset.offset)") == offset


FIRST_LINE = """
window.drawnAt = new Promise((done) => new MutationObserver(() => {
  if (document.querySelector("#auditBox .line")) done(performance.now());
}).observe(document, {childList: true, subtree: true}));
"""
ASKED = """performance.getEntriesByType("resource")
  .filter(({name}) => /api.(counts|timeline|files)/.test(name)).map(({startTime}) => startTime)"""


def test_nothing_else_is_asked_before_the_first_lines_are_drawn(
    serve: Serve, log: Path, watch: Watch
) -> None:
    write(log, numbered(0, 5000))
    server = serve(log)
    page = watch(server.url)
    if not isinstance(page, ChromiumPage):
        pytest.skip("only Chromium is told what to run before the page")
    page.cdp("Page.addScriptToEvaluateOnNewDocument", source=FIRST_LINE)

    page.goto(server.url)

    page.wait(f"{ASKED}.length >= 2")
    assert page.js(f"drawnAt.then(at => {ASKED}.every(time => time > at))")


def test_appended_entries_appear_at_the_end(serve: Serve, log: Path, watch: Watch) -> None:
    written = write(
        log,
        entries(
            "Created PostgreSQL database quantum", "Weekly self-heal: Completed – ✅ All passed"
        ),
    )
    page = watch(serve(log).url)
    shows(page, written)

    for number in range(5):
        written += write(log, entries(f"Restarted Grafana container {number}"))
        shows(page, written)

    assert "last entry" in page.js("document.body.innerText")


def test_a_log_that_is_not_there_yet_appears(serve: Serve, log: Path, watch: Watch) -> None:
    page = watch(serve(log, "--interval", "0.2").url)
    page.wait("document.querySelector('#proof').textContent === 'the log is missing'")
    assert page.js(SHOWS) == "missing"

    written = write(log, entries("the first", "the second"))

    shows(page, written)


def test_an_unfinished_line_is_shown_and_completed(serve: Serve, log: Path, watch: Watch) -> None:
    append(log, "whole\n")
    page = watch(serve(log, "--interval", "0.2").url)
    shows(page, ["whole"])

    append(log, "half")
    shows(page, ["whole", "half"])
    append(log, " and half\nnext\n")

    shows(page, ["whole", "half and half", "next"])


def test_a_tab_in_the_background_misses_nothing(
    serve: Serve, log: Path, watch: Watch, browser: Browser
) -> None:
    written = write(log, entries("before"))
    page = watch(serve(log).url)
    shows(page, written)
    cover = browser.page(window=False)
    page.wait("document.hidden")

    for start in range(0, 2000, 500):
        size = len("".join(f"{line}\n" for line in numbered(start, start + 500)))
        written += write(log, numbered(start, start + 500))
        says(page, RECEIVED.format(size))
    cover.close()
    page.to_front()

    page.wait("!document.hidden")
    ends_with(page, written[-1])
    shown = page.js(TEXTS)
    assert shown == written[-len(shown) :]


def test_the_console_tells_what_happens_word_for_word(
    serve: Serve, log: Path, watch: Watch
) -> None:
    write(log, entries("before"))
    server = serve(log)
    page = watch(server.url)
    shows(page, entries("before"))

    size = len(
        append(
            log, "[2025-12-17T17:40:37Z] Auto-repair: Completed – ✅ All checks passed, naïvely\n"
        )
    )

    says(page, RECEIVED.format(size))
    greeting = [f"🔌 Connecting to WebSocket: ws://127.0.0.1:{server.port}/ws/audit"]
    greeting.append("✅ WebSocket connected - Real-time audit streaming active")
    assert [text for text in said(page) if text in greeting] == greeting


def test_two_windows_are_independent_and_show_each_line_once(
    serve: Serve, log: Path, watch: Watch
) -> None:
    written = write(log, entries("Created PostgreSQL database", "Restarted Grafana"))
    url = serve(log).url
    one, other = watch(url), watch(url)
    shows(other, written)

    search(one, "database")
    shows(one, written[:1])
    written += write(log, entries("Fixed database issue", "Restarted Redis"))

    shows(other, written)
    shows(one, [line for line in written if "database" in line])


def test_view_audit_log_comes_back_to_the_newest_entry(
    serve: Serve, log: Path, watch: Watch
) -> None:
    written = write(log, numbered(0, 2000))
    page = watch(serve(log).url)
    ends_with(page, written[-1])
    scroll_up(page, 2000)

    click(page, "View Audit Log")
    ends_with(page, written[-1])
    written += write(log, numbered(2000, 2003))

    ends_with(page, written[-1])
    shown = page.js(TEXTS)
    assert shown == written[-len(shown) :]


def test_pause_and_resume_lose_nothing(
    serve: Serve, log: Path, watch: Watch, view: Callable[..., Any]
) -> None:
    written = write(log, entries("before"))
    server = serve(log)
    page, viewer = watch(server.url), view(server)
    shows(page, written)

    click(page, "Pause")
    page.wait(f"{BUTTONS}.some(button => {NAME}(button).includes('Resume'))")
    later = write(log, numbered(0, 50))
    viewer.wait(later[-1])
    frames(page)
    paused = page.js(TEXTS)
    click(page, "Resume")

    assert paused == written
    shows(page, written + later)
    page.wait(f"{BUTTONS}.some(button => {NAME}(button).includes('Pause'))")


def test_scrolled_up_the_view_stays_and_a_button_counts(
    serve: Serve, log: Path, watch: Watch
) -> None:
    written = write(log, numbered(0, 1000))
    page = watch(serve(log).url)
    ends_with(page, written[-1])
    scroll_up(page, 1500)
    before = page.js(FIRST)

    for start, stop in ((1000, 1030), (1030, 1037)):
        written += write(log, numbered(start, stop))
        page.wait(f"/\\b{stop - 1000}\\b/.test({NEWER})")
        page.wait(AT_REST)

    assert page.js(FIRST) == before
    click(page, "37 new")
    ends_with(page, written[-1])
    page.wait(f"!{NEWER}")


# -- the filter --------------------------------------------------------------------------------------


def test_the_filter_takes_matches_only_and_marks_them(
    serve: Serve, log: Path, watch: Watch
) -> None:
    written = write(
        log,
        entries("Created database a", "Restarted Grafana", "Dropped DATABASE b", "Fixed xgboost"),
    )
    page = watch(serve(log).url)
    shows(page, written)

    page.js("document.querySelector('#searchBox').focus()")
    page.type("database")
    click(page, "Search")

    shows(page, [written[0], written[2]])
    assert page.js(
        "[...document.querySelectorAll('#auditBox mark')].map(mark => mark.textContent)"
    ) == [
        "database",
        "DATABASE",
    ]
    page.wait(f"{COUNT} === '2 matches' && document.querySelector('#count').dataset.total === '2'")
    click(page, "Clear")
    shows(page, written)
    assert page.js(
        "[document.querySelector('#searchBox').value, document.querySelectorAll('mark').length]"
    ) == ["", 0]


def test_new_entries_pass_through_the_filter(serve: Serve, log: Path, watch: Watch) -> None:
    written = write(log, entries("Created database a", "Restarted Grafana"))
    page = watch(serve(log).url)
    shows(page, written)
    search(page, "database")
    shows(page, written[:1])

    written += write(
        log,
        entries("Restarted Redis", "Auto-repair: Fixed database issue", "Restarted Redis again"),
    )

    shows(page, [line for line in written if "database" in line])
    assert page.js(f"{LINES}.pop().querySelector('mark').textContent") == "database"
    page.press("Escape")
    shows(page, written)


def test_a_filter_without_a_match_says_so(serve: Serve, log: Path, watch: Watch) -> None:
    written = write(log, entries("Restarted Grafana"))
    page = watch(serve(log).url)
    shows(page, written)

    search(page, "xgboost")

    page.wait("document.querySelector('#empty').innerText.includes('No line matches')")
    assert page.js(TEXTS) == []
    append(log, "Retrained xgboost\n")
    shows(page, ["Retrained xgboost"])
    assert not page.js("document.body.innerText.includes('No line matches')")


# (query, line, does it match?)
LANGUAGE = [
    ("database", "Created PostgreSQL database quantum", True),
    ("DataBase", "created a DATABASE", True),
    ("quantum database", "database quantum, in any order", True),
    ("database grafana", "database without the other", False),
    ('"database quantum"', "Created database quantum as a phrase", True),
    ('"database quantum"', "database, then quantum", False),
    ("\u201cdatabase quantum\u201d", "Created database quantum as a phrase", True),
    ("x.y", "plain xzy", False),
    ("/x.y/", "expression xzy", True),
    ("!grafana", "no g r a f a n a here", True),
    ("!grafana", "with Grafana in it", False),
    ("redis !grafana", "redis alone", True),
    ("redis !grafana", "redis and grafana", False),
    ("-rf", "rm -rf /tmp/build", True),
    ("-rf", "rm without it", False),
    ('kafka !"two words"', "kafka and two words", False),
    ("[error]", "nginx says [error] here", True),
    ("[error]", "nothing of the kind", False),
    ("sshd[1012]", "web1 sshd[1012]: session opened", True),
    ("/api/users?id=5", "GET /api/users?id=5 HTTP/1.1", True),
    ("/^\\[2025/", "[2025 at the start", True),
    ("/^\\[2025/", "not at the start [2025", False),
    ("/finish$/", "at the finish", True),
    ("/finish$/", "finish before the end", False),
    ("/nginx|caddy/", "a caddy only", True),
    ("/\\d{4}-\\d\\d/", "it was 2025-12", True),
    ("/\\bbase/", "in database", False),
    ("/a*b+/", "aaabbb", True),
    ("/(q)\\1/", "q q qq", False),
    ('"', 'a quote " alone', True),
    ('"open', 'not closed "open', True),
    ("/^.$/", "😀", True),
    ("ÉTÉ", "un été", True),
    ("<b>", "some <b>markup</b>", True),
    ("/\\.exe$/", "C:\\run.exe", True),
]


def test_the_language_of_the_filter(serve: Serve, log: Path, watch: Watch) -> None:
    lines = list(dict.fromkeys(line for _, line, _ in LANGUAGE))
    write(log, [*lines, "sentinel"])
    page = watch(serve(log).url)
    shows(page, [*lines, "sentinel"])
    wrong = []

    for query, line, matches in LANGUAGE:
        seen = f"{TEXTS}.includes({line!r})"
        search(page, "sentinel" if matches else "")
        page.wait(f"{seen} === {str(not matches).lower()}")
        search(page, query)
        try:
            page.wait(f"{seen} === {str(matches).lower()}", timeout=1)
        except AssertionError:
            wrong.append((query, line, matches))

    assert wrong == []


def test_an_expression_that_takes_for_ever_is_given_up_and_the_page_goes_on(
    serve: Serve, log: Path, watch: Watch
) -> None:
    written = write(log, ["a" * 60 + "!", "www.example.com", "b" * 10])
    server = serve(log, "--interval", "0.2")
    page = watch(server.url)
    shows(page, written)

    search(page, "/(a+)+$/")
    page.wait("document.body.innerText.includes('takes too long')")
    shows(page, written)
    search(page, "/^([a-z]+\\.)+com$/")
    shows(page, written[1:2])
    write(log, ["another.example.com"])
    shows(page, [written[1], "another.example.com"])
    search(page, "/(b+)+$/")
    shows(page, written[2:])
    written += ["another.example.com", *write(log, ["b" * 60 + "!"])]

    page.wait("document.body.innerText.includes('takes too long')")
    shows(page, written)
    written += write(log, ["and so on"])
    shows(page, written)
    search(page, "/(c+)+$/")
    shows(page, [])
    append(log, "c" * 30)
    shows(page, ["c" * 30])
    append(log, "c" * 30 + "!\n")  # together they take for ever
    page.wait("document.body.innerText.includes('takes too long')")
    shows(page, [*written, "c" * 60 + "!"])
    other = watch(f"{server.url}#q=/(a%2B)%2B%24/")
    other.wait("document.body.innerText.includes('takes too long')")
    shows(other, [*written, "c" * 60 + "!"])


# -- interruptions -----------------------------------------------------------------------------------


def rotate(log: Path) -> None:
    log.rename(log.with_name(log.name + ".1"))
    log.touch()


def truncate(log: Path) -> None:
    os.truncate(log, 0)


PIECES = "[...document.querySelectorAll('#auditBox .line, #auditBox .seam')]"
ORDER = f"{PIECES}.map(piece => piece.classList.contains('seam') ? 'seam' : piece.textContent)"


def joins_at_a_seam(page: Page, old: list[str], new: list[str]) -> None:
    page.wait(f"{TEXTS}.includes({new[-1]!r})")
    order = page.js(ORDER)
    assert [piece for piece in order if piece != "seam"] == old + new
    assert "seam" in order[len(old) : -len(new)]
    assert page.js(
        f"{PIECES}.every(piece => !piece.matches('.seam') || piece.dataset.kind && piece.textContent)"
    )


@pytest.mark.parametrize("change", [rotate, truncate])
def test_a_new_generation_begins_at_a_seam(
    serve: Serve, log: Path, watch: Watch, view: Callable[..., Any], change: Callable[[Path], None]
) -> None:
    old = write(log, entries("old one", "old two"))
    server = serve(log, "--interval", "0.2")
    # A page that reads the first bytes just when they are cut off gets 416, a word in its console.
    page = watch(server.url, trouble=change is truncate)
    viewer = view(server, json=True).wait(old[-1])
    shows(page, old)

    change(log)
    if change is truncate:  # until it is seen, new bytes could stand where the old ones stood
        viewer.wait(lambda viewer: viewer.of("generation"))
    new = write(log, entries("new one", "new two", "new three"))

    joins_at_a_seam(page, old, new)


def test_a_restart_brings_what_was_written_meanwhile_once(
    serve: Serve, log: Path, watch: Watch
) -> None:
    written = write(log, entries("before", "one more"))
    server = serve(log)
    pages = [watch(server.url, trouble=True) for _ in range(2)]

    server.stop()
    for page in pages:
        page.wait(f"{STATE} === 'reconnecting'")
        says(page, LATE)
    written += write(log, entries("meanwhile one", "meanwhile two"))
    eventually(lambda: said(page).count(LATE) == 2)  # away for longer than one attempt
    serve(log, port=server.port)

    assert any(text.startswith("❌ WebSocket error: ") and len(text) > 25 for text in said(page))
    for page in pages:
        shows(page, written)
        page.wait(f"{STATE} === 'live'")
        assert page.js("document.querySelectorAll('#auditBox .seam').length") == 0
    written += write(log, entries("live again"))
    for page in pages:
        shows(page, written)


def test_what_happened_to_the_log_while_the_server_was_away_shows_as_a_seam(
    serve: Serve, tmp_path: Path, watch: Watch
) -> None:
    waiting = []
    for change in (rotate, truncate):  # both wait for their five seconds at the same time
        log = tmp_path / f"{change.__name__}.log"
        old = write(log, entries("old one", "old two"))
        server = serve(log)
        page = watch(server.url, trouble=True)
        shows(page, old)
        server.stop()
        page.wait(f"{STATE} === 'reconnecting'")
        change(log)
        new = write(log, entries("new one", "new two", "new three"))
        serve(log, port=server.port)
        waiting.append((page, old, new))

    for page, old, new in waiting:
        joins_at_a_seam(page, old, new)


# -- hostile and huge logs -----------------------------------------------------------------------------


MARKUP = [
    "<img src=x onerror=alert(1)>",
    "<script>alert(2)</script>",
    "</div><b onclick='alert(3)'>bold</b>",
    "&lt;i&gt; &amp; \" ' ` ${alert(4)} {{alert(5)}}",
    "javascript:alert(6) <a href='javascript:alert(7)'>",
]
CONTROLS = "\x00\x07\x08\x0b\x0c\r\x1b\x7f\x9b\u202e\u2066\u2028"

# How far the text after a character begins behind the text before it, in pixels.
GAP = f"""(line => {{
    const walker = document.createTreeWalker(line, NodeFilter.SHOW_TEXT), edge = {{}};
    for (let node; (node = walker.nextNode());) {{
        for (const [word, side] of [['before', 'right'], ['after', 'left']]) {{
            const at = node.data.indexOf(word), range = document.createRange();
            if (at < 0) continue;
            range.setStart(node, at);
            range.setEnd(node, at + word.length);
            edge[side] = range.getBoundingClientRect()[side];
        }}
    }}
    return edge.left - edge.right;
}})({LINES}[%d])"""


def test_markup_is_shown_as_typed_and_is_harmless(serve: Serve, log: Path, watch: Watch) -> None:
    write(log, MARKUP)
    page = watch(serve(log).url)
    shows(page, MARKUP)

    for query in ("alert", "<", "&lt;", "<img src=x onerror=alert(9)>"):
        search(page, query)
        shows(page, [line for line in MARKUP if all(word in line for word in query.split())])
    search(page, "")
    write(log, MARKUP)

    shows(page, MARKUP * 2)
    made = "img, script, b, i, a, [onclick], [onerror], [href], [src]"
    assert page.js(f"document.querySelector('#auditBox').querySelectorAll({made!r}).length") == 0


def test_control_characters_are_visible_and_turn_nothing_around(
    serve: Serve, log: Path, watch: Watch
) -> None:
    written = [f"{number} before{char}after" for number, char in enumerate(CONTROLS)]
    write(log, written)
    page = watch(serve(log).url)

    page.wait(f"{LINES}.length === {len(written)}")

    gaps = {char: page.js(GAP % number) for number, char in enumerate(CONTROLS)}
    assert {char: gap for char, gap in gaps.items() if not gap or gap < 2} == {}
    heights = page.js(f"{LINES}.map(line => Math.round(line.getBoundingClientRect().height))")
    assert len(set(heights)) == 1


@pytest.mark.slow
def test_a_burst_of_300_000_lines_leaves_the_page_usable(
    serve: Serve, log: Path, watch: Watch
) -> None:
    write(log, ["before the burst"])
    page = watch(serve(log, dev=False).url)
    shows(page, ["before the burst"])
    entry = (
        "[2025-12-17T17:40:37Z] Auto-repair: {0:08d} Created PostgreSQL database number {0:08d}\n"
    )
    burst = "".join(map(entry.format, range(300_000)))
    last = entry.format(299_999).rstrip()
    slowest, nodes, end = 0.0, 0, time.monotonic() + 60

    append(log, burst)
    seen = ""
    while seen != last and time.monotonic() < end:
        asked = time.monotonic()
        found, seen = page.js(
            f"[document.getElementsByTagName('*').length, ({LINES}.pop() || 0).textContent]"
        )
        slowest, nodes = max(slowest, time.monotonic() - asked), max(nodes, found)

    assert (seen, len(burst) > 24_000_000, nodes < 20_000, slowest < 1) == (
        last,
        True,
        True,
        True,
    ), (nodes, slowest)
    ends_with(page, last)
    assert page.js("document.querySelectorAll('#auditBox .seam').length") == 0


def test_the_filter_sees_the_whole_of_a_long_line(serve: Serve, log: Path, watch: Watch) -> None:
    long = ["x" * 20_000 + " the needle", "y" * 20_000 + " no n-e-e-d-l-e"]
    write(log, ["first", *long])
    page = watch(serve(log).url)
    page.wait(f"{LINES}.length === 3")

    search(page, "needle")
    page.wait(f"{LINES}.length === 1 && /x … x+ the needle… and .* more$/.test({TEXTS}[0])")
    assert page.js("document.querySelector('mark').textContent") == "needle"
    search(page, "!needle")
    page.wait(
        f"{LINES}.length === 2 && {TEXTS}[0] === 'first' && /y… and .* more$/.test({TEXTS}[1])"
    )
    write(log, long)

    page.wait(f"{LINES}.length === 3")
    assert page.js(f"{TEXTS}.filter(text => text[0] === 'x').length") == 0


def test_what_is_left_of_a_cut_log_can_be_read_and_searched(
    serve: Serve, log: Path, watch: Watch, view: Callable[..., Any]
) -> None:
    written = write(log, numbered(0, 20_000))
    server = serve(log)
    page, viewer = watch(server.url), view(server, json=True).wait(written[-1])
    ends_with(page, written[-1])

    os.truncate(log, sum(len(line) + 1 for line in written[:2000]))
    viewer.wait(lambda viewer: viewer.of("generation"))
    write(log, ["after the cut"])
    ends_with(page, "after the cut")
    search(page, '"entry 77"')

    page.wait(f"{TEXTS}.includes({written[77]!r}) && document.body.innerText.includes('whole log')")
    shown = page.js(
        f"{LINES}.map(line => line.textContent).filter(text => text.includes('entry 77'))"
    )
    assert [text for text in shown if text in written[:2000]] == [
        line for line in written[:2000] if "entry 77" in line
    ]


def test_behind_a_hole_the_entries_can_be_read(serve: Serve, log: Path, watch: Watch) -> None:
    before = write(log, numbered(0, 100))
    os.truncate(log, log.stat().st_size + 3_000_000)
    after = write(log, ["an entry behind the hole", "and one more"])

    page = watch(serve(log).url)

    page.wait(f"{LINES}.length > 20")
    assert [text for text in page.js(TEXTS) if "\u2400" in text] == []
    assert page.js(f"{PIECES}.filter(piece => piece.dataset.kind === 'hole').length") == 1
    ends_with(page, after[-1])
    search(page, "entry")
    page.wait(f"{LINES}.length === {len(before) + 1}")


def test_a_held_view_stays_at_its_line_whatever_the_width(
    serve: Serve, log: Path, watch: Watch
) -> None:
    written = write(log, [f"{line} {'with words to wrap ' * 8}" for line in numbered(0, 3000)])
    page = watch(serve(log).url)
    ends_with(page, written[-1].rstrip() + " ")
    scroll_up(page, 3000)
    first = page.js(FIRST)[0]

    for width in (600, 360, 1000):
        page.resize(width, 700)
        page.wait(f"innerWidth === {width}")
        page.wait(AT_REST)

        assert page.js(FIRST)[0] == first


def test_the_next_screens_are_there_before_one_scrolls_and_nothing_jumps(
    serve: Serve, log: Path, watch: Watch
) -> None:
    written = write(log, numbered(0, 5000))
    page = watch(serve(log).url)
    ends_with(page, written[-1])
    above = f"{TOP} - {LINES}[0].getBoundingClientRect().top"
    below = f"{LINES}.pop().getBoundingClientRect().bottom - innerHeight"

    page.wait(f"{above} >= 4000")
    height = page.js(f"{LINES}[0].getBoundingClientRect().height")
    for _ in range(4):
        before = number_in_view(page)
        page.js(f"({SCROLLER}).scrollBy(0, -3500)")
        page.wait(f"{above} >= 4000")
        page.wait(AT_REST)
        assert before - number_in_view(page) == pytest.approx(3500 / height, abs=2)
    page.wait(f"{below} >= 4000")

    shown = page.js(TEXTS)
    start = written.index(shown[0])
    assert shown == written[start : start + len(shown)]


def test_scrolling_back_through_a_long_log_loses_no_line(
    serve: Serve, log: Path, watch: Watch
) -> None:
    written = write(log, numbered(0, 12_000))
    page = watch(serve(log).url)
    ends_with(page, written[-1])
    seen: set[int] = set()
    end = time.monotonic() + 60

    while 0 not in seen and time.monotonic() < end:
        shown = page.js(f"{LINES}.map(line => Number(line.textContent.split(' ').pop()))")
        assert shown == list(range(shown[0], shown[0] + len(shown)))
        seen.update(shown)
        page.js(f"({SCROLLER}).scrollBy(0, -3900)")
        frames(page, 2)

    assert seen == set(range(12_000))
    click(page, "View Audit Log")
    ends_with(page, written[-1])


# -- people ------------------------------------------------------------------------------------------


def tab_to(page: Page, name: str, back: bool = False) -> None:
    """With the Tab key alone; not over the end of the page, where the browser's own buttons follow."""
    for _ in range(20):
        page.press("Tab", shift=back)
        if page.js(
            f"[document.activeElement.id, {NAME}(document.activeElement)].includes({name!r})"
        ):
            return
    raise AssertionError(f"20 times Tab do not reach {name}")


def test_everything_can_be_done_from_the_keyboard(serve: Serve, log: Path, watch: Watch) -> None:
    written = write(log, numbered(0, 1000))
    page = watch(serve(log).url)
    ends_with(page, written[-1])

    page.press("/")
    page.wait("document.activeElement.id === 'searchBox'")
    page.type("/entry\\s99[34]$/x")
    assert page.js("document.activeElement.value") == "/entry\\s99[34]$/x"
    page.press("Backspace", "Enter")
    shows(page, written[993:995])
    page.press("Escape")
    page.wait("document.querySelector('#searchBox').value === ''")
    ends_with(page, written[-1])

    tab_to(page, "Pause", back=True)
    for then in ("Resume", "Pause"):
        page.press("Enter")
        page.wait(f"{BUTTONS}.some(button => {NAME}(button) === {then!r})")
    tab_to(page, "auditBox")
    page.press("PageUp")
    page.wait(f"{LINES}.pop().getBoundingClientRect().top > innerHeight")
    tab_to(page, "searchBox", back=True)
    page.type("999")
    tab_to(page, "Search")
    page.press("Enter")
    shows(page, written[999:])
    tab_to(page, "Clear")
    page.press("Enter")
    page.wait(f"{LINES}.length > 1")
    tab_to(page, "View Audit Log", back=True)
    page.press("Enter")
    ends_with(page, written[-1])


def test_everything_has_a_role_and_a_name_of_its_own(serve: Serve, log: Path, watch: Watch) -> None:
    written = write(log, numbered(0, 1000))
    page = watch(serve(log).url)
    ends_with(page, written[-1])
    scroll_up(page, 1500)
    write(log, entries("one more"))
    page.wait(f"/\\b1\\b/.test({NEWER})")

    names = page.js(f"[...document.querySelectorAll('button, input')].map({NAME})")
    buttons = page.js(f"{BUTTONS}.map({NAME})")

    assert all(name.strip() for name in names)
    assert {"View Audit Log", "Search", "Clear", "Pause"} <= set(buttons)
    words = [word for name in names for word in re.findall(r"\w+", name.lower())]
    stable = {"view", "audit", "log", "search", "clear", "pause", "resume", "export"}
    assert sorted(word for word in words if word in stable) == sorted(stable - {"resume"})
    assert page.js("document.querySelector('#auditBox').getAttribute('role')") == "log"
    assert page.js("document.documentElement.lang && document.title")
    assert (
        page.js("document.querySelector('#searchBox').placeholder")
        == "Filter e.g. database, xgboost, grafana"
    )


def test_a_narrow_window_has_everything_and_no_sideways_scrolling(
    serve: Serve, log: Path, watch: Watch
) -> None:
    written = write(log, [*numbered(0, 100), *entries("a long entry " * 40, "x" * 500), "the end"])
    page = watch(serve(log).url)
    page.resize(360, 640)

    ends_with(page, written[-1])

    wide = (
        "[...document.querySelectorAll('html, body, body *')].filter(one => one.scrollWidth > 360)"
    )
    assert page.js(f"[innerWidth, ...{wide}.map(one => one.outerHTML.slice(0, 60))]") == [360]
    for name in ("View Audit Log", "Pause", "Search", "Clear"):
        at = page.js(
            f"{BUTTONS}.find(button => {NAME}(button) === {name!r}).getBoundingClientRect()"
        )
        assert 0 <= at["left"] < at["right"] <= 360 and 0 <= at["top"] < at["bottom"] <= 640, name
    assert page.js("document.querySelector('#auditBox').clientHeight") > 320


# -- where it comes from -----------------------------------------------------------------------------

NGINX = """
daemon off; error_log stderr; pid {folder}/pid; {user}
events {{ }}
http {{
    log_format plain "$status $request_uri"; access_log {folder}/access plain;
    client_body_temp_path {folder}/1; proxy_temp_path {folder}/2; fastcgi_temp_path {folder}/3;
    uwsgi_temp_path {folder}/4; scgi_temp_path {folder}/5;
    server {{
        listen 127.0.0.1:{port};
        location /deep/audit/ {{
            proxy_pass http://127.0.0.1:{upstream}/; proxy_http_version 1.1; proxy_set_header Host $http_host;
            proxy_set_header Upgrade $http_upgrade; proxy_set_header Connection "upgrade";
        }}
    }}
}}
"""


@pytest.fixture
def behind_nginx(tmp_path: Path) -> Iterator[Callable[[int], tuple[str, Path]]]:
    """Starts it before that port; the address of the page below a path, and nginx' own list of answers."""
    program = shutil.which("nginx", path=f"{os.environ['PATH']}:/usr/sbin")
    if not program:
        unavailable("nginx is not installed")
    with ExitStack() as stack:

        def start(upstream: int) -> tuple[str, Path]:
            user, port = "user root;" if os.getuid() == 0 else "", free_port()
            (tmp_path / "conf").write_text(
                NGINX.format(folder=tmp_path, user=user, port=port, upstream=upstream)
            )
            nginx = subprocess.Popen(
                [program, "-p", tmp_path, "-e", "stderr", "-c", tmp_path / "conf"]
            )
            stack.callback(nginx.wait, 10)
            stack.callback(nginx.terminate)
            eventually((tmp_path / "pid").exists)
            return f"http://127.0.0.1:{port}/deep/audit/", tmp_path / "access"

        yield start


def test_the_page_works_below_a_path_behind_a_proxy(
    serve: Serve, log: Path, watch: Watch, behind_nginx: Callable[[int], tuple[str, Path]]
) -> None:
    written = write(log, numbered(0, 2000))
    url, answers = behind_nginx(serve(log).port)

    page = watch(url)

    ends_with(page, written[-1])
    page.wait("/errors 0$/.test(document.querySelector('#errors').textContent)")
    page.wait("/warnings 0$/.test(document.querySelector('#warnings').textContent)")
    written += write(log, ["through the proxy"])
    ends_with(page, written[-1])
    assert url.replace("http:", "🔌 Connecting to WebSocket: ws:") + "ws/audit" in said(page)
    page.goto("about:blank")
    eventually(lambda: "/deep/audit/ws/audit" in answers.read_text())
    answered = answers.read_text().splitlines()
    # 499 is NGINX's word for what was under way when the page was left.
    assert [line for line in answered if not re.match(r"([12]\d\d|499) /deep/audit/", line)] == []


def test_nothing_foreign_is_requested(serve: Serve, log: Path, watch: Watch) -> None:
    written = write(log, numbered(0, 2000))
    url = serve(log).url
    page = watch(url)
    ends_with(page, written[-1])

    click(page, "View Audit Log")
    ends_with(page, written[-1])

    asked = page.js("performance.getEntriesByType('resource').map(entry => entry.name)")
    assert [
        address for address in asked if not address.startswith((url, url.replace("http:", "ws:")))
    ] == []


def test_the_source_is_one_file_and_writes_text_only() -> None:
    source = SOURCE.read_text()
    comments = r"<!--.*?-->|/\*.*?\*/|(?<![:\"'])//[^\n]*"

    code = re.sub(comments, "", source, flags=re.S)

    assert not re.search(r"https?://", code)
    assert not re.search(
        r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\b|new Function", source
    )
    assert [
        len(re.findall(f"<{tag}\\b", source)) for tag in ("style", "script", "link rel=.stylesheet")
    ] == [1, 1, 0]
    assert not re.search(r"<script[^>]+src|@import|url\(", source)


@pytest.fixture(params=WEBKITS)
def watch_in_webkit(request: pytest.FixtureRequest) -> Iterator[Watch]:
    with ExitStack() as stack:
        webkit = request.param()
        stack.callback(webkit.quit)
        yield from watching(webkit)


def test_webkit_shows_the_log_too(serve: Serve, log: Path, watch_in_webkit: Watch) -> None:
    written = write(log, entries("Created database a", "Restarted Grafana"))
    page = watch_in_webkit(serve(log).url)
    shows(page, written)

    size = len(append(log, "Fixed database – ✅\n"))
    shows(page, [*written, "Fixed database – ✅"])
    page.js("(document.querySelector('#searchBox').value = 'database')")
    page.js(f"{BUTTONS}.find(button => {NAME}(button) === 'Search').click()")

    shows(page, [written[0], "Fixed database – ✅"])
    assert (
        page.js("[...document.querySelectorAll('mark')].map(mark => mark.textContent)")
        == ["database"] * 2
    )
    says(page, RECEIVED.format(size))
